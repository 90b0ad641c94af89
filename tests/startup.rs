//! How the process starts, says what it does, and ends: the host's rules and a person's.

use std::{net::TcpListener, time::Duration};

use tokio::time::{Instant, sleep, timeout};

use crate::support::{
    PATIENCE,
    database::{DatabaseServer, Engine},
    eventually, free_port, http,
    instance::{Instance, start},
    proxy::{Fault, Proxy},
    redis::RedisServer,
};

async fn answers(port: u16) {
    eventually("GET / is answered", async || http::try_send(port, "GET", "/", &[], "").await.ok()).await;
}

/// The exit codes, as the README has them. To the host 0 is "done", 200 "start me again", and any other an error.
const STOPPED: i32 = 0;
const CANNOT_SERVE: i32 = 1;
const WRONG_SETTINGS: i32 = 2;
const STOPPED_UNDER_HOST: i32 = 3;

#[test]
fn the_readme_tells_the_exit_codes() {
    let readme = include_str!("../README.md");
    for (code, meaning) in [
        (STOPPED, "stopped by SIGTERM or Ctrl-C, standalone"),
        (CANNOT_SERVE, "the port could not be bound"),
        (WRONG_SETTINGS, "wrong settings"),
        (STOPPED_UNDER_HOST, "stopped by a signal under a Functions host"),
    ] {
        assert!(readme.contains(&format!("\n| {code} | {meaning}")), "{code}: {meaning}");
    }
}

#[tokio::test]
async fn the_host_chooses_the_port_by_either_variable_and_the_newer_one_wins() {
    for newer in [true, false] {
        let (port, other) = (free_port(), free_port());
        let mut start = start().env("FUNCTIONS_HTTPWORKER_PORT", if newer { other } else { port });
        if newer {
            start = start.env("FUNCTIONS_CUSTOMHANDLER_PORT", port);
        }
        let instance = start.spawn();
        answers(port).await;
        assert!(http::try_send(other, "GET", "/", &[], "").await.is_err());
        instance.stdout.wait_for("ready").await;
        let said = format!("ready version=\"{}\" port={port} database=\"SQLite ", env!("CARGO_PKG_VERSION"));
        assert!(instance.stdout.text().contains(&said), "{}", instance.stdout.text());
        assert!(!instance.stdout.text().contains("try "), "no screen for a host");
    }
}

#[tokio::test]
async fn it_listens_on_the_ipv4_loopback_address_alone() {
    // Not one that the system chose: others may have been given its number for an IPv6 address.
    let instance = start().env("HTTP_PORT", free_port()).up().await;
    let sockets = ["tcp", "tcp6"].map(|family| {
        // A machine may have no IPv6.
        std::fs::read_to_string(format!("/proc/{}/net/{family}", instance.pid())).unwrap_or_default()
    });
    let listening: Vec<_> = sockets
        .iter()
        .flat_map(|sockets| sockets.lines())
        .filter_map(|line| line.split_whitespace().nth(1).zip(line.split_whitespace().nth(3)))
        .filter(|(address, state)| *state == "0A" && address.ends_with(&format!(":{:04X}", instance.port)))
        .collect();
    assert_eq!(listening, [(format!("0100007F:{:04X}", instance.port).as_str(), "0A")]);
}

#[tokio::test]
async fn a_busy_port_is_an_error_that_the_host_understands() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut instance = start().env("FUNCTIONS_CUSTOMHANDLER_PORT", taken.local_addr().unwrap().port()).spawn();
    assert_eq!(instance.exit_code().await, Some(CANNOT_SERVE));
    instance.stderr.wait_for("address already in use").await;
}

#[tokio::test]
async fn wrong_settings_stop_the_start_with_one_line_that_names_them_all() {
    let mut instance = start()
        .env("FUNCTIONS_CUSTOMHANDLER_PORT", "seven")
        .env("CACHE_DURATION_S", "-1")
        .env("REDIS_POOL_SIZE", "many")
        .env("Redis", "hunter2")
        .spawn();
    assert_eq!(instance.exit_code().await, Some(WRONG_SETTINGS));
    instance.stderr.wait_for("4 wrong settings").await;
    let text = instance.stderr.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    for name in ["FUNCTIONS_CUSTOMHANDLER_PORT", "CACHE_DURATION_S", "REDIS_POOL_SIZE", "Redis"] {
        assert!(text.contains(name), "{name}: {text}");
    }
    assert!(!text.contains("hunter2"));
}

