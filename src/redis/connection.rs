//! One connection's place in the pool: who keeps it open, what is sent over it, and when it is given up.
//!
//! Knows how Redis refuses, and nothing of what commands mean. Invariant: a connection whose stream may be out of step, or
//! that leads to a server which cannot serve us, is never used again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{Object, Pool};
use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    Error,
    ask::AskRedirect,
    nodes::{Found, Nodes},
    script::Script,
};
use crate::{config::Secret, foreground::Foreground};

/// Answers that may be missing in a row before a connection counts as dead, each to a command that was sent after the one
/// before was missed. One late answer is a hiccup, and so are all that it holds up; three are a stalled server or a
/// half-open socket, which no error ever reports.
const TIMEOUTS_UNTIL_DEAD: u32 = 3;
/// Pauses between two attempts to connect: short first, because restarts are quick; bounded, because hundreds of
/// instances must not hammer a server that is coming back.
const RECONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Bound of what a keeper asks on a live connection: the log's may hold a blocking read for a second.
const ASIDE: Duration = Duration::from_secs(5);

/// One connection's place: the live one, if any.
#[derive(Default)]
pub(super) struct Line {
    state: watch::Sender<State>,
    /// Whether the logs say that it is down.
    told_down: AtomicBool,
}

#[derive(Default)]
enum State {
    #[default]
    NeverTried,
    Down,
    Up(Arc<Live>),
}

/// A connection and how it is doing. A new one starts anew, whatever late failures the old one's users still report.
pub(super) struct Live {
    connection: MultiplexedConnection,
    pool: Pool<Nodes>,
    /// The host it leads to.
    host: String,
    /// Where the node sends those who ask for what is on its way to another node.
    redirect: Arc<AskRedirect>,
    timeouts: AtomicU32,
    is_broken: AtomicBool,
    broken: Notify,
}

/// What the keepers of a pool tell each other of the connections that are lost.
#[derive(Default)]
pub(super) struct Losses {
    count: watch::Sender<u64>,
    /// Lines that the logs say are down.
    told_down: AtomicUsize,
}

/// What came back.
pub(super) struct Sent {
    pub(super) replies: Vec<RedisResult<Value>>,
    /// The commands that another node carried out.
    pub(super) redirected: Vec<usize>,
}

