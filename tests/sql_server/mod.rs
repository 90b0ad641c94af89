//! SQL Server, by a stand-in that speaks its protocol: logins, types, failures, and change tracking.

mod feed;
mod identity;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    process::Command,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use chrono::NaiveDate;
use product_cache::{
    config::{self, Config, Login, Source, Tls},
    database::{Database, Kind, Row, Table, Value},
    product::{self, TABLE},
};
use tokio::time::{Instant, sleep, timeout};

use crate::support::{
    PATIENCE,
    certificates::{CERTIFICATES, Certificates, NAME},
    eventually,
    tds::{
        Answer, Cell, Query, Server, Type, Welcome,
        products::{self, Types, product, products},
    },
};

/// A password with everything that could be encoded wrongly.
const PASSWORD: &str = "pä55;w'ör\"d}{𝄞";

/// How to reach a server, as an administrator who does not care about TLS would write it.
fn server(port: u16) -> config::Server {
    config::Server {
        host: "127.0.0.1".to_owned(),
        port,
        database: "AdventureWorksLT".to_owned(),
        login: Login::Password { user: "reader".to_owned(), password: PASSWORD.into() },
        tls: Tls::Off,
        application_name: "product-cache".to_owned(),
        read_only: false,
        connect_timeout: None,
        max_connections: None,
    }
}

fn settings(server: config::Server) -> config::Database {
    let config = Config::from_variables(&BTreeMap::new()).expect("defaults are valid");
    config::Database {
        source: Source::SqlServer(server),
        query_timeout: PATIENCE,
        connect_timeout: PATIENCE,
        ..config.database
    }
}

fn database(server: config::Server) -> Database {
    Database::new(&settings(server))
}

fn verified(server_name: Option<&str>, strict: bool, folder: &tempfile::TempDir) -> Tls {
    let ca_file = Some(CERTIFICATES.authority_file(folder.path()));
    Tls::Verified { ca_file, server_name: server_name.map(str::to_owned), strict }
}

