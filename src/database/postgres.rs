//! PostgreSQL 13 and later, with the schema of `sql/postgresql.sql`.
//!
//! Knows its types, its change feed and `LISTEN`. Invariant of the feed: a position is a snapshot, and what is read are
//! the changes that it could not see and the present can; no order of commits can hide one.

use std::sync::{Arc, OnceLock};

use chrono::{NaiveDate, NaiveDateTime, TimeDelta};
use futures_util::{FutureExt, future::BoxFuture};
use rust_decimal::Decimal;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, TypeInfo, ValueRef,
    postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions, PgRow, PgSslMode},
};
use tokio::{runtime::Handle, sync::Notify};
use uuid::Uuid;

use super::{
    BadRow, Changes, Engine, Error, Kind, Position, Row, Table, Value,
    pool::{Connect, Failure, Pool},
};
use crate::{
    background::{Task, keep_running},
    config::{self, Login, Server, Tls},
};

/// Changes read at once: bounds memory; more is asked for at once.
const FEED_PAGE: i64 = 10_000;
pub(super) struct Postgres {
    pool: Pool<Opener>,
    /// How to open one more connection, for `LISTEN`; it is part of the bound.
    listen: Option<PgConnectOptions>,
    listener: OnceLock<Task>,
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
            listener: OnceLock::new(),
            heard: Arc::default(),
            pool: Pool::new(Opener(options), config, config.max_connections - u32::from(listens)),
            what: format!("{} at {}:{}", server.database, server.host, server.port),
        }
    }

    async fn rows(&self, table: &'static Table, keys: &[i64]) -> Result<Vec<Result<Row, BadRow>>, Error> {
        let columns: Vec<_> = table.columns.iter().map(|(name, _)| *name).collect();
        // Any number of keys is one statement, prepared once for each connection.
        let sql = format!("SELECT {}, {} FROM {} WHERE {0} = ANY($1)", table.key, columns.join(", "), table.name);
        let rows = self.pool.run(|connection| {
            let (sql, keys) = (AssertSqlSafe(sql.clone()), keys.to_vec());
            async move { sqlx::query(sql).bind(keys).fetch_all(connection).await.map_err(failure) }.boxed()
        });
        Ok(rows.await?.iter().map(|row| decode(table, row)).collect())
    }

    async fn latest_change(&self) -> Result<Position, Error> {
        let latest = self.pool.run(|connection| {
            let row = sqlx::query_as("SELECT c.system_identifier::text, t.timeline_id, pg_current_snapshot()::text FROM pg_control_system() AS c, pg_control_checkpoint() AS t");
            async move { row.fetch_one(connection).await.map_err(failure) }.boxed()
        });
        let (cluster, timeline, snapshot): (String, i32, String) = latest.await?;
        Ok(Mark { origin: format!("{cluster}.{timeline}"), seen: snapshot, page: None }.into())
    }

    async fn changes_since(&self, table: &'static Table, position: &Position) -> Result<Changes, Error> {
        let everything = async || {
            Ok(Changes { keys: Vec::new(), position: self.latest_change().await?, overrun: true, more: false })
        };
        let Some(mark) = Mark::read(position) else { return everything().await };
        // One statement sees one snapshot; the left join gives a row even if nothing changed.
        let sql = format!(
            "WITH here AS MATERIALIZED (
               SELECT c.system_identifier || '.' || t.timeline_id AS origin, pg_is_in_recovery() AS standby,
                 pg_current_snapshot() AS now, coalesce($2::text::pg_snapshot, pg_current_snapshot()) AS upto,
                 $1::text::pg_snapshot AS seen, pruned.transaction AS pruned
               FROM pg_control_system() AS c, pg_control_checkpoint() AS t, {name}_change_pruned AS pruned)
             SELECT origin, standby, upto::text, pruned >= pg_snapshot_xmin(seen) AS overrun,
               pg_snapshot_xmax(seen) > pg_snapshot_xmax(now) AS ahead, version, {key} AS key
             FROM here LEFT JOIN LATERAL (
               SELECT version, {key} FROM {name}_change AS change
               WHERE change.transaction >= pg_snapshot_xmin(seen)
                 AND NOT pg_visible_in_snapshot(change.transaction, seen)
                 AND pg_visible_in_snapshot(change.transaction, upto)
                 AND version > $3
               ORDER BY version LIMIT $4) AS change ON true
             ORDER BY version",
            name = table.name,
            key = table.key,
        );
        let page = mark.page.clone();
        let rows = self.pool.run(|connection| {
            let (upto, after) = page.clone().map_or((None, i64::MIN), |(upto, after)| (Some(upto), after));
            let query = sqlx::query(AssertSqlSafe(sql.clone())).bind(mark.seen.clone()).bind(upto).bind(after);
            async move { query.bind(FEED_PAGE).fetch_all(connection).await.map_err(failure) }.boxed()
        });
        let rows = rows.await?;
        let read = || -> sqlx::Result<_> {
            let head = rows.first().ok_or(sqlx::Error::RowNotFound)?;
            let (origin, upto): (String, String) = (head.try_get("origin")?, head.try_get("upto")?);
            let flag = |name| head.try_get::<bool, _>(name);
            let lost = origin != mark.origin || flag("overrun")? || flag("ahead")?;
            let mut changes = Vec::with_capacity(rows.len());
            for row in &rows {
                if let Some(version) = row.try_get::<Option<i64>, _>("version")? {
                    changes.push((version, row.try_get::<Option<i32>, _>("key")?));
                }
            }
            Ok((flag("standby")?, lost, upto, changes))
        };
        let (standby, lost, upto, changes) = read().map_err(|error| Error::Unavailable(error.to_string()))?;
        if standby {
            // There, snapshots do not say which transactions are still open.
            return Err(Error::Unavailable(
                "the change feed needs the primary, and this server is a standby".to_owned(),
            ));
        }
        if lost || changes.iter().any(|(_, key)| key.is_none()) {
            return everything().await;
        }
        let more = changes.len() as i64 == FEED_PAGE;
        let position = match changes.last() {
            Some((version, _)) if more => Mark { page: Some((upto, *version)), ..mark },
            _ => Mark { seen: upto, page: None, ..mark },
        };
        let mut keys: Vec<_> = changes.into_iter().filter_map(|(_, key)| key).map(i64::from).collect();
        keys.sort_unstable();
        keys.dedup();
        Ok(Changes { keys, position: position.into(), overrun: false, more })
    }
}

