//! The way to a node that a slot is moving to: one connection for as long as the slot's owner answers with `ASK`.
//!
//! Knows nothing of commands. Invariant: nobody waits longer than one answer for a node that cannot be reached, one that
//! is of no use is left alone for a while, and a connection that nobody has asked for lately is closed.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool::managed::Pool;
use redis::aio::MultiplexedConnection;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::nodes::Nodes;

/// Pause after an attempt to connect that failed, and after a connection that was given up: a node may greet and then
/// refuse what it is asked.
const PAUSE: Duration = Duration::from_secs(1);
/// A connection unused for this long is closed. Slots move for minutes, and hot keys are asked for all the time.
const IDLE: Duration = Duration::from_secs(5);

/// Shared by the lines that may share a connection.
pub(super) struct AskRedirect {
    state: Mutex<State>,
    /// Attempts to connect so far.
    attempts: AtomicU64,
    patience: Duration,
}

/// What leads to the place, and the number of the attempt that made it.
#[derive(Clone)]
pub(super) struct Detour {
    pub(super) connection: MultiplexedConnection,
    number: u64,
}

#[derive(Default)]
enum State {
    #[default]
    Unknown,
    /// To this place, by this attempt; told when it is over.
    Connecting(String, u64, watch::Receiver<()>),
    /// Last used then.
    Open(String, Detour, Instant),
    /// Not before then.
    Failed(String, Instant),
}