#[tokio::test]
async fn local_settings_count_for_a_person_and_not_under_a_host() {
    let folder = tempfile::tempdir().unwrap();
    // Held, so that nobody is given it as a free one.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let settings =
        format!(r#"{{"IsEncrypted":false,"Values":{{"HTTP_PORT":"{port}","CACHE_DURATION_S":"no number"}}}}"#);
    std::fs::write(folder.path().join("local.settings.json"), settings).unwrap();
    let mut person = start().folder(folder.path()).spawn();
    assert_eq!(person.exit_code().await, Some(WRONG_SETTINGS));
    person.stderr.wait_for("CACHE_DURATION_S").await;
    // The environment wins over the file.
    let person = start().folder(folder.path()).env("CACHE_DURATION_S", "60").up().await;
    assert_ne!(person.port, port);
    let port = free_port();
    let _hosted = start().folder(folder.path()).env("FUNCTIONS_CUSTOMHANDLER_PORT", port).spawn();
    answers(port).await;
}

#[tokio::test]
async fn a_person_sees_where_it_listens_what_it_uses_and_what_to_try() {
    let instance = start().up().await;
    let screen = instance.stdout.text();
    for part in
        ["listening  http://127.0.0.1:", "database   SQLite file ", "product-cache.db", "Redis      off", "curl -i '"]
    {
        assert!(screen.contains(part), "{part}: {screen}");
    }
    assert!(screen.lines().count() < 12, "{screen}");
    // The curl it shows is the one that works.
    let curl = screen.lines().find_map(|line| line.split_once("curl -i '")).unwrap().1.trim_end_matches('\'');
    let target = curl.split_once(&format!("127.0.0.1:{}", instance.port)).unwrap().1;
    assert_eq!(instance.get(target).await.status, 200);
}

#[tokio::test]
async fn where_nothing_can_be_written_the_catalogue_is_in_memory_and_says_so() {
    // Root may write anywhere, so the folder is one that even root cannot write in.
    let instance = start().folder("/proc/self".as_ref()).up().await;
    assert!(instance.stdout.text().contains("SQLite in memory"), "{}", instance.stdout.text());
    for id in 706..760 {
        assert_eq!(instance.product(id).await.status, 200, "{id}");
    }
}

#[tokio::test]
async fn it_is_ready_with_every_backend_away() {
    let (port, redis) = (free_port(), TcpListener::bind("127.0.0.1:0").unwrap());
    redis.set_nonblocking(true).unwrap();
    let began = Instant::now();
    let _instance = start()
        .env("FUNCTIONS_CUSTOMHANDLER_PORT", port)
        .env("Redis", format!("redis://{}", redis.local_addr().unwrap())) // accepts and never answers
        .env("Sql", "sqlite:/nowhere/at/all.db")
        .spawn();
    answers(port).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    for _ in 0..20 {
        let reply = http::send(port, "GET", "/", &[], "").await;
        assert!(reply.status == 200 && reply.body.len() < 2000);
    }
    let reply = http::send(port, "GET", "/api/GetProductById?productid=680", &[], "").await;
    assert_eq!(reply.status, 503, "{}", reply.text());
}

#[tokio::test]
async fn its_probe_asks_neither_redis_nor_the_database_and_waits_for_neither() {
    let (redis, server) = (RedisServer::start().await, DatabaseServer::start(Engine::Postgres).await);
    let (to_redis, to_database) = (Proxy::start(redis.port).await, Proxy::start(server.port).await);
    let instance = start()
        .patient()
        .env("Redis", to_redis.redis_url())
        .env("Sql", server.url_by(to_database.port))
        .env("FEED_INTERVAL_MS", 0)
        .up()
        .await;
    assert_eq!(instance.product(680).await.status, 200, "both can be used");
    let asked = async || (redis.calls("hmget").await, redis.calls("evalsha").await, to_database.requests());
    let before = asked().await;
    for _ in 0..100 {
        let reply = instance.get("/").await;
        assert!(reply.status == 200 && reply.body.len() < 2000);
    }
    assert_eq!(asked().await, before);
    to_redis.set(Fault::Stall);
    to_database.set(Fault::Stall);
    let probes = async {
        for _ in 0..300 {
            assert_eq!(instance.get("/").await.status, 200);
        }
    };
    timeout(PATIENCE, probes).await.expect("none of them waits, be it for a tenth of a second");
}

async fn stopped_by(signal: &str, mut instance: Instance) -> Option<i32> {
    instance.signal(signal);
    instance.exit_code().await
}

#[tokio::test]
async fn it_stops_by_signal_and_not_with_a_code_that_would_keep_a_host_from_starting_it_again() {
    for signal in ["TERM", "INT"] {
        let code = stopped_by(signal, start().up().await).await;
        assert_eq!(code, Some(STOPPED), "a person asked for it: {signal}");
        let port = free_port();
        let hosted = start().env("FUNCTIONS_CUSTOMHANDLER_PORT", port).spawn();
        answers(port).await;
        assert_eq!(stopped_by(signal, hosted).await, Some(STOPPED_UNDER_HOST), "{signal}");
    }
}

#[tokio::test]
async fn requests_in_flight_are_answered_before_it_ends() {
    let mut instance = start().up().await;
    instance.product(680).await;
    // Half of a batch: the rest comes after the signal.
    let body = r#"{"Data":{"changes":"[]"}}"#;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
    let head = format!(
        "POST /InvalidateCache HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut go_on = [0; "HTTP/1.1 100 Continue\r\n\r\n".len()];
    timeout(PATIENCE, stream.read_exact(&mut go_on)).await.expect("the body is asked for").unwrap();
    assert!(go_on.starts_with(b"HTTP/1.1 100 ") && go_on.ends_with(b"\r\n\r\n"), "{}", go_on.escape_ascii());
    stream.write_all(&body.as_bytes()[..10]).await.unwrap();
    instance.signal("TERM");
    instance.stdout.wait_for("finishing requests").await;
    stream.write_all(&body.as_bytes()[10..]).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert_eq!(instance.exit_code().await, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once_and_what_a_drain_cuts_off_is_told() {
    use tokio::io::AsyncWriteExt;
    let redis = RedisServer::start().await;
    for (drain, told) in
        [(300, "again: requests in flight are cut off"), (1, "requests that were still in flight, if any, are cut off")]
    {
        let settings = start().env("HTTP_DRAIN_S", drain).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
        let mut instance = settings.up().await;
        redis.signal("STOP");
        let body = r#"{"Data":{"changes":[{"Item":{"ProductID":680}}]}}"#;
        let head =
            format!("POST /InvalidateCache HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {}\r\n\r\n", body.len());
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        eventually("it waits for Redis", async || {
            (instance.status().await["redis"]["expiriesQueued"] == 1).then_some(())
        })
        .await;
        instance.signal("TERM");
        instance.stdout.wait_for("finishing requests").await;
        if drain == 300 {
            instance.signal("INT");
        }
        instance.stderr.wait_for(told).await;
        instance.stderr.wait_for("Redis was not told of all that changed").await;
        assert_eq!(instance.exit_code().await, Some(0));
        redis.signal("CONT");
    }
}

/// The host has been told 200 of none of it, but others' memory is right sooner.
#[tokio::test]
async fn what_redis_is_still_to_be_told_is_told_before_it_ends() {
    let redis = RedisServer::start().await;
    let is_fresh = async || {
        let fresh = redis.command(&["HEXISTS", "{product-cache}:product:680", "f"]).await;
        fresh == redis::Value::Int(1)
    };
    for _ in 0..5 {
        let settings = start().patient().env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
        let mut instance = settings.env("INVALIDATE_BUDGET_MS", 100).up().await;
        instance.product(680).await;
        eventually("Redis has it", async || is_fresh().await.then_some(())).await;
        // The connections stay, so that all there is to wait for is the next attempt.
        redis.command(&["ACL", "SETUSER", "default", "-hdel"]).await;
        let refused = Instant::now();
        assert_eq!(instance.invalidate(&[680]).await.status, 503);
        assert!(is_fresh().await);
        instance.signal("TERM");
        instance.stdout.wait_for("finishing requests").await;
        redis.command(&["ACL", "SETUSER", "default", "+hdel"]).await;
        let took = refused.elapsed();
        assert_eq!(instance.exit_code().await, Some(STOPPED));
        if !is_fresh().await {
            return;
        }
        // The pause before the next attempt grows with the time that has passed, and the end waits for a second.
        assert!(took > Duration::from_millis(400), "not told, {took:?} after it was refused");
    }
    panic!("it took too long each time");
}

#[tokio::test]
async fn a_connection_that_is_kept_does_not_hold_up_its_end() {
    let mut instance = start().env("HTTP_DRAIN_S", 60).up().await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(b"HEAD / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n").await.unwrap();
    assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0, "an answer");
    instance.signal("TERM");
    timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("its end").unwrap();
    assert_eq!(instance.exit_code().await, Some(0)); // long before the 60 s
}

#[tokio::test]
async fn killed_and_started_again_on_the_same_port_it_serves_at_once() {
    let port = free_port();
    for _ in 0..3 {
        let mut instance = start().env("FUNCTIONS_CUSTOMHANDLER_PORT", port).spawn();
        answers(port).await;
        assert_eq!(http::send(port, "GET", "/api/GetProductById?productid=680", &[], "").await.status, 200);
        instance.signal("KILL");
        instance.exit_code().await;
    }
}

#[tokio::test]
async fn information_goes_to_stdout_line_by_line_and_only_trouble_to_stderr() {
    let port = free_port();
    let instance = start().env("FUNCTIONS_CUSTOMHANDLER_PORT", port).env("LOG_LEVEL", "debug").spawn();
    answers(port).await;
    http::send(port, "GET", "/api/GetProductById?productid=680", &[], "").await;
    instance.stdout.wait_for("ready").await;
    assert_eq!(instance.stderr.text(), "");
    // An error whose values have line breaks is still one line.
    let body = "{\n\"Data\":{}}";
    assert_eq!(http::send(port, "POST", "/InvalidateCache", &[], body).await.status, 400);
    instance.stderr.wait_for("InvalidateCache: failed").await;
    assert_eq!(instance.stderr.text().lines().count(), 1, "{}", instance.stderr.text());
    for line in instance.stdout.text().lines() {
        assert!(!line.starts_with("LanguageWorkerConsoleLog") && !line.starts_with("azfuncjsonlog:"), "{line}");
    }
}

#[tokio::test]
async fn how_its_cache_is_doing_is_a_line_in_the_log_as_long_as_it_is_asked() {
    let instance = start().env("LOG_STATUS_S", 1).up().await;
    for _ in 0..3 {
        instance.get("/api/GetProductById?productid=680,681").await;
    }
    let lines = || instance.stdout.text().lines().filter(|line| line.contains("status memory=")).count();
    let told = |name: &str| -> u64 {
        let text = instance.stdout.text();
        let numbers = text.lines().filter_map(|line| line.split(name).nth(1)?.split(' ').next()?.parse::<u64>().ok());
        numbers.sum()
    };
    eventually("all is told", async || (told(" memory=") == 4).then_some(())).await;
    assert_eq!((told(" database="), told(" loads="), told(" stale=")), (2, 1, 0), "{}", instance.stdout.text());
    assert!(told(" entries=") >= 2 && told(" bytes=") > 2_000, "{}", instance.stdout.text());
    let said = lines();
    sleep(Duration::from_millis(2_500)).await;
    assert_eq!(lines(), said, "nothing was asked: {}", instance.stdout.text());
}

#[tokio::test]
async fn a_database_that_somebody_names_is_neither_made_nor_seeded() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("crm.db");
    crate::support::sqlite(&theirs, "CREATE TABLE customer (id INTEGER PRIMARY KEY)");
    let missing = folder.path().join("missing.db");
    for file in [&theirs, &missing] {
        let port = free_port();
        let instance = start().env("HTTP_PORT", port).env("Sql", format!("sqlite:{}", file.display())).spawn();
        answers(port).await;
        let reply = http::send(port, "GET", "/api/GetProductById?productid=680", &[], "").await;
        assert_eq!(reply.status, 503, "{}", reply.text());
        instance.stderr.wait_for("the database cannot be opened yet").await;
    }
    let tables = std::process::Command::new("sqlite3").arg(&theirs).arg(".tables").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout).trim(), "customer");
    assert!(!missing.exists());
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_connection_that_opens_a_sqlite_file_is_the_one_that_is_asked() {
    let instance = start().env("FEED_INTERVAL_MS", 0).up().await;
    let connections = || instance.threads("sqlx-sqlite"); // sqlx gives each a thread
    eventually("it is open", async || (connections() > 0).then_some(())).await;
    sleep(Duration::from_millis(200)).await;
    assert_eq!(connections(), 1);
    for id in [680, 706, 707, 708, 709] {
        assert_eq!(instance.product(id).await.status, 200);
        assert_eq!(connections(), 1, "after {id}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_query_of_sqlite_that_nobody_waits_for_ends() {
    let settings = [("FEED_INTERVAL_MS", "0"), ("CACHE_HARD_TIMEOUT_MS", "200"), ("CACHE_BREAKER_FAILURES", "0")];
    let instance = settings.into_iter().fold(start(), |start, (name, value)| start.env(name, value)).up().await;
    assert_eq!(instance.product(680).await.status, 200);
    instance.drag(10_000_000_000); // an hour
    for id in [706, 707, 708, 709] {
        assert_eq!(instance.product(id).await.status, 503);
    }
    eventually("the threads end", async || (instance.threads("sqlx-sqlite") <= 1).then_some(())).await;
    instance.drag(0);
    assert_eq!(instance.product(706).await.status, 200);
}

#[cfg(unix)]
#[tokio::test]
async fn a_stop_leaves_the_database_in_one_file() {
    let mut instance = start().env("FEED_INTERVAL_MS", 0).up().await;
    assert_eq!(instance.product(680).await.status, 200);
    let log = instance.folder.join("product-cache.db-wal");
    assert!(log.exists());
    instance.signal("TERM");
    assert_eq!(instance.exit_code().await, Some(0));
    assert!(!log.exists());
}

#[tokio::test]
async fn other_peoples_variables_are_not_ours_misspelled() {
    let names = [
        "HTTP_PORTS",
        "HTTPS_PORT",
        "HTTP_HOST",
        "LOGLEVEL",
        "REDIS_URL",
        "DATABASE_URL",
        "CACHE_DIR",
        "FUNCTIONS_WORKER_RUNTIME",
    ];
    let instance = names.iter().fold(start(), |start, name| start.env(name, "x")).up().await;
    assert_eq!(instance.product(680).await.status, 200);
}

#[tokio::test]
async fn no_database_password_is_told_to_anybody() {
    for sql in [
        "postgres://user:hunter2@127.0.0.1:1/shop",
        "mysql://user:hunter2@127.0.0.1:1/shop",
        "Server=127.0.0.1,1;Database=shop;User ID=user;Password=hunter2",
    ] {
        let mut instance = start().env("Sql", sql).env("LOG_LEVEL", "trace").listening().await;
        let reply = instance.product(680).await;
        assert_eq!(reply.status, 503, "{sql}");
        instance.stderr.wait_for("the database cannot be opened yet").await;
        instance.stderr.wait_for("the change feed cannot be heard").await;
        instance.signal("TERM");
        instance.exit_code().await;
        for text in [instance.stdout.text(), instance.stderr.text(), reply.text().to_owned()] {
            assert!(!text.is_empty() && !text.contains("hunter2"), "{text}");
        }
    }
}
