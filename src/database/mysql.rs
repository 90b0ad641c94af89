//! MySQL 8 and MariaDB 10.6 and later, with the schema of `sql/mysql.sql`.
//!
//! Knows its types and its change feed. Versions are taken before the commit, so they become visible out of order.
//! Invariant of the feed: a version below the highest read is either read, remembered as a gap, or known to be rolled
//! back.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use chrono::{NaiveDate, NaiveDateTime};
use futures_util::{FutureExt, future::BoxFuture};
use rust_decimal::Decimal;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, TypeInfo, ValueRef,
    mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow, MySqlSslMode},
};

use super::{
    BadRow, Changes, Engine, Error, Kind, Position, Row, Table, Value,
    gaps::Gaps,
    pool::{Connect, Failure, Pool},
};
use crate::config::{self, Login, Server, Tls};

/// Changes read at once: bounds memory; more is asked for at once.
const FEED_PAGE: i64 = 10_000;
/// How the schema's procedure deletes old changes: when a version is a multiple of the step, those this much lower.
const PRUNE: (i64, i64) = (1000, 100_000);
/// Names a server among those that a client may be led to: their versions are not each other's.
const ORIGIN: &str = "concat(@@hostname, ':', @@port, ':', @@server_id)";

pub(super) struct MySql {
    pool: Pool<Opener>,
    what: String,
}

struct Opener {
    options: MySqlConnectOptions,
    /// On the server.
    query_timeout: Duration,
}

impl Connect for Opener {
    type Connection = MySqlConnection;

    async fn connect(&self) -> Result<MySqlConnection, Failure> {
        let mut connection = self.options.connect().await.map_err(failure)?;
        let version: String =
            sqlx::query_scalar("SELECT version()").fetch_one(&mut connection).await.map_err(failure)?;
        let limit = match version.contains("MariaDB") {
            true => format!("max_statement_time = {}", self.query_timeout.as_secs_f64()),
            false => format!("max_execution_time = {}", self.query_timeout.as_millis()),
        };
        // Read committed: a locking read must not lock gaps that writers want. One second is the shortest lock wait.
        let set = format!(
            "SET SESSION {limit}, SESSION innodb_lock_wait_timeout = 1;
             SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
        );
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut connection).await.map_err(failure)?;
        Ok(connection)
    }

    async fn ping(&self, connection: &mut MySqlConnection) -> Result<(), Failure> {
        connection.ping().await.map_err(failure)
    }
}

impl MySql {
    /// Describes the pool; nothing is opened before the first use.
    pub(super) fn new(config: &config::Database, server: &Server) -> Self {
        let opener = Opener { options: options(server), query_timeout: super::server_side(config.query_timeout) };
        Self {
            pool: Pool::new(opener, config, config.max_connections),
            what: format!("{} at {}:{}", server.database, server.host, server.port),
        }
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        let columns: Vec<_> = table.columns.iter().map(|(name, _)| *name).collect();
        let sql = format!("SELECT {}, {} FROM {}", table.key, columns.join(", "), table.name);
        let is_key = format!("{} = ?", table.key);
        let rows = self.any_of(&sql, &is_key, keys.iter().map(|key| vec![*key]).collect(), "").await?;
        Ok(rows.iter().map(|row| decode(table, row)).collect())
    }

