//! Private Redis and PostgreSQL servers on free ports.
//!
//! Redis' is the tests' own; PostgreSQL's is small: a new data folder, one database, a login that may only read.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use sqlx::{Connection, PgConnection};

use self::basics::{eventually, free_port, signal};
use crate::Result;

#[allow(unreachable_pub)]
#[path = "../../tests/support/basics.rs"]
mod basics;
#[allow(dead_code, missing_docs, unreachable_pub, clippy::expect_used)]
#[path = "../../tests/support/redis.rs"]
pub mod redis;

/// A private PostgreSQL server with an empty database `shop`; it ends with its owner.
pub struct Postgres {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        signal(self.process.id(), "INT"); // fast shutdown: its own processes end with it
        let _ = self.process.wait();
    }
}

impl Postgres {
    /// Starts one.
    pub async fn start() -> Result<Self> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let data = folder.path().join("data");
        let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0");
        if root {
            // PostgreSQL refuses to run as root.
            run(Command::new("chown").arg("postgres").arg(folder.path()))?;
        }
        let program = |name: &str| {
            let program = program(name);
            if !root {
                return Command::new(program);
            }
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
            command
        };
        let options = ["--username=owner", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"];
        run(program("initdb").args(options).arg("-D").arg(&data))?;
        let port = free_port();
        let mut command = program("postgres");
        command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
        for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "shared_buffers=256MB"] {
            command.args(["-c", setting]);
        }
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = process.map_err(|error| format!("postgres: {error}"))?;
        let server = Self { process, port, _folder: folder };
        let mut owner = eventually("PostgreSQL answers", async || server.session("postgres").await.ok()).await;
        for sql in ["CREATE DATABASE shop", "CREATE ROLE handler LOGIN"] {
            sqlx::query(sql).execute(&mut owner).await.map_err(|error| error.to_string())?;
        }
        Ok(server)
    }

    /// A connection of the owner of everything.
    pub async fn owner(&self) -> Result<PgConnection> {
        self.session("shop").await.map_err(|error| error.to_string())
    }

    /// The handler's connection string.
    pub fn url(&self) -> String {
        format!("postgres://handler@127.0.0.1:{}/shop?sslmode=disable", self.port)
    }

    async fn session(&self, database: &str) -> sqlx::Result<PgConnection> {
        PgConnection::connect(&format!("postgres://owner@127.0.0.1:{}/{database}?sslmode=disable", self.port)).await
    }
}

/// Debian keeps PostgreSQL's programs apart by version.
fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).max();
    found.unwrap_or_else(|| Path::new(name).to_owned())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {told}")) }
}
