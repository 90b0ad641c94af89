//! The handler on a database server: what it promises of the database's faults, of its change feed, of a stampede.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{for_every_engine, for_every_server};
use crate::scenarios::{STAMPEDE, stampede};
use crate::support::{
    database::{DatabaseServer, Engine, Session},
    eventually,
    http::Reply,
    instance::{Instance, Start, start},
    proxy::{Fault, Proxy},
    redis::RedisServer,
};

for_every_engine![
    two_instances_without_redis_agree_by_the_feed,
    a_change_that_one_instance_has_told_is_not_told_by_all,
    what_changed_while_nobody_ran_is_not_served_from_redis
];
for_every_server![every_fault_of_the_database, ten_thousand_clients_of_a_cold_key_are_one_query_to_the_database];

/// No answer may take longer: the deadlines set below, several times over, on a small machine.
const DEADLINE: Duration = Duration::from_secs(6);

/// Products that the instance knows, never hears of before, and is told have changed.
const HIT: i64 = 680;
const MISS: i64 = 706;
const STALE: i64 = 707;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Proxy(Fault),
    Killed,
    Stopped,
    Restarted,
}

pub fn on(url: &str) -> Start {
    start().env("Sql", url).env("CACHE_FAIL_SAFE_THROTTLE_S", 1)
}

pub fn shows(reply: &Reply, name: &str) -> bool {
    reply.status == 200 && reply.text().contains(&format!("\"name\":\"{name}\""))
}

async fn in_time(what: &str, reply: impl Future<Output = Reply>) -> Reply {
    timeout(DEADLINE, reply).await.unwrap_or_else(|_| panic!("{what}: no answer in {DEADLINE:?}"))
}

pub async fn rename(server: &DatabaseServer, id: i64, name: &str) {
    server.sql(&format!("UPDATE product SET Name = '{name}' WHERE ProductID = {id}")).await;
}

async fn every_fault_of_the_database(engine: Engine) {
    let harmless = Fault::Slow(Duration::from_millis(50)); // slower than usual, faster than the deadlines
    let rows = [
        (Trouble::Proxy(Fault::Refuse), false),
        (Trouble::Proxy(Fault::Stall), false),
        (Trouble::Proxy(harmless), true),
        (Trouble::Proxy(Fault::Slow(Duration::from_millis(1500))), false),
        (Trouble::Proxy(Fault::CutMidReply), false),
        (Trouble::Proxy(Fault::Garbage), false),
        (Trouble::Killed, false),
        (Trouble::Stopped, false),
        (Trouble::Restarted, true),
    ];
    for rows in rows.chunks(3) {
        join_all(rows.iter().map(|(trouble, answers)| fault(engine, *trouble, *answers))).await;
    }
}

