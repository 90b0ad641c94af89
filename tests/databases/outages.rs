//! Outages: an answer or an error in time, never a wrong row, and right again as soon as the server is.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

use super::{behind_a_proxy, for_every_server, name_of};
use crate::support::{PATIENCE, database::Engine, eventually, proxy::Fault};

for_every_server![
    no_fault_of_the_network_gives_a_wrong_row_or_outlasts_itself,
    the_first_query_after_a_restart_is_answered,
    a_server_that_was_stopped_is_used_again_when_it_goes_on,
];

const SETTINGS: [(&str, &str); 4] = [
    ("CACHE_HARD_TIMEOUT_MS", "1000"),
    ("DATABASE_CONNECT_TIMEOUT_MS", "800"),
    ("DATABASE_MAX_CONNECTIONS", "4"),
    ("FEED_INTERVAL_MS", "0"),
];

async fn no_fault_of_the_network_gives_a_wrong_row_or_outlasts_itself(engine: Engine) {
    let (server, proxy, database) = behind_a_proxy(engine, &SETTINGS).await;
    let database = std::sync::Arc::new(database);
    let right = eventually("a row", async || name_of(&database, 680).await.ok()).await;
    for fault in [
        Fault::Refuse,
        Fault::Stall,
        Fault::StallRequests,
        Fault::Slow(Duration::from_millis(20)),
        Fault::CutMidReply,
        Fault::Garbage,
    ] {
        proxy.set(fault);
        for _ in 0..3 {
            let readers = (0..6).map(|_| {
                let database = database.clone();
                // In a task of its own, as in the handler: noise may make a driver panic.
                let read = tokio::spawn(async move { name_of(&database, 680).await });
                async { timeout(PATIENCE, read).await.expect("has a deadline") }
            });
            for name in join_all(readers).await.into_iter().flatten().flatten() {
                assert_eq!(name, right, "{fault:?}");
            }
        }
        if let Fault::Slow(_) = fault {
            assert_eq!(name_of(&database, 680).await.as_ref(), Ok(&right), "slow is not broken");
        }
        proxy.set(Fault::None);
        eventually("it is right again", async || (name_of(&database, 680).await.as_ref() == Ok(&right)).then_some(()))
            .await;
        eventually("no more connections than allowed", async || (server.connections().await <= 4).then_some(())).await;
    }
}

async fn the_first_query_after_a_restart_is_answered(engine: Engine) {
    let patient = [
        ("CACHE_HARD_TIMEOUT_MS", "10000"),
        ("CACHE_LEASE_MS", "20000"),
        ("REQUEST_TIMEOUT_MS", "20000"),
        ("DATABASE_MAX_CONNECTIONS", "4"),
        ("FEED_INTERVAL_MS", "0"),
    ];
    let (mut server, _proxy, database) = behind_a_proxy(engine, &patient).await;
    for _ in 0..3 {
        // Several connections, all of which the server forgets.
        let names = join_all((0..16).map(|_| name_of(&database, 680))).await;
        assert!(names.iter().all(Result::is_ok), "{names:?}");
        server.kill();
        assert!(name_of(&database, 680).await.is_err(), "there is no server");
        server.restart().await;
        assert!(name_of(&database, 680).await.is_ok());
    }
    let names = join_all((0..16).map(|_| name_of(&database, 680))).await;
    assert!(names.iter().all(Result::is_ok), "{names:?}");
    // Nobody asks while it is away: every connection of the pool is dead, and none of them shows.
    server.restart().await;
    let names = join_all((0..16).map(|_| name_of(&database, 680))).await;
    assert!(names.iter().all(Result::is_ok), "{names:?}");
}

async fn a_server_that_was_stopped_is_used_again_when_it_goes_on(engine: Engine) {
    let (server, _proxy, database) = behind_a_proxy(engine, &SETTINGS).await;
    let all_answer = async || {
        let names = join_all((0..16).map(|_| name_of(&database, 680))).await;
        names.iter().all(Result::is_ok).then_some(())
    };
    eventually("all are answered", all_answer).await;
    server.signal("STOP");
    let names = join_all((0..16).map(|_| name_of(&database, 680))).await;
    assert!(names.iter().all(Result::is_err), "{names:?}");
    sleep(Duration::from_millis(100)).await;
    server.signal("CONT");
    eventually("all are answered again", all_answer).await;
    eventually("no more connections than allowed", async || (server.connections().await <= 4).then_some(())).await;
}
