//! The one Redis pool: which connection a command takes, when a connection is given up, and how it comes back.
//!
//! The pool bounds the connections and `nodes` makes them; each is checked out once by a *keeper*, and all requests share
//! clones of its multiplexed handle, because a checkout per command costs a PING round trip (measured 2–20 times
//! slower). In reading order: `connection` (one of them), `nodes` (where to), `ask` (where a slot is moving to), `script`,
//! `examine` (for the doctor). Knows nothing of what keys and scripts mean. Invariant: while Redis is away a command fails
//! at once, without waiting: only the keepers try to connect, with growing, jittered pauses.

mod ask;
mod connection;
mod examine;
mod nodes;
mod script;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool::{
    Runtime,
    managed::{Pool, Timeouts},
};
use redis::{Cmd, Pipeline, RedisError, RedisResult, Value};
use tokio::runtime::Handle;

pub(crate) use self::examine::examine;
pub(crate) use self::script::Script;
use self::{
    ask::AskRedirect,
    connection::{Line, Live, Losses, Sent, has, is_wrong_server, keep, pipeline, these},
    nodes::{Nodes, ask_sentinels},
    script::is_missing_script,
};
use crate::{
    background::{Task, keep_running},
    config,
    foreground::Foreground,
};

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
    pub(crate) fn is_wrong_type(&self) -> bool {
        matches!(self, Self::Failed(error) if has(error, "WRONGTYPE"))
    }

    /// Whether the server says that another is to be asked, or none now: the connection's keeper has a word for that.
    pub(crate) fn is_wrong_server(&self) -> bool {
        matches!(self, Self::Failed(error) if is_wrong_server(error) || error.code() == Some("ASK"))
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
    /// A write that changes nothing.
    probe: Cmd,
    response_timeout: Duration,
    _keepers: Vec<Task>,
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

        let (mut keepers, losses) = (Vec::new(), Arc::<Losses>::default());
        let mut open_line = |redirect: &Arc<AskRedirect>, served_by: &Foreground| {
            let line = Arc::new(Line::default());
            let (kept, pool, redirect) = (line.clone(), pool.clone(), redirect.clone());
            let (losses, served_by) = (losses.clone(), served_by.clone());
            keepers.push(keep_running(background, "redis connection", move || {
                keep(kept.clone(), pool.clone(), redirect.clone(), losses.clone(), served_by.clone())
            }));
            line
        };
        // The log's own, since it may hold a blocking read.
        let [redirect, log_redirect] = [(); 2].map(|()| AskRedirect::new(config.response_timeout));
        let shared: Vec<_> = (0..config.pool_size).map(|_| open_line(&redirect, foreground)).collect();
        let log = if config.frugal_poll.is_some() {
            shared[0].clone()
        } else {
            open_line(&log_redirect, &Foreground::of(background))
        };
        if config.server.sentinel_service.is_some() {
            let pool = pool.clone();
            keepers.push(keep_running(background, "redis sentinels", move || ask_sentinels(pool.clone())));
        }
        let (next, probe, response_timeout) = (AtomicUsize::new(0), pool.manager().probe(), config.response_timeout);
        Ok(Self { inner: Arc::new(Inner { shared, log, next, probe, response_timeout, _keepers: keepers }) })
    }

    /// Sends commands in one round trip over a shared connection and returns each one's own result.
    ///
    /// Fails at once while no shared connection is up, except before the very first attempt to connect has ended.
    pub(crate) async fn send(&self, commands: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, Error> {
        Ok(self.live().await?.send(&pipeline(commands), None, None).await?.replies)
    }

    /// Sends calls of one script in one round trip; where Redis lacks the script (restarted, or its script cache
    /// flushed), loads it and repeats the calls that missed it.
    pub(crate) async fn send_script(&self, script: &Script, calls: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, Error> {
        Ok(run(&*self.live().await?, script, &pipeline(calls)).await?.replies)
    }

    /// Sends commands and then a script's call, in one round trip. Whoever sees what the call did sees what the
    /// commands did: if any of them was carried out elsewhere, and so maybe later, the call is repeated. So it is, as
    /// `when_full` changes it, where Redis has no memory for it.
    pub(crate) async fn send_in_order(
        &self,
        before: Vec<Cmd>,
        script: &Script,
        call: Cmd,
        when_full: impl FnOnce(&mut Cmd),
    ) -> Result<Vec<RedisResult<Value>>, Error> {
        let last = before.len();
        let mut again = call.clone();
        let live = self.live().await?;
        let mut sent = run(&live, script, &pipeline(before.into_iter().chain([call]))).await?;
        let is_full = matches!(sent.replies.last(), Some(Err(error)) if has(error, "OOM"));
        if is_full {
            when_full(&mut again);
        }
        if is_full || sent.redirected.iter().any(|index| *index < last) {
            sent.replies.truncate(last);
            sent.replies.append(&mut run(&live, script, &pipeline([again])).await?.replies);
        }
        Ok(sent.replies)
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
    pub(crate) async fn remove_unless(&self, kind: &str, names: Vec<String>) {
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
    pub(crate) async fn send_on_log(
        &self,
        commands: Vec<Cmd>,
        patience: Duration,
    ) -> Result<Vec<RedisResult<Value>>, Error> {
        let live = self.inner.log.live().await.ok_or(Error::Disconnected)?;
        Ok(live.send(&pipeline(commands), None, Some(patience + self.inner.response_timeout)).await?.replies)
    }

    /// The same, and before them a write that changes nothing. Fails if that shows a server that takes no writes: nobody
    /// can tell it of an expiry, so a log in which nothing comes says nothing.
    pub(crate) async fn send_on_log_if_it_takes_writes(
        &self,
        commands: impl IntoIterator<Item = Cmd>,
        patience: Duration,
    ) -> Result<Vec<RedisResult<Value>>, Error> {
        let commands = std::iter::once(self.inner.probe.clone()).chain(commands).collect();
        let mut replies = self.send_on_log(commands, patience).await?.into_iter();
        match replies.next() {
            Some(Err(error)) if is_wrong_server(&error) => Err(error.into()),
            _ => Ok(replies.collect()),
        }
    }

    /// Waits until the log's connection is up.
    pub(crate) async fn log_connected(&self) {
        self.inner.log.up().await;
    }

    /// Whether a shared connection is up.
    pub(crate) fn is_connected(&self) -> bool {
        self.inner.shared.iter().any(|line| line.is_up())
    }

    /// Waits until a shared connection is up.
    pub(crate) async fn connected(&self) {
        futures_util::future::select_all(self.inner.shared.iter().map(|line| Box::pin(line.up()))).await;
    }
}

/// Sends calls of a script, and again those that missed it, over the same connection: another one may lead to another server
/// while primaries change.
async fn run(live: &Live, script: &Script, commands: &Pipeline) -> Result<Sent, Error> {
    let mut sent = live.send(commands, Some(script), None).await?;
    let missed: Vec<_> = (0..commands.len()).filter(|index| is_missing_script(&sent.replies[*index])).collect();
    if !missed.is_empty() {
        let again = pipeline(std::iter::once(script.load()).chain(these(commands, &missed)));
        let repeated = live.send(&again, Some(script), None).await?.replies.into_iter().skip(1);
        for (index, reply) in missed.into_iter().zip(repeated) {
            sent.replies[index] = reply;
        }
    }
    Ok(sent)
}
