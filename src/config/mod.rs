//! Environment → [`Config`].
//!
//! In reading order: `settings` (the table of all there are), `reader` (variables → values), `connection_string` and what
//! it stands on. Must not know what the values are used for beyond their type. Invariant: a `Config` exists only if every setting was valid; otherwise
//! [`ConfigError`] names all mistakes at once, and never the value of a secret.

mod ado;
mod connection_string;
mod keywords;
mod reader;
mod redis_string;
mod server;
mod settings;

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

pub(crate) use self::server::is_local;
pub use self::{
    connection_string::{Login, Server, Source, Tls},
    redis_string::{Node, RedisLogin, RedisServer},
    settings::{Kind, SETTINGS, Setting},
};
use self::{
    reader::Reader,
    settings::{HOST_NAMES, ROUTE_PREFIX, SECTION_COLON, is_known},
};

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
        let (variables, mistakes) = Self::variables_of_process();
        Self::parse(&variables, mistakes)
    }

    /// The same, but as a Functions host on this machine would start the handler.
    pub fn from_process_as_under_a_host() -> Result<Self, ConfigError> {
        let (mut variables, mistakes) = Self::variables_of_process();
        variables.entry(HOST_NAMES[0].to_owned()).or_insert_with(|| "7071".to_owned());
        Self::parse(&variables, mistakes)
    }

    fn variables_of_process() -> (BTreeMap<String, String>, Vec<String>) {
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
        (variables, mistakes)
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
        let max_instances = read.max_instances();
        let redis = read.redis(max_instances);
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
            max_instances,
            given: read.given(),
        };
        read.check_together(&config);
        match read.mistakes.is_empty() {
            true => Ok(config),
            false => Err(ConfigError { mistakes: read.mistakes }),
        }
    }
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

pub(crate) fn read_json(path: &Path) -> Result<Option<serde_json::Value>, String> {
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
    use super::{
        settings::{REDIS_PREFIXES, SQL_PREFIXES},
        *,
    };

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
            "Redis: a part that is no keyword is not of the form host:port",
            "Sql: it is none of",
            "REDIS_PREFIX has blanks",
        ] {
            assert!(message.contains(name), "{name} is missing in: {message}");
        }
        assert_eq!(error.mistakes.len(), 10, "{message}");
        assert!(!message.contains("hunter2"), "{message}");
    }

    #[test]
    fn what_tells_of_changes_is_asked_twice_while_memory_is_trusted() {
        let (redis, frugal) = (("Redis", "redis://127.0.0.1:1"), ("REDIS_FRUGAL", "on"));
        for (variables, mistake) in [
            (&[("FEED_INTERVAL_MS", "5001")][..], "FEED_INTERVAL_MS must be at most half"),
            (
                &[redis, frugal, ("REDIS_FRUGAL_POLL_MS", "1501"), ("CACHE_UNHEARD_MAX_S", "3")],
                "REDIS_FRUGAL_POLL_MS must",
            ),
        ] {
            let error = parse(variables).expect_err(mistake).to_string();
            assert!(error.contains(mistake) && error.starts_with("1 "), "{error}");
        }
        assert!(parse(&[("FEED_INTERVAL_MS", "5000"), redis, frugal, ("REDIS_FRUGAL_POLL_MS", "5000")]).is_ok());
        assert!(parse(&[redis, ("REDIS_FRUGAL_POLL_MS", "5000"), ("CACHE_UNHEARD_MAX_S", "3")]).is_ok(), "not polled");
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

    #[test]
    fn redis_is_protected_off_this_machine_and_may_be_entered_by_an_identity() {
        let (far, near) = (("Redis", "shop.example:10000"), ("Redis", "localhost"));
        let secure = ("Redis", "shop.example:10000,ssl=True");
        let (endpoint, header) = (("IDENTITY_ENDPOINT", "http://127.0.0.1:1/msi"), ("IDENTITY_HEADER", "h"));
        let (system, open) = (("REDIS_ENTRA_ID", "System"), ("REDIS_ALLOW_UNENCRYPTED", "on"));
        let id = "0f8fad5b-d9cb-469f-a165-70867728950e";
        for (variables, login) in [
            (&[near][..], RedisLogin::Default),
            (&[far, open], RedisLogin::Default),
            (&[secure], RedisLogin::Default),
            (&[secure, ("REDIS_CA_FILE", "/a.pem")], RedisLogin::Default),
            (&[secure, system, endpoint, header], RedisLogin::ManagedIdentity { client_id: None, user: None }),
            (
                &[("Redis", "shop.example,ssl=True,user=me"), ("REDIS_ENTRA_ID", id), endpoint, header],
                RedisLogin::ManagedIdentity { client_id: Some(id.to_owned()), user: Some("me".to_owned()) },
            ),
        ] {
            let config = parse(variables).unwrap_or_else(|error| panic!("{variables:?}: {error}"));
            assert_eq!(config.redis.expect("one").server.login, login, "{variables:?}");
        }
        for (variables, mistake) in [
            (&[far][..], "Redis: the connection would not be encrypted"),
            (&[far, system, endpoint, header, open], "a token is only sent encrypted"),
            (&[secure, system], "Redis is to be opened with a managed identity, and IDENTITY_ENDPOINT"),
            (&[secure, ("REDIS_ENTRA_ID", "me")], "REDIS_ENTRA_ID is neither system nor the client id"),
            (
                &[("Redis", "h,ssl=True,password=hunter2"), system, endpoint, header],
                "has a password, and REDIS_ENTRA_ID",
            ),
            (&[near, ("REDIS_CA_FILE", "/a.pem")], "REDIS_CA_FILE has no effect"),
        ] {
            let error = parse(variables).expect_err(mistake).to_string();
            assert!(error.contains(mistake) && error.starts_with("1 ") && !error.contains("hunter2"), "{error}");
        }
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
            assert!(
                parse(&[(&format!("{prefix}Redis"), "redis://localhost:1")]).expect("valid").redis.is_some(),
                "{prefix}"
            );
        }
        let same = [("Sql", SQL_SERVER), ("SQLCONNSTR_Sql", SQL_SERVER)];
        assert!(parse(&same).is_ok());
        let error = parse(&[same[0], ("ConnectionStrings__Sql", "sqlite:hunter2")]).expect_err("two").to_string();
        assert!(error.contains("ConnectionStrings__Sql and Sql are different connection strings"), "{error}");
        let error = parse(&[("CUSTOMCONNSTR_Redis", "hunter2"), ("SQLAZURECONNSTR_Sql", "hunter2")]).expect_err("two");
        let [redis, sql] = &error.mistakes[..] else { panic!("{error}") };
        assert!(redis.starts_with("CUSTOMCONNSTR_Redis: ") && sql.starts_with("SQLAZURECONNSTR_Sql: "), "{error}");
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
        let (sql, redis) = (("Sql", SQL_SERVER), ("Redis", "redis://localhost:1"));
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
