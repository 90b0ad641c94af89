//! Environment → [`Config`]: every setting, its default and the reason for it, in one table.
//!
//! Owns the names and limits of all settings; the README's table is checked against [`SETTINGS`]. Must not know what
//! the values are used for beyond their type. Invariant: a `Config` exists only if every setting was valid; otherwise
//! [`ConfigError`] names all mistakes at once, and never the value of a secret.

mod ado;
mod connection_string;
mod keywords;
mod server;

use std::{
    collections::BTreeMap,
    fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::connection_string::{Login, Server, Source, Tls};

/// One setting: what it is called, what it is when nobody sets it, and what it may be.
pub struct Setting {
    /// Name of the environment variable (an app setting in Azure, a `Values` entry in `local.settings.json`).
    pub name: &'static str,
    /// Text used when the variable is missing or empty.
    pub default: &'static str,
    /// What values are accepted.
    pub kind: Kind,
    /// What it does and why the default is what it is: one line of the README's table.
    pub meaning: &'static str,
}

/// The values a setting accepts.
pub enum Kind {
    /// A whole number between the two, inclusive.
    Number(u64, u64),
    /// Free text.
    Text,
    /// One of the words listed.
    Word(&'static [&'static str]),
    /// Text that never appears in a message.
    Secret,
}

const DAY_S: u64 = 24 * 60 * 60;
const MIB: u64 = 1024 * 1024;
const MOST_CONNECTIONS: u64 = 1000;

const fn number(name: &'static str, default: &'static str, min: u64, max: u64, meaning: &'static str) -> Setting {
    Setting { name, default, kind: Kind::Number(min, max), meaning }
}

const fn text(name: &'static str, default: &'static str, meaning: &'static str) -> Setting {
    Setting { name, default, kind: Kind::Text, meaning }
}

