//! MySQL 8.0.22 and MariaDB 10.6 and later, with the schema of `sql/mysql.sql`.
//!
//! Knows its types and its change feed. Versions are taken before the commit, so they become visible out of order.
//! Invariant of the feed: a version below the highest read is either read, remembered as a gap, or known to be rolled
//! back.

mod gaps;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use async_trait::async_trait;
use chrono::{NaiveDate, NaiveDateTime};
use futures_util::FutureExt;
use rust_decimal::Decimal;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, TypeInfo, ValueRef,
    error::DatabaseError,
    mysql::{MySqlConnectOptions, MySqlConnection, MySqlDatabaseError, MySqlRow, MySqlSslMode},
};

use self::gaps::Gaps;
use super::{
    BadRow, Changes, Engine, Error, FEED_PAGE, Kind, Position, Row, Table, Value,
    over_sqlx::{self, get},
    pool::{Connect, Failure, Pool},
};
use crate::{
    config::{self, Login, Server, Tls},
    finding::{Budget, Finding},
};

/// Names a database among those that a client may be led to: their versions are not each other's.
const ORIGIN: &str = "concat(@@hostname, ':', @@port, ':', @@server_id, ':', replace(database(), ' ', '_'))";
/// A row is locked: lock wait timeout in MariaDB, its own error in MySQL.
const LOCKED: [u16; 2] = [1205, 3572];
/// Ten times what the event leaves each minute.
const MOST_KEPT: i64 = 1_000_000;

pub(super) struct MySql {
    pool: Pool<Opener>,
    what: String,
}

struct Opener {
    options: MySqlConnectOptions,
    /// On the server.
    query_timeout: Duration,
}

struct Session {
    connection: MySqlConnection,
    is_mariadb: bool,
}

impl Connect for Opener {
    type Connection = Session;

    async fn connect(&self) -> Result<Session, Failure> {
        let mut connection = self.options.connect().await.map_err(failure)?;
        let version: String =
            sqlx::query_scalar("SELECT version()").fetch_one(&mut connection).await.map_err(failure)?;
        let is_mariadb = version.contains("MariaDB");
        let limit = match is_mariadb {
            true => format!("max_statement_time = {}", self.query_timeout.as_secs_f64()),
            false => format!("max_execution_time = {}", self.query_timeout.as_millis()),
        };
        // Read committed: a locking read must not lock gaps that writers want.
        let set = format!("SET SESSION {limit}; SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED");
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut connection).await.map_err(failure)?;
        Ok(Session { connection, is_mariadb })
    }

    async fn ping(&self, session: &mut Session) -> Result<(), Failure> {
        session.connection.ping().await.map_err(failure)
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

    /// Runs a query for rows that meet the condition with any of these parameters. Their number is filled up to a power
    /// of two with the last ones, so that few statements are prepared.
    async fn any_of(
        &self,
        select: &str,
        condition: &str,
        mut parameters: Vec<Vec<i64>>,
        order: &str,
    ) -> Result<Vec<MySqlRow>, Error> {
        let Some(last) = parameters.last().cloned() else { return Ok(Vec::new()) };
        parameters.resize(parameters.len().next_power_of_two(), last);
        let conditions = vec![condition; parameters.len()].join(" OR ");
        let sql = format!("{select} WHERE {conditions} {order}");
        let rows = self.pool.run(|session| {
            let query = sqlx::query(AssertSqlSafe(sql.clone()));
            let query = parameters.iter().flatten().fold(query, |query, number| query.bind(*number));
            async move { query.fetch_all(&mut session.connection).await.map_err(failure) }.boxed()
        });
        rows.await
    }

    /// Reads a page of what has appeared in gaps, and settles those whose transactions were rolled back. `true`: there
    /// is more, or was when the first page of it was read.
    async fn read_gaps(&self, table: &'static Table, gaps: &mut Gaps) -> Result<(BTreeMap<i64, i32>, bool), Error> {
        let select = format!("SELECT version, {} FROM {}_change", table.key, table.name);
        let bounds = gaps.unlooked().into_iter().map(|gap| vec![*gap.start(), *gap.end()]).collect();
        let order = format!("ORDER BY version LIMIT {}", FEED_PAGE + 1);
        let rows = self.any_of(&select, "version BETWEEN ? AND ?", bounds, &order).await?;
        let mut changes = changes(&rows)?;
        // What was committed after the first page was read is not in the last one.
        let mut more = gaps.is_looking();
        let mut upto = None;
        if changes.len() as i64 > FEED_PAGE {
            changes.pop_last();
            upto = changes.keys().next_back().copied();
            more = true;
        }
        let seen = changes.keys().copied().collect();
        gaps.seen(&seen);
        for part in gaps.look(upto).into_iter().flat_map(|due| Gaps::parts(due, &seen)) {
            let Some(rows) = self.unless_held(&select, &part).await? else {
                tracing::debug!("a transaction that changes products is still open");
                continue;
            };
            gaps.nobody_holds(&part);
            changes.extend(self::changes(&rows)?);
        }
        gaps.seen(&changes.keys().copied().collect());
        Ok((changes, more))
    }

    /// The rows in this gap, unless somebody has written there and has not committed yet, or has just now committed more
    /// than a page. Waits for nobody.
    async fn unless_held(&self, select: &str, gap: &RangeInclusive<i64>) -> Result<Option<Vec<MySqlRow>>, Error> {
        let rows = self.pool.run(|session| {
            let locking = if session.is_mariadb { "LOCK IN SHARE MODE NOWAIT" } else { "FOR SHARE NOWAIT" };
            let sql = format!("{select} WHERE version BETWEEN ? AND ? LIMIT {} {locking}", FEED_PAGE + 1);
            let query = sqlx::query(AssertSqlSafe(sql)).bind(*gap.start()).bind(*gap.end());
            async move {
                match query.fetch_all(&mut session.connection).await {
                    Ok(rows) => Ok(Some(rows).filter(|rows| rows.len() as i64 <= FEED_PAGE)),
                    Err(sqlx::Error::Database(error))
                        if number(&*error).is_some_and(|number| LOCKED.contains(&number)) =>
                    {
                        Ok(None)
                    }
                    Err(error) => Err(failure(error)),
                }
            }
            .boxed()
        });
        rows.await
    }
}

