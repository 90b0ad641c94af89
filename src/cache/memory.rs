//! L1: entries in this process's memory, and which keys are being loaded.
//!
//! Owns freshness, the byte bound and the per-key lock (a *flight*: one load that any number of readers wait for).
//! Knows neither Redis nor the database. Invariants: C1, at most one joinable flight per key; C3, a flight's result is
//! kept only if its key was not expired since the flight began, whatever came first.

mod flight;
#[cfg(all(test, feature = "shuttle"))]
mod interleavings;
mod stored;

use std::{
    collections::HashMap,
    hash::BuildHasher,
    sync::{Arc, OnceLock},
    time::Duration,
};

// Locks and atomics are `interleavings`' where those are tested: the one place where the two builds differ, but for
// `Inner::fly`.
#[cfg(feature = "shuttle")]
use shuttle::sync as primitives;
#[cfg(not(feature = "shuttle"))]
use std::sync as primitives;

use self::primitives::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, sync};
use tokio::{sync::Notify, time::Instant};

use self::stored::{Footprint, Life, footprint};
pub(super) use self::{
    flight::{Flight, Purpose},
    stored::{Moment, Stored, Times, duration, span},
};
use super::{Answer, Entry, Failure, How, Key, Stale};
use crate::config;

/// Locks for the flights: far more than threads, so that two keys rarely meet.
const LOCKS: usize = 64;
/// No source of expiries to listen to.
const NOT_NEEDED: i64 = i64::MAX;

/// Where expiries are heard from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// The invalidation log.
    Log,
    /// The database's change feed.
    Feed,
}

/// How a reader came to its flight.
pub(super) enum Joined {
    /// No flight is needed.
    Ready(Answer),
    /// Wait for this one.
    Wait(Arc<Flight>),
    /// Nobody loads it: the caller must, or drop the guard.
    Lead(Guard),
}

type Flights = HashMap<Key, Arc<Flight>, DefaultHashBuilder>;

pub(super) struct Memory {
    entries: sync::Cache<Key, Stored, Footprint>,
    flights: Vec<Mutex<Flights>>,
    hasher: DefaultHashBuilder,
    /// Raised to make everything stale at once.
    epoch: AtomicU64,
    /// When that was last.
    raised: AtomicI64,
    heard: [AtomicI64; 2],
    started: Instant,
    eager_factor: f64,
    throttle: i64,
    unheard_max: i64,
    fail_safe_max: i64,
    max_body_bytes: usize,
}

impl Memory {
    /// `sources` are the places expiries come from; each counts as unheard until it is first heard.
    pub(super) fn new(config: &config::Cache, sources: &[Source]) -> Self {
        // Each shard is bounded by itself, so a shard must have room for several of the largest bodies.
        let largest = config::LARGEST_SHARE * footprint(config.max_body_bytes as u64);
        let shards = (config.l1_max_bytes / largest).clamp(1, 64).next_power_of_two() as usize;
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity((config.l1_max_bytes / 1024) as usize)
            .weight_capacity(config.l1_max_bytes)
            .build()
            .unwrap_or_else(|error| unreachable!("both capacities are given: {error}"));
        let memory = Self {
            entries: sync::Cache::with_options(options, Footprint, Default::default(), Default::default()),
            flights: (0..LOCKS).map(|_| Mutex::default()).collect(),
            hasher: DefaultHashBuilder::default(),
            epoch: AtomicU64::new(0),
            raised: AtomicI64::new(Moment::MIN),
            heard: [const { AtomicI64::new(NOT_NEEDED) }; 2],
            started: Instant::now(),
            eager_factor: f64::from(config.eager_factor),
            throttle: span(config.fail_safe_throttle),
            unheard_max: span(config.unheard_max),
            fail_safe_max: span(config.fail_safe_max),
            max_body_bytes: config.max_body_bytes,
        };
        for source in sources {
            memory.heard[*source as usize].store(Moment::MIN, Ordering::Relaxed);
        }
        memory
    }

    pub(super) fn now(&self) -> Moment {
        span(self.started.elapsed())
    }

    /// The moment up to which an entry is known not to be expired. Redis still held it as fresh, or under its lease, when
    /// it was `asked`, so no expiry of its key came before. An expiry of everything touches neither and is told by the
    /// log alone: hence no later than the log was heard.
    pub(super) fn known(&self, born: Moment, asked: Moment) -> Moment {
        born.max(asked.min(self.heard[Source::Log as usize].load(Ordering::Acquire)))
    }

