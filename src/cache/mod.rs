//! The cache: [`Cache::get_or_load`] reads through memory, Redis and the database; [`Cache::expire`] makes a key stale
//! everywhere; a task listens to what other instances expire.
//!
//! Stores bytes and knows no entity. In reading order: `key`, [`entry`] (what is stored), `answer`, `memory` (L1 and the
//! per-key lock), `read` (a reader's way), `load` (a flight's way) with `gate` (before the database), `l2` (Redis) with
//! `clock` (its time), `log` (the invalidation log), `expiry` (the queue towards both), `listen` (what others expire).
//! Invariants C1–C8 and S1 (docs/coherence.md) hold here; each file names its own.

mod answer;
mod clock;
pub mod entry;
mod expiry;
mod gate;
mod key;
mod l2;
mod listen;
mod load;
mod log;
mod memory;
mod read;

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch};

pub use self::{
    answer::{Answer, Failure, How, InMemory, InRedis, Level, Stale},
    entry::Entry,
    key::Key,
    log::Position,
};
use self::{
    clock::Clock,
    l2::L2,
    log::{Floor, Log, Scope},
    memory::{Guard, Memory, Moment, Source, duration},
};
use crate::{
    background::{Task, keep_running},
    config,
    foreground::Foreground,
    redis::Redis,
    telemetry::LogLimiter,
};

/// What a [`Load`] found: an entry per key, or why that one cannot be told; keys left out are absent.
pub type Loaded = Vec<(Key, Result<Entry, Failure>)>;
/// A future that a [`Load`] returns. A failure of all of it counts as the database's; one of a single key does not.
pub type Loading = Pin<Box<dyn Future<Output = Result<Loaded, Failure>> + Send>>;
/// Reads entries from the source of truth, in one query. Runs apart from the reader, at most once per key at a time.
pub type Load = Arc<dyn Fn(Vec<Key>) -> Loading + Send + Sync>;

/// What to listen to for expiries, besides Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// The database's change feed, which calls [`Cache::expire`] and [`Cache::heard_feed`].
    Database,
    /// Nothing.
    None,
}

/// The cache. One per process, made once; it stops its tasks when dropped.
pub struct Cache {
    inner: Arc<Inner>,
    _tasks: Vec<Task>,
}

/// What flights and tasks share.
struct Inner {
    config: config::Cache,
    memory: Arc<Memory>,
    remote: Option<Remote>,
    queue: expiry::Queue,
    gate: gate::Gate,
    /// As far as it is known.
    floor: Mutex<Floor>,
    clock: Clock,
    position: Mutex<Option<Position>>,
    readiness: watch::Sender<Readiness>,
    failures: LogLimiter,
}

/// Whether it is known what in Redis is stale.
struct Readiness {
    /// When the log was heard for the first time.
    log_heard: Option<Moment>,
    /// Whether the feed has told what changed while nobody listened, if there is a feed.
    feed_resumed: bool,
}

/// Everything that is in Redis.
struct Remote {
    redis: Redis,
    l2: L2,
    log: Log,
}

