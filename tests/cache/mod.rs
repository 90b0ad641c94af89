//! The cache against a real Redis, with a source of truth that can be held back, fail and hang: C1–C7.

mod resilience;
pub mod world;

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{future::join_all, poll};
use product_cache::cache::{Failure, Level};
use redis::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use self::world::{BUDGET, Node, Truth, ended, key, value};
use crate::support::{
    PATIENCE, eventually,
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

const LOG: &str = "{product-cache}:log";

// ---- C1: one load per key and instance -------------------------------------------------------------------------

#[tokio::test]
async fn a_thousand_readers_of_a_cold_key_share_one_load() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let readers: Vec<_> = (0..1000).map(|_| node.begin(1)).collect();
    truth.begun(1).await;
    truth.release();
    for reader in readers {
        assert_eq!(value(&ended(reader).await.unwrap()), Some(10));
    }
    assert_eq!(truth.loads(), 1);
    assert_eq!(node.read(1).await.how().level, Level::Memory);
}

#[tokio::test]
async fn a_failed_load_is_shared_too_instead_of_being_repeated_by_each_waiter() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.fail(true);
    truth.hold();
    let readers: Vec<_> = (0..100).map(|_| node.begin(1)).collect();
    truth.begun(1).await;
    sleep(Duration::from_millis(50)).await; // the hundred have joined: none of them is polled later than this test is
    truth.release();
    for reader in readers {
        assert!(matches!(ended(reader).await, Err(Failure::Unavailable(_))));
    }
    assert_eq!(truth.loads(), 1);
    truth.fail(false);
    assert_eq!(node.value(1).await, Some(10), "the failure is not kept");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_neither_the_load_nor_the_others_wait() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let (first, second) = (node.begin(1), node.begin(1));
    truth.begun(1).await;
    first.abort();
    let _ = first.await;
    truth.release();
    assert_eq!(value(&ended(second).await.unwrap()), Some(10));
    assert_eq!(truth.loads(), 1);
}

#[tokio::test]
async fn a_reader_whose_load_an_expiry_overtook_does_not_wait_for_it() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let (first, second) = (node.begin(1), node.begin(1));
    truth.begun(1).await;
    sleep(Duration::from_millis(50)).await; // the second one has joined
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(second).await.unwrap()), Some(11));
    truth.release();
    assert_eq!(value(&ended(first).await.unwrap()), Some(10), "whose load began after it came");
}

#[tokio::test]
async fn a_load_that_panics_fails_its_readers_and_frees_its_key() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.0.panicking.store(true, Ordering::SeqCst);
    assert!(matches!(node.try_read(1).await, Err(Failure::Broken(_))));
    assert_eq!(node.value(1).await, Some(10));
}

#[tokio::test]
async fn a_load_that_hangs_delays_no_other_key_and_gives_its_own_back() {
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::new(&truth, None, &[("CACHE_HARD_TIMEOUT_MS", "300")]);
    truth.hold();
    let hung = node.begin(1);
    truth.begun(1).await;
    let other = node.begin(2);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(other).await.unwrap()), Some(20), "another key is loaded meanwhile");
    assert!(matches!(ended(hung).await, Err(Failure::Unavailable(_))), "it gives up");
    truth.release();
    assert_eq!(node.value(1).await, Some(10), "and its key is free");
}

// ---- C3: no stale set -------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_load_that_began_before_an_expiry_is_neither_kept_nor_shown_to_later_readers() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let early = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let late = node.begin(1);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(late).await.unwrap()), Some(11), "a reader that came after the expiry");
    truth.release();
    let early = value(&ended(early).await.unwrap());
    assert!(matches!(early, Some(10 | 11)), "a reader that came before it may see either: {early:?}");
    assert_eq!(node.value(1).await, Some(11), "what is kept");
}

