//! The real binary as a process, in a folder of its own.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use tempfile::TempDir;
use tokio::time::Instant;

use super::{
    PATIENT, eventually,
    host::{self, Host, Options},
    http::{self, Reply},
    signal,
};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_handler");

/// How to start one.
pub struct Start {
    environment: Vec<(String, String)>,
    folder: Option<PathBuf>,
}

/// Starts with nothing set but a free port.
pub fn start() -> Start {
    Start { environment: vec![("HTTP_PORT".to_owned(), "0".to_owned())], folder: None }
}

impl Start {
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// Waits for Redis as [`PATIENT`] says.
    pub fn patient(self) -> Self {
        PATIENT.iter().fold(self, |start, (name, value)| start.env(name, value))
    }

    /// Runs in this folder instead of one of its own; its embedded database is then shared.
    pub fn folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Starts the process; it may or may not come up.
    pub fn spawn(self) -> Instance {
        let own = self.folder.is_none().then(|| tempfile::tempdir().expect("a folder"));
        let folder = self.folder.unwrap_or_else(|| own.as_ref().expect("made above").path().to_owned());
        let mut command = Command::new(BINARY);
        command.current_dir(&folder).env_clear().envs(self.environment);
        // Where coverage is measured, the process writes it there.
        command.envs(std::env::var("LLVM_PROFILE_FILE").map(|file| ("LLVM_PROFILE_FILE", file)));
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
        let stdout = Lines::follow(child.stdout.take().expect("piped"));
        let stderr = Lines::follow(child.stderr.take().expect("piped"));
        Instance { child, folder, stdout, stderr, port: 0, _own: own }
    }

    /// Starts the process and waits until it answers.
    pub async fn listening(self) -> Instance {
        let mut instance = self.spawn();
        instance.port = eventually("the instance listens", async || instance.announced_port()).await;
        instance
    }

    /// Starts the process and waits until it hears of changes: from then on what it remembers stays remembered.
    pub async fn up(self) -> Instance {
        let began = Instant::now();
        let instance = self.listening().await;
        eventually("the instance hears", async || hears(&instance.status().await, began).then_some(())).await;
        instance
    }
}

/// A host whose handler hears of expiries: from then on what it remembers, and gives Redis, stays.
pub async fn hearing(options: Options) -> Host {
    let began = Instant::now();
    let host = Host::start(options).await.unwrap_or_else(|error| panic!("{error:?}"));
    let status = async || Some(host.direct(host::Request::get("/")).await.ok()?.json());
    eventually("the handler hears", async || status().await.filter(|status| hears(status, began))).await;
    host
}

/// Whether an instance with this status has heard of changes since then from everywhere it listens to.
pub fn hears(status: &serde_json::Value, since: Instant) -> bool {
    let passed = since.elapsed().as_secs_f64();
    let has_heard = |from: &str, unheard: &str| {
        status[from].is_null() || status[from][unheard].as_f64().is_some_and(|unheard| unheard <= passed)
    };
    has_heard("changeFeed", "unheardSeconds") && has_heard("redis", "logUnheardSeconds")
}

/// Delivers a trigger batch about these products to whoever listens at this port.
pub async fn try_invalidate(port: u16, ids: &[i64]) -> Result<Reply, String> {
    let rows: Vec<_> = ids.iter().map(|id| serde_json::json!({"Operation": 1, "Item": {"ProductID": id}})).collect();
    let text = serde_json::Value::from(serde_json::to_string(&rows).expect("plain")).to_string();
    let body = serde_json::json!({"Data": {"changes": text}, "Metadata": {}}).to_string();
    http::try_send(port, "POST", "/InvalidateCache", &[("content-type", "application/json")], body).await
}

/// A running process; it is killed with its owner.
pub struct Instance {
    child: Child,
    pub folder: PathBuf,
    pub stdout: Lines,
    pub stderr: Lines,
    pub port: u16,
    _own: Option<TempDir>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Instance {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its threads whose name begins so, as Linux keeps names: cut to 15 letters.
    #[cfg(target_os = "linux")]
    pub fn threads(&self, name: &str) -> usize {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a running process").flatten();
        let names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
        names.filter(|found| found.starts_with(name)).count()
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// The embedded database's file.
    pub fn database(&self) -> PathBuf {
        self.folder.join("product-cache.db")
    }

    /// Runs SQL on the embedded database, as a SQLite shell would.
    pub fn sql(&self, sql: &str) {
        super::sqlite(&self.database(), sql);
    }

    /// Makes every query of products take at least this many steps of SQLite's (some millions take a second); 0: ends
    /// it. Rows are edited in `product_rows` from the first call on.
    pub fn drag(&self, steps: u64) {
        super::drag(&self.database(), steps);
    }

    /// Waits for the end, and until all it has written can be read; `None` if a signal ended it.
    pub async fn exit_code(&mut self) -> Option<i32> {
        let status = eventually("the process ends", async || self.child.try_wait().expect("waits")).await;
        let is_read = || self.stdout.is_over() && self.stderr.is_over();
        eventually("what it wrote is read", async || is_read().then_some(())).await;
        status.code()
    }

    pub async fn get(&self, target: &str) -> Reply {
        http::send(self.port, "GET", target, &[], "").await
    }

    pub async fn get_with(&self, target: &str, headers: &[(&str, &str)]) -> Reply {
        http::send(self.port, "GET", target, headers, "").await
    }

    pub async fn product(&self, id: i64) -> Reply {
        self.get(&format!("/api/GetProductById?productid={id}")).await
    }

    /// Delivers a trigger batch about these products.
    pub async fn invalidate(&self, ids: &[i64]) -> Reply {
        try_invalidate(self.port, ids).await.unwrap_or_else(|error| panic!("POST /InvalidateCache: {error}"))
    }

    /// What `GET /` says.
    pub async fn status(&self) -> serde_json::Value {
        self.get("/").await.json()
    }

    fn announced_port(&mut self) -> Option<u16> {
        let ended = self.child.try_wait().expect("waits");
        assert!(ended.is_none(), "the instance ended: {ended:?}\n{}\n{}", self.stdout.text(), self.stderr.text());
        let text = self.stdout.text();
        let rest = text.split_once("listening  http://127.0.0.1:")?.1;
        rest.split_once('\n')?.0.parse().ok()
    }
}

/// The lines a process has written so far.
pub struct Lines {
    text: Arc<Mutex<String>>,
    reader: thread::JoinHandle<()>,
}

impl Lines {
    fn follow(stream: impl Read + Send + 'static) -> Self {
        let text: Arc<Mutex<String>> = Arc::default();
        let written = text.clone();
        let reader = thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let mut text = written.lock().expect("not poisoned");
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self { text, reader }
    }

    pub fn text(&self) -> String {
        self.text.lock().expect("not poisoned").clone()
    }

    /// Whether there will be no more.
    fn is_over(&self) -> bool {
        self.reader.is_finished()
    }

    pub async fn wait_for(&self, part: &str) {
        eventually(part, async || self.text().contains(part).then_some(())).await;
    }
}
