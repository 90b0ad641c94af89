//! The change feed: every committed change is told, whatever the order of commits, and what cannot be told is said.

use std::{collections::BTreeSet, process::Command, time::Duration};

use futures_util::future::join_all;
use product_cache::{
    database::{Database, Position},
    product::TABLE,
};
use tokio::time::{sleep, timeout};

use super::{database, for_every_engine, for_every_server};
use crate::support::{
    PATIENCE,
    database::{DatabaseServer, Engine},
    eventually,
};

for_every_engine![
    each_change_is_told_once,
    what_is_not_committed_is_not_told,
    many_changes_come_in_pages,
    a_position_can_be_written_down_and_read_by_another_process,
    whoever_stands_before_what_was_pruned_is_told_that_everything_may_have_changed,
    a_position_of_some_other_database_means_that_everything_may_have_changed,
];
for_every_server![
    a_commit_is_told_though_a_later_change_was_committed_before_it,
    a_transaction_that_stays_open_for_long_is_told_when_it_commits,
    a_rolled_back_change_is_forgotten,
    no_change_of_concurrent_writers_is_skipped,
    a_position_of_another_database_on_the_same_server_means_it_too,
    a_transaction_that_stays_open_stops_no_feed_that_must_be_quick,
];

/// Reads the feed as the handler does.
struct Reader {
    database: Database,
    position: Position,
}

impl Reader {
    async fn new(server: &DatabaseServer) -> Self {
        let database = database(&server.url(), &[]);
        let position = database.latest_change(&TABLE).await.unwrap();
        Self { database, position }
    }

    /// Of MySQL: that nothing is missing any more, after some looks.
    async fn assert_settles(&mut self) {
        for _ in 0..20 {
            self.told().await;
        }
        assert_eq!(self.told().await, Some(vec![]));
        assert!(self.position.to_string().split(' ').count() == 3, "{}", self.position);
    }

    /// Everything that is told now; `None`: anything may have changed.
    async fn told(&mut self) -> Option<Vec<i64>> {
        let mut keys = BTreeSet::new();
        loop {
            let changes = self.database.changes_since(&TABLE, &self.position).await.unwrap();
            self.position = changes.position;
            if changes.overrun {
                return None;
            }
            keys.extend(changes.keys);
            if !changes.more {
                return Some(keys.into_iter().collect());
            }
        }
    }
}

fn rename(id: i64) -> String {
    format!("UPDATE product SET Name = concat(Name, '!') WHERE ProductID = {id}")
}

async fn each_change_is_told_once(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    assert_eq!(reader.told().await, Some(vec![]));
    let columns = "Name, ProductNumber, StandardCost, ListPrice, SellStartDate, rowguid, ModifiedDate";
    let insert = format!(
        "INSERT INTO product (ProductID, {columns}) SELECT 5001, {} FROM product WHERE ProductID = 680",
        columns.replace("ProductNumber", "'new'")
    );
    let (insert, other_key) = match engine {
        // There, a product keeps its key.
        Engine::SqlServer => (format!("SET IDENTITY_INSERT SalesLT.Product ON; {insert}"), vec![]),
        _ => (insert, vec![("UPDATE product SET ProductID = 5002 WHERE ProductID = 5001", vec![5001, 5002])]),
    };
    let mut changes = vec![
        ("UPDATE product SET Color = 'Red' WHERE ProductID = 680", vec![680]),
        ("UPDATE product SET Color = 'Red' WHERE ProductID IN (706, 707)", vec![706, 707]),
        ("UPDATE product SET Color = 'Red' WHERE ProductID = 1", vec![]),
        (&insert, vec![5001]),
        ("DELETE FROM product WHERE ProductID = 708", vec![708]),
    ];
    changes.extend(other_key);
    for (change, told) in changes {
        server.sql(change).await;
        assert_eq!(reader.told().await, Some(told), "{change}");
        assert_eq!(reader.told().await, Some(vec![]), "{change}: again");
    }
}

async fn what_is_not_committed_is_not_told(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 680").await;
    assert_eq!(reader.told().await, Some(vec![]));
    writer.sql("COMMIT").await;
    assert_eq!(reader.told().await, Some(vec![680]));
}