/// One row of the fault table. `answers`: the database answers in spite of the trouble.
async fn fault(engine: Engine, trouble: Trouble, answers: bool) {
    let redis = RedisServer::start().await;
    let mut server = DatabaseServer::start(engine).await;
    let proxy = Proxy::start(server.port).await;
    for id in [HIT, MISS, STALE] {
        rename(&server, id, "old").await;
    }
    let settings = |url: &str| on(url).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
    let prompt = settings(&server.url_by(proxy.port)).env("CACHE_HARD_TIMEOUT_MS", 1000);
    let instance = prompt.env("DATABASE_CONNECT_TIMEOUT_MS", 800).env("DATABASE_MAX_CONNECTIONS", 3).up().await;
    for id in [HIT, STALE] {
        eventually("it is known", async || shows(&instance.product(id).await, "old").then_some(())).await;
    }
    rename(&server, STALE, "new").await;
    match trouble {
        Trouble::Proxy(fault) => proxy.set(fault),
        Trouble::Killed => server.kill(),
        Trouble::Stopped => server.signal("STOP"),
        Trouble::Restarted => server.restart().await,
    }

    let expire = in_time("expire", instance.invalidate(&[STALE])).await;
    assert_eq!(expire.status, 200, "{trouble:?}: an expiry does not need the database: {}", expire.text());
    let hit = in_time("hit", instance.product(HIT)).await;
    assert!(shows(&hit, "old") && hit.header("cache-status").starts_with("L1; hit"), "{trouble:?}: {hit:?}");
    let miss = in_time("miss", instance.product(MISS)).await;
    let stale = in_time("stale", instance.product(STALE)).await;
    if answers {
        assert!(shows(&miss, "old"), "{trouble:?}: {}", miss.text());
        assert!(shows(&stale, "new"), "{trouble:?}: {}", stale.header("cache-status"));
    } else {
        assert_eq!((miss.status, miss.header("retry-after")), (503, "5"), "{trouble:?}: {}", miss.text());
        assert_eq!(miss.header("content-type"), "application/problem+json", "{trouble:?}");
        assert!(shows(&stale, "old"), "{trouble:?}: {}", stale.text());
        assert!(stale.header("cache-status").contains("database-failed"), "{trouble:?}: {stale:?}");
    }
    assert_eq!(instance.get("/").await.status, 200, "{trouble:?}: the probe asks nobody");

    match trouble {
        Trouble::Proxy(_) => proxy.set(Fault::None),
        Trouble::Killed => server.restart().await,
        Trouble::Stopped => server.signal("CONT"),
        Trouble::Restarted => {}
    }
    eventually("a miss is loaded", async || shows(&instance.product(MISS).await, "old").then_some(())).await;
    eventually("nothing is stale", async || shows(&instance.product(STALE).await, "new").then_some(())).await;
    eventually("no more connections than allowed", async || (server.connections().await <= 3).then_some(())).await;
}

async fn two_instances_without_redis_agree_by_the_feed(engine: Engine) {
    let server = DatabaseServer::start(engine).await;
    let settings = |url: &str| on(url).env("FEED_INTERVAL_MS", 100);
    let instances = [settings(&server.url()).up().await, settings(&server.url()).up().await];
    let all_show = async |id: i64, name: &str| {
        for instance in &instances {
            eventually("everybody knows", async || shows(&instance.product(id).await, name).then_some(())).await;
        }
    };
    rename(&server, 680, "one").await;
    all_show(680, "one").await;
    rename(&server, 680, "two").await;
    all_show(680, "two").await;
    server.sql("DELETE FROM product WHERE ProductID = 680").await;
    for instance in &instances {
        eventually("it is gone, and remembered as gone", async || {
            let reply = instance.product(680).await;
            (reply.status == 404 && reply.header("cache-status").starts_with("L1; hit")).then_some(())
        })
        .await;
    }
}

async fn a_change_that_one_instance_has_told_is_not_told_by_all(engine: Engine) {
    const INSTANCES: usize = 4;
    const CHANGES: usize = 5;
    let (server, redis) = (DatabaseServer::start(engine).await, RedisServer::start().await);
    let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 200);
    let instances = join_all((0..INSTANCES).map(|_| settings().up())).await;
    for instance in &instances {
        let follows = async || instance.status().await["changeFeed"]["unheardSeconds"].is_number().then_some(());
        eventually("it follows the feed", follows).await;
    }
    let notices =
        async || redis::from_redis_value::<usize>(redis.command(&["XLEN", "{product-cache}:log"]).await).unwrap();
    let all_have_looked = async || sleep(Duration::from_millis(500)).await;
    all_have_looked().await;
    let before = notices().await;
    for n in 0..CHANGES {
        let name = format!("name {n}");
        rename(&server, 680, &name).await;
        all_have_looked().await;
        for instance in &instances {
            eventually("everybody knows", async || shows(&instance.product(680).await, &name).then_some(())).await;
        }
    }
    let told = notices().await - before;
    // Those that look at the same time all tell it.
    assert!((CHANGES..CHANGES * INSTANCES).contains(&told), "{CHANGES} changes were told {told} times");

    // What another server's position would be.
    redis.command(&["SET", "{product-cache}:feed", "nonsense"]).await;
    rename(&server, 680, "after that").await;
    eventually("it is told", async || (notices().await > before + told).then_some(())).await;
    let knows = async || shows(&instances[0].product(680).await, "after that").then_some(());
    eventually("it is known", knows).await;
    all_have_looked().await;
    let log = redis.command(&["XRANGE", "{product-cache}:log", "-", "+"]).await;
    let log: Vec<(String, [String; 2])> = redis::from_redis_value(log).unwrap();
    assert!(log[before..].iter().all(|(_, [_, text])| !text.ends_with(" *")), "and nothing else is: {log:?}");
}

