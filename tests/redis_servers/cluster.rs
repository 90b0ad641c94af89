//! A real Redis Cluster: any node leads to the right one, and primaries that die, stall or hand their slot over cost
//! no read and lose no expiry for good.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use product_cache::cache::Level;
use tokio::{
    task::JoinHandle,
    time::{Duration, Instant, sleep, timeout},
};

use crate::support::{
    PATIENCE, PROMPT, eventually,
    node::{BUDGET, Node, Truth, key, value},
    redis_cluster::RedisCluster,
};

const UNHEARD_S: u64 = 3;
/// How long after its acknowledgement an expiry may go unnoticed while the cluster changes: as long as an instance
/// trusts its memory without hearing, and the blocking read, the attempt to connect and the pause before.
const LATEST: Duration = Duration::from_secs(UNHEARD_S + 5);

async fn node(truth: &Truth, string: &str) -> Arc<Node> {
    Arc::new(Node::hearing(truth, string, &[]).await)
}

/// One that leaves a node soon that does not answer, and does not trust its memory for long.
async fn prompt_node(truth: &Truth, string: &str) -> Arc<Node> {
    let unheard = UNHEARD_S.to_string();
    let settings = [&PROMPT[..], &[("CACHE_UNHEARD_MAX_S", &unheard)]].concat();
    Arc::new(Node::hearing(truth, string, &settings).await)
}

async fn all_keys(cluster: &RedisCluster) -> Vec<i64> {
    let mut sizes = Vec::new();
    for node in &cluster.nodes[..3] {
        sizes.push(redis::from_redis_value(node.command(&["DBSIZE"]).await).unwrap());
    }
    sizes
}

#[tokio::test]
async fn any_node_leads_to_the_one_that_holds_all_keys() {
    let cluster = RedisCluster::start_steady().await;
    let owner = cluster.owner().await;
    let truth = Truth::new(&(1..=50).map(|id| (id, id as u64 * 10)).collect::<Vec<_>>());
    let first = node(&truth, &cluster.string(&[owner])).await;
    let keys: Vec<_> = (1..=50).map(key).collect();
    first.cache.get_or_load(&keys, None, &first.load).await;
    assert_eq!(truth.loads(), 1);
    for place in 0..6 {
        let other = node(&truth, &cluster.string(&[place])).await;
        let pieces = cluster.nodes[owner].info("stats", "total_reads_processed").await.parse::<u64>().unwrap();
        let answers = other.cache.get_or_load(&keys, None, &other.load).await;
        let read = cluster.nodes[owner].info("stats", "total_reads_processed").await.parse::<u64>().unwrap() - pieces;
        assert!(answers.into_iter().all(|answer| answer.unwrap().how().level == Level::Redis), "by node {place}");
        assert!(read < 30, "fifty keys are one round trip, beside the log's, the replica's and this test's: {read}");
    }
    assert_eq!(truth.loads(), 1, "one query for the cluster");
    let mut sizes = all_keys(&cluster).await;
    assert_eq!(sizes.remove(owner), 51, "entries and log");
    assert_eq!(sizes, [0, 0]);
}

/// Readers and a writer at work, and what they have seen.
struct Load {
    goes_on: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
    from_redis: Arc<AtomicUsize>,
    told: Arc<AtomicUsize>,
    wrong: Arc<Mutex<Vec<String>>>,
    tasks: Vec<JoinHandle<()>>,
}

/// By key: when, and which version.
type Acknowledged = HashMap<i64, Vec<(Instant, u64)>>;

const KEYS: i64 = 24;

