//! The cache: [`Cache::get_or_load`] reads through memory, Redis and the database; [`Cache::expire`] makes a key stale
//! everywhere; a task listens to what other instances expire.
//!
//! Stores bytes and knows no entity. In reading order: [`entry`] (what is stored), `memory` (L1 and the per-key lock),
//! `load` (the way of a flight), `l2` (Redis), `log` (the invalidation log), `expiry` (the queue towards both).
//! Invariants C1–C8 and S1 of the design hold here; each file names its own.

mod clock;
pub mod entry;
mod expiry;
mod gate;
mod l2;
mod load;
mod log;
mod memory;

use std::{
    fmt,
    hash::{Hash, Hasher},
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch, time::sleep};

use self::{
    clock::Clock,
    l2::L2,
    log::{Floor, Log, News, Scope},
    memory::{Guard, Joined, Memory, Source, Stored},
};
pub use self::{entry::Entry, log::Position};
use crate::{
    background::{Foreground, Sparsely, Task, keep_running},
    config,
    redis::Redis,
};

/// How often a reader starts over because the flight it joined was overtaken, abandoned, or led by somebody content
/// with an older entry. Each further flight began after the reader came, so two nearly always do.
const ATTEMPTS: usize = 16;

/// How long after the start reads wait for the log to be heard for the first time: as long as Redis takes to answer.
const FIRST_HEARING: Duration = Duration::from_millis(250);

/// What an entry is stored under: a kind of thing and its number. Written `product:680`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    kind: &'static str,
    id: i64,
}

impl Key {
    /// The key of one thing.
    pub const fn new(kind: &'static str, id: i64) -> Self {
        Self { kind, id }
    }

    /// The number alone.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Reads what `Display` writes, if the kind is one of `kinds`.
    fn parse(text: &str, kinds: &[&'static str]) -> Option<Self> {
        let (kind, id) = text.split_once(':')?;
        Some(Self { kind: kinds.iter().find(|known| **known == kind)?, id: id.parse().ok()? })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Piece by piece: it is made for every look into Redis.
        f.write_str(self.kind)?;
        f.write_str(":")?;
        f.write_str(itoa::Buffer::new().format(self.id))
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Ids alone spread well; equality still compares the kind.
        state.write_i64(self.id);
    }
}

/// What a [`Load`] found: an entry per key, or why that one cannot be told; keys left out are absent.
pub type Loaded = Vec<(Key, Result<Entry, Failure>)>;
/// A future that a [`Load`] returns. A failure of all of it counts as the database's; one of a single key does not.
pub type Loading = Pin<Box<dyn Future<Output = Result<Loaded, Failure>> + Send>>;
/// Reads entries from the source of truth, in one query. Runs apart from the reader, at most once per key at a time.
pub type Load = Arc<dyn Fn(Vec<Key>) -> Loading + Send + Sync>;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// Nobody could tell: try again later.
    #[error("{0}")]
    Unavailable(String),
    /// A bug.
    #[error("{0}")]
    Broken(String),
}

/// Which level had the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// This process.
    Memory,
    /// Redis.
    Redis,
    /// The database.
    Database,
}

/// Why an answer is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// The database failed, so the last known entry is served.
    DatabaseFailed,
    /// The database is slow, so an entry that merely grew old is served while it is loaded anew.
    DatabaseSlow,
}

/// How an answer came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    /// Where it was found.
    pub level: Level,
    /// The reader waited for a load that another reader had begun.
    pub collapsed: bool,
    /// It was put into memory on the way.
    pub stored: bool,
    /// Set if it is not fresh.
    pub stale: Option<Stale>,
}

impl How {
    /// A fresh entry in memory.
    pub const MEMORY: Self = Self { level: Level::Memory, collapsed: false, stored: false, stale: None };

    fn hit(level: Level) -> Self {
        Self { level, collapsed: false, stored: false, stale: None }
    }