/// Every setting, in the order of the README's table.
#[rustfmt::skip] // a table reads as a table
pub const SETTINGS: &[Setting] = &[
    Setting { name: "Sql", default: "", kind: Kind::Secret, meaning: "Database: `sqlite:<file>`, `postgres://user:password@host/database`, `mysql://user:password@host/database`, or for SQL Server `Server=…;Database=…;User ID=…;Password=…`. May also be a connection string of the app named `Sql`. Empty: the embedded catalogue in `product-cache.db` in the working directory, or in memory where that cannot be written." },
    Setting { name: "Redis", default: "", kind: Kind::Secret, meaning: "Redis: `redis://[user:password@]host:port`. May also be a connection string of the app named `Redis`. Empty: no L2 and no invalidation log; the change feed keeps memory right." },

    number("CACHE_DURATION_S", "300", 1, 30 * DAY_S, "How long an entry is fresh. Changes are told, so this only bounds what no notice covers."),
    number("CACHE_L1_DURATION_S", "", 1, 30 * DAY_S, "The same for memory alone; empty: `CACHE_DURATION_S`. An entry taken from Redis is kept no longer than it is fresh there."),
    number("CACHE_L2_DURATION_S", "", 1, 30 * DAY_S, "The same for Redis alone; empty: `CACHE_DURATION_S`."),
    number("CACHE_ABSENT_DURATION_S", "30", 1, 30 * DAY_S, "How long \"no such product\" is fresh: short, so that an id asked too early is not refused for long."),
    number("CACHE_JITTER_PERCENT", "10", 0, 90, "Durations are shortened by a random share up to this, so that entries loaded together do not end together."),
    number("CACHE_L1_MAX_BYTES", "67108864", MIB, 64 * 1024 * MIB, "Bound of what entries take of the process's memory, all bookkeeping included: 64 MiB is some 17,000 products with photos, and 3 % of a 2 GiB instance."),
    number("CACHE_MAX_BODY_BYTES", "1048576", 1024, 64 * MIB, "A larger body is served but not stored: one row must not evict thousands."),
    number("CACHE_FAIL_SAFE_MAX_S", "86400", 0, 30 * DAY_S, "How old a stale copy may be to be served while the database fails; 0: never serve stale."),
    number("CACHE_FAIL_SAFE_THROTTLE_S", "10", 1, DAY_S, "After a failed load, how long its key is answered with the stale copy before the database is tried again."),
    number("CACHE_UNHEARD_MAX_S", "10", 3, DAY_S, "While an instance cannot hear of changes, how long an entry in its memory stays fresh."),
    number("CACHE_SOFT_TIMEOUT_MS", "500", 0, 600_000, "When a load takes longer and an entry that merely grew old is known, that is served and the load goes on behind; 0: never. Ten times a slow point read."),
    number("CACHE_HARD_TIMEOUT_MS", "5000", 50, 600_000, "A load that takes longer is given up. A point read takes about a millisecond; 5 s outlasts a failover's retries."),
    number("CACHE_LEASE_MS", "10000", 100, 600_000, "How long one instance may hold the right to load a key: above the hard timeout, so that a live loader is never doubled."),
    number("CACHE_LEASE_WAIT_MS", "2000", 10, 600_000, "How long a read waits for another instance's load before it loads by itself."),

    number("CACHE_EAGER_FACTOR", "3", 0, 1000, "How eagerly hot entries are loaded anew before they end, as a factor on the measured load time (XFetch's beta: 1 is optimal for steady load times, 3 allows for slower ones); 0: never."),
    number("CACHE_LOADS_MAX", "0", 0, 1000, "Loads that ask the database at once; 0: as many as it has connections."),
    number("CACHE_LOADS_QUEUED_MAX", "256", 0, 100_000, "Loads that may wait for their turn; more are answered stale or 503 at once. 256 waits of a few milliseconds stay well below the hard timeout."),
    number("CACHE_BREAKER_FAILURES", "5", 0, 1000, "Failed loads in a row after which the database is left alone but for probes; 0: never."),
    number("CACHE_BREAKER_PAUSE_MS", "750", 10, 600_000, "Pause between two probes (a quarter more or less): recovery is noticed within a second."),

    number("REDIS_POOL_SIZE", "2", 1, 64, "Shared connections. Each carries all requests at once, so two are for resilience, not for throughput. One more is used by the invalidation log."),
    Setting { name: "REDIS_FRUGAL", default: "off", kind: Kind::Word(&["on", "off"]), meaning: "`on`: one Redis connection per instance in all; the invalidation log is polled over it." },
    number("REDIS_FRUGAL_POLL_MS", "200", 10, 5000, "With `REDIS_FRUGAL`, pause between two looks at the log: how much later other instances hear of an expiry."),
    number("REDIS_MAX_CLIENTS", "0", 0, 10_000_000, "Connections that the Redis tier allows (250 on the smallest); 0: unknown. With `MAX_INSTANCES`, a start that could exceed it is refused."),
    text("REDIS_PREFIX", "product-cache", "First part of every key: apps that share a Redis take different ones."),
    number("REDIS_CONNECT_TIMEOUT_MS", "1000", 10, 60_000, "Connect and greeting, TLS included."),
    number("REDIS_RESPONSE_TIMEOUT_MS", "250", 5, 60_000, "One answer. A healthy one takes under a millisecond; the database is the better source after 250."),
    number("REDIS_LOG_MAX_LENGTH", "100000", 100, 100_000_000, "Notices kept in the invalidation log: what a disconnected instance can catch up on (a few hundred bytes each, or as many keys as a batch has rows)."),

    number("DATABASE_MAX_CONNECTIONS", "8", 1, MOST_CONNECTIONS, "Bound of the one pool: 8 serve thousands of point reads a second, and 100 instances stay below 1,000 sessions. If not set, a pool size in `Sql` counts."),
    number("DATABASE_CONNECT_TIMEOUT_MS", "4000", 50, 120_000, "To open a connection or to wait for a free one: below the hard timeout, so that the message names the cause. If not set, a connect timeout in `Sql` counts, up to four fifths of the hard timeout."),
    number("DATABASE_CONNECTION_MAX_AGE_S", "1800", 10, DAY_S, "Age at which a connection is replaced (up to a tenth less, so that they do not end together): what a server or balancer was changed to is noticed within half an hour."),
    Setting { name: "DATABASE_ALLOW_UNVERIFIED", default: "off", kind: Kind::Word(&["on", "off"]), meaning: "`on`: a `Sql` that turns off TLS, or the check of the server's certificate, is also accepted for other hosts than this one: whoever is between may read and change what is said, the password included." },
    number("FEED_INTERVAL_MS", "", 0, 3_600_000, "How often the database is asked what changed; 0: never. Empty: 1000, but 0 with SQL Server and Redis under a Functions host, where the SQL trigger (unless it is disabled) and the invalidation log do that job."),

    number("MAX_INSTANCES", "", 1, 100_000, "Instances that the plan may start; empty: the platform's `WEBSITE_MAX_DYNAMIC_APPLICATION_SCALE_OUT`, if that is set."),
    number("HTTP_PORT", "7071", 0, 65_535, "Port of a standalone start, as with `func start`; 0: any free one. Under a Functions host the host's port is used."),
    number("HTTP_WORKERS", "0", 0, 1024, "Threads that answer requests; 0: one per core."),
    text("HTTP_CACHE_CONTROL", "private, no-cache", "`Cache-Control` of products. The default makes clients ask again each time, which an ETag makes cheap."),
    number("HTTP_DRAIN_S", "5", 0, 300, "How long SIGTERM waits for requests in flight."),
    number("REQUEST_TIMEOUT_MS", "10000", 100, 230_000, "Bound of a whole GET. Above it the answer is 503; the platform's own limit is 230 s."),
    number("INVALIDATE_BUDGET_MS", "60000", 100, 140_000, "How long one InvalidateCache call retries Redis before it fails: below the SQL trigger's lease renewal limit of about 150 s."),
    number("INVALIDATE_MAX_BODY_BYTES", "67108864", 1024, 1024 * MIB, "Largest trigger batch: 1,000 rows with photos, escaped four times, stay below 64 MiB."),

    Setting { name: "LOG_LEVEL", default: "info", kind: Kind::Word(&["error", "warn", "info", "debug", "trace"]), meaning: "Least severe level that is written." },
];

/// Set by the Functions host; listed so that a misspelling of one is recognised, not shown in the README.
const HOST_NAMES: [&str; 3] = ["FUNCTIONS_CUSTOMHANDLER_PORT", "FUNCTIONS_HTTPWORKER_PORT", ROUTE_PREFIX];
/// Where a connection string is looked for besides its own name, the names that tell its engine first: App Service
/// puts its type in front, and .NET's configuration its section, where `__` stands for `:` in environment variables.
const SQL_PREFIXES: &[&str] = &[
    "POSTGRESQLCONNSTR_",
    "MYSQLCONNSTR_",
    "SQLAZURECONNSTR_",
    "SQLCONNSTR_",
    "CUSTOMCONNSTR_",
    SECTION,
    SECTION_COLON,
];
const REDIS_PREFIXES: &[&str] = &["REDISCACHECONNSTR_", "CUSTOMCONNSTR_", SECTION, SECTION_COLON];
const SECTION: &str = "ConnectionStrings__";
const SECTION_COLON: &str = "ConnectionStrings:";
const ROUTE_PREFIX: &str = "AzureFunctionsJobHost__extensions__http__routePrefix";

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

