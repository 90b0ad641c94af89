//! What people expect of a cache of this kind, over HTTP and with real processes: the scenarios that FusionCache's own
//! tests name, and stampedes.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Mutex,
    time::{Instant, sleep},
};

use crate::support::{
    eventually,
    http::Reply,
    instance::{Instance, Start, start},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

/// Steps of SQLite's that take some tenths of a second (see [`Instance::drag`]).
const SLOW: u64 = 1_000_000;

/// Without what would make a test depend on chance or on the machine's speed.
fn quiet() -> Start {
    start()
        .env("FEED_INTERVAL_MS", 0)
        .env("CACHE_JITTER_PERCENT", 0)
        .env("CACHE_EAGER_FACTOR", 0)
        .env("CACHE_HARD_TIMEOUT_MS", 30_000)
        .env("CACHE_LEASE_MS", 40_000)
        .patient()
}

async fn beside(first: &Instance, start: Start) -> Instance {
    start.folder(&first.folder).up().await
}

async fn loads(instance: &Instance) -> u64 {
    instance.status().await["loads"].as_u64().unwrap()
}

fn status(reply: &Reply) -> &str {
    reply.header("cache-status")
}

fn name(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["name"].as_str().unwrap().to_owned()
}

fn break_database(instance: &Instance) {
    instance.sql("ALTER TABLE product RENAME TO gone");
}

fn mend_database(instance: &Instance) {
    instance.sql("ALTER TABLE gone RENAME TO product");
}

#[tokio::test]
async fn fail_safe_is_throttled_and_has_a_maximum() {
    let instance = quiet()
        .env("CACHE_DURATION_S", 1)
        .env("CACHE_FAIL_SAFE_MAX_S", 8)
        .env("CACHE_FAIL_SAFE_THROTTLE_S", 2)
        .env("CACHE_BREAKER_FAILURES", 0)
        .up()
        .await;
    instance.product(680).await;
    break_database(&instance);
    eventually("the copy is stale", async || status(&instance.product(680).await).contains("failed").then_some(()))
        .await;
    let (began, before) = (Instant::now(), loads(&instance).await);
    for _ in 0..200 {
        assert!(status(&instance.product(680).await).contains("database-failed"));
    }
    let probes = loads(&instance).await - before;
    let most = 1 + began.elapsed().as_secs() / 2; // one for each throttle's time that this took
    assert!(probes <= most, "{probes} probes for two hundred requests in {:?}", began.elapsed());
    for _ in 0..3 {
        assert_eq!(instance.product(706).await.status, 503, "there is no copy of this one");
    }
    eventually("the copy is too old", async || (instance.product(680).await.status == 503).then_some(())).await;
    mend_database(&instance);
    assert_eq!(instance.product(680).await.status, 200, "the first success ends it");
}

#[tokio::test]
async fn a_soft_timeout_serves_the_old_copy_and_what_is_loaded_behind_it_reaches_other_instances() {
    let redis = RedisServer::start().await;
    let settings = || {
        let start = quiet().env("Redis", redis.url()).env("CACHE_SOFT_TIMEOUT_MS", 20);
        start.env("CACHE_L1_DURATION_S", 1).env("CACHE_L2_DURATION_S", 300)
    };
    let first = settings().up().await;
    first.drag(0);
    first.product(680).await;
    sleep(Duration::from_millis(1100)).await; // its duration in memory ends
    redis.command(&["DEL", "{product-cache}:product:680"]).await; // and Redis makes room
    first.sql("UPDATE product_rows SET Name = 'new' WHERE ProductID = 680");
    first.drag(SLOW);
    let old = first.product(680).await;
    assert!(status(&old).contains("database-slow") && name(&old) != "new", "{}", status(&old));
    eventually("the load behind it ends", async || (name(&first.product(680).await) == "new").then_some(())).await;
    let before = loads(&first).await;
    let second = beside(&first, settings()).await;
    let shared = second.product(680).await;
    assert_eq!((name(&shared).as_str(), loads(&second).await), ("new", 0), "{}", status(&shared));
    assert_eq!(loads(&first).await, before);
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_the_load_it_began() {
    let instance = quiet().up().await;
    instance.drag(SLOW);
    let mut client = TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
    client.write_all(b"GET /api/GetProductById?productid=680 HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    eventually("the load begins", async || (loads(&instance).await == 1).then_some(())).await;
    drop(client);
    instance.product(680).await;
    assert_eq!(loads(&instance).await, 1, "the next client joins it or finds what it left");
}

#[tokio::test]
async fn after_a_restart_redis_answers_without_a_query() {
    let redis = RedisServer::start().await;
    let mut instance = quiet().env("Redis", redis.url()).up().await;
    let before = instance.product(680).await;
    instance.signal("KILL");
    instance.exit_code().await;
    let again = beside(&instance, quiet().env("Redis", redis.url())).await;
    let after = again.product(680).await;
    assert!(status(&after).starts_with("L2; hit"), "{}", status(&after));
    assert_eq!((after.body, loads(&again).await), (before.body, 0));
}

#[tokio::test]
async fn what_is_left_of_an_entrys_life_in_redis_is_not_extended_in_memory() {
    let redis = RedisServer::start().await;
    let first = quiet().env("Redis", redis.url()).env("CACHE_L2_DURATION_S", 60).up().await;
    let asked = Instant::now();
    first.product(680).await;
    let loaded = Instant::now();
    sleep(Duration::from_millis(1500)).await; // its age is what is tested
    let second = beside(&first, quiet().env("Redis", redis.url()).env("CACHE_L1_DURATION_S", 300)).await;
    let least_age = loaded.elapsed();
    for level in ["L2; hit", "L1; hit"] {
        let reply = second.product(680).await;
        let most_age = asked.elapsed() + Duration::from_secs(2); // whole seconds, and Redis' whole milliseconds
        assert!(status(&reply).starts_with(level), "{}", status(&reply));
        let ttl = status(&reply).split("ttl=").nth(1).unwrap().split([',', ';']).next().unwrap();
        let left = Duration::from_secs(ttl.parse().unwrap());
        let whole = Duration::from_secs(60);
        assert!(left + least_age <= whole && left + most_age >= whole, "{least_age:?}: {}", status(&reply));
    }
}

#[tokio::test]
async fn an_expiry_on_one_instance_keeps_the_others_copy_for_fail_safe() {
    let redis = RedisServer::start().await;
    let a = quiet().env("Redis", redis.url()).up().await;
    let b = beside(&a, quiet().env("Redis", redis.url())).await;
    a.product(680).await;
    let known = b.product(680).await;
    break_database(&a);
    assert_eq!(a.invalidate(&[680]).await.status, 200);
    for instance in [&b, &a] {
        let stale = eventually("it is stale", async || {
            let reply = instance.product(680).await;
            status(&reply).contains("database-failed").then_some(reply)
        })
        .await;
        assert_eq!(stale.body, known.body);
    }
    mend_database(&a);
}

#[tokio::test]
async fn redis_may_come_back_before_or_after_the_log_does() {
    for late in [Link::Log, Link::NotLog] {
        let redis = RedisServer::start().await;
        let a = quiet().env("Redis", redis.url()).up().await;
        let proxy = Proxy::start(redis.port).await;
        let b = beside(&a, quiet().env("Redis", proxy.redis_url())).await;
        a.product(680).await;
        b.product(680).await;
        proxy.set(Fault::Refuse);
        a.sql("UPDATE product SET Name = 'during' WHERE ProductID = 680");
        assert_eq!(a.invalidate(&[680]).await.status, 200);
        proxy.set_on(late, Fault::Refuse); // the others come back
        sleep(Duration::from_millis(600)).await; // long enough for them to do so
        proxy.set(Fault::None);
        eventually("the change shows", async || (name(&b.product(680).await) == "during").then_some(())).await;
        eventually("all is connected", async || (b.status().await["redis"]["connected"] == true).then_some(())).await;
    }
}

#[tokio::test]
async fn the_later_commit_wins_after_an_outage_whoever_was_told_of_it() {
    let mut redis = RedisServer::start().await;
    let settings = || quiet().env("Redis", redis.url()).env("INVALIDATE_BUDGET_MS", 200);
    let a = settings().up().await;
    let b = beside(&a, settings()).await;
    a.product(680).await;
    b.product(680).await;
    redis.kill();
    a.sql("UPDATE product SET Name = 'first' WHERE ProductID = 680");
    assert_eq!(a.invalidate(&[680]).await.status, 503);
    assert_eq!(name(&a.product(680).await), "first");
    a.sql("UPDATE product SET Name = 'second' WHERE ProductID = 680");
    assert_eq!(b.invalidate(&[680]).await.status, 503);
    assert_eq!(name(&b.product(680).await), "second");
    redis.restart().await;
    for instance in [&a, &b] {
        eventually("the later one", async || (name(&instance.product(680).await) == "second").then_some(())).await;
        eventually("what was queued is told", async || {
            (instance.status().await["redis"]["expiriesQueued"] == 0).then_some(())
        })
        .await;
    }
    for _ in 0..20 {
        assert_eq!(name(&a.product(680).await), "second");
        assert_eq!(name(&b.product(680).await), "second");
    }
}

/// Clients at once in a stampede. Each needs two descriptors of this process and the instances' together.
pub const STAMPEDE: usize = 10_000;
/// One stampede at a time: two would need more descriptors than a process may have in many places.
static STAMPEDES: Mutex<()> = Mutex::const_new(());

/// Sends `count` GETs of one product at once, spread over the instances, and checks every answer.
pub async fn stampede(instances: &[&Instance], count: usize) {
    let _alone = STAMPEDES.lock().await;
    let limit = rlimit::increase_nofile_limit(30_000).expect("the descriptor limit");
    let count = count.min((limit as usize).saturating_sub(1_000));
    // All connected first, so that they ask together.
    let connections =
        stream::iter((0..count).map(|n| TcpStream::connect(("127.0.0.1", instances[n % instances.len()].port))));
    let connections: Vec<_> =
        connections.buffer_unordered(256).map(|connection| connection.expect("connects")).collect().await;
    let asks = connections.into_iter().map(async |mut connection| {
        let request = b"GET /api/GetProductById?productid=680 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        connection.write_all(request).await.expect("sent");
        let mut reply = Vec::new();
        connection.read_to_end(&mut reply).await.expect("answered");
        assert!(reply.starts_with(b"HTTP/1.1 200") && reply.ends_with(b"}"), "{}", String::from_utf8_lossy(&reply));
    });
    futures_util::future::join_all(asks).await;
    println!("{count} clients at once");
}

#[tokio::test]
async fn the_loading_instance_killed_in_the_middle_costs_at_most_one_query_more() {
    let redis = RedisServer::start().await;
    let settings = || quiet().env("Redis", redis.url()).env("CACHE_LEASE_WAIT_MS", 5000);
    let mut first = settings().up().await;
    let second = beside(&first, settings()).await;
    first.drag(50_000_000); // long: it is killed before it ends
    let port = first.port;
    let doomed = tokio::spawn(async move {
        crate::support::http::try_send(port, "GET", "/api/GetProductById?productid=680", &[], "").await.is_err()
    });
    eventually("the load begins", async || (loads(&first).await == 1).then_some(())).await;
    let waiting: Vec<_> = (0..100).map(|_| second.product(680)).collect();
    let waiting = futures_util::future::join_all(waiting);
    let (replies, ()) = tokio::join!(waiting, async {
        sleep(Duration::from_millis(100)).await; // they wait for the lease
        first.signal("KILL");
        first.exit_code().await;
        crate::support::drag(&second.folder.join("product-cache.db"), 0);
    });
    assert!(doomed.await.unwrap(), "its own client gets no answer");
    assert!(replies.iter().all(|reply| reply.status == 200));
    assert_eq!(loads(&second).await, 1, "one more, for all hundred");
}

/// The resident set of a process in bytes.
fn resident(instance: &Instance) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", instance.pid())).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")).unwrap();
    kib.trim().parse::<f64>().unwrap() * 1024.0
}

