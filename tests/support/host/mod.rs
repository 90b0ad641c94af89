//! A stand-in for the Azure Functions host, for tests of a custom handler over its real protocol.
//!
//! `options` is what a test chooses; `files` and `functions` read what the host reads; `process`, `supervisor` and
//! `console` keep the handler running by the host's rules; `client` is the one connection pool to it; `http` and
//! `trigger` are the two ways in; `item` and `sqlloop` model what the SQL trigger sends and when. It is not a host: no
//! key store, no scale controller, no extension bundle, no language worker, and no real SQL Server.
//! Invariant: the handler sees only what a real host would show it, unless the test calls `direct`.

mod client;
mod console;
mod files;
mod functions;
mod http;
mod item;
mod options;
mod process;
mod sqlloop;
mod supervisor;
mod trigger;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use client::{Outgoing, Payload};
use files::Files;
use options::environment;
use supervisor::{KILL_WAIT, State, Supervisor};

pub use console::ConsoleLine;
pub use files::stage;
pub use http::{Request, Response};
pub use item::{Column, Item, MySqlRow, Operation, changes, item, mysql_changes};
pub use options::{Dialect, Options, StartError};
pub use sqlloop::SqlTrigger;
pub use supervisor::Phase;
pub use trigger::{Invocation, admin_envelope, envelope, new_guid, utc_now};

/// What a start may take beyond the handler's own time: three kills on a slow machine.
const START_SLACK: Duration = Duration::from_secs(10);

/// A running host with its handler. Dropping it kills the handler.
pub struct Host {
    supervisor: Arc<Supervisor>,
    running: JoinHandle<()>,
    function_key: Option<String>,
    core_tools: bool,
}

impl Host {
    /// Reads the files, picks a port, starts the handler and waits until it answers `GET /` with any status.
    ///
    /// Fails when the host would give up (third error), or after four initialization timeouts and ten seconds.
    pub async fn start(options: Options) -> Result<Host, StartError> {
        let environment = environment(&options);
        let files = Files::read(&options.script_root, &environment, options.dialect)?;
        let port = super::free_port();
        let supervisor = Arc::new(Supervisor::new(options.script_root, files, environment, options.dialect, port));
        let host = Host {
            running: tokio::spawn(Arc::clone(&supervisor).run()),
            supervisor,
            function_key: options.function_key,
            core_tools: options.core_tools,
        };
        let settled = |state: &State| (state.phase != Phase::Starting || state.spawn_error.is_some()).then_some(());
        let _ = host.supervisor.wait_for(host.supervisor.patience() + START_SLACK, settled).await;
        if host.phase() == Phase::Ready {
            return Ok(host);
        }
        let spawn_error = host.supervisor.state().spawn_error.take();
        match spawn_error {
            Some(reason) => Err(StartError::Spawn(reason)),
            None => Err(StartError::GaveUp { log: host.log(), console: host.console() }),
        }
    }

    pub fn port(&self) -> u16 {
        self.supervisor.port
    }

    pub fn pid(&self) -> Option<u32> {
        self.supervisor.state().pid()
    }

    /// How often the handler has been started.
    pub fn starts(&self) -> usize {
        self.supervisor.state().starts
    }

    pub fn phase(&self) -> Phase {
        self.supervisor.state().phase
    }

    /// Whether the host gave up.
    pub fn stopped(&self) -> bool {
        self.phase() == Phase::Stopped
    }

    pub fn sql_max_batch_size(&self) -> usize {
        self.supervisor.files.sql_max_batch_size
    }

    pub fn is_disabled(&self, function: &str) -> bool {
        self.supervisor.files.functions.iter().any(|known| known.name == function && known.disabled)
    }

    /// The version the host tells the handler.
    pub fn version(&self) -> &'static str {
        match self.supervisor.host {
            Dialect::Forward => "4.1037.0.0",
            Dialect::Proxy => "4.1052.200.0",
        }
    }

    /// TCP connections opened to the handler so far, probes included.
    pub fn connections_opened(&self) -> usize {
        self.supervisor.client.connections_opened()
    }

    /// What the handler has written so far, over all its starts.
    pub fn console(&self) -> Vec<ConsoleLine> {
        self.supervisor.state().console.clone()
    }

    /// The first console line that contains `text`, past or future; `None` after `within`.
    pub async fn wait_for_console(&self, text: &str, within: Duration) -> Option<ConsoleLine> {
        let found = |state: &State| state.console.iter().find(|line| line.text.contains(text)).cloned();
        self.supervisor.wait_for(within, found).await
    }

    /// The host's own messages.
    pub fn log(&self) -> Vec<String> {
        self.supervisor.state().log.clone()
    }

    /// Waits until the handler has been started `starts` times and is ready; false after `within`.
    pub async fn wait_for_starts(&self, starts: usize, within: Duration) -> bool {
        let up = |state: &State| (state.phase == Phase::Ready && state.starts >= starts).then_some(());
        self.supervisor.wait_for(within, up).await.is_some()
    }

    /// SIGKILL, as the platform would; returns once the host has noticed, which counts as an error.
    pub async fn crash(&self) {
        let (Some(killed), starts) = (self.pid(), self.starts()) else { return };
        self.supervisor.crash();
        let noticed = |state: &State| {
            let gone = state.pid() != Some(killed) && state.phase != Phase::Ready;
            (gone || state.starts > starts).then_some(())
        };
        // A process that survives SIGKILL for a second is the test's to find.
        let _ = self.supervisor.wait_for(KILL_WAIT, noticed).await;
    }

    /// Past the host: a request straight to the handler's port, as it stands, over the same pool.
    ///
    /// # Errors
    /// Why no whole response came within the function timeout.
    pub async fn direct(&self, request: Request) -> Result<Response, String> {
        let mut headers = request.headers;
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            headers.push(("Host".into(), format!("127.0.0.1:{}", self.port())));
        }
        let chunked = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("transfer-encoding"));
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("transfer-encoding"));
        let body = Bytes::from(request.body);
        let payload = match body.is_empty() {
            true => Payload::Empty,
            false if chunked => Payload::Chunked(body),
            false => Payload::Sized(body),
        };
        let method = Method::from_bytes(request.method.as_bytes()).map_err(|error| error.to_string())?;
        let outgoing = Outgoing { method, target: request.target, headers, payload };
        let sent = timeout(self.supervisor.files.function_timeout, self.supervisor.client.send(&outgoing)).await;
        sent.map_err(|_| "no answer in time".to_string())?.map(Response::of).map_err(|lost| lost.to_string())
    }

    /// An invocation overran: its handler is replaced, and the new one awaited.
    async fn overran(&self, worker_id: &str) {
        self.supervisor.restart(worker_id);
        // A handler that does not come back shows in the next invocation.
        let _ = self.supervisor.ready().await;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.running.abort();
        self.supervisor.shut_down();
    }
}