/// All settings, checked. Field names follow the setting names; durations are real durations.
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
    /// Least severe level that is logged.
    pub log_level: String,
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
    /// Where, and with which password.
    pub url: Secret,
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
}

impl Redis {
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
    /// Bound of one query.
    pub query_timeout: Duration,
    /// Age at which a connection is replaced.
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
    /// Reads the process's environment; a standalone start also reads `Values` of `local.settings.json` in the working
    /// directory, which the environment overrides (as `func start` does).
    pub fn from_process() -> Result<Self, ConfigError> {
        let mut mistakes = Vec::new();
        let mut variables = BTreeMap::new();
        for (name, value) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            match value.into_string() {
                Ok(value) => drop(variables.insert(name, value)),
                Err(_) if is_known(&name) => mistakes.push(format!("{name} is not valid UTF-8")),
                Err(_) => {}
            }
        }
        let root = variables.get("FUNCTIONS_APP_ROOT_PATH").map_or_else(|| PathBuf::from("."), PathBuf::from);
        if port_name(&variables).is_none() {
            match local_settings(Path::new("local.settings.json")) {
                Ok(values) => {
                    for (name, value) in values {
                        variables.entry(name).or_insert(value);
                    }
                }
                Err(mistake) => mistakes.push(mistake),
            }
        }
        match host_json_route_prefix(&root.join("host.json")) {
            Ok(Some(prefix)) => drop(variables.entry(ROUTE_PREFIX.to_owned()).or_insert(prefix)),
            Ok(None) => {}
            Err(mistake) => mistakes.push(mistake),
        }
        Self::parse(&variables, mistakes)
    }

    /// Builds a `Config` from the given variables alone.
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        Self::parse(variables, Vec::new())
    }

    fn parse(variables: &BTreeMap<String, String>, mistakes: Vec<String>) -> Result<Self, ConfigError> {
        let mut read = Reader { variables, mistakes };
        read.find_misspelled();
        let duration_s = read.number("CACHE_DURATION_S");
        let host_port = port_name(variables);
        let role = if host_port.is_some() { Role::Handler } else { Role::Standalone };
        let redis = read.redis();
        let database = read.database(role, redis.as_ref());
        let config = Self {
            role,
            http: Http {
                port: read.port(host_port),
                route_prefix: read.route_prefix(),
                workers: match read.number("HTTP_WORKERS") {
                    0 => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
                    workers => workers as usize,
                },
                cache_control: read.header_value("HTTP_CACHE_CONTROL"),
                drain: read.seconds("HTTP_DRAIN_S"),
                request_timeout: read.millis("REQUEST_TIMEOUT_MS"),
            },
            invalidate: Invalidate {
                budget: read.millis("INVALIDATE_BUDGET_MS"),
                max_body_bytes: read.number("INVALIDATE_MAX_BODY_BYTES") as usize,
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
                hard_timeout: read.millis("CACHE_HARD_TIMEOUT_MS"),
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
            log_level: read.text("LOG_LEVEL").to_ascii_lowercase(),
        };
        read.check_together(&config);
        match read.mistakes.is_empty() {
            true => Ok(config),
            false => Err(ConfigError { mistakes: read.mistakes }),
        }
    }
}

/// Reads variables by the table and collects what is wrong with them.
struct Reader<'a> {
    variables: &'a BTreeMap<String, String>,
    mistakes: Vec<String>,
}

