//! One load of one key, and who waits for it.

use std::{sync::OnceLock, time::Duration};

use tokio::sync::Notify;

use super::{
    super::{Answer, Entry, Failure},
    Moment, Stored,
    primitives::atomic::{AtomicBool, AtomicI64, Ordering},
    stored::{Life, Times, span},
};

/// What a flight ends with. Every reader gets a clone.
#[derive(Clone, Debug)]
pub(in crate::cache) struct Landed {
    pub(in crate::cache) result: Result<Answer, Failure>,
    /// The key was expired while the flight was under way.
    pub(in crate::cache) overtaken: bool,
}

/// Why a flight is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) enum Purpose {
    /// Readers wait for it.
    Miss,
    /// What is in memory will end soon and is asked for often.
    Refresh,
}

/// One load of one key.
#[derive(Debug)]
pub(in crate::cache) struct Flight {
    pub(in crate::cache) began: Moment,
    pub(in crate::cache) max_age: Option<Duration>,
    pub(in crate::cache) purpose: Purpose,
    /// A copy from Redis that nobody expired, for readers whose patience ends.
    pub(super) old: OnceLock<Stored>,
    pub(super) epoch: u64,
    pub(super) overtaken: AtomicBool,
    pub(super) landed: OnceLock<Landed>,
    /// It has landed, or was overtaken.
    pub(super) has_news: Notify,
}

impl Flight {
    /// What this flight found, to be stored; its load took `took`.
    pub(in crate::cache) fn brings(&self, entry: &Entry, times: Times, took: Duration) -> Stored {
        let life = Life {
            born: times.born,
            fresh_until: times.fresh_until,
            known: times.known,
            took: span(took),
            epoch: self.epoch,
            expired: AtomicBool::new(false),
            retry_at: AtomicI64::new(Moment::MIN),
            slow: AtomicBool::new(false),
        };
        Stored::new(life, entry)
    }

    /// Offers a copy that nobody expired to readers whose patience ends.
    pub(in crate::cache) fn offer(&self, old: Stored) {
        let _ = self.old.set(old);
    }

    /// Waits for the end, which always comes: see [`Guard`]. `None`: it will be of no use to a reader who `arrived` then.
    pub(in crate::cache) async fn landed(&self, arrived: Moment) -> Option<Landed> {
        loop {
            let has_news = self.has_news.notified(); // from here on nothing is missed
            if let Some(landed) = self.landed.get() {
                return Some(landed.clone());
            }
            if self.overtaken.load(Ordering::Acquire) && self.began < arrived {
                return None;
            }
            has_news.await;
        }
    }

    pub(super) fn overtake(&self) {
        self.overtaken.store(true, Ordering::Release);
        self.has_news.notify_waiters();
    }

    pub(super) fn land(&self, result: Result<Answer, Failure>, overtaken: bool) {
        let _ = self.landed.set(Landed { result, overtaken });
        self.has_news.notify_waiters();
    }
}