async fn many_changes_come_in_pages(engine: Engine) {
    const CHANGES: usize = 12_000;
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let columns = "StandardCost, ListPrice, SellStartDate, rowguid, ModifiedDate";
    let before = if engine == Engine::SqlServer { "SET IDENTITY_INSERT SalesLT.Product ON;" } else { "" };
    server
        .sql(&format!(
            "{before} INSERT INTO product (ProductID, Name, ProductNumber, {columns})
             SELECT n, 'many', concat('M', n), {columns} FROM
               (SELECT 10000 + row_number() OVER (ORDER BY a.ProductID, b.ProductID) AS n FROM product AS a, product AS b)
               AS numbers, (SELECT {columns} FROM product WHERE ProductID = 680) AS one
             WHERE n <= 10000 + {CHANGES}"
        ))
        .await;
    let page = reader.database.changes_since(&TABLE, &reader.position).await.unwrap();
    if engine == Engine::SqlServer {
        // All at once are one version there, and more of it than a page has.
        assert!(page.overrun);
        return;
    }
    assert!(page.more && !page.overrun && page.keys.len() < CHANGES, "{} keys", page.keys.len());
    // What is committed between two pages is told as well, before the feed says that there is no more.
    server.sql("DELETE FROM product WHERE ProductID = 680").await;
    let mut told: BTreeSet<_> = page.keys.into_iter().collect();
    reader.position = page.position;
    told.extend(reader.told().await.unwrap());
    let expected: BTreeSet<_> = (10_001..=10_000 + CHANGES as i64).chain([680]).collect();
    assert!(told == expected, "{} of {} are told", told.len(), expected.len());
    assert_eq!(reader.told().await, Some(vec![]));
}

async fn a_position_can_be_written_down_and_read_by_another_process(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let before = Reader::new(&server).await;
    server.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 680").await;
    let position = before.position.to_string();
    drop(before);
    let mut after = Reader { database: database(&server.url(), &[]), position: position.into() };
    assert_eq!(after.told().await, Some(vec![680]));
}

async fn whoever_stands_before_what_was_pruned_is_told_that_everything_may_have_changed(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut late = Reader::new(&server).await;
    let mut prompt = Reader::new(&server).await;
    for id in [680, 706, 707] {
        server.sql(&format!("UPDATE product SET Color = 'Red' WHERE ProductID = {id}")).await;
    }
    assert_eq!(prompt.told().await, Some(vec![680, 706, 707]));
    let prune = match engine {
        Engine::Postgres => "SELECT product_change_prune(interval '0')",
        Engine::MariaDb => "CALL product_change_prune(1)",
        Engine::Sqlite => "DELETE FROM product_change WHERE version <= 2",
        Engine::SqlServer => {
            "ALTER TABLE SalesLT.Product DISABLE CHANGE_TRACKING; ALTER TABLE SalesLT.Product ENABLE CHANGE_TRACKING"
        }
    };
    server.sql(prune).await;
    server.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 708").await;
    assert_eq!(prompt.told().await, Some(vec![708]), "who has read what was pruned has missed nothing");
    assert_eq!(late.told().await, None);
    assert_eq!(late.told().await, Some(vec![]));
    server.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 709").await;
    assert_eq!(late.told().await, Some(vec![709]));
}

async fn a_position_of_some_other_database_means_that_everything_may_have_changed(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let other = DatabaseServer::start(engine).await;
    for _ in 0..3 {
        other.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 680").await;
    }
    let theirs = Reader::new(&other).await.position;
    for position in [theirs, "nonsense".to_owned().into(), String::new().into()] {
        let mut reader = Reader { database: database(&server.url(), &[]), position };
        assert_eq!(reader.told().await, None);
        assert_eq!(reader.told().await, Some(vec![]));
    }
}