impl Reader<'_> {
    fn setting(name: &str) -> &'static Setting {
        SETTINGS.iter().find(|setting| setting.name == name).unwrap_or_else(|| panic!("{name} is not in SETTINGS"))
    }

    /// The text of a setting: what is set, else its default.
    fn text(&mut self, name: &str) -> String {
        let setting = Self::setting(name);
        let value = self.variables.get(name).map_or("", |value| value.trim());
        if value.is_empty() {
            return setting.default.to_owned();
        }
        if let Kind::Word(words) = setting.kind
            && !words.iter().any(|word| word.eq_ignore_ascii_case(value))
        {
            self.mistakes.push(format!("{name} is {value:?}, not one of {}", words.join(", ")));
        }
        value.to_owned()
    }

    fn number(&mut self, name: &str) -> u64 {
        self.number_or(name, 0)
    }

    /// The number of a setting; `fallback` if neither it nor the table names one.
    fn number_or(&mut self, name: &str, fallback: u64) -> u64 {
        let text = self.text(name);
        let Kind::Number(min, max) = Self::setting(name).kind else { panic!("{name} is not a number") };
        if text.is_empty() {
            return fallback;
        }
        match text.parse::<u64>() {
            Ok(number) if (min..=max).contains(&number) => number,
            _ => {
                self.mistakes.push(format!("{name} is {text:?}, not a whole number from {min} to {max}"));
                min
            }
        }
    }

    fn seconds(&mut self, name: &str) -> Duration {
        Duration::from_secs(self.number(name))
    }

    fn millis(&mut self, name: &str) -> Duration {
        Duration::from_millis(self.number(name))
    }

    fn port(&mut self, host_port: Option<&str>) -> u16 {
        let Some(name) = host_port else { return self.number("HTTP_PORT") as u16 };
        let text = self.variables.get(name).map_or("", |text| text.trim());
        match text.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => {
                self.mistakes.push(format!("{name} is {text:?}, not a port from 1 to 65535"));
                0
            }
        }
    }

    fn route_prefix(&mut self) -> String {
        let prefix = self.variables.get(ROUTE_PREFIX).map_or("api", |prefix| prefix.trim().trim_matches('/'));
        if !prefix.chars().all(|c| c.is_ascii_alphanumeric() || "-_.~/".contains(c)) {
            self.mistakes.push(format!("routePrefix is {prefix:?}, not a plain path"));
        }
        prefix.to_owned()
    }

    fn header_value(&mut self, name: &str) -> String {
        let value = self.text(name);
        if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            self.mistakes.push(format!("{name} has characters that no HTTP header may hold"));
        }
        value
    }

    fn redis(&mut self) -> Option<Redis> {
        let (name, url) = self.connection_string("Redis", REDIS_PREFIXES);
        let frugal = self.text("REDIS_FRUGAL").eq_ignore_ascii_case("on");
        let (pool_size, poll) = (self.number("REDIS_POOL_SIZE") as usize, self.millis("REDIS_FRUGAL_POLL_MS"));
        let redis = Redis {
            url: Secret(url.clone()),
            pool_size: if frugal { 1 } else { pool_size },
            frugal_poll: frugal.then_some(poll),
            prefix: self.text("REDIS_PREFIX"),
            connect_timeout: self.millis("REDIS_CONNECT_TIMEOUT_MS"),
            response_timeout: self.millis("REDIS_RESPONSE_TIMEOUT_MS"),
            log_max_length: self.number("REDIS_LOG_MAX_LENGTH"),
        };
        if redis.prefix.chars().any(|c| c.is_whitespace() || c.is_control() || "{}".contains(c)) {
            self.mistakes.push("REDIS_PREFIX has blanks or braces".to_owned());
        }
        if url.is_empty() {
            return None;
        }
        self.check_connections(&redis);
        // A parser's message may quote the password, so only the form is told.
        let form = url::Url::parse(&url).ok().filter(|url| url.scheme() == "redis" && url.host().is_some());
        match form.as_ref().map(url::Url::path) {
            None => self.mistakes.push(format!("{name} is not of the form redis://[user:password@]host:port")),
            Some("" | "/" | "/0") => {}
            Some(_) => self.mistakes.push(format!("{name} names a database other than 0, which clusters do not have")),
        }
        Some(redis)
    }

    /// A connection string and the name it was found under. Two that are there must be equal.
    fn connection_string(&mut self, name: &'static str, prefixes: &[&str]) -> (String, String) {
        let mut found: Option<(String, &str)> = None;
        for other in connection_string_names(name, prefixes) {
            let text = self.variables.get(&other).map_or("", |text| text.trim());
            match &found {
                _ if text.is_empty() => {}
                None => found = Some((other, text)),
                Some((_, same)) if *same == text => {}
                Some((first, _)) => {
                    self.mistakes.push(format!("{first} and {other} are different connection strings; set only one"));
                }
            }
        }
        found.map_or_else(|| (name.to_owned(), String::new()), |(name, text)| (name, text.to_owned()))
    }

    fn source(&mut self) -> Source {
        let (name, text) = self.connection_string("Sql", SQL_PREFIXES);
        let source = connection_string::parse(&name, &text).unwrap_or_else(|mistakes| {
            self.mistakes.extend(mistakes.into_iter().map(|mistake| format!("{name}: {mistake}")));
            Source::Embedded
        });
        let allowed = self.text("DATABASE_ALLOW_UNVERIFIED").eq_ignore_ascii_case("on");
        if let Some(server) = source.server().filter(|server| !allowed && !server.is_local()) {
            let lacking = match server.tls {
                Tls::Off => "would not be encrypted",
                Tls::Unverified => "would accept any certificate",
                Tls::Verified { .. } => return source,
            };
            self.mistakes.push(format!(
                "{name}: the connection to {} {lacking}; ask for encryption and verification there, or set \
                 DATABASE_ALLOW_UNVERIFIED=on",
                server.host
            ));
        }
        source
    }

    fn database(&mut self, role: Role, redis: Option<&Redis>) -> Database {
        let source = self.source();
        let query_timeout = self.millis("CACHE_HARD_TIMEOUT_MS");
        let is_set = |name: &str| self.variables.get(name).is_some_and(|text| !text.trim().is_empty());
        // Azure's portal writes 30 s into every string. A load is given up long before, and the message should say
        // that it was the connection that took too long.
        let said =
            source.server().and_then(|server| server.connect_timeout).map(|said| said.min(query_timeout * 4 / 5));
        let connect_timeout = said.filter(|_| !is_set("DATABASE_CONNECT_TIMEOUT_MS"));
        let said =
            source.server().and_then(|server| server.max_connections).map(|said| said.min(MOST_CONNECTIONS as u32));
        let max_connections = said.filter(|_| !is_set("DATABASE_MAX_CONNECTIONS"));
        let could_be_told = role == Role::Handler && redis.is_some() && matches!(source, Source::SqlServer(_));
        let trigger = could_be_told && !self.trigger_is_disabled();
        let feed_ms = self.number_or("FEED_INTERVAL_MS", if trigger { 0 } else { 1000 });
        Database {
            max_connections: max_connections.unwrap_or(self.number("DATABASE_MAX_CONNECTIONS") as u32),
            connect_timeout: connect_timeout.unwrap_or(self.millis("DATABASE_CONNECT_TIMEOUT_MS")),
            query_timeout,
            max_age: self.seconds("DATABASE_CONNECTION_MAX_AGE_S"),
            identity: self.identity(&source),
            feed_interval: (feed_ms > 0).then(|| Duration::from_millis(feed_ms)),
            source,
        }
    }

    /// Whether the host was told not to run InvalidateCache: `AzureWebJobs.InvalidateCache.Disabled`, where Linux may
    /// have underscores for the dots.
    fn trigger_is_disabled(&self) -> bool {
        let is_name = |name: &str| {
            let plain = name.replace("__", ".").replace('_', ".");
            plain.eq_ignore_ascii_case("AzureWebJobs.InvalidateCache.Disabled")
        };
        let is_on = |text: &str| ["true", "1"].iter().any(|on| on.eq_ignore_ascii_case(text.trim()));
        self.variables.iter().any(|(name, text)| is_name(name) && is_on(text))
    }

    /// The platform sets both variables where the app has an identity; only who needs one can miss them.
    fn identity(&mut self, source: &Source) -> Option<IdentityEndpoint> {
        let variable = |name: &str| self.variables.get(name).map(|text| text.trim()).filter(|text| !text.is_empty());
        let is_http = |url: &&str| url::Url::parse(url).is_ok_and(|url| url.scheme() == "http" && url.has_host());
        let (url, header) = (variable("IDENTITY_ENDPOINT"), variable("IDENTITY_HEADER"));
        let is_needed = source.server().is_some_and(|server| matches!(server.login, Login::ManagedIdentity { .. }));
        match (url.filter(is_http), header) {
            (Some(url), Some(header)) => Some(IdentityEndpoint { url: url.to_owned(), header: header.into() }),
            (None, Some(_)) if is_needed && url.is_some() => {
                self.mistakes.push("IDENTITY_ENDPOINT is not an http: URL".to_owned());
                None
            }
            _ if is_needed => {
                self.mistakes.push(
                    "the database is to be opened with a managed identity, and IDENTITY_ENDPOINT and IDENTITY_HEADER, \
                     which the platform sets where the app has one, are missing"
                        .to_owned(),
                );
                None
            }
            _ => None,
        }
    }

    /// Whether all instances together stay within what the Redis tier allows.
    fn check_connections(&mut self, redis: &Redis) {
        let platform = self.variables.get("WEBSITE_MAX_DYNAMIC_APPLICATION_SCALE_OUT");
        let platform = platform.and_then(|instances| instances.trim().parse().ok()).unwrap_or(0);
        let instances = self.number_or("MAX_INSTANCES", platform);
        let (each, allowed) = (redis.connections(), self.number("REDIS_MAX_CLIENTS"));
        if allowed > 0 && instances * each > allowed {
            self.mistakes.push(format!(
                "{instances} instances with {each} Redis connections each need {}, and REDIS_MAX_CLIENTS is {allowed}: \
                 allow {} instances, set REDIS_FRUGAL=on (1 connection each), or take a larger tier",
                instances * each,
                allowed / each,
            ));
        }
    }

    /// A name one or two letters off one of ours is a mistake. Others' variables are not: only names that begin as
    /// ours do, and nobody else's, are looked at.
    fn find_misspelled(&mut self) {
        let ours = |name: &str| {
            ["CACHE_", "REDIS_", "INVALIDATE_", "FEED_", "FUNCTIONS_"].iter().any(|start| name.starts_with(start))
        };
        for name in self.variables.keys().filter(|name| ours(name) && !is_known(name)) {
            let close = SETTINGS
                .iter()
                .map(|setting| setting.name)
                .chain(HOST_NAMES)
                .find(|known| strsim::damerau_levenshtein(&name.to_uppercase(), &known.to_uppercase()) <= 2);
            if let Some(known) = close {
                self.mistakes.push(format!("{name} is not a setting; did you mean {known}?"));
            }
        }
    }

    /// Rules that span settings.
    fn check_together(&mut self, config: &Config) {
        let mut rule = |ok: bool, mistake: &str| {
            if !ok {
                self.mistakes.push(mistake.to_owned());
            }
        };
        let cache = &config.cache;
        let redis = config.redis.as_ref().map_or(Duration::ZERO, |redis| {
            redis.connect_timeout + redis.response_timeout * 3 // read, fill, and one more for a lost script
        });
        rule(
            redis + cache.lease_wait + cache.hard_timeout < config.http.request_timeout,
            "REQUEST_TIMEOUT_MS must exceed CACHE_HARD_TIMEOUT_MS, and with Redis also CACHE_LEASE_WAIT_MS, \
             REDIS_CONNECT_TIMEOUT_MS and three times REDIS_RESPONSE_TIMEOUT_MS, else a slow Redis fails reads that the \
             database could answer",
        );
        rule(
            config.database.feed_interval.is_none_or(|interval| interval * 2 <= cache.unheard_max),
            "FEED_INTERVAL_MS must be at most half of CACHE_UNHEARD_MAX_S, else memory is distrusted between two looks",
        );
        rule(
            cache.hard_timeout < cache.lease,
            "CACHE_HARD_TIMEOUT_MS must be below CACHE_LEASE_MS, else a live load loses its lease",
        );
        rule(
            cache.max_body_bytes as u64 * crate::cache::LARGEST_SHARE <= cache.l1_max_bytes,
            "CACHE_MAX_BODY_BYTES must be at most an eighth of CACHE_L1_MAX_BYTES, else the largest bodies are never kept",
        );
    }
}

