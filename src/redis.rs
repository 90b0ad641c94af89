//! The one Redis pool: which connection a command takes, when a connection is given up, and how it comes back.
//!
//! `deadpool-redis` bounds and makes the connections; each is checked out once by a *keeper*, and all requests share
//! clones of its multiplexed handle, because a checkout per command costs a PING round trip (measured 2–20 times
//! slower). Knows nothing of what keys and scripts mean. Invariant: while Redis is away a command fails at once, without waiting:
//! only the keepers try to connect, with growing, jittered pauses.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool_redis::{Manager, Pool, Runtime, Timeouts};

use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, RedisError, RedisResult,
    ServerErrorKind, Value, aio::MultiplexedConnection, io::tcp::TcpSettings,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    background::{Task, keep_running},
    config,
};

/// Answers that may be missing in a row before a connection counts as dead. One late answer is a hiccup; three are a
/// stalled server or a half-open socket, which no error ever reports.
const TIMEOUTS_UNTIL_DEAD: u32 = 3;
/// Pauses between two attempts to connect: short first, because restarts are quick; bounded, because hundreds of
/// instances must not hammer a server that is coming back.
const RECONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How long a new connection may take to prove itself; the pool has bounded the connecting itself.
const PROBE: Duration = Duration::from_secs(1);

/// Why a command got no answer from Redis.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is no live connection; nothing was sent.
    #[error("redis is not connected")]
    Disconnected,
    /// The command failed; it may or may not have been carried out.
    #[error("redis: {0}")]
    Failed(#[from] RedisError),
}

/// Cheap handle to the pool; clones share it.
#[derive(Clone)]
pub struct Redis {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Vec<Arc<Line>>,
    log: Arc<Line>,
    next: AtomicUsize,
    response_timeout: Duration,
    _keepers: Vec<Task>,
}

/// A Lua script that is sent by its hash.
pub struct Lua {
    code: &'static str,
    hash: String,
}

impl Lua {
    /// Hashes the script; nothing is sent.
    pub fn new(code: &'static str) -> Self {
        Self { code, hash: redis::Script::new(code).get_hash().to_owned() }
    }

    /// A call with one key, to which arguments are added.
    pub fn call(&self, key: &str) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.hash).arg(1).arg(key);
        call
    }
}

impl Redis {
    /// Builds the pool and starts to connect on `background`; returns at once, whether or not a server is there.
    pub fn start(config: &config::Redis, background: &Handle) -> RedisResult<Self> {
        // Nagle's algorithm holds small commands back; a vanished peer is noticed by keep-alive, not never.
        let tcp = TcpSettings::default().set_nodelay(true).set_user_timeout(config.connect_timeout * 10);
        let connection = config.url.reveal().into_connection_info()?.set_tcp_settings(tcp);
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            .set_response_timeout(Some(config.response_timeout));
        Client::open(connection.clone())?; // names a wrong address before a keeper repeats it for ever
        let pool = Pool::builder(Manager::new_with_config(connection, settings)?)
            .max_size(config.connections() as usize)
            .timeouts(Timeouts {
                wait: Some(config.connect_timeout),
                create: Some(config.connect_timeout),
                recycle: Some(config.response_timeout),
            })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| RedisError::from((ErrorKind::InvalidClientConfig, "pool", error.to_string())))?;

