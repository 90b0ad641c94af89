//! C5 and C6: nothing in the invalidation log is missed, whatever becomes of the log; who cannot hear it trusts what it
//! has for seconds only.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use product_cache::cache::Level;
use redis::Value;
use tokio::time::{Instant, sleep};

use super::LOG;
use crate::support::{
    PROMPT, eventually,
    node::{BUDGET, Node, Truth, ended, key, value},
    proxy::{Fault, Link, Proxy},
    redis::RedisServer,
};

const ENTRY: &str = "{product-cache}:thing:1";

// ---- C5: nothing is missed --------------------------------------------------------------------------------------

#[tokio::test]
async fn an_instance_that_was_disconnected_hears_what_it_missed_and_drops_only_that() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let proxy = Proxy::start(redis.port).await;
    let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    b.value(1).await;
    b.value(2).await;
    let position = b.cache.status().log_position;
    proxy.set(Fault::Refuse);
    truth.set(1, 11);
    a.cache.expire(&[key(1)], BUDGET).await.unwrap();
    assert_eq!(b.value(1).await, Some(10), "it cannot know yet");
    proxy.set(Fault::None);
    eventually("it resumes", async || (b.cache.status().log_position > position).then_some(())).await;
    assert_eq!(b.value(1).await, Some(11));
    assert_eq!(b.read(2).await.how().level, Level::Memory, "what was not expired is still there");
}

#[tokio::test]
async fn a_log_trimmed_past_an_instance_or_lost_makes_all_its_memory_stale() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    for loss in [vec!["XTRIM", LOG, "MAXLEN", "1"], vec!["FLUSHALL"]] {
        let proxy = Proxy::start(redis.port).await;
        let b = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
        let seen = b.value(1).await.unwrap();
        b.value(2).await;
        let position = b.cache.status().log_position;
        proxy.set(Fault::Refuse);
        truth.set(1, seen + 1);
        a.cache.expire(&[key(1)], BUDGET).await.unwrap();
        a.cache.expire(&[key(3)], BUDGET).await.unwrap();
        redis.command(&loss).await;
        proxy.set(Fault::None);
        eventually("it finds the log changed", async || (b.cache.status().log_position != position).then_some(()))
            .await;
        assert_eq!(b.value(1).await, Some(seen + 1), "{loss:?}");
        assert_ne!(b.read(2).await.how().level, Level::Memory, "{loss:?}: nothing in memory is trusted");
    }
}

/// The id of the log's last notice, and what it says.
async fn last_notice(redis: &RedisServer) -> (String, String) {
    let last = redis.command(&["XREVRANGE", LOG, "+", "-", "COUNT", "1"]).await;
    let [(id, [_, text])]: [(String, [String; 2]); 1] = redis::from_redis_value(last).unwrap();
    (id, text)
}

/// Another instance's notice about another key.
async fn append_foreign(redis: &RedisServer) {
    let (id, text) = last_notice(redis).await;
    let parts: Vec<_> = text.splitn(6, ' ').collect();
    let next = format!("{id} {} {} {} another thing:2", parts[4], parts[2], parts[3]);
    redis.command(&["XADD", LOG, "*", "n", &next]).await;
}

async fn dump(redis: &RedisServer, name: &str) -> Vec<u8> {
    redis::from_redis_value(redis.command(&["DUMP", name]).await).expect("a dump")
}

async fn restore(redis: &RedisServer, name: &str, dump: &[u8]) {
    redis.command(&[b"RESTORE", name.as_bytes(), b"0", dump, b"REPLACE"]).await;
}