fn is_known(name: &str) -> bool {
    HOST_NAMES.contains(&name)
        || SETTINGS.iter().any(|setting| setting.name == name)
        || connection_string_names("Sql", SQL_PREFIXES).any(|known| known == name)
        || connection_string_names("Redis", REDIS_PREFIXES).any(|known| known == name)
}

/// Every name a connection string may have.
fn connection_string_names(name: &str, prefixes: &[&str]) -> impl Iterator<Item = String> {
    prefixes.iter().copied().chain([""]).map(move |prefix| format!("{prefix}{name}"))
}

/// The variable by which a Functions host gives the port, if one does; the newer name wins.
fn port_name(variables: &BTreeMap<String, String>) -> Option<&'static str> {
    HOST_NAMES[..2].iter().find(|name| variables.contains_key(**name)).copied()
}

/// The `Values` of a `local.settings.json` and its connection strings, as the variables that Core Tools makes of them;
/// empty if there is no such file.
fn local_settings(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let Some(mut json) = read_json(path)? else { return Ok(BTreeMap::new()) };
    if json.get("IsEncrypted") != Some(&serde_json::Value::Bool(false)) {
        return Err(format!("{}: \"IsEncrypted\" must be false (a missing one means true)", path.display()));
    }
    let connection_strings = json.get_mut("ConnectionStrings").map(serde_json::Value::take);
    let mut values: BTreeMap<String, String> = match json.get_mut("Values").map(serde_json::Value::take) {
        None => BTreeMap::new(),
        Some(values) => serde_json::from_value(values)
            .map_err(|_| format!("{}: \"Values\" must be an object of strings", path.display()))?,
    };
    let Some(connection_strings) = connection_strings else { return Ok(values) };
    let strings: BTreeMap<String, ConnectionString> = serde_json::from_value(connection_strings).map_err(|_| {
        format!(
            "{}: \"ConnectionStrings\" must be an object of strings, or of objects with \"ConnectionString\"",
            path.display()
        )
    })?;
    for (name, ConnectionString::Plain(text) | ConnectionString::WithProvider { text }) in strings {
        values.insert(format!("{SECTION_COLON}{name}"), text);
    }
    Ok(values)
}

