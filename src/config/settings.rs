//! Every setting, its default and the reason for it, in one table.
//!
//! Owns names, limits and defaults, and the names of the host's variables; the README's table is checked against
//! [`SETTINGS`]. Reads nothing.

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

/// Room for the largest bodies in memory: its bound must be at least this many times a body's.
pub(crate) const LARGEST_SHARE: u64 = 8;

const DAY_S: u64 = 24 * 60 * 60;
const MIB: u64 = 1024 * 1024;
pub(super) const MOST_CONNECTIONS: u64 = 1000;
/// What actix-server takes.
pub(super) const MOST_WORKERS: usize = 512;

const fn number(name: &'static str, default: &'static str, min: u64, max: u64, meaning: &'static str) -> Setting {
    Setting { name, default, kind: Kind::Number(min, max), meaning }
}

const fn text(name: &'static str, default: &'static str, meaning: &'static str) -> Setting {
    Setting { name, default, kind: Kind::Text, meaning }
}

/// Every setting, in the order of the README's table.
#[rustfmt::skip] // a table reads as a table
pub const SETTINGS: &[Setting] = &[
    Setting { name: "Sql", default: "", kind: Kind::Secret, meaning: "Database: `sqlite:<file>`, `postgres://user:password@host/database`, `mysql://user:password@host/database`, or for SQL Server `Server=…;Database=…;User ID=…;Password=…`. May also be a connection string of the app named `Sql`. Empty, or `embedded`: the embedded catalogue, `product-cache.db` in the working directory, or in memory where that cannot be written; on Azure the word is needed." },
    Setting { name: "Redis", default: "", kind: Kind::Secret, meaning: "Redis: `host:port,password=…,ssl=True` (as StackExchange.Redis reads it) or `redis://[user:password@]host:port`, `rediss:` with TLS; of a cluster any node, or several. May also be a connection string of the app named `Redis`. Empty: no L2 and no invalidation log; the change feed keeps memory right." },

    number("CACHE_DURATION_S", "300", 1, 30 * DAY_S, "How long an entry is fresh. Changes are told, so this only bounds what no notice covers."),
    number("CACHE_L1_DURATION_S", "", 1, 30 * DAY_S, "The same for memory alone; empty: `CACHE_DURATION_S`. An entry taken from Redis is kept no longer than it is fresh there."),
    number("CACHE_L2_DURATION_S", "", 1, 30 * DAY_S, "The same for Redis alone; empty: `CACHE_DURATION_S`."),
    number("CACHE_ABSENT_DURATION_S", "30", 1, 30 * DAY_S, "How long \"no such product\" is fresh: short, so that an id asked too early is not refused for long."),
    number("CACHE_JITTER_PERCENT", "10", 0, 90, "Durations are shortened by a random share up to this, so that entries loaded together do not end together."),
    number("CACHE_L1_MAX_BYTES", "67108864", MIB, 64 * 1024 * MIB, "Bound of what entries take of the process's memory, all bookkeeping included: 64 MiB is some 18,000 products with photos, and 3 % of a 2 GiB instance."),
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
    number("REDIS_MAX_CLIENTS", "0", 0, 10_000_000, "Connections that the Redis tier allows; 0: unknown. With `MAX_INSTANCES`, a start that could exceed it is refused."),
    text("REDIS_PREFIX", "product-cache", "First part of every key, in braces: apps that share a Redis take different ones. In a cluster it decides the slot of all of them."),
    text("REDIS_ENTRA_ID", "", "How to log in to Redis with Microsoft Entra ID instead of a password: `system`, or the client id of a user-assigned identity. The user is the identity's object id. Empty: not."),
    text("REDIS_CA_FILE", "", "File of the authorities (PEM) that are trusted for Redis' certificate instead of the public ones."),
    Setting { name: "REDIS_ALLOW_UNENCRYPTED", default: "off", kind: Kind::Word(&["on", "off"]), meaning: "`on`: a `Redis` without TLS is also accepted on other hosts than this one: whoever is between may read and change what is said, the password included." },
    number("REDIS_CONNECT_TIMEOUT_MS", "1000", 10, 60_000, "Connect and greeting, TLS included."),
    number("REDIS_RESPONSE_TIMEOUT_MS", "250", 5, 60_000, "One answer. A healthy one takes under a millisecond; the database is the better source after 250."),
    number("REDIS_LOG_MAX_LENGTH", "100000", 100, 100_000_000, "Notices kept in the invalidation log, none for more than a day: what a disconnected instance can catch up on (a few hundred bytes each, or as many keys as a batch has rows)."),

    number("DATABASE_MAX_CONNECTIONS", "8", 1, MOST_CONNECTIONS, "Bound of the one pool: 8 serve thousands of point reads a second, and 100 instances stay below 1,000 sessions. If not set, a pool size in `Sql` counts."),
    number("DATABASE_CONNECT_TIMEOUT_MS", "4000", 50, 120_000, "To open a connection or to wait for a free one: below the hard timeout, so that the message names the cause. If not set, a connect timeout in `Sql` counts; that and the default, up to four fifths of the hard timeout."),
    number("DATABASE_CONNECTION_MAX_AGE_S", "1800", 10, DAY_S, "Age at which a connection is replaced (up to a tenth less, so that they do not end together): what a server or balancer was changed to is noticed within half an hour."),
    Setting { name: "DATABASE_ALLOW_UNVERIFIED", default: "off", kind: Kind::Word(&["on", "off"]), meaning: "`on`: a `Sql` that turns off TLS, or the check of the server's certificate, is also accepted for other hosts than this one: whoever is between may read and change what is said, the password included." },
    number("FEED_INTERVAL_MS", "", 0, 3_600_000, "How often the database is asked what changed; 0: never. Empty: 1000, but 0 with SQL Server and Redis under a Functions host, where the SQL trigger (unless it is disabled) and the invalidation log do that job."),

    number("MAX_INSTANCES", "", 1, 100_000, "Instances that the plan may start; empty: the platform's `WEBSITE_MAX_DYNAMIC_APPLICATION_SCALE_OUT`, if that is set."),
    number("HTTP_PORT", "7071", 0, 65_535, "Port of a standalone start, as with `func start`; 0: any free one. Under a Functions host the host's port is used."),
    number("HTTP_WORKERS", "0", 0, MOST_WORKERS as u64, "Threads that answer requests; 0: one per core."),
    text("HTTP_CACHE_CONTROL", "private, no-cache", "`Cache-Control` of products. The default makes clients ask again each time, which an ETag makes cheap."),
    number("HTTP_DRAIN_S", "5", 0, 300, "How long SIGTERM waits for requests in flight; a second signal ends that. The Functions host on Azure sends none: it kills the handler."),
    number("REQUEST_TIMEOUT_MS", "10000", 100, 230_000, "Bound of a whole GET. What is not there by then is answered with its last known copy, else 503; the platform's own limit is 230 s."),
    number("INVALIDATE_BUDGET_MS", "60000", 100, 140_000, "How long one InvalidateCache call retries Redis before it fails: below the SQL trigger's lease renewal limit of about 150 s."),
    number("INVALIDATE_MAX_BODY_BYTES", "67108864", 1024, 1024 * MIB, "Largest trigger batch: 1,000 rows with photos, escaped twice by the host, stay below 64 MiB."),

    number("LOG_STATUS_S", "60", 0, 86_400, "How often an instance writes in one line how its cache is doing, if anything was asked or changed; 0: never."),
    Setting { name: "LOG_LEVEL", default: "info", kind: Kind::Word(&["error", "warn", "info", "debug", "trace"]), meaning: "Least severe level that is written." },
];