impl Cache {
    /// Builds the cache and starts its tasks: on `background` the one that listens, in `foreground` the one that delivers
    /// expiries, next to the connection that it uses. `kinds` are all kinds of keys there will be.
    pub fn start(
        config: &config::Cache,
        redis: Option<(Redis, &config::Redis)>,
        feed: Feed,
        kinds: &'static [&'static str],
        background: &Handle,
        foreground: &Foreground,
    ) -> Self {
        let mut sources = Vec::new();
        if redis.is_some() {
            sources.push(Source::Log);
        }
        if feed == Feed::Database {
            sources.push(Source::Feed);
        }
        let author = format!("{:016x}", rand::random::<u64>());
        let remote = redis.map(|(redis, settings)| Remote {
            l2: L2::new(redis.clone(), settings, config.lease),
            log: Log::new(redis.clone(), settings, author, kinds),
            redis,
        });
        let inner = Arc::new(Inner {
            config: config.clone(),
            memory: Arc::new(Memory::new(config, &sources)),
            remote,
            queue: expiry::Queue::default(),
            gate: gate::Gate::new(config),
            floor: Mutex::default(),
            clock: Clock::new(),
            position: Mutex::new(None),
            readiness: watch::Sender::new(Readiness { log_heard: None, feed_resumed: feed == Feed::None }),
            failures: LogLimiter::default(),
        });
        let mut tasks = Vec::new();
        if inner.remote.is_some() {
            let (listening, delivering) = (inner.clone(), inner.clone());
            tasks.push(keep_running(background, "invalidation log", move || listen::listen(listening.clone())));
            let foreground = foreground.clone();
            let deliver = move || {
                let (foreground, delivering) = (foreground.clone(), delivering.clone());
                async move { foreground.run(|| expiry::deliver(delivering.clone())).await }
            };
            tasks.push(keep_running(background, "expiries", deliver));
        }
        Self { inner, _tasks: tasks }
    }

    /// The answer from this process's memory, if it has one that is younger than `max_age`. Never waits; one that will
    /// end soon may be loaded anew behind the reader's back, on the tokio runtime that this is called in.
    pub fn get(&self, key: &Key, max_age: Option<Duration>, load: &Load) -> Option<Answer> {
        let answer = self.inner.memory.get(key, max_age)?;
        if self.inner.memory.wants_refresh(&answer) {
            let leads: Vec<_> = self.inner.memory.refresh(*key, &answer).into_iter().collect();
            self.inner.fly(leads, load);
        }
        Some(answer)
    }

    /// What memory has for who accepts only what is younger than `max_age`.
    pub fn held(&self, key: &Key, max_age: Option<Duration>) -> InMemory {
        let memory = &self.inner.memory;
        if memory.get(key, max_age).is_some() {
            InMemory::Usable
        } else if memory.get(key, None).is_some() {
            InMemory::TooOld
        } else if memory.holds(key) {
            InMemory::Stale
        } else {
            InMemory::Nothing
        }
    }

    /// The last known entry, fresh or not, if it is young enough to be served at all.
    pub fn get_stale(&self, key: &Key) -> Option<Answer> {
        let stored = self.inner.memory.stale(key, None)?;
        Some(Answer::stale(stored, Stale::DatabaseFailed, self.inner.memory.now()))
    }

    /// Makes these keys stale here at once, then in Redis and on every other instance.
    ///
    /// `Ok`: Redis holds them no longer as fresh and the notice is in the log (C4). `Err`: Redis could not be reached
    /// within `budget`; the expiry stays queued and is delivered when it can be (C7). Dropping the future cancels
    /// nothing.
    pub async fn expire(&self, keys: &[Key], budget: Duration) -> Result<(), Undelivered> {
        self.expire_scope(Scope::Keys(keys.to_vec()), budget).await
    }

    /// The same for everything there is.
    pub async fn expire_everything(&self, budget: Duration) -> Result<(), Undelivered> {
        self.expire_scope(Scope::Everything, budget).await
    }

    /// Makes these keys stale here alone: for what Redis and the other instances have been told, or will be.
    pub fn expire_here(&self, keys: &[Key]) {
        self.inner.expire_here(&Scope::Keys(keys.to_vec()));
    }

    async fn expire_scope(&self, scope: Scope, budget: Duration) -> Result<(), Undelivered> {
        let inner = &self.inner;
        if inner.remote.is_none() || matches!(&scope, Scope::Keys(keys) if keys.is_empty()) {
            inner.expire_here(&scope);
            return Ok(());
        }
        // Queued first: from now on no flight of these keys looks into Redis, and those that have are overtaken.
        let number = inner.queue.add(&scope);
        inner.expire_here(&scope);
        tokio::time::timeout(budget, inner.queue.delivered(number)).await.map_err(|_| Undelivered { budget })
    }

    /// Whether Redis has been told of every expiry.
    pub fn owes_nothing(&self) -> bool {
        self.inner.queue.len() == (0, false)
    }

    /// Waits until Redis has been told of every expiry.
    pub async fn settled(&self) {
        self.inner.queue.emptied().await;
    }

    /// How far a feed has been told, as an instance left it for others and for those to come. `Ok(None)`: nobody has, or
    /// there is no Redis to keep it in.
    pub async fn checkpoint(&self, name: &str) -> Result<Option<String>, crate::redis::Error> {
        match &self.inner.remote {
            Some(remote) => remote.l2.checkpoint(name).await,
            None => Ok(None),
        }
    }

    /// Leaves such a position; `false` if it was not kept.
    pub async fn keep_checkpoint(&self, name: &str, position: &str) -> bool {
        match &self.inner.remote {
            Some(remote) => remote.l2.keep_checkpoint(name, position).await,
            None => false,
        }
    }

    /// Makes everything stale here alone: whoever calls this may have missed expiries.
    pub fn expire_everything_here(&self) {
        self.inner.memory.expire_everything();
    }

    /// All changes that were in the database's feed when this reading `began` have been expired.
    pub fn heard_feed(&self, began: tokio::time::Instant) {
        let moment = self.inner.memory.now() - memory::span(began.elapsed());
        self.inner.memory.heard(Source::Feed, moment);
    }

    /// All changes up to the last reading of the feed have been expired, those from before this process began too.
    pub fn feed_resumed(&self) {
        self.inner.readiness.send_if_modified(|readiness| !mem::replace(&mut readiness.feed_resumed, true));
    }

    /// How things are, for people.
    pub fn status(&self) -> Status {
        let inner = &self.inner;
        let (entries, bytes) = inner.memory.size();
        let (queued, everything) = inner.queue.len();
        Status {
            entries,
            bytes,
            log_position: *inner.position.lock().unwrap_or_else(PoisonError::into_inner),
            log_unheard_for: inner.memory.unheard_for(Source::Log),
            feed_unheard_for: inner.memory.unheard_for(Source::Feed),
            expiries_queued: queued + usize::from(everything),
            everything_queued: everything,
            breaker_open: inner.gate.is_open(),
            redis_connected: inner.remote.as_ref().map(|remote| remote.redis.is_connected()),
        }
    }
}

