//! The cache when what it depends on is slow, fails or is scarce: S1, S2, fail-safe, timeouts, refresh, connections.

use std::{sync::Arc, time::Duration};

use product_cache::cache::{Entry, Failure, How, InRedis, Key, Level, Load, Stale, entry::Body};
use redis::Value;
use tokio::time::{Instant, sleep, timeout};

use crate::support::{
    PATIENCE, PROMPT, eventually,
    node::{BUDGET, Node, Truth, ended, entry, key, value},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

#[tokio::test]
async fn reads_are_answered_from_the_database_whatever_redis_does() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&(1..=20).map(|id| (id, id as u64)).collect::<Vec<_>>());
    let proxy = Proxy::start(redis.port).await;
    let faults = [Fault::Stall, Fault::Refuse, Fault::CutMidReply, Fault::Garbage, Fault::Slow(Duration::from_secs(2))];
    let node = Node::hearing(&truth, &proxy.redis_url(), &PROMPT).await;
    for (id, fault) in (1..).zip(faults) {
        proxy.set(fault);
        for id in [id, id + 10] {
            let answer =
                timeout(Duration::from_secs(5), node.read(id)).await.unwrap_or_else(|_| panic!("{fault:?}: late"));
            assert_eq!(value(&answer), Some(id as u64), "{fault:?}");
        }
        proxy.set(Fault::None);
        node.until_it_hears().await;
    }
}

#[tokio::test]
async fn a_stale_copy_answers_while_the_database_fails_and_is_asked_for_again_only_now_and_then() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[("CACHE_FAIL_SAFE_THROTTLE_S", "1")]);
    node.value(1).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.set(1, 11);
    truth.fail(true);
    let began = Instant::now();
    for _ in 0..100 {
        let answer = node.read(1).await;
        assert_eq!((value(&answer), answer.how().stale), (Some(10), Some(Stale::DatabaseFailed)));
        assert!(answer.ttl_s() <= 0);
    }
    let most = 2 + began.elapsed().as_secs() as usize;
    assert!(truth.loads() <= 1 + most, "{} loads", truth.loads());
    assert!(node.try_read(2).await.is_err(), "what was never known cannot be served");
    let (young, loads) = (Some(Duration::ZERO), truth.loads());
    let asked = node.cache.get_or_load(&[key(1)], young, &node.load).await.remove(0).unwrap();
    assert_eq!((value(&asked), asked.how().stale), (Some(10), Some(Stale::DatabaseFailed)));
    assert_eq!(truth.loads(), loads + 1, "who wants a young entry has it asked for");
    truth.fail(false);
    eventually("the first success ends it", async || (node.value(1).await == Some(11)).then_some(())).await;
    assert_eq!(node.read(1).await.how().stale, None);
}

#[tokio::test]
async fn a_stale_copy_in_redis_saves_an_instance_that_never_had_one() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let old = Node::hearing(&truth, &redis.url(), &[]).await;
    old.value(1).await;
    old.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.fail(true);
    let new = Node::hearing(&truth, &redis.url(), &[]).await;
    let answer = new.read(1).await;
    assert_eq!((value(&answer), answer.how().stale), (Some(10), Some(Stale::DatabaseFailed)));
    let left_ms = async |id: i64| redis.command(&["PTTL", &format!("{{product-cache}}:thing:{id}")]).await;
    let Value::Int(left) = left_ms(1).await else { panic!("no time") };
    assert!(left > 3_600_000, "the lease of a load that failed has not shortened the copy's time: {left} ms");
    assert!(new.try_read(2).await.is_err());
    let left = left_ms(2).await; // the lease is given back, or lasts no longer than it may
    assert!(matches!(left, Value::Int(-2 | 1..=10_000)), "{left:?}");
}