#[tokio::test]
async fn what_is_expired_under_those_who_joined_a_batch_is_loaded_again_in_one_query() {
    let truth = Truth::new(&[(1, 10), (2, 20), (3, 30)]);
    let node = Node::new(&truth, None, &[]);
    let keys = [key(1), key(2), key(3)];
    truth.hold();
    let mut first = pin!(node.cache.get_or_load(&keys, None, &node.load));
    assert!(poll!(&mut first).is_pending());
    truth.begun(1).await;
    let mut joined = pin!(node.cache.get_or_load(&keys, None, &node.load));
    assert!(poll!(&mut joined).is_pending());
    truth.set(1, 11);
    truth.set(2, 21);
    node.cache.expire(&keys[..2], BUDGET).await.unwrap();
    truth.release();
    first.await.into_iter().for_each(|answer| drop(answer.unwrap()));
    let answers: Vec<_> = joined.await.iter().map(|answer| value(answer.as_ref().unwrap())).collect();
    assert_eq!((answers, truth.loads()), (vec![Some(11), Some(21), Some(30)], 2));
}

#[tokio::test]
async fn an_expiry_of_everything_overtakes_loads_too() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let early = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    node.cache.expire_everything(BUDGET).await.unwrap();
    let late = node.begin(1);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(late).await.unwrap()), Some(11));
    truth.release();
    let _ = ended(early).await;
    assert_eq!(node.value(1).await, Some(11));
}

#[tokio::test]
async fn a_fill_is_refused_by_redis_if_another_instance_expired_the_key_meanwhile() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    // B is deaf to the log, so that only the lease can tell it.
    let proxy = Proxy::start(redis.port).await;
    let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    proxy.set_on(Link::Log, Fault::Stall);
    truth.hold();
    let early = b.begin(1);
    truth.begun(1).await;
    let joined = b.begin(1);
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let late = b.begin(1); // joins the load under way, which it must not believe
    truth.release();
    assert_eq!(value(&ended(late).await.unwrap()), Some(11), "came after the expiry");
    let _ = (ended(early).await, ended(joined).await);
    assert_eq!(b.value(1).await, Some(11), "B's memory");
    let c = Node::new(&truth, Some(&redis.url()), &[]);
    let answer = c.read(1).await;
    assert_eq!((value(&answer), answer.how().level), (Some(11), Level::Redis), "Redis");
}

#[tokio::test]
async fn an_absent_entry_is_ended_by_an_expiry() {
    let truth = Truth::new(&[]);
    let node = Node::new(&truth, None, &[]);
    assert_eq!(node.value(1).await, None);
    assert_eq!(node.value(1).await, None);
    assert_eq!(truth.loads(), 1, "absent is remembered");
    truth.set(1, 10);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_readers_and_expiries_never_show_a_value_older_than_an_acknowledged_expiry() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 0)]);
    for redis_url in [None, Some(redis.url())] {
        let node = Arc::new(Node::new(&truth, redis_url.as_deref(), &[]));
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let reads = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> = (0..8)
            .map(|_| {
                let (node, acknowledged, stop, reads) =
                    (node.clone(), acknowledged.clone(), stop.clone(), reads.clone());
                tokio::spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        let least = acknowledged.load(Ordering::SeqCst) as u64;
                        let seen = node.value(1).await.unwrap();
                        assert!(seen >= least, "saw {seen} after the expiry for {least} was acknowledged");
                        reads.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        let base = truth.0.values.lock().unwrap()[&1];
        for value in base + 1..=base + 150 {
            truth.set(1, value);
            node.cache.expire(&[key(1)], BUDGET).await.unwrap();
            acknowledged.store(value as usize, Ordering::SeqCst);
            let read = reads.load(Ordering::SeqCst);
            while reads.load(Ordering::SeqCst) == read && !readers.iter().any(JoinHandle::is_finished) {
                tokio::task::yield_now().await;
            }
        }
        stop.store(true, Ordering::SeqCst);
        for reader in readers {
            timeout(PATIENCE, reader).await.expect("ends").expect("no stale read");
        }
    }
}

// ---- C2: one load per key and cluster ---------------------------------------------------------------------------

#[tokio::test]
async fn readers_of_a_cold_key_on_four_instances_share_one_load() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let mut nodes = Vec::new();
    for _ in 0..4 {
        nodes.push(Node::hearing(&truth, &redis.url(), &[]).await);
    }
    truth.hold();
    let readers: Vec<_> = (0..200).map(|n| nodes[n % 4].begin(1)).collect();
    truth.begun(1).await;
    truth.release();
    for reader in readers {
        assert_eq!(value(&ended(reader).await.unwrap()), Some(10));
    }
    assert_eq!(truth.loads(), 1);
}

