//! Redis as it is in production: TLS, users with few rights, a limit of connections, identities, clusters, sentinels.

mod cluster;
mod identity;
mod sentinel;

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
};

use product_cache::cache::Level;
use tempfile::tempdir;
use tokio::time::{Duration, Instant, sleep};

use crate::support::{
    certificates::{CERTIFICATES, Certificates, NAME},
    eventually, free_port,
    instance::{hears, start},
    node::{BUDGET, Node, Truth, key},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

/// A server with TLS in some version beside its plain port: the port, the server, and the folder of its files.
async fn with_tls(version: &str) -> (u16, RedisServer, tempfile::TempDir) {
    let folder = tempdir().unwrap();
    let (certificate, key) = CERTIFICATES.server_files(folder.path());
    let port = free_port();
    let (certificate, key) = (certificate.to_string_lossy(), key.to_string_lossy());
    let options = ["--tls-port", &port.to_string(), "--tls-cert-file", &certificate, "--tls-key-file", &key];
    let more = ["--tls-auth-clients", "no", "--tls-protocols", version];
    let server = RedisServer::start_with(&[&options[..], &more[..]].concat()).await;
    // The tests' own commands come from the plain port, as a user without a password.
    server.command(&["ACL", "SETUSER", "app", "on", ">pw=", "~*", "&*", "+@all"]).await;
    (port, server, folder)
}

#[tokio::test]
async fn entries_are_shared_over_each_version_of_tls_and_each_form_of_string() {
    for version in ["TLSv1.2", "TLSv1.3"] {
        let (port, server, folder) = with_tls(version).await;
        let authority = CERTIFICATES.authority_file(folder.path());
        let ca = [("REDIS_CA_FILE", authority.to_str().unwrap())];
        let truth = Truth::new(&[(1, 10)]);
        let first = Node::hearing(&truth, &format!("rediss://app:{}@127.0.0.1:{port}", "pw%3D"), &ca).await;
        let string = format!("localhost:{port},user=app,password=pw=,ssl=True,sslHost={NAME},abortConnect=False");
        let second = Node::hearing(&truth, &string, &ca).await;
        assert_eq!(first.value(1).await, Some(10));
        assert_eq!(second.read(1).await.how().level, Level::Redis, "{version}");
        eventually("three of each, and what was tried meanwhile is closed", async || {
            let list: String = redis::from_redis_value(server.command(&["CLIENT", "LIST"]).await).unwrap();
            (list.matches("user=app").count() == 6).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_that_cannot_prove_who_it_is_is_told_nothing_and_reads_go_on() {
    let (port, server, folder) = with_tls("TLSv1.3").await;
    let (right, wrong) = (CERTIFICATES.authority_file(folder.path()), tempdir().unwrap());
    let wrong = Certificates::new().authority_file(wrong.path());
    let proxy = Proxy::start(port).await;
    for (host, authority) in [("127.0.0.1", Some(&wrong)), ("localhost", Some(&right)), ("127.0.0.1", None)] {
        let truth = Truth::new(&[(1, 10)]);
        let string = format!("{host}:{},user=app,password=pw=,ssl=True", proxy.port);
        let ca = authority.map(|file| ("REDIS_CA_FILE", file.to_str().unwrap()));
        let before = proxy.requests();
        let node = Node::new(&truth, Some(&string), ca.as_slice());
        assert_eq!(node.value(1).await, Some(10));
        eventually("it tries again and again", async || (proxy.requests() >= before + 4).then_some(())).await;
        assert_eq!(node.cache.status().redis_connected, Some(false), "{host} {authority:?}");
    }
    let list: String = redis::from_redis_value(server.command(&["CLIENT", "LIST"]).await).unwrap();
    assert!(!list.contains("user=app"), "nobody has logged in: {list}");
}

#[tokio::test]
async fn the_binary_speaks_tls_and_a_file_without_authorities_stops_its_start() {
    let (port, _server, folder) = with_tls("TLSv1.3").await;
    let authority = CERTIFICATES.authority_file(folder.path());
    let string = format!("127.0.0.1:{port},user=app,password=pw=,ssl=True");
    let start_one = || start().patient().env("Redis", &string).env("REDIS_CA_FILE", authority.display());
    let (one, two) = (start_one().up().await, start_one().up().await);
    one.get("/api/GetProductById?productid=680").await;
    let reply = two.get("/api/GetProductById?productid=680").await;
    assert!(reply.header("cache-status").starts_with("L2; hit"), "{reply:?}");

    let key = folder.path().join("key.pem");
    for (file, problem) in [(key.as_path(), "no certificate"), ("/nowhere.pem".as_ref(), "No such file")] {
        let mut failed = start().env("Redis", &string).env("REDIS_CA_FILE", file.display()).spawn();
        assert_eq!(failed.exit_code().await, Some(2));
        let said = failed.stderr.text();
        assert!(said.contains("REDIS_CA_FILE") && said.contains(problem) && !said.contains("pw="), "{said}");
    }
}

/// What the handler's user needs, as docs/redis.md has it.
pub const RIGHTS: &str = "~{product-cache}:* +get +set +type +unlink +evalsha +script|load +hdel +hget +hmget +hset +pttl +pexpire +time +xadd +xtrim +xread +xrevrange +cluster|myid +cluster|slots +asking";

/// The commands that only a lost notice, a moved slot or a foreign value calls for are seldom sent.
#[test]
fn every_command_in_the_sources_is_among_the_documented_rights() {
    let mut sent = BTreeSet::new();
    for folder in ["src/cache", "src/redis"] {
        for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap() {
            let path = file.unwrap().path();
            if path.is_file() && !path.ends_with("examine.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]").next().unwrap_or_default();
                for before in ["cmd(\"", "command(\"", "redis.call('"] {
                    let words = text.split(before).skip(1);
                    sent.extend(words.filter_map(|rest| rest.split(['"', '\'']).next()).map(str::to_lowercase));
                }
            }
        }
    }
    assert!(["type", "evalsha", "xadd", "hget"].iter().all(|command| sent.contains(*command)), "found: {sent:?}");
    let allowed = |command: &str| {
        RIGHTS
            .split(' ')
            .filter_map(|right| right.strip_prefix('+'))
            .any(|right| right.split('|').next() == Some(command))
    };
    // A login needs no right, and sentinels are asked without one.
    sent.retain(|command| !["auth", "sentinel"].contains(&command.as_str()) && !allowed(command));
    assert!(sent.is_empty(), "no right to send {sent:?}");
}

/// A right that the doctor does not try may be missing where it says that all is well.
#[test]
fn the_doctor_tries_every_documented_right_that_is_not_about_clusters() {
    let doctor = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/redis/examine.rs")).unwrap();
    let tries = |command: &str| match command {
        "evalsha" => doctor.contains("script.call("),
        "script|load" => doctor.contains("script.load()"),
        command => ["&[\"", "call('"].iter().any(|before| {
            let words = doctor.split(before).skip(1).filter_map(|rest| rest.split(['"', '\'']).next());
            words.map(str::to_lowercase).any(|word| word == command)
        }),
    };
    let needed = RIGHTS.split(' ').filter_map(|right| right.strip_prefix('+'));
    let (known, untried): (Vec<_>, Vec<_>) = needed
        .filter(|command| !command.starts_with("cluster|") && *command != "asking")
        .partition(|command| tries(command));
    assert!(untried.is_empty() && known.len() > 10, "not tried: {untried:?}");
}

#[tokio::test]
async fn a_user_with_no_more_rights_than_documented_can_do_all_there_is_to_do() {
    let docs = include_str!("../../docs/redis.md");
    assert!(docs.contains(RIGHTS), "docs/redis.md says: {RIGHTS}");
    let server = RedisServer::start().await;
    let mut words = vec!["ACL", "SETUSER", "app", "on", ">hunter2", "resetchannels"];
    words.extend(RIGHTS.split(' '));
    server.command(&words).await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let string = format!("127.0.0.1:{},user=app,password=hunter2", server.port);
    let (first, second) = (Node::hearing(&truth, &string, &[]).await, Node::hearing(&truth, &string, &[]).await);
    assert_eq!((first.value(1).await, second.value(1).await), (Some(10), Some(10)));

    truth.set(1, 11);
    first.cache.expire(&[key(1)], BUDGET).await.expect("told");
    eventually("the other hears", async || (second.value(1).await == Some(11)).then_some(())).await;
    truth.set(2, 21);
    first.cache.expire_everything(BUDGET).await.expect("told");
    eventually("the other hears", async || (second.value(2).await == Some(21)).then_some(())).await;
    // A value that is not ours, a failed load, what instances leave for each other.
    server.command(&["SET", "{product-cache}:thing:1", "foreign"]).await;
    first.cache.expire(&[key(1)], BUDGET).await.expect("removed and told");
    truth.fail(true);
    assert!(first.try_read(3).await.is_err(), "and its lease is given back");
    assert!(
        first.cache.keep_checkpoint("n", "text").await
            && second.cache.checkpoint("n").await.unwrap().as_deref() == Some("text")
    );

    let log: Vec<redis::Value> = redis::from_redis_value(server.command(&["ACL", "LOG"]).await).unwrap();
    assert!(log.is_empty(), "something was refused: {log:?}");
}

#[tokio::test]
async fn a_server_that_is_full_is_done_without_and_used_again_when_there_is_room() {
    let server = RedisServer::start_with(&["--maxclients", "12"]).await;
    let mut crowd = Vec::new();
    eventually("it is full", async || {
        let mut one = TcpStream::connect(("127.0.0.1", server.port)).ok()?;
        let mut answer = [0; 7];
        if one.write_all(b"PING\r\n").and_then(|()| one.read_exact(&mut answer)).is_ok() && &answer == b"+PONG\r\n" {
            crowd.push(one);
        }
        (crowd.len() == 12).then_some(())
    })
    .await;
    let truth = Truth::new(&[(1, 10)]);
    let url = server.url();
    let node = Node::new(&truth, Some(&url), &[]);
    for _ in 0..20 {
        assert_eq!(node.value(1).await, Some(10));
        assert_eq!(node.cache.status().redis_connected, Some(false), "there is no room");
        sleep(Duration::from_millis(20)).await;
    }
    drop(crowd);
    node.until_it_hears().await;
    eventually("all are up", async || (server.clients().await == 3).then_some(())).await;
    truth.set(2, 20);
    assert_eq!(node.value(2).await, Some(20));
    let other = Node::hearing(&truth, &url, &[]).await;
    assert_eq!(other.read(2).await.how().level, Level::Redis);
}

/// Connections that nobody used were missed only when they were used, and GET / said for so long that all was well. What
/// the log said of an outage was its beginning.
#[tokio::test]
async fn a_server_that_dies_while_nobody_asks_it_is_missed_and_its_return_is_said_once() {
    let mut server = RedisServer::start().await;
    let instance = start().env("Redis", server.url()).up().await;
    let connected = async || instance.status().await["redis"]["connected"] == true;
    eventually("it is connected", async || (connected().await && server.clients().await == 3).then_some(())).await;
    let said = || instance.stdout.text().matches("redis: connected again").count();
    assert_eq!(said(), 0);
    server.kill();
    eventually("it is missed", async || (!connected().await).then_some(())).await;
    server.restart().await;
    let restarted = Instant::now();
    instance.stdout.wait_for("redis: connected again").await;
    let is_heard = async || hears(&instance.status().await, restarted);
    let all_are_up = async || connected().await && is_heard().await && server.clients().await == 3;
    eventually("all are up", async || all_are_up().await.then_some(())).await;
    assert_eq!(said(), 1);
}

/// The first connection to come back said that it was over, and the others had nothing more to say.
#[tokio::test]
async fn an_outage_is_over_when_every_connection_is_back() {
    let server = RedisServer::start().await;
    let mut own = redis::Client::open(server.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut ask = async |words: &[&str]| {
        let mut command = redis::Cmd::new();
        command.arg(words).query_async::<redis::Value>(&mut own).await.unwrap()
    };
    let instance = start().env("Redis", server.url()).up().await;
    eventually("all are up", async || (server.clients().await == 1 + 3).then_some(())).await;
    ask(&["CONFIG", "SET", "maxclients", "3"]).await;
    ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    eventually("two are back", async || {
        let list: String = redis::from_redis_value(ask(&["CLIENT", "LIST"]).await).unwrap();
        (list.lines().count() == 3).then_some(())
    })
    .await;
    sleep(Duration::from_millis(500)).await; // the third has tried
    let said = || instance.stdout.text().matches("redis: connected again").count();
    assert_eq!(said(), 0, "{}", instance.stderr.text());
    ask(&["CONFIG", "SET", "maxclients", "100"]).await;
    instance.stdout.wait_for("redis: connected again").await;
    eventually("all are up", async || (server.clients().await == 1 + 3).then_some(())).await;
    assert_eq!(said(), 1);
}

/// While its connection could not be made again, whoever listened waited without a word.
#[tokio::test]
async fn that_the_log_has_no_connection_is_said_when_memory_is_no_longer_trusted() {
    let server = RedisServer::start().await;
    let proxy = Proxy::start(server.port).await;
    let instance = start().env("Redis", proxy.redis_url()).env("CACHE_UNHEARD_MAX_S", 3).up().await;
    eventually("all are up", async || (server.clients().await == 3).then_some(())).await;
    proxy.lead_to(1); // nobody listens there
    proxy.set_on(Link::Log, Fault::Refuse);
    eventually("the log's is lost", async || (server.clients().await == 2).then_some(())).await;
    proxy.set(Fault::None);
    instance.stderr.wait_for("redis: the log has no connection").await;
    sleep(Duration::from_secs(4)).await; // again as long
    assert_eq!(instance.stderr.text().matches("redis: the log has no connection").count(), 1);
    assert_eq!(instance.status().await["redis"]["connected"], true, "the others are whole");
    proxy.lead_to(server.port);
    instance.stdout.wait_for("the invalidation log is heard again").await;
}

/// All of L2 was gone without a word: reads, leases and fills are best effort.
#[tokio::test]
async fn a_redis_that_answers_with_errors_is_done_without_and_said_to() {
    let server = RedisServer::start().await;
    for (command, refused) in [("hmget", "a look"), ("hset", "a lease"), ("hdel", "a fill")] {
        server.command(&["FLUSHALL"]).await;
        server.command(&["ACL", "SETUSER", "app", "reset", "on", ">pw", "~*", "+@all", &format!("-{command}")]).await;
        let string = format!("127.0.0.1:{},user=app,password=pw", server.port);
        let instance = start().env("Redis", string).up().await;
        assert_eq!(instance.product(680).await.status, 200, "{refused}");
        instance.stderr.wait_for("redis: refuses to read or store entries").await;
        let said = instance.stderr.text();
        assert!(command != "hmget" || said.contains(command), "the look before the script: {said}");
    }
}