    /// A copy that is no longer fresh; `expired` unless it merely grew old.
    pub(super) fn stale_copy(&self, entry: &Entry, age: Duration, expired: bool, flight: &Flight) -> Stored {
        let now = self.now();
        let times = Times { born: now - span(age), known: now, fresh_until: now };
        let copy = flight.brings(entry, times, Duration::ZERO);
        copy.expired.store(expired, Ordering::Relaxed);
        copy
    }

    /// Whether an entry of these bytes may be kept at all.
    pub(super) fn accepts(&self, packed: &[u8]) -> bool {
        packed.len() <= self.max_body_bytes
    }

    /// The answer from memory alone: fresh, or stale while its database is being left alone after a failure.
    pub(super) fn get(&self, key: &Key, max_age: Option<Duration>) -> Option<Answer> {
        let stored = self.entries.get(key)?;
        let now = self.now();
        let heard = self.heard_everywhere();
        if self.is_fresh(&stored, now, heard) {
            let young = max_age.is_none_or(|max_age| now.saturating_sub(stored.born) < span(max_age));
            return young.then(|| Answer { right_at: right_at(&stored, heard), stored, how: How::MEMORY, at: now });
        }
        // Who wants it young wants to have it asked for.
        let left_alone = max_age.is_none() && self.is_left_alone(&stored, now) && self.may_serve_stale(&stored, now);
        left_alone.then(|| {
            let why = if stored.slow.load(Ordering::Relaxed) { Stale::DatabaseSlow } else { Stale::DatabaseFailed };
            Answer::stale(stored, why, now)
        })
    }

    /// Whether there is an entry, fresh or not.
    pub(super) fn holds(&self, key: &Key) -> bool {
        self.entries.peek(key).is_some()
    }

    /// Whether a fresh answer is close enough to its end to be loaded anew: XFetch (Vattani, Chierichetti and
    /// Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", 2015), so that the longer a load takes and the
    /// more often an entry is read, the likelier one reader loads it in time.
    pub(super) fn wants_refresh(&self, answer: &Answer) -> bool {
        let stored = &answer.stored;
        let left = (stored.fresh_until - answer.at) as f64;
        let lead = stored.took as f64 * self.eager_factor;
        // The logarithm is above 20 twice in a thousand million times; until then there is nothing to draw.
        left < lead * 20.0
            && answer.how.stale.is_none()
            && answer.at >= stored.retry_at.load(Ordering::Relaxed)
            && left <= lead * -rand::random::<f64>().ln()
    }

    /// Leads a flight that refreshes what `answer` holds, unless one is under way already.
    pub(super) fn refresh(self: &Arc<Self>, key: Key, answer: &Answer) -> Option<Guard> {
        /// Redis counts milliseconds, and its copy of this very entry must not pass for a younger one.
        const SLACK: Duration = Duration::from_millis(100);
        let mut flights = self.flights(&key);
        if flights.contains_key(&key) {
            return None;
        }
        let younger = answer.age().saturating_sub(SLACK);
        let flight = self.flight(Some(younger), Purpose::Refresh, self.epoch.load(Ordering::Acquire));
        flights.insert(key, flight.clone());
        Some(Guard { memory: self.clone(), key, flight })
    }

    /// What a reader gets whose patience with this flight ends: an entry that merely grew old, if there is one. Later
    /// readers then get it at once, while the flight goes on.
    pub(super) fn old(&self, key: &Key, flight: &Arc<Flight>) -> Option<Answer> {
        let flights = self.flights(key);
        if !flights.get(key).is_some_and(|current| Arc::ptr_eq(current, flight)) {
            return None; // it has landed or was overtaken: there is something better to wait for
        }
        let (now, epoch) = (self.now(), self.epoch.load(Ordering::Acquire));
        let merely_old = |stored: &Stored| {
            !stored.expired.load(Ordering::Acquire) && stored.epoch == epoch && self.may_serve_stale(stored, now)
        };
        let here = self.entries.peek(key).filter(merely_old);
        let stored = match here {
            Some(stored) => stored,
            None => {
                let stored = flight.old.get().filter(|stored| merely_old(stored)).cloned()?;
                self.entries.insert(*key, stored.clone());
                stored
            }
        };
        let heard = self.heard_everywhere();
        if self.is_fresh(&stored, now, heard) {
            // Too old for whoever leads the flight, and for nobody else.
            return Some(Answer { right_at: right_at(&stored, heard), stored, how: How::MEMORY, at: now });
        }
        stored.slow.store(true, Ordering::Relaxed);
        stored.retry_at.store(now.saturating_add(self.throttle), Ordering::Relaxed);
        Some(Answer::stale(stored, Stale::DatabaseSlow, now))
    }

