//! InvalidateCache as the Functions host calls it: the payload matrix, failures, redelivery, and who may not call it.

use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    PATIENCE, eventually,
    host::{
        self, Column, Dialect, Host, Invocation, MySqlRow, Operation, Options, SqlTrigger, changes, item, mysql_changes,
    },
    http,
    instance::{BINARY, Instance, hearing, start},
    proxy::{Fault, Proxy},
    redis::RedisServer,
};

const FUNCTION: &str = "InvalidateCache";

struct App {
    host: Host,
    root: TempDir,
}

impl App {
    async fn start(settings: &[(&str, String)], options: impl FnOnce(Options) -> Options) -> Self {
        let root = host::stage(env!("CARGO_MANIFEST_DIR").as_ref(), BINARY.as_ref()).expect("staged");
        // Expiries come from the trigger alone, as they do with SQL Server.
        let mut configured = options(Options::new(root.path())).env("FEED_INTERVAL_MS", "0");
        for (name, value) in settings {
            configured = configured.env(name, value);
        }
        Self { host: hearing(configured).await, root }
    }

    async fn name(&self, id: i64) -> String {
        let reply = self.host.get(&format!("/api/GetProductById?productid={id}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["name"].as_str().unwrap().to_owned()
    }

    fn rename(&self, id: i64, name: &str) {
        let sql = format!("UPDATE product SET Name = '{name}' WHERE ProductID = {id}");
        crate::support::sqlite(&self.root.path().join("product-cache.db"), &sql);
    }

    /// Renames the products, calls `deliver`, and checks that the change shows at once.
    async fn shows(&self, case: &str, ids: &[i64], deliver: impl AsyncFnOnce() -> Invocation) {
        for id in ids {
            self.name(*id).await;
            self.rename(*id, case);
        }
        match deliver().await {
            Invocation::Succeeded { logs, return_value, outputs, .. } => {
                assert_eq!((outputs, return_value), (json!({}), Value::Null), "{case}");
                assert_eq!(logs, [format!("expired {} products", ids.len())], "{case}");
            }
            failed => panic!("{case}: {failed:?}"),
        }
        for id in ids {
            assert_eq!(self.name(*id).await, case, "{id}");
        }
    }
}

fn row(id: i64, name: &str, photo: &[u8]) -> host::Item {
    item(&[
        ("ProductID", Column::Int(id)),
        ("Name", Column::Text(name)),
        ("StandardCost", Column::Decimal("1059.3100")),
        ("SellEndDate", Column::Null),
        ("ThumbNailPhoto", Column::Bytes(photo)),
        ("rowguid", Column::Guid("43DD68D6-14A4-461F-9069-55309D90EA7E")),
        ("ModifiedDate", Column::DateTime("2008-03-11 10:01:36.827")),
    ])
}

fn key_only(id: i64) -> host::Item {
    item(&[("ProductID", Column::Int(id))])
}

#[tokio::test]
async fn every_shape_that_a_trigger_sends_shows_the_change_at_once() {
    for core_tools in [false, true] {
        let app = App::start(&[], |options| if core_tools { options.core_tools() } else { options }).await;
        let trigger = async |rows: &[(Operation, host::Item)]| app.host.trigger(FUNCTION, &changes(rows)).await;
        let whole = |id| row(id, "24\" Frame \\ \u{2028} é 乌龟 ' \u{1F6B2}", b"GIF89a");

        app.shows("insert", &[680], async || trigger(&[(Operation::Insert, whole(680))]).await).await;
        app.shows("update", &[680], async || trigger(&[(Operation::Update, whole(680))]).await).await;
        app.shows("delete", &[680], async || trigger(&[(Operation::Delete, key_only(680))]).await).await;
        let mixed: Vec<_> =
            (706..756).flat_map(|id| [(Operation::Update, whole(id)), (Operation::Delete, key_only(id))]).collect();
        let ids: Vec<_> = (706..756).collect();
        app.shows("a hundred rows, each id twice", &ids, async || trigger(&mixed).await).await;
        app.shows("unknown operations and members", &[680, 706], async || {
            let rows = r#"[{"Operation":9,"Item":{"ProductID":680,"New":{"a":[1]}}},{"Operation":"x","Item":{"ProductID":706},"Z":1}]"#;
            app.host.trigger(FUNCTION, rows).await
        })
        .await;
        app.shows("mysql", &[680], async || {
            let row = MySqlRow {
                columns: whole(680),
                updated_at: "2026-01-01 00:00:00".to_owned(),
                attempt_count: Some(1),
                lease_expiration_time: Some("2026-01-01 00:01:00".to_owned()),
            };
            app.host.trigger(FUNCTION, &mysql_changes(&[row])).await
        })
        .await;
        app.shows("by hand, from the portal", &[680], async || {
            app.host.admin_invoke(FUNCTION, &changes(&[(Operation::Update, whole(680))])).await
        })
        .await;
        for (case, changes) in [
            ("an array", json!([{"Item": {"ProductID": 680}}])),
            ("one string", json!("[{\"Item\": {\"ProductID\": 680}}]")),
        ] {
            let body = json!({"Data": {"changes": changes, "more": 1}}).to_string();
            app.shows(case, &[680], async || app.host.invoke(FUNCTION, &body).await).await;
        }
    }
}

#[tokio::test]
async fn a_thousand_rows_with_photos_are_one_batch() {
    let app = App::start(&[], |options| options).await;
    let photo: Vec<_> = (0..20_000_u32).map(|byte| (byte % 251) as u8).collect();
    let mut trigger = SqlTrigger::new(FUNCTION, "ProductID");
    for id in 2000..2999 {
        trigger.change(Operation::Update, row(id, "\"quoted\" \\ text", &photo));
    }
    app.name(680).await;
    app.rename(680, "changed");
    trigger.change(Operation::Update, row(680, "last", &photo));
    // As many as host.json lets through at once.
    let delivery = trigger.poll(&app.host).await.expect("a batch");
    assert!(delivery.outcome.succeeded(), "{:?}", delivery.outcome);
    assert_eq!((delivery.keys.len(), trigger.pending()), (1000, 0));
    assert_eq!(app.name(680).await, "changed");
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_logged() {
    for core_tools in [false, true] {
        let settings = [("INVALIDATE_MAX_BODY_BYTES", "4096".to_owned())];
        let app = App::start(&settings, |options| if core_tools { options.core_tools() } else { options }).await;
        let invocation =
            app.host.trigger(FUNCTION, &changes(&[(Operation::Update, row(680, &"x".repeat(5000), b""))])).await;
        assert!(matches!(invocation, Invocation::Failed { status: Some(413), .. }), "{invocation:?}");
        assert!(app.host.wait_for_console("INVALIDATE_MAX_BODY_BYTES", PATIENCE).await.is_some());
        let small = app.host.trigger(FUNCTION, &changes(&[(Operation::Update, key_only(680))])).await;
        assert!(small.succeeded(), "{small:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_and_logged_without_its_content_and_hides_nothing_readable() {
    let app = App::start(&[], |options| options).await;
    for body in [
        "",
        "{",
        "null",
        "[]",
        "{}",
        r#"{"Data":null}"#,
        r#"{"Data":{"changes":"hunter2"}}"#,
        r#"{"Data":{"changes":"[{\"Item\":{\"Name\":\"hunter2\"}}]"}}"#,
    ] {
        let invocation = app.host.invoke(FUNCTION, body).await;
        assert!(matches!(invocation, Invocation::Failed { status: Some(400), .. }), "{body}: {invocation:?}");
    }
    app.name(680).await;
    app.rename(680, "readable");
    let rows = r#"[{"Item":{"Name":"hunter2"}},{"Item":{"ProductID":680}},null]"#;
    assert!(!app.host.trigger(FUNCTION, rows).await.succeeded());
    assert_eq!(app.name(680).await, "readable");
    let console: String = app.host.console().into_iter().map(|line| line.text + "\n").collect();
    assert!(console.contains("2 rows") || console.contains("rows=2"), "{console}");
    assert!(!console.contains("hunter2"), "{console}");
}

#[tokio::test]
async fn an_empty_batch_is_a_success_that_says_so() {
    let app = App::start(&[], |options| options).await;
    assert!(app.host.trigger(FUNCTION, "[]").await.succeeded());
}

#[tokio::test]
async fn nobody_but_the_host_can_invalidate() {
    let instance = start().up().await;
    let body = json!({"Data": {"changes": [{"Item": {"ProductID": 680}}]}}).to_string();
    let post = async |target: &str, headers: &[(&str, &str)]| {
        http::send(instance.port, "POST", target, headers, body.clone()).await.status
    };
    instance.product(680).await;
    for target in [
        "/api/InvalidateCache",
        "/api/invalidatecache",
        "/invalidatecache",
        "/InvalidateCache/",
        "/API/InvalidateCache/",
    ] {
        assert_eq!(post(target, &[]).await, 404, "{target}");
    }
    for header in [
        ("host", "shop.azurewebsites.net"),
        ("x-forwarded-for", "203.0.113.5"),
        ("x-forwarded-host", "localhost"),
        ("origin", "http://localhost:3000"),
    ] {
        assert_eq!(post("/InvalidateCache", &[header]).await, 404, "{header:?}");
    }
    instance.stderr.wait_for("InvalidateCache: a request that is not the host's is refused: it is addressed to").await;
    for method in ["GET", "HEAD", "PUT", "DELETE"] {
        assert_eq!(http::send(instance.port, method, "/InvalidateCache", &[], "").await.status, 405, "{method}");
    }
    assert!(instance.product(680).await.header("cache-status").starts_with("L1; hit"));
    assert_eq!(instance.status().await["expiredKeys"], 0);
    for host in ["127.0.0.1:7071", "localhost", "[::1]:7071"] {
        assert_eq!(post("/InvalidateCache", &[("host", host)]).await, 200, "{host}");
    }
}

/// The host tells nobody why: what is not in the log is nowhere.
#[tokio::test]
async fn a_body_that_does_not_come_or_is_cut_off_is_refused_and_logged() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let instance = start().env("INVALIDATE_BUDGET_MS", 1000).up().await;
    for (body, closes, status, logged) in [
        ("content-length: 99\r\n\r\n{", false, "408", "did not come within INVALIDATE_BUDGET_MS"),
        ("content-length: 99\r\n\r\n{", true, "400", "the body was cut off"),
        ("transfer-encoding: chunked\r\n\r\n-1\r\n", false, "400", "the body was cut off"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
        let request = format!("POST /InvalidateCache HTTP/1.1\r\nhost: 127.0.0.1\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        if closes {
            stream.shutdown().await.unwrap();
        }
        let mut line = [0; 12];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&line), format!("HTTP/1.1 {status}"), "{logged}");
        instance.stderr.wait_for(logged).await;
    }
}

#[tokio::test]
async fn a_public_request_reaches_it_through_neither_kind_of_host() {
    for dialect in [Dialect::Forward, Dialect::Proxy] {
        let app = App::start(&[], |options| options.dialect(dialect)).await;
        for target in ["/InvalidateCache", "/api/InvalidateCache"] {
            let request = host::Request::new("POST", target).body("{}");
            assert_eq!(app.host.http(request).await.status, 404, "{target}");
        }
    }
}

#[tokio::test]
async fn redis_away_for_longer_than_the_budget_fails_the_invocation_and_the_host_delivers_again() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let settings = [("Redis", proxy.redis_url()), ("INVALIDATE_BUDGET_MS", "500".to_owned())];
    let app = App::start(&settings, |options| options).await;
    let mut trigger = SqlTrigger::new(FUNCTION, "ProductID");
    app.name(680).await;
    app.rename(680, "during the outage");
    proxy.set(Fault::Refuse);
    trigger.change(Operation::Update, row(680, "x", b""));
    let first = trigger.poll(&app.host).await.expect("a batch");
    assert!(matches!(first.outcome, Invocation::Failed { status: Some(503), .. }), "{:?}", first.outcome);
    assert!(app.host.wait_for_console("InvalidateCache: failed", PATIENCE).await.is_some());
    assert_eq!(app.name(680).await, "during the outage", "this instance knows all the same");
    assert!(trigger.poll(&app.host).await.is_none(), "leased for a minute");
    proxy.set(Fault::None);
    // The budget is shorter than the longest pause between two attempts to connect.
    eventually("it is connected again", async || (redis.clients().await == 3).then_some(())).await;
    trigger.advance(Duration::from_secs(61));
    let mut again = trigger.poll(&app.host).await.expect("the same batch");
    assert_eq!(again.attempts, [2]);
    // The budget may be too short for a busy machine; after five attempts the row would be given up.
    while !again.outcome.succeeded() && again.attempts[0] < 5 {
        trigger.advance(Duration::from_secs(61));
        again = trigger.poll(&app.host).await.expect("the same batch");
    }
    assert!(again.outcome.succeeded(), "{again:?}");
    assert_eq!((trigger.pending(), trigger.dropped().len()), (0, 0));
}

#[tokio::test]
async fn redis_away_for_less_than_the_budget_costs_time_and_no_attempt() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let app = App::start(&[("Redis", proxy.redis_url())], |options| options).await;
    proxy.set(Fault::Refuse);
    let mut trigger = SqlTrigger::new(FUNCTION, "ProductID");
    trigger.change(Operation::Update, row(680, "x", b""));
    let (delivery, ()) = tokio::join!(trigger.poll(&app.host), async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        proxy.set(Fault::None);
    });
    let delivery = delivery.expect("a batch");
    assert!(delivery.outcome.succeeded() && delivery.attempts == [1], "{delivery:?}");
}

