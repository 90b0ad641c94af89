//! Variables → values, by the table: looks each up, checks it, and collects what is wrong.
//!
//! Owns the rules between settings too. Invariant: whatever is wrong is told, and none of it by a secret's value.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use super::{
    Config, Database, IdentityEndpoint, Login, Redis, RedisLogin, RedisServer, Role, Source, Tls, connection_string,
    redis_string,
    settings::{
        Kind, LARGEST_SHARE, MOST_CONNECTIONS, REDIS_PREFIXES, ROUTE_PREFIX, SETTINGS, SQL_PREFIXES, Setting,
        connection_string_names, is_known, known_names,
    },
};

/// Reads variables by the table and collects what is wrong with them.
pub(super) struct Reader<'a> {
    pub(super) variables: &'a BTreeMap<String, String>,
    pub(super) mistakes: Vec<String>,
    /// What is wrong with the machine rather than with a setting: an identity is asked for, and none is here.
    pub(super) lacking: Vec<String>,
}

impl Reader<'_> {
    fn setting(name: &str) -> &'static Setting {
        SETTINGS.iter().find(|setting| setting.name == name).unwrap_or_else(|| panic!("{name} is not in SETTINGS"))
    }

    fn is_set(&self, name: &str) -> bool {
        self.variables.get(name).is_some_and(|text| !text.trim().is_empty())
    }

    /// The text of a setting: what is set, else its default.
    pub(super) fn text(&mut self, name: &str) -> String {
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

    pub(super) fn number(&mut self, name: &str) -> u64 {
        self.number_or(name, 0)
    }

    /// The number of a setting; `fallback` if neither it nor the table names one.
    pub(super) fn number_or(&mut self, name: &str, fallback: u64) -> u64 {
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

    fn is_on(&mut self, name: &str) -> bool {
        self.text(name).eq_ignore_ascii_case("on")
    }

    pub(super) fn seconds(&mut self, name: &str) -> Duration {
        Duration::from_secs(self.number(name))
    }

    pub(super) fn millis(&mut self, name: &str) -> Duration {
        Duration::from_millis(self.number(name))
    }

    pub(super) fn port(&mut self, host_port: Option<&str>) -> u16 {
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

    pub(super) fn route_prefix(&mut self) -> String {
        let prefix = self.variables.get(ROUTE_PREFIX).map_or("api", |prefix| prefix.trim().trim_matches('/'));
        if !prefix.chars().all(|c| c.is_ascii_alphanumeric() || "-_.~/".contains(c)) {
            self.mistakes.push(format!("routePrefix is {prefix:?}, not a plain path"));
        }
        prefix.to_owned()
    }

    pub(super) fn header_value(&mut self, name: &str) -> String {
        let value = self.text(name);
        if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            self.mistakes.push(format!("{name} has characters that no HTTP header may hold"));
        }
        value
    }

    pub(super) fn redis(&mut self) -> Option<Redis> {
        let (name, text) = self.connection_string("Redis", REDIS_PREFIXES);
        // All of them are read where there is no Redis too, so that what is wrong with them is told.
        let frugal = self.is_on("REDIS_FRUGAL");
        let (pool_size, poll) = (self.number("REDIS_POOL_SIZE") as usize, self.millis("REDIS_FRUGAL_POLL_MS"));
        let (entra, allow_unencrypted) = (self.entra_id(), self.is_on("REDIS_ALLOW_UNENCRYPTED"));
        let ca_file = Some(self.text("REDIS_CA_FILE")).filter(|file| !file.is_empty()).map(PathBuf::from);
        let prefix = self.text("REDIS_PREFIX");
        if prefix.chars().any(|c| c.is_whitespace() || c.is_control() || "{}".contains(c)) {
            self.mistakes.push("REDIS_PREFIX has blanks or braces".to_owned());
        }
        let (connect_timeout, response_timeout) =
            (self.millis("REDIS_CONNECT_TIMEOUT_MS"), self.millis("REDIS_RESPONSE_TIMEOUT_MS"));
        let log_max_length = self.number("REDIS_LOG_MAX_LENGTH");
        let max_clients = self.number("REDIS_MAX_CLIENTS");
        if text.is_empty() {
            return None;
        }
        let (pool_size, frugal_poll) = (if frugal { 1 } else { pool_size }, frugal.then_some(poll));
        let server = match redis_string::parse(&text) {
            Ok(server) => self.redis_server(&name, server, entra, allow_unencrypted),
            Err(mistakes) => {
                self.mistakes.extend(mistakes.into_iter().map(|mistake| format!("{name}: {mistake}")));
                return None;
            }
        };
        if ca_file.is_some() && !server.encrypted {
            self.mistakes.push(format!("REDIS_CA_FILE has no effect: {name} does not ask for TLS"));
        }
        let is_needed = matches!(server.login, RedisLogin::ManagedIdentity { .. });
        let identity = self.identity("Redis", is_needed);
        Some(Redis {
            server,
            allow_unencrypted,
            ca_file,
            identity,
            pool_size,
            frugal_poll,
            prefix,
            connect_timeout,
            response_timeout,
            log_max_length,
            max_clients,
        })
    }

    /// Which identity is to log in to Redis: none, the system-assigned one, or one by its client id.
    fn entra_id(&mut self) -> Option<Option<String>> {
        match &*self.text("REDIS_ENTRA_ID") {
            "" => None,
            system if system.eq_ignore_ascii_case("system") => Some(None),
            id if uuid::Uuid::try_parse(id).is_ok() => Some(Some(id.to_owned())),
            _ => {
                self.mistakes.push("REDIS_ENTRA_ID is neither system nor the client id of an identity".to_owned());
                None
            }
        }
    }

    /// The server with the login that was asked for, protected as it must be.
    fn redis_server(
        &mut self,
        name: &str,
        mut server: RedisServer,
        entra: Option<Option<String>>,
        allow_unencrypted: bool,
    ) -> RedisServer {
        if let Some(client_id) = entra {
            let user = match &server.login {
                RedisLogin::Password { user, password } => {
                    if !password.reveal().is_empty() {
                        self.mistakes.push(format!("{name} has a password, and REDIS_ENTRA_ID is set; set only one"));
                    }
                    user.clone()
                }
                _ => None,
            };
            server.login = RedisLogin::ManagedIdentity { client_id, user };
        }
        let is_open = !server.encrypted && !server.is_local();
        if is_open && matches!(server.login, RedisLogin::ManagedIdentity { .. }) {
            self.mistakes.push(format!("{name}: a token is only sent encrypted; ask for TLS (ssl=True)"));
        } else if is_open && !allow_unencrypted {
            self.mistakes.push(format!(
                "{name}: the connection would not be encrypted; ask for TLS (ssl=True, or rediss:), or set \
                 REDIS_ALLOW_UNENCRYPTED=on"
            ));
        }
        server
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

    /// Which database, and whether servers may go unverified.
    fn source(&mut self, role: Role) -> (Source, bool) {
        let (name, text) = self.connection_string("Sql", SQL_PREFIXES);
        if text.is_empty() && role == Role::Handler && self.is_set("WEBSITE_SITE_NAME") {
            let mistake = "Sql is not set, and this is Azure: the embedded catalogue is only for a first look (if it is \
                           meant, Sql=embedded)";
            self.mistakes.push(mistake.to_owned());
        }
        let source = connection_string::parse(&name, &text).unwrap_or_else(|mistakes| {
            self.mistakes.extend(mistakes.into_iter().map(|mistake| format!("{name}: {mistake}")));
            Source::Embedded
        });
        let allowed = self.is_on("DATABASE_ALLOW_UNVERIFIED");
        if let Some(server) = source.server().filter(|server| !allowed && !server.is_local()) {
            let lacking = match server.tls {
                Tls::Off => "would not be encrypted",
                Tls::Unverified => "would accept any certificate",
                Tls::Verified { .. } => return (source, allowed),
            };
            self.mistakes.push(format!(
                "{name}: the connection to {} {lacking}; ask for encryption and verification there, or set \
                 DATABASE_ALLOW_UNVERIFIED=on",
                server.host
            ));
        }
        (source, allowed)
    }

    /// `query_timeout`: the bound of one load.
    pub(super) fn database(&mut self, role: Role, redis: Option<&Redis>, query_timeout: Duration) -> Database {
        let (source, allow_unverified) = self.source(role);
        // Azure's portal writes 30 s into every string. A load is given up long before, and the message should say
        // that it was the connection that took too long.
        let most = query_timeout * 4 / 5;
        let said = source.server().and_then(|server| server.connect_timeout);
        let connect_timeout = match self.millis("DATABASE_CONNECT_TIMEOUT_MS") {
            set if self.is_set("DATABASE_CONNECT_TIMEOUT_MS") => set,
            default => said.unwrap_or(default).min(most),
        };
        let said =
            source.server().and_then(|server| server.max_connections).map(|said| said.min(MOST_CONNECTIONS as u32));
        let max_connections = said.filter(|_| !self.is_set("DATABASE_MAX_CONNECTIONS"));
        let could_be_told = role == Role::Handler && redis.is_some() && matches!(source, Source::SqlServer(_));
        let trigger = could_be_told && !self.trigger_is_disabled();
        let feed_ms = self.number_or("FEED_INTERVAL_MS", if trigger { 0 } else { 1000 });
        let is_needed = source.server().is_some_and(|server| matches!(server.login, Login::ManagedIdentity { .. }));
        let identity = self.identity("the database", is_needed);
        Database {
            max_connections: max_connections.unwrap_or(self.number("DATABASE_MAX_CONNECTIONS") as u32),
            connect_timeout,
            query_timeout,
            allow_unverified,
            max_age: self.seconds("DATABASE_CONNECTION_MAX_AGE_S"),
            identity,
            feed_interval: (feed_ms > 0).then(|| Duration::from_millis(feed_ms)),
            source,
        }
    }

    /// Whether the host was told not to run InvalidateCache: `AzureWebJobs.InvalidateCache.Disabled`, where Linux may
    /// have underscores for the dots.
    pub(super) fn trigger_is_disabled(&self) -> bool {
        let is_name = |name: &str| {
            let plain = name.replace("__", ".").replace('_', ".");
            plain.eq_ignore_ascii_case("AzureWebJobs.InvalidateCache.Disabled")
        };
        let is_on = |text: &str| ["true", "1"].iter().any(|on| on.eq_ignore_ascii_case(text.trim()));
        self.variables.iter().any(|(name, text)| is_name(name) && is_on(text))
    }

    /// The platform sets both variables where the app has an identity; only who needs one can miss them.
    fn identity(&mut self, what: &str, is_needed: bool) -> Option<IdentityEndpoint> {
        let variable = |name: &str| self.variables.get(name).map(|text| text.trim()).filter(|text| !text.is_empty());
        let is_http = |url: &&str| url::Url::parse(url).is_ok_and(|url| url.scheme() == "http" && url.has_host());
        let (url, header) = (variable("IDENTITY_ENDPOINT"), variable("IDENTITY_HEADER"));
        match (url.filter(is_http), header) {
            (Some(url), Some(header)) => Some(IdentityEndpoint { url: url.to_owned(), header: header.into() }),
            (None, Some(_)) if is_needed && url.is_some() => {
                self.mistakes.push("IDENTITY_ENDPOINT is not an http: URL".to_owned());
                None
            }
            _ if is_needed => {
                self.lacking.push(format!(
                    "{what} is to be opened with a managed identity, and IDENTITY_ENDPOINT and IDENTITY_HEADER, which \
                     the platform sets where the app has one, are missing"
                ));
                None
            }
            _ => None,
        }
    }

    /// Instances that the plan may start.
    pub(super) fn max_instances(&mut self) -> Option<u64> {
        let platform = self.variables.get("WEBSITE_MAX_DYNAMIC_APPLICATION_SCALE_OUT");
        let platform = platform.and_then(|instances| instances.trim().parse().ok()).unwrap_or(0);
        Some(self.number_or("MAX_INSTANCES", platform)).filter(|instances| *instances > 0)
    }

    /// What was set, by the table, without secrets.
    pub(super) fn given(&self) -> BTreeMap<&'static str, String> {
        let given = SETTINGS.iter().filter(|setting| !matches!(setting.kind, Kind::Secret)).filter_map(|setting| {
            let value = self.variables.get(setting.name).map(|value| value.trim()).filter(|value| !value.is_empty())?;
            Some((setting.name, value.to_owned()))
        });
        given.collect()
    }

    /// A name one or two letters off one of ours is a mistake, or in another case. Others' variables are not: only names
    /// that begin as ours do, and nobody else's, are looked at for letters (.NET has an `HTTP_PORTS`).
    pub(super) fn find_misspelled(&mut self) {
        const OURS: [&str; 7] = ["CACHE_", "REDIS_", "DATABASE_", "REQUEST_", "INVALIDATE_", "FEED_", "FUNCTIONS_"];
        let ours = |name: &str| OURS.iter().any(|start| name.starts_with(start));
        for name in self.variables.keys().filter(|name| !is_known(name)) {
            let is_close = |known: &String| {
                let letters = || strsim::damerau_levenshtein(&name.to_uppercase(), &known.to_uppercase());
                known.eq_ignore_ascii_case(name) || ours(name) && letters() <= 2
            };
            if let Some(known) = known_names().find(is_close) {
                self.mistakes.push(format!("{name} is not a setting; did you mean {known}?"));
            }
        }
    }

    /// Rules that span settings.
    pub(super) fn check_together(&mut self, config: &Config) {
        let mut rule = |ok: bool, mistake: &str| {
            if !ok {
                self.mistakes.push(mistake.to_owned());
            }
        };
        let cache = &config.cache;
        let redis = config.redis.as_ref().map_or(Duration::ZERO, |redis| {
            // Look, lease, fill, and one more for a lost script.
            redis.connect_timeout + redis.response_timeout * 4 + cache.lease_wait
        });
        rule(
            redis + cache.hard_timeout < config.http.request_timeout,
            "REQUEST_TIMEOUT_MS must exceed CACHE_HARD_TIMEOUT_MS, and with Redis also CACHE_LEASE_WAIT_MS, \
             REDIS_CONNECT_TIMEOUT_MS and four times REDIS_RESPONSE_TIMEOUT_MS, else a slow Redis fails reads that the \
             database could answer",
        );
        rule(
            cache.soft_timeout < cache.hard_timeout || !config.given.contains_key("CACHE_SOFT_TIMEOUT_MS"),
            "CACHE_SOFT_TIMEOUT_MS must be below CACHE_HARD_TIMEOUT_MS, else a load is given up before it is found slow",
        );
        rule(
            config.database.connect_timeout <= cache.hard_timeout,
            "DATABASE_CONNECT_TIMEOUT_MS must be at most CACHE_HARD_TIMEOUT_MS, else the load is given up before it",
        );
        rule(
            config.database.feed_interval.is_none_or(|interval| interval * 2 <= cache.unheard_max),
            "FEED_INTERVAL_MS must be at most half of CACHE_UNHEARD_MAX_S, else memory is distrusted between two looks",
        );
        rule(
            config.redis.as_ref().and_then(|redis| redis.frugal_poll).is_none_or(|poll| poll * 2 <= cache.unheard_max),
            "REDIS_FRUGAL_POLL_MS must be at most half of CACHE_UNHEARD_MAX_S, else memory is distrusted between two looks",
        );
        rule(
            cache.hard_timeout < cache.lease,
            "CACHE_HARD_TIMEOUT_MS must be below CACHE_LEASE_MS, else a live load loses its lease",
        );
        rule(
            cache.max_body_bytes as u64 * LARGEST_SHARE <= cache.l1_max_bytes,
            "CACHE_MAX_BODY_BYTES must be at most an eighth of CACHE_L1_MAX_BYTES, else the largest bodies are never kept",
        );
        let (instances, redis) = (config.max_instances.unwrap_or(0), config.redis.as_ref());
        let (each, allowed) = redis.map_or((0, 0), |redis| (redis.connections(), redis.max_clients));
        let needed = instances.saturating_mul(each);
        rule(
            allowed == 0 || needed <= allowed,
            &format!(
                "{instances} instances with {each} Redis connections each need {needed}, and REDIS_MAX_CLIENTS is \
                 {allowed}: allow {} instances, set REDIS_FRUGAL=on (1 connection each), or take a larger tier",
                allowed / each.max(1),
            ),
        );
    }
}