/// What a holder that was killed leaves behind, for a minute.
async fn leave_lease(redis: &RedisServer, id: i64) {
    let later_ms =
        (std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() + 60_000).to_string();
    redis.command(&["HSET", &format!("{{product-cache}}:thing:{id}"), "t", "dead", "u", &later_ms, "a", "0"]).await;
}

#[tokio::test]
async fn each_key_of_a_batch_is_loaded_as_soon_as_its_own_lease_is_free() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let settings = [("CACHE_LEASE_WAIT_MS", "30000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    leave_lease(&redis, 1).await;
    leave_lease(&redis, 2).await;
    let (cache, load) = (node.cache.clone(), node.load.clone());
    let reader = tokio::spawn(async move { cache.get_or_load(&[key(1), key(2)], None, &load).await });
    sleep(Duration::from_millis(200)).await; // it waits for both
    assert_eq!(truth.loads(), 0);
    redis.command(&["DEL", "{product-cache}:thing:1"]).await;
    eventually("the first is loaded", async || (*truth.0.loads.lock().unwrap() == [[1]]).then_some(())).await;
    assert!(!reader.is_finished(), "the second is waited for");
    redis.command(&["DEL", "{product-cache}:thing:2"]).await;
    let answers = timeout(PATIENCE, reader).await.expect("the read ends").unwrap();
    assert_eq!(answers.iter().map(|answer| value(answer.as_ref().unwrap())).collect::<Vec<_>>(), [Some(10), Some(20)]);
    assert_eq!(*truth.0.loads.lock().unwrap(), [[1], [2]]);
}

#[tokio::test]
async fn a_lease_whose_holder_died_costs_one_more_load() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    leave_lease(&redis, 1).await;
    let node = Node::hearing(&truth, &redis.url(), &[("CACHE_LEASE_WAIT_MS", "200")]).await;
    assert_eq!(node.value(1).await, Some(10));
    assert_eq!(truth.loads(), 1);
    assert_eq!(node.read(1).await.how().level, Level::Memory, "it is kept here all the same");
}

// ---- C4, C5, C6, C7: expiries -----------------------------------------------------------------------------------

#[tokio::test]
async fn an_acknowledged_expiry_is_in_redis_at_once_and_in_every_memory_soon() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    for id in [1, 2] {
        a.value(id).await;
        b.value(id).await;
    }
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(redis.command(&["HEXISTS", "{product-cache}:thing:1", "f"]).await, redis::Value::Int(0), "Redis");
    assert_eq!(a.value(1).await, Some(11), "the instance that was told");
    eventually("the other instance has dropped it", async || (b.value(1).await == Some(11)).then_some(())).await;
    assert_eq!(truth.loads(), 3, "the other instance reads it from Redis");
    assert_eq!(b.read(2).await.how().level, Level::Memory, "nothing else was dropped");
}

#[tokio::test]
async fn an_instance_that_was_disconnected_hears_what_it_missed_and_drops_only_that() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let proxy = Proxy::start(redis.port).await;
    let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    b.value(1).await;
    b.value(2).await;
    let position = b.cache.status().log_position;
    proxy.set(Fault::Refuse);
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(b.value(1).await, Some(10), "it cannot know yet");
    proxy.set(Fault::None);
    eventually("it resumes", async || (b.cache.status().log_position > position).then_some(())).await;
    assert_eq!(b.value(1).await, Some(11));
    assert_eq!(b.read(2).await.how().level, Level::Memory, "what was not expired is still there");
}

