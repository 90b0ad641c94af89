//! SQLite: the embedded engine, a file that any SQLite client may edit while the program runs.
//!
//! Owns opening (file, else memory), the schema script and the decoding of SQLite's loose types. Money and weights are
//! TEXT, because SQLite's numbers are floats. Invariant: commits are serialised, so change versions are in commit order.

use std::{
    collections::BTreeSet,
    path::Path,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use chrono::{NaiveDate, NaiveDateTime};
use futures_util::{FutureExt, future::ready};
use rust_decimal::Decimal;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, SqliteConnection, TypeInfo, ValueRef,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous},
};
use tokio::sync::OnceCell;

use super::{
    BadRow, Changes, Engine, Error, FEED_PAGE, Kind, Position, Row, Table, Value,
    over_sqlx::{self, get},
    pool::{Connect, Failure, Pool},
};
use crate::config::{self, Secret};

/// Tables, seed rows and triggers of the embedded catalogue.
const SCHEMA: &str = include_str!("../../sql/sqlite.sql");
/// Parameters of a file that is not to be written, not even its journal mode.
const READ_ONLY: [&str; 3] = ["mode=ro", "immutable=true", "immutable=1"];
/// File of the embedded catalogue, in the working directory.
const DEFAULT_FILE: &str = "product-cache.db";
/// Instructions of SQLite's machine between two looks whether anybody still waits: well below a millisecond.
const LOOK: i32 = 10_000;
/// Tells in-memory databases of one process apart.
static NEXT_MEMORY: AtomicUsize = AtomicUsize::new(0);

pub(super) struct Sqlite {
    config: config::Database,
    /// `None`: the embedded catalogue.
    url: Option<Secret>,
    opened: OnceCell<Opened>,
}

struct Opened {
    pool: Pool<Opener>,
    what: String,
    /// A database in memory lives as long as one connection does, and a cancelled query closes the pool's.
    _keeper: Option<Mutex<SqliteConnection>>,
}

struct Opener {
    options: SqliteConnectOptions,
    /// What made the file goes on as the pool's first.
    first: Mutex<Option<SqliteConnection>>,
}

/// A connection whose query ends with it. sqlx's thread would go on, past the pool's bound, until it is through.
struct Session {
    connection: SqliteConnection,
    end: End,
}

struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Connect for Opener {
    type Connection = Session;

    async fn connect(&self) -> Result<Session, Failure> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut connection = match first {
            Some(first) => first,
            None => self.options.connect().await.map_err(failure)?,
        };
        let end = End(Arc::default());
        let ended = end.0.clone();
        let mut handle = connection.lock_handle().await.map_err(failure)?;
        handle.set_progress_handler(LOOK, move || !ended.load(Ordering::Relaxed));
        drop(handle);
        Ok(Session { connection, end })
    }

    async fn ping(&self, session: &mut Session) -> Result<(), Failure> {
        session.connection.ping().await.map_err(failure)
    }

    async fn close(&self, Session { connection, end }: Session) {
        // SQLite deletes the file's -wal when its last connection closes in order.
        let _ = connection.close().await;
        drop(end);
    }
}

#[async_trait]
impl Engine for Sqlite {
    async fn open(&self) -> Result<String, Error> {
        Ok(self.opened().await?.what.clone())
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        // One statement for any number of keys, so that it is prepared once; one for a single key, which is faster.
        let these = if keys.len() == 1 { "= ?1" } else { "IN (SELECT value FROM json_each(?1))" };
        let sql = format!("{} WHERE {} {these}", over_sqlx::select(table), table.key);
        let rows = self.opened().await?.pool.run(|session| {
            let query = sqlx::query(AssertSqlSafe(sql.clone()));
            let query = match keys {
                [key] => query.bind(*key),
                keys => query.bind(serde_json::to_string(keys).unwrap_or_default()),
            };
            async move { query.fetch_all(&mut session.connection).await.map_err(failure) }.boxed()
        });
        rows.await?.iter().map(|row| over_sqlx::row(table, row, decode_value)).collect()
    }

