//! Rows: the same bytes from every engine, in as few round trips as can be.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::{task::yield_now, time::sleep};

use super::{behind_a_proxy, database, for_every_engine, for_every_server, name_of, products};
use crate::support::{
    catalogue,
    certificates::{CERTIFICATES, Certificates},
    database::{DatabaseServer, Engine},
    eventually,
    instance::start,
    sqlite,
};

for_every_engine![
    the_catalogue_is_the_same_bytes,
    every_type_at_its_limits_is_the_same_bytes,
    ids_without_a_product_are_left_out,
    two_thousand_cancelled_queries_leave_right_rows,
];
for_every_server![
    no_more_connections_than_the_bound,
    a_hung_query_ends_here_and_on_the_server,
    a_row_is_one_round_trip_and_so_is_a_batch,
    only_a_server_with_the_right_certificate_is_talked_to,
    an_old_connection_is_replaced,
];

/// Ids of the whole catalogue, and then some.
const IDS: std::ops::Range<i64> = 1..1100;

async fn the_catalogue_is_the_same_bytes(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    // Not the embedded one of this folder, whose rows anybody may have changed.
    let catalogue = DatabaseServer::start(Engine::Sqlite).await;
    let reference = database(&catalogue.url(), &[]);
    let database = database(&server.url(), &[]);
    let mut compared = 0;
    for hundred in IDS.collect::<Vec<_>>().chunks(100) {
        let expected = products(&reference, hundred).await.unwrap();
        let mut found = products(&database, hundred).await.unwrap();
        compared += found.len();
        for (_, json) in &mut found {
            *json = json.replace(sevenths(engine), sevenths(Engine::Sqlite));
        }
        assert_eq!(found, expected);
    }
    assert_eq!(compared, 298);
}

async fn every_type_at_its_limits_is_the_same_bytes(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let database = database(&server.url(), &[]);
    let photo = match engine {
        Engine::Postgres => "'\\x00FF7F80'",
        Engine::SqlServer => "0x00FF7F80",
        Engine::Sqlite | Engine::MariaDb => "X'00FF7F80'",
    };
    // datetime has 300ths of a second; the others have microseconds.
    let modified = if engine == Engine::SqlServer { "10:00:00.123" } else { "10:00:00.123456" };
    let (unicode, before) = match engine {
        Engine::SqlServer => ("N", "SET IDENTITY_INSERT SalesLT.Product ON; "),
        _ => ("", ""),
    };
    let columns = "ProductID, Name, ProductNumber, Color, StandardCost, ListPrice, Size, Weight, ProductCategoryID, \
        ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, ThumbNailPhoto, ThumbnailPhotoFileName, rowguid, \
        ModifiedDate";
    server
        .sql(&format!(
            "{before}INSERT INTO product ({columns}) VALUES
             (2147483647, {unicode}'𝔘nicode 🚲 乌龟 Żółw \"q\" ''s''', 'MAX', '', '922337203685477.5807', '0.0001', ' M ', '999999.99',
              2147483647, -2147483648, '9999-12-31T23:59:59.997', '1753-01-01T00:00:00', '2000-02-29T12:34:56.003',
              {photo}, NULL, '6F9619FF-8B86-D011-B42D-00C04FC964FF', '2008-03-10T{modified}')"
        ))
        .await;
    server
        .sql(&format!(
            "{before}INSERT INTO product ({columns}) VALUES
             (3001, 'nulls', 'MIN', NULL, '0', '12.5', NULL, NULL, NULL, NULL, '2002-06-01T00:00:00', NULL, NULL, NULL, NULL,
              '00000000-0000-0000-0000-000000000000', '2008-03-10T10:00:00.510')"
        ))
        .await;
    let found = products(&database, &[2_147_483_647, 3001]).await.unwrap();
    assert_eq!(
        found[0].1,
        "{\"productID\":3001,\"name\":\"nulls\",\"productNumber\":\"MIN\",\"color\":null,\"standardCost\":0.0000,\
         \"listPrice\":12.5000,\"size\":null,\"weight\":null,\"productCategoryID\":null,\"productModelID\":null,\
         \"sellStartDate\":\"2002-06-01T00:00:00\",\"sellEndDate\":null,\"discontinuedDate\":null,\
         \"thumbNailPhoto\":null,\"thumbnailPhotoFileName\":null,\"rowguid\":\"00000000-0000-0000-0000-000000000000\",\
         \"modifiedDate\":\"2008-03-10T10:00:00.51\"}"
    );
    assert_eq!(
        found[1].1,
        "{\"productID\":2147483647,\"name\":\"𝔘nicode 🚲 乌龟 Żółw \\\"q\\\" 's'\",\"productNumber\":\"MAX\",\
         \"color\":\"\",\"standardCost\":922337203685477.5807,\"listPrice\":0.0001,\"size\":\" M \",\
         \"weight\":999999.99,\"productCategoryID\":2147483647,\"productModelID\":-2147483648,\
         \"sellStartDate\":\"9999-12-31T23:59:59.997\",\"sellEndDate\":\"1753-01-01T00:00:00\",\
         \"discontinuedDate\":\"2000-02-29T12:34:56.003\",\"thumbNailPhoto\":\"AP9/gA==\",\
         \"thumbnailPhotoFileName\":null,\"rowguid\":\"6f9619ff-8b86-d011-b42d-00c04fc964ff\",\
         \"modifiedDate\":\"2008-03-10TMODIFIED\"}"
            .replace("MODIFIED", modified)
    );
}