async fn a_position_of_another_database_on_the_same_server_means_it_too(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    match engine {
        Engine::Postgres => server.sql("CREATE DATABASE other TEMPLATE template0").await,
        _ => server.sql("CREATE DATABASE other; GRANT SELECT ON other.* TO handler").await,
    }
    // The same tables, and as many changes.
    let other = match engine {
        Engine::Postgres => {
            let mut other = server.session_in("other").await;
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/sql/postgresql.sql");
            other.sql(&std::fs::read_to_string(script).unwrap()).await;
            other.sql("GRANT SELECT ON product, product_change, product_change_pruned TO handler").await;
            server.url().replace("/shop", "/other")
        }
        _ => {
            for table in ["product_change", "product_change_pruned"] {
                server.sql(&format!("CREATE TABLE other.{table} AS SELECT * FROM {table}")).await;
            }
            server.url().replace("/shop", "/other")
        }
    };
    let theirs = database(&other, &[]).latest_change(&TABLE).await.unwrap();
    let mut reader = Reader { database: database(&server.url(), &[]), position: theirs };
    assert_eq!(reader.told().await, None);
    assert_eq!(reader.told().await, Some(vec![]));
}

async fn a_commit_is_told_though_a_later_change_was_committed_before_it(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let (mut early, mut late) = (server.session().await, server.session().await);
    early.sql("BEGIN").await;
    early.sql(&rename(680)).await;
    // Its version is higher, and it is there first.
    late.sql(&rename(706)).await;
    assert_eq!(reader.told().await, Some(vec![706]));
    // So does whoever begins to read in between.
    let mut newcomer = Reader::new(&server).await;
    early.sql("COMMIT").await;
    assert_eq!(reader.told().await, Some(vec![680]));
    assert_eq!(newcomer.told().await, Some(vec![680]));
    assert_eq!(reader.told().await, Some(vec![]));
}

async fn a_transaction_that_stays_open_for_long_is_told_when_it_commits(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    for look in 0..25 {
        server.sql(&rename(706)).await;
        assert_eq!(reader.told().await, Some(vec![706]), "look {look}: others are not held up");
    }
    writer.sql("COMMIT").await;
    assert_eq!(reader.told().await, Some(vec![680]));
}

async fn a_transaction_that_stays_open_stops_no_feed_that_must_be_quick(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let settings = [("CACHE_HARD_TIMEOUT_MS", "3000"), ("DATABASE_CONNECT_TIMEOUT_MS", "2400")];
    let database = database(&server.url(), &settings);
    let position = database.latest_change(&TABLE).await.unwrap();
    let mut reader = Reader { database, position };
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    for _ in 0..12 {
        server.sql(&rename(706)).await;
        assert_eq!(reader.told().await, Some(vec![706]));
    }
}

async fn a_rolled_back_change_is_forgotten(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let length = reader.position.to_string().len();
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    server.sql(&rename(706)).await;
    assert_eq!(reader.told().await, Some(vec![706]));
    writer.sql("ROLLBACK").await;
    for _ in 0..25 {
        assert_eq!(reader.told().await, Some(vec![]));
    }
    let position = reader.position.to_string();
    assert!(position.len() <= length + 2, "a gap is remembered for ever: {position}");
}

async fn no_change_of_concurrent_writers_is_skipped(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let mut reader = Reader::new(&server).await;
    let ids: Vec<i64> = {
        let catalogue = DatabaseServer::start(Engine::Sqlite).await;
        let reference = database(&catalogue.url(), &[]);
        let all = super::products(&reference, &(1..1100).collect::<Vec<_>>()).await.unwrap();
        all.into_iter().map(|(id, _)| id).collect()
    };
    let writers = ids.chunks(50).map(|ids| async {
        let mut session = server.session().await;
        let mut committed = Vec::new();
        for pair in ids.chunks(2) {
            session.sql("BEGIN").await;
            for id in pair {
                session.sql(&rename(*id)).await;
                sleep(Duration::from_millis(rand::random_range(0..8))).await;
            }
            if rand::random_bool(0.7) {
                session.sql("COMMIT").await;
                committed.extend(pair.iter().copied());
            } else {
                session.sql("ROLLBACK").await;
            }
        }
        committed
    });
    let mut told = BTreeSet::new();
    let writing = async { join_all(writers).await.concat() };
    tokio::pin!(writing);
    let committed: BTreeSet<i64> = loop {
        tokio::select! {
            committed = &mut writing => break committed.into_iter().collect(),
            new = reader.told() => told.extend(new.expect("nothing was pruned")),
        }
    };
    told.extend(reader.told().await.expect("nothing was pruned"));
    assert!(committed.len() > 100);
    assert_eq!(told, committed);
}

