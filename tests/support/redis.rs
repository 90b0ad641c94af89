//! A private Redis server.

use std::{
    fmt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::{AsyncConnectionConfig, ToRedisArgs};
use tempfile::TempDir;
use tokio::time::timeout;

// `benches/` uses this file too.
use super::{basics::PATIENCE, eventually, free_port, signal};

/// How long a question waits that is asked again if it is not answered.
const QUESTION: Duration = Duration::from_secs(2);

pub struct RedisServer {
    process: Option<Child>,
    folder: TempDir,
    pub port: u16,
    arguments: Vec<String>,
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further options, such as `["--maxclients", "50"]`.
    pub async fn start_with(arguments: &[&str]) -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().expect("a folder");
        let arguments = arguments.iter().map(ToString::to_string).collect();
        let mut server = Self { process: None, folder, port, arguments };
        server.restart().await;
        server
    }

    /// Starts the server again after [`Self::kill`], empty unless it was told to save.
    pub async fn restart(&mut self) {
        self.kill();
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--dir"])
            .arg(self.folder.path())
            .args(["--save", "", "--appendonly", "no"])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("redis-server is not installed ({error}): run scripts/test"));
        self.process = Some(process);
        eventually("redis-server answers", async || self.try_command(&["PING"]).await.ok()).await;
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn signal(&self, name: &str) {
        signal(self.process.as_ref().expect("it runs").id(), name);
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Runs a command on a connection of its own.
    pub async fn command<T: ToRedisArgs + fmt::Debug>(&self, words: &[T]) -> redis::Value {
        self.run(words, PATIENCE).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub async fn try_command<T: ToRedisArgs>(&self, words: &[T]) -> redis::RedisResult<redis::Value> {
        self.run(words, QUESTION).await
    }

    async fn run<T: ToRedisArgs>(&self, words: &[T], patience: Duration) -> redis::RedisResult<redis::Value> {
        let client = redis::Client::open(self.url())?;
        // The client's own are a second, and half a one for each answer.
        let patient = AsyncConnectionConfig::new();
        let patient = patient.set_connection_timeout(Some(patience)).set_response_timeout(Some(patience));
        let run = async {
            let mut connection = client.get_multiplexed_async_connection_with_config(&patient).await?;
            let mut command = redis::Cmd::new();
            command.arg(words);
            command.query_async(&mut connection).await
        };
        timeout(patience, run).await.unwrap_or_else(|_| Err((redis::ErrorKind::Io, "late").into()))
    }

    /// The answer to a question that may be asked twice: a sentinel cuts the connections of a server that it promotes.
    async fn told(&self, question: &[&str]) -> String {
        let answer = eventually("redis answers", async || self.try_command(question).await.ok()).await;
        redis::from_redis_value(answer).expect("text")
    }

    /// What `INFO` says about something.
    pub async fn info(&self, section: &str, name: &str) -> String {
        let info = self.told(&["INFO", section]).await;
        let value = info.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        value.unwrap_or_else(|| panic!("INFO {section} does not tell {name}")).to_owned()
    }

    /// How often the server has carried out a command since it started.
    pub async fn calls(&self, command: &str) -> u64 {
        let stats = self.told(&["INFO", "commandstats"]).await;
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.and_then(|line| line.split(',').next()).map_or(0, |calls| calls.parse().expect("a number"))
    }

    /// Connections of handlers, by what they call themselves; the test's own is not counted.
    pub async fn clients(&self) -> usize {
        let list = self.told(&["CLIENT", "LIST"]).await;
        list.lines().filter(|line| !line.contains("cmd=client|list")).count()
    }
}