impl Load {
    /// Versions are written, expired on the first node, and read on all; no read may fail, and none may be older than
    /// what was acknowledged [`LATEST`] before it began.
    fn begin(truth: &Truth, nodes: &[Arc<Node>]) -> Self {
        let goes_on = Arc::new(AtomicBool::new(true));
        let (reads, from_redis, told) = Default::default();
        let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
        let acknowledged: Arc<Mutex<Acknowledged>> = Arc::default();
        let mut load = Self { goes_on, reads, from_redis, told, wrong, tasks: Vec::new() };

        let (truth, writer, goes_on, told) = (truth.clone(), nodes[0].clone(), load.goes_on.clone(), load.told.clone());
        let noted = acknowledged.clone();
        load.tasks.push(tokio::spawn(async move {
            let mut version = 1000;
            while goes_on.load(Ordering::SeqCst) {
                version += 1;
                let id = version as i64 % KEYS;
                truth.set(id, version);
                if writer.cache.expire(&[key(id)], BUDGET).await.is_ok() {
                    told.fetch_add(1, Ordering::SeqCst);
                    noted.lock().unwrap().entry(id).or_default().push((Instant::now(), version));
                }
                sleep(Duration::from_millis(3)).await;
            }
        }));
        for (place, node) in nodes.iter().enumerate() {
            let (node, goes_on, noted) = (node.clone(), load.goes_on.clone(), acknowledged.clone());
            let (reads, from_redis, wrong) = (load.reads.clone(), load.from_redis.clone(), load.wrong.clone());
            load.tasks.push(tokio::spawn(async move {
                let mut id = 0;
                while goes_on.load(Ordering::SeqCst) {
                    id = (id + 1) % KEYS;
                    let began = Instant::now();
                    let answer = node.try_read(id).await;
                    reads.fetch_add(1, Ordering::SeqCst);
                    match answer {
                        Err(failure) => wrong.lock().unwrap().push(format!("node {place}, {id}: {failure}")),
                        Ok(answer) => {
                            if answer.how().level == Level::Redis {
                                from_redis.fetch_add(1, Ordering::SeqCst);
                            }
                            let seen = value(&answer).unwrap();
                            let noted = noted.lock().unwrap();
                            let due = noted.get(&id).and_then(|noted| {
                                noted.iter().rev().find(|(at, _)| *at + LATEST < began).map(|(_, version)| *version)
                            });
                            if due.is_some_and(|due| seen < due) {
                                wrong.lock().unwrap().push(format!("node {place}, {id}: {seen} after {due:?}"));
                            }
                        }
                    }
                    sleep(Duration::from_millis(1)).await;
                }
            }));
        }
        load
    }

    /// Waits for this many more reads answered by Redis, and as many acknowledged expiries.
    async fn until_redis_is_used_again(&self) {
        let (from_redis, told) = (self.from_redis.load(Ordering::SeqCst), self.told.load(Ordering::SeqCst));
        eventually("redis is used again", async || {
            let used = self.from_redis.load(Ordering::SeqCst) > from_redis + 20;
            (used && self.told.load(Ordering::SeqCst) > told + 20).then_some(())
        })
        .await;
    }

    /// Ends it, and looks whether every node shows what is true.
    async fn end(self, truth: &Truth, nodes: &[Arc<Node>]) {
        self.goes_on.store(false, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        let wrong = self.wrong.lock().unwrap().clone();
        assert!(
            wrong.is_empty(),
            "{} of {}: {:?}",
            wrong.len(),
            self.reads.load(Ordering::SeqCst),
            &wrong[..wrong.len().min(5)]
        );
        for (place, node) in nodes.iter().enumerate() {
            for id in 0..KEYS {
                let expected = truth.0.values.lock().unwrap()[&id];
                eventually(&format!("node {place} shows {id} as it is"), async || {
                    (node.value(id).await == Some(expected)).then_some(())
                })
                .await;
            }
        }
    }
}

/// While the log is still here and a key is there already, the two are expired and told of by different nodes.
#[tokio::test]
async fn a_notice_follows_its_expiry_while_they_are_on_different_nodes() {
    let cluster = RedisCluster::start_steady().await;
    let slot = cluster.slot().await.to_string();
    let from = cluster.owner().await;
    let (source, target) = (&cluster.nodes[from], &cluster.nodes[(from + 1) % 3]);
    let truth = Truth::new(&[(1, 10), (2, 20)]);
    let nodes = [node(&truth, &cluster.string(&[0])).await, node(&truth, &cluster.string(&[1])).await];
    for id in [1, 2] {
        nodes[0].value(id).await;
    }
    target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source.id().await]).await;
    source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target.id().await]).await;
    let port = target.port.to_string();
    source.command(&["MIGRATE", "127.0.0.1", &port, "{product-cache}:thing:1", "0", "1000"]).await;
    assert_eq!(nodes[1].read(1).await.how().level, Level::Redis, "read there");
    assert_eq!(nodes[1].read(2).await.how().level, Level::Redis, "and here");

    for (id, notices) in [(1, 2), (2, 1)] {
        let length =
            async || redis::from_redis_value::<i64>(source.command(&["XLEN", "{product-cache}:log"]).await).unwrap();
        let before = length().await;
        truth.set(id, 99);
        nodes[0].cache.expire(&[key(id)], BUDGET).await.expect("told");
        // The first may have been told before the key was expired, so it is told once more.
        assert_eq!(length().await - before, notices, "{id}");
        eventually("the other hears", async || (nodes[1].value(id).await == Some(99)).then_some(())).await;
    }
}

