//! Listening: what other instances expire is expired here, and how long that has not been heard is known.
//!
//! Invariants: C5, what a read of the log may have missed makes everything stale; C6, only what was heard up to the moment
//! a read was sent counts as heard.

use std::{
    mem,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use super::{
    Inner, Readiness,
    log::{News, Scope},
    memory::{Source, duration},
};
use crate::telemetry::LogLimiter;

/// How long after the start reads wait until it is known what in Redis is stale: as long as Redis takes to answer, and the
/// database's feed.
const FIRST_HEARING: Duration = Duration::from_millis(250);

/// How far the last expiry of everything may lie in the future by Redis' clock: more than a read of the log takes, before
/// which the clock was asked.
const CLOCK_SLACK: Duration = Duration::from_secs(5);
/// How long after it was lowered it is not lowered again: expiries may go to another primary than the log is read from.
const LOWER_AGAIN: Duration = Duration::from_secs(60);

impl Inner {
    /// Waits a moment for log and feed at the very start, so that the first reads need not go past Redis.
    pub(super) async fn first_hearing(&self) {
        let left = FIRST_HEARING.saturating_sub(duration(self.memory.now()));
        let is_ready = |readiness: &Readiness| readiness.log_heard.is_some() && readiness.feed_resumed;
        if !left.is_zero() && !is_ready(&self.readiness.borrow()) {
            let mut readiness = self.readiness.subscribe();
            let _ = timeout(left, readiness.wait_for(is_ready)).await;
        }
    }
}

/// Hears what other instances expire, for ever.
pub(super) async fn listen(cache: Arc<Inner>) {
    let Some(remote) = &cache.remote else { return std::future::pending().await };
    let mut reader = remote.log.reader();
    let limiter = LogLimiter::default();
    let (mut deaf, mut lowered) = (false, None::<Instant>);
    loop {
        if timeout(cache.config.unheard_max, remote.redis.log_connected()).await.is_err() {
            deaf = true;
            tracing::warn!("redis: the log has no connection; memory is not trusted any more");
            remote.redis.log_connected().await;
        }
        let sent = cache.memory.now();
        let heard = match reader.read(cache.clock.is_due(sent), cache.floor()).await {
            Ok(heard) => heard,
            Err(error) => {
                if let Some(unsaid) = limiter.next() {
                    deaf = true;
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
        let is_answered = heard.is_answered(cache.floor());
        cache.raise(heard.floor);
        // Until the clock has caught up, nothing that is loaded would count as fresh in Redis.
        let is_ahead = |redis_us| cache.floor().ms > redis_us / 1000 + CLOCK_SLACK.as_millis() as u64;
        if heard.redis_us.is_some_and(is_ahead) && lowered.is_none_or(|last| last.elapsed() >= LOWER_AGAIN) {
            tracing::warn!("redis: the clock went back; everything is stale");
            cache.queue.add(&Scope::Everything);
            lowered = Some(Instant::now());
        }
        for news in heard.news {
            match news {
                News::Expired(scope) => cache.expire_here(&scope),
                News::Missed => cache.memory.expire_everything(),
                News::Reset => {
                    tracing::warn!("redis: the invalidation log was lost or went back; everything is stale");
                    // Redis may be an older copy of itself, or another one: nothing in it is trusted until the floor is
                    // raised.
                    if !is_answered {
                        cache.queue.add(&Scope::Everything);
                    }
                    cache.memory.expire_everything();
                }
            }
        }
        if heard.caught_up {
            // As of when the read was sent: a process that was stopped meanwhile must not think it heard just now.
            cache.memory.heard(Source::Log, sent);
            cache.readiness.send_if_modified(|readiness| {
                let first = readiness.log_heard.is_none();
                readiness.log_heard.get_or_insert(sent);
                first
            });
            if mem::take(&mut deaf) {
                tracing::info!("the invalidation log is heard again");
            }
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