#[tokio::test]
async fn what_is_pruned_while_a_transaction_is_open_for_days_is_told_to_whoever_has_missed_it_and_to_nobody_else() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    let mut reader = Reader::new(&server).await;
    let prune = "SELECT product_change_prune(interval '0')";
    for _ in 0..3 {
        server.sql(&rename(706)).await;
        assert_eq!(reader.told().await, Some(vec![706]));
        server.sql(prune).await;
        assert_eq!(reader.told().await, Some(vec![]), "nothing that was pruned is missing here");
    }
    writer.sql("COMMIT").await;
    // It began so long ago that its changes are pruned before anybody has read them.
    server.sql(prune).await;
    assert_eq!(reader.told().await, None);
    assert_eq!(reader.told().await, Some(vec![]));
}

/// A dump restored into another cluster brings along the other's transaction numbers. Where those were still to come,
/// every look said that everything may have changed, for ever.
#[tokio::test]
async fn numbers_of_transactions_to_come_which_a_restored_dump_brings_along_are_no_changes() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    server
        .sql(
            "UPDATE product_change_pruned SET transaction = '1000000000';
             INSERT INTO product_change (transaction, ProductID, changed_at)
             SELECT (1000000000 + n)::text::xid8, 708, now() - interval '1 day' FROM generate_series(1, 1000) AS n
             UNION ALL SELECT '3', 709, now() - interval '1 day'",
        )
        .await;
    let mut reader = Reader::new(&server).await;
    let mut late = Reader::new(&server).await;
    assert_eq!(reader.told().await, Some(vec![]));
    server.sql(&rename(680)).await;
    assert_eq!(reader.told().await, Some(vec![680]));
    // They go as the others do, and hide from nobody what was deleted besides.
    server.sql("SELECT product_change_prune(interval '0')").await;
    assert_eq!(server.session().await.number("SELECT count(*) FROM product_change").await, 0);
    assert_eq!(reader.told().await, Some(vec![]));
    assert_eq!(late.told().await, None);
    assert_eq!(late.told().await, Some(vec![]));
}

#[tokio::test]
async fn a_position_that_the_server_would_refuse_is_not_asked_for_again_and_again() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let whole = Reader::new(&server).await.position.to_string();
    let (origin, _) = whole.split_once(' ').unwrap();
    for snapshot in ["9:3:", "0:3:", "3:9:12", "3:9:5,4", "3:9:9", "3:9:x", "3:9", "3:9: 3:2: 5"] {
        let mut reader =
            Reader { database: database(&server.url(), &[]), position: format!("{origin} {snapshot}").into() };
        assert_eq!(reader.told().await, None, "{snapshot}");
        assert_eq!(reader.told().await, Some(vec![]), "{snapshot}");
    }
}

/// The whole table was walked at every look, once it had enough rows, or a plan was kept that knows no positions.
#[tokio::test]
async fn what_a_look_reads_does_not_grow_with_what_is_kept() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    server
        .sql(
            "DO $$ BEGIN FOR n IN 1..5000 LOOP
               INSERT INTO product_change (ProductID) SELECT generate_series(680, 719);
               COMMIT;
             END LOOP; END $$",
        )
        .await;
    server.sql("ANALYZE").await;
    let read = "SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'product_change')::bigint
                  + (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'product_change')";
    for plan in ["auto", "force_generic_plan"] {
        server.sql(&format!("ALTER ROLE handler SET plan_cache_mode = {plan}")).await;
        let before = server.session().await.number(read).await;
        let one = [("DATABASE_MAX_CONNECTIONS", "1")];
        let mut reader = Reader { database: database(&server.url(), &one), ..Reader::new(&server).await };
        for _ in 0..10 {
            server.sql(&rename(706)).await;
            assert_eq!(reader.told().await, Some(vec![706]));
        }
        // A session has reported what it read when it ends.
        reader.database.close().await;
        eventually("it ends", async || (server.connections().await == 0).then_some(())).await;
        let rows = server.session().await.number(read).await - before;
        assert!((10..1000).contains(&rows), "{plan}: {rows} rows were read for ten changes");
    }
}

