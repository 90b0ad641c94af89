//! Change tracking as the change feed.

use product_cache::{
    database::{Changes, Database, Position},
    product::TABLE,
};

use super::{database, server};
use crate::support::tds::{
    Answer, Server,
    products::{Tracked, Tracking, tracking},
};

/// As many changes as one page holds.
const PAGE: i64 = 10_000;

async fn tracked(state: Tracking) -> (Tracked, Server, Database) {
    let tracked = Tracked::new(state.into());
    let fake = Server::start(tracking(&tracked)).await;
    let database = database(server(fake.port));
    (tracked, fake, database)
}

async fn latest(database: &Database) -> Position {
    database.latest_change(&TABLE).await.expect("a position")
}

async fn since(database: &Database, position: &Position) -> Changes {
    database.changes_since(&TABLE, position).await.expect("changes")
}

fn change(tracked: &Tracked, version: i64, keys: impl IntoIterator<Item = i64>) {
    let mut tracked = tracked.lock().unwrap();
    tracked.changes.extend(keys.into_iter().map(|key| (version, key)));
    tracked.latest = tracked.latest.max(Some(version));
}

#[tokio::test]
async fn changes_are_told_once_in_one_round_trip() {
    let (tracked, fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    let nothing = since(&database, &start).await;
    assert_eq!(nothing, Changes { keys: vec![], position: start.clone(), overrun: false, more: false });
    change(&tracked, 11, [5, 3]);
    change(&tracked, 14, [5]); // other tables take versions, too
    let queries = fake.queries().len();
    let changes = since(&database, &start).await;
    assert_eq!(fake.queries().len(), queries + 1);
    assert_eq!((changes.keys, changes.overrun, changes.more), (vec![3, 5], false, false));
    assert_ne!(changes.position, start);
    assert_eq!(since(&database, &changes.position).await.keys, [0; 0]);
}

#[tokio::test]
async fn a_page_ends_between_versions_and_the_next_one_goes_on_there() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    change(&tracked, 11, 1..=PAGE - 10);
    change(&tracked, 12, 50_001..=50_020);
    change(&tracked, 13, [60_000]);
    let page = since(&database, &start).await;
    assert_eq!((page.keys.len() as i64, page.overrun, page.more), (PAGE - 10, false, true), "half of 12 is not told");
    let rest = since(&database, &page.position).await;
    assert_eq!((rest.keys.len(), rest.overrun, rest.more), (21, false, false));
    assert_eq!((rest.keys[0], rest.keys[20]), (50_001, 60_000));
    assert_eq!(since(&database, &rest.position).await.keys, [0; 0]);
}

#[tokio::test]
async fn exactly_a_page_is_not_more() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    change(&tracked, 11, 1..=PAGE);
    let page = since(&database, &start).await;
    assert_eq!((page.keys.len() as i64, page.more), (PAGE, false));
}

#[tokio::test]
async fn one_transaction_larger_than_a_page_makes_everything_stale() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    change(&tracked, 11, 1..=PAGE + 1);
    change(&tracked, 12, [70_000]);
    let changes = since(&database, &start).await;
    assert_eq!((changes.keys.len(), changes.overrun, changes.more), (0, true, false));
    assert_eq!(changes.position, latest(&database).await);
    assert!(!since(&database, &changes.position).await.overrun);
}

#[tokio::test]
async fn a_position_before_what_is_kept_is_an_overrun_and_one_at_its_edge_is_not() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await; // 10
    change(&tracked, 20, [1]);
    tracked.lock().unwrap().first_known = Some(10);
    assert!(!since(&database, &start).await.overrun);
    tracked.lock().unwrap().first_known = Some(11);
    let changes = since(&database, &start).await;
    assert_eq!((changes.keys.len(), changes.overrun, changes.more), (0, true, false));
    assert_eq!(changes.position, latest(&database).await);
}

#[tokio::test]
async fn a_cleanup_while_the_changes_are_read_is_noticed() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    change(&tracked, 15, [1]);
    tracked.lock().unwrap().meanwhile = Some(|tracking| {
        tracking.changes.clear();
        tracking.first_known = Some(15);
    });
    assert!(since(&database, &start).await.overrun, "the change of product 1 would be missed");
}

#[tokio::test]
async fn a_commit_while_the_changes_are_read_is_not_skipped() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    change(&tracked, 11, [1, 2]);
    tracked.lock().unwrap().meanwhile = Some(|tracking| {
        // Product 1 shows only its last change from here on, and 12 may not all be there yet.
        tracking.changes.extend([(12, 1), (12, 3)]);
        tracking.latest = Some(12);
    });
    let changes = since(&database, &start).await;
    assert!(changes.keys.starts_with(&[1, 2]), "told now, though it changed again: {:?}", changes.keys);
    tracked.lock().unwrap().changes.push((12, 4));
    let again = since(&database, &changes.position).await;
    assert_eq!((again.keys, again.overrun), (vec![1, 3, 4], false));
}

#[tokio::test]
async fn another_database_under_the_same_name_is_an_overrun() {
    let (tracked, _fake, database) = tracked(Tracking::default()).await;
    let start = latest(&database).await;
    // A restored copy, whose versions went on elsewhere.
    change(&tracked, 12, [1]);
    tracked.lock().unwrap().created = "2026-05-06T07:08:09.010";
    let changes = since(&database, &start).await;
    assert_eq!((changes.keys.len(), changes.overrun), (0, true));
    assert!(!since(&database, &changes.position).await.overrun, "once");
    // An older copy in the same place.
    {
        let mut tracked = tracked.lock().unwrap();
        (tracked.latest, tracked.changes) = (Some(7), Vec::new());
    }
    let changes = since(&database, &changes.position).await;
    assert!(changes.overrun);
    change(&tracked, 8, [2]);
    assert_eq!(since(&database, &changes.position).await.keys, [2], "it goes on where the copy is");
}

#[tokio::test]
async fn change_tracking_that_is_off_or_forbidden_is_told_with_the_cure() {
    for state in
        [Tracking { latest: None, ..Tracking::default() }, Tracking { first_known: None, ..Tracking::default() }]
    {
        let (_tracked, _fake, database) = tracked(state).await;
        let error = database.latest_change(&TABLE).await.expect_err("off").to_string();
        assert!(error.contains("[SalesLT].[Product]") && error.contains("sql/sqlserver-access.sql"), "{error}");
    }
    for (number, message) in [
        (22_105, "Change tracking is not enabled on table 'SalesLT.Product'."),
        (229, "The VIEW CHANGE TRACKING permission was denied on the object 'Product'."),
    ] {
        let fake = Server::start(move |_| Answer::Error(number, 16, message)).await;
        let error = database(server(fake.port)).latest_change(&TABLE).await.expect_err("refused").to_string();
        assert!(error.contains(message) && error.contains("sql/sqlserver-access.sql"), "{error}");
    }
}
