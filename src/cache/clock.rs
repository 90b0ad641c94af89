//! Redis' clock as this instance knows it, so that whoever looks into Redis need not ask for the time, too.
//!
//! Redis says its time once a second, with the log. Invariant: while Redis' clock runs on, what is told here is never
//! behind it, so that no entry seems younger or fresher than it is. Where that clock is set anew, ages and ends are off
//! by as much until it is asked again and answers; which entry came before which expiry is not told by it (see
//! [`Floor`](super::log::Floor)).

use std::sync::atomic::{AtomicI64, Ordering};

use super::memory::Moment;

/// How old the last answer may be before Redis is asked again, in nanoseconds.
const ASK_AGAIN: i64 = 1_000_000_000;
const UNKNOWN: i64 = i64::MIN;

pub(super) struct Clock {
    /// Redis' time minus ours, in nanoseconds. Never too small: Redis answered at the moment it was asked, or later.
    ahead: AtomicI64,
    asked: AtomicI64,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { ahead: AtomicI64::new(UNKNOWN), asked: AtomicI64::new(UNKNOWN) }
    }

    /// Whether Redis is to be asked again.
    pub(super) fn is_due(&self, now: Moment) -> bool {
        now.saturating_sub(self.asked.load(Ordering::Relaxed)) >= ASK_AGAIN
    }

    /// Redis, asked at this moment or later, said this (microseconds).
    pub(super) fn set(&self, asked: Moment, redis_us: u64) {
        let redis = i64::try_from(redis_us).ok().and_then(|redis_us| redis_us.checked_mul(1000));
        if let Some(ahead) = redis.and_then(|redis| redis.checked_sub(asked)) {
            self.ahead.store(ahead, Ordering::Relaxed);
            self.asked.store(asked, Ordering::Relaxed);
        }
    }

    /// Redis' milliseconds at this moment; `None` before it ever said them.
    pub(super) fn redis_ms(&self, now: Moment) -> Option<u64> {
        let ahead = Some(self.ahead.load(Ordering::Relaxed)).filter(|ahead| *ahead != UNKNOWN)?;
        u64::try_from(now.checked_add(ahead)? / 1_000_000).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Moment = 1_000_000_000;

    #[test]
    fn redis_time_runs_on_from_when_it_was_asked_and_is_asked_again_after_a_second() {
        let clock = Clock::new();
        assert!(clock.is_due(0) && clock.redis_ms(0).is_none());
        clock.set(5 * SECOND, 1_700_000_000_000_900);
        assert_eq!(clock.redis_ms(5 * SECOND), Some(1_700_000_000_000));
        assert_eq!(clock.redis_ms(5 * SECOND + 100_000), Some(1_700_000_000_001));
        assert_eq!(clock.redis_ms(7 * SECOND), Some(1_700_000_002_000));
        assert!(!clock.is_due(6 * SECOND - 1) && clock.is_due(6 * SECOND));
    }

    #[test]
    fn a_time_that_cannot_be_is_none() {
        let clock = Clock::new();
        clock.set(SECOND, u64::MAX);
        assert_eq!(clock.redis_ms(SECOND), None);
        clock.set(SECOND, 0);
        assert_eq!(clock.redis_ms(0), None, "before Redis' time began");
        assert_eq!(clock.redis_ms(Moment::MAX), Some((Moment::MAX - SECOND) as u64 / 1_000_000));
    }
}