/// An entry of `ConnectionStrings` in a `local.settings.json`.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum ConnectionString {
    Plain(String),
    WithProvider {
        #[serde(rename = "ConnectionString")]
        text: String,
    },
}

/// `extensions.http.routePrefix` of a host.json, so that the prefix is written down once.
fn host_json_route_prefix(path: &Path) -> Result<Option<String>, String> {
    let Some(json) = read_json(path)? else { return Ok(None) };
    match json.pointer("/extensions/http/routePrefix") {
        None => Ok(None),
        Some(serde_json::Value::String(prefix)) => Ok(Some(prefix.clone())),
        Some(_) => Err(format!("{}: extensions.http.routePrefix must be a string", path.display())),
    }
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    // What the host accepts: a byte order mark (editors on Windows), comments, trailing commas.
    json5::from_str(text.trim_start_matches('\u{feff}')).map(Some).map_err(|error| {
        let json5::Error::Message { location, .. } = error;
        let place = location.map_or_else(String::new, |at| format!(": line {}, column {}", at.line, at.column));
        format!("{} is not JSON{place}", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_variables(&pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn nothing_set_is_a_standalone_start_with_documented_defaults() {
        let config = parse(&[]).expect("defaults are valid");
        assert_eq!(config.role, Role::Standalone);
        assert_eq!((config.http.port, config.http.route_prefix.as_str()), (7071, "api"));
        assert_eq!(config.cache.l1_duration, Duration::from_secs(300));
        assert!(config.redis.is_none() && config.database.source == Source::Embedded);
    }

    #[test]
    fn every_default_is_valid_for_its_own_setting() {
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            parse(&[(setting.name, setting.default)]).unwrap_or_else(|error| panic!("{}: {error}", setting.name));
        }
    }

    #[test]
    fn level_durations_follow_the_common_one_until_set_apart() {
        let config = parse(&[("CACHE_DURATION_S", "60"), ("CACHE_L2_DURATION_S", "600")]).expect("valid");
        assert_eq!(config.cache.l1_duration, Duration::from_secs(60));
        assert_eq!(config.cache.l2_duration, Duration::from_secs(600));
    }

    #[test]
    fn the_newer_port_variable_wins() {
        let both = [("FUNCTIONS_HTTPWORKER_PORT", "4001"), ("FUNCTIONS_CUSTOMHANDLER_PORT", "4002")];
        let config = parse(&both).expect("valid");
        assert_eq!((config.role, config.http.port), (Role::Handler, 4002));
        assert_eq!(parse(&both[..1]).expect("valid").http.port, 4001);
    }

    #[test]
    fn every_mistake_is_named_in_one_message_and_no_secret_is() {
        let error = parse(&[
            ("FUNCTIONS_CUSTOMHANDLER_PORT", "seven"),
            ("CACHE_DURATION_S", "5m"),
            ("CACHE_JITTER_PERCENT", "91"),
            ("CACHE_DURATON_S", "60"),
            ("CACHE_LEASE_MS", "4000"),
            ("HTTP_CACHE_CONTROL", "no\ncache"),
            ("LOG_LEVEL", "loud"),
            ("Redis", "hunter2@nowhere"),
            ("Sql", "Server:x;Password=hunter2"),
            ("REDIS_PREFIX", "a b"),
        ])
        .expect_err("ten mistakes");
        let message = error.to_string();
        for name in [
            "FUNCTIONS_CUSTOMHANDLER_PORT is \"seven\"",
            "CACHE_DURATION_S is \"5m\"",
            "CACHE_JITTER_PERCENT is \"91\"",
            "CACHE_DURATON_S is not a setting; did you mean CACHE_DURATION_S?",
            "CACHE_HARD_TIMEOUT_MS must be below",
            "HTTP_CACHE_CONTROL has characters",
            "LOG_LEVEL is \"loud\"",
            "Redis is not of the form",
            "Sql: it is none of",
            "REDIS_PREFIX has blanks",
        ] {
            assert!(message.contains(name), "{name} is missing in: {message}");
        }
        assert_eq!(error.mistakes.len(), 10, "{message}");
        assert!(!message.contains("hunter2"), "{message}");
    }

    #[test]
    fn more_connections_than_the_tier_allows_are_refused_with_the_arithmetic() {
        let redis = ("Redis", "redis://127.0.0.1:1");
        let tier = ("REDIS_MAX_CLIENTS", "250");
        let error = parse(&[redis, tier, ("MAX_INSTANCES", "200")]).expect_err("600 > 250").to_string();
        assert!(error.contains("200 instances with 3 Redis connections each need 600"), "{error}");
        assert!(error.contains("allow 83 instances"), "{error}");
        let platform = ("WEBSITE_MAX_DYNAMIC_APPLICATION_SCALE_OUT", "100");
        assert!(parse(&[redis, tier, platform]).is_err(), "what the platform says counts too");
        assert!(parse(&[redis, tier, platform, ("MAX_INSTANCES", "83")]).is_ok(), "what is set counts more");
        let frugal = parse(&[redis, tier, ("MAX_INSTANCES", "200"), ("REDIS_FRUGAL", "on")]).expect("200 <= 250");
        assert_eq!(frugal.redis.map(|redis| redis.connections()), Some(1));
        assert!(parse(&[tier, ("MAX_INSTANCES", "200")]).is_ok(), "without Redis there is nothing to count");
        assert!(parse(&[redis, ("MAX_INSTANCES", "200")]).is_ok(), "without a limit neither");
    }

    #[test]
    fn a_config_shown_for_debugging_hides_its_secrets() {
        let config = parse(&[("Redis", "redis://:hunter2@127.0.0.1:1"), ("Sql", "sqlite:hunter2.db")]).expect("valid");
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    const SQL_SERVER: &str = "Server=h;Database=db;User ID=me;Password=hunter2";

    #[test]
    fn a_connection_string_is_found_under_each_of_its_names() {
        for prefix in SQL_PREFIXES {
            let text = if prefix.starts_with("MYSQL") {
                "Server=h;Database=db;UID=me"
            } else {
                "Server=h;Database=db;User ID=me"
            };
            let config = parse(&[(&format!("{prefix}Sql"), text), ("Sql", " ")]).expect("valid");
            assert!(config.database.source.server().is_some_and(|server| server.host == "h"), "{prefix}");
        }
        for prefix in REDIS_PREFIXES {
            assert!(parse(&[(&format!("{prefix}Redis"), "redis://h:1")]).expect("valid").redis.is_some(), "{prefix}");
        }
        let same = [("Sql", SQL_SERVER), ("SQLCONNSTR_Sql", SQL_SERVER)];
        assert!(parse(&same).is_ok());
        let error = parse(&[same[0], ("ConnectionStrings__Sql", "sqlite:hunter2")]).expect_err("two").to_string();
        assert!(error.contains("ConnectionStrings__Sql and Sql are different connection strings"), "{error}");
        let error = parse(&[("CUSTOMCONNSTR_Redis", "hunter2"), ("SQLAZURECONNSTR_Sql", "hunter2")]).expect_err("two");
        let [redis, sql] = &error.mistakes[..] else { panic!("{error}") };
        assert!(redis.starts_with("CUSTOMCONNSTR_Redis is not") && sql.starts_with("SQLAZURECONNSTR_Sql: "), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn a_server_elsewhere_must_be_verified_unless_told_otherwise() {
        let allowed = ("DATABASE_ALLOW_UNVERIFIED", "ON");
        for (text, is_refused) in [
            ("Server=h;Database=db;User ID=me;Encrypt=False", Some("h would not be encrypted")),
            ("Server=h;Database=db;User ID=me;TrustServerCertificate=True", Some("h would accept any certificate")),
            ("Server=127.9.9.9;Database=db;User ID=me;Encrypt=False", None),
            ("Server=.;Database=db;User ID=me;TrustServerCertificate=True", None),
            ("Server=::1;Database=db;User ID=me;Encrypt=False", None),
            ("mysql://me@h/db?ssl-mode=PREFERRED", Some("h would accept any certificate")),
            ("postgres://me@h/db?sslmode=disable", Some("h would not be encrypted")),
            ("postgres://me@h/db", None),
        ] {
            let error = parse(&[("Sql", text)]).err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(error.contains(is_refused.unwrap_or("wrong")), is_refused.is_some(), "{text}: {error}");
            assert!(parse(&[("Sql", text), allowed]).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_managed_identity_needs_the_platforms_endpoint() {
        let sql = ("Sql", "Server=h;Database=db;Authentication=Active Directory Managed Identity");
        let (url, header) =
            (("IDENTITY_ENDPOINT", "http://169.254.1.2:8081/msi/token"), ("IDENTITY_HEADER", "hunter2"));
        let config = parse(&[sql, url, header]).expect("valid");
        assert_eq!(config.database.identity.as_ref().map(|identity| identity.url.as_str()), Some(url.1));
        assert!(!format!("{config:?}").contains("hunter2"));
        assert!(parse(&[sql, url]).expect_err("no header").to_string().contains("IDENTITY_HEADER"));
        let wrong = ("IDENTITY_ENDPOINT", "https://example.com/");
        assert!(parse(&[sql, wrong, header]).expect_err("https").to_string().contains("is not an http: URL"));
        assert!(parse(&[wrong, header]).is_ok(), "nobody needs it");
    }

    #[test]
    fn limits_of_the_string_count_where_no_setting_says_otherwise() {
        let limits = |pairs: &[(&str, &str)]| {
            let config = parse(pairs).expect("valid");
            let database = config.database;
            (database.connect_timeout.as_millis(), database.max_connections, config.cache.loads_max)
        };
        let said = ("Sql", "Server=h;Database=db;User ID=me;Connect Timeout=2;Max Pool Size=20");
        assert_eq!(limits(&[]), (4000, 8, 8));
        assert_eq!(limits(&[said]), (2000, 20, 20));
        assert_eq!(limits(&[said, ("CACHE_LOADS_MAX", "3")]), (2000, 20, 3));
        assert_eq!(
            limits(&[said, ("DATABASE_CONNECT_TIMEOUT_MS", "300"), ("DATABASE_MAX_CONNECTIONS", "5")]),
            (300, 5, 5)
        );
        let much = ("Sql", "Server=h;Database=db;User ID=me;Connect Timeout=30;Max Pool Size=5000");
        assert_eq!(limits(&[much]), (4000, 1000, 1000), "below the hard timeout, and no more than the setting takes");
    }

    #[test]
    fn the_change_feed_rests_only_where_trigger_and_log_do_its_job() {
        let (sql, redis) = (("Sql", SQL_SERVER), ("Redis", "redis://h:1"));
        let handler = ("FUNCTIONS_CUSTOMHANDLER_PORT", "4001");
        let interval = |pairs: &[(&str, &str)]| parse(pairs).expect("valid").database.feed_interval;
        let second = Some(Duration::from_secs(1));
        assert_eq!(interval(&[sql, redis, handler]), None);
        assert_eq!(interval(&[sql, redis, handler, ("FEED_INTERVAL_MS", "500")]), Some(Duration::from_millis(500)));
        for name in ["AzureWebJobs.InvalidateCache.Disabled", "AzureWebJobs__InvalidateCache__Disabled"] {
            assert_eq!(interval(&[sql, redis, handler, (name, "True")]), Some(Duration::from_secs(1)), "nobody calls");
            assert_eq!(interval(&[sql, redis, handler, (name, "false")]), None);
        }
        assert_eq!(interval(&[sql, redis]), second, "standalone: no trigger");
        assert_eq!(interval(&[sql, handler]), second, "no log");
        assert_eq!(interval(&[("Sql", "postgres://me@h/db"), redis, handler]), second, "no trigger for it");
        assert_eq!(interval(&[("FEED_INTERVAL_MS", "0")]), None);
    }

    #[test]
    fn local_settings_are_read_as_core_tools_reads_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("local.settings.json");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("written");
            local_settings(&path)
        };
        let values = read("\u{feff}{\"IsEncrypted\": false, \"Values\": {\"Sql\": \"sqlite:a\"}}").expect("valid");
        assert_eq!(values["Sql"], "sqlite:a");
        assert!(read("{\"Values\": {}}").expect_err("encrypted").contains("IsEncrypted"));
        assert!(read("{\"IsEncrypted\": false, \"Values\": {\"A\": 1}}").expect_err("number").contains("strings"));
        let values = read(
            "{\"IsEncrypted\": false, \"ConnectionStrings\": {\"Sql\": \"sqlite:a\", \
             \"Redis\": {\"ConnectionString\": \"redis://h\", \"ProviderName\": \"x\"}}}",
        );
        let values = values.expect("valid");
        assert_eq!((&*values["ConnectionStrings:Sql"], &*values["ConnectionStrings:Redis"]), ("sqlite:a", "redis://h"));
        let wrong = read("{\"IsEncrypted\": false, \"ConnectionStrings\": {\"Sql\": 1}}");
        assert!(wrong.expect_err("number").contains("ConnectionStrings"));
        assert!(read("{").expect_err("cut").contains("not JSON: line 1"));
        std::fs::remove_file(&path).expect("removed");
        assert!(local_settings(&path).expect("no file is fine").is_empty());
    }
}