#[tokio::test]
async fn entries_loaded_together_do_not_end_together() {
    let truth = Truth::new(&(1..=100).map(|id| (id, 1)).collect::<Vec<_>>());
    let node = Node::new(&truth, None, &[("CACHE_JITTER_PERCENT", "50")]);
    let mut left_s = Vec::new();
    for id in 1..=100 {
        left_s.push(node.read(id).await.ttl_s());
    }
    let (first, last) = (left_s.iter().min().unwrap(), left_s.iter().max().unwrap());
    assert!((100..=200).contains(first) && (250..=300).contains(last), "from {first} s to {last} s");
}

#[tokio::test]
async fn that_something_is_absent_is_said_for_its_own_time_and_never_stale() {
    let redis = RedisServer::start().await;
    for redis_url in [None, Some(redis.url())] {
        let truth = Truth::new(&[]);
        let settings = [("CACHE_ABSENT_DURATION_S", "1")];
        let began = Instant::now();
        let nodes = [(); 2].map(|()| Node::new(&truth, redis_url.as_deref(), &settings));
        if redis_url.is_some() {
            nodes[0].until_it_has_heard_since(began).await;
            nodes[1].until_it_has_heard_since(began).await;
        }
        assert_eq!(nodes[0].value(1).await, None);
        sleep(Duration::from_millis(1100)).await;
        truth.fail(true);
        for node in &nodes {
            assert!(node.try_read(1).await.is_err(), "nobody can tell any more");
        }
        truth.fail(false);
        truth.set(1, 10);
        for node in &nodes {
            eventually("it is found", async || {
                (node.try_read(1).await.ok().and_then(|a| value(&a)) == Some(10)).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_load_that_fails_after_an_expiry_keeps_nobody_from_trying_at_once() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[]);
    node.value(1).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.hold();
    let read = node.begin(1);
    truth.begun(2).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.fail(true);
    truth.release();
    let _ = ended(read).await;
    truth.fail(false);
    truth.set(1, 11);
    let loads = truth.loads();
    assert_eq!(node.value(1).await, Some(11), "after {loads} loads");
}

#[tokio::test]
async fn a_failed_load_of_what_is_fresh_leaves_it_fresh() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(node.read(1).await.how().level, Level::Redis);
    truth.fail(true);
    for _ in 0..5 {
        let asked = node.cache.get_or_load(&[key(1)], Some(Duration::ZERO), &node.load).await.remove(0).unwrap();
        assert_eq!((value(&asked), asked.how().stale), (Some(10), Some(Stale::DatabaseFailed)));
        let answer = node.read(1).await;
        assert_eq!((value(&answer), answer.how().level, answer.how().stale), (Some(10), Level::Memory, None));
        assert!(answer.ttl_s() > 0);
    }
}

#[tokio::test]
async fn a_failed_load_for_who_wants_a_younger_one_leaves_what_redis_holds_fresh() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    truth.fail(true);
    let asked = node.cache.get_or_load(&[key(1)], Some(Duration::ZERO), &node.load).await.remove(0).unwrap();
    assert_eq!((value(&asked), asked.how().stale), (Some(10), Some(Stale::DatabaseFailed)));
    let answer = node.read(1).await;
    assert_eq!((value(&answer), answer.how().stale), (Some(10), None), "for all others");
    assert!(answer.ttl_s() > 0);
}

#[tokio::test]
async fn a_slow_load_for_who_wants_a_younger_one_leaves_what_redis_holds_fresh() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let node = Node::hearing(&truth, &redis.url(), &[("CACHE_SOFT_TIMEOUT_MS", "100")]).await;
    truth.hold();
    let (cache, load) = (node.cache.clone(), node.load.clone());
    let young = tokio::spawn(async move { cache.get_or_load(&[key(1)], Some(Duration::ZERO), &load).await.remove(0) });
    truth.begun(2).await;
    let answer = timeout(PATIENCE, node.read(1)).await.expect("it does not wait for that load");
    assert_eq!((value(&answer), answer.how().stale), (Some(10), None));
    assert_eq!(node.read(1).await.how(), How::MEMORY);
    truth.release();
    assert_eq!(young.await.unwrap().unwrap().how().level, Level::Database);
}

