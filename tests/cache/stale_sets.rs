//! C3: what was loaded before an expiry is neither kept after it, in memory or in Redis, nor shown to a reader who came
//! after it.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::poll;
use product_cache::cache::Level;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::support::{
    PATIENCE,
    node::{BUDGET, Node, Truth, ended, key, value},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

#[tokio::test]
async fn a_load_that_began_before_an_expiry_is_neither_kept_nor_shown_to_later_readers() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let early = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let late = node.begin(1);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(late).await.unwrap()), Some(11), "a reader that came after the expiry");
    truth.release();
    let early = value(&ended(early).await.unwrap());
    assert!(matches!(early, Some(10 | 11)), "a reader that came before it may see either: {early:?}");
    assert_eq!(node.value(1).await, Some(11), "what is kept");
}

#[tokio::test]
async fn a_reader_whose_load_an_expiry_overtook_does_not_wait_for_it() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let (first, second) = (node.begin(1), node.begin(1));
    truth.begun(1).await;
    sleep(Duration::from_millis(50)).await; // the second one has joined
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(second).await.unwrap()), Some(11));
    truth.release();
    assert_eq!(value(&ended(first).await.unwrap()), Some(10), "whose load began after it came");
}

#[tokio::test]
async fn what_is_expired_under_those_who_joined_a_batch_is_loaded_again_in_one_query() {
    let truth = Truth::new(&[(1, 10), (2, 20), (3, 30)]);
    let node = Node::new(&truth, None, &[]);
    let keys = [key(1), key(2), key(3)];
    truth.hold();
    let mut first = pin!(node.cache.get_or_load(&keys, None, &node.load));
    assert!(poll!(&mut first).is_pending());
    truth.begun(1).await;
    let mut joined = pin!(node.cache.get_or_load(&keys, None, &node.load));
    assert!(poll!(&mut joined).is_pending());
    truth.set(1, 11);
    truth.set(2, 21);
    node.cache.expire(&keys[..2], BUDGET).await.unwrap();
    truth.release();
    first.await.into_iter().for_each(|answer| drop(answer.unwrap()));
    let answers: Vec<_> = joined.await.iter().map(|answer| value(answer.as_ref().unwrap())).collect();
    assert_eq!((answers, truth.loads()), (vec![Some(11), Some(21), Some(30)], 2));
}

#[tokio::test]
async fn an_expiry_of_everything_overtakes_loads_too() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    truth.hold();
    let early = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    node.cache.expire_everything(BUDGET).await.unwrap();
    let late = node.begin(1);
    truth.begun(2).await;
    truth.release_only(2);
    assert_eq!(value(&ended(late).await.unwrap()), Some(11));
    truth.release();
    let _ = ended(early).await;
    assert_eq!(node.value(1).await, Some(11));
}

#[tokio::test]
async fn a_fill_is_refused_by_redis_if_another_instance_expired_the_key_meanwhile() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    // B is deaf to the log, so that only the lease can tell it.
    let proxy = Proxy::start(redis.port).await;
    let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    proxy.set_on(Link::Log, Fault::Stall);
    truth.hold();
    let early = b.begin(1);
    truth.begun(1).await;
    let joined = b.begin(1);
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let late = b.begin(1); // joins the load under way, which it must not believe
    truth.release();
    assert_eq!(value(&ended(late).await.unwrap()), Some(11), "came after the expiry");
    let _ = (ended(early).await, ended(joined).await);
    assert_eq!(b.value(1).await, Some(11), "B's memory");
    let c = Node::hearing(&truth, &redis.url(), &[]).await;
    let answer = c.read(1).await;
    assert_eq!((value(&answer), answer.how().level), (Some(11), Level::Redis), "Redis");
}

#[tokio::test]
async fn an_absent_entry_is_ended_by_an_expiry() {
    let truth = Truth::new(&[]);
    let node = Node::new(&truth, None, &[]);
    assert_eq!(node.value(1).await, None);
    assert_eq!(node.value(1).await, None);
    assert_eq!(truth.loads(), 1, "absent is remembered");
    truth.set(1, 10);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_readers_and_expiries_never_show_a_value_older_than_an_acknowledged_expiry() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 0)]);
    for redis_url in [None, Some(redis.url())] {
        let node = match &redis_url {
            Some(url) => Node::hearing(&truth, url, &[]).await,
            None => Node::new(&truth, None, &[]),
        };
        let node = Arc::new(node);
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let reads = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> = (0..8)
            .map(|_| {
                let (node, acknowledged, stop, reads) =
                    (node.clone(), acknowledged.clone(), stop.clone(), reads.clone());
                tokio::spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        let least = acknowledged.load(Ordering::SeqCst) as u64;
                        let seen = node.value(1).await.unwrap();
                        assert!(seen >= least, "saw {seen} after the expiry for {least} was acknowledged");
                        reads.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        let base = truth.0.values.lock().unwrap()[&1];
        for value in base + 1..=base + 150 {
            truth.set(1, value);
            node.cache.expire(&[key(1)], BUDGET).await.unwrap();
            acknowledged.store(value as usize, Ordering::SeqCst);
            let read = reads.load(Ordering::SeqCst);
            while reads.load(Ordering::SeqCst) == read && !readers.iter().any(JoinHandle::is_finished) {
                tokio::task::yield_now().await;
            }
        }
        stop.store(true, Ordering::SeqCst);
        for reader in readers {
            timeout(PATIENCE, reader).await.expect("ends").expect("no stale read");
        }
    }
}

#[tokio::test]
async fn what_an_expiry_overtook_is_not_said_to_be_right_since() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("REDIS_RESPONSE_TIMEOUT_MS", "5000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    truth.hold();
    let read = node.begin(1);
    truth.begun(1).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let expired = Instant::now();
    sleep(Duration::from_millis(1500)).await; // and the log is heard after that
    let known_for = expired.elapsed();
    truth.release();
    let answer = ended(read).await.unwrap();
    assert!(answer.unverified_for() >= known_for, "{:?} of {known_for:?}", answer.unverified_for());
    assert!(node.read(1).await.unverified_for() < known_for, "what is loaded now is right");
}