    /// Whether no attempt to load is made for now. An expiry ends that, of the key or of everything.
    fn is_left_alone(&self, stored: &Life, now: Moment) -> bool {
        let retry_at = stored.retry_at.load(Ordering::Relaxed);
        now < retry_at && retry_at.saturating_sub(self.throttle) > self.raised.load(Ordering::Acquire)
    }

    /// Up to when expiries have been heard from all their sources; [`NOT_NEEDED`] if there are none.
    fn heard_everywhere(&self) -> Moment {
        let [log, feed] = &self.heard;
        log.load(Ordering::Acquire).min(feed.load(Ordering::Acquire))
    }

    fn is_fresh(&self, stored: &Life, now: Moment, heard: Moment) -> bool {
        // C6: known to be right when it was read, and as of the last time that expiries were heard.
        !stored.expired.load(Ordering::Acquire)
            && now < stored.fresh_until
            && stored.epoch == self.epoch.load(Ordering::Acquire)
            && now.saturating_sub(stored.known.max(heard)) <= self.unheard_max
    }

    fn may_serve_stale(&self, stored: &Stored, now: Moment) -> bool {
        // "Absent" is not worth keeping: while nobody can tell, 404 would be a lie.
        stored.is_found() && now.saturating_sub(stored.born) < self.fail_safe_max
    }

    /// The copy in memory, if it is still fresh; else the younger of it and `other`, if one may be served stale. What is
    /// known to be absent has none.
    pub(super) fn stale(&self, key: &Key, other: Option<Stored>) -> Option<Stored> {
        let (now, heard) = (self.now(), self.heard_everywhere());
        let here = self.entries.peek(key);
        let is_absent = here.as_ref().is_some_and(|here| !here.is_found() && self.is_fresh(here, now, heard));
        // `other` may be another copy of the same one.
        let candidates = here.into_iter().chain(other.filter(|_| !is_absent));
        let candidates = candidates.filter(|stored| self.may_serve_stale(stored, now));
        candidates.max_by_key(|stored| (self.is_fresh(stored, now, heard), stored.born))
    }

    /// Joins the flight of this key, becomes its leader, or finds that neither is needed any more.
    pub(super) fn join(self: &Arc<Self>, key: Key, max_age: Option<Duration>) -> Joined {
        let mut flights = self.flights(&key);
        // A flight may have landed between the caller's look and this lock.
        if let Some(answer) = self.get(&key, max_age) {
            return Joined::Ready(answer);
        }
        let epoch = self.epoch.load(Ordering::Acquire);
        match flights.get(&key) {
            Some(flight) if flight.epoch == epoch => Joined::Wait(flight.clone()),
            _ => {
                let flight = self.flight(max_age, Purpose::Miss, epoch);
                if let Some(old) = flights.insert(key, flight.clone()) {
                    old.overtake();
                }
                Joined::Lead(Guard { memory: self.clone(), key, flight })
            }
        }
    }

    fn flight(&self, max_age: Option<Duration>, purpose: Purpose, epoch: u64) -> Arc<Flight> {
        Arc::new(Flight {
            began: self.now(),
            max_age,
            purpose,
            old: OnceLock::new(),
            epoch,
            overtaken: AtomicBool::new(false),
            landed: OnceLock::new(),
            has_news: Notify::new(),
        })
    }

    /// Makes a key's entry stale and its flight useless for whoever comes from now on.
    pub(super) fn expire(&self, key: &Key) {
        let mut flights = self.flights(key);
        if let Some(flight) = flights.remove(key) {
            flight.overtake();
        }
        match self.entries.peek(key) {
            Some(stored) if stored.is_found() => {
                stored.retry_at.store(Moment::MIN, Ordering::Relaxed);
                stored.expired.store(true, Ordering::Release);
            }
            Some(_) => drop(self.entries.remove(key)),
            None => {}
        }
    }

