//! Reading through the levels: joins or leads a flight per key, and waits for it as long as the reader has patience.
//!
//! Invariants: C1, of all who ask for a key one leads; C3, nobody is given what began before an expiry that it came after.

use std::{sync::Arc, time::Duration};

use super::{
    Answer, Cache, Failure, How, Key, Load,
    memory::{Flight, Joined, Moment, duration},
};

/// How often a reader starts over because the flight it joined was overtaken, abandoned, or led by somebody content
/// with an older entry. Each further flight began after the reader came, so two nearly always do.
const ATTEMPTS: usize = 16;

impl Cache {
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
                let (flight, collapsed) = match memory.join(keys[index], max_age) {
                    Joined::Ready(answer) => {
                        answers[index] = Some(Ok(answer));
                        continue;
                    }
                    Joined::Wait(flight) => (flight, true),
                    Joined::Lead(guard) => {
                        let flight = guard.flight.clone();
                        leads.push(guard);
                        (flight, false)
                    }
                };
                waits.push((index, flight, collapsed));
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

    /// How long a reader still waits before it takes an entry that merely grew old; `None`: as long as it must.
    fn patience(&self, arrived: Moment, max_age: Option<Duration>) -> Option<Duration> {
        let soft_timeout = self.inner.config.soft_timeout;
        let waited = duration(self.inner.memory.now() - arrived);
        (max_age.is_none() && !soft_timeout.is_zero()).then(|| soft_timeout.saturating_sub(waited))
    }

    /// Waits for this reader's flight; gives what it ends with, and whether that is good enough for the reader.
    async fn settle(
        &self,
        key: &Key,
        flight: &Arc<Flight>,
        collapsed: bool,
        arrived: Moment,
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