#[tokio::test]
async fn a_node_that_a_slot_moves_to_and_that_hangs_costs_no_read() {
    let cluster = RedisCluster::start_steady().await;
    let slot = cluster.slot().await.to_string();
    let from = cluster.owner().await;
    let (source, target) = (&cluster.nodes[from], &cluster.nodes[(from + 1) % 3]);
    let truth = Truth::new(&(0..100).map(|id| (id, 1)).collect::<Vec<_>>());
    // Longer than a read may wait: whoever waits for a connection, and then the next, would never come to an end.
    let settings = [&PROMPT[..], &[("REDIS_CONNECT_TIMEOUT_MS", "3000"), ("CACHE_LEASE_WAIT_MS", "500")]].concat();
    let node = Node::hearing(&truth, &cluster.string(&[from]), &settings).await;
    target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source.id().await]).await;
    source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target.id().await]).await;
    target.signal("STOP");
    let reads = futures_util::future::join_all((0..100).map(|id| node.try_read(id)));
    let answers = timeout(PATIENCE, reads).await.expect("they end");
    target.signal("CONT");
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

fn truth() -> Truth {
    Truth::new(&(0..KEYS).map(|id| (id, 1)).collect::<Vec<_>>())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_is_killed_costs_no_read_and_its_replica_is_used_after_it() {
    let mut cluster = RedisCluster::start().await;
    let (truth, owner) = (truth(), cluster.owner().await);
    // The second knows at first only the one that will be killed.
    let (another, this) = (cluster.string(&[(owner + 1) % 3]), cluster.string(&[owner]));
    let nodes = [prompt_node(&truth, &another).await, prompt_node(&truth, &this).await];
    let load = Load::begin(&truth, &nodes);
    load.until_redis_is_used_again().await;
    cluster.nodes[owner].kill();
    eventually("the replica is promoted", async || cluster.owner_by((owner + 1) % 3).await.filter(|now| *now != owner))
        .await;
    load.until_redis_is_used_again().await;
    cluster.nodes[owner].restart().await;
    cluster.until_whole().await;
    load.until_redis_is_used_again().await;
    load.end(&truth, &nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_stalls_is_left_for_its_replica_and_is_not_believed_when_it_goes_on() {
    let cluster = RedisCluster::start().await;
    let (truth, owner) = (truth(), cluster.owner().await);
    let (all, this) = (cluster.string(&[0, 1, 2]), cluster.string(&[owner]));
    let nodes = [prompt_node(&truth, &all).await, prompt_node(&truth, &this).await];
    let load = Load::begin(&truth, &nodes);
    load.until_redis_is_used_again().await;
    cluster.nodes[owner].signal("STOP");
    let stopped = Instant::now();
    eventually("the replica is promoted", async || cluster.owner_by((owner + 1) % 3).await.filter(|now| *now != owner))
        .await;
    load.until_redis_is_used_again().await;
    let took = stopped.elapsed();
    cluster.nodes[owner].signal("CONT");
    println!("cluster: redis used again {} ms after its primary stalled", took.as_millis());
    cluster.until_whole().await;
    load.until_redis_is_used_again().await;
    load.end(&truth, &nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_to_another_node_is_followed_key_by_key() {
    let cluster = RedisCluster::start_steady().await;
    let (truth, slot) = (truth(), cluster.slot().await.to_string());
    let from = cluster.owner().await;
    let to = (from + 1) % 3;
    let nodes = [prompt_node(&truth, &cluster.string(&[0])).await, prompt_node(&truth, &cluster.string(&[1])).await];
    let load = Load::begin(&truth, &nodes);
    load.until_redis_is_used_again().await;

    let (source, target) = (&cluster.nodes[from], &cluster.nodes[to]);
    target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source.id().await]).await;
    source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target.id().await]).await;
    load.until_redis_is_used_again().await;
    // New entries are made at the target from now on, so the load itself moves what it expires; the rest, one by one.
    loop {
        let keys: Vec<String> =
            redis::from_redis_value(source.command(&["CLUSTER", "GETKEYSINSLOT", &slot, "5"]).await).unwrap();
        if keys.is_empty() {
            break;
        }
        for name in keys {
            let port = target.port.to_string();
            source.command(&["MIGRATE", "127.0.0.1", &port, &name, "0", "1000", "REPLACE"]).await;
            sleep(Duration::from_millis(20)).await;
        }
    }
    // Everything is at the one and still the other's: every command takes the detour, the log too.
    load.until_redis_is_used_again().await;
    eventually("two detours for each instance, a replica, and what MIGRATE left are there", async || {
        (target.clients().await <= 2 * 2 + 2).then_some(())
    })
    .await;
    for node in [target, source] {
        node.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &target.id().await]).await;
    }
    load.until_redis_is_used_again().await;
    eventually("everybody has gone there", async || {
        (target.clients().await > 6 && source.clients().await <= 2).then_some(())
    })
    .await;
    load.end(&truth, &nodes).await;
}
