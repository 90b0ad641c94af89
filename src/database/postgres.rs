//! PostgreSQL 13 and later, with the schema of `sql/postgresql.sql`.
//!
//! Knows its types, its change feed and `LISTEN`. Invariant of the feed: a position is a snapshot, and what is read are
//! the changes that it could not see and the present can; no order of commits can hide one.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{Datelike, NaiveDate, NaiveDateTime, TimeDelta};
use futures_util::FutureExt;
use rust_decimal::Decimal;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, TypeInfo, ValueRef,
    postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions, PgRow, PgSslMode},
};
use tokio::{runtime::Handle, sync::Notify, time::timeout};
use uuid::Uuid;

use super::{
    BadRow, Changes, Engine, Error, FEED_PAGE, Kind, Position, Row, Table, Value,
    over_sqlx::{self, get},
    pool::{Connect, Failure, Pool},
};
use crate::{
    background::{Task, keep_running},
    config::{self, Login, Server, Tls},
    finding::{Budget, Finding},
};

/// Bound of each step of beginning to listen. Nobody waits for it.
const BEGIN: Duration = Duration::from_secs(10);
/// After as much silence a connection is replaced: one that was lost without a word would be silent for ever.
const SILENCE: Duration = Duration::from_secs(300);
/// As many changes may be left for long where few are written, as those who write delete them.
const MOST_OLD: i64 = 10_000;

pub(super) struct Postgres {
    pool: Pool<Opener>,
    /// How to open one more connection, for `LISTEN`; it is part of the bound.
    listen: Option<PgConnectOptions>,
    listener: Mutex<Option<Task>>,
    heard: Arc<Notify>,
    what: String,
}

struct Opener(PgConnectOptions);

impl Connect for Opener {
    type Connection = PgConnection;

    async fn connect(&self) -> Result<PgConnection, Failure> {
        self.0.connect().await.map_err(failure)
    }

    async fn ping(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        connection.ping().await.map_err(failure)
    }
}

impl Postgres {
    /// Describes the pool; nothing is opened before the first use.
    pub(super) fn new(config: &config::Database, server: &Server) -> Self {
        let options = options(config, server);
        let listens = config.feed_interval.is_some() && config.max_connections > 1;
        Self {
            listen: listens.then(|| options.clone()),
            listener: Mutex::default(),
            heard: Arc::default(),
            pool: Pool::new(Opener(options), config, config.max_connections - u32::from(listens)),
            what: format!("{} at {}:{}", server.database, server.host, server.port),
        }
    }
}

#[async_trait]
impl Engine for Postgres {
    async fn open(&self) -> Result<String, Error> {
        let version = self.pool.run(|connection| {
            let version = sqlx::query_scalar("SELECT current_setting('server_version')");
            async move { version.fetch_one(connection).await.map_err(failure) }.boxed()
        });
        let version: String = version.await?;
        Ok(format!("PostgreSQL {version}, {}", self.what))
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        // Any number of keys is one statement, prepared once for each connection.
        let sql = format!("{} WHERE {} = ANY($1)", over_sqlx::select(table), table.key);
        let rows = self.pool.run(|connection| {
            let query = || sqlx::query(AssertSqlSafe(sql.clone())).bind(keys.to_vec());
            let (first, again) = (query(), query());
            async move {
                match first.fetch_all(&mut *connection).await {
                    Err(error) if is_outdated(&error) => {
                        connection.clear_cached_statements().await.map_err(failure)?;
                        again.fetch_all(connection).await.map_err(failure)
                    }
                    rows => rows.map_err(failure),
                }
            }
            .boxed()
        });
        rows.await?.iter().map(|row| over_sqlx::row(table, row, decode_value)).collect()
    }

    async fn lowest_key(&self, table: &'static Table) -> Result<Option<i64>, Error> {
        let sql = format!("SELECT CAST(min({}) AS int8) FROM {}", table.key, table.name);
        let key = self.pool.run(|connection| {
            let key = sqlx::query_scalar(AssertSqlSafe(sql.clone()));
            async move { key.fetch_one(connection).await.map_err(failure) }.boxed()
        });
        key.await
    }