impl Engine for Postgres {
    fn open(&self) -> BoxFuture<'_, Result<String, Error>> {
        async {
            let version = self.pool.run(|connection| {
                let version = sqlx::query_scalar("SELECT current_setting('server_version')");
                async move { version.fetch_one(connection).await.map_err(failure) }.boxed()
            });
            let version: String = version.await?;
            Ok(format!("PostgreSQL {version}, {}", self.what))
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

    fn latest_change(&self, _table: &'static Table) -> BoxFuture<'_, Result<Position, Error>> {
        self.latest_change().boxed()
    }

    fn changes_since<'a>(
        &'a self,
        table: &'static Table,
        position: &'a Position,
    ) -> BoxFuture<'a, Result<Changes, Error>> {
        self.changes_since(table, position).boxed()
    }

    fn change_hint(&self, table: &'static Table) -> BoxFuture<'_, ()> {
        let Some(options) = &self.listen else { return std::future::pending().boxed() };
        self.listener.get_or_init(|| {
            let (options, heard) = (options.clone(), self.heard.clone());
            keep_running(&Handle::current(), "listener", move || listen(options.clone(), table, heard.clone()))
        });
        self.heard.notified().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.pool.close();
        std::future::ready(()).boxed()
    }
}

/// Notifies `heard` of whatever the server tells on the table's channel, until the connection is lost.
async fn listen(options: PgConnectOptions, table: &'static Table, heard: Arc<Notify>) {
    if let Err(error) = listen_once(&options, table, &heard).await {
        tracing::debug!(%error, "cannot listen for changes; the feed is read at its interval");
    }
}

async fn listen_once(options: &PgConnectOptions, table: &'static Table, heard: &Notify) -> sqlx::Result<()> {
    let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
    let pool = pool.connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    listener.listen(&format!("{}_change", table.name)).await?;
    loop {
        // First of all: nobody was told of what was committed until now.
        heard.notify_one();
        if listener.try_recv().await?.is_none() {
            return Ok(());
        }
    }
}

/// What a position says: the server it belongs to and the snapshot up to which everything was read; in the midst of
/// many changes also the snapshot being read and the last version of it that was.
#[derive(Clone)]
struct Mark {
    origin: String,
    seen: String,
    page: Option<(String, i64)>,
}

impl Mark {
    fn read(position: &Position) -> Option<Self> {
        let mut parts = position.0.split(' ');
        let (origin, seen) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let snapshot =
            |text: &str| text.split(':').count() == 3 && text.bytes().all(|b| b.is_ascii_digit() || b":,".contains(&b));
        let page = match (parts.next(), parts.next()) {
            (Some(upto), Some(version)) if snapshot(upto) => Some((upto.to_owned(), version.parse().ok()?)),
            (None, _) => None,
            _ => return None,
        };
        snapshot(&seen).then_some(Self { origin, seen, page })
    }
}

impl From<Mark> for Position {
    fn from(Mark { origin, seen, page }: Mark) -> Self {
        let page = page.map_or_else(String::new, |(upto, version)| format!(" {upto} {version}"));
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
    let lost = match &error {
        // SQLSTATE classes: 08 connection, 57P sent away by the operator, 40 to be tried again.
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["08", "57P", "40"].iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::Tls(_) => true,
        _ => false,
    };
    let problem = super::problem(&error);
    if lost { Failure::Lost(problem) } else { Failure::Refused(problem) }
}

fn decode(table: &'static Table, row: &PgRow) -> Result<Row, BadRow> {
    // The key is what the row was found by, so it is a number.
    let key: i64 = row.try_get_unchecked(0).unwrap_or_default();
    let values = table.columns.iter().enumerate().map(|(index, (column, kind))| {
        decode_value(row, index + 1, *kind).map_err(|problem| BadRow { key, column, problem })
    });
    Ok(Row { key, values: values.collect::<Result<_, _>>()? })
}

fn decode_value(row: &PgRow, index: usize, kind: Kind) -> Result<Option<Value>, String> {
    fn get<'r, T>(row: &'r PgRow, index: usize) -> Result<T, String>
    where
        T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        row.try_get_unchecked(index).map_err(|_| "cannot be decoded".to_owned())
    }
    let raw = row.try_get_raw(index).map_err(|_| "is missing")?;
    if raw.is_null() {
        return Ok(None);
    }
    let stored = raw.type_info().name().to_owned();
    let value = match (kind, stored.as_str()) {
        (Kind::Integer, "INT2" | "INT4" | "INT8") => Value::Integer(get(row, index)?),
        (Kind::Text, "TEXT" | "VARCHAR" | "CHAR" | "NAME") => Value::Text(get(row, index)?),
        (Kind::Decimal(scale), "NUMERIC") => super::rescaled(get(row, index)?, scale),
        (Kind::Decimal(scale), "INT2" | "INT4" | "INT8") => {
            super::rescaled(Decimal::from(get::<i64>(row, index)?), scale)
        }
        // Microseconds since 2000. The driver's own types panic on what no calendar has, such as infinity.
        (Kind::DateTime, "TIMESTAMP" | "TIMESTAMPTZ") => {
            Value::DateTime(moment(TimeDelta::microseconds(get(row, index)?)).ok_or("is out of range")?)
        }
        (Kind::DateTime, "DATE") => {
            let days = TimeDelta::try_days(get::<i64>(row, index)?).and_then(moment);
            Value::DateTime(days.ok_or("is out of range")?)
        }
        (Kind::Guid, "UUID") => Value::Guid(get::<Uuid>(row, index)?.to_string()),
        (Kind::Guid, "TEXT" | "VARCHAR" | "CHAR") => Value::Guid(get::<String>(row, index)?.to_ascii_lowercase()),
        (Kind::Binary, "BYTEA") => Value::Binary(get(row, index)?),
        (_, stored) => return Err(format!("is of type {stored}")),
    };
    Ok(Some(value))
}

fn moment(since_2000: TimeDelta) -> Option<NaiveDateTime> {
    NaiveDate::from_ymd_opt(2000, 1, 1)?.and_hms_opt(0, 0, 0)?.checked_add_signed(since_2000)
}