#[tokio::test]
async fn a_notice_of_another_form_is_about_everything_and_nobody_answers_it() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20), (3, 30)]);
    // A late answer would be asked for again, and an expiry appended twice.
    let settings = [("REDIS_RESPONSE_TIMEOUT_MS", "5000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let hearing = async || Node::hearing(&truth, &redis.url(), &settings).await;
    let nodes = [hearing().await, hearing().await];
    let heard = async |notices: i64| {
        let (last, _) = last_notice(&redis).await;
        eventually("both hear it", async || {
            let positions = nodes.each_ref().map(|node| node.cache.status().log_position.unwrap().to_string());
            positions.iter().all(|position| *position == last).then_some(())
        })
        .await;
        assert_eq!(redis.command(&["XLEN", LOG]).await, Value::Int(notices));
    };
    for (form, value) in [(["p", "0-0 - 0 0 x *"], 11), (["n", "0-0 - 0"], 12), (["n", "0-0 - 0 0 x"], 13)] {
        for id in 1..=3 {
            join_all(nodes.each_ref().map(|node| node.value(id))).await;
        }
        let Value::Int(notices) = redis.command(&["XLEN", LOG]).await else { panic!("no length") };
        (1..=3).for_each(|id| truth.set(id, value));
        redis.command(&["XADD", LOG, "*", form[0], form[1]]).await;
        heard(notices + 1).await;
        assert_eq!(nodes[0].value(1).await, Some(value), "{form:?}: neither memory nor Redis is trusted");
        assert_eq!(nodes[1].value(1).await, Some(value), "{form:?}");
        let new = hearing().await;
        assert_eq!(new.value(2).await, Some(value), "{form:?}: nor by one that comes later");
        new.cache.expire(&[key(1)], BUDGET).await.unwrap();
        heard(notices + 2).await;
        let later = hearing().await;
        assert_eq!(later.value(3).await, Some(value), "{form:?}: nor once the log goes on");
    }
}

#[tokio::test]
async fn a_reset_is_answered_though_a_notice_of_another_form_follows_it() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let _node = Node::hearing(&Truth::new(&[]), &proxy.redis_url(), &[]).await;
    proxy.set(Fault::Refuse);
    redis.command(&["DEL", LOG]).await;
    for (field, text) in [("n", "0-0 - 0 0 nobody thing:9"), ("p", "0-0")] {
        redis.command(&["XADD", LOG, "*", field, text]).await;
    }
    proxy.set(Fault::None);
    eventually("everything in Redis is made stale", async || last_notice(&redis).await.1.ends_with(" *").then_some(()))
        .await;
}

#[tokio::test]
async fn notices_that_are_a_day_old_or_too_many_leave_the_log() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    // Redis drops whole nodes of a stream, a hundred notices each.
    let add = "for i = 1, 1000 do
      redis.call('XADD', KEYS[1], ARGV[1] == 'old' and i .. '-1' or '*', 'n', '0-0 - 0 0 nobody product:2')
    end";
    for (age, settings, most) in [("old", &[][..], 100), ("new", &[("REDIS_LOG_MAX_LENGTH", "500")], 600)] {
        redis.command(&["FLUSHALL"]).await;
        redis.command(&["EVAL", add, "1", LOG, age]).await;
        let node = Node::hearing(&truth, &redis.url(), settings).await;
        node.cache.expire(&[key(1)], BUDGET).await.unwrap();
        let Value::Int(left) = redis.command(&["XLEN", LOG]).await else { panic!("no length") };
        assert!((1..=most).contains(&left), "{age}: {left} of 1000");
    }
}

#[tokio::test]
async fn a_reset_log_is_noticed_without_any_further_expiry() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    node.value(1).await;
    truth.set(1, 11);
    redis.command(&["FLUSHALL"]).await;
    eventually("memory is no longer trusted", async || (node.value(1).await == Some(11)).then_some(())).await;
}

