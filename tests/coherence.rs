//! Several instances as processes: what one is told, all of them show.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
#[cfg(target_os = "linux")]
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{
    eventually, http,
    instance::{Instance, start},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

async fn name(instance: &Instance, id: i64) -> String {
    let reply = instance.product(id).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["name"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_edit_of_the_file_shows_in_every_instance_on_it_without_redis_or_trigger() {
    let first = start().up().await;
    let second = start().folder(&first.folder).up().await;
    for instance in [&first, &second] {
        assert_ne!(name(instance, 680).await, "edited");
        assert_eq!(instance.product(999).await.status, 404);
    }
    first.sql(
        "UPDATE product SET Name = 'edited' WHERE ProductID = 680; DELETE FROM product WHERE ProductID = 706; \
         INSERT INTO product SELECT 999, 'inserted', ProductNumber, Color, StandardCost, ListPrice, Size, Weight, \
         ProductCategoryID, ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, ThumbNailPhoto, \
         ThumbnailPhotoFileName, rowguid, ModifiedDate FROM product WHERE ProductID = 680",
    );
    for instance in [&first, &second] {
        eventually("the update", async || (name(instance, 680).await == "edited").then_some(())).await;
        eventually("the delete", async || (instance.product(706).await.status == 404).then_some(())).await;
        eventually("the insert", async || (instance.product(999).await.status == 200).then_some(())).await;
        assert!(instance.product(707).await.status == 200);
    }
}

#[tokio::test]
async fn a_batch_delivered_to_one_instance_shows_in_all_of_them() {
    let redis = RedisServer::start().await;
    let settings = || start().patient().env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
    let mut instances = vec![settings().up().await];
    for _ in 0..3 {
        let folder = instances[0].folder.clone();
        instances.push(settings().folder(&folder).up().await);
    }
    for round in 0..5 {
        for instance in &instances {
            name(instance, 680).await;
            assert!(instance.product(680).await.header("cache-status").starts_with("L1; hit"));
        }
        let new = format!("round {round}");
        instances[0].sql(&format!("UPDATE product SET Name = '{new}' WHERE ProductID = 680"));
        let told = &instances[round % instances.len()];
        assert_eq!(told.invalidate(&[680]).await.status, 200);
        assert_eq!(name(told, 680).await, new, "the one that was told, at once");
        for instance in &instances {
            eventually("every other", async || (name(instance, 680).await == new).then_some(())).await;
        }
    }
}

#[tokio::test]
async fn without_redis_and_feed_only_the_instance_that_is_told_knows_and_says_so() {
    let instance = start().env("FEED_INTERVAL_MS", 0).up().await;
    name(&instance, 680).await;
    instance.sql("UPDATE product SET Name = 'new' WHERE ProductID = 680");
    assert_ne!(name(&instance, 680).await, "new");
    assert_eq!(instance.invalidate(&[680]).await.status, 200);
    assert_eq!(name(&instance, 680).await, "new");
    assert!(instance.status().await["changeFeed"].is_null());
}

#[tokio::test]
async fn a_pruned_feed_makes_everything_stale() {
    let instance = start().env("FEED_INTERVAL_MS", 300).up().await;
    name(&instance, 680).await;
    instance.signal("STOP");
    instance.sql(
        "UPDATE product SET Name = 'new' WHERE ProductID IN (680, 706); UPDATE product SET Name = 'newer' WHERE ProductID = 706; \
         DELETE FROM product_change WHERE ProductID = 680",
    );
    instance.signal("CONT");
    eventually("the pruned change shows", async || (name(&instance, 680).await == "new").then_some(())).await;
    instance.stderr.wait_for("the change feed was pruned or replaced").await;
}

#[tokio::test]
async fn a_thousand_requests_for_a_cold_product_on_two_instances_are_one_query() {
    let redis = RedisServer::start().await;
    // Whoever loses patience asks the database, too.
    let patient = || {
        let start = start().env("Redis", redis.url()).env("REDIS_RESPONSE_TIMEOUT_MS", 5000);
        start.env("CACHE_LEASE_WAIT_MS", 20_000).env("REQUEST_TIMEOUT_MS", 100_000)
    };
    let first = patient().up().await;
    let second = patient().folder(&first.folder).up().await;
    let requests = (0..1000).map(|n| {
        let port = if n % 2 == 0 { first.port } else { second.port };
        http::send(port, "GET", "/api/GetProductById?productid=680", &[], "")
    });
    for reply in futures_util::future::join_all(requests).await {
        assert_eq!(reply.status, 200);
    }
    let mut loaded = 0;
    for instance in [&first, &second] {
        loaded += instance.status().await["loads"].as_u64().unwrap();
    }
    assert_eq!(loaded, 1);
}

/// More keys than the queue takes become "everything", which is told by the log's floor instead of key by key. An
/// instance that had told it, and had not yet heard itself, believed what was older in Redis, and kept it.
#[tokio::test]
async fn an_expiry_of_everything_shows_at_once_where_it_is_acknowledged() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let instance = start().patient().env("Redis", proxy.redis_url()).env("FEED_INTERVAL_MS", 0).up().await;
    name(&instance, 680).await;
    instance.sql("UPDATE product SET Name = 'new' WHERE ProductID = 680");
    proxy.set_on(Link::Log, Fault::Stall);
    let ids: Vec<_> = (1..=100_001).collect();
    assert_eq!(instance.invalidate(&ids).await.status, 200);
    assert_eq!(name(&instance, 680).await, "new");
    proxy.set(Fault::None);
    instance.status().await;
    assert_eq!(name(&instance, 680).await, "new");
}

/// What its read of the log, sent before the stop, brings after it was heard before the stop, too.
#[tokio::test]
async fn an_instance_that_was_stopped_for_longer_than_it_may_trust_its_memory_does_not_believe_it_when_it_goes_on() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let settings = |url: String| {
        let start = start().patient().env("Redis", url).env("FEED_INTERVAL_MS", 0).env("CACHE_UNHEARD_MAX_S", 3);
        // So that the read of the log is not late, and no load slow, because of the stop.
        start.env("REDIS_RESPONSE_TIMEOUT_MS", 10_000).env("CACHE_SOFT_TIMEOUT_MS", 0)
    };
    let stopped = settings(proxy.redis_url()).up().await;
    let other = settings(redis.url()).folder(&stopped.folder).up().await;
    name(&stopped, 680).await;
    other.sql("UPDATE product SET Name = 'new' WHERE ProductID = 680");
    stopped.signal("STOP");
    let began = Instant::now();
    assert_eq!(other.invalidate(&[706]).await.status, 200);
    sleep(Duration::from_millis(500)).await; // the notice is there, and the last to come through
    proxy.set_on(Link::Log, Fault::Stall);
    assert_eq!(other.invalidate(&[680]).await.status, 200);
    sleep_until(began + Duration::from_millis(3200)).await;
    stopped.signal("CONT");
    sleep(Duration::from_millis(200)).await; // it has taken the notice
    assert_eq!(name(&stopped, 680).await, "new");
}

#[cfg(target_os = "linux")]
async fn answer(call: &mut TcpStream) -> String {
    let mut bytes = [0; 64];
    let length = call.read(&mut bytes).await.unwrap();
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_batch_under_way_is_delivered_though_the_thread_of_redis_connections_ends_before_it() {
    let redis = RedisServer::start().await;
    let text = serde_json::Value::from(r#"[{"Operation":1,"Item":{"ProductID":680}}]"#).to_string();
    let body = serde_json::json!({"Data": {"changes": text}, "Metadata": {}}).to_string();
    // Connections go to the threads by turns, and one of the two threads is the one of Redis' connections.
    for first in [0, 1] {
        let workers = |instance: &Instance| instance.threads("actix-server wo");
        let start = start().env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0).env("HTTP_WORKERS", 2);
        let mut instance = start.env("HTTP_DRAIN_S", 30).up().await;
        let mut calls = Vec::new();
        for _ in 0..2 {
            let mut call = TcpStream::connect(("127.0.0.1", instance.port)).await.unwrap();
            let length = body.len();
            let head = format!(
                "POST /InvalidateCache HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
            );
            call.write_all(head.as_bytes()).await.unwrap();
            assert!(answer(&mut call).await.starts_with("HTTP/1.1 100"));
            calls.push(call);
        }
        assert_eq!(workers(&instance), 2);
        instance.signal("TERM");
        instance.stdout.wait_for("finishing requests").await;
        let mut last = calls.remove(1 - first);
        for call in &mut calls {
            call.write_all(body.as_bytes()).await.unwrap();
            assert!(answer(call).await.starts_with("HTTP/1.1 200"));
        }
        drop(calls);
        eventually("one thread ends", async || (workers(&instance) == 1).then_some(())).await;
        last.write_all(body.as_bytes()).await.unwrap();
        assert!(answer(&mut last).await.starts_with("HTTP/1.1 200"));
        drop(last);
        assert_eq!(instance.exit_code().await, Some(0));
    }
}
