//! Who reads and writes: tasks that go on until they are told to stop, and note all they do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use tokio::{
    sync::RwLock,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    cluster::{BALLAST, Cluster, HOT, KEYS, copy_of_template},
    record::{Acknowledgement, Read, Recorder, Seen, Write},
};
use crate::support::{
    http::{self, Reply},
    instance::try_invalidate,
};

/// Longer than any pause of an instance: a delivery that is not answered was lost with its instance.
const DELIVERY: Duration = Duration::from_secs(30);
const NO_CACHE: &[(&str, &str)] = &[("cache-control", "no-cache")];

/// What the tasks share.
#[derive(Clone)]
pub struct World {
    pub cluster: Arc<Cluster>,
    pub recorder: Arc<Recorder>,
    pub seed: u64,
    /// Held for reading by each change from its beginning to its acknowledgement.
    pub changing: Arc<RwLock<()>>,
    pub writing: Arc<AtomicBool>,
    pub reading: Arc<AtomicBool>,
    /// How long the machine has not run this process, in milliseconds.
    pub hiccups: Arc<AtomicU64>,
}

impl World {
    fn dice(&self, salt: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ salt.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// One task per key, so that each key's changes come one after another.
    pub fn write(&self) -> Vec<JoinHandle<()>> {
        KEYS.map(|key| tokio::spawn(write_for_ever(self.clone(), key))).collect()
    }

    /// On each instance: single reads, reads of all, reads past the cache, and slow ones.
    pub fn read(&self) -> Vec<JoinHandle<()>> {
        let (all, hot): (Vec<_>, Vec<_>) = (KEYS.collect(), HOT.collect());
        let with_ballast: Vec<_> = HOT.chain(BALLAST).collect();
        let mut tasks = Vec::new();
        for instance in 0..self.cluster.len() {
            for _ in 0..2 {
                tasks.push(self.reader(instance, all.clone(), 1, &[], 6));
            }
            tasks.push(self.reader(instance, all.clone(), all.len(), &[], 40));
            tasks.push(self.reader(instance, hot.clone(), 1, NO_CACHE, 25));
            tasks.push(self.reader(instance, hot.clone(), 3, NO_CACHE, 60));
            tasks.push(self.reader(instance, with_ballast.clone(), with_ballast.len(), NO_CACHE, 250));
        }
        tasks
    }

    /// Reads `count` of these keys at a time, with pauses of `pause_ms` on average.
    fn reader(
        &self,
        instance: usize,
        keys: Vec<i64>,
        count: usize,
        headers: &'static [(&str, &str)],
        pause_ms: u64,
    ) -> JoinHandle<()> {
        let world = self.clone();
        let mut dice = self.dice((instance as u64) << 32 | (count as u64) << 16 | pause_ms);
        tokio::spawn(async move {
            while world.reading.load(Ordering::SeqCst) {
                // Half of the single reads are of a key that is written all the time.
                let single = if dice.random() { dice.random_range(0..2) } else { dice.random_range(0..keys.len()) };
                let chosen = match count {
                    1 => vec![keys[single]],
                    count => keys.iter().copied().choose_multiple(&mut dice, count),
                };
                world.read_once(instance, &chosen, headers).await;
                sleep(Duration::from_millis(dice.random_range(0..=2 * pause_ms))).await;
            }
        })
    }

    /// Reads these keys in one GET and notes what was seen of those that are written.
    pub async fn read_once(&self, instance: usize, keys: &[i64], headers: &[(&str, &str)]) -> Vec<Seen> {
        let Some((port, life)) = self.cluster.address(instance) else { return Vec::new() };
        let list = keys.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        let from = self.recorder.now();
        let reply = http::try_send(port, "GET", &format!("/api/GetProductById?productid={list}"), headers, "").await;
        let to = self.recorder.now();
        let status = reply.as_ref().map_or("", |reply| reply.header("cache-status")).to_owned();
        let seen = seen(keys, reply);
        let noted = keys.iter().zip(&seen).filter(|(key, _)| KEYS.contains(key));
        let reads = noted.map(|(key, seen)| {
            let (seen, status) = (seen.clone(), status.clone());
            Read { instance, life, key: *key, from, to, seen, status, alone: keys.len() == 1 }
        });
        self.recorder.history().reads.extend(reads);
        seen
    }
}

fn seen(keys: &[i64], reply: Result<Reply, String>) -> Vec<Seen> {
    let every = |seen: Seen| vec![seen; keys.len()];
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) => return every(Seen::Nothing(error)),
    };
    let nonsense = || Seen::Nonsense(format!("{}: {:.300}", reply.status, String::from_utf8_lossy(&reply.body)));
    match (reply.status, keys) {
        (404, [_]) => every(Seen::Absent),
        (503, _) => every(Seen::Unavailable),
        (200, keys) => match serde_json::from_slice(&reply.body) {
            Ok(serde_json::Value::Array(products)) if keys.len() > 1 && products.len() == keys.len() => keys
                .iter()
                .zip(&products)
                .map(|(key, product)| {
                    let version = || version(*key, product).map_or_else(nonsense, Seen::Version);
                    if product.is_null() { Seen::Absent } else { version() }
                })
                .collect(),
            Ok(product) if keys.len() == 1 => every(version(keys[0], &product).map_or_else(nonsense, Seen::Version)),
            _ => every(nonsense()),
        },
        _ => every(nonsense()),
    }
}