/// Asks for every one of these products, a hundred at a time, in an order that differs from round to round.
async fn read_all(instance: &Instance, products: u64, round: u64) {
    for first in 0..products / 100 {
        let ids = (0..100).map(|n| (first * 100 + n) * (7919 + 2 * round) % products + 100_000);
        let ids: Vec<_> = ids.map(|id| id.to_string()).collect();
        let reply = instance.get(&format!("/api/GetProductById?productid={}", ids.join(","))).await;
        assert_eq!(reply.status, 200);
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_bound_of_memory_is_a_bound_of_the_resident_set() {
    const BOUND: u64 = 32 << 20;
    const PRODUCTS: u64 = 20_000;
    // The same work with next to no memory shows what is not the cache's.
    let settings = |bound: u64| {
        let start = quiet().env("CACHE_L1_MAX_BYTES", bound).env("CACHE_MAX_BODY_BYTES", 65_536);
        start.env("DATABASE_MAX_CONNECTIONS", 2).env("HTTP_WORKERS", 2)
    };
    let control = settings(1 << 20).up().await;
    control.sql(&format!(
        "WITH RECURSIVE n(i) AS (SELECT 100000 UNION ALL SELECT i + 1 FROM n WHERE i < {}) \
         INSERT INTO product SELECT i, 'Thing ' || i, 'N' || i, Color, StandardCost, ListPrice, Size, Weight, \
         ProductCategoryID, ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, \
         randomblob(1 + abs(random()) % 3000), 'a.gif', rowguid, ModifiedDate \
         FROM n, (SELECT * FROM product WHERE ProductID = 680)",
        100_000 + PRODUCTS - 1,
    ));
    let bounded = beside(&control, settings(BOUND)).await;
    for round in 0..2 {
        read_all(&control, PRODUCTS, round).await;
        read_all(&bounded, PRODUCTS, round).await;
        let counted = bounded.status().await["memory"]["bytes"].as_u64().unwrap();
        assert!(counted <= BOUND && counted > BOUND * 9 / 10, "{counted}");
        let growth = resident(&bounded) - resident(&control);
        println!("round {round}: {:.3} of the bound", growth / BOUND as f64);
        assert!(growth < BOUND as f64 * 1.1, "the resident set grew by {growth} for a bound of {BOUND}");
    }
}