    /// Makes everything stale and every flight useless for whoever comes from now on.
    pub(super) fn expire_everything(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.raised.fetch_max(self.now(), Ordering::AcqRel);
    }

    /// All expiries up to `moment` have been heard from `source`.
    pub(super) fn heard(&self, source: Source, moment: Moment) {
        // Whoever sees it sees the expiries, too.
        self.heard[source as usize].fetch_max(moment, Ordering::Release);
    }

    /// How long ago `source` was last heard; `None` if it never was or is not needed.
    pub(super) fn unheard_for(&self, source: Source) -> Option<Duration> {
        match self.heard[source as usize].load(Ordering::Acquire) {
            NOT_NEEDED | Moment::MIN => None,
            heard => Some(duration(self.now() - heard)),
        }
    }

    /// Entries and their bytes.
    pub(super) fn size(&self) -> (usize, u64) {
        (self.entries.len(), self.entries.weight())
    }

    fn flights(&self, key: &Key) -> MutexGuard<'_, Flights> {
        let lock = &self.flights[self.hasher.hash_one(key) as usize % LOCKS];
        // Nothing panics while holding it; if something did, the map would still be whole.
        lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// When what is fresh was last known to be right, if expiries have been `heard` up to then.
fn right_at(stored: &Life, heard: Moment) -> Moment {
    if heard == NOT_NEEDED { stored.known } else { stored.known.max(heard) }
}

/// The duty to end a flight. Dropping it abandons the flight: its readers wake and one of them leads anew.
pub(super) struct Guard {
    memory: Arc<Memory>,
    pub(super) key: Key,
    pub(super) flight: Arc<Flight>,
}

impl Guard {
    /// Ends the flight with an entry, kept in memory if the key was not expired meanwhile.
    pub(super) fn land(self, stored: Stored, how: How) {
        let mut flights = self.memory.flights(&self.key);
        let overtaken = !self.leave(&mut flights);
        let kept = !overtaken && self.memory.accepts(stored.as_ref());
        if kept {
            self.memory.entries.insert(self.key, stored.clone());
        }
        drop(flights);
        let right_at = if overtaken { stored.known } else { right_at(&stored, self.memory.heard_everywhere()) };
        let answer = Answer { stored, how: How { stored: kept, ..how }, at: self.memory.now(), right_at };
        self.flight.land(Ok(answer), overtaken);
    }

    /// Ends the flight with an entry that may be older than an expiry, which others know of.
    pub(super) fn land_overtaken(self, stored: Stored, how: How) {
        self.leave(&mut self.memory.flights(&self.key));
        let answer = Answer { right_at: stored.known, stored, how, at: self.memory.now() };
        self.flight.land(Ok(answer), true);
    }

    /// Ends the flight with a failure: a stale copy, if there is one, is the answer until the throttle's time is over.
    pub(super) fn fail(self, failure: Failure, stale: Option<Stored>) {
        let now = self.memory.now();
        let mut flights = self.memory.flights(&self.key);
        let overtaken = !self.leave(&mut flights);
        let result = match self.memory.stale(&self.key, stale) {
            None => Err(failure),
            Some(stored) => {
                if !overtaken {
                    stored.slow.store(false, Ordering::Relaxed);
                    stored.retry_at.store(now.saturating_add(self.memory.throttle), Ordering::Relaxed);
                    self.memory.entries.insert(self.key, stored.clone());
                }
                Ok(Answer::stale(stored, Stale::DatabaseFailed, now))
            }
        };
        drop(flights);
        self.flight.land(result, overtaken);
    }

    /// Takes the flight out of the table; `false` if an expiry has overtaken it.
    fn leave(&self, flights: &mut Flights) -> bool {
        if flights.get(&self.key).is_some_and(|current| Arc::ptr_eq(current, &self.flight)) {
            flights.remove(&self.key);
        }
        // An expiry of everything leaves the table as it is and raises the epoch.
        !self.flight.overtaken.load(Ordering::Acquire) && self.flight.epoch == self.memory.epoch.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.flight.landed.get().is_none() {
            self.leave(&mut self.memory.flights(&self.key));
            self.flight.land(Err(Failure::Broken("the load was abandoned".to_owned())), true);
        }
    }
}
