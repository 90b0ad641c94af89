//! The database's change feed → expiries, for where no host delivers the SQL trigger.
//!
//! Knows how often to ask and what to do when the feed fails. Invariant: the position moves on only after what was read
//! has been expired here (and is queued for Redis), so a failure in between repeats changes and loses none.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::App;
use crate::{
    cache::Key,
    database::{Changes, Error, Position},
    product,
};

/// How long the feed waits for Redis to take an expiry. Afterwards it stays queued and the feed goes on.
const PATIENCE: Duration = Duration::from_secs(1);

/// Follows the feed for ever.
pub(super) async fn follow(app: Arc<App>, interval: Duration) {
    let mut position = None;
    let mut failing = false;
    loop {
        let began = Instant::now();
        match step(&app, position.as_ref()).await {
            Ok(changes) => {
                position = Some(changes.position);
                if std::mem::take(&mut failing) {
                    tracing::info!("the change feed is heard again");
                }
                if changes.more {
                    continue;
                }
                app.cache.heard_feed(began);
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
    }
}

async fn step(app: &App, position: Option<&Position>) -> Result<Changes, Error> {
    let Some(position) = position else {
        // What was read into memory before there was a position may have changed since.
        let position = app.database.latest_change(&product::TABLE).await?;
        app.cache.forget_memory();
        return Ok(Changes { keys: Vec::new(), position, overrun: false, more: false });
    };
    let changes = app.database.changes_since(&product::TABLE, position).await?;
    let expired = if changes.overrun {
        tracing::warn!("the change feed was pruned or replaced; everything is stale");
        app.cache.expire_everything(PATIENCE).await
    } else if changes.keys.is_empty() {
        Ok(())
    } else {
        let keys: Vec<_> = changes.keys.iter().map(|id| Key::new(product::KIND, *id)).collect();
        app.counts.expired(keys.len());
        app.cache.expire(&keys, PATIENCE).await
    };
    if let Err(error) = expired {
        tracing::warn!(%error, "the change feed goes on");
    }
    Ok(changes)
}