fn changes(rows: &[MySqlRow]) -> Result<BTreeMap<i64, i32>, Error> {
    let changes = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<sqlx::Result<_>>();
    changes.map_err(|error| Error::Unavailable(error.to_string()))
}

fn lacks_row(table: &'static Table) -> Error {
    Error::Unavailable(format!("{}_change_pruned has no row: sql/mysql.sql makes it", table.name))
}

#[async_trait]
impl Engine for MySql {
    async fn open(&self) -> Result<String, Error> {
        let version = self.pool.run(|session| {
            let version = sqlx::query_scalar("SELECT version()");
            async move { version.fetch_one(&mut session.connection).await.map_err(failure) }.boxed()
        });
        let version: String = version.await?;
        let product = if version.contains("MariaDB") { "MariaDB" } else { "MySQL" };
        Ok(format!("{product} {version}, {}", self.what))
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        let is_key = format!("{} = ?", table.key);
        let rows =
            self.any_of(&over_sqlx::select(table), &is_key, keys.iter().map(|key| vec![*key]).collect(), "").await?;
        rows.iter().map(|row| over_sqlx::row(table, row, decode_value)).collect()
    }

    async fn lowest_key(&self, table: &'static Table) -> Result<Option<i64>, Error> {
        let sql = format!("SELECT CAST(min({}) AS SIGNED) FROM {}", table.key, table.name);
        let key = self.pool.run(|session| {
            let key = sqlx::query_scalar(AssertSqlSafe(sql.clone()));
            async move { key.fetch_one(&mut session.connection).await.map_err(failure) }.boxed()
        });
        key.await
    }

    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        // Every gap in what is kept: a version that is not there may be of a transaction still open. After a page of them,
        // the last one stands for the rest.
        let sql = format!(
            "SELECT {ORIGIN}, pruned.version, latest.version, gap.low, gap.high
             FROM {name}_change_pruned AS pruned
             CROSS JOIN (SELECT coalesce(max(version), 0) AS version FROM {name}_change) AS latest
             LEFT JOIN (
               SELECT coalesce(lag(version) OVER (ORDER BY version), 0) + 1 AS low, version - 1 AS high
               FROM {name}_change) AS gap ON gap.low <= gap.high
             ORDER BY gap.low LIMIT ?",
            name = table.name
        );
        let rows = self.pool.run(|session| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone())).bind(FEED_PAGE);
            async move { query.fetch_all(&mut session.connection).await.map_err(failure) }.boxed()
        });
        let rows: Vec<(String, i64, i64, Option<i64>, Option<i64>)> = rows.await?;
        let (origin, pruned, latest, ..) = rows.first().cloned().ok_or_else(|| lacks_row(table))?;
        let is_full = rows.len() as i64 == FEED_PAGE;
        let mut missing: Vec<_> = rows.into_iter().filter_map(|(.., first, last)| Some(first?..=last?)).collect();
        if let Some(last) = missing.last_mut().filter(|_| is_full) {
            *last = *last.start()..=latest - 1;
        }
        Ok(Mark { origin, pruned, gaps: Gaps::begin(latest, missing) }.into())
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        let everything = async || {
            let position = self.latest_change(table).await?;
            Ok(Changes { keys: Vec::new(), position, overrun: true, more: false })
        };
        let Some(mut mark) = Mark::read(position) else { return everything().await };
        let (mut changes, more_in_gaps) = self.read_gaps(table, &mut mark.gaps).await?;
        let sql = format!(
            "SELECT {ORIGIN}, pruned.version, latest.version, changed.version, {key}
             FROM {name}_change_pruned AS pruned
             CROSS JOIN (SELECT coalesce(max(version), 0) AS version FROM {name}_change) AS latest
             LEFT JOIN {name}_change AS changed ON changed.version > ? ORDER BY changed.version LIMIT ?",
            key = table.key,
            name = table.name,
        );
        let before = mark.gaps.highest();
        let rows = self.pool.run(|session| {
            let query = sqlx::query_as(AssertSqlSafe(sql.clone())).bind(before).bind(FEED_PAGE);
            async move { query.fetch_all(&mut session.connection).await.map_err(failure) }.boxed()
        });
        type Line = (String, i64, i64, Option<i64>, Option<i32>);
        let rows: Vec<Line> = rows.await?;
        let (origin, pruned, latest, ..) = rows.first().cloned().ok_or_else(|| lacks_row(table))?;
        // What was not seen yet may have been deleted since the last look; or this is not what was read before.
        let unseen = mark.gaps.lowest().unwrap_or(before.saturating_add(1));
        let missed = pruned > mark.pruned && unseen <= pruned;
        if missed || latest.max(pruned) < before || origin != mark.origin {
            return everything().await;
        }
        mark.pruned = pruned;
        let new: BTreeMap<_, _> = rows.into_iter().filter_map(|row| row.3.zip(row.4)).collect();
        let more = more_in_gaps || new.len() as i64 == FEED_PAGE;
        mark.gaps.seen(&new.keys().copied().collect());
        changes.extend(new);
        let keys: BTreeSet<_> = changes.into_values().map(i64::from).collect();
        Ok(Changes { keys: keys.into_iter().collect(), position: mark.into(), overrun: false, more })
    }

    async fn examine(&self, table: &'static Table, budget: Budget) -> Result<Vec<Finding>, Error> {
        // The event itself is nothing that this login can see.
        let sql = format!(
            "SELECT CAST(@@max_connections AS SIGNED), @@event_scheduler = 'ON' OR @@event_scheduler = '1', @@read_only,
               (SELECT coalesce(max(version) - min(version), 0) FROM {}_change)",
            table.name
        );
        let facts = self.pool.run(|connection| {
            let row = sqlx::query_as(AssertSqlSafe(sql.clone()));
            async move { row.fetch_one(&mut connection.connection).await.map_err(failure) }.boxed()
        });
        let (allowed, prunes, is_replica, kept): (i64, i64, i64, i64) = facts.await?;
        let triggers = format!(
            "whether {0} has its triggers is not for this login to see: SHOW TRIGGERS LIKE '{0}' must show three",
            table.name
        );
        let mut findings = vec![budget.within(allowed as u64, None), Finding::ok(triggers)];
        if prunes == 0 {
            findings.push(Finding::warn(
                "the event scheduler is off, so that the change table only grows",
                "SET GLOBAL event_scheduler = ON, and in the server's configuration",
            ));
        }
        if kept > MOST_KEPT {
            findings.push(Finding::warn(
                format!("more than {MOST_KEPT} changes are kept: nobody deletes the old ones"),
                "SHOW EVENTS must show product_change_prune as ENABLED; sql/mysql.sql makes it",
            ));
        }
        if is_replica != 0 {
            findings.push(Finding::fail("it is read-only: a replica, which lags", "point Sql at the primary"));
        }
        Ok(findings)
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}