    async fn latest_change(&self, table: &'static Table) -> Result<Position, Error> {
        let sql = format!("SELECT {}, pg_current_snapshot()::text", origin(table));
        let latest = self.pool.run(|connection| {
            let row = sqlx::query_as(AssertSqlSafe(sql.clone()));
            async move { row.fetch_one(connection).await.map_err(failure) }.boxed()
        });
        let (origin, snapshot): (Option<String>, String) = latest.await?;
        Ok(Mark { origin: heard(origin)?, seen: snapshot, page: None }.into())
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        let everything = async || {
            Ok(Changes { keys: Vec::new(), position: self.latest_change(table).await?, overrun: true, more: false })
        };
        let Some(mark) = Mark::read(position) else { return everything().await };
        // One statement sees one snapshot; the left join gives a row even if nothing changed. Transactions still to come
        // are another server's, out of a dump of it. Bound, order and limit are those of one index, so that no plan reads
        // the rest; and `here` is planned as one row, or the server would compile what takes no time.
        let sql = format!(
            "WITH here AS MATERIALIZED (
               SELECT {origin} AS origin, pg_current_snapshot() AS now,
                 $1::text::pg_snapshot AS seen, coalesce($2::text::pg_snapshot, pg_current_snapshot()) AS upto,
                 coalesce($3::text::xid8, pg_snapshot_xmin($1::text::pg_snapshot)) AS after,
                 (SELECT transaction FROM {name}_change_pruned) AS pruned)
             SELECT origin, upto::text,
               pruned >= pg_snapshot_xmin(seen) AND pruned < pg_snapshot_xmax(now) AS overrun,
               pg_snapshot_xmax(seen) > pg_snapshot_xmax(now) AS ahead, transaction::text::int8, version, {key} AS key
             FROM here LEFT JOIN LATERAL (
               SELECT transaction, version, {key} FROM {name}_change AS change
               WHERE (change.transaction, change.version) > (after, $4)
                 AND change.transaction < pg_snapshot_xmax(upto)
                 AND NOT pg_visible_in_snapshot(change.transaction, seen)
                 AND pg_visible_in_snapshot(change.transaction, upto)
               ORDER BY change.transaction, change.version LIMIT $5) AS change ON true
             ORDER BY change.transaction, change.version",
            origin = origin(table),
            name = table.name,
            key = table.key,
        );
        let page = mark.page.clone();
        let rows = self.pool.run(|connection| {
            let (upto, transaction, version) = match page.clone() {
                Some(Page { upto, after: (transaction, version) }) => {
                    (Some(upto), Some(transaction.to_string()), version)
                }
                None => (None, None, i64::MIN),
            };
            let query = sqlx::query(AssertSqlSafe(sql.clone())).bind(mark.seen.clone()).bind(upto);
            let query = query.bind(transaction).bind(version).bind(FEED_PAGE);
            async move { query.fetch_all(connection).await.map_err(failure) }.boxed()
        });
        let rows = rows.await?;
        let read = || -> sqlx::Result<_> {
            let head = rows.first().ok_or(sqlx::Error::RowNotFound)?;
            let (origin, upto): (Option<String>, String) = (head.try_get("origin")?, head.try_get("upto")?);
            let lost = head.try_get("overrun")? || head.try_get("ahead")?;
            let mut changes = Vec::with_capacity(rows.len());
            for row in &rows {
                if let Some(transaction) = row.try_get::<Option<i64>, _>("transaction")? {
                    let key: Option<i32> = row.try_get("key")?;
                    changes.push(((transaction as u64, row.try_get("version")?), key));
                }
            }
            Ok((origin, lost, upto, changes))
        };
        let (origin, lost, upto, changes) = read().map_err(|error| Error::Unavailable(error.to_string()))?;
        let lost = heard(origin)? != mark.origin || lost;
        if lost || changes.iter().any(|(_, key)| key.is_none()) {
            return everything().await;
        }
        let is_full = changes.len() as i64 == FEED_PAGE;
        // What was committed after the first page's snapshot is not in the last one.
        let more = is_full || mark.page.is_some();
        let position = match changes.last() {
            Some((after, _)) if is_full => Mark { page: Some(Page { upto, after: *after }), ..mark },
            _ => Mark { seen: upto, page: None, ..mark },
        };
        let mut keys: Vec<_> = changes.into_iter().filter_map(|(_, key)| key).map(i64::from).collect();
        keys.sort_unstable();
        keys.dedup();
        Ok(Changes { keys, position: position.into(), overrun: false, more })
    }

    async fn change_hint(&self, table: &'static Table) {
        let Some(options) = &self.listen else { return std::future::pending().await };
        self.listener.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| {
            let (options, heard) = (options.clone(), self.heard.clone());
            keep_running(&Handle::current(), "listener", move || listen(options.clone(), table, heard.clone()))
        });
        self.heard.notified().await;
    }

    async fn examine(&self, table: &'static Table, budget: Budget) -> Result<Vec<Finding>, Error> {
        let sql = format!(
            "SELECT current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8,
               (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'), pg_is_in_recovery(),
               (SELECT count(*) FROM (SELECT FROM {}_change WHERE changed_at < now() - interval '3 days' LIMIT {})
                AS old)",
            table.name,
            MOST_OLD + 1
        );
        let facts = self.pool.run(|connection| {
            let row = sqlx::query_as(AssertSqlSafe(sql.clone()));
            async move { row.fetch_one(connection).await.map_err(failure) }.boxed()
        });
        let (allowed, used, is_standby, old): (i64, i64, bool, i64) = facts.await?;
        let mut findings = vec![budget.within(allowed as u64, Some(used as u64))];
        if is_standby {
            findings
                .push(Finding::fail("it is a standby, which lags and has no change feed", "point Sql at the primary"));
        }
        if old > MOST_OLD {
            findings.push(Finding::warn(
                format!("more than {MOST_OLD} changes are older than three days: they should be deleted after two"),
                "let the owner call product_change_prune() every minute, as the head of sql/postgresql.sql shows",
            ));
        }
        Ok(findings)
    }

    async fn close(&self) {
        self.pool.close().await;
        drop(self.listener.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// An expression for what tells a feed from others, and from itself after it was restored or taken over by a standby, or
/// what no trigger tells was done to the table: cluster, timeline, database, tables and triggers. Empty if those do not
/// hear of everything (a view's are not its own); NULL on a standby.
fn origin(table: &'static Table) -> String {
    // The control file's timeline is that of the last checkpoint, minutes behind a promotion. A trigger's type says what
    // it hears of: 4 INSERT, 8 DELETE, 16 UPDATE, 32 TRUNCATE. In catalogues, xmin says when something was last altered.
    format!(
        "(SELECT CASE WHEN class.relkind NOT IN ('r', 'p') OR triggers.events & 60 = 60 THEN concat_ws('.', system_identifier,
            left(pg_walfile_name(pg_current_wal_lsn()), 8), database.oid, '{0}_change'::regclass::oid,
            class.oid, class.xmin, triggers.altered) ELSE '' END
          FROM pg_control_system(), pg_database AS database, pg_class AS class, (
            SELECT bit_or(tgtype::int4) AS events, sum(trigger.xmin::text::int8) AS altered
            FROM pg_trigger AS trigger JOIN pg_proc AS function ON function.oid = tgfoid
            WHERE tgrelid = '{0}'::regclass AND tgenabled IN ('O', 'A') AND proname = '{0}_changed') AS triggers
          WHERE datname = current_database() AND class.oid = '{0}'::regclass AND NOT pg_is_in_recovery())",
        table.name
    )
}

/// What [`origin`] says, if there is a feed.
fn heard(origin: Option<String>) -> Result<String, Error> {
    let origin = origin.ok_or_else(standby)?;
    if origin.is_empty() {
        return Err(super::lacks_triggers("sql/postgresql.sql"));
    }
    Ok(origin)
}

/// There, snapshots do not say which transactions are still open.
fn standby() -> Error {
    Error::Unavailable("the change feed needs the primary, and this server is a standby".to_owned())
}

/// Notifies `heard` of whatever the server tells on the table's channel, until the connection is lost.
async fn listen(options: PgConnectOptions, table: &'static Table, heard: Arc<Notify>) {
    if let Err(error) = listen_once(&options, table, &heard).await {
        tracing::debug!(%error, "cannot listen for changes; the feed is read at its interval");
    }
}

async fn listen_once(options: &PgConnectOptions, table: &'static Table, heard: &Notify) -> sqlx::Result<()> {
    let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None).acquire_timeout(BEGIN);
    let pool = pool.connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    let channel = format!("{}_change", table.name);
    timeout(BEGIN, listener.listen(&channel)).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
    loop {
        // Before the first wait, too: what was committed before LISTEN took effect notified nobody.
        heard.notify_one();
        let Ok(heard) = timeout(SILENCE, listener.try_recv()).await else { return Ok(()) };
        if heard?.is_none() {
            return Ok(());
        }
    }
}