#[tokio::test]
async fn a_failed_load_does_not_bring_back_what_is_known_to_be_gone() {
    const NAME: &str = "{product-cache}:thing:1";
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    redis.command(&["RENAME", NAME, "kept"]).await;
    let without = Truth::new(&[]);
    let node = Node::hearing(&without, &redis.url(), &[]).await;
    assert_eq!(node.value(1).await, None);
    // As if Redis had not been told: it holds the product, which merely grew old.
    redis.command(&["RENAME", "kept", NAME]).await;
    redis.command(&["HSET", NAME, "f", "1"]).await;
    without.fail(true);
    let asked = node.cache.get_or_load(&[key(1)], Some(Duration::ZERO), &node.load).await.remove(0);
    assert!(asked.is_err(), "{asked:?}");
    let answer = node.read(1).await;
    assert_eq!((value(&answer), answer.how()), (None, How::MEMORY));
}

#[tokio::test]
async fn fail_safe_ends_at_its_maximum_age() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[("CACHE_FAIL_SAFE_MAX_S", "1"), ("CACHE_DURATION_S", "1")]);
    node.value(1).await;
    truth.fail(true);
    eventually("the copy is too old", async || node.try_read(1).await.err()).await;
}

#[tokio::test]
async fn fail_safe_can_be_off() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[("CACHE_FAIL_SAFE_MAX_S", "0")]);
    node.value(1).await;
    truth.fail(true);
    assert_eq!(node.value(1).await, Some(10), "what is fresh is no stale copy");
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert!(node.try_read(1).await.is_err(), "and what is expired is never served");
}

#[tokio::test]
async fn memory_stays_within_its_bytes_and_large_bodies_stay_out() {
    let truth = Truth::new(&[]);
    let node = Node::new(&truth, None, &[("CACHE_L1_MAX_BYTES", "1048576"), ("CACHE_MAX_BODY_BYTES", "65536")]);
    let load: Load = Arc::new(|keys: Vec<Key>| {
        Box::pin(async move {
            let body = |key: &Key| vec![b'x'; if key.id() == 0 { 65_600 } else { (key.id() % 40) as usize * 1000 }];
            Ok(keys.iter().map(|key| (*key, Ok(Entry::Found(Body::new(body(key).as_ref(), None))))).collect())
        })
    });
    let large = node.cache.get_or_load(&[key(0)], None, &load).await.remove(0).unwrap();
    assert!(!large.how().stored, "too large to keep");
    assert_eq!(node.cache.status().entries, 0);
    for id in 1..500 {
        node.cache.get_or_load(&[key(id)], None, &load).await.remove(0).unwrap();
        assert!(node.cache.status().bytes <= 1_048_576);
    }
    assert!(node.cache.status().bytes > 700_000, "and makes use of them: {}", node.cache.status().bytes);
}

#[tokio::test]
async fn connections_are_as_many_as_the_settings_say_and_come_back_as_many() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&(1..=200).map(|id| (id, 0)).collect::<Vec<_>>());
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    eventually("two and the log's", async || (redis.clients().await == 3).then_some(())).await;
    let reads: Vec<_> = (1..=200).map(|id| node.begin(id)).collect();
    for read in reads {
        ended(read).await.unwrap();
    }
    assert_eq!(redis.clients().await, 3, "under load");
    redis.command(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    eventually("as many as before", async || (redis.clients().await == 3).then_some(())).await;
    let _more = Node::hearing(&truth, &redis.url(), &[("REDIS_POOL_SIZE", "4")]).await;
    eventually("four and the log's", async || (redis.clients().await == 3 + 5).then_some(())).await;
}

