//! What tests stand on: the binary as a process, private Redis servers, a proxy that breaks connections, a
//! stand-in for SQL Server, HTTP.
//!
//! Everything listens on 127.0.0.1 at a port the system chose, lives in a folder of its own, and ends with its owner.

pub mod certificates;
pub mod database;
#[allow(dead_code, unused_imports)] // a model of the host: more of it than any one test needs
pub mod host;
pub mod http;
pub mod identity;
pub mod instance;
pub mod proxy;
pub mod redis;
pub mod redis_cluster;
pub mod tds;

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long anything that must happen may take on a small, noisy machine before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `check` gives something; panics with `what` after [`PATIENCE`].
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A port for a server that is stopped and started again: below those that the system gives to outgoing connections, one
/// of which might have it meanwhile.
pub fn free_port() -> u16 {
    loop {
        let port = rand::random_range(12_000..32_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, name: &str) {
    let status = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{name} {pid}");
}

/// Runs SQL on a SQLite file, as a SQLite shell would.
pub fn sqlite(file: &std::path::Path, sql: &str) {
    let output = std::process::Command::new("sqlite3").args(["-cmd", ".timeout 5000"]).arg(file).arg(sql).output();
    let output = output.unwrap_or_else(|error| panic!("sqlite3 is not installed ({error}): run scripts/test"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes the embedded catalogue in a file of another name.
pub fn catalogue(file: &std::path::Path) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/sql/sqlite.sql");
    sqlite(file, &format!(".read '{script}'"));
}

/// See [`instance::Instance::drag`].
pub fn drag(file: &std::path::Path, steps: u64) {
    let view = "CREATE TABLE drag (steps INTEGER);
        ALTER TABLE product RENAME TO product_rows;
        CREATE VIEW product AS SELECT rows.* FROM product_rows AS rows WHERE (
          WITH RECURSIVE step(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM step WHERE n < (SELECT steps FROM drag))
          SELECT count(*) FROM step) > 0;";
    let prepared = std::process::Command::new("sqlite3").arg(file).arg("SELECT 1 FROM drag").output().expect("sqlite3");
    if !prepared.status.success() {
        sqlite(file, view);
    }
    sqlite(file, &format!("DELETE FROM drag; INSERT INTO drag VALUES ({steps})"));
}
