//! What a read ends with.

use std::time::Duration;

use super::{
    entry::Entry,
    memory::{Moment, Stored, duration},
};

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

/// What Redis said about what memory did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InRedis {
    /// Nothing: it was not asked, or did not say.
    Unknown,
    /// It had it, fresh for so many seconds more.
    Fresh {
        /// Whole seconds.
        ttl_s: u64,
    },
    /// It had it fresh, but older than the reader would take it.
    TooOld,
    /// It had a stale copy.
    Stale,
    /// It had none.
    Absent,
}

/// What memory has for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InMemory {
    /// No entry.
    Nothing,
    /// One that answers nobody before it has been asked for anew.
    Stale,
    /// One that is older than the reader would take it.
    TooOld,
    /// An answer.
    Usable,
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
    /// What Redis said, if this reader's flight asked it.
    pub redis: InRedis,
    /// The reader waited for a load that another reader had begun.
    pub collapsed: bool,
    /// It was put into memory on the way.
    pub stored: bool,
    /// Set if it is not fresh.
    pub stale: Option<Stale>,
}

impl How {
    /// A fresh entry in memory.
    pub const MEMORY: Self = Self::hit(Level::Memory);

    pub(super) const fn hit(level: Level) -> Self {
        Self { level, redis: InRedis::Unknown, collapsed: false, stored: false, stale: None }
    }

    pub(super) fn stale(why: Stale) -> Self {
        Self { stale: Some(why), ..Self::hit(Level::Memory) }
    }
}

/// An entry, and how it was come by.
#[derive(Clone, Debug)]
pub struct Answer {
    pub(super) stored: Stored,
    pub(super) how: How,
    /// When it was given.
    pub(super) at: Moment,
    /// When it was last known to be right.
    pub(super) right_at: Moment,
}

impl Answer {
    pub(super) fn stale(stored: Stored, why: Stale, at: Moment) -> Self {
        Self { right_at: stored.born, stored, how: How::stale(why), at }
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
        duration(self.at.saturating_sub(self.stored.born))
    }

    /// Time since it was last known to be right: read from the database, or not among the changes heard up to then.
    pub fn unverified_for(&self) -> Duration {
        duration(self.at.saturating_sub(self.right_at))
    }

    /// Seconds for which it is still fresh; not positive for a stale one.
    pub fn ttl_s(&self) -> i64 {
        let left_s = (self.stored.fresh_until - self.at).div_euclid(1_000_000_000);
        if self.how.stale.is_some() { left_s.min(0) } else { left_s }
    }
}
