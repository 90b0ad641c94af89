//! The database's change feed → expiries, for where no host delivers the SQL trigger.
//!
//! Knows how often to ask and what to do when the feed fails. Invariant: the position moves on only after what was read
//! has been expired here (and is queued for Redis), so a failure in between repeats changes and loses none. With Redis
//! the position is kept there once all before it is in the log: what changes while no instance runs is not served from
//! Redis afterwards, and what one instance has told the others need not tell.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use super::{App, Counter};
use crate::{
    cache::Key,
    database::{Error, Position},
    product,
};

/// How long the feed waits for Redis to take an expiry. Afterwards it stays queued and the feed goes on.
const PATIENCE: Duration = Duration::from_secs(1);
/// Least time between two looks, where the engine tells of commits; and before the first.
const SHORTEST: Duration = Duration::from_millis(10);
/// Full pages one after the other that make everything stale: to tell each of so many keys, by every instance that reads them
/// at the same time, would cost more than to load what is asked for anew.
const MANY_PAGES: usize = 3;
/// What the position is kept under in Redis.
const CHECKPOINT: &str = "feed";

/// Follows the feed for ever.
pub(super) async fn follow(app: Arc<App>, interval: Duration) {
    let mut follower = Follower { app: &app, position: None, resumed: false, kept: None, pages: 0 };
    let mut failing = false;
    // Whoever asks as soon as the port is open goes first, and has the database's first connection.
    sleep(SHORTEST).await;
    loop {
        let began = Instant::now();
        match follower.step().await {
            Ok(more) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("the change feed is heard again");
                }
                if more {
                    continue;
                }
                app.cache.heard_feed(began);
                if follower.resumed {
                    app.cache.feed_resumed();
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the change feed cannot be heard; trying on");
                }
            }
        }
        // Instances that started together must not ask together.
        let pause = interval.mul_f64(rand::random_range(0.9..=1.0));
        app.database.wait_for_changes(&product::TABLE, pause).await;
        // A writer that commits all the time must not make every instance ask all the time.
        sleep_until(began + SHORTEST.mul_f64(rand::random_range(1.0..2.0))).await;
        if app.config.redis.is_some() {
            // A commit wakes all instances. Whoever comes first tells the others.
            sleep_until((Instant::now() + SHORTEST.mul_f64(rand::random_range(0.0..2.0))).min(began + pause)).await;
        }
    }
}

struct Follower<'a> {
    app: &'a App,
    position: Option<Position>,
    /// Whether what changed before this process began has been made up for in Redis.
    resumed: bool,
    /// The position that Redis keeps, as far as this process knows.
    kept: Option<Position>,
    /// Full pages that were read one after the other.
    pages: usize,
}

impl Follower<'_> {
    /// Reads one page and expires what it names. `true`: there is more.
    async fn step(&mut self) -> Result<bool, Error> {
        let (cache, database) = (&self.app.cache, &self.app.database);
        if self.position.is_none() {
            self.position = Some(database.latest_change(&product::TABLE).await?);
            // What was read into memory before there was a position may have changed since.
            cache.expire_everything_here();
        }
        let mut everything = false;
        if !self.resumed {
            match cache.checkpoint(CHECKPOINT).await {
                // Changes since then were told to nobody, unless by another instance; some are repeated.
                Ok(Some(kept)) => self.go_on_from(kept.into()),
                Ok(None) => everything = true,
                Err(_) => {}
            }
        }
        let mut from = self.position.clone();
        if self.pages >= MANY_PAGES {
            self.pages = 0;
            // Whoever comes first does it for all.
            sleep(SHORTEST.mul_f64(rand::random_range(0.0..20.0))).await;
            if self.goes_on_from_anothers().await {
                return Ok(true);
            }
            tracing::info!("much has changed; everything is stale");
            from = Some(database.latest_change(&product::TABLE).await?);
            everything = true;
        }
        let Some(from) = &from else { unreachable!("set above") };
        let changes = database.changes_since(&product::TABLE, from).await?;
        if changes.more && self.goes_on_from_anothers().await {
            return Ok(true);
        }
        self.pages = if changes.more { self.pages + 1 } else { 0 };
        if changes.overrun {
            tracing::warn!("the change feed was pruned or replaced; everything is stale");
        }
        let expired = if changes.overrun || everything {
            cache.expire_everything(PATIENCE).await
        } else if changes.keys.is_empty() {
            Ok(())
        } else {
            let keys: Vec<_> = changes.keys.iter().map(|id| Key::new(product::KIND, *id)).collect();
            self.app.counts.add(Counter::ExpiredKeys, keys.len() as u64);
            cache.expire_here(&keys);
            let untold = self.untold(keys).await;
            cache.expire(&untold, PATIENCE).await
        };
        self.resumed |= everything;
        let position = self.position.insert(changes.position);
        match expired {
            // An earlier expiry may still be on its way: whoever comes after this process must not begin behind it.
            Ok(()) if self.resumed && cache.owes_nothing() && self.kept.as_ref() != Some(position) => {
                if cache.keep_checkpoint(CHECKPOINT, &position.to_string()).await {
                    self.kept = Some(position.clone());
                }
            }
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "the change feed goes on"),
        }
        Ok(changes.more)
    }

    /// Takes a position that an instance has kept: all before it has been told, though not all of it here.
    fn go_on_from(&mut self, kept: Position) {
        self.app.cache.expire_everything_here();
        self.kept = Some(kept.clone());
        self.position = Some(kept);
        self.resumed = true;
    }

    /// Where much has changed, and another instance has told nearly all of it: goes on from there.
    async fn goes_on_from_anothers(&mut self) -> bool {
        let Ok(Some(checkpoint)) = self.app.cache.checkpoint(CHECKPOINT).await else { return false };
        let kept = Position::from(checkpoint);
        if self.kept.as_ref() == Some(&kept) {
            return false;
        }
        // A full page from it would tell nothing of whether it lies before this instance's or after.
        match self.app.database.changes_since(&product::TABLE, &kept).await {
            Ok(since) if !since.overrun && !since.more => {
                self.go_on_from(kept);
                true
            }
            _ => false,
        }
    }

    /// Those of these keys that no other instance has told: those that have changed since the position that is kept.
    async fn untold(&self, keys: Vec<Key>) -> Vec<Key> {
        let Ok(Some(checkpoint)) = self.app.cache.checkpoint(CHECKPOINT).await else { return keys };
        let kept = Position::from(checkpoint);
        if self.kept.as_ref() == Some(&kept) {
            return keys; // and before these changes
        }
        match self.app.database.changes_since(&product::TABLE, &kept).await {
            Ok(since) if !since.overrun && !since.more => {
                let since: HashSet<_> = since.keys.into_iter().collect();
                keys.into_iter().filter(|key| since.contains(&key.id())).collect()
            }
            _ => keys, // it is far behind, or means nothing to the server that is asked here
        }
    }
}
