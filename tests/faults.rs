//! The fault table: what each fault of each dependency does to a hit, a miss, a stale entry and an expiry, and that all
//! of it passes. Statuses, bodies and deadlines are those of real processes behind real, broken connections.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use crate::support::{
    eventually,
    http::Reply,
    instance::{Instance, start},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

/// No answer may take longer, whatever Redis does: its own deadlines (250 ms per answer, a second to connect), several
/// times over, on a small machine that runs many tests at once.
const DEADLINE: Duration = Duration::from_secs(6);
/// How long an expiry may retry that is to fail; the rest of its answer's time is as above.
const BUDGET: Duration = Duration::from_millis(1000);
/// The same for one that is to succeed.
const LONG_BUDGET: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Proxy(Link, Fault),
    Killed,
    Stopped,
    Restarted,
}

/// Cells of a row: an id for each, known to the instance before the trouble but for the miss.
const HIT: i64 = 680;
const MISS: i64 = 706;
const EXPIRE: i64 = 707;

struct World {
    redis: RedisServer,
    proxy: Proxy,
    instance: Instance,
    /// Another instance, whose links are whole.
    witness: Instance,
}

impl World {
    async fn new(budget: Duration) -> Self {
        let redis = RedisServer::start().await;
        let proxy = Proxy::start(redis.port).await;
        let settings = |start: crate::support::instance::Start, redis: &str| {
            start.env("Redis", redis).env("FEED_INTERVAL_MS", 0).env("INVALIDATE_BUDGET_MS", budget.as_millis())
        };
        let instance = settings(start(), &proxy.redis_url()).up().await;
        let folder = instance.folder.clone();
        let witness = settings(start(), &redis.url()).folder(&folder).up().await;
        Self { redis, proxy, instance, witness }
    }

    async fn cause(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::Proxy(link, fault) => self.proxy.set_on(link, fault),
            Trouble::Killed => self.redis.kill(),
            Trouble::Stopped => self.redis.signal("STOP"),
            Trouble::Restarted => self.redis.restart().await,
        }
    }

    async fn heal(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::Proxy(..) => self.proxy.set(Fault::None),
            Trouble::Killed => self.redis.restart().await,
            Trouble::Stopped => self.redis.signal("CONT"),
            Trouble::Restarted => {}
        }
    }

    fn rename(&self, id: i64, name: &str) {
        self.instance.sql(&format!("UPDATE product SET Name = '{name}' WHERE ProductID = {id}"));
    }
}

async fn in_time(what: &str, reply: impl Future<Output = Reply>) -> Reply {
    within(DEADLINE, what, reply).await
}

async fn within(deadline: Duration, what: &str, reply: impl Future<Output = Reply>) -> Reply {
    timeout(deadline, reply).await.unwrap_or_else(|_| panic!("{what}: no answer in {deadline:?}"))
}

fn shows(reply: &Reply, name: &str) -> bool {
    reply.status == 200 && reply.text().contains(&format!("\"name\":\"{name}\""))
}

/// One row of the table. `told`: the status of an expiry during the trouble, if it is certain.
async fn row(trouble: Trouble, told: Option<u16>) {
    let budget = if told == Some(200) { LONG_BUDGET } else { BUDGET };
    let mut world = World::new(budget).await;
    world.rename(HIT, "hit");
    world.rename(MISS, "miss");
    for id in [HIT, EXPIRE] {
        assert_eq!(world.instance.product(id).await.status, 200);
        assert_eq!(world.witness.product(id).await.status, 200);
    }
    world.cause(trouble).await;

    let hit = in_time("hit", world.instance.product(HIT)).await;
    assert!(shows(&hit, "hit"), "{trouble:?}: {}", hit.text());
    let miss = in_time("miss", world.instance.product(MISS)).await;
    assert!(shows(&miss, "miss"), "{trouble:?}: {}", miss.text());
    let batch = in_time("batch", world.instance.get("/api/GetProductById?productid=680,708,709")).await;
    assert_eq!(batch.status, 200, "{trouble:?}");

    world.rename(EXPIRE, "expired");
    let began = Instant::now();
    let expired = within(budget + DEADLINE, "expire", world.instance.invalidate(&[EXPIRE])).await;
    match told {
        Some(status) => assert_eq!(expired.status, status, "{trouble:?}: {}", expired.text()),
        None => assert!([200, 503].contains(&expired.status), "{trouble:?}: {}", expired.text()),
    }
    if expired.status == 503 {
        assert!(began.elapsed() >= budget, "it tried for as long as it may");
        assert_eq!(expired.header("retry-after"), "5");
    }
    let after = in_time("read after expire", world.instance.product(EXPIRE)).await;
    assert!(shows(&after, "expired"), "{trouble:?}: this instance knows at once: {}", after.text());

    // The database fails as well: what is known is served, and said to be stale.
    world.instance.sql("ALTER TABLE product RENAME TO gone");
    world.instance.invalidate(&[HIT]).await;
    let stale = in_time("stale", world.instance.product(HIT)).await;
    assert!(shows(&stale, "hit") && stale.header("cache-status").contains("database-failed"), "{trouble:?}: {stale:?}");
    let unknown = in_time("unknown", world.instance.product(710)).await;
    assert_eq!((unknown.status, unknown.header("retry-after")), (503, "5"), "{trouble:?}");
    world.instance.sql("ALTER TABLE gone RENAME TO product");

    world.heal(trouble).await;
    eventually("Redis is used again", async || {
        let status = world.instance.status().await;
        (status["redis"]["connected"] == true && status["redis"]["expiriesQueued"] == 0).then_some(())
    })
    .await;
    for instance in [&world.instance, &world.witness] {
        eventually("everybody knows", async || shows(&instance.product(EXPIRE).await, "expired").then_some(())).await;
        eventually("and nothing is stale", async || {
            let reply = instance.product(HIT).await;
            (shows(&reply, "hit") && !reply.header("cache-status").contains("detail")).then_some(())
        })
        .await;
    }
    eventually("the log is heard", async || {
        let unheard = world.instance.status().await["redis"]["logUnheardSeconds"].as_f64();
        unheard.is_some_and(|seconds| seconds < 2.5).then_some(())
    })
    .await;
}

