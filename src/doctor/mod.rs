//! `handler doctor`: what a deployment usually gets wrong, looked for in seconds with the handler's own settings.
//!
//! Owns the report; what is looked at is said by `host_files`, `Database::examine` and `redis::examine`. Leaves
//! nothing behind but a script in Redis' cache of scripts and, as the handler does, an SQLite file in WAL mode. Invariant:
//! no line holds a secret, and every finding that is not fine says what to do.

mod host_files;

use std::{fmt, path::Path, time::Duration};

use futures_util::future::join_all;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    config::{Config, Login, Redis, RedisLogin, SETTINGS, Server, Source, Tls},
    database::Database,
    finding::{Finding, Severity},
    product, redis,
};

/// Bound of finding out whether a server can be reached.
const REACH: Duration = Duration::from_secs(5);

/// What was found, under headings.
pub struct Report {
    /// Every setting that is in force, without secrets: name and value.
    settings: Vec<(String, String)>,
    /// What was looked at, by heading.
    findings: Vec<(&'static str, Finding)>,
}

impl Report {
    /// Whether something would not work.
    pub fn has_failed(&self) -> bool {
        self.findings.iter().any(|(_, finding)| finding.severity == Severity::Fail)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.settings {
            writeln!(f, "      {name} = {value}")?;
        }
        for (heading, finding) in &self.findings {
            writeln!(f, "{:<4}  {heading}: {finding}", finding.severity.to_string())?;
        }
        let count = |severity| self.findings.iter().filter(|(_, finding)| finding.severity == severity).count();
        writeln!(
            f,
            "{} failed, {} to look at, {} fine",
            count(Severity::Fail),
            count(Severity::Warn),
            count(Severity::Ok)
        )
    }
}

/// Looks at everything: the settings of this process, the files of the app in `root`, the database and Redis.
pub async fn examine(root: &Path) -> Report {
    let mut report = Report { settings: Vec::new(), findings: Vec::new() };
    let (config, lacking) = match Config::from_process_as_under_a_host() {
        Ok(found) => found,
        Err(error) => {
            let wrong = |mistake| ("settings", Finding::fail(mistake, "correct the setting; README.md has the table"));
            report.findings.extend(error.mistakes.into_iter().map(wrong));
            return report;
        }
    };
    report.settings = settings(&config);
    let elsewhere = "run it where the app runs; if that is here, give the app the identity";
    report.findings.extend(lacking.into_iter().map(|what| ("settings", Finding::fail(what, elsewhere))));
    let database = Database::new(&config.database);
    let (database_findings, redis_findings) = tokio::join!(
        async {
            match &config.database.source {
                // Looking at it would make it.
                Source::Embedded => vec![Finding::ok("the embedded catalogue: for a first look, not for production")],
                source => match source.server().filter(|server| is_barred(server, &config)) {
                    Some(server) => vec![reach(&server.host, server.port).await],
                    None => database.examine(&product::TABLE, config.max_instances).await,
                },
            }
        },
        async {
            match &config.redis {
                Some(Redis { identity: None, server, .. })
                    if matches!(server.login, RedisLogin::ManagedIdentity { .. }) =>
                {
                    join_all(server.nodes.iter().map(|node| reach(&node.host, node.port))).await
                }
                Some(redis) => redis::examine(redis, config.max_instances).await,
                None => vec![Finding::ok("off: each instance has its own memory, and the change feed keeps it right")],
            }
        }
    );
    database.close().await;
    report.findings.extend(host_files::examine(root, &config).into_iter().map(|finding| ("host", finding)));
    report.findings.extend(database_findings.into_iter().map(|finding| ("database", finding)));
    report.findings.extend(redis_findings.into_iter().map(|finding| ("redis", finding)));
    report
}

/// Whether only an identity could log in, which is not here.
fn is_barred(server: &Server, config: &Config) -> bool {
    config.database.identity.is_none() && matches!(server.login, Login::ManagedIdentity { .. })
}

/// All that can be said of a server that nobody here may log in to.
async fn reach(host: &str, port: u16) -> Finding {
    let problem = match timeout(REACH, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => {
            return Finding::ok(format!("{host}:{port} can be reached; nothing else, for want of the identity"));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", REACH.as_secs()),
    };
    Finding::fail(
        format!("{host}:{port} cannot be reached: {problem}"),
        "check host and port, and the firewall; a private endpoint is reached from within its network only",
    )
}

/// Every setting in the order of the table, as it is meant rather than as it is written: connection strings by what they
/// say about the way to the server.
fn settings(config: &Config) -> Vec<(String, String)> {
    let shown = |name: &str| match name {
        "Sql" => Some(source(&config.database.source)),
        "Redis" => Some(config.redis.as_ref().map_or_else(|| "none".to_owned(), server_of_redis)),
        _ => None,
    };
    let values = SETTINGS.iter().filter_map(|setting| {
        let value = shown(setting.name).or_else(|| config.given.get(setting.name).cloned())?;
        Some((setting.name.to_owned(), value))
    });
    values.collect()
}

fn source(source: &Source) -> String {
    match source {
        Source::Embedded => "the embedded catalogue (SQLite)".to_owned(),
        Source::Sqlite(_) => "a SQLite file".to_owned(),
        Source::Postgres(server) => format!("PostgreSQL, {}", way(server)),
        Source::MySql(server) => format!("MySQL or MariaDB, {}", way(server)),
        Source::SqlServer(server) => format!("SQL Server, {}", way(server)),
    }
}

fn way(server: &Server) -> String {
    let login = match &server.login {
        Login::Password { user, .. } => format!("as {user} with a password"),
        Login::ManagedIdentity { client_id: None } => "as the system-assigned identity".to_owned(),
        Login::ManagedIdentity { client_id: Some(id) } => format!("as the identity {id}"),
    };
    let tls = match &server.tls {
        Tls::Off => "not encrypted",
        Tls::Unverified => "encrypted, certificate not checked",
        Tls::Verified { .. } => "TLS",
    };
    format!("database {} on {}:{}, {login}, {tls}", server.database, server.host, server.port)
}

fn server_of_redis(redis: &Redis) -> String {
    let nodes: Vec<_> = redis.server.nodes.iter().map(ToString::to_string).collect();
    let login = match &redis.server.login {
        RedisLogin::Default => "without a login".to_owned(),
        RedisLogin::Password { user: None, .. } => "with a password".to_owned(),
        RedisLogin::Password { user: Some(user), .. } => format!("as {user} with a password"),
        RedisLogin::ManagedIdentity { client_id: None, .. } => "as the system-assigned identity".to_owned(),
        RedisLogin::ManagedIdentity { client_id: Some(id), .. } => format!("as the identity {id}"),
    };
    let sentinel =
        redis.server.sentinel_service.as_ref().map_or_else(String::new, |name| format!(", sentinels of {name}"));
    format!(
        "{}{sentinel}, {login}, {}",
        nodes.join(" and "),
        if redis.server.encrypted { "TLS" } else { "not encrypted" }
    )
}