/// Three commands that were caught in one pause counted as three answers missing in a row.
#[tokio::test]
async fn one_pause_of_redis_costs_no_connection_however_many_commands_it_holds_up() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&(1..=20).map(|id| (id, 1)).collect::<Vec<_>>());
    let proxy = Proxy::start(redis.port).await;
    let node = Node::hearing(&truth, &proxy.redis_url(), &[("REDIS_POOL_SIZE", "1")]).await;
    let ids = async || {
        let list: String = redis::from_redis_value(redis.command(&["CLIENT", "LIST"]).await).unwrap();
        let handlers = list.lines().filter(|line| !line.contains("cmd=client|list"));
        handlers.map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = ids().await;
    assert_eq!(before.len(), 2);
    for id in [1, 11] {
        proxy.set_on(Link::NotLog, Fault::Stall);
        let reads: Vec<_> = (id..id + 10).map(|id| node.begin(id)).collect();
        for read in reads {
            assert_eq!(ended(read).await.unwrap().how().level, Level::Database);
        }
        proxy.set(Fault::None);
        eventually("Redis is used", async || {
            node.cache.expire(&[key(id)], BUDGET).await.unwrap();
            (node.read(id).await.how().redis != InRedis::Unknown).then_some(())
        })
        .await;
    }
    assert_eq!(ids().await, before);
}

// ---- soft timeout -----------------------------------------------------------------------------------------------

#[tokio::test]
async fn an_entry_that_merely_grew_old_is_served_after_the_soft_timeout_and_the_load_goes_on_for_everybody() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    // What is loaded stays in Redis until another instance has asked for it.
    let durations = [("CACHE_L1_DURATION_S", "1"), ("CACHE_L2_DURATION_S", "300")];
    let settings = [&durations[..], &[("CACHE_SOFT_TIMEOUT_MS", "100"), ("CACHE_EAGER_FACTOR", "0")]].concat();
    let node = Node::hearing(&truth, &redis.url(), &settings).await;
    node.value(1).await;
    truth.set(1, 11);
    sleep(Duration::from_millis(1100)).await; // its duration in memory ends
    redis.command(&["DEL", "{product-cache}:thing:1"]).await; // and Redis makes room
    truth.hold();
    let answer = timeout(PATIENCE, node.read(1)).await.expect("no longer than the soft timeout");
    assert_eq!((value(&answer), answer.how().stale), (Some(10), Some(Stale::DatabaseSlow)));
    let again = node.read(1).await;
    assert_eq!(again.how().stale, Some(Stale::DatabaseSlow), "later readers get it at once");
    assert_eq!(truth.loads(), 2, "and begin nothing");
    assert!(node.cache.get(&key(1), Some(Duration::ZERO), &node.load).is_none(), "unless they want it young");
    truth.release();
    eventually("the load that went on is kept", async || (node.value(1).await == Some(11)).then_some(())).await;
    let other = Node::hearing(&truth, &redis.url(), &settings).await;
    assert_eq!(value(&other.read(1).await), Some(11));
    assert_eq!(truth.loads(), 2, "one load, for this instance and the other");
}

#[tokio::test]
async fn the_soft_timeout_can_be_off() {
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_DURATION_S", "1"), ("CACHE_SOFT_TIMEOUT_MS", "0"), ("CACHE_EAGER_FACTOR", "0")];
    let node = Node::new(&truth, None, &settings);
    node.value(1).await;
    truth.set(1, 11);
    sleep(Duration::from_millis(1100)).await; // its duration ends
    truth.hold();
    let reader = node.begin(1);
    truth.begun(2).await;
    sleep(Duration::from_secs(1)).await; // twice the default
    assert!(!reader.is_finished(), "it waits for its load, however slow");
    truth.release();
    let answer = ended(reader).await.unwrap();
    assert_eq!((value(&answer), answer.how().stale), (Some(11), None));
}

#[tokio::test]
async fn an_old_copy_in_redis_serves_an_instance_that_has_none() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_DURATION_S", "1"), ("CACHE_SOFT_TIMEOUT_MS", "100"), ("CACHE_EAGER_FACTOR", "0")];
    Node::hearing(&truth, &redis.url(), &settings).await.value(1).await;
    sleep(Duration::from_millis(1100)).await; // its duration ends
    let new = Node::hearing(&truth, &redis.url(), &settings).await;
    truth.hold();
    let answer = timeout(PATIENCE, new.read(1)).await.expect("no longer than the soft timeout");
    assert_eq!((value(&answer), answer.how().stale), (Some(10), Some(Stale::DatabaseSlow)));
}

