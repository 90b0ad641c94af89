//! Environment → [`Config`].
//!
//! In reading order: `settings` (the table of all there are), `process` (where variables come from), `reader` (variables →
//! values), `connection_string` (databases) and `redis_string`, with what they stand on: `ado` and `url` (text → pairs),
//! `keywords` (their names), `server` (what they mean together). Must not know what the values are used for beyond their
//! type. Invariant: a `Config` exists only if every setting was valid; otherwise [`ConfigError`] names all mistakes at
//! once, and never the value of a secret.

mod ado;
mod connection_string;
mod keywords;
mod process;
mod reader;
mod redis_string;
mod server;
mod settings;
mod url;

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

pub use self::{
    connection_string::Source,
    redis_string::{Node, RedisLogin, RedisServer},
    server::{Login, Server, Tls},
    settings::{Kind, SETTINGS, Setting},
};
use self::{process::port_name, reader::Reader, settings::MOST_WORKERS};
pub(crate) use self::{process::read_json, server::is_local, settings::LARGEST_SHARE};

/// Who started the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A Functions host, which chose the port and watches the exit code.
    Handler,
    /// A person, with `cargo run` or the binary itself.
    Standalone,
}

/// Text that is never printed: `Debug` shows `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the driver that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// All settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who started the process.
    pub role: Role,
    /// How HTTP is served.
    pub http: Http,
    /// How InvalidateCache works.
    pub invalidate: Invalidate,
    /// How long things are kept, and how much.
    pub cache: Cache,
    /// Redis, if there is one.
    pub redis: Option<Redis>,
    /// The database.
    pub database: Database,
    /// Pause between two lines on how the cache is doing; zero: none is written.
    pub log_status: Duration,
    /// Least severe level that is logged.
    pub log_level: String,
    /// Instances that the plan may start, if anybody says.
    pub max_instances: Option<u64>,
    /// What was set, as it was written, without secrets.
    pub given: BTreeMap<&'static str, String>,
}

/// How HTTP is served.
#[derive(Clone, Debug)]
pub struct Http {
    /// TCP port on 127.0.0.1; 0 = any free one.
    pub port: u16,
    /// First path segment of HTTP functions, `api` unless host.json says otherwise; may be empty.
    pub route_prefix: String,
    /// Worker threads.
    pub workers: usize,
    /// `Cache-Control` header of products.
    pub cache_control: String,
    /// How long a stop waits for requests in flight.
    pub drain: Duration,
    /// Bound of a whole GET.
    pub request_timeout: Duration,
}

/// How InvalidateCache works.
#[derive(Clone, Debug)]
pub struct Invalidate {
    /// How long one call retries Redis before it fails.
    pub budget: Duration,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// The host was told not to run it.
    pub trigger_disabled: bool,
}

/// How long things are kept, and how much.
#[derive(Clone, Debug)]
pub struct Cache {
    /// How long an entry in memory is fresh.
    pub l1_duration: Duration,
    /// How long an entry in Redis is fresh.
    pub l2_duration: Duration,
    /// How long "absent" is fresh, at both levels.
    pub absent_duration: Duration,
    /// Largest share, 0..1, by which a duration is shortened.
    pub jitter: f64,
    /// Bound of memory.
    pub l1_max_bytes: u64,
    /// Larger bodies are not stored.
    pub max_body_bytes: usize,
    /// How old a stale copy may be.
    pub fail_safe_max: Duration,
    /// Pause between two attempts to load a key whose load failed.
    pub fail_safe_throttle: Duration,
    /// How long entries stay fresh while nothing is heard.
    pub unheard_max: Duration,
    /// After which an entry that merely grew old is served while its load goes on; zero: never.
    pub soft_timeout: Duration,
    /// Bound of one load.
    pub hard_timeout: Duration,
    /// Factor on the load time within which a hot entry is loaded before it ends; 0: never.
    pub eager_factor: u32,
    /// Loads that run at once.
    pub loads_max: usize,
    /// Loads that may wait.
    pub loads_queued_max: usize,
    /// Failures in a row that open the breaker; 0: never.
    pub breaker_failures: u32,
    /// Pause between two probes.
    pub breaker_pause: Duration,
    /// Bound of one lease.
    pub lease: Duration,
    /// How long a read waits for another instance's load.
    pub lease_wait: Duration,
}

/// Redis.
#[derive(Clone, Debug)]
pub struct Redis {
    /// Which one, and how to reach it.
    pub server: RedisServer,
    /// Passwords may be sent to other machines without TLS; tokens never are.
    pub allow_unencrypted: bool,
    /// Authorities (PEM) trusted for its certificate instead of the public ones.
    pub ca_file: Option<PathBuf>,
    /// Where the platform gives out tokens of the app's managed identity.
    pub identity: Option<IdentityEndpoint>,
    /// Shared connections; the log has one more unless `frugal_poll` is set.
    pub pool_size: usize,
    /// Pause between two looks at the log, which then needs no connection of its own.
    pub frugal_poll: Option<Duration>,
    /// First part of every key.
    pub prefix: String,
    /// Connect and greeting.
    pub connect_timeout: Duration,
    /// One answer.
    pub response_timeout: Duration,
    /// Notices kept in the invalidation log.
    pub log_max_length: u64,
    /// Connections that the tier allows; 0: unknown.
    pub max_clients: u64,
}

impl Redis {
    /// The full name of a key.
    ///
    /// The braces keep all of them in one slot of a cluster, so on one node: an expiry and its notice are carried out in
    /// order there, and a node that loses entries' expiries when it fails over loses the log's end with them, which is
    /// noticed. Between nodes, or the shards behind a proxy, neither would hold.
    pub fn key(&self, name: impl fmt::Display) -> String {
        let mut key = String::with_capacity(self.prefix.len() + 32);
        let _ = write!(key, "{{{}}}:{name}", self.prefix);
        key
    }