#[tokio::test]
async fn a_position_in_the_midst_of_pages_that_an_earlier_version_wrote_means_that_everything_may_have_changed() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let whole = Reader::new(&server).await.position.to_string();
    let (_, snapshot) = whole.split_once(' ').unwrap();
    for page in ["17", "9/", "/17", "9/x", "-9/17", "9/17/1"] {
        let position = format!("{whole} {snapshot} {page}").into();
        let mut reader = Reader { database: database(&server.url(), &[]), position };
        assert_eq!(reader.told().await, None, "{page}");
        assert_eq!(reader.told().await, Some(vec![]), "{page}");
    }
}

/// One statement of a hundred deleted ten thousand, however many each of them wrote.
#[tokio::test]
async fn a_statement_deletes_twice_as_many_old_changes_as_it_writes() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let mut writer = server.session().await;
    let columns = "StandardCost, ListPrice, SellStartDate, rowguid, ModifiedDate";
    let insert = format!(
        "INSERT INTO product (ProductID, Name, ProductNumber, {columns})
         SELECT 10000 + n, 'many', concat('M', n), {columns} FROM generate_series(1, 25000) AS n,
           (SELECT {columns} FROM product WHERE ProductID = 680) AS one"
    );
    for statement in [
        &insert,
        "UPDATE product SET Name = 'renamed' WHERE ProductID > 10000",
        "DELETE FROM product WHERE ProductID > 10000",
    ] {
        writer
            .sql(
                "INSERT INTO product_change (ProductID, changed_at)
                 SELECT 706, now() - interval '3 days' FROM generate_series(1, 50000)",
            )
            .await;
        writer.sql(statement).await;
        let old = "SELECT count(*) FROM product_change WHERE changed_at < now() - interval '2 days'";
        assert_eq!(writer.number(old).await, 0, "{statement}");
    }
}

/// Writes this many changes of product 706, with versions that leave out every second one, as servers do that share
/// the writing among them.
async fn write_with_gaps(server: &DatabaseServer, changes: i64) {
    server
        .sql(&format!(
            "SET auto_increment_increment = 2; INSERT INTO product_change (ProductID) SELECT 706 FROM seq_1_to_{changes}"
        ))
        .await;
}

/// What was read at once was the whole table that is kept, at each of ten looks, told each time; where that took longer
/// than a query may, the feed stood still.
#[tokio::test]
async fn however_many_versions_are_left_out_a_page_at_a_time_is_read() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    // Each change is of another product, so that the keys of a page count what was read.
    server
        .sql(
            "SET auto_increment_increment = 2;
             INSERT INTO product_change (ProductID) SELECT 10000 + seq FROM seq_1_to_35000",
        )
        .await;
    let mut reader = Reader::new(&server).await;
    // It is open while the others are settled.
    let mut writer = server.session().await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    server.sql(&rename(706)).await;
    let (mut pages, mut told) = (0, BTreeSet::new());
    loop {
        let changes = reader.database.changes_since(&TABLE, &reader.position).await.unwrap();
        assert!(!changes.overrun && changes.keys.len() <= 20_000, "{} keys at once", changes.keys.len());
        told.extend(changes.keys);
        reader.position = changes.position;
        pages += 1;
        if !changes.more {
            break;
        }
    }
    assert!(told.contains(&706) && !told.contains(&680), "{pages} pages");
    for _ in 0..20 {
        assert!(!reader.told().await.expect("nothing was pruned").contains(&680));
    }
    let again = reader.told().await.expect("nothing was pruned").len();
    assert!(again <= 1000, "the others are settled, but for the part that it is in: {again} are told again");
    writer.sql("COMMIT").await;
    assert!(reader.told().await.expect("nothing was pruned").contains(&680));
    reader.assert_settles().await;
}