#[tokio::test]
async fn an_entry_that_was_expired_is_never_served_because_the_database_is_slow() {
    let redis = RedisServer::start().await;
    for redis_url in [None, Some(redis.url())] {
        let truth = Truth::new(&[(1, 10)]);
        let settings = [("CACHE_SOFT_TIMEOUT_MS", "50")];
        let node = match &redis_url {
            Some(url) => Node::hearing(&truth, url, &settings).await,
            None => Node::new(&truth, None, &settings),
        };
        node.value(1).await;
        truth.set(1, 11);
        node.cache.expire(&[key(1)], BUDGET).await.unwrap();
        truth.hold();
        let reader = node.begin(1);
        truth.begun(2).await;
        sleep(Duration::from_millis(200)).await; // four soft timeouts
        assert!(!reader.is_finished());
        truth.release();
        assert_eq!(value(&ended(reader).await.unwrap()), Some(11));
    }
}

#[tokio::test]
async fn an_expiry_of_everything_ends_the_time_in_which_an_old_entry_is_served_for_slowness_or_failure() {
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_DURATION_S", "1"), ("CACHE_SOFT_TIMEOUT_MS", "50"), ("CACHE_EAGER_FACTOR", "0")];
    let node = Node::new(&truth, None, &settings);
    node.value(1).await;
    sleep(Duration::from_millis(1100)).await; // its duration ends
    truth.hold();
    assert_eq!(node.read(1).await.how().stale, Some(Stale::DatabaseSlow));
    truth.set(1, 11);
    node.cache.expire_everything(BUDGET).await.unwrap();
    let reader = node.begin(1);
    truth.begun(3).await;
    truth.release();
    assert_eq!(value(&ended(reader).await.unwrap()), Some(11));

    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    truth.set(1, 12);
    truth.fail(true);
    assert_eq!(node.read(1).await.how().stale, Some(Stale::DatabaseFailed));
    truth.fail(false);
    assert_eq!(node.value(1).await, Some(11), "the database is left alone");
    node.cache.expire_everything(BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(12));
}

// ---- eager refresh ----------------------------------------------------------------------------------------------

/// The first load of all takes this long, which decides when its entry is refreshed.
async fn load_slowly(truth: &Truth, node: &Node, time: Duration) {
    truth.hold();
    let first = node.begin(1);
    truth.begun(1).await;
    sleep(time).await;
    truth.release();
    ended(first).await.unwrap();
}

#[tokio::test]
async fn a_hot_entry_is_loaded_anew_before_it_ends_once_per_cluster_and_nobody_waits() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    // Loads take half a second and entries last twenty, so a refresh is likely from the first read on.
    let settings = [("CACHE_DURATION_S", "20"), ("CACHE_EAGER_FACTOR", "100")];
    let a = Node::hearing(&truth, &redis.url(), &settings).await;
    let b = Node::hearing(&truth, &redis.url(), &settings).await;
    load_slowly(&truth, &a, Duration::from_millis(500)).await;
    assert_eq!(b.read(1).await.how().level, Level::Redis);
    sleep(Duration::from_millis(200)).await; // its age passes the slack
    truth.hold();
    truth.set(1, 11);
    let hot = async || {
        for node in [&a, &b] {
            let answer = timeout(Duration::from_millis(400), node.read(1)).await.expect("nobody waits");
            assert_eq!((answer.how().level, answer.how().stale), (Level::Memory, None));
        }
    };
    eventually("a refresh begins", async || {
        hot().await;
        (truth.loads() == 2).then_some(())
    })
    .await;
    for _ in 0..100 {
        hot().await;
    }
    assert_eq!(truth.loads(), 2, "one for both instances");
    truth.release();
    for node in [&a, &b] {
        eventually("it arrives", async || (node.value(1).await == Some(11)).then_some(())).await;
    }
}

