//! The one Redis pool: which connection a command takes, when a connection is given up, and how it comes back.
//!
//! The pool bounds the connections and `nodes` makes them; each is checked out once by a *keeper*, and all requests share
//! clones of its multiplexed handle, because a checkout per command costs a PING round trip (measured 2–20 times
//! slower). In reading order: `nodes` (where to), `detour` (where a slot is moving to), `examine` (for the doctor). Knows
//! nothing of what keys and scripts mean. Invariant: while Redis is away a command fails at once, without waiting: only
//! the keepers try to connect, with growing, jittered pauses.

mod detour;
mod examine;
mod nodes;

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool::{
    Runtime,
    managed::{Object, Pool, Timeouts},
};
use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    time::Instant,
};

pub(crate) use self::examine::examine;
use self::{
    detour::Detour,
    nodes::{Found, Nodes},
};
use crate::{
    background::{Task, keep_running},
    config::{self, Secret},
    foreground::Foreground,
};

/// Answers that may be missing in a row before a connection counts as dead. One late answer is a hiccup; three are a
/// stalled server or a half-open socket, which no error ever reports.
const TIMEOUTS_UNTIL_DEAD: u32 = 3;
/// Pauses between two attempts to connect: short first, because restarts are quick; bounded, because hundreds of
/// instances must not hammer a server that is coming back.
const RECONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Pause between two questions to the sentinels: an instance may be misled by a replaced primary for that much longer
/// than it may trust its memory.
const SENTINEL_PAUSE: Duration = Duration::from_secs(5);
/// Bound of logging in anew on a live connection: the log's may hold a blocking read for a second.
const LOGIN: Duration = Duration::from_secs(5);

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

impl Error {
    /// Whether a value of another type than ours stands under one of the names.
    pub fn is_wrong_type(&self) -> bool {
        matches!(self, Self::Failed(error) if has(error, "WRONGTYPE"))
    }
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

    fn load(&self) -> Cmd {
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(self.code);
        load
    }
}

impl Redis {
    /// Builds the pool and starts its keepers on `background`; returns at once, whether or not a server is there. The
    /// shared connections live in `foreground`, near the requests that use them; the log's lives on `background`.
    pub fn start(config: &config::Redis, background: &Handle, foreground: &Foreground) -> Result<Self, String> {
        let pool = Pool::builder(Nodes::new(config)?)
            .max_size(config.connections() as usize)
            .timeouts(Timeouts {
                wait: Some(config.connect_timeout),
                create: Some(config.connect_timeout),
                recycle: Some(config.response_timeout),
            })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| error.to_string())?;