/// What a position says: the server it belongs to, the snapshot up to which everything was read, and how far what came
/// then was.
struct Mark {
    origin: String,
    seen: String,
    page: Option<Page>,
}

/// In the midst of many changes: the snapshot being read, and transaction and version of the last change that was.
#[derive(Clone)]
struct Page {
    upto: String,
    after: (u64, i64),
}

impl Mark {
    fn read(position: &Position) -> Option<Self> {
        let mut parts = position.0.split(' ');
        let (origin, seen) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let page = match (parts.next(), parts.next()) {
            (Some(upto), Some(after)) if is_snapshot(upto) => {
                let (transaction, version) = after.split_once('/')?;
                Some(Page { upto: upto.to_owned(), after: (transaction.parse().ok()?, version.parse().ok()?) })
            }
            (None, _) => None,
            _ => return None,
        };
        is_snapshot(&seen).then_some(Self { origin, seen, page })
    }
}

/// `xmin:xmax:xid,…` as PostgreSQL takes it: what it refuses would be refused at every look.
fn is_snapshot(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    let &[xmin, xmax, open] = &parts[..] else { return false };
    let open = open.split(',').filter(|xid| !xid.is_empty());
    let numbers: Option<Vec<u64>> = [xmin].into_iter().chain(open).chain([xmax]).map(|xid| xid.parse().ok()).collect();
    // The open ones lie from xmin to below xmax.
    numbers.is_some_and(|numbers| {
        numbers[0] > 0
            && numbers.is_sorted()
            && (numbers.len() == 2 || numbers[numbers.len() - 2] < numbers[numbers.len() - 1])
    })
}