    /// Runs a query for rows that meet the condition with any of these parameters. Their number is filled up to a power
    /// of two with the last ones, so that few statements are prepared.
    async fn any_of(
        &self,
        select: &str,
        condition: &str,
        mut parameters: Vec<Vec<i64>>,
        clause: &str,
    ) -> Result<Vec<MySqlRow>, Error> {
        let Some(last) = parameters.last().cloned() else { return Ok(Vec::new()) };
        parameters.resize(parameters.len().next_power_of_two(), last);
        let conditions = vec![condition; parameters.len()].join(" OR ");
        let sql = format!("{select} WHERE {conditions} {clause}");
        let rows = self.pool.run(|connection| {
            let query = sqlx::query(AssertSqlSafe(sql.clone()));
            let query = parameters.iter().flatten().fold(query, |query, number| query.bind(*number));
            async move { query.fetch_all(connection).await.map_err(failure) }.boxed()
        });
        rows.await
    }

    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        // All that is kept: a version that is not there may be of a transaction still open.
        let sql = format!("SELECT {ORIGIN}, version FROM (SELECT 1) AS here LEFT JOIN {}_change ON true", table.name);
        let rows = self.pool.run(|connection| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone()));
            async move { query.fetch_all(connection).await.map_err(failure) }.boxed()
        });
        let rows: Vec<(String, Option<i64>)> = rows.await?;
        let gaps = Gaps::begin(&rows.iter().filter_map(|(_, version)| *version).collect());
        let origin = rows.into_iter().next().map(|(origin, _)| origin).unwrap_or_default();
        Ok(Mark { origin, gaps }.into())
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        let everything = async || {
            let position = self.latest_change(table).await?;
            Ok(Changes { keys: Vec::new(), position, overrun: true, more: false })
        };
        let Some(mut mark) = Mark::read(position) else { return everything().await };
        let mut changes = self.read_gaps(table, &mut mark.gaps).await?;
        let sql = format!(
            "SELECT {ORIGIN}, latest.version, changed.version, {key}
             FROM (SELECT coalesce(max(version), 0) AS version FROM {name}_change) AS latest
             LEFT JOIN {name}_change AS changed ON changed.version > ? ORDER BY changed.version LIMIT ?",
            key = table.key,
            name = table.name,
        );
        let before = mark.gaps.highest();
        let rows = self.pool.run(|connection| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone())).bind(before).bind(FEED_PAGE);
            async move { query.fetch_all(connection).await.map_err(failure) }.boxed()
        });
        type Line = (String, i64, Option<i64>, Option<i32>);
        let rows: Vec<Line> = rows.await?;
        let Some((origin, latest, ..)) = rows.first().cloned() else { return everything().await };
        // What was not seen yet may have been deleted since the last look; or this is not what was read before.
        let unseen = mark.gaps.missing().first().map_or(before + 1, |gap| *gap.start());
        let pruned = pruned_up_to(latest) > pruned_up_to(before) && unseen <= pruned_up_to(latest);
        if pruned || latest < before || origin != mark.origin {
            return everything().await;
        }
        let new: BTreeMap<_, _> = rows.into_iter().filter_map(|row| row.2.zip(row.3)).collect();
        let more = new.len() as i64 == FEED_PAGE;
        mark.gaps.seen(&new.keys().copied().collect());
        changes.extend(new);
        let keys: BTreeSet<_> = changes.into_values().map(i64::from).collect();
        Ok(Changes { keys: keys.into_iter().collect(), position: mark.into(), overrun: false, more })
    }

    /// Reads what has appeared in gaps, and settles those whose transactions were rolled back.
    async fn read_gaps(&self, table: &'static Table, gaps: &mut Gaps) -> Result<BTreeMap<i64, i32>, Error> {
        let select = format!("SELECT version, {} FROM {}_change", table.key, table.name);
        let read = async |ranges: Vec<RangeInclusive<i64>>, clause| -> Result<BTreeMap<i64, i32>, Error> {
            let bounds = ranges.into_iter().map(|range| vec![*range.start(), *range.end()]).collect();
            let rows = self.any_of(&select, "version BETWEEN ? AND ?", bounds, clause).await?;
            let changes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<sqlx::Result<_>>();
            changes.map_err(|error| Error::Unavailable(error.to_string()))
        };
        let mut changes = read(gaps.missing(), "").await?;
        gaps.seen(&changes.keys().copied().collect());
        // A locking read waits for whoever wrote a version and has not committed yet.
        match read(gaps.look(), "LOCK IN SHARE MODE").await {
            Ok(closed) => {
                gaps.nobody_holds();
                gaps.seen(&closed.keys().copied().collect());
                changes.extend(closed);
            }
            Err(error) => tracing::debug!(%error, "a transaction that changes products is still open"),
        }
        Ok(changes)
    }
}

impl Engine for MySql {
    fn open(&self) -> BoxFuture<'_, Result<String, Error>> {
        async {
            let version = self.pool.run(|connection| {
                let version = sqlx::query_scalar("SELECT version()");
                async move { version.fetch_one(connection).await.map_err(failure) }.boxed()
            });
            let version: String = version.await?;
            let product = if version.contains("MariaDB") { "MariaDB" } else { "MySQL" };
            Ok(format!("{product} {version}, {}", self.what))
        }
        .boxed()
    }

    fn rows<'a>(
        &'a self,
        table: &'static Table,
        keys: &'a [i64],
    ) -> BoxFuture<'a, Result<Vec<Result<Row, BadRow>>, Error>> {
        self.rows(table, keys).boxed()
    }

    fn latest_change(&self, table: &'static Table) -> BoxFuture<'_, Result<Position, Error>> {
        self.latest_change(table).boxed()
    }

    fn changes_since<'a>(
        &'a self,
        table: &'static Table,
        position: &'a Position,
    ) -> BoxFuture<'a, Result<Changes, Error>> {
        self.changes_since(table, position).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.pool.close();
        std::future::ready(()).boxed()
    }
}

/// What a position says: the server it belongs to, and what of its versions was read.
struct Mark {
    origin: String,
    gaps: Gaps,
}