#[tokio::test]
async fn after_an_expiry_of_everything_redis_is_not_believed_about_what_was_there_before() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
    let proxy = Proxy::start(redis.port).await;
    let author = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    let deaf_proxy = Proxy::start(redis.port).await;
    let deaf = Node::hearing(&truth, &deaf_proxy.redis_url(), &[("CACHE_UNHEARD_MAX_S", "3")]).await;
    deaf.value(1).await;
    // Neither hears its own or others' notices from here on; the author must know by itself.
    proxy.set_on(Link::Log, Fault::Stall);
    deaf_proxy.set_on(Link::Log, Fault::Stall);
    truth.set(1, 11);
    author.cache.expire_everything(BUDGET).await.unwrap();
    truth.hold();
    let read = author.begin(1);
    truth.begun(2).await; // it asks the database, not Redis
    truth.release();
    assert_eq!(value(&ended(read).await.unwrap()), Some(11));
    redis.command(&["DEL", "{product-cache}:thing:1"]).await;
    let old = Node::hearing(&Truth::new(&[(1, 10)]), &redis.url(), &[]).await;
    old.value(1).await; // as if Redis had gone back
    eventually("without the log Redis is not believed for longer than memory", async || {
        (deaf.value(1).await == Some(11)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_log_lost_while_nobody_heard_it_makes_what_is_in_redis_stale() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    for (new, first_notice) in [(11, false), (12, true)] {
        let last = Node::hearing(&truth, &redis.url(), &[]).await;
        last.value(1).await;
        last.cache.expire_everything(BUDGET).await.unwrap();
        drop(last);
        truth.set(1, new);
        redis.command(&["DEL", LOG]).await;
        let node = Node::new(&truth, Some(&redis.url()), &[]);
        if first_notice {
            node.cache.expire(&[key(2)], BUDGET).await.unwrap(); // maybe before it hears
        }
        node.until_it_hears().await;
        assert_eq!(node.value(1).await, Some(new));
    }
}

#[tokio::test]
async fn an_older_copy_of_redis_brings_nothing_back() {
    let mut redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    a.value(1).await;
    b.value(2).await;
    redis.command(&["SAVE"]).await;
    truth.set(1, 11);
    truth.set(2, 21);
    a.cache.expire(&[key(1), key(2)], BUDGET).await.unwrap();
    assert_eq!(a.value(1).await, Some(11));
    eventually("B hears it", async || (b.value(2).await == Some(21)).then_some(())).await;
    let position = a.cache.status().log_position;
    redis.restart().await; // with what was saved: both old entries fresh, and a log that ends earlier
    eventually("both have noticed", async || {
        // What they have in memory. Of the rest they cannot know before they read the log again.
        assert_eq!((a.value(1).await, b.value(2).await), (Some(11), Some(21)), "nothing comes back");
        (a.cache.status().log_position != position && b.cache.status().log_position != position).then_some(())
    })
    .await;
    for node in [&a, &b] {
        assert_eq!((node.value(1).await, node.value(2).await), (Some(11), Some(21)), "nothing comes back");
    }
    eventually("nor to a new instance", async || {
        let new = Node::hearing(&truth, &redis.url(), &[]).await;
        (new.value(1).await == Some(11) && new.value(2).await == Some(21)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_own_notice_that_redis_lost_before_anybody_heard_it_is_answered() {
    for (has_heard_before, goes_on) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut redis = RedisServer::start().await;
        let proxy = Proxy::start(redis.port).await;
        let truth = Truth::new(&[(1, 10)]);
        Node::hearing(&truth, &redis.url(), &[]).await.value(1).await;
        let deaf = || proxy.set_on(Link::Log, Fault::Stall);
        if !has_heard_before {
            deaf();
        }
        let author = Node::new(&truth, Some(&proxy.redis_url()), &[("REDIS_RESPONSE_TIMEOUT_MS", "200")]);
        if has_heard_before {
            author.until_it_hears().await;
            deaf();
        }
        redis.command(&["SAVE"]).await;
        truth.set(1, 11);
        author.cache.expire(&[key(1)], BUDGET).await.unwrap();
        redis.restart().await; // with what was saved: the old entry fresh, and no notice
        if goes_on {
            append_foreign(&redis).await;
        }
        sleep(Duration::from_secs(1)).await; // what was asked before that is given up
        proxy.set(Fault::None);
        eventually("nobody is given what was expired", async || {
            (Node::hearing(&truth, &redis.url(), &[]).await.value(1).await == Some(11)).then_some(())
        })
        .await;
    }
}

/// The notice was refused, though there is room for it as soon as the log is trimmed; and nobody else trims it.
#[tokio::test]
async fn a_full_redis_takes_notices_all_the_same_and_its_log_grows_no_further() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let a = Node::hearing(&truth, &redis.url(), &[]).await;
    let b = Node::hearing(&truth, &redis.url(), &[]).await;
    let add = "for i = 1, 5000 do redis.call('XADD', KEYS[1], i .. '-1', 'n', '0-0 - 0 0 nobody product:2') end";
    for (new, log) in [(11, "as it is"), (12, "long"), (13, "none yet")] {
        if log != "as it is" {
            redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
            redis.command(&["DEL", LOG]).await;
            if log == "long" {
                redis.command(&["EVAL", add, "1", LOG]).await;
            }
        }
        redis.command(&["CONFIG", "SET", "maxmemory-policy", "volatile-lru", "maxmemory", "1"]).await;
        a.value(1).await;
        b.value(1).await;
        truth.set(1, new);
        a.cache.expire(&[key(1)], BUDGET).await.unwrap();
        eventually("the other hears it", async || (b.value(1).await == Some(new)).then_some(())).await;
        let Value::Int(left) = redis.command(&["XLEN", LOG]).await else { panic!("no length") };
        assert!((1..=1100).contains(&left), "{log}: {left} notices");
    }
}

/// The author's reader of the log is with the new primary already; its expiry, and the answer to that, are with the old one.
#[tokio::test]
async fn an_own_notice_acknowledged_by_an_old_primary_after_the_new_one_was_heard_is_answered() {
    let (old, new) = (RedisServer::start().await, RedisServer::start().await);
    let proxy = Proxy::start(old.port).await;
    let truth = Truth::new(&[(1, 10)]);
    Node::hearing(&truth, &old.url(), &[]).await.value(1).await;
    let settings = [("REDIS_RESPONSE_TIMEOUT_MS", "10000"), ("REQUEST_TIMEOUT_MS", "60000")];
    let author = Arc::new(Node::hearing(&truth, &proxy.redis_url(), &settings).await);
    for name in [LOG, ENTRY] {
        restore(&new, name, &dump(&old, name).await).await;
    }
    proxy.lead_to(new.port);
    proxy.set_on(Link::Log, Fault::Refuse);
    sleep(Duration::from_millis(100)).await;
    proxy.set(Fault::None);
    eventually("the log is read from the new primary", async || {
        let clients: String = redis::from_redis_value(new.command(&["CLIENT", "LIST"]).await).unwrap();
        clients.contains("cmd=xread").then_some(())
    })
    .await;
    proxy.set_on(Link::NotLog, Fault::Stall);
    truth.set(1, 11);
    let (before, told) = (last_notice(&old).await.0, author.clone());
    let expiry = tokio::spawn(async move { told.cache.expire(&[key(1)], BUDGET).await });
    eventually("the old primary has it", async || (last_notice(&old).await.0 != before).then_some(())).await;
    sleep(Duration::from_millis(10)).await;
    append_foreign(&new).await;
    let last = last_notice(&new).await.0;
    eventually("the new one is heard", async || {
        (author.cache.status().log_position.unwrap().to_string() == last).then_some(())
    })
    .await;
    proxy.set(Fault::None);
    expiry.await.unwrap().unwrap();
    proxy.set(Fault::Refuse); // the old one is gone
    sleep(Duration::from_millis(100)).await;
    proxy.set(Fault::None);
    eventually("nobody is given what was expired", async || {
        (Node::hearing(&truth, &new.url(), &[]).await.value(1).await == Some(11)).then_some(())
    })
    .await;
}

/// While primaries change, the lines may lead to two of them; a script that one lacks is no reason to go to the other.
#[tokio::test]
async fn an_expiry_and_its_notice_reach_one_server_whatever_has_to_be_repeated() {
    let servers = [RedisServer::start().await, RedisServer::start().await];
    let [old, new] = &servers;
    let proxy = Proxy::start(old.port).await;
    let truth = Truth::new(&[(1, 10)]);
    let author = Node::hearing(&truth, &proxy.redis_url(), &[]).await;
    author.value(1).await;
    let (log, entry) = (dump(old, LOG).await, dump(old, ENTRY).await);
    restore(new, LOG, &log).await;
    proxy.lead_to(new.port);
    let clients: String = redis::from_redis_value(old.command(&["CLIENT", "LIST"]).await).unwrap();
    let told = async |server: &RedisServer| {
        let log: Vec<(String, [String; 2])> =
            redis::from_redis_value(server.command(&["XRANGE", LOG, "-", "+"]).await).unwrap();
        log.iter().filter(|(_, [_, text])| text.ends_with(" thing:1")).count()
    };
    let reads_log =
        |line: &&str| ["xread", "xrevrange", "client"].iter().any(|name| line.contains(&format!("cmd={name}")));
    let shared = clients.lines().find(|line| !reads_log(line)).expect("a shared connection");
    let id = shared.split([' ', '=']).nth(1).unwrap();
    old.command(&["CLIENT", "KILL", "ID", id]).await;
    eventually("one line leads to each", async || {
        author.cache.expire(&[key(2)], BUDGET).await.unwrap(); // an idle one's end is not noticed
        (new.clients().await > 0).then_some(())
    })
    .await;
    for _ in 0..4 {
        let mut before = Vec::new();
        for server in &servers {
            restore(server, ENTRY, &entry).await;
            server.command(&["SCRIPT", "FLUSH"]).await;
            before.push(told(server).await);
        }
        author.cache.expire(&[key(1)], BUDGET).await.unwrap();
        for (server, before) in servers.iter().zip(before) {
            let fresh = server.command(&["HEXISTS", ENTRY, "f"]).await == Value::Int(1);
            assert!(told(server).await == before || !fresh, "the notice came without the expiry");
        }
    }
}

/// Two primaries, one after the other in one Redis: what the second one's instances made stale before the first one took the
/// expiry that is lost says nothing about it.
#[tokio::test]
async fn an_own_notice_lost_to_another_primary_is_answered_though_that_one_had_made_everything_stale_before() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::start(redis.port).await;
    let truth = Truth::new(&[(1, 10)]);
    let author = Node::hearing(&truth, &proxy.redis_url(), &[("REDIS_RESPONSE_TIMEOUT_MS", "200")]).await;
    let first_log = dump(&redis, LOG).await;
    proxy.set_on(Link::Log, Fault::Stall);
    // The second primary.
    let other = Node::hearing(&truth, &redis.url(), &[]).await;
    other.cache.expire_everything(BUDGET).await.unwrap();
    sleep(Duration::from_millis(10)).await; // loaded later than that, by Redis' clock
    assert_eq!(other.value(1).await, Some(10));
    drop(other);
    let (second_log, entry) = (dump(&redis, LOG).await, dump(&redis, ENTRY).await);
    // The first one.
    restore(&redis, LOG, &first_log).await;
    truth.set(1, 11);
    author.cache.expire(&[key(1)], BUDGET).await.unwrap();
    // The second one again, and it goes on.
    restore(&redis, LOG, &second_log).await;
    restore(&redis, ENTRY, &entry).await;
    append_foreign(&redis).await;
    sleep(Duration::from_secs(2)).await; // what was asked of the log before is given up
    proxy.set(Fault::None);
    eventually("nobody is given what was expired", async || {
        (Node::hearing(&truth, &redis.url(), &[]).await.value(1).await == Some(11)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn another_log_is_noticed_though_its_last_notice_has_the_same_id() {
    const REPLACE: &str = "redis.call('DEL', KEYS[1])
      redis.call('XADD', KEYS[1], ARGV[1], 'n', ARGV[2])
      if ARGV[3] then redis.call('XADD', KEYS[1], '*', 'n', ARGV[3]) end";
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let node = Node::hearing(&truth, &redis.url(), &[]).await;
    for (new, goes_on) in [(11, false), (12, true)] {
        node.value(1).await;
        let (id, text) = last_notice(&redis).await;
        let mut parts: Vec<_> = text.splitn(6, ' ').collect();
        parts[4] = "another";
        let (text, next) = (parts.join(" "), format!("{id} another {} {} another thing:2", parts[2], parts[3]));
        truth.set(1, new);
        let mut replace = vec!["EVAL", REPLACE, "1", LOG, &id, &text];
        replace.extend(goes_on.then_some(&*next));
        redis.command(&replace).await;
        eventually("nothing is trusted", async || (node.value(1).await == Some(new)).then_some(())).await;
    }
}

// ---- C6: bounded staleness --------------------------------------------------------------------------------------

#[tokio::test]
async fn memory_is_trusted_for_seconds_only_while_the_log_cannot_be_heard() {
    let redis = RedisServer::start().await;
    let truth = Truth::new(&[(1, 10)]);
    let proxy = Proxy::start(redis.port).await;
    let settings = [&PROMPT[..], &[("CACHE_UNHEARD_MAX_S", "3")]].concat();
    let node = Node::hearing(&truth, &proxy.redis_url(), &settings).await;
    node.value(1).await;
    proxy.set(Fault::Stall);
    truth.set(1, 11);
    let cut = Instant::now();
    let seen = eventually("the entry is no longer fresh", async || {
        node.value(1).await.filter(|value| *value == 11).map(|_| cut.elapsed())
    });
    let after = seen.await;
    // Loads may wait for Redis' deadlines. By default it would be 10 s.
    assert!(after < Duration::from_secs(8), "trusted for {after:?}");
}

#[tokio::test]
async fn what_cannot_be_heard_of_is_trusted_from_the_moment_its_row_was_read() {
    let truth = Truth::new(&[(1, 10)]);
    let nowhere = Some("redis://127.0.0.1:1");
    let node = Node::new(&truth, nowhere, &[("CACHE_UNHEARD_MAX_S", "3"), ("CACHE_SOFT_TIMEOUT_MS", "0")]);
    truth.hold();
    let reader = node.begin(1);
    truth.begun(1).await;
    truth.set(1, 11);
    sleep(Duration::from_secs(2)).await;
    truth.release();
    assert_eq!(value(&ended(reader).await.unwrap()), Some(10), "its load began before the change");
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(node.value(1).await, Some(11));
}

/// Whoever expired something was refused and queued it; the others heard a quiet log, and trusted memory and Redis for as
/// long as entries last.
#[tokio::test]
async fn a_redis_that_answers_reads_and_refuses_writes_is_not_heard() {
    let redis = RedisServer::start_with(&["--save", "3600 100000"]).await;
    let dir: (String, String) = redis::from_redis_value(redis.command(&["CONFIG", "GET", "dir"]).await).unwrap();
    let in_the_way = std::path::Path::new(&dir.1).join("dump.rdb");
    let truth = Truth::new(&[(1, 10)]);
    let settings = [("CACHE_UNHEARD_MAX_S", "3")];
    let a = Node::hearing(&truth, &redis.url(), &settings).await;
    let b = Node::hearing(&truth, &redis.url(), &settings).await;
    for (new, code) in [(11, "NOREPLICAS"), (12, "MISCONF")] {
        a.value(1).await;
        b.value(1).await;
        if code == "NOREPLICAS" {
            redis.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
        } else {
            std::fs::create_dir(&in_the_way).unwrap();
            redis.command(&["BGSAVE"]).await;
        }
        eventually("writes are refused", async || redis.try_command(&["SET", "other", "1"]).await.err()).await;
        truth.set(1, new);
        a.cache.expire(&[key(1)], Duration::from_millis(300)).await.expect_err("nobody can be told");
        eventually("the other no longer trusts its memory", async || (b.value(1).await == Some(new)).then_some(()))
            .await;
        assert_eq!(a.cache.status().expiries_queued, 1, "{code}");
        redis.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
        if code == "MISCONF" {
            redis.command(&["CONFIG", "SET", "stop-writes-on-bgsave-error", "no"]).await;
        }
        eventually("it is told", async || a.cache.owes_nothing().then_some(())).await;
        for node in [&a, &b] {
            let unheard = || node.cache.status().log_unheard_for.unwrap();
            eventually("the log is heard", async || (unheard() < Duration::from_secs(2)).then_some(())).await;
            assert_eq!(node.value(1).await, Some(new), "{code}");
        }
    }
}