async fn keys(database: &Database, keys: &[i64]) -> Vec<i64> {
    let rows = database.rows(&TABLE, keys).await.expect("rows");
    let mut keys: Vec<_> = rows.into_iter().map(|row| row.expect("a good row").key).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn a_login_says_who_and_what_for_and_its_password_arrives_as_it_is() {
    let fake = Server::start(|query| {
        assert!(query.sql.contains("SERVERPROPERTY"), "{}", query.sql);
        let cells = vec!["Developer Edition".into(), "16.0.1000.6".into()];
        Answer::Tables(vec![products::table(&[Type::NVarchar(128), Type::NVarchar(128)], vec![cells])])
    })
    .await;
    let read_only = config::Server { read_only: true, ..server(fake.port) };
    let opened = database(read_only).open().await.expect("opened");
    assert_eq!(
        opened,
        format!("SQL Server (Developer Edition 16.0.1000.6), database AdventureWorksLT on 127.0.0.1:{}", fake.port)
    );
    let login = &fake.logins()[0];
    assert_eq!((login.user.as_str(), login.password.as_str()), ("reader", PASSWORD));
    assert_eq!((login.application.as_str(), login.database.as_str()), ("product-cache", "AdventureWorksLT"));
    assert_eq!((login.server.as_str(), login.read_only), ("127.0.0.1", true));
    assert!(!login.encrypted, "the login alone was");
    assert_eq!(login.token, None);
}

#[tokio::test]
async fn nothing_is_opened_before_it_is_needed() {
    let fake = Server::start(products(vec![product(1)])).await;
    let database = database(server(fake.port));
    assert_eq!(fake.connections(), 0);
    assert_eq!(keys(&database, &[]).await, [0; 0]);
    assert_eq!(fake.connections(), 0, "no keys, no query");
    assert_eq!(keys(&database, &[1]).await, [1]);
    assert_eq!(fake.connections(), 1);
}

/// It was read on a thread that serves others, for each connection.
#[tokio::test]
async fn an_authority_whose_file_is_slow_to_read_holds_nobody_up_but_who_connects() {
    let folder = tempfile::tempdir().expect("a folder");
    let (slow, quick) = (folder.path().join("slow.pem"), CERTIFICATES.authority_file(folder.path()));
    assert!(Command::new("mkfifo").arg(&slow).status().expect("runs").success());
    let fake = Server::start(products(vec![product(1)])).await;
    let tls = Tls::Verified { ca_file: Some(slow.clone()), server_name: None, strict: false };
    let database = database(config::Server { tls, ..server(fake.port) });
    let (tick, ticks) = mpsc::channel();
    let others_go_on = thread::spawn(move || {
        let mut file = File::create(slow).expect("opened, now that somebody reads it");
        ticks.try_iter().for_each(drop);
        let others_go_on = ticks.recv_timeout(PATIENCE).is_ok();
        file.write_all(&fs::read(quick).expect("an authority")).expect("written");
        others_go_on
    });
    let others = async {
        loop {
            let _ = tick.send(());
            sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        rows = keys(&database, &[1]) => assert_eq!(rows, [1]),
        () = others => {}
    }
    assert!(others_go_on.join().expect("it ended"));
}

#[tokio::test]
async fn only_the_right_server_is_trusted_with_a_password() {
    let folder = tempfile::tempdir().expect("a folder");
    let foreign = tempfile::tempdir().expect("a folder");
    let foreign_ca = Certificates::new().authority_file(foreign.path());
    let fake = Server::start(products(vec![product(1)])).await;
    for (tls, trusted) in [
        (Tls::Unverified, true),
        (verified(None, false, &folder), true),
        (verified(Some(NAME), false, &folder), true),
        (verified(None, true, &folder), true),
        (verified(Some("other.test"), false, &folder), false),
        (verified(Some("other.test"), true, &folder), false),
        (Tls::Verified { ca_file: Some(foreign_ca.clone()), server_name: None, strict: false }, false),
        (Tls::Verified { ca_file: Some(foreign_ca), server_name: None, strict: true }, false),
        (Tls::Verified { ca_file: Some(folder.path().join("none.pem")), server_name: None, strict: false }, false),
    ] {
        let before = fake.logins().len();
        let database = database(config::Server { tls: tls.clone(), ..server(fake.port) });
        let rows = database.rows(&TABLE, &[1]).await;
        assert_eq!(rows.is_ok(), trusted, "{tls:?}: {:?}", rows.err());
        let logins = fake.logins().split_off(before);
        assert_eq!(logins.len(), usize::from(trusted), "{tls:?}");
        assert!(logins.iter().all(|login| login.encrypted), "{tls:?}");
        if let Err(error) = rows {
            let error = error.to_string();
            assert!(error.contains("certificate") || error.contains("none.pem"), "{tls:?}: {error}");
            assert!(!error.contains("Config::") && error.len() < 300, "advice is for administrators: {error}");
        }
    }
}

#[tokio::test]
async fn a_refused_login_is_told_without_the_password() {
    let fake = Server::start(products(Vec::new())).await;
    fake.welcome(Welcome::Refused(18_456, "Login failed for user 'reader'."));
    let database = database(server(fake.port));
    let error = database.open().await.expect_err("refused").to_string();
    assert_eq!(error, "database unavailable: error 18456: Login failed for user 'reader'.");
    assert!(!format!("{:?}", settings(server(fake.port))).contains("ä55"), "nor is it shown for debugging");
    fake.welcome(Welcome::In);
    assert_eq!(keys(&database, &[1]).await, [0; 0], "a login that is let in later is let in");
}

#[tokio::test]
async fn a_redirect_is_followed_to_where_it_leads() {
    let target = Server::start(products(vec![product(7)])).await;
    let gateway = Server::start(|_| Answer::Close).await;
    gateway.welcome(Welcome::Route("localhost\\instance".to_owned(), target.port));
    let database = database(server(gateway.port));
    assert_eq!(keys(&database, &[7]).await, [7]);
    let login = &target.logins()[0];
    assert_eq!((login.server.as_str(), login.password.as_str()), ("localhost", PASSWORD), "the name it was sent to");
    assert_eq!((gateway.logins().len(), target.logins().len()), (1, 1));
    eventually("the gateway is let go", async || (gateway.open() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_redirect_to_another_machine_needs_a_certificate() {
    let gateway = Server::start(|_| Answer::Close).await;
    gateway.welcome(Welcome::Route("192.0.2.1".to_owned(), 1433));
    for tls in [Tls::Off, Tls::Unverified] {
        let error =
            database(config::Server { tls, ..server(gateway.port) }).open().await.expect_err("refused").to_string();
        assert!(error.contains("redirected to 192.0.2.1, another machine"), "{error}");
    }
    assert_eq!(gateway.logins().len(), 2);
    let (allow_unverified, connect_timeout) = (true, Duration::from_millis(500));
    let allowing = config::Database { allow_unverified, connect_timeout, ..settings(server(gateway.port)) };
    let error = Database::new(&allowing).open().await.expect_err("nobody is there").to_string();
    assert!(!error.contains("certificate"), "unless that is allowed: {error}");
}

#[tokio::test]
async fn a_circle_of_redirects_ends() {
    let fake = Server::start(|_| Answer::Close).await;
    fake.welcome(Welcome::Route("127.0.0.1".to_owned(), fake.port));
    let error = database(server(fake.port)).open().await.expect_err("a circle").to_string();
    assert!(error.contains("redirected more than 3 times"), "{error}");
    assert_eq!(fake.logins().len(), 4);
}

#[tokio::test]
async fn a_product_is_shown_byte_for_byte_and_no_digit_is_lost() {
    let mut bike = product(680);
    bike.extend([
        ("Name", Cell::from("HL Road Frame – Żółw 乌龟 𝄞 \"58\"")),
        ("ProductNumber", "FR-R92B-58".into()),
        ("Color", "Black".into()),
        ("StandardCost", Cell::Digits(9_223_372_036_854_775_807)), // the largest money; not a float's
        ("ListPrice", Cell::Digits(-1)),
        ("Size", "58".into()),
        ("Weight", Cell::Digits(101_624)),
        ("ProductCategoryID", Cell::Int(18)),
        ("ProductModelID", Cell::Int(-6)),
        ("SellStartDate", Cell::DateTime(37_406, 1)), // 2002-06-01, one tick
        ("SellEndDate", Cell::DateTime(-53_690, 25_919_999)), // 1753-01-01, the last tick of the day
        ("ThumbNailPhoto", Cell::Bytes((0..=255).cycle().take(9000).collect())),
        ("ThumbnailPhotoFileName", "no_image_available_small.gif".into()),
        ("ModifiedDate", Cell::DateTime(39_515, 10_936_952)), // 10:07:36.50666…
    ]);
    let fake = Server::start(products(vec![bike, product(1)])).await;
    let database = database(server(fake.port));
    let loaded = product::load(&database, &[680]).await.expect("loaded").remove(0).expect("a good row");
    use base64::{Engine, engine::general_purpose::STANDARD};
    let photo = STANDARD.encode((0..=255).cycle().take(9000).collect::<Vec<u8>>());
    let expected = "{\"productID\":680,\"name\":\"HL Road Frame – Żółw 乌龟 𝄞 \\\"58\\\"\",\
        \"productNumber\":\"FR-R92B-58\",\"color\":\"Black\",\"standardCost\":922337203685477.5807,\
        \"listPrice\":-0.0001,\"size\":\"58\",\"weight\":1016.24,\"productCategoryID\":18,\"productModelID\":-6,\
        \"sellStartDate\":\"2002-06-01T00:00:00.003\",\"sellEndDate\":\"1753-01-01T23:59:59.997\",\
        \"discontinuedDate\":null,\"thumbNailPhoto\":\"PHOTO\",\
        \"thumbnailPhotoFileName\":\"no_image_available_small.gif\",\
        \"rowguid\":\"43dd68d6-14a4-461f-9069-55309d90ea7e\",\"modifiedDate\":\"2008-03-10T10:07:36.507\"}";
    assert_eq!(std::str::from_utf8(&loaded.json).expect("UTF-8"), expected.replace("PHOTO", &photo));

    let plain = product::load(&database, &[1]).await.expect("loaded").remove(0).expect("a good row");
    let plain = std::str::from_utf8(&plain.json).expect("UTF-8");
    assert_eq!(plain.matches("null").count(), 9, "{plain}");
    assert!(plain.contains("\"standardCost\":1.0000,\"listPrice\":2.0000"), "{plain}");
}

/// One column of each type and kind.
#[rustfmt::skip] // a table reads as a table
static TYPES: Table = Table {
    name: "types",
    sql_server_name: "dbo.Types",
    key: "Id",
    columns: &[
        ("Tiny", Kind::Integer), ("Small", Kind::Integer), ("Big", Kind::Integer),
        ("SmallMoney", Kind::Decimal(4)), ("Long", Kind::Decimal(4)), ("Whole", Kind::Decimal(0)),
        ("SmallDateTime", Kind::DateTime), ("DateTime2", Kind::DateTime), ("Second", Kind::DateTime), ("Date", Kind::DateTime),
        ("Max", Kind::Text), ("Half", Kind::Text), ("Guid", Kind::Guid), ("Bytes", Kind::Binary),
    ],
};

fn types() -> Types {
    BTreeMap::from([
        ("Id", (Type::Int(8), false)),
        ("Tiny", (Type::Int(1), true)),
        ("Small", (Type::Int(2), true)),
        ("Big", (Type::Int(8), true)),
        ("SmallMoney", (Type::Money(4), true)),
        ("Long", (Type::Decimal(38, 6), true)),
        ("Whole", (Type::Decimal(29, 0), true)),
        ("SmallDateTime", (Type::DateTime(4), true)),
        ("DateTime2", (Type::DateTime2(7), true)),
        ("Second", (Type::DateTime2(0), true)),
        ("Date", (Type::Date, true)),
        ("Max", (Type::NVarchar(0), true)),
        ("Half", (Type::NVarchar(10), true)),
        ("Guid", (Type::Guid, true)),
        ("Bytes", (Type::VarBinary(20), true)),
    ])
}

async fn read_types(rows: Vec<products::Row>) -> Vec<Result<Row, product_cache::database::BadRow>> {
    let asked: Vec<_> = rows.iter().map(|row| if let Cell::Int(key) = row["Id"] { key } else { 0 }).collect();
    let types = types();
    let fake = Server::start(move |query| Answer::Tables(vec![products::select(query, &types, &rows)])).await;
    database(server(fake.port)).rows(&TYPES, &asked).await.expect("rows")
}

#[tokio::test]
async fn every_type_is_read_exactly() {
    let last_day = 3_652_058; // of the year 9999
    let mut rows = read_types(vec![products::Row::from([
        ("Id", Cell::Int(i64::MAX)),
        ("Tiny", Cell::Int(255)),
        ("Small", Cell::Int(-32_768)),
        ("Big", Cell::Int(i64::MIN)),
        ("SmallMoney", Cell::Digits(-2_147_483_648)),
        ("Long", Cell::Digits(1_234_567_890_123_456_789_012_345_650)), // …345.650 becomes …345.65, then ….7 at 4 digits
        ("Whole", Cell::Digits(-79_228_162_514_264_337_593_543_950_335)),
        ("SmallDateTime", Cell::DateTime(65_535, 1439)),
        ("DateTime2", Cell::DateTime2(last_day, 863_999_999_999)),
        ("Second", Cell::DateTime2(0, 86_399)),
        ("Date", Cell::DateTime2(last_day, 0)),
        ("Max", Cell::Text("𝄞".repeat(5000))),
        ("Half", Cell::Utf16(vec![0x61, 0xd834, 0x62])),
        ("Guid", Cell::Guid("00112233-4455-6677-8899-aabbccddeeff")),
        ("Bytes", Cell::Bytes(vec![])),
    ])])
    .await;
    let row = rows.remove(0).expect("a good row");
    let at = |year, month, day, (hour, minute, second, nanos)| {
        let day = NaiveDate::from_ymd_opt(year, month, day).expect("a day");
        Some(Value::DateTime(day.and_hms_nano_opt(hour, minute, second, nanos).expect("a time")))
    };
    let decimal = |text: &str| Some(Value::Decimal(text.parse().expect("a decimal")));
    assert_eq!(row.key, i64::MAX);
    assert_eq!(
        row.values,
        [
            Some(Value::Integer(255)),
            Some(Value::Integer(-32_768)),
            Some(Value::Integer(i64::MIN)),
            decimal("-214748.3648"),
            decimal("1234567890123456789012.3457"),
            decimal("-79228162514264337593543950335"),
            at(2079, 6, 6, (23, 59, 0, 0)),
            at(9999, 12, 31, (23, 59, 59, 999_999_900)),
            at(1, 1, 1, (23, 59, 59, 0)),
            at(9999, 12, 31, (0, 0, 0, 0)),
            Some(Value::Text("𝄞".repeat(5000))),
            Some(Value::Text("a\u{fffd}b".to_owned())), // as .NET writes half a character
            Some(Value::Guid("00112233-4455-6677-8899-aabbccddeeff".to_owned())),
            Some(Value::Binary(vec![])),
        ]
    );
}

#[tokio::test]
async fn ticks_of_datetime_are_shown_as_sql_server_shows_them() {
    let ticks = [0, 1, 2, 3, 4, 5, 149, 150, 298, 299, 300, 25_919_998, 25_919_999];
    let millis = [0, 3, 7, 10, 13, 17, 497, 500, 993, 997, 1000, 86_399_993, 86_399_997_i64];
    let rows = ticks.iter().zip(1..).map(|(ticks, id)| {
        let mut row = product(id);
        row.insert("ModifiedDate", Cell::DateTime(0, *ticks));
        row
    });
    let fake = Server::start(products(rows.collect())).await;
    let asked: Vec<_> = (1..=ticks.len() as i64).collect();
    let rows = database(server(fake.port)).rows(&TABLE, &asked).await.expect("rows");
    let midnight = NaiveDate::from_ymd_opt(1900, 1, 1).and_then(|day| day.and_hms_opt(0, 0, 0)).expect("a moment");
    let shown: Vec<_> = rows.into_iter().map(|row| row.expect("a good row").values.pop().flatten()).collect();
    let expected = millis.map(|millis| Some(Value::DateTime(midnight + chrono::TimeDelta::milliseconds(millis))));
    assert_eq!(shown, expected);
}

#[tokio::test]
async fn null_is_null_in_every_type() {
    let row = read_types(vec![products::Row::from([("Id", Cell::Int(1))])]).await.remove(0).expect("a good row");
    assert_eq!(row.values, vec![None; TYPES.columns.len()]);
}

#[tokio::test]
async fn a_value_that_cannot_be_shown_spoils_its_own_row_only() {
    let mut rows = read_types(vec![
        products::Row::from([("Id", Cell::Int(1)), ("Whole", Cell::Digits(79_228_162_514_264_337_593_543_950_336))]),
        products::Row::from([("Id", Cell::Int(2)), ("Whole", Cell::Digits(3))]),
    ])
    .await;
    assert_eq!(rows.pop().expect("two rows").expect("a good row").key, 2);
    let bad = rows.pop().expect("two rows").err().expect("a bad row").to_string();
    assert_eq!(bad, "row 1: column Whole: has more than 28 digits");
}

#[tokio::test]
async fn a_column_of_another_type_is_told_by_its_name() {
    let mut types = products::product_types();
    types.insert("rowguid", (Type::NVarchar(36), false));
    let mut row = product(5);
    row.insert("rowguid", "43dd68d6-14a4-461f-9069-55309d90ea7e".into());
    let rows = vec![row];
    let fake = Server::start(move |query| Answer::Tables(vec![products::select(query, &types, &rows)])).await;
    let bad = database(server(fake.port)).rows(&TABLE, &[5]).await.expect("rows").remove(0).err().expect("a bad row");
    assert_eq!(bad.to_string(), "row 5: column rowguid: is not a uniqueidentifier");
}

#[tokio::test]
async fn a_key_of_another_type_is_told_and_no_product_is_taken_for_missing() {
    let mut types = products::product_types();
    types.insert("ProductID", (Type::Decimal(10, 0), false));
    let mut row = product(5);
    row.insert("ProductID", Cell::Digits(5));
    let rows = vec![row];
    let fake = Server::start(move |query| Answer::Tables(vec![products::select(query, &types, &rows)])).await;
    let error = database(server(fake.port)).rows(&TABLE, &[5]).await.err().expect("a bad key").to_string();
    assert_eq!(error, "database unavailable: column ProductID is not an integer");
}

#[tokio::test]
async fn a_batch_is_one_query_and_knows_few_statements() {
    let fake = Server::start(products((1..=200).map(product).collect())).await;
    let database = database(server(fake.port));
    let asked: Vec<_> = (1..=100).collect();
    assert_eq!(keys(&database, &asked).await, asked);
    assert_eq!(fake.queries().len(), 1);
    assert_eq!(keys(&database, &[5, 900, 6, 7]).await, [5, 6, 7], "what is not there is left out");
    for count in 1..=100 {
        let asked: Vec<_> = (1..=count).collect();
        assert_eq!(keys(&database, &asked).await, asked);
    }
    assert_eq!(fake.queries().len(), 102);
    let statements: std::collections::BTreeSet<_> =
        fake.queries().into_iter().map(|query| (query.sql, query.declared)).collect();
    assert_eq!(statements.len(), 8, "1, 2, 4, … 128 parameters");
    assert!(statements.iter().all(|(_, declared)| !declared.contains("bigint")), "as narrow as the column");
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn keys_wider_than_int_are_asked_for_as_they_are() {
    let fake = Server::start(products(vec![product(1)])).await;
    assert_eq!(keys(&database(server(fake.port)), &[i64::MAX, 1, i64::MIN]).await, [1]);
    let asked = &fake.queries()[0].parameters;
    assert!(asked.contains(&i64::MAX) && asked.contains(&i64::MIN), "{asked:?}");
}

#[tokio::test]
async fn what_the_server_refuses_is_told_and_tried_once() {
    let fake = Server::start(|query| match query.parameters[0] {
        1 => Answer::Error(208, 16, "Invalid object name 'SalesLT.Product'."),
        _ => Answer::Error(8134, 16, "Divide by zero error encountered."),
    })
    .await;
    let database = database(server(fake.port));
    let error = database.rows(&TABLE, &[2]).await.err().expect("refused").to_string();
    assert_eq!(error, "database unavailable: error 8134: Divide by zero error encountered.");
    let error = database.rows(&TABLE, &[1]).await.err().expect("refused").to_string();
    assert!(error.contains("Invalid object name") && error.contains("sql/sqlserver-access.sql"), "{error}");
    assert_eq!(fake.queries().len(), 2);
}

/// Answers well, but for the queries with these numbers.
fn faulty(faults: impl Fn(usize) -> Option<Answer> + Send + Sync + 'static) -> impl Fn(&Query) -> Answer + Send + Sync {
    let (count, healthy) = (AtomicUsize::new(0), products((1..=1000).map(product).collect()));
    move |query| faults(count.fetch_add(1, Ordering::SeqCst) + 1).unwrap_or_else(|| healthy(query))
}

fn whole(query_id: i64) -> Vec<crate::support::tds::Table> {
    let query = Query {
        sql: "SELECT [ProductID], [Name] FROM x WHERE [ProductID] = @P1".to_owned(),
        parameters: vec![query_id],
        ..Query::default()
    };
    vec![products::select(&query, &products::product_types(), &[product(query_id)])]
}

#[tokio::test]
async fn a_connection_lost_while_it_was_idle_costs_no_reader_an_answer() {
    for (name, fault) in [
        ("closed", (|| Answer::Close) as fn() -> Answer),
        ("cut", || Answer::CutMidRow(whole(2))),
        ("garbage", || Answer::Garbage),
        ("killed", || {
            Answer::Error(596, 21, "Cannot continue the execution because the session is in the kill state.")
        }),
        ("failover", || Answer::Error(40_613, 14, "Database is not currently available.")),
        ("deadlock", || Answer::Error(1205, 13, "Transaction was deadlocked and has been chosen as the victim.")),
    ] {
        let fake = Server::start(faulty(move |number| (number == 2).then(fault))).await;
        let database = database(server(fake.port));
        assert_eq!(keys(&database, &[1]).await, [1], "{name}");
        assert_eq!(keys(&database, &[2]).await, [2], "{name}: on another connection");
        assert_eq!(keys(&database, &[3]).await, [3], "{name}");
        assert_eq!(fake.connections(), 2, "{name}");
    }
}

#[tokio::test]
async fn a_new_connection_that_fails_is_told_and_the_next_query_has_another() {
    for (name, told, fault) in [
        ("closed", "the connection failed", (|| Answer::Close) as fn() -> Answer),
        ("cut", "the connection failed", || Answer::CutMidRow(whole(1))),
        ("garbage", "not understood", || Answer::Garbage),
    ] {
        let fake = Server::start(faulty(move |number| (number == 1).then(fault))).await;
        let database = database(server(fake.port));
        let error = database.rows(&TABLE, &[1]).await.err().expect(name).to_string();
        assert!(error.contains(told), "{name}: {error}");
        assert_eq!(keys(&database, &[2]).await, [2], "{name}");
        assert_eq!((fake.connections(), fake.queries().len()), (2, 2), "{name}");
    }
}

#[tokio::test]
async fn a_query_that_hangs_ends_at_its_deadline_and_its_connection_with_it() {
    let healthy = products((1..=3).map(product).collect());
    let fake = Server::start(move |query| if query.parameters == [2] { Answer::Stall } else { healthy(query) }).await;
    let query_timeout = Duration::from_millis(300);
    let database = Database::new(&config::Database { query_timeout, ..settings(server(fake.port)) });
    let first = async || database.rows(&TABLE, &[1]).await.ok().map(drop);
    eventually("a connection is made in time", first).await;
    let began = Instant::now();
    let error = database.rows(&TABLE, &[2]).await.err().expect("a deadline").to_string();
    assert_eq!(error, "database unavailable: no answer within 300 ms");
    assert!(began.elapsed() >= query_timeout);
    eventually("the next query works", async || {
        let rows = database.rows(&TABLE, &[3]).await.ok()?;
        assert_eq!(rows[0].as_ref().expect("a good row").key, 3);
        Some(())
    })
    .await;
    eventually("the connection that hung is closed", async || (fake.open() == 1).then_some(())).await;
}

#[tokio::test]
async fn a_login_that_hangs_ends_at_its_deadline() {
    let fake = Server::start(products(vec![product(1)])).await;
    fake.welcome(Welcome::Stall);
    let connect_timeout = Duration::from_millis(200);
    let database = Database::new(&config::Database { connect_timeout, ..settings(server(fake.port)) });
    let error = database.open().await.expect_err("a deadline").to_string();
    assert_eq!(error, "database unavailable: no connection within 200 ms");
    let closed = async || (fake.connections() == 1 && fake.open() == 0).then_some(());
    eventually("it is closed, and no other was tried", closed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_cancelled_queries_leave_right_rows_and_few_connections() {
    let fake = Server::start(products((1..=1000).map(product).collect())).await;
    let database = Database::new(&config::Database { max_connections: 4, ..settings(server(fake.port)) });
    let database = std::sync::Arc::new(database);
    let (mut finished, mut longest) = (0, 6000);
    for round in 0..250 {
        let mut queries = tokio::task::JoinSet::new();
        for query in 0..8 {
            let (database, id) = (database.clone(), 1 + (round * 8 + query) % 1000);
            queries.spawn(async move {
                // Anywhere between before the first byte and after the last one.
                let patience = Duration::from_micros(rand::random_range(0..longest));
                match timeout(patience, database.rows(&TABLE, &[id])).await {
                    Ok(rows) => {
                        let row = rows.expect("rows").remove(0).expect("a good row");
                        assert_eq!((row.key, &row.values[0]), (id, &Some(Value::Integer(id))), "somebody else's row");
                        true
                    }
                    Err(_) => false,
                }
            });
        }
        let of_this_round = queries.join_all().await.into_iter().filter(|finished| *finished).count();
        finished += of_this_round;
        longest = match of_this_round {
            0 => (longest * 2).min(1_000_000), // this machine is slow just now
            8 => (longest / 2).max(100),
            _ => longest,
        };
    }
    assert!((1..2000).contains(&finished), "{finished} were not cancelled, which shows nothing");
    for id in 1..=100 {
        assert_eq!(keys(&database, &[id]).await, [id]);
    }
    eventually("what was cancelled is closed", async || (fake.open() <= 4).then_some(())).await;
}

#[tokio::test]
async fn no_more_connections_are_open_than_allowed() {
    let fake = Server::start(products((1..=1000).map(product).collect())).await;
    let database = Database::new(&config::Database { max_connections: 3, ..settings(server(fake.port)) });
    let database = &database;
    let queries = (1..=60).map(|id| async move { keys(database, &[id]).await });
    let rows = futures_util::future::join_all(queries).await;
    assert_eq!(rows, (1..=60).map(|id| vec![id]).collect::<Vec<_>>());
    assert_eq!((fake.most_open(), fake.connections()), (3, 3));
    database.close().await;
    eventually("a closed pool has none", async || (fake.open() == 0).then_some(())).await;
    assert!(database.rows(&TABLE, &[1]).await.is_err(), "and opens none");
}
