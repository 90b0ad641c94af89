//! Expiries on their way to Redis: queued in memory until L2 is expired and the notice is in the log.
//!
//! One task delivers, all that is queued at a time; callers wait for their own. Invariants: C4, an expiry counts as
//! delivered only after both; C7, what was queued stays queued until then, however long Redis is away, and until then
//! this instance does not trust what Redis says about those keys.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use super::{
    Inner, Key, Remote,
    log::{Floor, Position, Scope},
};

/// Keys remembered while Redis is away; more become "everything". A key costs some 60 bytes.
const MOST_QUEUED: usize = 100_000;
/// Keys per round trip: bounds one pipeline and one notice.
const BATCH: usize = 1_000;
/// Pauses between two attempts: an error that is not a lost connection (which has its own pauses) must not spin.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// What waits to be told to Redis, one item per key.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    added: Notify,
    /// Number of the last addition that was delivered.
    delivered: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    keys: HashMap<Key, Named>,
    everything: Option<Named>,
    last: u64,
}

/// The additions that named an item and are not delivered: the first one's caller waits for it as the latest one's does.
#[derive(Clone, Copy)]
struct Named {
    first: u64,
    latest: u64,
}

impl Named {
    fn by(number: u64) -> Self {
        Self { first: number, latest: number }
    }

    /// What is left of them when all up to this one are delivered.
    fn after(self, delivered: u64) -> Option<Self> {
        (self.latest > delivered).then(|| Self { first: self.first.max(delivered + 1), ..self })
    }
}

impl State {
    fn has(&self, key: &Key) -> bool {
        self.everything.is_some() || self.keys.contains_key(key)
    }
}

impl Queue {
    /// Adds an expiry; returns its number.
    pub(super) fn add(&self, scope: &Scope) -> u64 {
        let mut state = self.state();
        state.last += 1;
        let number = state.last;
        match (scope, state.everything) {
            // "Everything" may be on its way already: what comes now needs another one.
            (_, Some(named)) => state.everything = Some(Named { latest: number, ..named }),
            (Scope::Keys(keys), None) => {
                for key in keys {
                    state.keys.entry(*key).or_insert(Named::by(number)).latest = number;
                }
            }
            (Scope::Everything, None) => state.everything = Some(Named::by(number)),
        }
        if state.keys.len() > MOST_QUEUED || state.everything.is_some() {
            let first = state.keys.drain().map(|(_, named)| named.first).min().unwrap_or(number);
            let named = state.everything.unwrap_or(Named::by(number));
            state.everything = Some(Named { first: named.first.min(first), ..named });
        }
        drop(state);
        self.added.notify_one();
        number
    }

    /// Waits until this addition is delivered.
    pub(super) async fn delivered(&self, number: u64) {
        // The sender lives as long as the queue.
        let _ = self.delivered.subscribe().wait_for(|delivered| *delivered >= number).await;
    }

    /// Waits until nothing is left.
    pub(super) async fn emptied(&self) {
        let _ = self.delivered.subscribe().wait_for(|_| self.len() == (0, false)).await;
    }