async fn what_changed_while_nobody_ran_is_not_served_from_redis(engine: Engine) {
    let (server, redis) = (DatabaseServer::start(engine).await, RedisServer::start().await);
    let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 50);
    rename(&server, 680, "before").await;
    let mut first = settings().up().await;
    assert!(shows(&first.product(680).await, "before"));
    assert_eq!(first.product(706).await.status, 200);
    first.signal("TERM");
    first.exit_code().await;

    rename(&server, 680, "after").await;
    let second = settings().up().await;
    assert!(shows(&second.product(680).await, "after"));
    let other = second.product(706).await;
    assert!(other.header("cache-status").starts_with("L2; hit"), "the rest is still good: {other:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_not_believed_before_the_feed_has_told_what_changed_while_nobody_ran() {
    let (server, redis) = (DatabaseServer::start(Engine::Postgres).await, RedisServer::start().await);
    let settings = |url: &str| on(url).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 50);
    rename(&server, 680, "before").await;
    let mut first = settings(&server.url()).up().await;
    assert!(shows(&first.product(680).await, "before"));
    first.signal("TERM");
    first.exit_code().await;

    rename(&server, 680, "after").await;
    let proxy = Proxy::start(server.port).await;
    proxy.set(Fault::Slow(Duration::from_millis(300)));
    let second = settings(&server.url_by(proxy.port));
    let second = second.env("CACHE_HARD_TIMEOUT_MS", 9000).env("DATABASE_CONNECT_TIMEOUT_MS", 7000);
    let second = second.env("CACHE_LEASE_MS", 10000).env("REQUEST_TIMEOUT_MS", 30000).listening().await;
    eventually("it is loaded", async || {
        let reply = second.product(680).await;
        assert!(!shows(&reply, "before"), "{reply:?}");
        shows(&reply, "after").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feed_that_cannot_be_read_from_the_start_does_not_empty_memory_at_each_look() {
    let (server, redis) = (DatabaseServer::start(Engine::Postgres).await, RedisServer::start().await);
    let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 20);
    let first = settings().up().await;
    let kept = async || redis.command(&["EXISTS", "{product-cache}:feed"]).await == redis::Value::Int(1);
    eventually("it keeps its position", async || kept().await.then_some(())).await;
    drop(first);

    server.sql("REVOKE SELECT ON product_change FROM handler").await;
    let second = settings().env("CACHE_UNHEARD_MAX_S", 60).listening().await;
    second.stderr.wait_for("the change feed cannot be heard").await;
    assert_eq!(second.product(680).await.status, 200);
    for _ in 0..5 {
        sleep(Duration::from_millis(100)).await;
        let reply = second.product(680).await;
        assert!(reply.header("cache-status").starts_with("L1; hit"), "{reply:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_change_is_not_told_key_by_key_by_every_instance() {
    const INSTANCES: usize = 4;
    let (server, redis) = (DatabaseServer::start(Engine::Postgres).await, RedisServer::start().await);
    let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 200);
    let instances = join_all((0..INSTANCES).map(|_| settings().up())).await;
    for instance in &instances {
        assert_eq!(instance.product(680).await.status, 200);
    }
    let log = async || -> Vec<(String, [String; 2])> {
        redis::from_redis_value(redis.command(&["XRANGE", "{product-cache}:log", "-", "+"]).await).unwrap()
    };
    let before = log().await.len();
    let change = "INSERT INTO product_change (ProductID) SELECT n FROM generate_series(1000000, 1200000) n";
    server.sql(&format!("{change}; UPDATE product SET Name = 'after' WHERE ProductID = 680")).await;
    for instance in &instances {
        eventually("everybody knows", async || shows(&instance.product(680).await, "after").then_some(())).await;
    }
    let told: usize = log().await[before..].iter().map(|(_, [_, text])| text.split(' ').count()).sum();
    // Three full pages by each at most, and then everything.
    assert!(told <= INSTANCES * 40_000, "200,000 changes were told as {told} keys");
}

/// Keeps every load from ending before its own bound, until the session is dropped.
async fn hold_products(server: &DatabaseServer) -> Session {
    let mut session = server.session().await;
    session.sql("BEGIN; LOCK TABLE product IN ACCESS EXCLUSIVE MODE").await;
    session
}

/// Settings by which one load may take nearly as long as a whole GET.
fn with_deadline(server: &DatabaseServer, deadline_ms: u64) -> Start {
    let start = on(&server.url()).env("FEED_INTERVAL_MS", 0);
    let start = start.env("CACHE_SOFT_TIMEOUT_MS", 0).env("CACHE_BREAKER_FAILURES", 0);
    start.env("CACHE_HARD_TIMEOUT_MS", deadline_ms - 100).env("REQUEST_TIMEOUT_MS", deadline_ms)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_product_is_served_at_the_requests_deadline_though_its_second_load_goes_on() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let instance = with_deadline(&server, 3000).up().await;
    let known = instance.product(STALE).await;
    let held = hold_products(&server).await;
    assert_eq!(instance.invalidate(&[STALE]).await.status, 200);
    let loads = async || instance.status().await["loads"].as_u64().unwrap();
    let before = loads().await;
    let reader = async {
        eventually("the first load begins", async || (loads().await == before + 1).then_some(())).await;
        let change = async {
            sleep(Duration::from_millis(1500)).await; // half of the reader's time
            let told = Instant::now();
            assert_eq!(instance.invalidate(&[STALE]).await.status, 200);
            told
        };
        let answer = async { (instance.product(STALE).await, Instant::now()) };
        tokio::join!(change, answer)
    };
    // The first load is another client's: the reader, which joins it, has to ask again once it is overtaken.
    let (_, (told, (reply, answered))) = tokio::join!(instance.product(STALE), reader);
    assert_eq!((reply.status, &reply.body), (200, &known.body));
    assert!(reply.header("cache-status").contains("database-failed"), "{reply:?}");
    assert!(answered < told + Duration::from_millis(2900), "its second load may have ended before it was answered");
    instance.stderr.wait_for("a request reached its deadline").await;
    drop(held);
    let fresh = async || instance.product(STALE).await.header("cache-status").starts_with("L1; hit").then_some(());
    eventually("it is fresh again", fresh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_that_nobody_knows_is_a_503_at_the_requests_deadline_however_often_its_loads_are_overtaken() {
    let server = DatabaseServer::start(Engine::Postgres).await;
    let instance = with_deadline(&server, 1000).up().await;
    let _held = hold_products(&server).await;
    let changes = async {
        loop {
            assert_eq!(instance.invalidate(&[MISS]).await.status, 200);
            sleep(Duration::from_millis(100)).await;
        }
    };
    let reply = tokio::select! {
        // Without the deadline it would ask sixteen times, for 900 ms each.
        reply = in_time("a miss", instance.product(MISS)) => reply,
        never = changes => never,
    };
    assert_eq!((reply.status, reply.header("retry-after")), (503, "5"), "{}", reply.text());
    instance.stderr.wait_for("a request reached its deadline").await;
}

/// The position that is kept moves on with every foreign transaction; it must not pass a change that Redis was not told
/// of, for the instance may die. It once did, while the queue waited a moment after Redis had come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kept_position_waits_for_what_redis_was_not_told() {
    let (server, redis) = (DatabaseServer::start(Engine::Postgres).await, RedisServer::start().await);
    let proxy = Proxy::start(redis.port).await;
    let settings = |redis: &str| on(&server.url()).env("Redis", redis).env("FEED_INTERVAL_MS", 20);
    rename(&server, 680, "before").await;
    let first = settings(&proxy.redis_url()).up().await;
    assert!(shows(&first.product(680).await, "before"));
    let mut foreign = server.session().await;
    let others = tokio::spawn(async move {
        loop {
            foreign.sql("SELECT pg_current_xact_id()").await;
            sleep(Duration::from_millis(5)).await;
        }
    });
    let kept =
        async || redis::from_redis_value::<String>(redis.command(&["GET", "{product-cache}:feed"]).await).unwrap();
    proxy.set(Fault::Refuse);
    rename(&server, 680, "after").await;
    eventually("it is queued", async || (first.status().await["redis"]["expiriesQueued"] == 1).then_some(())).await;
    sleep(Duration::from_secs(6)).await; // long enough for the pauses between attempts to have grown
    let before = kept().await;
    proxy.set(Fault::None);
    eventually("the position moves on", async || (kept().await != before).then_some(())).await;
    first.signal("KILL");
    drop(first);
    others.abort();
    let second = settings(&redis.url()).up().await;
    let reply = second.product(680).await;
    assert!(shows(&reply, "after"), "{}", reply.header("cache-status"));
}

/// Counts the queries of products in the database, and makes each of them last a moment.
async fn count_queries(server: &DatabaseServer) {
    let script = match server.engine {
        Engine::Postgres => {
            "CREATE SEQUENCE queries; GRANT USAGE ON queries TO handler;
             ALTER TABLE product RENAME TO product_rows;
             CREATE VIEW product AS WITH counted AS MATERIALIZED (SELECT nextval('queries'), pg_sleep(0.3))
               SELECT product_rows.* FROM counted, product_rows;
             GRANT SELECT ON product TO handler"
        }
        _ => {
            "CREATE SEQUENCE queries;
             CREATE FUNCTION counted() RETURNS BIGINT NOT DETERMINISTIC SQL SECURITY DEFINER
               RETURN nextval(queries) + sleep(0.3);
             RENAME TABLE product TO product_rows;
             CREATE SQL SECURITY DEFINER VIEW product AS
               SELECT product_rows.* FROM product_rows, (SELECT counted() LIMIT 1) AS counted;
             GRANT SELECT ON product TO handler"
        }
    };
    server.sql(script).await;
}

async fn queries(server: &DatabaseServer) -> i64 {
    let next = match server.engine {
        Engine::Postgres => "SELECT nextval('queries')",
        _ => "SELECT nextval(queries)",
    };
    server.session().await.number(next).await - 1
}

async fn ten_thousand_clients_of_a_cold_key_are_one_query_to_the_database(engine: Engine) {
    for count in [1, 4] {
        let (server, redis) = (DatabaseServer::start(engine).await, RedisServer::start().await);
        count_queries(&server).await;
        let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
        // Whoever loses patience asks the database, too.
        let patient = || settings().env("REDIS_RESPONSE_TIMEOUT_MS", 5000).env("CACHE_LEASE_WAIT_MS", 20_000);
        let up = |_| patient().env("CACHE_HARD_TIMEOUT_MS", 5000).env("REQUEST_TIMEOUT_MS", 60_000).up();
        let instances: Vec<Instance> = join_all((0..count).map(up)).await;
        stampede(&instances.iter().collect::<Vec<_>>(), STAMPEDE).await;
        assert_eq!(queries(&server).await, 1, "on {count} instances");
    }
}