async fn ids_without_a_product_are_left_out(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let database = database(&server.url(), &[]);
    assert_eq!(products(&database, &[1]).await, Ok(Vec::new()));
    let found = products(&database, &[1, 706, 2, 680, 706]).await.unwrap();
    assert_eq!(found.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [680, 706]);
}

async fn two_thousand_cancelled_queries_leave_right_rows(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let database = database(&server.url(), &[("DATABASE_MAX_CONNECTIONS", "4"), ("FEED_INTERVAL_MS", "0")]);
    let catalogue = DatabaseServer::start(Engine::Sqlite).await;
    let reference = super::database(&catalogue.url(), &[]);
    let ids: Vec<_> = products(&reference, &IDS.collect::<Vec<_>>()).await.unwrap().iter().map(|(id, _)| *id).collect();
    let (mut cancelled, mut answered) = (0, 0);
    let mut patience = 1.0;
    for id in ids.iter().cycle().take(2000) {
        let one = std::slice::from_ref(id);
        // Timers are too coarse: this gives up anywhere between the first byte and the last, however long that takes
        // on this machine at this moment.
        let give_up = async {
            for _ in 0..rand::random_range(0..patience as usize + 2) {
                yield_now().await;
            }
        };
        tokio::select! {
            found = products(&database, one) => {
                assert_eq!(found.unwrap()[0].0, *id);
                (answered, patience) = (answered + 1, patience / 1.1);
            }
            () = give_up => (cancelled, patience) = (cancelled + 1, patience * 1.05),
        }
    }
    assert!(cancelled > 200 && answered > 200, "{cancelled} were cancelled, {answered} answered");
    for id in &ids {
        let one = std::slice::from_ref(id);
        let (found, expected) = tokio::join!(products(&database, one), products(&reference, one));
        let expected = expected.unwrap().remove(0).1.replace(sevenths(Engine::Sqlite), sevenths(engine));
        assert_eq!(found, Ok(vec![(*id, expected)]));
    }
    eventually("abandoned connections end", async || (server.connections().await <= 4).then_some(())).await;
}

/// How an engine keeps the one moment of the catalogue that has seven digits of a second.
fn sevenths(engine: Engine) -> &'static str {
    match engine {
        Engine::Sqlite => "06:05:04.1234567\"",
        Engine::Postgres | Engine::MariaDb => "06:05:04.123457\"",
        Engine::SqlServer => "06:05:04.123\"",
    }
}

/// Statements that make every query of products wait, and let them go on.
fn hold(engine: Engine) -> (&'static str, &'static str) {
    match engine {
        Engine::Sqlite => unreachable!("its readers wait for nobody"),
        Engine::Postgres => ("BEGIN; LOCK TABLE product IN ACCESS EXCLUSIVE MODE", "ROLLBACK"),
        Engine::MariaDb => ("LOCK TABLES product WRITE", "UNLOCK TABLES"),
        Engine::SqlServer => unreachable!("its readers may be set to wait for nobody"),
    }
}

async fn no_more_connections_than_the_bound(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let database = database(&server.url(), &[("DATABASE_MAX_CONNECTIONS", "3"), ("FEED_INTERVAL_MS", "0")]);
    let mut owner = server.session().await;
    owner.sql(hold(engine).0).await;
    let readers = join_all((0..64).map(|_| name_of(&database, 680)));
    let release = async {
        eventually("the pool is full", async || (server.connections().await == 3).then_some(())).await;
        sleep(Duration::from_millis(200)).await; // time to do wrong
        let connections = server.connections().await;
        owner.sql(hold(engine).1).await;
        connections
    };
    let (names, connections) = tokio::join!(readers, release);
    assert_eq!(connections, 3);
    assert!(names.iter().all(Result::is_ok), "{names:?}");
    assert_eq!(server.connections().await, 3);
}