    /// Connections that one instance holds.
    pub fn connections(&self) -> u64 {
        self.pool_size as u64 + u64::from(self.frugal_poll.is_none())
    }
}

/// The database.
#[derive(Clone, Debug)]
pub struct Database {
    /// Which one, and how to reach it.
    pub source: Source,
    /// Bound of the pool.
    pub max_connections: u32,
    /// To open a connection, and to wait for one.
    pub connect_timeout: Duration,
    /// Bound of one query (`CACHE_HARD_TIMEOUT_MS`).
    pub query_timeout: Duration,
    /// Other machines may be talked to without checking their certificates.
    pub allow_unverified: bool,
    /// Age at which a connection is replaced (`DATABASE_CONNECTION_MAX_AGE_S`).
    pub max_age: Duration,
    /// Where the platform gives out tokens of the app's managed identity.
    pub identity: Option<IdentityEndpoint>,
    /// How often the change feed is read; `None`: never.
    pub feed_interval: Option<Duration>,
}

/// The App Service identity endpoint (`IDENTITY_ENDPOINT`, `IDENTITY_HEADER`), as the platform sets it.
#[derive(Clone, Debug)]
pub struct IdentityEndpoint {
    /// An `http:` URL on this machine.
    pub url: String,
    /// What the endpoint wants to see in the header `X-IDENTITY-HEADER`.
    pub header: Secret,
}

/// Why there is no [`Config`]: every mistake, in the order of the table.
#[derive(Debug, thiserror::Error)]
#[error("{} wrong setting{}: {}", mistakes.len(), if mistakes.len() == 1 { "" } else { "s" }, mistakes.join("; "))]
pub struct ConfigError {
    /// One sentence per mistake, without the values of secrets.
    pub mistakes: Vec<String>,
}

impl Config {
    /// Builds a `Config` from the given variables alone.
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        Self::parse(variables, Vec::new())
    }

    fn parse(variables: &BTreeMap<String, String>, mistakes: Vec<String>) -> Result<Self, ConfigError> {
        let (config, mut mistakes, lacking) = Self::read(variables, mistakes);
        mistakes.extend(lacking);
        if mistakes.is_empty() { Ok(config) } else { Err(ConfigError { mistakes }) }
    }

    /// As far as it can be read, with all mistakes, and with what only the machine lacks.
    fn read(variables: &BTreeMap<String, String>, mistakes: Vec<String>) -> (Self, Vec<String>, Vec<String>) {
        let mut read = Reader { variables, mistakes, lacking: Vec::new() };
        read.find_misspelled();
        let duration_s = read.number("CACHE_DURATION_S");
        let host_port = port_name(variables);
        let role = if host_port.is_some() { Role::Handler } else { Role::Standalone };
        let max_instances = read.max_instances();
        let (redis, hard_timeout) = (read.redis(), read.millis("CACHE_HARD_TIMEOUT_MS"));
        let database = read.database(role, redis.as_ref(), hard_timeout);
        let config = Self {
            role,
            http: Http {
                port: read.port(host_port),
                route_prefix: read.route_prefix(),
                workers: match read.number("HTTP_WORKERS") {
                    0 => std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MOST_WORKERS),
                    workers => workers as usize,
                },
                cache_control: read.header_value("HTTP_CACHE_CONTROL"),
                drain: read.seconds("HTTP_DRAIN_S"),
                request_timeout: read.millis("REQUEST_TIMEOUT_MS"),
            },
            invalidate: Invalidate {
                budget: read.millis("INVALIDATE_BUDGET_MS"),
                max_body_bytes: read.number("INVALIDATE_MAX_BODY_BYTES") as usize,
                trigger_disabled: read.trigger_is_disabled(),
            },
            cache: Cache {
                l1_duration: Duration::from_secs(read.number_or("CACHE_L1_DURATION_S", duration_s)),
                l2_duration: Duration::from_secs(read.number_or("CACHE_L2_DURATION_S", duration_s)),
                absent_duration: read.seconds("CACHE_ABSENT_DURATION_S"),
                jitter: read.number("CACHE_JITTER_PERCENT") as f64 / 100.0,
                l1_max_bytes: read.number("CACHE_L1_MAX_BYTES"),
                max_body_bytes: read.number("CACHE_MAX_BODY_BYTES") as usize,
                fail_safe_max: read.seconds("CACHE_FAIL_SAFE_MAX_S"),
                fail_safe_throttle: read.seconds("CACHE_FAIL_SAFE_THROTTLE_S"),
                unheard_max: read.seconds("CACHE_UNHEARD_MAX_S"),
                soft_timeout: read.millis("CACHE_SOFT_TIMEOUT_MS"),
                hard_timeout,
                eager_factor: read.number("CACHE_EAGER_FACTOR") as u32,
                loads_max: match read.number("CACHE_LOADS_MAX") {
                    0 => database.max_connections as usize,
                    loads => loads as usize,
                },
                loads_queued_max: read.number("CACHE_LOADS_QUEUED_MAX") as usize,
                breaker_failures: read.number("CACHE_BREAKER_FAILURES") as u32,
                breaker_pause: read.millis("CACHE_BREAKER_PAUSE_MS"),
                lease: read.millis("CACHE_LEASE_MS"),
                lease_wait: read.millis("CACHE_LEASE_WAIT_MS"),
            },
            redis,
            database,
            log_status: read.seconds("LOG_STATUS_S"),
            log_level: read.text("LOG_LEVEL").to_ascii_lowercase(),
            max_instances,
            given: read.given(),
        };
        read.check_together(&config);
        (config, read.mistakes, read.lacking)
    }
}

#[cfg(test)]
mod tests;