#[tokio::test]
async fn a_log_trimmed_past_an_instance_or_lost_makes_all_its_memory_stale() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    for loss in [vec!["XTRIM", LOG, "MAXLEN", "1"], vec!["FLUSHALL"]] {
        let proxy = Proxy::start(redis.port).await;
        let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
        let seen = b.value(1).await.unwrap();
        b.value(2).await;
        let position = b.cache.status().log_position;
        proxy.set(Fault::Refuse);
        truth.set(1, seen + 1);
        a.cache.expire(&[key(1)], BUDGET).await.unwrap();
        a.cache.expire(&[key(3)], BUDGET).await.unwrap();
        redis.command(&loss).await;
        proxy.set(Fault::None);
        eventually("it finds the log changed", async || (b.cache.status().log_position != position).then_some(()))
            .await;
        assert_eq!(b.value(1).await, Some(seen + 1), "{loss:?}");
        assert_ne!(b.read(2).await.how().level, Level::Memory, "{loss:?}: nothing in memory is trusted");
    }
}

/// The id of the log's last notice, and what it says.
async fn last_notice(redis: &RedisServer) -> (String, String) {
    let last = redis.command(&["XREVRANGE", LOG, "+", "-", "COUNT", "1"]).await;
    let [(id, [_, text])]: [(String, [String; 2]); 1] = redis::from_redis_value(last).unwrap();
    (id, text)
}

#[tokio::test]
async fn a_notice_of_another_form_is_about_everything_and_nobody_answers_it() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20), (3, 30)]);
    // A late answer would be asked for again, and an expiry appended twice.
    let settings = [("REDIS_RESPONSE_TIMEOUT_MS", "5000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let hearing = async || Node::hearing(&truth, &redis.url(), &settings).await;
    let nodes = [hearing().await, hearing().await];
    let heard = async |notices: i64| {
        let (last, _) = last_notice(&redis).await;
        eventually("both hear it", async || {
            let positions = nodes.each_ref().map(|node| node.cache.status().log_position.unwrap().to_string());
            positions.iter().all(|position| *position == last).then_some(())
        })
        .await;
        assert_eq!(redis.command(&["XLEN", LOG]).await, Value::Int(notices));
    };
    for (form, value) in [(["p", "0-0 0 0 x *"], 11), (["n", "0-0 0"], 12), (["n", "0-0 0 0 x"], 13)] {
        for id in 1..=3 {
            join_all(nodes.each_ref().map(|node| node.value(id))).await;
        }
        let Value::Int(notices) = redis.command(&["XLEN", LOG]).await else { panic!("no length") };
        (1..=3).for_each(|id| truth.set(id, value));
        redis.command(&["XADD", LOG, "*", form[0], form[1]]).await;
        heard(notices + 1).await;
        assert_eq!(nodes[0].value(1).await, Some(value), "{form:?}: neither memory nor Redis is trusted");
        assert_eq!(nodes[1].value(1).await, Some(value), "{form:?}");
        let new = hearing().await;
        assert_eq!(new.value(2).await, Some(value), "{form:?}: nor by one that comes later");
        new.cache.expire(&[key(1)], BUDGET).await.unwrap();
        heard(notices + 2).await;
        let later = hearing().await;
        assert_eq!(later.value(3).await, Some(value), "{form:?}: nor once the log goes on");
    }
}

#[tokio::test]
async fn a_reset_is_answered_though_a_notice_of_another_form_follows_it() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let _node = Node::hearing(&Truth::new(&[]), &proxy.redis_url(), &[]).await;
    proxy.set(Fault::Refuse);
    redis.command(&["DEL", LOG]).await;
    for (field, text) in [("n", "0-0 0 0 nobody thing:9"), ("p", "0-0")] {
        redis.command(&["XADD", LOG, "*", field, text]).await;
    }
    proxy.set(Fault::None);
    eventually("everything in Redis is made stale", async || last_notice(&redis).await.1.ends_with(" *").then_some(()))
        .await;
}

