//! What stands between misses and the database: how many loads run at once, how many may wait, none while it is down.
//!
//! Knows nothing of keys. Invariant: losing Redis, or the database itself, at full load never costs the database more
//! than `loads` queries at a time, and while it is down one probe per pause.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};

use super::Failure;
use crate::config;

/// Loads that run, loads that wait, and whether the database is left alone.
pub(super) struct Gate {
    running: Semaphore,
    waiting: Semaphore,
    breaker: Mutex<Breaker>,
    failures_to_open: u32,
    pause: Duration,
}

/// Opens after failures in a row; then lets one load through per pause, until one succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breaker {
    Closed { failures: u32 },
    Open { until: Instant },
    HalfOpen,
}

/// The right to ask the database once. Dropping it without [`Permit::end`] counts as a failure.
pub(super) struct Permit<'a> {
    gate: &'a Gate,
    _running: SemaphorePermit<'a>,
    ended: bool,
}

/// What the database did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It answered.
    Answered,
    /// It did not, or only that it could not.
    Failed,
}

impl Gate {
    pub(super) fn new(config: &config::Cache) -> Self {
        Self {
            running: Semaphore::new(config.loads_max),
            waiting: Semaphore::new(config.loads_queued_max),
            breaker: Mutex::new(Breaker::Closed { failures: 0 }),
            failures_to_open: config.breaker_failures,
            pause: config.breaker_pause,
        }
    }

    /// Waits for a turn; fails at once while the database is left alone or too many wait already.
    pub(super) async fn enter(&self) -> Result<Permit<'_>, Failure> {
        self.check(&self.breaker())?;
        let running = match self.running.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                let too_many = |_| Failure::Unavailable("too many loads are waiting for the database".to_owned());
                let _place = self.waiting.try_acquire().map_err(too_many)?;
                // Never closed; callers bound the wait by the hard timeout.
                self.running.acquire().await.map_err(|_| Failure::Unavailable("stopping".to_owned()))?
            }
        };
        self.admit()?;
        Ok(Permit { gate: self, _running: running, ended: false })
    }

    /// Whether the database is left alone for now.
    pub(super) fn is_open(&self) -> bool {
        !matches!(*self.breaker(), Breaker::Closed { .. })
    }

    fn check(&self, breaker: &Breaker) -> Result<(), Failure> {
        match *breaker {
            Breaker::Closed { .. } => Ok(()),
            Breaker::Open { until } if Instant::now() >= until => Ok(()),
            Breaker::Open { .. } | Breaker::HalfOpen => {
                Err(Failure::Unavailable("the database fails and is left alone for a moment".to_owned()))
            }
        }
    }

    /// Decides for a load whose turn has come: while it waited, the breaker may have opened.
    fn admit(&self) -> Result<(), Failure> {
        let mut breaker = self.breaker();
        self.check(&breaker)?;
        if !matches!(*breaker, Breaker::Closed { .. }) {
            *breaker = Breaker::HalfOpen;
        }
        Ok(())
    }

    fn ended(&self, outcome: Outcome) {
        let mut breaker = self.breaker();
        *breaker = match (*breaker, outcome) {
            (before, Outcome::Answered) => {
                if !matches!(before, Breaker::Closed { .. }) {
                    tracing::info!("the database answers again");
                }
                Breaker::Closed { failures: 0 }
            }
            (Breaker::Closed { failures }, Outcome::Failed) => {
                let failures = failures.saturating_add(1);
                if self.failures_to_open > 0 && failures >= self.failures_to_open {
                    tracing::warn!(failures, pause = ?self.pause, "the database fails; it is left alone but for probes");
                    self.open()
                } else {
                    Breaker::Closed { failures }
                }
            }
            (Breaker::Open { until }, Outcome::Failed) => Breaker::Open { until },
            (Breaker::HalfOpen, Outcome::Failed) => self.open(),
        };
    }

    fn open(&self) -> Breaker {
        // Instances whose database failed at the same moment must not probe at the same moment.
        Breaker::Open { until: Instant::now() + self.pause.mul_f64(rand::random_range(0.75..1.25)) }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit<'_> {
    /// Tells how it went.
    pub(super) fn end(mut self, outcome: Outcome) {
        self.ended = true;
        self.gate.ended(outcome);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.gate.ended(Outcome::Failed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use futures_util::FutureExt;

    use super::*;

    fn gate(settings: &[(&str, &str)]) -> Gate {
        let variables: BTreeMap<_, _> =
            settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Gate::new(&config::Config::from_variables(&variables).expect("valid").cache)
    }

    #[tokio::test]
    async fn more_loads_than_may_run_wait_and_more_than_may_wait_are_refused_at_once() {
        let gate = gate(&[("CACHE_LOADS_MAX", "2"), ("CACHE_LOADS_QUEUED_MAX", "1")]);
        let (first, _second) = (gate.enter().await.expect("runs"), gate.enter().await.expect("runs"));
        let mut third = Box::pin(gate.enter());
        assert!((&mut third).now_or_never().is_none(), "waits");
        assert!(gate.enter().await.is_err(), "refused");
        first.end(Outcome::Answered);
        third.await.expect("its turn").end(Outcome::Answered);
        drop(Box::pin(gate.enter()));
        assert_eq!(gate.waiting.available_permits(), 1, "a place is given back");
    }

    #[tokio::test(start_paused = true)]
    async fn after_failures_in_a_row_one_probe_per_pause_is_let_through_until_one_succeeds() {
        let gate = gate(&[("CACHE_BREAKER_FAILURES", "3"), ("CACHE_BREAKER_PAUSE_MS", "1000")]);
        for _ in 0..3 {
            gate.enter().await.expect("closed").end(Outcome::Failed);
        }
        for _ in 0..3 {
            assert!(gate.is_open() && gate.enter().await.is_err(), "left alone");
            tokio::time::advance(Duration::from_millis(1300)).await;
            let probe = gate.enter().await.expect("a probe");
            assert!(gate.enter().await.is_err(), "and no more than one");
            probe.end(Outcome::Failed);
        }
        tokio::time::advance(Duration::from_millis(1300)).await;
        gate.enter().await.expect("a probe").end(Outcome::Answered);
        assert!(!gate.is_open());
        let (a, b) = (gate.enter().await, gate.enter().await);
        assert!(a.is_ok() && b.is_ok(), "open to all");
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_between_failures_and_a_load_that_vanished_count_as_what_they_are() {
        let gate = gate(&[("CACHE_BREAKER_FAILURES", "2")]);
        gate.enter().await.expect("closed").end(Outcome::Failed);
        gate.enter().await.expect("closed").end(Outcome::Answered);
        gate.enter().await.expect("closed").end(Outcome::Failed);
        assert!(!gate.is_open(), "not in a row");
        drop(gate.enter().await.expect("closed"));
        assert!(gate.is_open(), "a dropped load is a failure");
    }
}