/// As above, with one that is open in the midst of what is left out.
#[tokio::test]
async fn a_transaction_open_in_a_gap_of_many_pages_is_told_when_it_commits_and_keeps_little_else_open() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    let (mut early, mut writer) = (server.session().await, server.session().await);
    early.sql("BEGIN").await;
    early.sql(&rename(707)).await;
    write_with_gaps(&server, 15_000).await;
    writer.sql("BEGIN").await;
    writer.sql(&rename(680)).await;
    write_with_gaps(&server, 15_000).await;
    let mut reader = Reader::new(&server).await;
    // What is committed between two pages and lies before the second is told before the feed says that there is no more.
    let page = reader.database.changes_since(&TABLE, &reader.position).await.unwrap();
    assert!(page.more && !page.overrun && page.keys == [706], "{page:?}");
    reader.position = page.position;
    early.sql("COMMIT").await;
    assert!(reader.told().await.expect("nothing was pruned").contains(&707));
    // Whoever looks sees to its end what takes more than a page: until little is left.
    for _ in 0..20 {
        assert!(!reader.told().await.expect("nothing was pruned").contains(&680));
    }
    let page = reader.database.changes_since(&TABLE, &reader.position).await.unwrap();
    assert!(!page.more && page.keys.len() <= 1, "{page:?}");
    let open: Vec<_> = reader.position.to_string().split(' ').skip(3).map(str::to_owned).collect();
    let (from, to) = open[0].split_once('*').unwrap().0.split_once('-').unwrap();
    let width = to.parse::<i64>().unwrap() - from.parse::<i64>().unwrap();
    assert!(open.len() == 1 && width <= 10_000, "{open:?}");
    writer.sql("COMMIT").await;
    assert!(reader.told().await.expect("nothing was pruned").contains(&680));
    reader.assert_settles().await;
}

/// Runs a program of MariaDB's on this server.
fn mariadb(server: &DatabaseServer, program: &str, arguments: &[&str]) {
    let port = server.port.to_string();
    let output = Command::new(program).args(["-h", "127.0.0.1", "-P", &port]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A dump has the triggers, but no procedures and events unless asked for: no product could be written where the triggers
/// called one.
#[tokio::test]
async fn an_ordinary_dump_of_mariadb_has_all_that_writers_and_readers_need() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("dump.sql").display().to_string();
    mariadb(&server, "mariadb-dump", &["-u", "root", "--result-file", &dump, "shop"]);
    server.sql("CREATE DATABASE copy; GRANT SELECT ON copy.* TO handler").await;
    mariadb(&server, "mariadb", &["-u", "root", "copy", "-e", &format!("source {dump}")]);
    let mut copy = server.session().await;
    copy.sql("USE copy").await;
    let database = database(&server.url().replace("/shop", "/copy"), &[]);
    let position = database.latest_change(&TABLE).await.unwrap();
    let mut reader = Reader { database, position };
    copy.sql(&rename(680)).await;
    assert_eq!(reader.told().await, Some(vec![680]));
}

#[tokio::test]
async fn whoever_may_write_products_needs_no_rights_on_the_feed() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    let mut reader = Reader::new(&server).await;
    server.sql("CREATE USER writer; GRANT SELECT, UPDATE, DELETE ON shop.product TO writer").await;
    mariadb(&server, "mariadb", &["-u", "writer", "shop", "-e", &rename(680)]);
    mariadb(&server, "mariadb", &["-u", "writer", "shop", "-e", "DELETE FROM product WHERE ProductID = 706"]);
    assert_eq!(reader.told().await, Some(vec![680, 706]));
}

#[tokio::test]
async fn values_that_a_column_is_given_by_another_type_are_told() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let mut reader = Reader::new(&server).await;
    server.sql("ALTER TABLE product ALTER COLUMN Size TYPE varchar(3) USING 'L'").await;
    assert_eq!(reader.told().await, None);
    server.sql("VACUUM (ANALYZE, FREEZE) product").await;
    server.sql("VACUUM FREEZE pg_class").await;
    assert_eq!(reader.told().await, Some(vec![]));
}

