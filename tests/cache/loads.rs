//! C1 and C2: concurrent readers of a cold key share one load, of their instance and of the cluster, and whatever
//! becomes of that load, its key is free again.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use product_cache::cache::{Entry, Failure, Key, Level, Load, entry::Body};
use redis::Value;
use tokio::time::{sleep, timeout};

use crate::support::{
    PATIENCE, eventually,
    node::{BUDGET, Node, Truth, ended, key, value},
    redis::RedisServer,
};

// ---- C1: one load per key and instance --------------------------------------------------------------------------

#[tokio::test]
async fn a_thousand_readers_of_a_cold_key_share_one_load() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let readers: Vec<_> = (0..1000).map(|_| node.begin(1)).collect();
    truth.begun(1).await;
    truth.release();
    for reader in readers {
        assert_eq!(value(&ended(reader).await.unwrap()), Some(10));
    }
    assert_eq!(truth.loads(), 1);
    assert_eq!(node.read(1).await.how().level, Level::Memory);
}

#[tokio::test]
async fn a_failed_load_is_shared_too_instead_of_being_repeated_by_each_waiter() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.fail(true);
    truth.hold();
    let readers: Vec<_> = (0..100).map(|_| node.begin(1)).collect();
    truth.begun(1).await;
    sleep(Duration::from_millis(50)).await; // the hundred have joined: none of them is polled later than this test is
    truth.release();
    for reader in readers {
        assert!(matches!(ended(reader).await, Err(Failure::Unavailable(_))));
    }
    assert_eq!(truth.loads(), 1);
    truth.fail(false);
    assert_eq!(node.value(1).await, Some(10), "the failure is not kept");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_neither_the_load_nor_the_others_wait() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let (first, second) = (node.begin(1), node.begin(1));
    truth.begun(1).await;
    first.abort();
    let _ = first.await;
    truth.release();
    assert_eq!(value(&ended(second).await.unwrap()), Some(10));
    assert_eq!(truth.loads(), 1);
}

#[tokio::test]
async fn a_load_that_panics_fails_its_readers_and_frees_its_key() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.0.panicking.store(true, Ordering::SeqCst);
    assert!(matches!(node.try_read(1).await, Err(Failure::Broken(_))));
    assert_eq!(node.value(1).await, Some(10));
}

#[tokio::test]
async fn a_load_that_hangs_delays_no_other_key_and_gives_its_own_back() {
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::new(&truth, None, &[("CACHE_HARD_TIMEOUT_MS", "2000")]);
    truth.hold();
    let hung = node.begin(1);
    truth.begun(1).await;
    let other = node.begin(2);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(other).await.unwrap()), Some(20), "another key is loaded");
    assert!(!hung.is_finished(), "meanwhile");
    assert!(matches!(ended(hung).await, Err(Failure::Unavailable(_))), "it gives up");
    truth.release();
    assert_eq!(node.value(1).await, Some(10), "and its key is free");
}

// ---- C2: one load per key and cluster ---------------------------------------------------------------------------

#[tokio::test]
async fn readers_of_a_cold_key_on_four_instances_share_one_load() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let mut nodes = Vec::new();
    for _ in 0..4 {
        nodes.push(Node::hearing(&truth, &redis.url(), &[]).await);
    }
    truth.hold();
    let readers: Vec<_> = (0..200).map(|n| nodes[n % 4].begin(1)).collect();
    truth.begun(1).await;
    truth.release();
    for reader in readers {
        assert_eq!(value(&ended(reader).await.unwrap()), Some(10));
    }
    assert_eq!(truth.loads(), 1);
}

/// What a holder that was killed leaves behind, for a minute.
async fn leave_lease(redis: &RedisServer, id: i64) {
    let later_ms =
        (std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() + 60_000).to_string();
    redis.command(&["HSET", &format!("{{product-cache}}:thing:{id}"), "t", "dead", "u", &later_ms, "a", "0"]).await;
}

