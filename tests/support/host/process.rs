//! The handler's process: spawn, readiness probe, output, exit table.
//!
//! It is the one task that starts a child and reacts to its end; what it learns it tells the `Supervisor`'s state.
//! Invariant: at most one child lives, always on the same port, each with a worker id of its own.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hyper::Method;
use tokio::time::sleep;

use super::client::{Lost, Outgoing, Payload};
use super::console::{ConsoleLine, Stream};
use super::supervisor::{EXIT_POLL, KILL_WAIT, Phase, Supervisor};
use super::trigger::new_guid;

const PROBE_INTERVAL: Duration = Duration::from_millis(25);
/// The last lines of a dead handler arrive at once, unless a grandchild keeps the pipe open.
const LAST_LINES_WAIT: Duration = Duration::from_millis(250);
/// A handler just copied may be "busy" for a moment while another thread forks.
const TEXT_BUSY_LIMIT: Duration = Duration::from_secs(1);
const EXIT_INTENTIONAL_RESTART: i32 = 200;

enum End {
    Clean,
    Intentional,
    Planned,
    Error,
    NotSpawned,
}

impl Supervisor {
    /// Starts the handler and keeps it running by the host's exit table, until the host stops.
    pub async fn run(self: Arc<Self>) {
        while self.state().phase != Phase::Stopped {
            match self.run_once().await {
                End::Intentional => {
                    self.note("Language Worker Process exited and needs to be restarted.");
                    self.enter(Phase::Starting);
                }
                End::Planned => {}
                End::Error => self.count_error(),
                End::Clean => {
                    self.note("Process has exited with code 0.");
                    self.enter(Phase::Exited);
                    self.wait_for_order().await;
                }
                End::NotSpawned => self.wait_for_order().await,
            }
            self.client.clear();
            self.state().planned = false;
        }
    }

    async fn run_once(self: &Arc<Self>) -> End {
        let open_streams = match self.spawn().await {
            Ok(open_streams) => open_streams,
            Err(error) => {
                let message = format!(
                    "Failed to start Worker Channel. Process fileName: {}: {error}",
                    self.files.executable.display()
                );
                self.note(message.clone());
                self.update(|state| state.spawn_error = Some(message));
                return End::NotSpawned;
            }
        };
        let mut probe = std::pin::pin!(self.probe());
        let (mut probing, mut exited_clean) = (true, false);
        loop {
            tokio::select! {
                ready = &mut probe, if probing => {
                    probing = false;
                    if !ready {
                        return self.initialization_failed().await;
                    }
                    if exited_clean {
                        return End::Clean;
                    }
                    self.initialized();
                }
                () = sleep(EXIT_POLL) => {
                    let Some(status) = self.state().exit_status() else { continue };
                    self.drain(&open_streams).await;
                    match self.judge_exit(status) {
                        // The host goes on probing a port on which nothing listens.
                        End::Clean if probing => exited_clean = true,
                        end => return end,
                    }
                }
            }
        }
    }

    async fn initialization_failed(&self) -> End {
        self.note("Failed to start http worker process. Initializing HttpWorker timed out.");
        self.state().kill();
        let deadline = Instant::now() + KILL_WAIT;
        while self.state().is_running() && Instant::now() < deadline {
            sleep(EXIT_POLL).await;
        }
        if self.state().planned { End::Planned } else { End::Error }
    }

    fn judge_exit(&self, status: ExitStatus) -> End {
        let (pid, planned, last_errors) = self.state().bury();
        let code = exit_code(status);
        match code {
            _ if planned => End::Planned,
            0 => End::Clean,
            EXIT_INTENTIONAL_RESTART => End::Intentional,
            code => {
                let file = self.files.executable.display();
                self.note(format!(
                    "Language Worker Process exited. Pid={pid}. {file} exited with code {code} (0x{code:X}). {last_errors}"
                ));
                End::Error
            }
        }
    }

    /// True once anything answers on the port; only a failed connect means "not yet".
    ///
    /// The limit counts pauses, not the time a probe itself takes: a handler that accepts and then hangs is not cut.
    async fn probe(&self) -> bool {
        let mut paused = Duration::ZERO;
        while paused < self.files.initialization_timeout {
            match self.client.send(&self.ping()).await {
                Ok(_) | Err(Lost::Transport(_)) => return true,
                Err(Lost::Connect(_) | Lost::Unsendable(_)) => {}
            }
            sleep(PROBE_INTERVAL).await;
            paused += PROBE_INTERVAL;
        }
        false
    }

    /// The readiness probe: no header but Host.
    fn ping(&self) -> Outgoing {
        let headers = vec![("Host".into(), format!("127.0.0.1:{}", self.port))];
        Outgoing { method: Method::GET, target: "/".into(), headers, payload: Payload::Empty }
    }

    /// Starts the process with a new worker id; returns the count of its open output streams.
    async fn spawn(self: &Arc<Self>) -> std::io::Result<Arc<AtomicUsize>> {
        let worker_id = new_guid();
        let deadline = Instant::now() + TEXT_BUSY_LIMIT;
        let mut child = loop {
            match self.command(&worker_id).spawn() {
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                    sleep(EXIT_POLL).await;
                }
                other => break other?,
            }
        };
        let open_streams = Arc::new(AtomicUsize::new(2));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        self.adopt(child, worker_id);
        if let (Some(stdout), Some(stderr)) = (stdout, stderr) {
            self.read_lines(stdout, Stream::Stdout, Arc::clone(&open_streams));
            self.read_lines(stderr, Stream::Stderr, Arc::clone(&open_streams));
        }
        Ok(open_streams)
    }

    fn command(&self, worker_id: &str) -> Command {
        let mut command = Command::new(&self.files.executable);
        command
            .args(&self.files.arguments)
            .current_dir(&self.files.working_directory)
            .env_clear()
            .envs(&self.environment)
            .env("FUNCTIONS_CUSTOMHANDLER_PORT", self.port.to_string())
            .env("FUNCTIONS_HTTPWORKER_PORT", self.port.to_string())
            .env("FUNCTIONS_CUSTOMHANDLER_WORKER_ID", worker_id)
            .env("FUNCTIONS_HTTPWORKER_ID", worker_id)
            .env("FUNCTIONS_APP_ROOT_PATH", &self.root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A thread per stream: lines are kept even while the test blocks its runtime.
    fn read_lines(self: &Arc<Self>, source: impl Read + Send + 'static, stream: Stream, open: Arc<AtomicUsize>) {
        let this = Arc::clone(self);
        std::thread::spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            while source.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_string();
                this.hear(stream, text);
                line.clear();
            }
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }

    fn hear(&self, stream: Stream, text: String) {
        let line = ConsoleLine::read(stream, text, self.files.stderr_is_for_errors, self.host);
        self.update(|state| state.hear(line));
    }

    async fn drain(&self, open_streams: &AtomicUsize) {
        let deadline = Instant::now() + LAST_LINES_WAIT;
        while open_streams.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            sleep(EXIT_POLL).await;
        }
    }
}

/// As .NET reports it: 128 + signal for a process that was killed.
fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}
