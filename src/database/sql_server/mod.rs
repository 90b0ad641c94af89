//! SQL Server and Azure SQL: rows by key, and SQL Server's change tracking as the change feed.
//!
//! Owns the SQL; `connect` how a connection is made, `decode` what columns become. Invariants: an answer is read to its
//! end before a connection is used again; a feed's position is taken before the changes are read, and whether they
//! were still all there is checked after.

mod connect;
mod decode;

use std::collections::BTreeSet;

use async_trait::async_trait;
use futures_util::FutureExt;
use tiberius::Query;

use self::connect::{Connection, Connector, failure};
use super::{
    BadRow, Changes, Engine, Error, FEED_PAGE, Position, Row, Table,
    pool::{Failure, Pool},
};
use crate::{
    config::{self, Server},
    finding::{Budget, Finding},
};

/// Parameters of one statement. SQL Server allows 2,100; readers ask for at most 100 keys.
const MOST_PARAMETERS: usize = 1024;
/// Changes kept for less do not outlast a night.
const SHORTEST_RETENTION_MINUTES: i64 = 24 * 60;
/// No such object, no permission, no change tracking on the table: what the access script sees to.
const NO_ACCESS: [u32; 3] = [208, 229, 22_105];
const ACCESS: &str = "sql/sqlserver-access.sql turns change tracking on and grants what is needed";
/// What tells this database from another, or an older copy, under the same name: restoring and renaming both count as
/// its creation. Every user may read this row. Not by `DB_ID()`, which Azure numbers differently.
const CREATED: &str = "(SELECT CONVERT(nvarchar(30), create_date, 126) FROM sys.databases WHERE name = DB_NAME())";

pub(super) struct SqlServer {
    pool: Pool<Connector>,
    place: String,
}

#[async_trait]
impl Engine for SqlServer {
    async fn open(&self) -> Result<String, Error> {
        let sql = "SELECT CAST(SERVERPROPERTY('Edition') AS nvarchar(128)), \
                   CAST(SERVERPROPERTY('ProductVersion') AS nvarchar(128))";
        let rows = self.query(sql.to_owned(), Vec::new()).await?;
        let row = rows.first().and_then(|rows| rows.first());
        let text = |index| row.and_then(|row| row.try_get::<&str, usize>(index).ok()?).unwrap_or("unknown");
        Ok(format!("SQL Server ({} {}), {}", text(0), text(1), self.place))
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        let select = format!(
            "SELECT {} FROM {} WHERE [{}]",
            decode::select_list(table),
            quoted(table.sql_server_name),
            table.key
        );
        let mut found = Vec::new();
        for keys in keys.chunks(MOST_PARAMETERS) {
            // OPENJSON would make this one statement for any number of keys, but databases that came from SQL Server
            // 2014 or older may still be set not to have it. Repeating the last key up to a power of two keeps the
            // number of statements, and so of plans, to one per power.
            let count = keys.len().next_power_of_two();
            let sql = match count {
                1 => format!("{select} = @P1"),
                count => {
                    let names: Vec<_> = (1..=count).map(|number| format!("@P{number}")).collect();
                    format!("{select} IN ({})", names.join(", "))
                }
            };
            let last = keys.last().into_iter().copied().cycle();
            let parameters = keys.iter().copied().chain(last).take(count).collect();
            let rows = self.query(sql, parameters).await?.into_iter().flatten();
            for row in rows {
                found.push(decode::row(table, row)?);
            }
        }
        Ok(found)
    }

    async fn lowest_key(&self, table: &'static Table) -> Result<Option<i64>, Error> {
        let sql = format!("SELECT CAST(MIN([{}]) AS bigint) FROM {}", table.key, quoted(table.sql_server_name));
        Ok(self.numbers(&sql).await?.first().and_then(|numbers| numbers[0]))
    }

    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        Ok(self.feed(table, None).await?.0.position())
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        // What no change tracking wrote counts as before the first change.
        let (since, created) = position.0.split_once('@').unwrap_or_default();
        let since = since.parse().unwrap_or(-1);
        let (state, changes) = self.feed(table, Some(since.max(0))).await?;
        let known = (state.first_known..=state.latest).contains(&since) && state.created == created;
        let Some((end, more)) = page_end(&changes).filter(|_| known) else {
            return Ok(Changes { keys: Vec::new(), position: state.position(), overrun: true, more: false });
        };
        let whole = changes.iter().filter(|(version, _)| *version <= end);
        let keys: BTreeSet<_> = whole.map(|(_, key)| *key).collect();
        let position = State { latest: end.min(state.latest), ..state }.position();
        Ok(Changes { keys: keys.into_iter().collect(), position, overrun: false, more })
    }

    async fn examine(&self, _: &'static Table, budget: Budget) -> Result<Vec<Finding>, Error> {
        let mut findings = self.examine_feed().await?;
        let limit = self.numbers("SELECT CAST(@@MAX_CONNECTIONS AS bigint)").await?;
        findings.extend(limit.first().map(|numbers| {
            let mut finding = budget.within(numbers[0].unwrap_or(0) as u64, None);
            // Only Azure's documentation says how much the tier allows.
            finding.what += " (by @@MAX_CONNECTIONS; a tier of Azure SQL ends sooner, at its workers, which are not \
                             visible from here: docs/operations.md)";
            finding
        }));
        findings.extend(self.examine_locks().await?);
        findings.extend(self.examine_trigger().await?);
        Ok(findings)
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}