/// Set by the Functions host; listed so that a misspelling of one is recognised, not shown in the README.
pub(super) const HOST_NAMES: [&str; 3] = ["FUNCTIONS_CUSTOMHANDLER_PORT", "FUNCTIONS_HTTPWORKER_PORT", ROUTE_PREFIX];
/// Where a connection string is looked for besides its own name, the names that tell its engine first: App Service
/// puts its type in front, and .NET's configuration its section, where `__` stands for `:` in environment variables.
pub(super) const SQL_PREFIXES: &[&str] = &[
    "POSTGRESQLCONNSTR_",
    "MYSQLCONNSTR_",
    "SQLAZURECONNSTR_",
    "SQLCONNSTR_",
    "CUSTOMCONNSTR_",
    SECTION,
    SECTION_COLON,
];
pub(super) const REDIS_PREFIXES: &[&str] = &["REDISCACHECONNSTR_", "CUSTOMCONNSTR_", SECTION, SECTION_COLON];
pub(super) const SECTION: &str = "ConnectionStrings__";
pub(super) const SECTION_COLON: &str = "ConnectionStrings:";
pub(super) const ROUTE_PREFIX: &str = "AzureFunctionsJobHost__extensions__http__routePrefix";

pub(super) fn is_known(name: &str) -> bool {
    known_names().any(|known| known == name)
}

/// Every name that means something.
pub(super) fn known_names() -> impl Iterator<Item = String> {
    let names = HOST_NAMES.into_iter().chain(SETTINGS.iter().map(|setting| setting.name)).map(str::to_owned);
    let (sql, redis) = (connection_string_names("Sql", SQL_PREFIXES), connection_string_names("Redis", REDIS_PREFIXES));
    names.chain(sql).chain(redis)
}

/// Every name a connection string may have.
pub(super) fn connection_string_names(name: &str, prefixes: &[&str]) -> impl Iterator<Item = String> {
    prefixes.iter().copied().chain([""]).map(move |prefix| format!("{prefix}{name}"))
}