async fn a_hung_query_ends_here_and_on_the_server(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let settings = [("CACHE_HARD_TIMEOUT_MS", "1500"), ("DATABASE_MAX_CONNECTIONS", "3"), ("FEED_INTERVAL_MS", "0")];
    let database = database(&server.url(), &settings);
    let mut owner = server.session().await;
    owner.sql(hold(engine).0).await;
    for _ in 0..4 {
        let error = name_of(&database, 680).await.expect_err("nobody can read");
        assert!(error.contains("no answer within 1500 ms"), "{error}");
    }
    eventually("the server gives the queries up", async || (server.connections().await == 0).then_some(())).await;
    owner.sql(hold(engine).1).await;
    eventually("rows can be read again", async || name_of(&database, 680).await.ok()).await;
}

async fn a_row_is_one_round_trip_and_so_is_a_batch(engine: Engine) {
    let (_server, proxy, database) = behind_a_proxy(engine, &[("FEED_INTERVAL_MS", "0")]).await;
    let batch: Vec<_> = (680..780).collect();
    // Statements are prepared once on each connection.
    assert!(name_of(&database, 680).await.is_ok());
    assert!(products(&database, &batch).await.is_ok());
    let before = proxy.requests();
    assert!(name_of(&database, 706).await.is_ok());
    assert_eq!(proxy.requests() - before, 1);
    assert!(products(&database, &batch).await.is_ok());
    assert_eq!(proxy.requests() - before, 2);
}

async fn only_a_server_with_the_right_certificate_is_talked_to(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let folder = tempfile::tempdir().unwrap();
    let authority = CERTIFICATES.authority_file(folder.path());
    let database = super::database(&server.url_with_tls(&authority, "127.0.0.1"), &[]);
    assert!(name_of(&database, 680).await.is_ok());
    let other_folder = tempfile::tempdir().unwrap();
    let other = Certificates::new().authority_file(other_folder.path());
    for (authority, host) in [(&other, "127.0.0.1"), (&authority, "localhost")] {
        let database = super::database(&server.url_with_tls(authority, host), &[]);
        let error = name_of(&database, 680).await.expect_err("not the server that was asked for");
        assert!(error.contains("certificate"), "{error}");
    }
}

async fn an_old_connection_is_replaced(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let settings = [("Sql", server.url()), ("FEED_INTERVAL_MS", "0".to_owned())];
    let settings = settings.map(|(name, value)| (name.to_owned(), value)).into();
    let config = product_cache::config::Config::from_variables(&settings).unwrap().database;
    let max_age = Duration::from_millis(300);
    let database = product_cache::database::Database::new(&product_cache::config::Database { max_age, ..config });
    let session = || async {
        assert!(name_of(&database, 680).await.is_ok());
        let id = match engine {
            Engine::Postgres => "SELECT max(pid)::bigint FROM pg_stat_activity WHERE usename = 'handler'",
            _ => "SELECT CAST(max(id) AS SIGNED) FROM information_schema.processlist WHERE user = 'handler'",
        };
        server.session().await.number(id).await
    };
    let first = session().await;
    eventually("another session", async || (session().await != first).then_some(())).await;
    eventually("in its place", async || (server.connections().await == 1).then_some(())).await;
}

#[tokio::test]
async fn what_no_calendar_and_no_number_line_has_is_a_bad_row_and_no_other_rows_problem() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let database = database(&server.url(), &[]);
    for (column, value) in [
        ("StandardCost", "'NaN'"),
        ("SellEndDate", "'infinity'"),
        ("SellStartDate", "'-infinity'"),
        ("ModifiedDate", "'294000-01-01'"),
        ("SellEndDate", "'0044-03-15 BC'"),
    ] {
        let name = column.to_ascii_lowercase();
        server.sql(&format!("UPDATE product SET {column} = {value} WHERE ProductID = 680")).await;
        let rows = product_cache::product::load(&database, &[680, 706]).await.unwrap();
        let bad: Vec<_> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
        assert_eq!(bad.len(), 1, "{name}");
        assert_eq!((bad[0].key, bad[0].column), (680, column));
        assert_eq!(rows.iter().filter(|row| row.is_ok()).count(), 1, "{name}: the other row is read");
        server.sql(&format!("UPDATE product SET {column} = (SELECT {column} FROM product WHERE ProductID = 706) WHERE ProductID = 680")).await;
    }
}