/// The version of a whole product with this id.
fn version(key: i64, product: &serde_json::Value) -> Option<u64> {
    let (name, color) = (product["name"].as_str()?, product["color"].as_str()?);
    let whole = product["productID"] == key && name == color && product.as_object()?.len() == 17;
    name.strip_prefix('v')?.parse().ok().filter(|_| whole)
}

async fn write_for_ever(world: World, key: i64) {
    let mut dice = world.dice(key as u64);
    let pause_ms = match key - KEYS.start {
        0..2 => 60,
        _ if HOT.contains(&key) => 700,
        _ => 6000,
    };
    let (mut version, mut exists) = (1, true);
    while world.writing.load(Ordering::SeqCst) {
        let pause = Duration::from_millis(dice.random_range(0..2 * pause_ms));
        let stopped = async {
            while world.writing.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(pause, stopped).await.is_ok() {
            return;
        }
        let _changing = world.changing.read().await;
        version += 1;
        let deleted = exists && dice.random_ratio(1, 6);
        let sql = match (exists, deleted) {
            (_, true) => format!("DELETE FROM product WHERE ProductID = {key}"),
            (true, _) => {
                format!("UPDATE product SET Name = 'v{version}', Color = 'v{version}' WHERE ProductID = {key}")
            }
            (false, _) => copy_of_template(key, version),
        };
        exists = !deleted;
        let begun = world.recorder.now();
        let place = {
            let mut history = world.recorder.history();
            // Noted before it happens, as it may be seen before this task hears of it.
            history.writes.push(Write { key, version, deleted, begun, committed: begun, acknowledged: None });
            history.writes.len() - 1
        };
        world.cluster.database.sql(&sql).await;
        world.recorder.history().writes[place].committed = world.recorder.now();

        let acknowledged = deliver(&world, key, &mut dice).await;
        world.recorder.history().writes[place].acknowledged = Some(acknowledged);
        if dice.random_ratio(1, 10) {
            // The host lost the lease of a batch that was carried out, and delivers it once more.
            let instance = dice.random_range(0..world.cluster.len());
            if let Some((port, _)) = world.cluster.address(instance) {
                let _ = timeout(DELIVERY, try_invalidate(port, &[key])).await;
            }
        }
    }
}

/// Delivers a change as the host does: to any instance, until one says yes. Every other time, the host has attempts for
/// one failure only: then the instance that failed must deliver by itself what it has queued (C7), unless it dies.
async fn deliver(world: &World, key: i64, dice: &mut StdRng) -> Acknowledgement {
    let gives_up = dice.random();
    let mut ids = vec![key];
    if dice.random_ratio(1, 4) {
        ids.extend(KEYS.choose_multiple(dice, 2));
    }
    sleep(Duration::from_millis(dice.random_range(0..20))).await;
    loop {
        let instance = dice.random_range(0..world.cluster.len());
        if let Some((port, _)) = world.cluster.address(instance) {
            let answer = timeout(DELIVERY, try_invalidate(port, &ids)).await;
            let status = answer.map_or(0, |answer| answer.map_or(0, |reply| reply.status));
            let at = world.recorder.now();
            if status == 200 {
                return Acknowledgement { at, instance, late: false };
            }
            if status == 503
                && gives_up
                && let Some(at) = delivered_later(world, port).await
            {
                return Acknowledgement { at, instance, late: true };
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// When this process says that nothing is queued any more; `None` if it dies before.
async fn delivered_later(world: &World, port: u16) -> Option<super::record::Time> {
    loop {
        let reply = timeout(DELIVERY, http::try_send(port, "GET", "/", &[], "")).await.ok()?.ok()?;
        if reply.json()["redis"]["expiriesQueued"] == 0 {
            return Some(world.recorder.now());
        }
        sleep(Duration::from_millis(50)).await;
    }
}