#[tokio::test]
async fn a_handler_killed_in_the_middle_gets_the_batch_again_and_two_instances_agree() {
    let redis = RedisServer::start().await;
    let settings = [("Redis", redis.url())];
    let app = App::start(&settings, |options| options).await;
    let other = start().env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0).folder(app.root.path());
    let other: Instance = other.up().await;
    let mut trigger = SqlTrigger::new(FUNCTION, "ProductID");
    assert_ne!(app.name(680).await, "new");
    other.product(680).await;
    app.rename(680, "new");
    trigger.change(Operation::Update, row(680, "new", b""));
    redis.signal("STOP"); // the invocation hangs between its two steps until the handler dies
    let (delivery, ()) = tokio::join!(trigger.poll(&app.host), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        app.host.crash().await;
    });
    assert!(!delivery.expect("a batch").outcome.succeeded());
    redis.signal("CONT");
    assert!(app.host.wait_for_starts(2, PATIENCE).await);
    trigger.advance(Duration::from_secs(61));
    let again = eventually("a delivery succeeds", async || {
        let delivery = trigger.poll(&app.host).await;
        if delivery.is_none() {
            trigger.advance(Duration::from_secs(61));
        }
        delivery.filter(|delivery| delivery.outcome.succeeded())
    })
    .await;
    assert_eq!(again.keys, [json!(680)]);
    assert_eq!(app.name(680).await, "new");
    eventually("the other instance too", async || other.product(680).await.text().contains("\"new\"").then_some(()))
        .await;
}

#[tokio::test]
async fn it_works_beside_two_hundred_reads() {
    let app = App::start(&[], |options| options).await;
    let reads = (0..200).map(|n| app.host.get(format!("/api/GetProductById?productid={}", 706 + n % 50).leak()));
    let rows: Vec<_> = (706..756).map(|id| (Operation::Update, key_only(id))).collect();
    let (reads, invocation) =
        tokio::join!(futures_util::future::join_all(reads), app.host.trigger(FUNCTION, changes(&rows).leak()));
    assert!(invocation.succeeded());
    assert!(reads.iter().all(|reply| reply.status == 200));
}