impl Mark {
    fn read(position: &Position) -> Option<Self> {
        let (origin, gaps) = position.0.split_once(' ')?;
        Some(Self { origin: origin.to_owned(), gaps: gaps.parse().ok()? })
    }
}

impl From<Mark> for Position {
    fn from(mark: Mark) -> Self {
        Self(format!("{} {}", mark.origin, mark.gaps))
    }
}

/// The last version that is deleted by the time that this one is there.
fn pruned_up_to(version: i64) -> i64 {
    let (step, kept) = PRUNE;
    version / step * step - kept
}

fn options(server: &Server) -> MySqlConnectOptions {
    let options = MySqlConnectOptions::new()
        .host(&server.host)
        .port(server.port)
        .database(&server.database)
        .disable_statement_logging();
    let options = match &server.login {
        // An empty password is not the same as none.
        Login::Password { user, password } if password.reveal().is_empty() => options.username(user),
        Login::Password { user, password } => options.username(user).password(password.reveal()),
        // Refused when the settings were read.
        Login::ManagedIdentity { .. } => options,
    };
    match &server.tls {
        Tls::Off => options.ssl_mode(MySqlSslMode::Disabled),
        Tls::Unverified => options.ssl_mode(MySqlSslMode::Required),
        Tls::Verified { ca_file, .. } => {
            let options = options.ssl_mode(MySqlSslMode::VerifyIdentity);
            match ca_file {
                Some(file) => options.ssl_ca(file),
                None => options,
            }
        }
    }
}

fn failure(error: sqlx::Error) -> Failure {
    // Shutdown in progress, too many connections, connection killed, query interrupted.
    const AGAIN: [u16; 4] = [1053, 1040, 1927, 1317];
    let lost = match &error {
        sqlx::Error::Database(error) => error
            .try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>()
            .is_some_and(|error| AGAIN.contains(&error.number())),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::Tls(_) => true,
        _ => false,
    };
    let problem = super::problem(&error);
    if lost { Failure::Lost(problem) } else { Failure::Refused(problem) }
}

fn decode(table: &'static Table, row: &MySqlRow) -> Result<Row, BadRow> {
    // The key is what the row was found by, so it is a number.
    let key: i64 = row.try_get_unchecked(0).unwrap_or_default();
    let values = table.columns.iter().enumerate().map(|(index, (column, kind))| {
        decode_value(row, index + 1, *kind).map_err(|problem| BadRow { key, column, problem })
    });
    Ok(Row { key, values: values.collect::<Result<_, _>>()? })
}

fn decode_value(row: &MySqlRow, index: usize, kind: Kind) -> Result<Option<Value>, String> {
    fn get<'r, T>(row: &'r MySqlRow, index: usize) -> Result<T, String>
    where
        T: sqlx::Decode<'r, sqlx::MySql> + sqlx::Type<sqlx::MySql>,
    {
        row.try_get_unchecked(index).map_err(|_| "cannot be decoded".to_owned())
    }
    let raw = row.try_get_raw(index).map_err(|_| "is missing")?;
    if raw.is_null() {
        return Ok(None);
    }
    let stored = raw.type_info().name().to_owned();
    let is_text = matches!(stored.as_str(), "VARCHAR" | "CHAR" | "TEXT" | "TINYTEXT" | "MEDIUMTEXT" | "LONGTEXT");
    let is_binary = stored.ends_with("BLOB") || stored.ends_with("BINARY");
    let is_integer = ["INT", "BIGINT", "SMALLINT", "TINYINT", "MEDIUMINT"].iter().any(|name| stored.starts_with(name));
    let value = match (kind, stored.as_str()) {
        (Kind::Integer, _) if is_integer => Value::Integer(get(row, index)?),
        // With a binary collation, a column of text calls itself binary.
        (Kind::Text, _) if is_text || is_binary => Value::Text(get(row, index)?),
        (Kind::Decimal(scale), "DECIMAL") => super::rescaled(get(row, index)?, scale),
        (Kind::Decimal(scale), _) if is_integer => super::rescaled(Decimal::from(get::<i64>(row, index)?), scale),
        (Kind::DateTime, "DATETIME" | "TIMESTAMP") => Value::DateTime(get::<NaiveDateTime>(row, index)?),
        (Kind::DateTime, "DATE") => Value::DateTime(get::<NaiveDate>(row, index)?.and_time(chrono::NaiveTime::MIN)),
        (Kind::Guid, _) if is_text || is_binary => Value::Guid(get::<String>(row, index)?.to_ascii_lowercase()),
        (Kind::Binary, _) if is_binary => Value::Binary(get(row, index)?),
        (_, stored) => return Err(format!("is of type {stored}")),
    };
    Ok(Some(value))
}