    async fn lowest_key(&self, table: &'static Table) -> Result<Option<i64>, Error> {
        let sql = format!("SELECT CAST(min({}) AS INTEGER) FROM {}", table.key, table.name);
        let key = self.opened().await?.pool.run(|session| {
            let key = sqlx::query_scalar(AssertSqlSafe(sql.clone()));
            async move { key.fetch_one(&mut session.connection).await.map_err(failure) }.boxed()
        });
        key.await
    }

    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        let (latest, schema) = self.latest(table).await?;
        Ok(self.position(latest, schema))
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        let (latest, schema) = self.latest(table).await?;
        // What was written for another file or schema counts as before the first change, which the check below finds out.
        let (version, _) = position.0.split_once(' ').unwrap_or_default();
        let version = version.parse().ok().filter(|version| *position == self.position(*version, schema)).unwrap_or(-1);
        if latest == version {
            return Ok(Changes { keys: Vec::new(), position: position.clone(), overrun: false, more: false });
        }
        let sql = format!(
            "SELECT version, {} FROM {}_change WHERE version > ?1 AND version <= ?2 ORDER BY version LIMIT ?3",
            table.key, table.name
        );
        let rows = self.opened().await?.pool.run(|session| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone())).bind(version).bind(latest).bind(FEED_PAGE);
            async move { query.fetch_all(&mut session.connection).await.map_err(failure) }.boxed()
        });
        let rows: Vec<(i64, i64)> = rows.await?;
        let (first, last) = match (rows.first(), rows.last()) {
            (Some((first, _)), Some((last, _))) => (Some(*first), *last),
            _ => (None, latest),
        };
        Ok(Changes {
            keys: rows.iter().map(|(_, key)| *key).collect::<BTreeSet<_>>().into_iter().collect(),
            position: self.position(last, schema),
            // Versions are gapless, so a jump means pruned changes; a step back, another database under the same name.
            overrun: first != Some(version.saturating_add(1)),
            more: last < latest,
        })
    }

    async fn close(&self) {
        if let Some(opened) = self.opened.get() {
            opened.pool.close().await;
        }
    }
}

impl Sqlite {
    /// The catalogue that the program brings along.
    pub(super) fn embedded(config: &config::Database) -> Self {
        Self { config: config.clone(), url: None, opened: OnceCell::new() }
    }

    /// Somebody's file.
    pub(super) fn named(config: &config::Database, url: &Secret) -> Self {
        Self { config: config.clone(), url: Some(url.clone()), opened: OnceCell::new() }
    }

    /// The latest version, and the schema's: while a table is made anew, say, it has no triggers, and nobody hears of
    /// what changes.
    async fn latest(&self, table: &'static Table) -> Result<(i64, i64), Error> {
        // AUTOINCREMENT's own counter survives the deletion of rows, and an INSERT OR FAIL that fails half-way survives
        // without it.
        let sql = format!(
            "SELECT max(coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{0}_change'), 0),
               coalesce((SELECT max(version) FROM {0}_change), 0)),
               (SELECT schema_version FROM pragma_schema_version),
               (SELECT sum(type = 'trigger' AND tbl_name LIKE '{0}' AND sql LIKE '%{0}_change%')
                  + 3 * sum(type = 'view' AND name LIKE '{0}') FROM sqlite_schema)",
            table.name
        );
        let latest = self.opened().await?.pool.run(|session| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone()));
            async move { query.fetch_one(&mut session.connection).await.map_err(failure) }.boxed()
        });
        let (latest, schema, triggers): (i64, i64, i64) = latest.await?;
        // One for each of INSERT, UPDATE and DELETE; those behind a view are not looked for.
        if triggers < 3 { Err(super::lacks_triggers("sql/sqlite.sql")) } else { Ok((latest, schema)) }
    }

    fn position(&self, version: i64, schema: i64) -> Position {
        Position(format!("{version} {schema} {}", self.file()))
    }

    /// What tells the files that somebody may name apart.
    fn file(&self) -> &str {
        self.url.as_ref().map_or("embedded", Secret::reveal)
    }

    async fn opened(&self) -> Result<&Opened, Error> {
        self.opened.get_or_try_init(|| open(&self.config, self.url.as_ref())).await
    }
}

async fn open(config: &config::Database, url: Option<&Secret>) -> Result<Opened, Error> {
    let Some(url) = url else {
        let file = file_options(config, SqliteConnectOptions::new().filename(DEFAULT_FILE));
        return match create(&file.clone().create_if_missing(true)).await {
            Ok(creator) => open_file(config, file, Some(creator)).await,
            Err(error) if is_unwritable(&error) && !Path::new(DEFAULT_FILE).exists() => {
                open_memory(config).await.map_err(unavailable)
            }
            Err(error) => Err(unavailable(error)),
        };
    };
    // A database that somebody names is theirs: nothing is created or seeded in it.
    let file = SqliteConnectOptions::from_str(url.reveal()).map_err(unavailable)?;
    let file = match READ_ONLY.iter().any(|parameter| url.reveal().contains(parameter)) {
        true => common_options(config, file),
        false => file_options(config, file),
    };
    let opened = open_file(config, file, None).await?;
    let tables = opened.pool.run(|session| async { tables(&mut session.connection).await.map_err(failure) }.boxed());
    let tables = tables.await?;
    for table in ["product", "product_change"] {
        if !tables.iter().any(|name| name == table) && (table == "product" || config.feed_interval.is_some()) {
            return Err(Error::Unavailable(format!("there is no table {table}: sql/sqlite.sql makes it")));
        }
    }
    Ok(opened)
}

