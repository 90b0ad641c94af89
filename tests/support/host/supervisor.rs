//! What the host knows about its handler, and the orders it can give: wait until ready, restart, stop.
//!
//! It owns the state; `process` is the task that starts the child and reacts to its end. Every change is announced on
//! `changed`. Invariant: the host never leaves `Stopped`, and a planned end is neither an error nor an exit to interpret.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::client::Client;
use super::console::{ConsoleLine, Level};
use super::files::{Environment, Files};
use super::options::Dialect;

/// How late an exit may be noticed; short, so that few invocations meet a dead process.
pub(super) const EXIT_POLL: Duration = Duration::from_millis(5);
/// The host waits this long for a killed handler.
pub(super) const KILL_WAIT: Duration = Duration::from_secs(1);
const ERROR_THRESHOLD: usize = 3;
const ERROR_WINDOW: Duration = Duration::from_secs(30 * 60);

/// The state of the host towards its handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// First start or restart; invocations wait.
    Starting,
    Ready,
    /// The handler left with code 0: no restart, every invocation fails.
    Exited,
    /// The host gave up.
    Stopped,
}

pub(super) struct Supervisor {
    pub root: PathBuf,
    pub files: Files,
    pub environment: Environment,
    pub host: Dialect,
    pub port: u16,
    pub client: Client,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    restart_wanted: Notify,
}

pub(super) struct State {
    pub phase: Phase,
    pub worker_id: String,
    pub starts: usize,
    pub console: Vec<ConsoleLine>,
    pub log: Vec<String>,
    pub spawn_error: Option<String>,
    /// The host itself ended the child.
    pub planned: bool,
    child: Option<Child>,
    /// When the errors in the bucket happened.
    errors: Vec<Instant>,
    /// The last three error lines of the current child.
    last_errors: VecDeque<String>,
}

impl Supervisor {
    pub fn new(root: PathBuf, files: Files, environment: Environment, host: Dialect, port: u16) -> Self {
        let state = State {
            phase: Phase::Starting,
            worker_id: String::new(),
            starts: 0,
            console: Vec::new(),
            log: files.warnings.clone(),
            spawn_error: None,
            planned: false,
            child: None,
            errors: Vec::new(),
            last_errors: VecDeque::new(),
        };
        Self {
            root,
            files,
            environment,
            host,
            port,
            client: Client::new(port),
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            restart_wanted: Notify::new(),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.send_modify(|version| *version += 1);
    }

    pub fn note(&self, message: impl Into<String>) {
        let message = message.into();
        self.update(|state| state.log.push(message));
    }

    /// Waits until `found` sees what it looks for; `None` once `within` has passed.
    pub async fn wait_for<T>(&self, within: Duration, mut found: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let mut changes = self.changed.subscribe();
        let looking = async {
            loop {
                changes.borrow_and_update();
                if let Some(seen) = found(&self.state()) {
                    return Some(seen);
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        };
        timeout(within, looking).await.ok().flatten()
    }

    /// How long the host waits for a handler before it gives up: four initialization timeouts.
    pub fn patience(&self) -> Duration {
        self.files.initialization_timeout * (ERROR_THRESHOLD as u32 + 1)
    }

    /// Waits for an initialized handler and returns its worker id. When patience ends the host stops itself.
    pub async fn ready(&self) -> Result<String, String> {
        let settled = self.wait_for(self.patience(), |state| match state.phase {
            Phase::Ready | Phase::Exited => Some(Ok(state.worker_id.clone())),
            Phase::Stopped => Some(Err("the host is stopped".to_string())),
            Phase::Starting => None,
        });
        if let Some(settled) = settled.await {
            return settled;
        }
        let message =
            "Final functionDispatcher state: Initializing. Initialization timed out and host is shutting down";
        self.note(message);
        self.update(|state| {
            state.enter(Phase::Stopped);
            state.planned = true;
            state.kill();
        });
        Err(message.into())
    }

    /// Kills and restarts the worker an invocation overran on; nothing happens if that worker is gone already.
    pub fn restart(&self, worker_id: &str) {
        self.update(|state| {
            if state.worker_id == worker_id && state.phase != Phase::Stopped && !state.planned {
                state.log.push(format!("Restarting the worker process {worker_id} after a function timeout"));
                state.enter(Phase::Starting);
                state.planned = true;
                state.kill();
            }
        });
        self.restart_wanted.notify_one();
    }

    /// SIGKILL from outside, as the platform or the kernel would: the host sees an exit it did not ask for.
    pub fn crash(&self) {
        self.state().kill();
    }

    /// SIGKILL and a bounded wait, then no further start.
    pub fn shut_down(&self) {
        self.update(|state| {
            state.enter(Phase::Stopped);
            state.planned = true;
            state.kill();
        });
        let deadline = Instant::now() + KILL_WAIT;
        while self.state().is_running() {
            if Instant::now() >= deadline {
                self.note(format!("Worker process has not exited despite waiting for {} ms", KILL_WAIT.as_millis()));
                break;
            }
            std::thread::sleep(EXIT_POLL);
        }
        self.state().child = None;
        self.client.clear();
    }

    pub fn enter(&self, phase: Phase) {
        self.update(|state| state.enter(phase));
    }

    /// The probe was answered; unless the child that answered is being ended.
    pub fn initialized(&self) {
        self.update(|state| {
            if state.phase == Phase::Starting && !state.planned {
                state.enter(Phase::Ready);
            }
        });
    }

    /// A started child; ended at once if the host has stopped meanwhile.
    pub fn adopt(&self, child: Child, worker_id: String) {
        self.update(|state| {
            state.worker_id = worker_id;
            state.starts += 1;
            state.last_errors.clear();
            state.child = Some(child);
            if state.phase == Phase::Stopped {
                state.kill();
            }
        });
    }

    /// One more error in the bucket: the third stops the host, unless more than 30 minutes passed before it.
    pub fn count_error(&self) {
        self.update(|state| {
            if state.errors.last().is_some_and(|last| last.elapsed() > ERROR_WINDOW) {
                state.errors.clear();
            }
            state.errors.push(Instant::now());
            if state.errors.len() < ERROR_THRESHOLD {
                state.enter(Phase::Starting);
            } else {
                state.log.push("Exceeded http worker restart retry count. Shutting down Functions Host".into());
                state.enter(Phase::Stopped);
            }
        });
    }

    /// No deadline: this is the task's own rest, ended by `restart` or with the host.
    pub async fn wait_for_order(&self) {
        while !self.state().planned {
            self.restart_wanted.notified().await;
        }
    }
}

impl State {
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase != Phase::Stopped {
            self.phase = phase;
        }
    }

    pub fn hear(&mut self, line: ConsoleLine) {
        if line.level == Level::Error {
            self.last_errors.push_back(line.text.clone());
            if self.last_errors.len() > 3 {
                self.last_errors.pop_front();
            }
        }
        self.console.push(line);
    }

    /// Forgets the child that has ended: its pid, whether the end was planned, and its last errors.
    pub fn bury(&mut self) -> (u32, bool, String) {
        let pid = self.child.take().map(|child| child.id()).unwrap_or_default();
        (pid, self.planned, self.last_errors.iter().cloned().collect::<Vec<_>>().join(","))
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            // Fails only if the child has been waited for already.
            let _ = child.kill();
        }
    }

    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }
}