/// What is done to the table's triggers, and what makes them whole again.
fn troubles(engine: Engine) -> Vec<(&'static str, &'static str)> {
    match engine {
        Engine::Postgres => vec![
            (
                "ALTER TABLE product DISABLE TRIGGER product_updated",
                "ALTER TABLE product ENABLE TRIGGER product_updated",
            ),
            (
                "ALTER TABLE product RENAME TO old; CREATE TABLE product AS SELECT * FROM old;
                 GRANT SELECT ON product TO handler",
                "DROP TABLE product; ALTER TABLE old RENAME TO product",
            ),
        ],
        Engine::Sqlite => vec![
            (
                "DROP TRIGGER product_after_update",
                "CREATE TRIGGER product_after_update AFTER UPDATE ON product
                 BEGIN INSERT INTO product_change (ProductID) VALUES (NEW.ProductID); END",
            ),
            (
                "ALTER TABLE product RENAME TO old; CREATE TABLE product AS SELECT * FROM old",
                "DROP TABLE product; ALTER TABLE old RENAME TO product",
            ),
        ],
        Engine::MariaDb | Engine::SqlServer => unreachable!("its handler cannot see triggers, or there are none"),
    }
}

/// The feed was heard, and nothing was told, for ever.
#[tokio::test]
async fn a_table_that_lost_its_triggers_is_not_heard_and_nobody_knows_what_changed_meanwhile() {
    for engine in [Engine::Postgres, Engine::Sqlite] {
        let server = DatabaseServer::start(engine).await;
        let mut reader = Reader::new(&server).await;
        for (trouble, remedy) in troubles(engine) {
            server.sql(trouble).await;
            server.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 680").await;
            let error = reader.database.changes_since(&TABLE, &reader.position).await.expect_err(trouble).to_string();
            assert!(error.contains("triggers"), "{trouble}: {error}");
            assert!(reader.database.latest_change(&TABLE).await.is_err(), "{trouble}");
            server.sql(remedy).await;
            assert_eq!(reader.told().await, None, "{remedy}");
            assert_eq!(reader.told().await, Some(vec![]), "{remedy}");
            server.sql("UPDATE product SET Color = 'Red' WHERE ProductID = 706").await;
            assert_eq!(reader.told().await, Some(vec![706]), "{remedy}");
            // Between two looks nobody sees that they are away.
            server.sql(trouble).await;
            server.sql(remedy).await;
            assert_eq!(reader.told().await, None, "{trouble} for a moment");
        }
    }
}

#[tokio::test]
async fn a_view_of_a_table_whose_triggers_tell_what_changes_is_heard() {
    for engine in [Engine::Postgres, Engine::Sqlite] {
        let server = DatabaseServer::start(engine).await;
        server.sql("ALTER TABLE product RENAME TO wares; CREATE VIEW product AS SELECT * FROM wares").await;
        if engine == Engine::Postgres {
            server.sql("GRANT SELECT ON product TO handler").await;
        }
        let mut reader = Reader::new(&server).await;
        assert_eq!(reader.told().await, Some(vec![]), "{engine:?}");
        server.sql("UPDATE wares SET Color = 'Red' WHERE ProductID = 706").await;
        assert_eq!(reader.told().await, Some(vec![706]), "{engine:?}");
    }
}

#[tokio::test]
async fn emptying_the_table_is_told() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let mut reader = Reader::new(&server).await;
    server.sql("TRUNCATE product").await;
    assert_eq!(reader.told().await, None);
    assert_eq!(reader.told().await, Some(vec![]));
}

#[tokio::test]
async fn a_commit_wakes_whoever_waits_and_so_does_the_loss_of_the_one_who_would_tell() {
    let mut server = DatabaseServer::start(Engine::Postgres).await;
    let database = database(&server.url(), &[]);
    let long = Duration::from_secs(3600);
    let woken = async || timeout(PATIENCE, database.wait_for_changes(&TABLE, long)).await.expect("was woken");
    woken().await; // It listens now; before, it could not have heard.
    server.sql(&rename(680)).await;
    woken().await;
    server.restart().await;
    woken().await;
    server.sql(&rename(680)).await;
    woken().await;
}