#[tokio::test]
async fn notices_that_are_a_day_old_or_too_many_leave_the_log() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    // Redis drops whole nodes of a stream, a hundred notices each.
    let add = "for i = 1, 1000 do
      redis.call('XADD', KEYS[1], ARGV[1] == 'old' and i .. '-1' or '*', 'n', '0-0 0 0 nobody product:2')
    end";
    for (age, settings, most) in [("old", &[][..], 100), ("new", &[("REDIS_LOG_MAX_LENGTH", "500")], 600)] {
        redis.command(&["FLUSHALL"]).await;
        redis.command(&["EVAL", add, "1", LOG, age]).await;
        let node = Node::hearing(&truth, &redis.url(), settings).await;
        node.cache.expire(&[key(1)], BUDGET).await.unwrap();
        let Value::Int(left) = redis.command(&["XLEN", LOG]).await else { panic!("no length") };
        assert!((1..=most).contains(&left), "{age}: {left} of 1000");
    }
}

#[tokio::test]
async fn a_reset_log_is_noticed_without_any_further_expiry() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    truth.set(1, 11);
    redis.command(&["FLUSHALL"]).await;
    eventually("memory is no longer trusted", async || (node.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn memory_is_trusted_for_seconds_only_while_the_log_cannot_be_heard() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let proxy = Proxy::start(redis.port).await;
    let node = Node::hearing(&truth, &proxy.redis_url(), &[("CACHE_UNHEARD_MAX_S", "3")]).await;
    node.value(1).await;
    proxy.set(Fault::Stall);
    truth.set(1, 11);
    let cut = Instant::now();
    let seen = eventually("the entry is no longer fresh", async || {
        node.value(1).await.filter(|value| *value == 11).map(|_| cut.elapsed())
    });
    let after = seen.await;
    assert!(after < Duration::from_secs(3 + 2), "trusted for {after:?}"); // loads may wait for Redis' deadlines
}

#[tokio::test]
async fn what_cannot_be_heard_of_is_trusted_from_the_moment_its_row_was_read() {
    let truth = Truth::new(&[(1, 10)]);
    let nowhere = Some("redis://127.0.0.1:1");
    let node = Node::new(&truth, nowhere, &[("CACHE_UNHEARD_MAX_S", "3"), ("CACHE_SOFT_TIMEOUT_MS", "0")]);
    truth.hold();
    let reader = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    sleep(Duration::from_secs(2)).await;
    truth.release();
    assert_eq!(value(&ended(reader).await.unwrap()), Some(10), "its load began before the change");
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(node.value(1).await, Some(11));
}

#[tokio::test]
async fn an_expiry_that_redis_cannot_be_told_of_is_queued_and_delivered_when_it_can() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    a.value(1).await;
    b.value(1).await;
    redis.signal("STOP");
    truth.set(1, 11);
    assert!(a.cache.expire(&[key(1)], Duration::from_millis(300)).await.is_err(), "it says so");
    assert_eq!(a.cache.status().expiries_queued, 1);
    assert_eq!(a.value(1).await, Some(11), "here it is expired at once");
    redis.signal("CONT");
    eventually("it is delivered", async || (a.cache.status().expiries_queued == 0).then_some(())).await;
    eventually("the other instance hears it", async || (b.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn an_instance_does_not_believe_redis_about_a_key_whose_expiry_it_still_has_to_deliver() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    Node::hearing(&truth, &redis.url(), &[]).await.value(2).await; // which the first one has nothing of
    truth.set(1, 11);
    truth.set(2, 21);
    // Expiries fail from here on; reads do not, and still find the old entry fresh.
    redis.command(&["ACL", "SETUSER", "default", "-hdel"]).await;
    assert!(node.cache.expire(&[key(1), key(2)], Duration::from_millis(200)).await.is_err());
    let other = Node::new(&truth, Some(&redis.url()), &[]);
    assert_eq!(other.value(1).await, Some(10), "others cannot know");
    for (id, new) in [(1, 11), (2, 21)] {
        let answer = node.read(id).await;
        assert_eq!((value(&answer), answer.how().level), (Some(new), Level::Database));
    }
    redis.command(&["ACL", "SETUSER", "default", "+hdel"]).await;
    eventually("it is delivered", async || (node.cache.status().expiries_queued == 0).then_some(())).await;
    eventually("and heard", async || (other.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn after_an_expiry_of_everything_redis_is_not_believed_about_what_was_there_before() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let proxy = Proxy::start(redis.port).await;
    let author = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    let deaf_proxy = Proxy::start(redis.port).await;
    let deaf = Node::hearing(&truth, &deaf_proxy.redis_url(), &[("CACHE_UNHEARD_MAX_S", "3")]).await;
    deaf.value(1).await;
    // Neither hears its own or others' notices from here on; the author must know by itself.
    proxy.set_on(Link::Log, Fault::Stall);
    deaf_proxy.set_on(Link::Log, Fault::Stall);
    truth.set(1, 11);
    author.cache.expire_everything(BUDGET).await.unwrap();
    truth.hold();
    let read = author.begin(1);
    truth.begun(2).await; // it asks the database, not Redis
    truth.release();
    assert_eq!(value(&ended(read).await.unwrap()), Some(11));
    redis.command(&["DEL", "{product-cache}:thing:1"]).await;
    let old = Node::new(&Truth::new(&[(1, 10)]), Some(&redis.url()), &[]);
    old.value(1).await; // as if Redis had gone back
    eventually("without the log Redis is not believed for longer than memory", async || {
        (deaf.value(1).await == Some(11)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_log_lost_while_nobody_heard_it_makes_what_is_in_redis_stale() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    for (new, first_notice) in [(11, false), (12, true)] {
        let last = Node::hearing(&truth, &redis.url(), &[]).await;
        last.value(1).await;
        last.cache.expire_everything(BUDGET).await.unwrap();
        drop(last);
        truth.set(1, new);
        redis.command(&["DEL", LOG]).await;
        let node = Node::new(&truth, Some(&redis.url()), &[]);
        if first_notice {
            node.cache.expire(&[key(2)], BUDGET).await.unwrap(); // maybe before it hears
        }
        node.until_it_hears().await;
        assert_eq!(node.value(1).await, Some(new));
    }
}

#[tokio::test]
async fn a_lease_of_a_clock_that_went_back_is_none() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    let given = format!("{:014}{:010}", 99_999_999_999_999_u64, 0);
    redis.command(&["HSET", "{product-cache}:thing:1", "t", "another's", "u", "99999999999999", "a", &given]).await;
    node.value(1).await;
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.read(1).await.how().level, Level::Redis, "the load was stored");
}

#[tokio::test]
async fn somebody_elses_value_under_our_name_stops_no_expiry_and_no_read() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    redis.command(&["SET", "{product-cache}:thing:1", "foreign"]).await;
    let answers = node.cache.get_or_load(&[key(1), key(2)], None, &node.load).await;
    assert_eq!(answers.iter().map(|answer| value(answer.as_ref().unwrap())).collect::<Vec<_>>(), [Some(10), Some(20)]);
    node.cache.expire(&[key(1), key(2)], BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(10));
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.read(1).await.how().level, Level::Redis, "the name is ours again");

    redis.command(&["DEL", LOG]).await;
    redis.command(&["SET", LOG, "foreign"]).await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    eventually("it is heard again", async || (other.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_left_and_taken_back_when_it_is_a_primary_again() {
    let (redis, primary) = (RedisServer::start().await, RedisServer::start().await);
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    redis.command(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]).await;
    truth.set(1, 11);
    assert!(node.cache.expire(&[key(1)], Duration::from_millis(500)).await.is_err());
    assert_eq!(node.value(1).await, Some(11));
    eventually("it is left", async || (node.cache.status().redis_connected == Some(false)).then_some(())).await;
    redis.command(&["REPLICAOF", "NO", "ONE"]).await;
    eventually("what was queued is delivered", async || (node.cache.status().expiries_queued == 0).then_some(())).await;
    assert_eq!(node.value(1).await, Some(11));
}

#[tokio::test]
async fn an_older_copy_of_redis_brings_nothing_back() {
    let mut redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    a.value(1).await;
    b.value(2).await;
    redis.command(&["SAVE"]).await;
    truth.set(1, 11);
    truth.set(2, 21);
    a.cache.expire(&[key(1), key(2)], BUDGET).await.unwrap();
    assert_eq!(a.value(1).await, Some(11));
    eventually("B hears it", async || (b.value(2).await == Some(21)).then_some(())).await;
    let position = a.cache.status().log_position;
    redis.restart().await; // with what was saved: both old entries fresh, and a log that ends earlier
    eventually("both have noticed", async || {
        for node in [&a, &b] {
            assert_eq!((node.value(1).await, node.value(2).await), (Some(11), Some(21)), "nothing comes back");
        }
        (a.cache.status().log_position != position && b.cache.status().log_position != position).then_some(())
    })
    .await;
    eventually("nor to a new instance", async || {
        let new = Node::hearing(&truth, &redis.url(), &[]).await;
        (new.value(1).await == Some(11) && new.value(2).await == Some(21)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_redis_clock_that_went_back_costs_nothing_but_age() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let stored: Vec<u8> =
        redis::from_redis_value(redis.command(&["HGET", "{product-cache}:thing:1", "b"]).await).unwrap();
    let later = [format!("{:014}", now_ms + 60_000).as_bytes(), &stored[14..]].concat();
    redis.command(&[b"HSET", "{product-cache}:thing:1".as_bytes(), b"b", &later]).await;
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(node.value(1).await, Some(10));
    truth.set(1, 11);
    let afresh = node.cache.get_or_load(&[key(1)], Some(Duration::ZERO), &node.load).await.remove(0).unwrap();
    assert_eq!(value(&afresh), Some(11));
}

#[tokio::test]
async fn an_expiry_of_everything_reaches_what_was_loaded_before_redis_clock_went_back() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    for id in [1, 2] {
        node.value(id).await;
        // As if the clock had gone back by a minute since the load.
        let name = format!("{{product-cache}}:thing:{id}");
        let stored: Vec<u8> = redis::from_redis_value(redis.command(&["HGET", &name, "b"]).await).unwrap();
        let loaded_ms: u64 = std::str::from_utf8(&stored[..14]).unwrap().parse().unwrap();
        let later = [format!("{:014}", loaded_ms + 60_000).as_bytes(), &stored[14..]].concat();
        redis.command(&[b"HSET", name.as_bytes(), b"b", &later]).await;
        truth.set(id, id as u64 * 10 + 1);
    }
    node.cache.expire_everything(BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(11), "by the script, as memory holds a stale copy");
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.value(2).await, Some(21), "by the look before it");
}

// ---- L2 ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_new_instance_reads_redis_instead_of_the_database_and_keeps_it_no_longer_than_redis() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let old = Node::hearing(&truth, &redis.url(), &[("CACHE_DURATION_S", "3")]).await;
    old.value(1).await;
    sleep(Duration::from_millis(1200)).await; // its age is what is tested
    let new = Node::hearing(&truth, &redis.url(), &[("CACHE_DURATION_S", "300")]).await;
    let answer = new.read(1).await;
    assert_eq!(answer.how().level, Level::Redis);
    assert_eq!(truth.loads(), 1);
    assert!(answer.age() >= Duration::from_millis(1200), "{:?}", answer.age());
    assert!(answer.ttl_s() < 2, "{}", answer.ttl_s());
}

#[tokio::test]
async fn a_hit_in_redis_is_one_command_and_takes_no_lease() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let new = Node::hearing(&truth, &redis.url(), &[]).await;
    let before = (redis.calls("evalsha").await, redis.calls("hmget").await);
    assert_eq!(new.read(1).await.how().level, Level::Redis);
    assert_eq!((redis.calls("evalsha").await, redis.calls("hmget").await), (before.0, before.1 + 1));
}

#[tokio::test]
async fn max_age_asks_redis_and_the_database_afresh() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    truth.set(1, 11); // without a notice: only asking helps
    let ask = async |max_age| {
        let answer = node.cache.get_or_load(&[key(1)], max_age, &node.load).await.remove(0).unwrap();
        value(&answer)
    };
    assert_eq!(ask(Some(Duration::from_secs(60))).await, Some(10));
    assert_eq!(ask(Some(Duration::ZERO)).await, Some(11));
    assert_eq!(ask(None).await, Some(11), "what was asked for afresh is kept");
    assert_eq!(truth.loads(), 2);
    truth.set(1, 12);
    // One that has nothing in memory looks into Redis by another way.
    let new = Node::hearing(&truth, &redis.url(), &[]).await;
    let afresh = new.cache.get_or_load(&[key(1)], Some(Duration::ZERO), &new.load).await.remove(0).unwrap();
    assert_eq!(value(&afresh), Some(12));
}

#[tokio::test]
async fn a_batch_costs_one_round_trip_to_redis_and_one_query_for_what_memory_lacks() {
    let redis = RedisServer::start().await;
    let values: Vec<_> = (1..=100).map(|id| (id, id as u64)).collect();
    let truth = Truth::new(&values);
    let old = Node::hearing(&truth, &redis.url(), &[]).await;
    let keys: Vec<_> = (1..=100).map(key).collect();
    assert!(old.cache.get_or_load(&keys[..60], None, &old.load).await.iter().all(Result::is_ok));
    assert_eq!(truth.loads(), 1, "one query for sixty");
    let new = Node::hearing(&truth, &redis.url(), &[]).await;
    new.cache.get_or_load(&keys[..20], None, &new.load).await;
    let reads = async || {
        let info: String = redis::from_redis_value(redis.command(&["INFO", "stats"]).await).unwrap();
        let line = info.lines().find_map(|line| line.strip_prefix("total_reads_processed:").map(str::to_owned));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    let before = reads().await;
    let answers = new.cache.get_or_load(&keys, None, &new.load).await;
    let cost = reads().await - before;
    assert!(cost < 15, "{cost} reads for a lookup, a fill, and what else goes on"); // not one per key
    let levels: Vec<_> = answers.iter().map(|answer| answer.as_ref().unwrap().how().level).collect();
    assert!(levels[..20].iter().all(|level| *level == Level::Memory));
    assert!(levels[20..60].iter().all(|level| *level == Level::Redis));
    assert!(levels[60..].iter().all(|level| *level == Level::Database));
    assert_eq!(
        answers.iter().map(|answer| value(answer.as_ref().unwrap())).collect::<Vec<_>>(),
        values.iter().map(|(_, v)| Some(*v)).collect::<Vec<_>>()
    );
    assert_eq!(truth.0.loads.lock().unwrap().last().map(Vec::len), Some(40), "one query for the forty");
    assert_eq!(truth.loads(), 2);
}

#[tokio::test]
async fn damaged_entries_in_redis_are_misses_and_are_replaced() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let whole: Vec<u8> =
        redis::from_redis_value(redis.command(&["HGET", "{product-cache}:thing:1", "b"]).await).unwrap();
    let flipped = [&whole[..whole.len() - 1], &[whole[whole.len() - 1] ^ 1]].concat();
    let (cut, without_times) = (&whole[..30], &whole[34..]);
    for (loads, damaged) in [&b"noise"[..], b"", &flipped, cut, without_times].into_iter().enumerate() {
        redis.command(&[b"HSET", "{product-cache}:thing:1".as_bytes(), b"b", damaged]).await;
        assert_eq!(Node::hearing(&truth, &redis.url(), &[]).await.value(1).await, Some(10));
        assert_eq!(truth.loads(), loads + 2);
        assert_eq!(
            Node::hearing(&truth, &redis.url(), &[]).await.read(1).await.how().level,
            Level::Redis,
            "it is whole again"
        );
    }
    redis.command(&["SET", "{product-cache}:thing:1", "of another type"]).await;
    assert_eq!(Node::hearing(&truth, &redis.url(), &[]).await.value(1).await, Some(10));
}

#[tokio::test]
async fn scripts_that_redis_forgot_are_loaded_again() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    redis.command(&["SCRIPT", "FLUSH"]).await;
    node.value(2).await;
    redis.command(&["SCRIPT", "FLUSH"]).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.read(2).await.how().level, Level::Redis);
}
