//! The way to a node that a slot is moving to: one connection for as long as the slot's owner answers with `ASK`.
//!
//! Knows nothing of commands. Invariant: nobody waits longer than one answer for a node that cannot be reached, and a
//! connection that nobody has asked for lately is closed.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use deadpool::managed::Pool;
use redis::aio::MultiplexedConnection;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::nodes::Nodes;

/// Pause after an attempt to connect that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// A connection unused for this long is closed. Slots move for minutes, and hot keys are asked for all the time.
const IDLE: Duration = Duration::from_secs(5);

/// Shared by the lines that may share a connection.
pub(super) struct AskRedirect {
    state: Mutex<State>,
    patience: Duration,
}

#[derive(Default)]
enum State {
    #[default]
    Unknown,
    /// To this place; told when it is over.
    Connecting(String, watch::Receiver<()>),
    /// Last used then.
    Open(String, MultiplexedConnection, Instant),
    /// Not before then.
    Failed(String, Instant),
}

impl AskRedirect {
    /// `patience`: how long whoever needs it waits for it.
    pub(super) fn new(patience: Duration) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), patience })
    }

    /// A connection to the place that the node at `from` named; `None` if there is none in time.
    pub(super) async fn to(
        self: &Arc<Self>,
        place: &str,
        from: &str,
        pool: &Pool<Nodes>,
    ) -> Option<MultiplexedConnection> {
        let mut over = {
            let mut state = self.state();
            match &mut *state {
                State::Open(there, connection, used) if there == place => {
                    *used = Instant::now();
                    return Some(connection.clone());
                }
                State::Failed(there, until) if there == place && Instant::now() < *until => return None,
                // Unless who began it is gone: with its thread, or by a panic.
                State::Connecting(there, over) if there == place && over.has_changed().is_ok() => over.clone(),
                _ => {
                    let (done, over) = watch::channel(());
                    *state = State::Connecting(place.to_owned(), over.clone());
                    let task = connect(self.clone(), place.to_owned(), from.to_owned(), pool.clone(), done);
                    tokio::spawn(task);
                    over
                }
            }
        };
        let _ = timeout(self.patience, over.changed()).await;
        match &*self.state() {
            State::Open(there, connection, _) if there == place => Some(connection.clone()),
            _ => None,
        }
    }

    /// The connection is of no use any more.
    pub(super) fn give_up(&self) {
        *self.state() = State::Unknown;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects, and then watches over the connection until it is idle or another one takes its place.
async fn connect(redirect: Arc<AskRedirect>, place: String, from: String, pool: Pool<Nodes>, done: watch::Sender<()>) {
    let found = pool.manager().redirected(&place, &from).await;
    if let Err(error) = &found {
        tracing::debug!(%error, place, "redis: the node that a slot moves to cannot be reached");
    }
    {
        let mut state = redirect.state();
        if !matches!(&*state, State::Connecting(there, _) if *there == place) {
            return;
        }
        *state = match found {
            Ok(connection) => State::Open(place.clone(), connection, Instant::now()),
            Err(_) => State::Failed(place.clone(), Instant::now() + PAUSE),
        };
    }
    drop(done);
    loop {
        sleep(IDLE).await;
        let mut state = redirect.state();
        match &*state {
            State::Open(there, _, used) if *there == place => {
                if used.elapsed() >= IDLE {
                    *state = State::Unknown;
                    return;
                }
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Config;

    #[tokio::test]
    async fn who_began_to_connect_and_is_gone_keeps_nobody_from_it() {
        let place = "127.0.0.1:1"; // nobody listens there
        let variables = BTreeMap::from([("Redis".to_owned(), place.to_owned())]);
        let config = Config::from_variables(&variables).expect("valid").redis.expect("one");
        let pool = Pool::builder(Nodes::new(&config).expect("valid")).build().expect("a pool");
        let redirect = AskRedirect::new(Duration::from_secs(10));
        let (_, over) = watch::channel(());
        *redirect.state() = State::Connecting(place.to_owned(), over);
        assert!(redirect.to(place, "127.0.0.1", &pool).await.is_none());
        assert!(matches!(&*redirect.state(), State::Failed(..)), "another attempt was made");
    }
}
