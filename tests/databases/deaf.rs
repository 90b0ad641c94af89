//! Instances that cannot hear the change feed trust what they hold for seconds, and what they cannot know of not at all.

use crate::{
    databases::handler::{on, rename, shows},
    support::{
        database::{DatabaseServer, Engine},
        eventually,
        redis::RedisServer,
    },
};

#[tokio::test]
async fn memory_is_trusted_for_seconds_only_while_the_feed_cannot_be_heard() {
    let server = DatabaseServer::start(Engine::Sqlite).await;
    let settings = on(&server.url()).env("FEED_INTERVAL_MS", 300).env("CACHE_UNHEARD_MAX_S", 3);
    let instance = settings.up().await;
    rename(&server, 680, "old").await;
    eventually("it is heard", async || shows(&instance.product(680).await, "old").then_some(())).await;
    // The triggers go on writing to it, by its new name.
    server.sql("ALTER TABLE product_change RENAME TO unheard").await;
    rename(&server, 680, "new").await;
    eventually("it is asked for anew", async || shows(&instance.product(680).await, "new").then_some(())).await;
}

#[tokio::test]
async fn what_was_read_before_the_feed_was_ever_heard_is_not_trusted_once_it_is() {
    let server = DatabaseServer::start(Engine::MariaDb).await;
    rename(&server, 680, "old").await;
    // Only the feed reads it.
    server.sql("ALTER TABLE product_change_pruned RENAME TO unheard").await;
    let settings = on(&server.url()).env("FEED_INTERVAL_MS", 100).env("CACHE_UNHEARD_MAX_S", 3600);
    let instance = settings.listening().await;
    assert!(shows(&instance.product(680).await, "old"));
    rename(&server, 680, "new").await;
    assert!(shows(&instance.product(680).await, "old"), "nobody has told it");
    server.sql("ALTER TABLE unheard RENAME TO product_change_pruned").await;
    eventually("it is asked for anew", async || shows(&instance.product(680).await, "new").then_some(())).await;
}

#[tokio::test]
async fn redis_is_not_believed_if_nobody_kept_how_far_the_feed_was_told() {
    let (server, redis) = (DatabaseServer::start(Engine::Sqlite).await, RedisServer::start().await);
    let settings = || on(&server.url()).env("Redis", redis.url()).env("FEED_INTERVAL_MS", 50);
    rename(&server, 680, "before").await;
    let mut first = settings().up().await;
    assert!(shows(&first.product(680).await, "before"));
    first.signal("TERM");
    first.exit_code().await;
    redis.command(&["DEL", "{product-cache}:feed"]).await;
    rename(&server, 680, "after").await;
    let second = settings().up().await;
    assert!(shows(&second.product(680).await, "after"));
}
