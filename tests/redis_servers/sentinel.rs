//! A primary, its replica and a sentinel, which promotes the replica when the primary is gone.

use std::{
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use product_cache::cache::Level;
use tempfile::tempdir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::Duration,
};

use crate::support::{
    PROMPT, eventually, eventually_within, free_port,
    node::{BUDGET, Node, Truth, key},
    redis::RedisServer,
};

struct Sentinel(Child);

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_primary_that_a_sentinel_names_is_used_and_the_next_one_after_it() {
    let mut primary = RedisServer::start().await;
    let follow = ["--repl-diskless-sync-delay", "0", "--replicaof", "127.0.0.1"];
    let replica = RedisServer::start_with(&[&follow[..], &[&primary.port.to_string()]].concat()).await;
    eventually("it follows", async || (replica.info("replication", "master_link_status").await == "up").then_some(()))
        .await;
    let folder = tempdir().unwrap();
    let port = free_port();
    let file = folder.path().join("sentinel.conf");
    let watched = primary.port;
    let text = format!(
        "bind 127.0.0.1\nport {port}\ndir {}\nsentinel monitor shop 127.0.0.1 {watched} 1\n\
         sentinel down-after-milliseconds shop 500\nsentinel failover-timeout shop 3000\n",
        folder.path().display()
    );
    std::fs::write(&file, text).unwrap();
    let child = Command::new("redis-server").arg(&file).arg("--sentinel").stdout(Stdio::null()).spawn().unwrap();
    let _sentinel = Sentinel(child);

    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let nobody = free_port();
    let string = format!("127.0.0.1:{nobody},127.0.0.1:{port},serviceName=shop");
    let first = Node::hearing(&truth, &string, &PROMPT).await;
    let second = Node::hearing(&truth, &string, &PROMPT).await;
    assert_eq!(first.value(1).await, Some(10));
    assert_eq!(second.read(1).await.how().level, Level::Redis);
    // The sentinel must know the replica before it can promote it.
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
    eventually("the sentinel knows the replica", async || {
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        let mut question = redis::cmd("SENTINEL");
        let replicas = question.arg("REPLICAS").arg("shop").query_async::<Vec<redis::Value>>(&mut connection).await;
        replicas.is_ok_and(|replicas| replicas.len() == 1).then_some(())
    })
    .await;

    primary.kill();
    // A sentinel that was not run for two seconds does nothing for thirty.
    eventually_within(Duration::from_secs(60), "the replica is promoted", async || {
        assert_eq!(first.value(1).await, Some(10));
        (replica.info("replication", "role").await == "master").then_some(())
    })
    .await;
    eventually("both hear again", async || {
        let up = |node: &Node| node.cache.status().redis_connected == Some(true);
        (up(&first) && up(&second) && replica.clients().await >= 6).then_some(())
    })
    .await;
    truth.set(2, 21);
    first.cache.expire(&[key(2)], BUDGET).await.expect("told");
    eventually("the other hears", async || (second.value(2).await == Some(21)).then_some(())).await;
}

#[tokio::test]
async fn of_a_primary_and_its_replica_the_primary_is_used_whichever_is_named_first() {
    let primary = RedisServer::start().await;
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &primary.port.to_string()]).await;
    let truth = Truth::new(&[(1, 10)]);
    let string = format!("127.0.0.1:{},127.0.0.1:{}", replica.port, primary.port);
    let node = Node::hearing(&truth, &string, &[]).await;
    assert_eq!(node.value(1).await, Some(10));
    assert_eq!(primary.command(&["EXISTS", "{product-cache}:thing:1"]).await, redis::Value::Int(1));
    // Beside the three, the primary has its replica as a client, and the replica its primary.
    eventually("none has stayed at the replica", async || {
        (primary.clients().await == 4 && replica.clients().await == 1).then_some(())
    })
    .await;
}

/// What a sentinel says to all it is asked, bare as it is: the sentinels that can be started do not err.
async fn sentinel_that_names(port: Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let port = port.load(Ordering::SeqCst).to_string();
            tokio::spawn(async move {
                let mut piece = [0; 4096];
                while let Ok(length @ 1..) = client.read(&mut piece).await {
                    let asked = String::from_utf8_lossy(&piece[..length]).to_uppercase();
                    let named = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
                    let answers = "+OK\r\n".repeat(asked.matches("SETINFO").count());
                    let answers = if asked.contains("GET-MASTER-ADDR") { answers + &named } else { answers };
                    let _ = client.write_all(answers.as_bytes()).await;
                }
            });
        }
    });
    own
}

/// The old primary was cut off from the sentinels, and neither it nor its clients notice.
#[tokio::test]
async fn a_primary_that_was_replaced_unawares_is_left_by_all_connections() {
    let (old, new) = (RedisServer::start().await, RedisServer::start().await);
    let named = Arc::new(AtomicU16::new(old.port));
    let sentinel = sentinel_that_names(named.clone()).await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &format!("127.0.0.1:{sentinel},serviceName=shop"), &[]).await;
    eventually("all are there", async || (old.clients().await == 3).then_some(())).await;
    named.store(new.port, Ordering::SeqCst);
    eventually("all are at the new one", async || (old.clients().await == 0 && new.clients().await == 3).then_some(()))
        .await;
    node.until_it_hears().await;
}

/// Two that both say that they are the primary, as after a promotion that one of them has not heard of.
#[tokio::test]
async fn of_two_primaries_one_is_used_by_all_connections() {
    let (first, second) = (RedisServer::start().await, RedisServer::start().await);
    for server in [&first, &second] {
        server.command(&["ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all"]).await;
    }
    let truth = Truth::new(&[(1, 10)]);
    let string = format!("127.0.0.1:{},127.0.0.1:{},user=app,password=pw", first.port, second.port);
    let node = Node::hearing(&truth, &string, &[]).await;
    eventually("all are up", async || (first.clients().await == 3).then_some(())).await;
    assert_eq!(second.clients().await, 0);

    // The log's connection is lost and cannot be made again: all go where it goes.
    first.command(&["ACL", "SETUSER", "app", "resetpass", ">other"]).await;
    let id = eventually("the log's reads it, and does not look for its end", async || {
        let list: String = redis::from_redis_value(first.command(&["CLIENT", "LIST"]).await).unwrap();
        let reader = list.lines().find(|line| line.contains("cmd=xread "))?;
        Some(reader.split(' ').next()?.trim_start_matches("id=").to_owned())
    })
    .await;
    first.command(&["CLIENT", "KILL", "ID", &id]).await;
    eventually("all are at the other", async || {
        (first.clients().await == 0 && second.clients().await == 3).then_some(())
    })
    .await;
    node.until_it_hears().await;
}

/// It was kept for as long as it answered reads, by an instance that had nothing to tell.
#[tokio::test]
async fn of_two_servers_one_that_refuses_writes_is_left_for_the_other() {
    let servers = [RedisServer::start().await, RedisServer::start().await];
    let [first, second] = &servers;
    let string = format!("127.0.0.1:{},127.0.0.1:{}", first.port, second.port);
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &string, &[]).await;
    node.value(1).await;
    eventually("all are at the first", async || (first.clients().await == 3).then_some(())).await;
    first.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    eventually("all are at the second", async || {
        assert_eq!(node.value(1).await, Some(10));
        (first.clients().await == 0 && second.clients().await == 3).then_some(())
    })
    .await;
    node.until_it_hears().await;
    truth.set(1, 11);
    node.cache.expire(&[key(1)], BUDGET).await.expect("told");
}
