//! The instances under test: N processes on one database, each with its own way to it and to one Redis.

use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU16, AtomicU32, Ordering},
    },
    time::Duration,
};

use super::record::Recorder;
use crate::support::{
    database::{DatabaseServer, Engine},
    instance::{Instance, start},
    proxy::Proxy,
    redis::RedisServer,
};

pub const UNHEARD_MAX: Duration = Duration::from_secs(3);
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Written by the test.
pub const KEYS: Range<i64> = 5000..5016;
/// Those of them that are written all the time, and read past the cache too. The others are written every few seconds
/// and only read through it: what an instance has missed about them shows, and nothing but an expiry repairs it.
pub const HOT: Range<i64> = 5000..5004;
/// Never written: read together with the others they make a load slow, so that much can happen while it is under way.
pub const BALLAST: Range<i64> = 6000..6006;
/// The row that all others are copies of.
const TEMPLATE: i64 = 680;
const BALLAST_BYTES: usize = 80_000;

/// What readers and writers share; the nemesis changes it.
pub struct Cluster {
    pub database: DatabaseServer,
    instances: Vec<Place>,
}

/// An instance may die; its place stays.
struct Place {
    proxy: Proxy,
    database_proxy: Proxy,
    /// 0 while it is dead.
    port: AtomicU16,
    life: AtomicU32,
    process: Mutex<Option<Instance>>,
}

impl Cluster {
    /// Starts the instances and gives every key its version 1, which nobody has read before.
    pub async fn start(engine: Engine, instances: usize, redis: &RedisServer, recorder: &Recorder) -> Self {
        let mut cluster = Self { database: DatabaseServer::start(engine).await, instances: Vec::new() };
        for instance in 0..instances {
            cluster.instances.push(Place {
                proxy: Proxy::start(redis.port).await,
                database_proxy: Proxy::start(cluster.database.port).await,
                port: AtomicU16::new(0),
                life: AtomicU32::new(0),
                process: Mutex::new(None),
            });
            cluster.revive(instance, recorder).await;
        }
        let insert = |id: i64| copy_of_template(id, 1);
        let mut sql: String = KEYS.chain(BALLAST).map(insert).collect();
        let photo = match engine {
            Engine::Sqlite => format!("randomblob({BALLAST_BYTES})"),
            _ => format!("decode(repeat(md5(random()::text), {}), 'hex')", BALLAST_BYTES / 16),
        };
        for id in BALLAST {
            sql += &format!("UPDATE product SET ThumbNailPhoto = {photo} WHERE ProductID = {id};");
        }
        cluster.database.sql(&format!("BEGIN; {sql} COMMIT")).await;
        cluster
    }

    pub fn len(&self) -> usize {
        self.instances.len()
    }

    /// Port and life of an instance; `None` while it is dead.
    pub fn address(&self, instance: usize) -> Option<(u16, u32)> {
        let place = &self.instances[instance];
        let life = place.life.load(Ordering::SeqCst);
        Some(place.port.load(Ordering::SeqCst)).filter(|port| *port != 0).map(|port| (port, life))
    }

    pub fn proxy(&self, instance: usize) -> &Proxy {
        &self.instances[instance].proxy
    }

    pub fn database_proxy(&self, instance: usize) -> &Proxy {
        &self.instances[instance].database_proxy
    }

    pub fn signal(&self, instance: usize, name: &str) {
        self.process(instance).as_ref().expect("it lives").signal(name);
    }

    /// What it has written to its log in this life.
    pub fn said(&self, instance: usize) -> String {
        self.process(instance).as_ref().map_or_else(String::new, |process| process.stderr.text())
    }

    pub fn kill(&self, instance: usize) {
        self.instances[instance].port.store(0, Ordering::SeqCst);
        drop(self.process(instance).take());
    }

    /// Starts an instance, for the first time or again.
    pub async fn revive(&self, instance: usize, recorder: &Recorder) {
        let place = &self.instances[instance];
        let life = place.life.load(Ordering::SeqCst) + 1;
        recorder.history().births.push((instance, life, recorder.now()));
        let process = start()
            .env("Sql", self.database.url_by(place.database_proxy.port))
            .env("DATABASE_CONNECT_TIMEOUT_MS", 1000)
            .env("Redis", place.proxy.redis_url())
            .env("FEED_INTERVAL_MS", 0)
            .env("INVALIDATE_BUDGET_MS", 2000)
            .env("CACHE_UNHEARD_MAX_S", UNHEARD_MAX.as_secs())
            .env("CACHE_HARD_TIMEOUT_MS", 2000)
            .env("CACHE_LEASE_MS", 2500)
            .env("CACHE_LEASE_WAIT_MS", 500)
            .env("CACHE_FAIL_SAFE_THROTTLE_S", 1)
            .env("REQUEST_TIMEOUT_MS", REQUEST_TIMEOUT.as_millis())
            .env("HTTP_WORKERS", 2)
            .env("LOG_LEVEL", "warn")
            .listening()
            .await;
        let port = process.port;
        *self.process(instance) = Some(process);
        place.life.store(life, Ordering::SeqCst);
        place.port.store(port, Ordering::SeqCst);
    }

    fn process(&self, instance: usize) -> std::sync::MutexGuard<'_, Option<Instance>> {
        self.instances[instance].process.lock().unwrap()
    }
}

/// SQL that inserts a row which shows this version in two places: a torn row shows two versions.
pub fn copy_of_template(id: i64, version: u64) -> String {
    format!(
        "INSERT INTO product SELECT {id}, 'v{version}', 'H{id}', 'v{version}', StandardCost, ListPrice, Size, Weight, \
         ProductCategoryID, ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, ThumbNailPhoto, \
         ThumbnailPhotoFileName, rowguid, ModifiedDate FROM product WHERE ProductID = {TEMPLATE};"
    )
}