/// Nobody found the row among those that were asked for: every product was a 404.
#[tokio::test]
async fn a_key_of_another_type_is_told_and_no_product_is_taken_for_missing() {
    for (engine, change, kind) in [
        (Engine::Postgres, "ALTER TABLE product ALTER COLUMN ProductID TYPE numeric", "is of type NUMERIC"),
        (Engine::MariaDb, "ALTER TABLE product MODIFY ProductID DECIMAL(10, 0)", "is of type DECIMAL"),
        (Engine::MariaDb, "ALTER TABLE product MODIFY ProductID VARCHAR(10)", "is of type VARBINARY"),
        (
            Engine::Sqlite,
            "CREATE TABLE text (ProductID TEXT); INSERT INTO text SELECT ProductID FROM product;
             CREATE TABLE copy AS SELECT text.ProductID, Name, ProductNumber, Color, StandardCost, ListPrice, Size, Weight,
               ProductCategoryID, ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, ThumbNailPhoto,
               ThumbnailPhotoFileName, rowguid, ModifiedDate
               FROM product JOIN text ON CAST(text.ProductID AS INTEGER) = product.ProductID;
             DROP TABLE product; ALTER TABLE copy RENAME TO product",
            "is of type TEXT",
        ),
    ] {
        let server = DatabaseServer::start(engine).await;
        server.sql(change).await;
        let database = database(&server.url(), &[]);
        let error = name_of(&database, 680).await.expect_err(change);
        assert!(error.contains(&format!("column ProductID {kind}")), "{change}: {error}");
    }
}

/// SQLite made 0 of a word, and 1 of one and a half.
#[tokio::test]
async fn what_is_no_integer_is_a_bad_row_in_sqlite_too() {
    let server = DatabaseServer::start(Engine::Sqlite).await;
    let database = database(&server.url(), &[]);
    for value in ["'abc'", "1.5", "x'31'"] {
        let sql = format!(
            "PRAGMA ignore_check_constraints = ON; UPDATE product SET ProductModelID = {value} WHERE ProductID = 680"
        );
        server.sql(&sql).await;
        let rows = product_cache::product::load(&database, &[680, 706]).await.unwrap();
        let bad: Vec<_> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
        assert_eq!(bad.len(), 1, "{value}");
        assert_eq!((bad[0].key, bad[0].column), (680, "ProductModelID"), "{value}");
    }
}

/// Whoever was the first to ask on each connection afterwards was told that nobody could tell.
#[tokio::test]
async fn a_column_of_another_type_is_read_by_the_next_query() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let database = database(&server.url(), &[("DATABASE_MAX_CONNECTIONS", "5"), ("FEED_INTERVAL_MS", "0")]);
    for kind in ["varchar(20)", "text", "char(20)"] {
        let mut owner = server.session().await;
        owner.sql(hold(Engine::Postgres).0).await;
        let all = join_all((0..5).map(|_| name_of(&database, 680)));
        let release = async {
            eventually("each is in use", async || (server.connections().await == 5).then_some(())).await;
            owner.sql(hold(Engine::Postgres).1).await;
        };
        assert!(tokio::join!(all, release).0.iter().all(Result::is_ok));
        server.sql(&format!("ALTER TABLE product ALTER COLUMN Size TYPE {kind}")).await;
        assert_eq!(name_of(&database, 680).await.map(drop), Ok(()), "{kind}");
    }
}

#[tokio::test]
async fn integers_without_a_sign_and_those_called_boolean_are_shown_as_they_are() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    let database = database(&server.url(), &[]);
    for (kind, value) in [("INT UNSIGNED", 3_000_000_000_i64), ("TINYINT UNSIGNED", 200), ("TINYINT(1)", 1)] {
        server.sql("UPDATE product SET ProductModelID = NULL").await;
        server.sql(&format!("ALTER TABLE product MODIFY ProductModelID {kind}")).await;
        server.sql(&format!("UPDATE product SET ProductModelID = {value} WHERE ProductID = 680")).await;
        let json = products(&database, &[680]).await.unwrap().remove(0).1;
        assert!(json.contains(&format!("\"productModelID\":{value},")), "{kind}: {json}");
    }
}

#[tokio::test]
async fn a_file_that_is_opened_to_be_read_alone_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    catalogue(&file);
    sqlite(&file, "PRAGMA journal_mode = DELETE");
    for parameters in ["mode=ro", "immutable=true"] {
        let url = format!("sqlite:{}?{parameters}", file.display());
        let instance = start().env("Sql", url).up().await;
        assert_eq!(instance.product(680).await.status, 200, "{parameters}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no journal beside it");
}