/// What a position says: the database it belongs to, the highest version that was deleted by then, and what of the
/// versions was read.
struct Mark {
    origin: String,
    pruned: i64,
    gaps: Gaps,
}

impl Mark {
    fn read(position: &Position) -> Option<Self> {
        let mut parts = position.0.splitn(3, ' ');
        let (origin, pruned, gaps) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { origin: origin.to_owned(), pruned: pruned.parse().ok()?, gaps: gaps.parse().ok()? })
    }
}

impl From<Mark> for Position {
    fn from(mark: Mark) -> Self {
        Self(format!("{} {} {}", mark.origin, mark.pruned, mark.gaps))
    }
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
    const PASSING: [u16; 4] = [1053, 1040, 1927, 1317];
    over_sqlx::failure(error, |error| number(error).is_some_and(|number| PASSING.contains(&number)))
}

fn number(error: &dyn DatabaseError) -> Option<u16> {
    Some(error.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

fn decode_value(row: &MySqlRow, index: usize, kind: Kind) -> Result<Option<Value>, String> {
    let raw = row.try_get_raw(index).map_err(|_| "is missing")?;
    if raw.is_null() {
        return Ok(None);
    }
    let stored = raw.type_info().name().to_owned();
    let is_text = matches!(stored.as_str(), "VARCHAR" | "CHAR" | "TEXT" | "TINYTEXT" | "MEDIUMTEXT" | "LONGTEXT");
    let is_binary = stored.ends_with("BLOB") || stored.ends_with("BINARY");
    let is_integer =
        ["INT", "BIGINT", "SMALLINT", "TINYINT", "MEDIUMINT", "BOOLEAN"].iter().any(|name| stored.starts_with(name));
    let integer = || match stored.ends_with("UNSIGNED") {
        true => i64::try_from(get::<_, u64>(row, index)?).map_err(|_| "is out of range".to_owned()),
        false => get::<_, i64>(row, index),
    };
    let value = match (kind, stored.as_str()) {
        (Kind::Integer, _) if is_integer => Value::Integer(integer()?),
        // With a binary collation, a column of text calls itself binary.
        (Kind::Text, _) if is_text || is_binary => Value::Text(get(row, index)?),
        (Kind::Decimal(scale), "DECIMAL") => super::rescaled(get(row, index)?, scale)?,
        (Kind::Decimal(scale), _) if is_integer => super::rescaled(Decimal::from(integer()?), scale)?,
        (Kind::DateTime, "DATETIME" | "TIMESTAMP") => Value::DateTime(get::<_, NaiveDateTime>(row, index)?),
        (Kind::DateTime, "DATE") => Value::DateTime(get::<_, NaiveDate>(row, index)?.and_time(chrono::NaiveTime::MIN)),
        (Kind::Guid, _) if is_text || is_binary => Value::Guid(get::<_, String>(row, index)?.to_ascii_lowercase()),
        (Kind::Binary, _) if is_binary => Value::Binary(get(row, index)?),
        (_, stored) => return Err(format!("is of type {stored}")),
    };
    Ok(Some(value))
}
