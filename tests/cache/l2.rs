//! What Redis holds as L2: what a look at it costs, entries and scripts that are damaged or gone, and C8, its clock.

use std::time::Duration;

use product_cache::cache::{Level, Stale};
use tokio::time::{sleep, timeout};

use super::LOG;
use crate::support::{
    PATIENCE, PROMPT, eventually,
    node::{BUDGET, Node, Truth, key, value},
    redis::RedisServer,
};

#[tokio::test]
async fn a_new_instance_reads_redis_instead_of_the_database_and_keeps_it_no_longer_than_redis() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let old = Node::hearing(&truth, &redis.url(), &[("CACHE_DURATION_S", "60")]).await;
    old.value(1).await;
    sleep(Duration::from_millis(1200)).await; // its age is what is tested
    let new = Node::hearing(&truth, &redis.url(), &[("CACHE_DURATION_S", "300")]).await;
    let answer = new.read(1).await;
    assert_eq!(answer.how().level, Level::Redis);
    assert_eq!(truth.loads(), 1);
    assert!(answer.age() >= Duration::from_millis(1200), "{:?}", answer.age());
    assert!(answer.ttl_s() < 59, "{}", answer.ttl_s());
}

#[tokio::test]
async fn leases_that_redis_gave_too_late_for_anybody_are_given_back() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let settings = [("REDIS_POOL_SIZE", "1"), ("CACHE_LEASE_MS", "600000"), ("CACHE_LEASE_WAIT_MS", "60000")];
    let settings = [&settings[..], &PROMPT, &[("REQUEST_TIMEOUT_MS", "100000")]].concat();
    let a = Node::hearing(&truth, &redis.url(), &settings).await;
    let b = Node::hearing(&truth, &redis.url(), &settings).await;
    let keys = [key(1), key(2)];
    a.cache.get_or_load(&keys, None, &a.load).await;
    a.cache.expire(&keys, BUDGET).await.unwrap(); // so that a lease is all that is asked for
    redis.signal("STOP");
    assert_eq!(a.read(1).await.how().level, Level::Database);
    truth.fail(true);
    assert_eq!(a.read(2).await.how().stale, Some(Stale::DatabaseFailed));
    truth.fail(false);
    redis.signal("CONT");
    b.until_it_hears().await;
    for id in [1, 2] {
        timeout(PATIENCE, b.read(id)).await.expect("nobody to wait for");
    }
}

#[tokio::test]
async fn a_floor_ahead_of_redis_clock_is_lowered_so_that_what_is_loaded_counts_again() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    // An expiry of everything before Redis' clock was set back by an hour.
    let ahead = "local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
      local by, generation = string.match(last[2][2], '^%S+ %S+ %d+ (%d+) (%S+) ')
      local floor = redis.call('TIME')[1] * 1000 + 3600000
      redis.call('XADD', KEYS[1], '*', 'n', table.concat({last[1], generation, floor, by + 1, 'another', '*'}, ' '))";
    redis.command(&["EVAL", ahead, "1", LOG]).await;
    eventually("one instance's load is enough for the other", async || {
        let levels = [a.read(1).await.how().level, b.read(1).await.how().level];
        levels.contains(&Level::Redis).then_some(())
    })
    .await;
}

#[tokio::test]
async fn prefixes_keep_apps_on_one_redis_apart() {
    let redis = RedisServer::start().await;
    let truths = [Truth::new(&[(1, 10)]), Truth::new(&[(1, 20)])];
    let a = Node::hearing(&truths[0], &redis.url(), &[("REDIS_PREFIX", "a")]).await;
    let b = Node::hearing(&truths[1], &redis.url(), &[("REDIS_PREFIX", "b")]).await;
    assert_eq!((a.value(1).await, b.value(1).await), (Some(10), Some(20)));
    let mut keys: Vec<String> = redis::from_redis_value(redis.command(&["KEYS", "*"]).await).unwrap();
    keys.sort();
    assert_eq!(keys, ["{a}:log", "{a}:thing:1", "{b}:log", "{b}:thing:1"]);
    let position = b.cache.status().log_position;
    a.cache.expire_everything(BUDGET).await.unwrap();
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    sleep(Duration::from_millis(100)).await; // long enough to hear it
    assert_eq!((b.read(1).await.how().level, b.cache.status().log_position), (Level::Memory, position));
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
    // Not one per key: eighty are looked up, and forty of them filled.
    assert!(cost < 30, "{cost} reads for a lookup, a fill, and what else goes on");
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

// ---- C8: Redis' clock -------------------------------------------------------------------------------------------

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
