//! C4 and C7: an acknowledged expiry is everywhere; one that Redis cannot be told of is queued and delivered later.

use std::time::Duration;

use product_cache::cache::Level;

use super::LOG;
use crate::support::{
    eventually,
    node::{BUDGET, Node, Truth, key, value},
    redis::RedisServer,
};

// ---- C4: an acknowledged expiry is everywhere -------------------------------------------------------------------

#[tokio::test]
async fn an_acknowledged_expiry_is_in_redis_at_once_and_in_every_memory_soon() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    for id in [1, 2] {
        a.value(id).await;
        b.value(id).await;
    }
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(redis.command(&["HEXISTS", "{product-cache}:thing:1", "f"]).await, redis::Value::Int(0), "Redis");
    assert_eq!(a.value(1).await, Some(11), "the instance that was told");
    eventually("the other instance has dropped it", async || (b.value(1).await == Some(11)).then_some(())).await;
    assert_eq!(truth.loads(), 3, "the other instance reads it from Redis");
    assert_eq!(b.read(2).await.how().level, Level::Memory, "nothing else was dropped");
}

// ---- C7: an expiry is never dropped -----------------------------------------------------------------------------

#[tokio::test]
async fn an_expiry_that_redis_cannot_be_told_of_is_queued_and_delivered_when_it_can() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    a.value(1).await;
    b.value(1).await;
    redis.signal("STOP");
    truth.set(1, 11);
    assert!(a.cache.expire(&[key(1)], Duration::from_millis(300)).await.is_err(), "it says so");
    assert_eq!(a.cache.status().expiries_queued, 1);
    assert_eq!(a.value(1).await, Some(11), "here it is expired at once");
    redis.signal("CONT");
    eventually("it is delivered", async || (a.cache.status().expiries_queued == 0).then_some(())).await;
    eventually("the other instance hears it", async || (b.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn an_instance_does_not_believe_redis_about_a_key_whose_expiry_it_still_has_to_deliver() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    Node::hearing(&truth, &redis.url(), &[]).await.value(2).await; // which the first one has nothing of
    truth.set(1, 11);
    truth.set(2, 21);
    // Expiries fail from here on; reads do not, and still find the old entry fresh.
    redis.command(&["ACL", "SETUSER", "default", "-hdel"]).await;
    assert!(node.cache.expire(&[key(1), key(2)], Duration::from_millis(200)).await.is_err());
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.value(1).await, Some(10), "others cannot know");
    for (id, new) in [(1, 11), (2, 21)] {
        let answer = node.read(id).await;
        assert_eq!((value(&answer), answer.how().level), (Some(new), Level::Database));
    }
    redis.command(&["ACL", "SETUSER", "default", "+hdel"]).await;
    eventually("it is delivered", async || (node.cache.status().expiries_queued == 0).then_some(())).await;
    eventually("and heard", async || (other.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn somebody_elses_value_under_our_name_stops_no_expiry_and_no_read() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    redis.command(&["SET", "{product-cache}:thing:1", "foreign"]).await;
    let answers = node.cache.get_or_load(&[key(1), key(2)], None, &node.load).await;
    assert_eq!(answers.iter().map(|answer| value(answer.as_ref().unwrap())).collect::<Vec<_>>(), [Some(10), Some(20)]);
    node.cache.expire(&[key(1), key(2)], BUDGET).await.unwrap();
    assert_eq!(node.value(1).await, Some(10));
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    assert_eq!(other.read(1).await.how().level, Level::Redis, "the name is ours again");

    redis.command(&["DEL", LOG]).await;
    redis.command(&["SET", LOG, "foreign"]).await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.unwrap();
    eventually("it is heard again", async || (other.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_left_and_taken_back_when_it_is_a_primary_again() {
    let (redis, primary) = (RedisServer::start().await, RedisServer::start().await);
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    redis.command(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]).await;
    truth.set(1, 11);
    assert!(node.cache.expire(&[key(1)], Duration::from_millis(500)).await.is_err());
    assert_eq!(node.value(1).await, Some(11));
    eventually("it is left", async || (node.cache.status().redis_connected == Some(false)).then_some(())).await;
    redis.command(&["REPLICAOF", "NO", "ONE"]).await;
    eventually("what was queued is delivered", async || (node.cache.status().expiries_queued == 0).then_some(())).await;
    assert_eq!(node.value(1).await, Some(11));
}
