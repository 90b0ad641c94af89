//! The one database pool, whatever the engine: rows of a table by their keys, and which keys changed.
//!
//! The only place that names a driver; one file per engine. Knows no entity: a [`Table`] says which columns to read
//! and as what, a [`Row`] holds their values in that order. Connects on first use, never at start.

mod sqlite;

use std::time::Duration;

use chrono::NaiveDateTime;
use rust_decimal::Decimal;

use crate::config;

/// A table whose rows are read by an integer key.
pub struct Table {
    /// Name in the engine's schema script.
    pub name: &'static str,
    /// Column of the primary key.
    pub key: &'static str,
    /// The columns to read, in the order of [`Row`].
    pub columns: &'static [(&'static str, Kind)],
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32- or 64-bit integer.
    Integer,
    /// Unicode text.
    Text,
    /// Exact decimal with this many digits after the point.
    Decimal(u32),
    /// Date and time without zone, up to 100 ns.
    DateTime,
    /// GUID.
    Guid,
    /// Bytes.
    Binary,
}

/// A column's value. NULL is `None` in [`Row`].
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of [`Kind::Integer`].
    Integer(i64),
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Decimal`], rounded to its scale.
    Decimal(Decimal),
    /// Of [`Kind::DateTime`].
    DateTime(NaiveDateTime),
    /// Of [`Kind::Guid`]: lower case with dashes.
    Guid(String),
    /// Of [`Kind::Binary`].
    Binary(Vec<u8>),
}

/// One row: its key, and a value per column of the [`Table`], in that order.
pub struct Row {
    /// Value of the key column.
    pub key: i64,
    /// Values; `None` is NULL.
    pub values: Vec<Option<Value>>,
}

/// What changed since a position of the change feed.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    /// Keys that changed, without duplicates.
    pub keys: Vec<i64>,
    /// Where to go on.
    pub position: i64,
    /// Changes before this page are no longer known: any key may have changed.
    pub overrun: bool,
    /// More is waiting: ask again at once.
    pub more: bool,
}

/// Why the database did not answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be reached, is overloaded, or failed: try again later.
    #[error("database unavailable: {0}")]
    Unavailable(String),
}

/// A row that holds something that its column's kind cannot: someone must correct it. Others are not affected.
#[derive(Clone, Debug, thiserror::Error)]
#[error("row {key}: column {column}: {problem}")]
pub struct BadRow {
    /// Key of the row.
    pub key: i64,
    /// Column that cannot be read.
    pub column: &'static str,
    /// What is wrong, without the value.
    pub problem: String,
}

/// The pool. Share it behind the `App`; it is made once.
pub struct Database {
    engine: Engine,
    feed_interval: Option<Duration>,
}

enum Engine {
    Sqlite(sqlite::Sqlite),
}

impl Database {
    /// Describes the pool; nothing is opened before the first use.
    pub fn new(config: &config::Database) -> Self {
        Self { engine: Engine::Sqlite(sqlite::Sqlite::new(config)), feed_interval: config.feed_interval }
    }

    /// Opens the first connection now, and says in words what was opened (no secrets).
    pub async fn open(&self) -> Result<String, Error> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.open().await,
        }
    }

    /// The rows with these keys, in one query, in no particular order; keys without a row are left out.
    ///
    /// Dropping the future cancels the query and leaves the pool usable.
    pub async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.rows(table, keys).await,
        }
    }

    /// The position after the latest change.
    pub async fn latest_change(&self, table: &'static Table) -> Result<i64, Error> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.latest_change(table).await,
        }
    }

    /// One page of what changed after `position`.
    pub async fn changes_since(&self, table: &'static Table, position: i64) -> Result<Changes, Error> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.changes_since(table, position).await,
        }
    }

    /// How often the change feed is to be read; `None`: not at all.
    pub fn feed_interval(&self) -> Option<Duration> {
        self.feed_interval
    }

    /// Closes every connection, waiting for queries in flight.
    pub async fn close(&self) {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.close().await,
        }
    }
}
