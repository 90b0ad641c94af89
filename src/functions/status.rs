//! What an instance says of itself: `GET /`, and a line in the log now and then.
//!
//! Owns the counters. Invariant: asks nobody, neither Redis nor the database.

use std::{
    array,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::json;

use super::App;
use crate::{
    background::{self, Task, keep_running},
    cache::{Answer, Level},
};

/// What is counted.
#[derive(Clone, Copy)]
pub(super) enum Counter {
    Memory,
    Redis,
    Database,
    Stale,
    Loads,
    ExpiredKeys,
    Bugs,
}

/// How many [`Counter`]s there are.
const COUNTERS: usize = Counter::Bugs as usize + 1;

/// How often what happened, since the process began.
#[derive(Default)]
pub(super) struct Counts([AtomicU64; COUNTERS]);

impl Counts {
    pub(super) fn add(&self, counter: Counter, times: u64) {
        self.0[counter as usize].fetch_add(times, Ordering::Relaxed);
    }

    pub(super) fn count(&self, answer: &Answer) {
        let counter = match (answer.how().stale, answer.how().level) {
            (Some(_), _) => Counter::Stale,
            (None, Level::Memory) => Counter::Memory,
            (None, Level::Redis) => Counter::Redis,
            (None, Level::Database) => Counter::Database,
        };
        self.add(counter, 1);
    }

    /// In the order of [`Counter`].
    pub(super) fn read(&self) -> [u64; COUNTERS] {
        array::from_fn(|counter| self.0[counter].load(Ordering::Relaxed))
    }
}

impl App {
    /// What `GET /` shows.
    pub(super) fn status(&self) -> serde_json::Value {
        let [memory, redis, database, stale, loads, expired_keys, bugs] = self.counts.read();
        let cache = self.cache.status();
        let seconds = |unheard: Option<Duration>| unheard.map(|unheard| unheard.as_secs_f64());
        json!({
            "name": env!("CARGO_PKG_NAME"),
            "version": env!("CARGO_PKG_VERSION"),
            "uptimeSeconds": self.started.elapsed().as_secs(),
            "answers": { "memory": memory, "redis": redis, "database": database, "stale": stale },
            "loads": loads,
            "breakerOpen": cache.breaker_open,
            "expiredKeys": expired_keys,
            "bugs": bugs + background::panics(),
            "memory": { "entries": cache.entries, "bytes": cache.bytes },
            "redis": cache.redis_connected.map(|connected| json!({
                "connected": connected,
                "logPosition": cache.log_position.map(|position| position.to_string()),
                "logUnheardSeconds": seconds(cache.log_unheard_for),
                "expiriesQueued": cache.expiries_queued,
                "everythingQueued": cache.everything_queued,
            })),
            "changeFeed": self.database.feed_interval().map(|interval| json!({
                "intervalSeconds": interval.as_secs_f64(),
                "unheardSeconds": seconds(cache.feed_unheard_for),
            })),
        })
    }

    /// Writes a line every `LOG_STATUS_S` of what was counted since the last one, if anything was, until the task is
    /// dropped; `None` if that is off. Where nobody can ask an instance, it is all there is to see of it.
    pub fn report(self: &Arc<Self>) -> Option<Task> {
        let (app, interval) = (self.clone(), self.config.log_status);
        let report = move || report(app.clone(), interval);
        (!interval.is_zero()).then(|| keep_running(&self.background, "status", report))
    }
}

async fn report(app: Arc<App>, interval: Duration) {
    let read = || {
        let mut counts = app.counts.read();
        counts[Counter::Bugs as usize] += background::panics();
        counts
    };
    let mut before = read();
    loop {
        tokio::time::sleep(interval).await;
        let now = read();
        if now != before {
            let [memory, redis, database, stale, loads, expired_keys, bugs] = array::from_fn(|at| now[at] - before[at]);
            let cache = app.cache.status();
            let (entries, bytes, queued) = (cache.entries, cache.bytes, cache.expiries_queued);
            let [log_unheard_s, feed_unheard_s] =
                [cache.log_unheard_for, cache.feed_unheard_for].map(|unheard| unheard.map(|unheard| unheard.as_secs()));
            #[rustfmt::skip] // a list of names
            tracing::info!(
                memory, redis, database, stale, loads, expired_keys, bugs, entries, bytes, queued, log_unheard_s,
                feed_unheard_s, "status"
            );
        }
        before = now;
    }
}