#[tokio::test]
async fn a_refresh_overtaken_by_an_expiry_is_not_kept() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[("CACHE_DURATION_S", "2"), ("CACHE_EAGER_FACTOR", "1000")]);
    load_slowly(&truth, &node, Duration::from_millis(300)).await;
    truth.hold();
    eventually("a refresh begins", async || {
        node.value(1).await;
        (truth.loads() == 2).then_some(())
    })
    .await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    let late = node.begin(1);
    truth.begun(3).await;
    truth.release_only(3);
    assert_eq!(value(&ended(late).await.unwrap()), Some(11));
    truth.release();
    sleep(Duration::from_millis(50)).await; // the overtaken refresh lands
    assert_eq!(node.value(1).await, Some(11));
}

#[tokio::test]
async fn a_refresh_that_fails_is_not_tried_again_by_each_reader() {
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::new(&truth, None, &[("CACHE_DURATION_S", "20"), ("CACHE_EAGER_FACTOR", "1000")]);
    load_slowly(&truth, &node, Duration::from_millis(100)).await;
    truth.fail(true);
    eventually("a refresh begins", async || {
        node.value(1).await;
        (truth.loads() == 2).then_some(())
    })
    .await;
    sleep(Duration::from_millis(100)).await; // it fails
    for _ in 0..100 {
        let answer = node.read(1).await;
        assert_eq!((value(&answer), answer.how().level, answer.how().stale), (Some(10), Level::Memory, None));
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(truth.loads(), 2, "not for as long as a failed load rests");
}

#[tokio::test]
async fn eager_refresh_can_be_off_and_entries_far_from_their_end_never_cause_one() {
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_EAGER_FACTOR", "0"), ("CACHE_DURATION_S", "5"), ("CACHE_SOFT_TIMEOUT_MS", "0")];
    let node = Node::new(&truth, None, &settings);
    // With the default factor, every other read would begin a refresh from the first one on.
    load_slowly(&truth, &node, Duration::from_secs(2)).await;
    for _ in 0..100 {
        node.value(1).await;
        sleep(Duration::from_millis(1)).await; // a refresh would begin meanwhile
    }
    assert_eq!(truth.loads(), 1, "off");
    let node = Node::new(&truth, None, &[]);
    for _ in 0..1000 {
        node.value(1).await;
    }
    assert_eq!(truth.loads(), 2, "loaded in no time, and fresh for minutes");
}

// ---- the gate before the database -------------------------------------------------------------------------------

#[tokio::test]
async fn at_full_load_without_redis_the_database_gets_no_more_loads_at_once_than_it_is_allowed() {
    let truth = Truth::new(&(1..=100).map(|id| (id, 1)).collect::<Vec<_>>());
    let node = Node::new(&truth, None, &[("CACHE_LOADS_MAX", "4"), ("CACHE_LOADS_QUEUED_MAX", "20")]);
    truth.hold();
    let readers: Vec<_> = (1..=100).map(|id| node.begin(id)).collect();
    truth.begun(4).await;
    eventually("what neither runs nor waits is refused", async || {
        (readers.iter().filter(|reader| reader.is_finished()).count() == 76).then_some(())
    })
    .await;
    assert_eq!(truth.loads(), 4);
    truth.release();
    let mut refused = 0;
    for reader in readers {
        refused += usize::from(ended(reader).await.is_err());
    }
    assert_eq!((refused, truth.loads()), (76, 24));
}

#[tokio::test]
async fn a_database_that_is_down_costs_a_few_loads_however_many_keys_are_asked_for() {
    let truth = Truth::new(&(1..=500).map(|id| (id, 1)).collect::<Vec<_>>());
    let node = Node::new(&truth, None, &[("CACHE_BREAKER_FAILURES", "5"), ("CACHE_BREAKER_PAUSE_MS", "60000")]);
    truth.fail(true);
    for id in 1..=500 {
        assert!(node.try_read(id).await.is_err());
    }
    assert_eq!(truth.loads(), 5);
    assert!(node.cache.status().breaker_open);
}

#[tokio::test]
async fn the_first_probe_that_succeeds_opens_the_database_to_all() {
    let truth = Truth::new(&(1..=500).map(|id| (id, 1)).collect::<Vec<_>>());
    let node = Node::new(&truth, None, &[("CACHE_BREAKER_FAILURES", "2"), ("CACHE_BREAKER_PAUSE_MS", "50")]);
    truth.fail(true);
    for id in 1..=10 {
        assert!(node.try_read(id).await.is_err());
    }
    truth.fail(false);
    eventually("a probe succeeds", async || node.try_read(1).await.ok()).await;
    for id in 2..=500 {
        assert_eq!(node.value(id).await, Some(1));
    }
}

#[tokio::test]
async fn an_entry_that_cannot_be_told_fails_alone_and_not_as_the_databases_failure() {
    let truth = Truth::new(&[]);
    let node = Node::new(&truth, None, &[("CACHE_BREAKER_FAILURES", "1")]);
    let load: Load = Arc::new(|keys: Vec<Key>| {
        Box::pin(async move {
            let told = |key: &Key| match key.id() {
                2 => Err(Failure::Unavailable("damaged".to_owned())),
                id => Ok(entry(id as u64)),
            };
            Ok(keys.iter().map(|key| (*key, told(key))).collect())
        })
    });
    let answers = node.cache.get_or_load(&[key(1), key(2), key(3)], None, &load).await;
    assert_eq!(
        answers.iter().map(|answer| answer.as_ref().ok().and_then(value)).collect::<Vec<_>>(),
        [Some(1), None, Some(3)]
    );
    assert!(!node.cache.status().breaker_open);
}

// ---- scarce connections -----------------------------------------------------------------------------------------

#[tokio::test]
async fn a_frugal_instance_has_one_connection_and_hears_what_others_expire() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let frugal = [("REDIS_FRUGAL", "on"), ("REDIS_FRUGAL_POLL_MS", "50")];
    let a = Node::hearing(&truth, &redis.url(), &frugal).await;
    let b = Node::hearing(&truth, &redis.url(), &frugal).await;
    assert_eq!(redis.clients().await, 2, "one each");
    for round in 11..20 {
        a.value(1).await;
        b.value(1).await;
        truth.set(1, round);
        a.cache.expire(&[key(1)], BUDGET).await.unwrap();
        eventually("the other hears it", async || (b.value(1).await == Some(round)).then_some(())).await;
    }
    assert_eq!(redis.clients().await, 2);
}

