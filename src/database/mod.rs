//! The one database pool, whatever the engine: rows of a table by their keys, and which keys changed.
//!
//! The only place that names a driver; one module per engine. Knows no entity: a [`Table`] says which columns to read
//! and as what, a [`Row`] holds their values in that order. Connects on first use, never at start.

mod mysql;
mod over_sqlx;
mod pool;
mod postgres;
mod sql_server;
mod sqlite;

use std::{
    fmt,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use chrono::NaiveDateTime;
use rust_decimal::{Decimal, RoundingStrategy};
use tokio::time::timeout;

use crate::{
    config::{self, Source},
    finding::{Budget, Finding},
};

/// Changes that an engine reads at once: bounds memory; more is asked for at once.
const FEED_PAGE: i64 = 10_000;

/// A table whose rows are read by an integer key.
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Its name in SQL Server, where tables are kept in schemas.
    pub sql_server_name: &'static str,
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

/// How far a change feed has been read: text that only the engine that gave it can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position(String);

impl From<String> for Position {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What changed since a position of the change feed.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    /// Keys that changed, without duplicates.
    pub keys: Vec<i64>,
    /// Where to go on.
    pub position: Position,
    /// Changes before this page are no longer known: any key may have changed.
    pub overrun: bool,
    /// More is waiting: ask again at once. If not, these are all that were committed when it was asked.
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
    engine: Box<dyn Engine>,
    max_connections: u32,
    query_timeout: Duration,
    feed_interval: Option<Duration>,
}

/// What an engine must do. Dropping a future cancels the query and leaves the pool usable.
#[async_trait]
trait Engine: Send + Sync {
    /// Opens the first connection now, and says in words what was opened (no secrets).
    async fn open(&self) -> Result<String, Error>;

    /// The rows with these keys, in one query, in no particular order; keys without a row are left out.
    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error>;

    /// The lowest key there is, if there is a row.
    async fn lowest_key(&self, table: &'static Table) -> Result<Option<i64>, Error>;

    /// The position after every change committed so far.
    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error>;

    /// What was committed after `position`: at least one page of it.
    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error>;

    /// Ends when the engine was told that something changed, or might have been told and was not listening. Never
    /// ends where the engine tells nothing.
    async fn change_hint(&self, _table: &'static Table) {
        std::future::pending().await
    }

    /// What this engine in particular needs, beyond what all do.
    async fn examine(&self, _table: &'static Table, _budget: Budget) -> Result<Vec<Finding>, Error> {
        Ok(Vec::new())
    }

    /// Closes the connections; one at work is closed when it is done.
    async fn close(&self);
}

impl Database {
    /// Describes the pool; nothing is opened before the first use.
    pub fn new(config: &config::Database) -> Self {
        let engine: Box<dyn Engine> = match &config.source {
            Source::Embedded => Box::new(sqlite::Sqlite::embedded(config)),
            Source::Sqlite(url) => Box::new(sqlite::Sqlite::named(config, url)),
            Source::Postgres(server) => Box::new(postgres::Postgres::new(config, server)),
            Source::MySql(server) => Box::new(mysql::MySql::new(config, server)),
            Source::SqlServer(server) => Box::new(sql_server::SqlServer::new(config, server)),
        };
        let &config::Database { max_connections, query_timeout, feed_interval, .. } = config;
        Self { engine, max_connections, query_timeout, feed_interval }
    }

    /// Opens the first connection now, and says in words what was opened (no secrets).
    pub async fn open(&self) -> Result<String, Error> {
        self.within(self.engine.open()).await
    }

    /// The rows with these keys, in one query, in no particular order; keys without a row are left out.
    ///
    /// Dropping the future cancels the query and leaves the pool usable.
    pub async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        self.within(self.engine.rows(table, keys)).await
    }

    /// The position after every change committed so far.
    pub async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        self.within(self.engine.latest_change(table)).await
    }

    /// One page of what was committed after `position`; nothing is ever skipped, some of it may be repeated.
    pub async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        self.within(self.engine.changes_since(table, position)).await
    }

    /// Looks at everything that a deployment may get wrong, in seconds. For the app with this many instances at most.
    pub(crate) async fn examine(&self, table: &'static Table, instances: Option<u64>) -> Vec<Finding> {
        let (began, budget) = (Instant::now(), Budget { each: self.max_connections.into(), instances });
        match self.open().await {
            Ok(what) => {
                let mut findings =
                    vec![Finding::ok(format!("{what}; connected in {} ms", began.elapsed().as_millis()))];
                findings.extend(self.examine_table(table).await);
                findings.extend(match self.within(self.engine.examine(table, budget)).await {
                    Ok(findings) => findings,
                    Err(error) => {
                        vec![Finding::warn(error.to_string(), "look into it: this part could not be examined")]
                    }
                });
                findings
            }
            Err(error) => vec![Finding::fail(
                error.to_string(),
                "check Sql, the server's firewall or private endpoint, and the login (docs/databases.md)",
            )],
        }
    }

    async fn examine_table(&self, table: &'static Table) -> Vec<Finding> {
        let schema = "make the table by the script for this engine in sql/, and grant SELECT on it";
        let key = match self.within(self.engine.lowest_key(table)).await {
            Ok(key) => key.unwrap_or(1),
            Err(error) => return vec![Finding::fail(error.to_string(), schema)],
        };
        // Warm: the first statement of its kind is compiled.
        let _ = self.rows(table, &[key]).await;
        let began = Instant::now();
        let read = match self.rows(table, &[key]).await {
            Ok(rows) if rows.iter().any(Result::is_err) => {
                let bad = rows.into_iter().find_map(Result::err).map_or_else(String::new, |bad| bad.to_string());
                Finding::fail(bad, "give the column the type that it has in the engine's script in sql/")
            }
            Ok(_) => Finding::ok(format!("a row by its key takes {:.1} ms", began.elapsed().as_secs_f64() * 1000.0)),
            Err(error) => return vec![Finding::fail(error.to_string(), schema)],
        };
        // To ask for the position alone touches nothing that the script makes, on some engines.
        let asked = async { self.changes_since(table, &self.latest_change(table).await?).await };
        let feed = match asked.await {
            Ok(changes) if changes.overrun => Finding::fail(
                "the change feed says at every look that everything may have changed",
                "let Sql name one server, and no balancer before several; run the script for this engine in sql/",
            ),
            Ok(_) => Finding::ok("the change feed can be read"),
            Err(error) => {
                Finding::fail(error.to_string(), "run the script for this engine in sql/: it sees to change tracking")
            }
        };
        vec![read, feed]
    }

    /// Waits until it is time to ask for changes again: after `pause`, or sooner where the engine tells of changes.
    pub async fn wait_for_changes(&self, table: &'static Table, pause: Duration) {
        let _ = timeout(pause, self.engine.change_hint(table)).await;
    }

    /// How often the change feed is to be read; `None`: not at all.
    pub fn feed_interval(&self) -> Option<Duration> {
        self.feed_interval
    }

    /// Closes the connections; one at work is closed when it is done.
    pub async fn close(&self) {
        self.engine.close().await;
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        timeout(self.query_timeout, work).await.unwrap_or_else(|_| {
            Err(Error::Unavailable(format!("no answer within {} ms", self.query_timeout.as_millis())))
        })
    }
}

/// Nobody can tell which of those asked for a row is: whoever took it for none would say that there is no such row.
fn unknown_key(table: &'static Table, problem: &str) -> Error {
    Error::Unavailable(format!("column {} {problem}", table.key))
}

/// Nobody tells the feed of changes, or not of all. The script makes what is missing.
fn lacks_triggers(script: &str) -> Error {
    Error::Unavailable(format!("the table lacks the triggers that tell of changes, or they are disabled: see {script}"))
}

/// A decimal as a column of this scale shows it: rounded as SQL Server rounds what is stored in a money column.
fn rescaled(mut decimal: Decimal, scale: u32) -> Result<Value, &'static str> {
    decimal = decimal.round_dp_with_strategy(scale, RoundingStrategy::MidpointAwayFromZero);
    decimal.rescale(scale);
    // With too many digits before the point, it keeps fewer behind it.
    if decimal.scale() == scale { Ok(Value::Decimal(decimal)) } else { Err("has more than 28 digits") }
}

/// How long the server itself lets a query run: a little longer than the handler waits, so that it is the handler's bound
/// that is reported.
fn server_side(query_timeout: Duration) -> Duration {
    query_timeout + Duration::from_secs(1)
}