fn file_options(config: &config::Database, file: SqliteConnectOptions) -> SqliteConnectOptions {
    common_options(config, file)
        .journal_mode(SqliteJournalMode::Wal) // readers do not wait for a writer
        .synchronous(SqliteSynchronous::Normal)
}

fn common_options(config: &config::Database, file: SqliteConnectOptions) -> SqliteConnectOptions {
    file.create_if_missing(false) // a file that vanishes is an error, not an empty database
        .busy_timeout(config.connect_timeout)
        .disable_statement_logging()
}

/// The file, in a pool that has its first connection.
async fn open_file(
    config: &config::Database,
    file: SqliteConnectOptions,
    first: Option<SqliteConnection>,
) -> Result<Opened, Error> {
    let name = file.get_filename().to_owned();
    let name = std::path::absolute(&name).unwrap_or(name);
    let pool = pool(config, file, first);
    pool.run(|_| ready(Ok(())).boxed()).await?;
    Ok(Opened { pool, what: format!("SQLite file {}", name.display()), _keeper: None })
}

/// Those of our tables that are there.
async fn tables(connection: &mut SqliteConnection) -> sqlx::Result<Vec<String>> {
    let sql =
        "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name IN ('product', 'product_change')";
    sqlx::query_scalar(sql).fetch_all(connection).await
}

async fn open_memory(config: &config::Database) -> sqlx::Result<Opened> {
    // The memdb VFS shares a database between the connections of one process if its name begins with a slash.
    let name = format!("/product-cache-{}", NEXT_MEMORY.fetch_add(1, Ordering::Relaxed));
    let options = SqliteConnectOptions::new()
        .filename(name)
        .vfs("memdb")
        .busy_timeout(config.connect_timeout)
        .disable_statement_logging();
    let keeper = create(&options).await?;
    let what = "SQLite in memory, because the working directory cannot be written: edits end with the process";
    Ok(Opened { pool: pool(config, options, None), what: what.to_owned(), _keeper: Some(Mutex::new(keeper)) })
}

fn pool(config: &config::Database, options: SqliteConnectOptions, first: Option<SqliteConnection>) -> Pool<Opener> {
    Pool::new(Opener { options, first: Mutex::new(first) }, config, config.max_connections)
}

/// Creates and seeds the tables if they are not there. Several processes may do so at once: the first one wins.
async fn create(options: &SqliteConnectOptions) -> sqlx::Result<SqliteConnection> {
    let mut connection = options.connect().await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    if !tables(&mut transaction).await?.iter().any(|table| table == "product") {
        sqlx::raw_sql(SCHEMA).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(connection)
}

/// Whether a file could not be made or written, as opposed to being broken or busy.
fn is_unwritable(error: &sqlx::Error) -> bool {
    // SQLite's primary result codes READONLY (8) and CANTOPEN (14); the low byte of an extended code.
    let sqlx::Error::Database(error) = error else { return false };
    let code = error.code().and_then(|code| code.parse::<u32>().ok());
    matches!(code.map(|code| code & 0xff), Some(8 | 14))
}

fn unavailable(error: sqlx::Error) -> Error {
    failure(error).into()
}

fn failure(error: sqlx::Error) -> Failure {
    over_sqlx::failure(error, |_| false)
}

fn decode_value(row: &SqliteRow, index: usize, kind: Kind) -> Result<Option<Value>, String> {
    let text = || get::<_, Option<String>>(row, index);
    let raw = row.try_get_raw(index).map_err(|_| "is missing")?;
    Ok(match kind {
        // SQLite makes a number of whatever is there.
        Kind::Integer if !raw.is_null() && raw.type_info().name() != "INTEGER" => {
            return Err(format!("is of type {}", raw.type_info().name()));
        }
        Kind::Integer => get::<_, Option<i64>>(row, index)?.map(Value::Integer),
        Kind::Binary => get::<_, Option<Vec<u8>>>(row, index)?.map(Value::Binary),
        Kind::Text => text()?.map(Value::Text),
        Kind::Guid => text()?.map(|text| Value::Guid(text.to_ascii_lowercase())),
        Kind::DateTime => text()?.map(|text| date_time(&text).ok_or("is not a date")).transpose()?.map(Value::DateTime),
        Kind::Decimal(scale) => text()?.map(|text| decimal(&text, scale)).transpose()?,
    })
}

fn decimal(text: &str, scale: u32) -> Result<Value, &'static str> {
    super::rescaled(Decimal::from_str(text).map_err(|_| "is not a decimal")?, scale)
}

/// `YYYY-MM-DD`, a `T` or a blank, `HH:MM:SS` with up to seven more digits; or the date alone.
fn date_time(text: &str) -> Option<NaiveDateTime> {
    ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"]
        .iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        .or_else(|| NaiveDate::from_str(text).ok()?.and_hms_opt(0, 0, 0))
}