impl From<Mark> for Position {
    fn from(Mark { origin, seen, page }: Mark) -> Self {
        let page = page.map_or_else(String::new, |Page { upto, after }| format!(" {upto} {}/{}", after.0, after.1));
        Self(format!("{origin} {seen}{page}"))
    }
}

fn options(config: &config::Database, server: &Server) -> PgConnectOptions {
    let options = PgConnectOptions::new_without_pgpass()
        .host(&server.host)
        .port(server.port)
        .database(&server.database)
        .application_name(&server.application_name)
        .options([("statement_timeout", super::server_side(config.query_timeout).as_millis().to_string())])
        .disable_statement_logging();
    let options = match &server.login {
        Login::Password { user, password } => options.username(user).password(password.reveal()),
        // Refused when the settings were read.
        Login::ManagedIdentity { .. } => options,
    };
    match &server.tls {
        Tls::Off => options.ssl_mode(PgSslMode::Disable),
        Tls::Unverified => options.ssl_mode(PgSslMode::Require),
        Tls::Verified { ca_file, .. } => {
            let options = options.ssl_mode(PgSslMode::VerifyFull);
            match ca_file {
                Some(file) => options.ssl_root_cert(file),
                None => options,
            }
        }
    }
}

fn failure(error: sqlx::Error) -> Failure {
    // SQLSTATE classes: 08 connection, 57P sent away by the operator, 40 to be tried again.
    const PASSING: [&str; 3] = ["08", "57P", "40"];
    over_sqlx::failure(error, |error| {
        error.code().is_some_and(|code| PASSING.iter().any(|class| code.starts_with(class)))
    })
}

/// What was prepared on this connection gave other types before the table was altered (feature_not_supported).
fn is_outdated(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().is_some_and(|code| code == "0A000"))
}

fn decode_value(row: &PgRow, index: usize, kind: Kind) -> Result<Option<Value>, String> {
    let raw = row.try_get_raw(index).map_err(|_| "is missing")?;
    if raw.is_null() {
        return Ok(None);
    }
    let stored = raw.type_info().name().to_owned();
    let value = match (kind, stored.as_str()) {
        (Kind::Integer, "INT2" | "INT4" | "INT8") => Value::Integer(get(row, index)?),
        (Kind::Text, "TEXT" | "VARCHAR" | "CHAR" | "NAME") => Value::Text(get(row, index)?),
        (Kind::Decimal(scale), "NUMERIC") => super::rescaled(get(row, index)?, scale)?,
        (Kind::Decimal(scale), "INT2" | "INT4" | "INT8") => {
            super::rescaled(Decimal::from(get::<_, i64>(row, index)?), scale)?
        }
        // Microseconds since 2000. The driver's own types panic on what no calendar has, such as infinity.
        (Kind::DateTime, "TIMESTAMP" | "TIMESTAMPTZ") => {
            Value::DateTime(moment(TimeDelta::microseconds(get(row, index)?)).ok_or("is out of range")?)
        }
        (Kind::DateTime, "DATE") => {
            let days = TimeDelta::try_days(get::<_, i64>(row, index)?).and_then(moment);
            Value::DateTime(days.ok_or("is out of range")?)
        }
        (Kind::Guid, "UUID") => Value::Guid(get::<_, Uuid>(row, index)?.to_string()),
        (Kind::Guid, "TEXT" | "VARCHAR" | "CHAR") => Value::Guid(get::<_, String>(row, index)?.to_ascii_lowercase()),
        (Kind::Binary, "BYTEA") => Value::Binary(get(row, index)?),
        (_, stored) => return Err(format!("is of type {stored}")),
    };
    Ok(Some(value))
}

fn moment(since_2000: TimeDelta) -> Option<NaiveDateTime> {
    let moment = NaiveDate::from_ymd_opt(2000, 1, 1)?.and_hms_opt(0, 0, 0)?.checked_add_signed(since_2000)?;
    (1..=9999).contains(&moment.year()).then_some(moment) // what the other engines have
}