        let mut keepers = Vec::new();
        let mut open_line = || {
            let line = Arc::new(Line::default());
            let (kept, pool) = (line.clone(), pool.clone());
            keepers.push(keep_running(background, "redis connection", move || keep(kept.clone(), pool.clone())));
            line
        };
        let shared: Vec<_> = (0..config.pool_size).map(|_| open_line()).collect();
        let log = if config.frugal_poll.is_some() { shared[0].clone() } else { open_line() };
        let response_timeout = config.response_timeout;
        Ok(Self {
            inner: Arc::new(Inner { shared, log, next: AtomicUsize::new(0), response_timeout, _keepers: keepers }),
        })
    }

    /// Sends commands in one round trip over a shared connection and returns each one's own result.
    ///
    /// Fails at once while no shared connection is up, except before the very first attempt to connect has ended.
    pub async fn send(&self, commands: &[Cmd]) -> Result<Vec<RedisResult<Value>>, Error> {
        let lines = &self.inner.shared;
        let first = self.inner.next.fetch_add(1, Ordering::Relaxed);
        for offset in 0..lines.len() {
            let line = &lines[(first + offset) % lines.len()];
            if let Some(live) = line.live().await {
                return live.send(commands, None).await;
            }
        }
        Err(Error::Disconnected)
    }

    /// Sends calls of one script in one round trip; where Redis lacks the script (restarted, or its script cache
    /// flushed), loads it and repeats the calls that missed it.
    pub async fn send_script(&self, script: &Lua, calls: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, Error> {
        let mut replies = self.send(&calls).await?;
        let missed: Vec<_> = (0..replies.len()).filter(|index| is_missing_script(&replies[*index])).collect();
        if !missed.is_empty() {
            let mut load = redis::cmd("SCRIPT");
            load.arg("LOAD").arg(script.code);
            let again: Vec<_> = std::iter::once(load).chain(missed.iter().map(|index| calls[*index].clone())).collect();
            let repeated = self.send(&again).await?.into_iter().skip(1);
            for (index, reply) in missed.into_iter().zip(repeated) {
                replies[index] = reply;
            }
        }
        Ok(replies)
    }

    /// Sends commands over the invalidation log's connection, whose answers may take `patience` longer than usual if it
    /// holds a blocking read. With frugal settings it is the shared one, on which nothing must block.
    pub async fn send_on_log(&self, commands: &[Cmd], patience: Duration) -> Result<Vec<RedisResult<Value>>, Error> {
        let live = self.inner.log.live().await.ok_or(Error::Disconnected)?;
        live.send(commands, Some(patience + self.inner.response_timeout)).await
    }

    /// Waits until the log's connection is up.
    pub async fn log_connected(&self) {
        let mut up = self.inner.log.up.subscribe();
        // The sender lives in the line, which `self` holds.
        let _ = up.wait_for(|state| *state == State::Up).await;
    }

    /// Whether a shared connection is up.
    pub fn is_connected(&self) -> bool {
        self.inner.shared.iter().any(|line| *line.up.borrow() == State::Up)
    }

    /// Waits until a shared connection is up.
    pub async fn connected(&self) {
        let waits = self.inner.shared.iter().map(|line| {
            Box::pin(async {
                let _ = line.up.subscribe().wait_for(|state| *state == State::Up).await;
            })
        });
        futures_util::future::select_all(waits).await;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    NeverTried,
    Down,
    Up,
}

/// One connection's place: the live one, if any.
#[derive(Default)]
struct Line {
    live: RwLock<Option<Arc<Live>>>,
    up: watch::Sender<State>,
}

/// A connection and how it is doing. A new one starts anew, whatever late failures the old one's users still report.
struct Live {
    connection: MultiplexedConnection,
    timeouts: AtomicU32,
    is_broken: AtomicBool,
    broken: Notify,
}

impl Line {
    async fn live(&self) -> Option<Arc<Live>> {
        if *self.up.borrow() == State::NeverTried {
            // Bounded by the keeper's first attempt, which has deadlines of its own.
            let _ = self.up.subscribe().wait_for(|state| *state != State::NeverTried).await;
        }
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, live: Option<Arc<Live>>) {
        let state = if live.is_some() { State::Up } else { State::Down };
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = live;
        self.up.send_replace(state);
    }
}

impl Live {
    fn new(connection: MultiplexedConnection) -> Arc<Self> {
        let (timeouts, is_broken) = (AtomicU32::new(0), AtomicBool::new(false));
        Arc::new(Self { connection, timeouts, is_broken, broken: Notify::new() })
    }

    async fn send(&self, commands: &[Cmd], patience: Option<Duration>) -> Result<Vec<RedisResult<Value>>, Error> {
        let mut pipeline = Pipeline::with_capacity(commands.len());
        pipeline.ignore_errors();
        for command in commands {
            pipeline.add_command(command.clone());
        }
        let mut connection = self.connection.clone();
        if let Some(patience) = patience {
            connection.set_response_timeout(patience);
        }
        match pipeline.query_async::<Vec<RedisResult<Value>>>(&mut connection).await {
            Ok(replies) => {
                if self.timeouts.load(Ordering::Relaxed) != 0 {
                    self.timeouts.store(0, Ordering::Relaxed);
                }
                if replies.iter().any(|reply| reply.as_ref().is_err_and(is_wrong_server)) {
                    self.give_up();
                }
                Ok(replies)
            }
            Err(error) => {
                let dead = match error.is_timeout() {
                    true => self.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= TIMEOUTS_UNTIL_DEAD,
                    // Not an answer of the server's, so the stream is cut or out of step.
                    false => !matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension),
                };
                if dead || is_wrong_server(&error) {
                    self.give_up();
                }
                Err(error.into())
            }
        }
    }

    fn give_up(&self) {
        if !self.is_broken.swap(true, Ordering::AcqRel) {
            self.broken.notify_one();
        }
    }
}

/// Whether an answer shows a server that cannot serve us now: demoted to a replica, or loading its data.
fn is_wrong_server(error: &RedisError) -> bool {
    matches!(error.code(), Some("READONLY" | "MASTERDOWN" | "LOADING" | "CLUSTERDOWN"))
}

/// Keeps one line connected for ever: check out, publish, wait until broken, discard, pause, again.
async fn keep(line: Arc<Line>, pool: Pool) {
    let (shortest, longest) = RECONNECT_PAUSE;
    let mut pause = shortest;
    loop {
        match connect(&pool).await {
            Ok(object) => {
                tracing::debug!("redis: connected");
                let live = Live::new((*object).clone());
                line.publish(Some(live.clone()));
                pause = shortest;
                live.broken.notified().await;
                line.publish(None);
                drop(deadpool_redis::Connection::take(object));
                tracing::warn!("redis: connection lost, connecting anew");
            }
            Err(error) => {
                if *line.up.borrow() == State::NeverTried {
                    tracing::warn!(error, "redis: cannot connect, trying on; reads go to the database");
                }
                line.publish(None);
            }
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(longest);
    }
}

/// Checks a connection out and proves that it is of use: a stalled server accepts connections too, and one that was
/// demoted to a replica answers everything but writes.
async fn connect(pool: &Pool) -> Result<deadpool_redis::Connection, String> {
    let mut object = pool.get().await.map_err(|error| error.to_string())?;
    let role = redis::cmd("ROLE");
    let problem = match timeout(PROBE, role.query_async::<Vec<Value>>(&mut object)).await {
        Ok(Ok(role)) if role.first() == Some(&Value::BulkString(b"slave".to_vec())) => "it is a replica".to_owned(),
        Ok(Ok(_)) => return Ok(object),
        // A service may forbid the command; that it answered is what counts.
        Ok(Err(error)) if error.code() == Some("NOPERM") || error.code() == Some("ERR") => return Ok(object),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer".to_owned(),
    };
    drop(deadpool_redis::Connection::take(object));
    Err(problem)
}

fn is_missing_script(reply: &RedisResult<Value>) -> bool {
    reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
}