    fn stale(why: Stale) -> Self {
        Self { stale: Some(why), ..Self::hit(Level::Memory) }
    }
}

/// An entry, and how it was come by.
#[derive(Clone, Debug)]
pub struct Answer {
    stored: Stored,
    how: How,
    at: memory::Moment,
}

impl Answer {
    fn new(stored: Stored, how: How, at: memory::Moment) -> Self {
        Self { stored, how, at }
    }

    /// The entry; its bytes stay where they are.
    pub fn entry(&self) -> Entry {
        self.stored.entry()
    }

    /// How it was come by.
    pub fn how(&self) -> How {
        self.how
    }

    /// Time since its load from the database began.
    pub fn age(&self) -> Duration {
        memory::duration(self.at.saturating_sub(self.stored.born))
    }

    /// Seconds for which it is still fresh; not positive for a stale one.
    pub fn ttl_s(&self) -> i64 {
        let left_s = (self.stored.fresh_until - self.at).div_euclid(1_000_000_000);
        if self.how.stale.is_some() { left_s.min(0) } else { left_s }
    }
}

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
    shared: Option<Remote>,
    queue: expiry::Queue,
    gate: gate::Gate,
    /// The [`Floor`] as far as it is known.
    floor_ms: AtomicU64,
    generation: AtomicU64,
    clock: Clock,
    position: Mutex<Option<Position>>,
    heard_once: watch::Sender<bool>,
    failures: Sparsely,
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
        let shared = redis.map(|(redis, settings)| Remote {
            l2: L2::new(redis.clone(), settings, config.lease),
            log: Log::new(redis.clone(), settings, author, kinds),
            redis,
        });
        let inner = Arc::new(Inner {
            config: config.clone(),
            memory: Arc::new(Memory::new(config, &sources)),
            shared,
            queue: expiry::Queue::default(),
            gate: gate::Gate::new(config),
            floor_ms: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            clock: Clock::new(),
            position: Mutex::new(None),
            heard_once: watch::Sender::new(false),
            failures: Sparsely::default(),
        });
        let mut tasks = Vec::new();
        if inner.shared.is_some() {
            let (listening, delivering) = (inner.clone(), inner.clone());
            tasks.push(keep_running(background, "invalidation log", move || listen(listening.clone())));
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

    /// The answers for all these keys, in order: from memory, else from Redis (one round trip for all), else from the
    /// database (one query for all, at most one per key in the cluster).
    ///
    /// Dropping the future ends the wait, not a load from the database. Waits as long as the loads do: callers set a
    /// deadline and fall back to [`Cache::get_stale`].
    pub async fn get_or_load(
        &self,
        keys: &[Key],
        max_age: Option<Duration>,
        load: &Load,
    ) -> Vec<Result<Answer, Failure>> {
        let memory = &self.inner.memory;
        let arrived = memory.now();
        let mut answers: Vec<_> = keys.iter().map(|_| None).collect();
        let mut open: Vec<_> = (0..keys.len()).collect();
        for _ in 0..ATTEMPTS {
            if open.is_empty() {
                break;
            }
            let (mut leads, mut waits) = (Vec::new(), Vec::with_capacity(open.len()));
            for index in open.drain(..) {
                match Wait::join(memory, keys[index], max_age, &mut leads) {
                    Wait::Ready(answer) => answers[index] = Some(Ok(answer)),
                    Wait::For { flight, collapsed } => waits.push((index, flight, collapsed)),
                }
            }
            self.inner.fly(leads, load);
            // All are under way, so that one after the other takes no longer than the last. Asking again waits for the
            // last, too, and then is one batch.
            for (index, flight, collapsed) in waits {
                let (answer, good) = self.settle(&keys[index], &flight, collapsed, arrived, max_age).await;
                answers[index] = Some(answer);
                if !good {
                    open.push(index);
                }
            }
        }
        answers.into_iter().flatten().collect()
    }

    /// The last known entry, fresh or not, if it is young enough to be served at all.
    pub fn get_stale(&self, key: &Key) -> Option<Answer> {
        let stored = self.inner.memory.stale(key, None)?;
        Some(Answer::new(stored, How::stale(Stale::DatabaseFailed), self.inner.memory.now()))
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
        if inner.shared.is_none() {
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

    /// A text that instances leave for those to come. `Ok(None)`: nobody has, or there is no Redis to keep it in.
    pub async fn note(&self, name: &str) -> Result<Option<String>, crate::redis::Error> {
        match &self.inner.shared {
            Some(remote) => remote.l2.note(name).await,
            None => Ok(None),
        }
    }

    /// Leaves such a text; `false` if it was not kept.
    pub async fn keep_note(&self, name: &str, text: &str) -> bool {
        match &self.inner.shared {
            Some(remote) => remote.l2.keep_note(name, text).await,
            None => false,
        }
    }

    /// Makes everything in this process's memory stale: whoever calls this may have missed expiries.
    pub fn forget_memory(&self) {
        self.inner.memory.expire_everything();
    }

    /// All changes that were in the database's feed when this reading `began` have been expired.
    pub fn heard_feed(&self, began: tokio::time::Instant) {
        let moment = self.inner.memory.now() - memory::span(began.elapsed());
        self.inner.memory.heard(Source::Feed, moment);
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
            expiries_queued: if everything { usize::MAX } else { queued },
            breaker_open: inner.gate.is_open(),
            redis_connected: inner.shared.as_ref().map(|remote| remote.redis.is_connected()),
        }
    }

    /// How long a reader still waits before it takes an entry that merely grew old; `None`: as long as it must.
    fn patience(&self, arrived: memory::Moment, max_age: Option<Duration>) -> Option<Duration> {
        let soft_timeout = self.inner.config.soft_timeout;
        let waited = memory::duration(self.inner.memory.now() - arrived);
        (max_age.is_none() && !soft_timeout.is_zero()).then(|| soft_timeout.saturating_sub(waited))
    }

    /// Waits for this reader's flight; gives what it ends with, and whether that is good enough for the reader.
    async fn settle(
        &self,
        key: &Key,
        flight: &Arc<memory::Flight>,
        collapsed: bool,
        arrived: memory::Moment,
        max_age: Option<Duration>,
    ) -> (Result<Answer, Failure>, bool) {
        let landed = match self.patience(arrived, max_age) {
            None => flight.landed(arrived).await,
            Some(patience) => match tokio::time::timeout(patience, flight.landed(arrived)).await {
                Ok(landed) => landed,
                Err(_) => match self.inner.memory.old(key, flight) {
                    Some(answer) => return (Ok(answer), true),
                    None => flight.landed(arrived).await,
                },
            },
        };
        let too_old = || Err(Failure::Unavailable("the entry is expired faster than it can be loaded".to_owned()));
        let Some(landed) = landed else { return (too_old(), false) };
        match landed.result {
            Ok(answer) => {
                let born_since = answer.stored.born >= arrived;
                // C3: what began after this reader came is good for it, whatever happened meanwhile.
                let current = !landed.overtaken || flight.began >= arrived || born_since;
                let young = max_age.is_none_or(|max_age| born_since || answer.age() < max_age);
                if current && (young || answer.how.stale.is_some()) {
                    return (Ok(Answer { how: How { collapsed, ..answer.how }, ..answer }), true);
                }
                (too_old(), false)
            }
            Err(failure) => (Err(failure), !landed.overtaken),
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
    /// Keys whose expiry Redis does not know yet; `usize::MAX`: all.
    pub expiries_queued: usize,
    /// Whether Redis can be reached; `None`: there is none.
    pub redis_connected: Option<bool>,
    /// Whether the database is left alone but for probes.
    pub breaker_open: bool,
}

/// A reader's place.
enum Wait {
    Ready(Answer),
    For { flight: Arc<memory::Flight>, collapsed: bool },
}

impl Wait {
    fn join(memory: &Arc<Memory>, key: Key, max_age: Option<Duration>, leads: &mut Vec<Guard>) -> Self {
        let (flight, collapsed) = match memory.join(key, max_age) {
            Joined::Ready(answer) => return Self::Ready(answer),
            Joined::Wait(flight) => (flight, true),
            Joined::Lead(guard) => {
                let flight = guard.flight.clone();
                leads.push(guard);
                (flight, false)
            }
        };
        Self::For { flight, collapsed }
    }
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
        Floor { ms: self.floor_ms.load(Ordering::Acquire), generation: self.generation.load(Ordering::Acquire) }
    }

    /// Raises the floor, if this is higher; returns the one before.
    fn raise(&self, floor: Floor) -> Floor {
        let ms = self.floor_ms.fetch_max(floor.ms, Ordering::AcqRel);
        Floor { ms, generation: self.generation.fetch_max(floor.generation, Ordering::AcqRel) }
    }

    fn trusts_redis_with(&self, key: &Key) -> bool {
        // The floor, below which entries in Redis are stale, is heard from the log.
        let heard = self.memory.unheard_for(Source::Log).is_some_and(|unheard| unheard <= self.config.unheard_max);
        self.shared.is_some() && heard && !self.queue.has(key)
    }

    /// Waits a moment for the log at the very start, so that the first reads need not go past Redis.
    async fn first_hearing(&self) {
        let left = FIRST_HEARING.saturating_sub(memory::duration(self.memory.now()));
        if !left.is_zero() && !*self.heard_once.borrow() {
            let mut heard_once = self.heard_once.subscribe();
            let _ = tokio::time::timeout(left, heard_once.wait_for(|heard| *heard)).await;
        }
    }
}

/// Hears what other instances expire, for ever.
async fn listen(cache: Arc<Inner>) {
    let Some(remote) = &cache.shared else { return std::future::pending().await };
    let mut reader = remote.log.reader();
    let deaf = Sparsely::default();
    loop {
        remote.redis.log_connected().await;
        let sent = cache.memory.now();
        let heard = match reader.read(cache.clock.is_due(sent), cache.floor()).await {
            Ok(heard) => heard,
            Err(error) => {
                if let Some(unsaid) = deaf.next() {
                    let trusted_s = cache.config.unheard_max.as_secs();
                    tracing::warn!(%error, unsaid, "redis: cannot hear the log; memory is trusted for {trusted_s} s");
                }
                sleep(Duration::from_millis(rand::random_range(50..150))).await;
                continue;
            }
        };
        if let Some(redis_us) = heard.redis_us {
            cache.clock.set(sent, redis_us);
        }
        // Raised before keys are expired, so that what they are loaded from next is already judged by it.
        let known = cache.raise(heard.floor);
        for news in heard.news {
            match news {
                News::Expired(scope) => cache.expire_here(&scope),
                News::Missed => cache.memory.expire_everything(),
                News::Reset => {
                    tracing::warn!("redis: the invalidation log was lost or went back; everything is stale");
                    // Redis may be an older copy of itself: nothing in it is trusted until the floor is raised, which
                    // another instance may have done since.
                    if heard.said_ms <= known.ms {
                        cache.queue.add(&Scope::Everything);
                    }
                    cache.memory.expire_everything();
                }
            }
        }
        if heard.caught_up {
            // As of when the read was sent: a process that was stopped meanwhile must not think it heard just now.
            cache.memory.heard(Source::Log, sent);
            cache.heard_once.send_if_modified(|heard| !mem::replace(heard, true));
        }
        let position = reader.position();
        let before = mem::replace(&mut *cache.position.lock().unwrap_or_else(PoisonError::into_inner), position);
        if heard.caught_up
            && let Some(pause) = remote.log.pause(position != before)
        {
            sleep(pause).await;
        }
    }
}