fn faults(link: Link) -> Vec<Trouble> {
    let slow = Fault::Slow(Duration::from_millis(100)); // slower than usual, faster than the deadline
    let late = Fault::Slow(Duration::from_millis(700)); // slower than the deadline
    let faults = [Fault::Refuse, Fault::Stall, slow, late, Fault::CutMidReply, Fault::Garbage];
    faults.map(|fault| Trouble::Proxy(link, fault)).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis() {
    let told = |trouble: &Trouble| match trouble {
        Trouble::Proxy(_, Fault::Slow(delay)) if delay.as_millis() < 250 => Some(200),
        _ => Some(503),
    };
    join_all(faults(Link::Every).into_iter().map(|trouble| row(trouble, told(&trouble)))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_killed_stopped_and_restarted() {
    let rows = [(Trouble::Killed, Some(503)), (Trouble::Stopped, Some(503)), (Trouble::Restarted, Some(200))];
    join_all(rows.map(|(trouble, told)| row(trouble, told))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_logs_connection_alone() {
    // Expiries go over the shared connections, so they are told all the same.
    join_all(faults(Link::Log).into_iter().map(|trouble| row(trouble, Some(200)))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_connections_but_the_logs() {
    join_all(faults(Link::NotLog).into_iter().map(|trouble| row(trouble, None))).await;
}

#[tokio::test]
async fn the_database_slow() {
    let redis = RedisServer::start().await;
    let instance = start()
        .env("Redis", redis.url())
        .env("FEED_INTERVAL_MS", 0)
        .env("CACHE_DURATION_S", 2)
        .env("CACHE_JITTER_PERCENT", 0)
        .env("CACHE_EAGER_FACTOR", 0)
        .env("CACHE_SOFT_TIMEOUT_MS", 50)
        .env("CACHE_HARD_TIMEOUT_MS", 30_000)
        .env("CACHE_LEASE_MS", 40_000)
        .patient()
        .up()
        .await;
    instance.drag(0);
    assert_eq!(instance.product(HIT).await.status, 200);
    instance.drag(1_000_000);
    assert!(instance.product(HIT).await.header("cache-status").starts_with("L1; hit"), "a hit does not care");
    let miss = instance.product(MISS).await;
    assert_eq!(miss.status, 200, "a miss waits: {}", miss.text());
    tokio::time::sleep(Duration::from_secs(2)).await; // entries grow old
    let old = instance.product(HIT).await;
    assert!(
        old.status == 200 && old.header("cache-status").contains("database-slow"),
        "{}",
        old.header("cache-status")
    );
    eventually("the load that went on is kept", async || {
        instance.product(HIT).await.header("cache-status").starts_with("L1; hit; ttl=1").then_some(())
    })
    .await;
    instance.sql("UPDATE product_rows SET Name = 'new' WHERE ProductID = 680");
    assert_eq!(instance.invalidate(&[HIT]).await.status, 200);
    let expired = instance.product(HIT).await;
    assert!(shows(&expired, "new"), "what was expired is waited for: {}", expired.header("cache-status"));
}

#[tokio::test]
async fn the_database_too_slow_to_wait_for() {
    let instance = start().env("FEED_INTERVAL_MS", 0).env("CACHE_HARD_TIMEOUT_MS", 200).up().await;
    instance.drag(0);
    assert_eq!(instance.product(HIT).await.status, 200);
    instance.drag(20_000_000);
    assert!(instance.product(HIT).await.header("cache-status").starts_with("L1; hit"), "a hit does not care");
    let miss = in_time("miss", instance.product(MISS)).await;
    assert_eq!((miss.status, miss.header("retry-after")), (503, "5"), "a miss gives up");
    assert_eq!(in_time("expire", instance.invalidate(&[HIT])).await.status, 200, "an expiry does not care");
    let stale = in_time("stale", instance.product(HIT)).await;
    assert!(stale.status == 200 && stale.header("cache-status").contains("database-failed"), "{stale:?}");
    instance.drag(0);
    eventually("it recovers", async || (instance.product(MISS).await.status == 200).then_some(())).await;
}