    /// Whether Redis may still hold as fresh what this instance knows to be expired.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.state().has(key)
    }

    /// Keys waiting, and whether everything is.
    pub(super) fn len(&self) -> (usize, bool) {
        let state = self.state();
        (state.keys.len(), state.everything.is_some())
    }

    /// Up to a batch of what waits, with the number of the latest addition; `None` if nothing does.
    fn next(&self) -> Option<(Scope, u64)> {
        let state = self.state();
        if state.everything.is_some() {
            return Some((Scope::Everything, state.last));
        }
        let keys: Vec<_> = state.keys.keys().take(BATCH).copied().collect();
        (!keys.is_empty()).then_some((Scope::Keys(keys), state.last))
    }

    /// Takes out what was delivered unless it was added again since, and tells the callers whose all is delivered.
    fn remove(&self, scope: &Scope, up_to: u64) {
        let mut state = self.state();
        match scope {
            Scope::Everything => state.everything = state.everything.and_then(|named| named.after(up_to)),
            Scope::Keys(keys) => {
                for key in keys {
                    if let Some(left) = state.keys.remove(key).and_then(|named| named.after(up_to)) {
                        state.keys.insert(*key, left);
                    }
                }
            }
        }
        let oldest = state.keys.values().copied().chain(state.everything).map(|named| named.first).min();
        let delivered = oldest.map_or(state.last, |oldest| oldest - 1);
        drop(state);
        self.delivered.send_if_modified(|last| {
            let is_news = delivered > *last;
            *last = delivered.max(*last);
            is_news
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Delivers for ever.
pub(super) async fn deliver(cache: Arc<Inner>) {
    let Some(remote) = &cache.remote else { return std::future::pending().await };
    let (shortest, longest) = RETRY_PAUSE;
    let mut pause = shortest;
    loop {
        let Some((scope, number)) = cache.queue.next() else {
            cache.queue.added.notified().await;
            continue;
        };
        match attempt(remote, &scope, cache.floor()).await {
            Ok((notice, floor)) => {
                cache.raise(floor);
                remote.log.appended(notice);
                // Until now a flight could take the old entry from Redis, so once more; from now on Redis does not hold it
                // as fresh.
                cache.expire_here(&scope);
                cache.queue.remove(&scope, number);
                pause = shortest;
            }
            Err(error) => {
                if error.is_wrong_type() {
                    // Somebody else's value under one of our names stops no expiry.
                    if let Scope::Keys(keys) = &scope {
                        remote.l2.remove_unusable(keys).await;
                    }
                    remote.log.remove_unusable().await;
                }
                tracing::warn!(%error, "redis: an expiry is not delivered yet, trying on");
                let _ = timeout(longest, remote.redis.connected()).await;
                sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// Tells Redis and the log; returns the notice's place and the floor.
async fn attempt(remote: &Remote, scope: &Scope, known: Floor) -> Result<(Position, Floor), crate::redis::Error> {
    let expiries = match scope {
        Scope::Keys(keys) => keys.iter().map(|key| remote.l2.expire(key)).collect(),
        // The notice itself raises the floor, below which everything in Redis is stale.
        Scope::Everything => Vec::new(),
    };
    remote.log.append(expiries, scope, known).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Key = Key::new("product", 1);
    const B: Key = Key::new("product", 2);

    #[tokio::test]
    async fn an_addition_is_delivered_when_the_last_of_its_keys_is_gone() {
        let queue = Queue::default();
        let first = queue.add(&Scope::Keys(vec![A, B]));
        queue.remove(&Scope::Keys(vec![A]), first);
        assert!(*queue.delivered.borrow() < first, "B still waits");
        queue.remove(&Scope::Keys(vec![B]), first);
        queue.delivered(first).await;
    }

    #[test]
    fn a_key_added_again_while_it_is_delivered_stays() {
        let queue = Queue::default();
        let first = queue.add(&Scope::Keys(vec![A]));
        let (scope, up_to) = queue.next().expect("A waits");
        let second = queue.add(&Scope::Keys(vec![A]));
        queue.remove(&scope, up_to);
        assert!(queue.has(&A) && !queue.has(&B));
        assert!(*queue.delivered.borrow() >= first && *queue.delivered.borrow() < second);
    }

    #[test]
    fn a_caller_whose_key_was_added_again_waits_until_it_was_delivered() {
        for again in [Scope::Keys(vec![A]), Scope::Everything] {
            let queue = Queue::default();
            queue.add(&Scope::Keys(vec![B]));
            let (scope, up_to) = queue.next().expect("B waits");
            let first = queue.add(&Scope::Keys(vec![A]));
            let second = queue.add(&again);
            queue.remove(&scope, up_to);
            assert!(*queue.delivered.borrow() < first, "B alone was delivered");
            let (scope, up_to) = queue.next().expect("A waits");
            queue.remove(&scope, up_to);
            assert!(*queue.delivered.borrow() >= second);
        }
    }

    #[test]
    fn a_key_added_while_everything_is_on_its_way_needs_another_everything() {
        let queue = Queue::default();
        queue.add(&Scope::Everything);
        let (scope, up_to) = queue.next().expect("everything waits");
        let later = queue.add(&Scope::Keys(vec![A]));
        queue.remove(&scope, up_to);
        assert!(queue.has(&A) && *queue.delivered.borrow() < later);
    }

    #[test]
    fn too_many_keys_become_everything_and_nothing_is_forgotten() {
        let queue = Queue::default();
        queue.add(&Scope::Keys((0..=MOST_QUEUED as i64).map(|id| Key::new("product", id)).collect()));
        assert_eq!(queue.len(), (0, true));
        assert!(queue.has(&A) && queue.has(&Key::new("product", i64::MAX)));
    }
}
