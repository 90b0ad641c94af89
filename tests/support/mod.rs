//! What tests stand on: the binary as a process, the cache of one instance without it, private Redis servers, a proxy
//! that breaks connections, a stand-in for SQL Server, HTTP.
//!
//! Everything listens on 127.0.0.1 at a port the system chose, lives in a folder of its own, and ends with its owner.

mod basics;
pub mod certificates;
pub mod database;
pub mod host;
pub mod http;
pub mod identity;
pub mod instance;
pub mod node;
pub mod proxy;
pub mod redis;
pub mod redis_cluster;
pub mod tds;

use std::time::Duration;

pub use self::basics::{PATIENCE, eventually, eventually_within, free_port, signal};

/// How long a server of others may take to start, a database foremost.
pub const SERVER_START: Duration = Duration::from_secs(60);
/// Settings for where a late answer of Redis is not the subject: on a slow machine, too, none sends a read to the
/// database.
pub const PATIENT: [(&str, &str); 3] =
    [("REDIS_RESPONSE_TIMEOUT_MS", "2000"), ("REDIS_CONNECT_TIMEOUT_MS", "5000"), ("REQUEST_TIMEOUT_MS", "60000")];
/// For where it is: those that the handler has by itself.
pub const PROMPT: [(&str, &str); 2] = [("REDIS_RESPONSE_TIMEOUT_MS", "250"), ("REDIS_CONNECT_TIMEOUT_MS", "1000")];

/// Runs SQL on a SQLite file, as a SQLite shell would; returns what it prints. The thread waits, so nothing is synced:
/// no test loses its machine's power.
pub fn sqlite(file: &std::path::Path, sql: &str) -> String {
    let mut shell = std::process::Command::new("sqlite3");
    let first = ["-cmd", ".timeout 60000", "-cmd", "PRAGMA synchronous=OFF"];
    let output = shell.args(first).arg(file).arg(sql).output();
    let output = output.unwrap_or_else(|error| panic!("sqlite3 is not installed ({error}): run scripts/test"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Makes the embedded catalogue in a file of another name.
pub fn catalogue(file: &std::path::Path) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/sql/sqlite.sql");
    sqlite(file, &format!(".read '{script}'"));
}

/// See [`instance::Instance::drag`].
pub fn drag(file: &std::path::Path, steps: u64) {
    let view = "BEGIN IMMEDIATE;
        CREATE TABLE drag (steps INTEGER);
        ALTER TABLE product RENAME TO product_rows;
        CREATE VIEW product AS SELECT rows.* FROM product_rows AS rows WHERE (
          WITH RECURSIVE step(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM step WHERE n < (SELECT steps FROM drag))
          SELECT count(*) FROM step) > 0;
        COMMIT;";
    if sqlite(file, "SELECT name FROM sqlite_schema WHERE name = 'drag'").is_empty() {
        sqlite(file, view);
    }
    sqlite(file, &format!("BEGIN IMMEDIATE; DELETE FROM drag; INSERT INTO drag VALUES ({steps}); COMMIT;"));
}