#[tokio::test]
async fn two_hundred_instances_live_on_a_redis_that_allows_250_connections() {
    let redis = RedisServer::start_with(&["--maxclients", "250"]).await;
    let truth = Truth::new(&(1..=50).map(|id| (id, 0)).collect::<Vec<_>>());
    let settings = [
        ("REDIS_FRUGAL", "on"),
        ("REDIS_FRUGAL_POLL_MS", "1000"),
        ("REDIS_RESPONSE_TIMEOUT_MS", "5000"),
        ("REDIS_CONNECT_TIMEOUT_MS", "10000"),
        ("REQUEST_TIMEOUT_MS", "60000"),
    ];
    let began = Instant::now();
    let nodes: Vec<_> = (0..200).map(|_| Arc::new(Node::new(&truth, Some(&redis.url()), &settings))).collect();
    for node in &nodes {
        node.until_it_has_heard_since(began).await;
    }
    assert_eq!(redis.clients().await, 200);
    let mut tasks = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let node = node.clone();
        tasks.push(tokio::spawn(async move {
            for round in 0..20 {
                let id = (index + round) as i64 % 50 + 1;
                node.read(id).await;
                if index % 40 == round {
                    node.cache.expire(&[key(id)], BUDGET).await.unwrap();
                }
            }
        }));
    }
    for task in tasks {
        timeout(PATIENCE, task).await.expect("ends").expect("without an error");
    }
    assert_eq!(redis.clients().await, 200, "as many as before");
    let info: String = redis::from_redis_value(redis.command(&["INFO", "stats"]).await).unwrap();
    assert!(info.contains("rejected_connections:0"), "{info}");
    assert!(nodes.iter().all(|node| node.cache.status().redis_connected == Some(true)));
}