impl Line {
    pub(super) async fn live(&self) -> Option<Arc<Live>> {
        if self.is_new() {
            // Bounded by the keeper's first attempt, which has deadlines of its own.
            let _ = self.state.subscribe().wait_for(|state| !matches!(state, State::NeverTried)).await;
        }
        match &*self.state.borrow() {
            State::Up(live) => Some(live.clone()),
            State::NeverTried | State::Down => None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(*self.state.borrow(), State::Up(_))
    }

    pub(super) async fn up(&self) {
        // The sender lives in the line.
        let _ = self.state.subscribe().wait_for(|state| matches!(state, State::Up(_))).await;
    }

    fn is_new(&self) -> bool {
        matches!(*self.state.borrow(), State::NeverTried)
    }

    /// The logs say that it is down.
    fn was_told_down(&self, losses: &Losses) {
        if !self.told_down.swap(true, Ordering::AcqRel) {
            losses.told_down.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// It is up; whether that leaves none of which the logs say that it is down, and there was one.
    fn ends_outage(&self, losses: &Losses) -> bool {
        self.told_down.swap(false, Ordering::AcqRel) && losses.told_down.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

impl Live {
    fn new(found: &Found, pool: Pool<Nodes>, redirect: Arc<AskRedirect>) -> Arc<Self> {
        Arc::new(Self {
            connection: found.connection.clone(),
            pool,
            host: found.host.clone(),
            redirect,
            timeouts: AtomicU32::new(0),
            is_broken: AtomicBool::new(false),
            broken: Notify::new(),
        })
    }

    pub(super) async fn send(
        &self,
        commands: &Pipeline,
        script: Option<&Script>,
        patience: Option<Duration>,
    ) -> Result<Sent, Error> {
        let mut connection = self.connection.clone();
        if let Some(patience) = patience {
            connection.set_response_timeout(patience);
        }
        let timeouts = self.timeouts.load(Ordering::Relaxed);
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
                    return Ok(Sent { replies, redirected: Vec::new() });
                }
                if replies.iter().any(|reply| reply.as_ref().is_err_and(is_wrong_server)) {
                    self.give_up();
                }
                let redirected = self.follow_ask(commands, &mut replies, script, patience).await;
                Ok(Sent { replies, redirected })
            }
            Err(error) => {
                let dead = match error.is_timeout() {
                    true => self.is_dead_after(timeouts),
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

    /// An answer is missing to a command that was sent when so many were. One that was missed since, or that came, says
    /// more.
    fn is_dead_after(&self, timeouts: u32) -> bool {
        let next = timeouts + 1;
        let is_next = self.timeouts.compare_exchange(timeouts, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        is_next && next >= TIMEOUTS_UNTIL_DEAD
    }

    /// Repeats what the node answered with `ASK` where it says, and puts the answers in their places. While a slot is on
    /// its way to another node, its keys are at either; which is known only to the one that still owns the slot.
    async fn follow_ask(
        &self,
        commands: &Pipeline,
        replies: &mut [RedisResult<Value>],
        script: Option<&Script>,
        patience: Option<Duration>,
    ) -> Vec<usize> {
        let is_asked = |reply: &RedisResult<Value>| reply.as_ref().is_err_and(|error| error.code() == Some("ASK"));
        let asked: Vec<_> = (0..replies.len()).filter(|index| is_asked(&replies[*index])).collect();
        let place = asked.first().and_then(|index| replies[*index].as_ref().err()?.redirect_node());
        let Some((place, _)) = place.map(|(place, slot)| (place.to_owned(), slot)) else { return Vec::new() };
        let Some(detour) = self.redirect.to(&place, &self.host, &self.pool).await else { return Vec::new() };
        let mut connection = detour.connection.clone();
        if let Some(patience) = patience {
            connection.set_response_timeout(patience);
        }
        let again = these(commands, &asked).flat_map(|command| [redis::cmd("ASKING"), command]);
        let again = pipeline(script.map(Script::load).into_iter().chain(again));
        match again.query_async::<Vec<RedisResult<Value>>>(&mut connection).await {
            Ok(answers) => {
                let answers = answers.into_iter().skip(usize::from(script.is_some()) + 1).step_by(2);
                for (index, answer) in asked.iter().zip(answers) {
                    if answer.as_ref().is_err_and(is_wrong_server) {
                        self.redirect.give_up(&detour);
                    }
                    replies[*index] = answer;
                }
                asked
            }
            Err(error) => {
                tracing::debug!(%error, "redis: the node that a slot moves to does not answer");
                self.redirect.give_up(&detour);
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
            connection.set_response_timeout(ASIDE);
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

    /// Ends when another connection was lost and this one gives no sign of life either: nobody may have use for it now,
    /// and so notice.
    async fn lost_as_well(&self, mut losses: watch::Receiver<u64>) {
        let question = pipeline([self.pool.manager().probe()]);
        while losses.changed().await.is_ok() && self.send(&question, None, Some(ASIDE)).await.is_ok() {}
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

/// Whether an answer shows a server that cannot serve us now: demoted to a replica, without the replicas or the disk
/// that it must have to take writes, loading its data, no longer the owner of our slot, in a cluster that has lost too
/// much, or one that has forgotten who we are.
pub(super) fn is_wrong_server(error: &RedisError) -> bool {
    matches!(error.code(), Some("MASTERDOWN" | "LOADING" | "MOVED" | "CLUSTERDOWN" | "NOAUTH"))
        || ["READONLY", "NOREPLICAS", "MISCONF"].iter().any(|code| has(error, code))
}

/// Whether the server answered with this code, to a command or from within a script.
pub(super) fn has(error: &RedisError, code: &str) -> bool {
    match error.code() {
        // Before Redis 7 a script's own error is wrapped in another.
        Some("ERR") => error.detail().is_some_and(|detail| detail.contains(code)),
        found => found == Some(code),
    }
}

/// Keeps one line connected for ever: check out, publish, wait until broken, discard, pause, again.
pub(super) async fn keep(
    line: Arc<Line>,
    pool: Pool<Nodes>,
    redirect: Arc<AskRedirect>,
    losses: Arc<Losses>,
    served_by: Foreground,
) {
    let (shortest, longest) = RECONNECT_PAUSE;
    let mut pause = shortest;
    loop {
        if let Some(tokens) = &pool.manager().tokens {
            // Before the deadline of connecting begins, which asking for one may outlast. If there is none, connecting
            // says why.
            let _ = tokens.token().await;
        }
        let connecting = || {
            let pool = pool.clone();
            async move { pool.get().await }
        };
        let lost_meanwhile = losses.count.subscribe();
        match served_by.run(connecting).await {
            Ok(found) => {
                match line.ends_outage(&losses) {
                    true => tracing::info!(node = found.id, "redis: connected again"),
                    false => tracing::debug!(node = found.id, "redis: connected"),
                }
                let (live, since) = (Live::new(&found, pool.clone(), redirect.clone()), Instant::now());
                line.state.send_replace(State::Up(live.clone()));
                tokio::select! {
                    () = live.broken.notified() => {}
                    () = pool.manager().left(&found.id) => {}
                    () = pool.manager().refresh_topology(&found) => {}
                    () = live.stay_logged_in(found.token.clone()) => {}
                    () = live.lost_as_well(lost_meanwhile) => {}
                }
                line.state.send_replace(State::Down);
                // One that greets and then refuses is no better than one that does not greet.
                if since.elapsed() > longest {
                    pause = shortest;
                }
                // Whoever has sent something still gets the answer.
                drop(Object::take(found));
                tracing::warn!("redis: connection lost, connecting anew");
                line.was_told_down(&losses);
                losses.count.send_modify(|count| *count += 1);
            }
            Err(error) => {
                if line.is_new() {
                    tracing::warn!(%error, "redis: cannot connect, trying on; reads go to the database");
                    line.was_told_down(&losses);
                }
                line.state.send_replace(State::Down);
            }
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(longest);
    }
}

/// Commands that are sent together and answered one by one.
pub(super) fn pipeline(commands: impl IntoIterator<Item = Cmd>) -> Pipeline {
    let mut pipeline = redis::pipe();
    pipeline.ignore_errors();
    for command in commands {
        pipeline.add_command(command);
    }
    pipeline
}

/// Those of these commands that have one of these places.
pub(super) fn these(commands: &Pipeline, places: &[usize]) -> impl Iterator<Item = Cmd> {
    commands.cmd_iter().enumerate().filter(|(place, _)| places.contains(place)).map(|(_, command)| command.clone())
}