#[tokio::test]
async fn each_key_of_a_batch_is_loaded_as_soon_as_its_own_lease_is_free() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let settings = [("CACHE_LEASE_WAIT_MS", "30000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    leave_lease(&redis, 1).await;
    leave_lease(&redis, 2).await;
    let (cache, load) = (node.cache.clone(), node.load.clone());
    let reader = tokio::spawn(async move { cache.get_or_load(&[key(1), key(2)], None, &load).await });
    sleep(Duration::from_millis(200)).await; // it waits for both
    assert_eq!(truth.loads(), 0);
    redis.command(&["DEL", "{product-cache}:thing:1"]).await;
    eventually("the first is loaded", async || (*truth.0.loads.lock().unwrap() == [[1]]).then_some(())).await;
    assert!(!reader.is_finished(), "the second is waited for");
    redis.command(&["DEL", "{product-cache}:thing:2"]).await;
    let answers = timeout(PATIENCE, reader).await.expect("the read ends").unwrap();
    assert_eq!(answers.iter().map(|answer| value(answer.as_ref().unwrap())).collect::<Vec<_>>(), [Some(10), Some(20)]);
    assert_eq!(*truth.0.loads.lock().unwrap(), [[1], [2]]);
}

#[tokio::test]
async fn waiting_for_anothers_load_does_not_send_the_stale_copy_at_each_look() {
    const SIZE: usize = 100_000;
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[("CACHE_LEASE_WAIT_MS", "1000")]).await;
    let stale = format!("{:014}{:010}{:010}{}", 1, 1, 1, "x".repeat(SIZE));
    redis.command(&["HSET", "{product-cache}:thing:1", "b", &stale]).await;
    leave_lease(&redis, 1).await;
    let sent = async || -> usize {
        let stats: String = redis::from_redis_value(redis.command(&["INFO", "stats"]).await).unwrap();
        stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:")?.parse().ok()).unwrap()
    };
    let before = sent().await;
    assert_eq!(node.value(1).await, Some(10), "nobody delivers");
    let copies = (sent().await - before) / SIZE;
    assert!((1..=2).contains(&copies), "the look before the lease was asked for, and the lease's answer: {copies}");
}

#[tokio::test]
async fn a_lease_whose_holder_died_costs_one_more_load() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    leave_lease(&redis, 1).await;
    let node = Node::hearing(&truth, &redis.url(), &[("CACHE_LEASE_WAIT_MS", "200")]).await;
    let read = timeout(PATIENCE, node.value(1)).await;
    assert_eq!(read.expect("long before the lease ends"), Some(10));
    assert_eq!(truth.loads(), 1);
    assert_eq!(node.read(1).await.how().level, Level::Memory, "it is kept here all the same");
}

#[tokio::test]
async fn a_lease_lasts_as_long_as_its_setting_says() {
    const NAME: &str = "{product-cache}:thing:1";
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_LEASE_MS", "7000")];
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    node.value(1).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap(); // an old copy stays, and with it the key, for a day
    for load in [2, 3] {
        truth.hold();
        let read = node.begin(1);
        truth.begun(load).await;
        let until: u64 = redis::from_redis_value(redis.command(&["HGET", NAME, "u"]).await).unwrap();
        let (now_s, _): (u64, u64) = redis::from_redis_value(redis.command(&["TIME"]).await).unwrap();
        let left = until.saturating_sub(now_s * 1000);
        assert!((1..=8000).contains(&left), "{left} ms");
        truth.release();
        ended(read).await.unwrap();
        redis.command(&["DEL", NAME]).await; // and then without one
        node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_not_stored_leaves_no_lease_behind() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_MAX_BODY_BYTES", "1024"), ("CACHE_LEASE_MS", "60000")];
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    let fields = async |id: i64| redis.command(&["HLEN", &format!("{{product-cache}}:thing:{id}")]).await;
    truth.fail(true);
    assert!(node.try_read(1).await.is_err());
    eventually("after a failed load", async || (fields(1).await == Value::Int(0)).then_some(())).await;
    let large: Load = Arc::new(|keys: Vec<Key>| {
        let body = Body::new(&[b'x'; 2000], None);
        Box::pin(async move { Ok(keys.into_iter().map(|key| (key, Ok(Entry::Found(body.clone())))).collect()) })
    });
    let answer = node.cache.get_or_load(&[key(2)], None, &large).await.remove(0).unwrap();
    assert!(!answer.how().stored);
    eventually("after a body that is too large", async || (fields(2).await == Value::Int(0)).then_some(())).await;
}

#[tokio::test]
async fn whoever_wants_it_younger_than_a_load_under_way_does_not_take_what_that_brings() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let first = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    let (cache, load) = (node.cache.clone(), node.load.clone());
    let young = tokio::spawn(async move { cache.get_or_load(&[key(1)], Some(Duration::ZERO), &load).await.remove(0) });
    sleep(Duration::from_millis(50)).await; // it has joined
    truth.release();
    assert_eq!(value(&ended(first).await.unwrap()), Some(10));
    assert_eq!(value(&ended(young).await.unwrap()), Some(11));
    assert_eq!(truth.loads(), 2);
}

#[tokio::test]
async fn a_lease_of_a_clock_that_went_back_is_none() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    let given = format!("{:014}{:010}", 99_999_999_999_999_u64, 0);
    redis.command(&["HSET", "{product-cache}:thing:1", "t", "another's", "u", "99999999999999", "a", &given]).await;
    node.value(1).await;
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.read(1).await.how().level, Level::Redis, "the load was stored");
}