impl AskRedirect {
    /// `patience`: how long whoever needs it waits for it.
    pub(super) fn new(patience: Duration) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), attempts: AtomicU64::new(0), patience })
    }

    /// A connection to the place that the node at `from` named; `None` if there is none in time.
    pub(super) async fn to(self: &Arc<Self>, place: &str, from: &str, pool: &Pool<Nodes>) -> Option<Detour> {
        let mut over = {
            let mut state = self.state();
            match &mut *state {
                State::Open(there, detour, used) if there == place => {
                    *used = Instant::now();
                    return Some(detour.clone());
                }
                State::Failed(there, until) if there == place && Instant::now() < *until => return None,
                // Unless who began it is gone: with its thread, or by a panic.
                State::Connecting(there, _, over) if there == place && over.has_changed().is_ok() => over.clone(),
                _ => {
                    let (done, over) = watch::channel(());
                    let number = self.attempts.fetch_add(1, Ordering::Relaxed);
                    *state = State::Connecting(place.to_owned(), number, over.clone());
                    let task = connect(self.clone(), number, place.to_owned(), from.to_owned(), pool.clone(), done);
                    tokio::spawn(task);
                    over
                }
            }
        };
        let _ = timeout(self.patience, over.changed()).await;
        match &*self.state() {
            State::Open(there, detour, _) if there == place => Some(detour.clone()),
            _ => None,
        }
    }

    /// It is of no use any more. Whoever says so late says nothing of the one that has taken its place.
    pub(super) fn give_up(&self, detour: &Detour) {
        let mut state = self.state();
        if let State::Open(place, open, _) = &mut *state
            && open.number == detour.number
        {
            *state = State::Failed(std::mem::take(place), Instant::now() + PAUSE);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects, and then watches over the connection until it is idle or given up, or another one takes its place.
async fn connect(
    redirect: Arc<AskRedirect>,
    number: u64,
    place: String,
    from: String,
    pool: Pool<Nodes>,
    done: watch::Sender<()>,
) {
    let found = pool.manager().redirected(&place, &from).await;
    if let Err(error) = &found {
        tracing::debug!(%error, place, "redis: the node that a slot moves to cannot be reached");
    }
    {
        let mut state = redirect.state();
        if !matches!(&*state, State::Connecting(_, current, _) if *current == number) {
            return;
        }
        *state = match found {
            Ok(connection) => State::Open(place, Detour { connection, number }, Instant::now()),
            Err(_) => State::Failed(place, Instant::now() + PAUSE),
        };
    }
    drop(done);
    loop {
        sleep(IDLE).await;
        let mut state = redirect.state();
        match &*state {
            State::Open(_, open, used) if open.number == number => {
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

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::config::Config;

    fn pool_at(place: &str) -> Pool<Nodes> {
        let variables = BTreeMap::from([("Redis".to_owned(), place.to_owned())]);
        let config = Config::from_variables(&variables).expect("valid").redis.expect("one");
        Pool::builder(Nodes::new(&config).expect("valid")).build().expect("a pool")
    }

    /// A node that answers every command with OK; how often it was connected to.
    async fn node() -> (String, Arc<AtomicU64>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (place, greeted) = (listener.local_addr().expect("bound").to_string(), Arc::new(AtomicU64::new(0)));
        let counted = greeted.clone();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut piece = [0; 4096];
                    while let Ok(length @ 1..) = client.read(&mut piece).await {
                        let commands = piece[..length].iter().filter(|byte| **byte == b'*').count();
                        let _ = client.write_all(&b"+OK\r\n".repeat(commands)).await;
                    }
                });
            }
        });
        (place, greeted)
    }

    #[tokio::test]
    async fn who_began_to_connect_and_is_gone_keeps_nobody_from_it() {
        let place = "127.0.0.1:1"; // nobody listens there
        let pool = pool_at(place);
        let redirect = AskRedirect::new(Duration::from_secs(10));
        let (_, over) = watch::channel(());
        *redirect.state() = State::Connecting(place.to_owned(), 7, over);
        assert!(redirect.to(place, "127.0.0.1", &pool).await.is_none());
        assert!(matches!(&*redirect.state(), State::Failed(..)), "another attempt was made");
    }

    /// A late failure of the old connection took the new one away, or the attempt under way.
    #[tokio::test]
    async fn who_gives_up_a_connection_late_takes_nothing_from_those_who_have_another() {
        let (place, greeted) = node().await;
        let pool = pool_at(&place);
        let redirect = AskRedirect::new(Duration::from_secs(10));
        let old = redirect.to(&place, "127.0.0.1", &pool).await.expect("there");
        *redirect.state() = State::Unknown; // it was idle
        let new = redirect.to(&place, "127.0.0.1", &pool).await.expect("there again");
        redirect.give_up(&old);
        assert_eq!(redirect.to(&place, "127.0.0.1", &pool).await.expect("still there").number, new.number);
        let (_under_way, over) = watch::channel(());
        *redirect.state() = State::Connecting(place.clone(), 7, over);
        redirect.give_up(&new);
        assert!(matches!(&*redirect.state(), State::Connecting(_, 7, _)));
        assert_eq!(greeted.load(Ordering::SeqCst), 2);
    }

    /// One that greets and answers with LOADING cost a handshake for each command.
    #[tokio::test]
    async fn what_was_given_up_is_not_asked_again_at_once() {
        let (place, greeted) = node().await;
        let pool = pool_at(&place);
        let redirect = AskRedirect::new(Duration::from_secs(10));
        let detour = redirect.to(&place, "127.0.0.1", &pool).await.expect("there");
        redirect.give_up(&detour);
        tokio::time::pause();
        assert!(redirect.to(&place, "127.0.0.1", &pool).await.is_none());
        assert_eq!(greeted.load(Ordering::SeqCst), 1);
        tokio::time::advance(PAUSE).await;
        tokio::time::resume();
        assert!(redirect.to(&place, "127.0.0.1", &pool).await.is_some());
    }

    /// Each connection left a task behind that watched over its successor.
    #[tokio::test]
    async fn a_connection_that_was_replaced_is_not_watched_over_any_more() {
        let (place, _) = node().await;
        let pool = pool_at(&place);
        let redirect = AskRedirect::new(Duration::from_secs(10));
        for _ in 0..5 {
            *redirect.state() = State::Unknown;
            redirect.to(&place, "127.0.0.1", &pool).await.expect("there");
        }
        tokio::time::pause();
        tokio::time::advance(IDLE / 2).await;
        redirect.to(&place, "127.0.0.1", &pool).await.expect("in use");
        tokio::time::sleep(IDLE / 2 + Duration::from_millis(1)).await;
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&redirect), 2, "this one, and the task of the last");
        tokio::time::sleep(IDLE).await;
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&redirect), 1, "it was idle");
    }
}
