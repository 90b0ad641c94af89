//! One entry in memory: its bytes, and until when it is what.

use std::{ops::Deref, time::Duration};

use bytes::Bytes;
use quick_cache::Weighter;
use triomphe::ThinArc;

use super::{
    super::{Entry, Key},
    primitives::atomic::{AtomicBool, AtomicI64},
};

/// Nanoseconds since the process's cache was made; negative for what was loaded elsewhere before.
pub(in crate::cache) type Moment = i64;

/// An entry in memory, and until when it is what: one allocation, which a hit reads from its start.
#[derive(Clone, Debug)]
pub(in crate::cache) struct Stored(ThinArc<Life, u8>);

#[derive(Debug)]
pub(in crate::cache) struct Life {
    /// When the load that made it began.
    pub(in crate::cache) born: Moment,
    /// Until when it is fresh if nothing expires it.
    pub(in crate::cache) fresh_until: Moment,
    /// The moment up to which it is known not to be expired, unless expiries are heard.
    pub(super) known: Moment,
    /// How long its load took.
    pub(super) took: i64,
    pub(super) epoch: u64,
    pub(super) expired: AtomicBool,
    /// Until when no other attempt to load is made on its behalf; a stale copy is served meanwhile.
    pub(super) retry_at: AtomicI64,
    /// The reason for that is a slow database, not a failing one.
    pub(super) slow: AtomicBool,
}

/// The times that differ from one way of loading to the other; see [`Life`].
#[derive(Clone, Copy)]
pub(in crate::cache) struct Times {
    pub(in crate::cache) born: Moment,
    pub(in crate::cache) known: Moment,
    pub(in crate::cache) fresh_until: Moment,
}

impl Stored {
    pub(super) fn new(life: Life, entry: &Entry) -> Self {
        Self(ThinArc::from_header_and_slice(life, entry.packed()))
    }

    /// What is stored; its bytes stay where they are.
    pub(in crate::cache) fn entry(&self) -> Entry {
        if self.is_found() { Entry::from_packed(Bytes::from_owner(self.clone())) } else { Entry::Absent }
    }

    pub(super) fn is_found(&self) -> bool {
        !self.as_ref().is_empty()
    }
}

impl Deref for Stored {
    type Target = Life;

    fn deref(&self) -> &Life {
        &self.0.header.header
    }
}

impl AsRef<[u8]> for Stored {
    /// As [`Entry::packed`] gives them.
    fn as_ref(&self) -> &[u8] {
        &self.0.slice
    }
}

/// What an entry takes of the process's memory: its bytes, some 190 of bookkeeping (`Stored`, the slot in quick_cache,
/// the share of its index), and half on top for what the allocator rounds up and cannot use again at once. Measured as
/// growth of the resident set with bodies of 0.4 to 4.5 kB in steady replacement; the test of that name repeats it.
pub(super) const fn footprint(bytes: u64) -> u64 {
    (bytes + 190) * 3 / 2
}

#[derive(Clone)]
pub(super) struct Footprint;

impl Weighter<Key, Stored> for Footprint {
    fn weight(&self, _: &Key, stored: &Stored) -> u64 {
        footprint(stored.as_ref().len() as u64)
    }
}

/// A duration as a difference of moments.
pub(in crate::cache) fn span(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// A difference of moments as a duration; a negative one is none.
pub(in crate::cache) fn duration(span: i64) -> Duration {
    Duration::from_nanos(u64::try_from(span).unwrap_or(0))
}
