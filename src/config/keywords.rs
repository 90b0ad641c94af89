//! What each dialect of connection strings calls things: pairs of keyword and value → [`Fields`].
//!
//! Owns the tables of keywords, their synonyms, and those that have no effect here. Knows no rule that spans keywords.
//! Invariant: a mistake quotes a value only where it cannot be a secret, and a keyword only where it cannot be the
//! rest of a password that was cut at a semicolon.

use std::{borrow::Cow, collections::BTreeMap};

use self::{
    Field::*,
    Use::{Idle, Is, Only},
};

/// What a keyword says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    Host,
    Port,
    Database,
    User,
    Password,
    Encryption,
    Trust,
    CertificateName,
    CaFile,
    Authentication,
    Application,
    ConnectTimeout,
    Connections,
    Intent,
    Service,
}

/// What becomes of a keyword.
pub(super) enum Use {
    /// It is used.
    Is(Field),
    /// It tunes the driver it was written for; it has no effect here, and none is missed.
    Idle,
    /// Only these values can be granted, for this reason.
    Only(&'static [&'static str], &'static str),
}

/// Keywords by use; the first of each group is the one that messages suggest.
pub(super) type Dialect = &'static [(&'static [&'static str], Use)];

const NO: &[&str] = &["False", "No"];
const NO_CLIENT_CERTIFICATE: &str = "client certificates are not supported";
const NO_WINDOWS_LOGIN: &str = "a Windows login is not possible on Linux; use a password or a managed identity";

/// `Keyword=value` for SQL Server, as Microsoft.Data.SqlClient reads it.
pub(super) const SQL_SERVER: Dialect = &[
    (&["Server", "Data Source", "Address", "Addr", "Network Address"], Is(Host)),
    (&["Database", "Initial Catalog"], Is(Database)),
    (&["User ID", "UID", "User"], Is(User)),
    (&["Password", "PWD"], Is(Password)),
    (&["Encrypt"], Is(Encryption)),
    (&["TrustServerCertificate"], Is(Trust)),
    (&["HostNameInCertificate"], Is(CertificateName)),
    (&["ServerCertificate"], Is(CaFile)),
    (&["Authentication"], Is(Authentication)),
    (&["Application Name", "App"], Is(Application)),
    (&["Connect Timeout", "Connection Timeout", "Timeout"], Is(ConnectTimeout)),
    (&["Max Pool Size"], Is(Connections)),
    (&["ApplicationIntent"], Is(Intent)),
    (&["Integrated Security", "Trusted_Connection"], Only(NO, NO_WINDOWS_LOGIN)),
    (&["Column Encryption Setting"], Only(&["Disabled"], "Always Encrypted is not supported")),
    (
        &["Failover Partner"],
        Only(&[], "a mirror is not switched to; name the availability group's listener as the server"),
    ),
    (
        &["AttachDBFilename", "Initial File Name", "Extended Properties"],
        Only(&[], "only a server's own databases can be opened"),
    ),
    (&["User Instance"], Only(NO, "only Windows has user instances")),
    (&["Network Library", "Net", "Network"], Only(&["dbmssocn"], "only TCP is possible")),
    (
        &[
            "MultipleActiveResultSets",
            "Persist Security Info",
            "Pooling",
            "Min Pool Size",
            "Command Timeout",
            "Connection Lifetime",
            "Load Balance Timeout",
            "Connection Reset",
            "MultiSubnetFailover",
            "ConnectRetryCount",
            "ConnectRetryInterval",
            "Packet Size",
            "Workstation ID",
            "WSID",
            "Current Language",
            "Language",
            "Enlist",
            "Replication",
            "Type System Version",
            "Transaction Binding",
            "TransparentNetworkIPResolution",
            "IPAddressPreference",
            "PoolBlockingPeriod",
            "Asynchronous Processing",
            "Async",
            "Context Connection",
            "Attestation Protocol",
            "Enclave Attestation Url",
            "Server SPN",
        ],
        Idle,
    ),
];

/// `Keyword=value` for PostgreSQL, as Npgsql reads it.
pub(super) const NPGSQL: Dialect = &[
    (&["Host", "Server"], Is(Host)),
    (&["Port"], Is(Port)),
    (&["Database", "DB"], Is(Database)),
    (&["Username", "User ID", "UID", "User"], Is(User)),
    (&["Password", "PWD", "PSW"], Is(Password)),
    (&["SSL Mode"], Is(Encryption)),
    (&["Trust Server Certificate"], Is(Trust)),
    (&["Root Certificate"], Is(CaFile)),
    (&["Application Name"], Is(Application)),
    (&["Timeout", "Connection Timeout"], Is(ConnectTimeout)),
    (&["Maximum Pool Size", "Max Pool Size"], Is(Connections)),
    (&["Integrated Security"], Only(NO, NO_WINDOWS_LOGIN)),
    (&["SSL Certificate", "SSL Key", "SSL Password"], Only(&[], NO_CLIENT_CERTIFICATE)),
    (&["Search Path", "Options"], Only(&[], "set this for the role: ALTER ROLE … SET …")),
    (&["Passfile"], Only(&[], "write the password into the connection string")),
    (&["Target Session Attributes"], Only(&["any", "primary", "read-write"], "there is one connection target")),
    (&["Channel Binding"], Only(&["Disable", "Prefer"], "channel binding cannot be insisted on")),
    (
        &[
            "Pooling",
            "Minimum Pool Size",
            "Min Pool Size",
            "Connection Idle Lifetime",
            "Connection Pruning Interval",
            "Connection Lifetime",
            "Command Timeout",
            "Internal Command Timeout",
            "Cancellation Timeout",
            "Keepalive",
            "TCP Keepalive",
            "Include Error Detail",
            "Persist Security Info",
            "Log Parameters",
            "Max Auto Prepare",
            "Auto Prepare Min Usages",
            "No Reset On Close",
            "Enlist",
            "Multiplexing",
            "Load Balance Hosts",
            "Server Compatibility Mode",
            "Check Certificate Revocation",
            "GSS Encryption Mode",
            "Encoding",
            "Client Encoding",
            "Timezone",
            "Read Buffer Size",
            "Write Buffer Size",
        ],
        Idle,
    ),
];

/// Parameters of `postgres:` URLs, as libpq reads them.
pub(super) const POSTGRES_URL: Dialect = &[
    (&["host"], Is(Host)),
    (&["port"], Is(Port)),
    (&["database", "dbname"], Is(Database)),
    (&["user"], Is(User)),
    (&["password"], Is(Password)),
    (&["sslmode"], Is(Encryption)),
    (&["sslrootcert"], Is(CaFile)),
    (&["application_name"], Is(Application)),
    (&["connect_timeout"], Is(ConnectTimeout)),
    (&["sslcert", "sslkey", "sslpassword"], Only(&[], NO_CLIENT_CERTIFICATE)),
    (&["options"], Only(&[], "set this for the role: ALTER ROLE … SET …")),
    (&["target_session_attrs"], Only(&["any", "primary", "read-write"], "there is one connection target")),
    (&["channel_binding"], Only(&["disable", "prefer"], "channel binding cannot be insisted on")),
    (
        &[
            "keepalives",
            "keepalives_idle",
            "keepalives_interval",
            "keepalives_count",
            "tcp_user_timeout",
            "sslsni",
            "gssencmode",
            "client_encoding",
            "fallback_application_name",
        ],
        Idle,
    ),
];

/// `Keyword=value` for MySQL and MariaDB, as MySqlConnector reads it.
pub(super) const MYSQL_CONNECTOR: Dialect = &[
    (&["Server", "Host", "Data Source", "Address", "Addr", "Network Address"], Is(Host)),
    (&["Port"], Is(Port)),
    (&["Database", "Initial Catalog"], Is(Database)),
    (&["User ID", "Username", "UID", "User"], Is(User)),
    (&["Password", "PWD"], Is(Password)),
    (&["SSL Mode"], Is(Encryption)),
    (&["SSL CA", "CA Certificate File"], Is(CaFile)),
    (&["Application Name"], Is(Application)),
    (&["Connection Timeout", "Connect Timeout"], Is(ConnectTimeout)),
    (&["Maximum Pool Size", "Max Pool Size"], Is(Connections)),
    (&["Integrated Security"], Only(NO, NO_WINDOWS_LOGIN)),
    (
        &["SSL Cert", "SSL Key", "Certificate File", "Certificate Password", "Certificate Store Location"],
        Only(&[], NO_CLIENT_CERTIFICATE),
    ),
    (&["Connection Protocol", "Protocol"], Only(&["Sockets", "Socket", "TCP"], "only TCP is possible")),
    (
        &[
            "Pooling",
            "Minimum Pool Size",
            "Min Pool Size",
            "Connection Lifetime",
            "Connection Idle Timeout",
            "Connection Reset",
            "Default Command Timeout",
            "Command Timeout",
            "Cancellation Timeout",
            "Keep Alive",
            "Persist Security Info",
            "Character Set",
            "CharSet",
            "Allow Public Key Retrieval",
            "Allow User Variables",
            "Allow Zero DateTime",
            "Convert Zero DateTime",
            "DateTime Kind",
            "GUID Format",
            "Old Guids",
            "Treat Tiny As Boolean",
            "Use Affected Rows",
            "Use Compression",
            "Auto Enlist",
            "Pipelining",
            "Ignore Prepare",
            "Interactive Session",
            "Load Balance",
            "Server Redirection Mode",
            "TLS Version",
            "DNS Check Interval",
        ],
        Idle,
    ),
];

/// Parameters of `mysql:` URLs.
pub(super) const MYSQL_URL: Dialect = &[
    (&["host"], Is(Host)),
    (&["port"], Is(Port)),
    (&["database"], Is(Database)),
    (&["user"], Is(User)),
    (&["password"], Is(Password)),
    (&["ssl-mode"], Is(Encryption)),
    (&["ssl-ca"], Is(CaFile)),
    (&["application-name"], Is(Application)),
    (&["connect-timeout"], Is(ConnectTimeout)),
    (&["ssl-cert", "ssl-key"], Only(&[], NO_CLIENT_CERTIFICATE)),
    (&["socket"], Only(&[], "only TCP is possible")),
    (&["charset", "collation", "timezone", "statement-cache-capacity"], Idle),
];

/// `keyword=value` for Redis, as StackExchange.Redis reads it.
pub(super) const STACK_EXCHANGE: Dialect = &[
    (&["user"], Is(User)),
    (&["password"], Is(Password)),
    (&["ssl"], Is(Encryption)),
    (&["sslHost"], Is(CertificateName)),
    (&["defaultDatabase"], Is(Database)),
    (&["serviceName"], Is(Service)),
    (&["proxy"], Only(&["None"], "proxies that split keys among servers are not supported")),
    (&["tunnel"], Only(&[], "tunnels are not supported")),
    (
        &[
            "abortConnect",
            "allowAdmin",
            "asyncTimeout",
            "channelPrefix",
            "checkCertificateRevocation",
            "configChannel",
            "configCheckSeconds",
            "connectRetry",
            "connectTimeout",
            "heartbeatInterval",
            "heartbeatConsistencyChecks",
            "highIntegrity",
            "highPriorityThreads",
            "keepAlive",
            "name",
            "preserveAsyncOrder",
            "protocol",
            "resolveDns",
            "responseTimeout",
            "setlib",
            "sslProtocols",
            "syncTimeout",
            "tcpKeepAlive",
            "tieBreaker",
            "version",
            "writeBuffer",
        ],
        Idle,
    ),
];

/// Parameters of `redis:` and `rediss:` URLs.
pub(super) const REDIS_URL: Dialect = &[
    (&["host"], Is(Host)),
    (&["port"], Is(Port)),
    (&["database", "db"], Is(Database)),
    (&["user"], Is(User)),
    (&["password"], Is(Password)),
    (&["protocol"], Idle),
];

/// A keyword as it was spelled, and its value.
struct Said {
    keyword: String,
    value: String,
    /// It stands behind a password, and may be a part of it.
    behind_secret: bool,
}

/// What a connection string says, and what is wrong with it. Not to be shown: values are secrets.
pub(super) struct Fields {
    dialect: Dialect,
    said: BTreeMap<Field, Said>,
    pub(super) mistakes: Vec<String>,
}

impl Fields {
    /// An empty value is as good as none, as in ADO.NET.
    pub(super) fn read(dialect: Dialect, pairs: Vec<(String, String)>) -> Self {
        let mut fields = Self { dialect, said: BTreeMap::new(), mistakes: Vec::new() };
        // Until a keyword is known, the whole may be a secret that was pasted into the wrong setting.
        let (mut recognised, mut behind_secret) = (false, false);
        for (place, (keyword, value)) in pairs.into_iter().enumerate() {
            let spelling = plain(&keyword);
            let known = dialect.iter().find(|(names, _)| names.iter().any(|name| plain(name) == spelling));
            recognised |= known.is_some();
            match known {
                None => {
                    fields.unknown(place + 1, &keyword, behind_secret || !recognised);
                    behind_secret = true;
                }
                Some((_, Idle)) => {}
                Some((_, Only(granted, reason))) => {
                    if !value.is_empty() && !granted.iter().any(|word| plain(word) == plain(&value)) {
                        fields.mistakes.push(format!("{keyword}: {reason}"));
                    }
                }
                Some((_, Is(field))) => {
                    behind_secret |= *field == Password;
                    fields.add(*field, Said { keyword, value, behind_secret });
                }
            }
        }
        fields
    }

    /// ADO.NET lets the last of several win; whoever wrote two surely did not mean that.
    fn add(&mut self, field: Field, new: Said) {
        if new.value.is_empty() {
            return;
        }
        match self.said.get(&field) {
            Some(said) if said.value != new.value => self.contradictory(&said.keyword.clone(), &new.keyword),
            _ => drop(self.said.insert(field, new)),
        }
    }

    /// A password with a semicolon or an ampersand that was not quoted goes on as keywords, so what follows one is
    /// told by its place only.
    fn unknown(&mut self, place: usize, keyword: &str, may_be_secret: bool) {
        let spelling = plain(keyword);
        let close = |name: &&&str| {
            let letters = spelling.chars().count().min(name.len());
            strsim::damerau_levenshtein(&plain(name), &spelling) <= 1 + letters / 6
        };
        let names = self.dialect.iter().flat_map(|(names, _)| names.iter());
        let hint = names.filter(|name| name.len() > 3).find(close);
        let hint = hint.map_or_else(String::new, |known| format!("; did you mean {known}?"));
        self.mistakes.push(match is_harmless(keyword) && !may_be_secret {
            true => format!("{keyword} is not a known keyword{hint}"),
            false => format!("keyword {place}, not shown because it may be a part of a password, is not known{hint}"),
        });
    }

    pub(super) fn contradictory(&mut self, one: &str, other: &str) {
        self.mistakes.push(match one == other {
            true => format!("{one} is there twice, with different values"),
            false => format!("{one} and {other} are contradictory"),
        });
    }

    /// The value is not what it should be. Never for secrets.
    pub(super) fn wrong(&mut self, field: Field, expected: &str) {
        let Some(said) = self.said.get(&field) else { return };
        self.mistakes.push(match is_harmless(&said.value) && !said.behind_secret {
            true => format!("{} is {:?}, not {expected}", said.keyword, said.value),
            false => format!("{} is not {expected}", said.keyword),
        });
    }

    /// How the keyword was spelled, or what it would be called.
    pub(super) fn keyword(&self, field: Field) -> Cow<'static, str> {
        let known = self.dialect.iter().find(|(_, used)| matches!(used, Is(used) if *used == field));
        match (self.said.get(&field), known) {
            (Some(said), _) => said.keyword.clone().into(),
            (None, Some((names, _))) => names[0].into(),
            (None, None) => "".into(),
        }
    }

    pub(super) fn text(&self, field: Field) -> Option<&str> {
        self.said.get(&field).map(|said| said.value.as_str())
    }

    /// The text; a mistake if there is none.
    pub(super) fn required(&mut self, field: Field) -> String {
        let text = self.text(field).map(str::to_owned);
        text.unwrap_or_else(|| {
            self.mistakes.push(format!("{} is missing", self.keyword(field)));
            String::new()
        })
    }

    /// What one of the words means; a mistake if it is none of them.
    pub(super) fn word<T: Copy>(&mut self, field: Field, words: &[(&str, T)]) -> Option<T> {
        let text = plain(self.text(field)?);
        let found = words.iter().find(|(word, _)| plain(word) == text);
        if found.is_none() {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(field, &format!("one of {}", words.join(", ")));
        }
        found.map(|(_, meaning)| *meaning)
    }

    pub(super) fn number(&mut self, field: Field, min: u32, unit: &str) -> Option<u32> {
        let number = self.text(field)?.parse().ok().filter(|number| *number >= min);
        if number.is_none() {
            self.wrong(field, &format!("a whole number{unit} from {min}"));
        }
        number
    }
}

/// Keywords and words differ in case, blanks and dashes from client to client, and never in these alone.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace() && !matches!(c, '_' | '-')).flat_map(char::to_lowercase).collect()
}

/// Whether text can be shown: nothing that may have swallowed another pair.
fn is_harmless(text: &str) -> bool {
    text.len() <= 60 && text.chars().all(|c| c.is_ascii_alphanumeric() || " _-.,:\\()".contains(c))
}
