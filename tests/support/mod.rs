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

pub use self::basics::{PATIENCE, eventually, free_port, signal};

/// Runs SQL on a SQLite file, as a SQLite shell would; returns what it prints.
pub fn sqlite(file: &std::path::Path, sql: &str) -> String {
    let output = std::process::Command::new("sqlite3").args(["-cmd", ".timeout 5000"]).arg(file).arg(sql).output();
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