/// Redis could not be told of an expiry in time.
#[derive(Debug, thiserror::Error)]
#[error("redis could not be told within {} ms; the expiry stays queued", budget.as_millis())]
pub struct Undelivered {
    budget: Duration,
}

/// How the cache is doing.
#[derive(Clone, Debug)]
pub struct Status {
    /// Entries in memory.
    pub entries: usize,
    /// Their bytes, bookkeeping included.
    pub bytes: u64,
    /// Last notice heard.
    pub log_position: Option<Position>,
    /// How long the log has not been heard; `None`: never yet, or there is none.
    pub log_unheard_for: Option<Duration>,
    /// How long the change feed has not been heard; `None`: never yet, or there is none.
    pub feed_unheard_for: Option<Duration>,
    /// Expiries that Redis does not know of yet: keys, and one of everything.
    pub expiries_queued: usize,
    /// One of them is of everything.
    pub everything_queued: bool,
    /// Whether Redis can be reached; `None`: there is none.
    pub redis_connected: Option<bool>,
    /// Whether the database is left alone but for probes.
    pub breaker_open: bool,
}

impl Inner {
    /// Starts the flights, apart from whoever asked for them.
    fn fly(self: &Arc<Self>, leads: Vec<Guard>, load: &Load) {
        if !leads.is_empty() {
            let flights = load::run(self.clone(), leads, load.clone());
            #[cfg(not(feature = "shuttle"))]
            tokio::spawn(flights);
            #[cfg(feature = "shuttle")] // see memory's tests of interleavings
            drop(shuttle::future::spawn(flights));
        }
    }

    fn expire_here(&self, scope: &Scope) {
        match scope {
            Scope::Keys(keys) => keys.iter().for_each(|key| self.memory.expire(key)),
            Scope::Everything => self.memory.expire_everything(),
        }
    }

    fn floor(&self) -> Floor {
        *self.floor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a floor.
    fn raise(&self, floor: Floor) {
        let mut known = self.floor.lock().unwrap_or_else(PoisonError::into_inner);
        *known = known.and(floor);
    }

    fn trusts_redis_with(&self, key: &Key) -> bool {
        // The floor, below which entries in Redis are stale, is heard from the log.
        let heard = self.memory.unheard_for(Source::Log).is_some_and(|unheard| unheard <= self.config.unheard_max);
        self.remote.is_some() && heard && self.is_told() && !self.queue.has(key)
    }

    /// Whether Redis has been told what changed while no instance ran, or the feed that knows it cannot be read.
    fn is_told(&self) -> bool {
        let Readiness { log_heard, feed_resumed } = *self.readiness.borrow();
        feed_resumed || log_heard.is_some_and(|heard| duration(self.memory.now() - heard) > self.config.unheard_max)
    }
}