impl SqlServer {
    /// Describes the pool; nothing is opened before the first use.
    pub(super) fn new(config: &config::Database, server: &Server) -> Self {
        Self {
            pool: Pool::new(Connector::new(config, server), config, config.max_connections),
            place: format!("database {} on {}:{}", server.database, server.host, server.port),
        }
    }

    /// How long changes are kept: whoever does not ask for longer has to take everything for changed.
    async fn examine_feed(&self) -> Result<Vec<Finding>, Error> {
        let sql = "SELECT CAST(retention_period AS bigint) * CASE retention_period_units WHEN 1 THEN 1 WHEN 2 THEN 60 ELSE 1440 END, \
                   CAST(is_auto_cleanup_on AS bigint) FROM sys.change_tracking_databases WHERE database_id = DB_ID()";
        let found = self.numbers(sql).await?;
        // Nothing to see without the right to: then the feed's own look has said what there is to say.
        let Some([Some(minutes), Some(cleans)]) = found.first().map(|numbers| &numbers[..]) else {
            return Ok(Vec::new());
        };
        let mut findings = vec![match *minutes {
            minutes if minutes < SHORTEST_RETENTION_MINUTES => Finding::warn(
                format!("changes are kept for {minutes} minutes: an outage of that length makes everything stale"),
                "ALTER DATABASE CURRENT SET CHANGE_TRACKING (CHANGE_RETENTION = 2 DAYS)",
            ),
            minutes => Finding::ok(format!("changes are kept for {} hours", minutes / 60)),
        }];
        if *cleans == 0 {
            findings.push(Finding::warn(
                "changes are never cleaned up, so that what is kept only grows",
                "ALTER DATABASE CURRENT SET CHANGE_TRACKING (AUTO_CLEANUP = ON)",
            ));
        }
        Ok(findings)
    }

    /// Whether readers wait for writers.
    async fn examine_locks(&self) -> Result<Option<Finding>, Error> {
        let sql = "SELECT CAST(is_read_committed_snapshot_on AS bigint) FROM sys.databases WHERE name = DB_NAME()";
        let found = self.numbers(sql).await?;
        let is_off = found.first().is_some_and(|numbers| numbers[0] == Some(0));
        Ok(is_off.then(|| {
            Finding::warn(
                "READ_COMMITTED_SNAPSHOT is off: a transaction that writes products holds up loads and the change feed",
                "ALTER DATABASE CURRENT SET READ_COMMITTED_SNAPSHOT ON, while nobody else is connected",
            )
        }))
    }

    /// Rows that the SQL trigger has given up: it tries a change five times and then leaves it.
    async fn examine_trigger(&self) -> Result<Vec<Finding>, Error> {
        let sql = "SELECT name FROM sys.tables WHERE schema_id = SCHEMA_ID(N'az_func') AND name LIKE N'Leases[_]%'";
        let tables = self.query(sql.to_owned(), Vec::new()).await?;
        let names = tables.iter().flatten().filter_map(|row| row.try_get::<&str, usize>(0).ok().flatten());
        let mut findings = Vec::new();
        for name in names {
            let table = format!("[az_func].[{}]", name.replace(']', "]]"));
            let sql =
                format!("SELECT COUNT_BIG(*), COUNT_BIG(CASE WHEN _az_func_AttemptCount >= 5 THEN 1 END) FROM {table}");
            let counts = self.numbers(&sql).await?;
            let [Some(leases), Some(given_up)] = counts.first().map_or(&[][..], |counts| counts) else { continue };
            findings.push(match *given_up {
                0 => Finding::ok(format!("the SQL trigger has {leases} changes at work in {table}, none given up")),
                given_up => Finding::fail(
                    format!("the SQL trigger has given up {given_up} of {leases} changes in {table} after five attempts"),
                    format!("find out why in the app's log; then UPDATE {table} SET _az_func_AttemptCount = 0 WHERE _az_func_AttemptCount >= 5"),
                ),
            });
        }
        Ok(findings)
    }