        let mut keepers = Vec::new();
        let mut open_line = |detour: &Arc<Detour>, served_by: &Foreground| {
            let line = Arc::new(Line::default());
            let (kept, pool, detour, served_by) = (line.clone(), pool.clone(), detour.clone(), served_by.clone());
            keepers.push(keep_running(background, "redis connection", move || {
                keep(kept.clone(), pool.clone(), detour.clone(), served_by.clone())
            }));
            line
        };
        // The log's own, since it may hold a blocking read.
        let [detour, log_detour] = [(); 2].map(|()| Detour::new(config.response_timeout));
        let shared: Vec<_> = (0..config.pool_size).map(|_| open_line(&detour, foreground)).collect();
        let log = if config.frugal_poll.is_some() {
            shared[0].clone()
        } else {
            open_line(&log_detour, &Foreground::of(background))
        };
        if config.server.sentinel_service.is_some() {
            let pool = pool.clone();
            keepers.push(keep_running(background, "redis sentinels", move || ask_sentinels(pool.clone())));
        }
        let response_timeout = config.response_timeout;
        Ok(Self {
            inner: Arc::new(Inner { shared, log, next: AtomicUsize::new(0), response_timeout, _keepers: keepers }),
        })
    }

    /// Sends commands in one round trip over a shared connection and returns each one's own result.
    ///
    /// Fails at once while no shared connection is up, except before the very first attempt to connect has ended.
    pub async fn send(&self, commands: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, Error> {
        Ok(self.live().await?.send(&pipeline(commands), None, None).await?.replies)
    }

    /// Sends calls of one script in one round trip; where Redis lacks the script (restarted, or its script cache
    /// flushed), loads it and repeats the calls that missed it.
    pub async fn send_script(&self, script: &Lua, calls: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, Error> {
        Ok(self.run(script, &pipeline(calls)).await?.replies)
    }

    /// Sends commands and then a script's call, in one round trip. Whoever sees what the call did sees what the
    /// commands did: if any of them was carried out elsewhere, and so maybe later, the call is repeated.
    pub async fn send_in_order(
        &self,
        before: Vec<Cmd>,
        script: &Lua,
        call: Cmd,
    ) -> Result<Vec<RedisResult<Value>>, Error> {
        let last = before.len();
        let again = call.clone();
        let mut sent = self.run(script, &pipeline(before.into_iter().chain([call]))).await?;
        if sent.detoured.iter().any(|index| *index < last) {
            sent.replies.truncate(last);
            sent.replies.append(&mut self.run(script, &pipeline([again])).await?.replies);
        }
        Ok(sent.replies)
    }

    async fn run(&self, script: &Lua, commands: &Pipeline) -> Result<Sent, Error> {
        let mut sent = self.live().await?.send(commands, Some(script), None).await?;
        let missed: Vec<_> = (0..commands.len()).filter(|index| is_missing_script(&sent.replies[*index])).collect();
        if !missed.is_empty() {
            let again = pipeline(std::iter::once(script.load()).chain(these(commands, &missed)));
            let repeated = self.live().await?.send(&again, Some(script), None).await?.replies.into_iter().skip(1);
            for (index, reply) in missed.into_iter().zip(repeated) {
                sent.replies[index] = reply;
            }
        }
        Ok(sent)
    }

    async fn live(&self) -> Result<Arc<Live>, Error> {
        let lines = &self.inner.shared;
        let first = self.inner.next.fetch_add(1, Ordering::Relaxed);
        for offset in 0..lines.len() {
            if let Some(live) = lines[(first + offset) % lines.len()].live().await {
                return Ok(live);
            }
        }
        Err(Error::Disconnected)
    }

    /// Removes what stands under these names and is not of this type (as `TYPE` says it). Best effort.
    pub async fn remove_unless(&self, kind: &str, names: Vec<String>) {
        let command = |command: &str, name: &str| {
            let mut command = redis::cmd(command);
            command.arg(name);
            command
        };
        let kinds = self.send(names.iter().map(|name| command("TYPE", name)).collect()).await.unwrap_or_default();
        let others = names
            .iter()
            .zip(kinds)
            .filter(|(_, found)| matches!(found, Ok(Value::SimpleString(found)) if found != kind && found != "none"));
        let others: Vec<_> = others.map(|(name, _)| command("UNLINK", name)).collect();
        if !others.is_empty() {
            let values = others.len();
            tracing::warn!(values, "redis: values that are not ours stood under our names and are removed");
            let _ = self.send(others).await;
        }
    }

    /// Sends commands over the invalidation log's connection, whose answers may take `patience` longer than usual if it
    /// holds a blocking read. With frugal settings it is the shared one, on which nothing must block.
    pub async fn send_on_log(&self, commands: Vec<Cmd>, patience: Duration) -> Result<Vec<RedisResult<Value>>, Error> {
        let live = self.inner.log.live().await.ok_or(Error::Disconnected)?;
        Ok(live.send(&pipeline(commands), None, Some(patience + self.inner.response_timeout)).await?.replies)
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
    pool: Pool<Nodes>,
    /// The host it leads to.
    host: String,
    /// Where the node sends those who ask for what is on its way to another node.
    detour: Arc<Detour>,
    timeouts: AtomicU32,
    is_broken: AtomicBool,
    broken: Notify,
}

/// What came back.
struct Sent {
    replies: Vec<RedisResult<Value>>,
    /// The commands that another node carried out.
    detoured: Vec<usize>,
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
    fn new(found: &Found, pool: Pool<Nodes>, detour: Arc<Detour>) -> Arc<Self> {
        Arc::new(Self {
            connection: found.connection.clone(),
            pool,
            host: found.host.clone(),
            detour,
            timeouts: AtomicU32::new(0),
            is_broken: AtomicBool::new(false),
            broken: Notify::new(),
        })
    }

    async fn send(&self, commands: &Pipeline, script: Option<&Lua>, patience: Option<Duration>) -> Result<Sent, Error> {
        let mut connection = self.connection.clone();
        if let Some(patience) = patience {
            connection.set_response_timeout(patience);
        }
        let answered = match (commands.len(), commands.cmd_iter().next()) {
            // A pipeline of one would be packed and unpacked as a list.
            (1, Some(command)) => match command.query_async::<Value>(&mut connection).await {
                Err(error) if !is_answer(&error) => Err(error),
                answer => Ok(vec![answer]),
            },
            _ => commands.query_async::<Vec<RedisResult<Value>>>(&mut connection).await,
        };
        match answered {
            Ok(mut replies) => {
                if self.timeouts.load(Ordering::Relaxed) != 0 {
                    self.timeouts.store(0, Ordering::Relaxed);
                }
                if replies.iter().all(Result::is_ok) {
                    return Ok(Sent { replies, detoured: Vec::new() });
                }
                if replies.iter().any(|reply| reply.as_ref().is_err_and(is_wrong_server)) {
                    self.give_up();
                }
                let detoured = self.take_detour(commands, &mut replies, script, patience).await;
                Ok(Sent { replies, detoured })
            }
            Err(error) => {
                let dead = match error.is_timeout() {
                    true => self.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= TIMEOUTS_UNTIL_DEAD,
                    // Otherwise the stream is cut or out of step.
                    false => !is_answer(&error),
                };
                if dead || is_wrong_server(&error) {
                    self.give_up();
                }
                Err(error.into())
            }
        }
    }

    /// Repeats what the node answered with `ASK` where it says, and puts the answers in their places. While a slot is on
    /// its way to another node, its keys are at either; which is known only to the one that still owns the slot.
    async fn take_detour(
        &self,
        commands: &Pipeline,
        replies: &mut [RedisResult<Value>],
        script: Option<&Lua>,
        patience: Option<Duration>,
    ) -> Vec<usize> {
        let is_asked = |reply: &RedisResult<Value>| reply.as_ref().is_err_and(|error| error.code() == Some("ASK"));
        let asked: Vec<_> = (0..replies.len()).filter(|index| is_asked(&replies[*index])).collect();
        let place = asked.first().and_then(|index| replies[*index].as_ref().err()?.redirect_node());
        let Some((place, _)) = place.map(|(place, slot)| (place.to_owned(), slot)) else { return Vec::new() };
        let Some(mut connection) = self.detour.to(&place, &self.host, &self.pool).await else { return Vec::new() };
        if let Some(patience) = patience {
            connection.set_response_timeout(patience);
        }
        let again = these(commands, &asked).flat_map(|command| [redis::cmd("ASKING"), command]);
        let again = pipeline(script.map(Lua::load).into_iter().chain(again));
        match again.query_async::<Vec<RedisResult<Value>>>(&mut connection).await {
            Ok(answers) => {
                let answers = answers.into_iter().skip(usize::from(script.is_some()) + 1).step_by(2);
                for (index, answer) in asked.iter().zip(answers) {
                    if answer.as_ref().is_err_and(is_wrong_server) {
                        self.detour.give_up();
                    }
                    replies[*index] = answer;
                }
                asked
            }
            Err(error) => {
                tracing::debug!(%error, "redis: the node that a slot moves to does not answer");
                self.detour.give_up();
                Vec::new()
            }
        }
    }

    /// Logs in anew whenever the identity has another token, before the one that the connection lives by ends.
    async fn stay_logged_in(&self, mut token: Option<Secret>) {
        let nodes = self.pool.manager();
        while let (Some(tokens), Some(old)) = (&nodes.tokens, &token) {
            let new = tokens.after(old).await;
            let mut connection = self.connection.clone();
            connection.set_response_timeout(LOGIN);
            let mut login = redis::cmd("AUTH");
            login.arg(nodes.user(&new)).arg(new.reveal());
            if let Err(error) = login.query_async::<()>(&mut connection).await {
                tracing::warn!(%error, "redis: logging in with the identity's new token failed; connecting anew");
                return;
            }
            tracing::debug!("redis: logged in with the identity's new token");
            token = Some(new);
        }
        std::future::pending().await
    }

    fn give_up(&self) {
        if !self.is_broken.swap(true, Ordering::AcqRel) {
            self.broken.notify_one();
        }
    }
}

/// Whether an error is the server's own answer.
fn is_answer(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

/// Whether an answer shows a server that cannot serve us now: demoted to a replica, loading its data, no longer the
/// owner of our slot, in a cluster that has lost too much, or one that has forgotten who we are.
fn is_wrong_server(error: &RedisError) -> bool {
    matches!(error.code(), Some("MASTERDOWN" | "LOADING" | "MOVED" | "CLUSTERDOWN" | "NOAUTH"))
        || has(error, "READONLY")
}

/// Whether the server answered with this code, to a command or from within a script.
fn has(error: &RedisError, code: &str) -> bool {
    match error.code() {
        // Before Redis 7 a script's own error is wrapped in another.
        Some("ERR") => error.detail().is_some_and(|detail| detail.contains(code)),
        found => found == Some(code),
    }
}

/// Asks sentinels again and again which server is the primary. One that was cut off from them goes on answering, and its
/// clients would never know.
async fn ask_sentinels(pool: Pool<Nodes>) {
    loop {
        tokio::time::sleep(SENTINEL_PAUSE.mul_f64(rand::random_range(0.8..1.2))).await;
        if let Err(error) = pool.manager().look_for_owner().await {
            tracing::debug!(%error, "redis: a sentinel does not answer");
        }
    }
}

/// Keeps one line connected for ever: check out, publish, wait until broken, discard, pause, again.
async fn keep(line: Arc<Line>, pool: Pool<Nodes>, detour: Arc<Detour>, served_by: Foreground) {
    let (shortest, longest) = RECONNECT_PAUSE;
    let mut pause = shortest;
    loop {
        if let Some(tokens) = &pool.manager().tokens {
            // Before the deadline of connecting begins: a request for a token that is cut short is never kept. If there
            // is none, connecting says why.
            let _ = tokens.token().await;
        }
        let connecting = || {
            let pool = pool.clone();
            async move { pool.get().await }
        };
        match served_by.run(connecting).await {
            Ok(found) => {
                tracing::debug!(node = found.id, "redis: connected");
                let (live, since) = (Live::new(&found, pool.clone(), detour.clone()), Instant::now());
                line.publish(Some(live.clone()));
                tokio::select! {
                    () = live.broken.notified() => {}
                    () = pool.manager().left(&found.id) => {}
                    () = pool.manager().stay_acquainted(&found) => {}
                    () = live.stay_logged_in(found.token.clone()) => {}
                }
                line.publish(None);
                // One that greets and then refuses is no better than one that does not greet.
                if since.elapsed() > longest {
                    pause = shortest;
                }
                // Whoever has sent something still gets the answer.
                drop(Object::take(found));
                tracing::warn!("redis: connection lost, connecting anew");
            }
            Err(error) => {
                if *line.up.borrow() == State::NeverTried {
                    tracing::warn!(%error, "redis: cannot connect, trying on; reads go to the database");
                }
                line.publish(None);
            }
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(longest);
    }
}

/// Commands that are sent together and answered one by one.
fn pipeline(commands: impl IntoIterator<Item = Cmd>) -> Pipeline {
    let mut pipeline = redis::pipe();
    pipeline.ignore_errors();
    for command in commands {
        pipeline.add_command(command);
    }
    pipeline
}

/// Those of these commands that have one of these places.
fn these(commands: &Pipeline, places: &[usize]) -> impl Iterator<Item = Cmd> {
    commands.cmd_iter().enumerate().filter(|(place, _)| places.contains(place)).map(|(_, command)| command.clone())
}

fn is_missing_script(reply: &RedisResult<Value>) -> bool {
    reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
}