    async fn numbers(&self, sql: &str) -> Result<Vec<Vec<Option<i64>>>, Error> {
        let rows = self.query(sql.to_owned(), Vec::new()).await?.into_iter().flatten();
        let numbers = |row: tiberius::Row| {
            (0..row.len()).map(|index| row.get_column_data(index).ok().and_then(decode::integer)).collect()
        };
        Ok(rows.map(numbers).collect())
    }

    /// How far the feed goes, and up to a page and one of what changed after `since`: (version, key), oldest first.
    async fn feed(&self, table: &'static Table, since: Option<i64>) -> Result<(State, Vec<(i64, i64)>), Error> {
        let (name, key) = (quoted(table.sql_server_name), table.key);
        let mut sql = "DECLARE @latest bigint = CHANGE_TRACKING_CURRENT_VERSION(); ".to_owned();
        if since.is_some() {
            // CHANGETABLE wants a bigint and no expression; parameters are as narrow as their values.
            sql += "DECLARE @since bigint = @P1; ";
            // Changes later than @latest are let through, to be told again: a row shows only its last change, so one
            // that changes all the time would never come up.
            sql += &format!(
                "SELECT TOP ({}) SYS_CHANGE_VERSION, [{key}] FROM CHANGETABLE(CHANGES {name}, @since) AS changed \
                 ORDER BY SYS_CHANGE_VERSION; ",
                FEED_PAGE + 1
            );
        }
        sql += &format!("SELECT @latest, CHANGE_TRACKING_MIN_VALID_VERSION(OBJECT_ID(N'{name}')), {CREATED};");
        let mut results = self.query(sql, since.into_iter().collect()).await?;
        let state = results.pop().and_then(|rows| rows.into_iter().next());
        let state = state.ok_or_else(|| Error::Unavailable("the change feed has no state".to_owned()))?;
        let number = |index| state.get_column_data(index).ok().and_then(decode::integer);
        let (Some(latest), Some(first_known)) = (number(0_usize), number(1)) else {
            return Err(Error::Unavailable(format!(
                "no change tracking on {name} for this login, so its changes cannot be followed: {ACCESS}"
            )));
        };
        let created = state.try_get::<&str, usize>(2).ok().flatten().unwrap_or_default().to_owned();
        let changes = results.into_iter().flatten().filter_map(|row| {
            let number = |index| row.get_column_data(index).ok().and_then(decode::integer);
            Some((number(0_usize)?, number(1)?))
        });
        Ok((State { latest, first_known, created }, changes.collect()))
    }

    /// One round trip; every result set, read to its end.
    async fn query(&self, sql: String, parameters: Vec<i64>) -> Result<Vec<Vec<tiberius::Row>>, Error> {
        self.pool
            .run(move |connection: &mut Connection| {
                let (sql, parameters) = (sql.clone(), parameters.clone());
                async move {
                    let answer = bound(sql, parameters).query(connection).await.map_err(told)?;
                    answer.into_results().await.map_err(told)
                }
                .boxed()
            })
            .await
    }
}

/// The state of change tracking.
struct State {
    /// Version of the last change committed.
    latest: i64,
    /// Changes after this version are all still known.
    first_known: i64,
    /// See [`CREATED`].
    created: String,
}

impl State {
    fn position(&self) -> Position {
        Position(format!("{}@{}", self.latest, self.created))
    }
}

/// Up to which version a page of changes is whole, and whether there are more. `None` if not even one version is.
fn page_end(changes: &[(i64, i64)]) -> Option<(i64, bool)> {
    let Some((cut, _)) = changes.get(FEED_PAGE as usize) else { return Some((i64::MAX, false)) };
    let (whole, _) = changes.iter().rev().find(|(version, _)| version < cut)?;
    Some((*whole, true))
}

fn bound(sql: String, parameters: Vec<i64>) -> Query<'static> {
    let mut query = Query::new(sql);
    for parameter in parameters {
        // As narrow as the column may be, so that the index on it serves.
        match i32::try_from(parameter) {
            Ok(parameter) => query.bind(parameter),
            Err(_) => query.bind(parameter),
        }
    }
    query
}

fn told(error: tiberius::error::Error) -> Failure {
    let no_access = error.code().is_some_and(|code| NO_ACCESS.contains(&code));
    match failure(error) {
        Failure::Refused(problem) if no_access => Failure::Refused(format!("{problem} ({ACCESS})")),
        failure => failure,
    }
}

/// `SalesLT.Product` → `[SalesLT].[Product]`.
fn quoted(name: &str) -> String {
    name.split('.').map(|part| format!("[{part}]")).collect::<Vec<_>>().join(".")
}
