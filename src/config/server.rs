//! What a connection string says → [`Server`]: the rules that span keywords, whatever the dialect.
//!
//! Decides what is missing, what contradicts itself, and how a connection is protected when nobody says so. Knows
//! neither quoting nor synonyms. Invariant: unless the string itself says otherwise, only a server on this machine is
//! talked to without checking its certificate.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use super::{
    Secret,
    keywords::{Field, Fields},
};

/// A database server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Name of the database.
    pub database: String,
    /// As whom.
    pub login: Login,
    /// How the connection is protected.
    pub tls: Tls,
    /// What the server's monitoring shows the connections as.
    pub application_name: String,
    /// A readable secondary will do (`ApplicationIntent=ReadOnly`).
    pub read_only: bool,
    /// The string's own connect timeout.
    pub connect_timeout: Option<Duration>,
    /// The string's own bound of the pool.
    pub max_connections: Option<u32>,
}

/// As whom to log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// With a password.
    Password {
        /// Name of the login.
        user: String,
        /// Its password; may be empty.
        password: Secret,
    },
    /// With a token of the app's managed identity.
    ManagedIdentity {
        /// Client id of a user-assigned identity; `None`: the system-assigned one.
        client_id: Option<String>,
    },
}

/// How a connection is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Not at all; SQL Server's login alone is, with whoever answers, as ADO.NET does it.
    Off,
    /// Encrypted, but with whoever answers.
    Unverified,
    /// Encrypted, with a server whose certificate names it and comes from a trusted authority.
    Verified {
        /// File with authorities (PEM) that are trusted besides the usual ones, which docs/databases.md names.
        ca_file: Option<PathBuf>,
        /// The name expected in the certificate, if not the host's.
        server_name: Option<String>,
        /// TLS before the first byte of TDS (`Encrypt=Strict`, TDS 8); SQL Server only.
        strict: bool,
    },
}

impl Server {
    /// Whether it runs on this machine.
    pub fn is_local(&self) -> bool {
        is_local(&self.host)
    }
}

/// The engine that a connection string is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    Postgres,
    MySql,
    SqlServer,
}

impl Engine {
    fn port(self) -> u16 {
        match self {
            Self::Postgres => 5432,
            Self::MySql => 3306,
            Self::SqlServer => 1433,
        }
    }
}

/// Shown to the server's administrators when the string names no other.
const APPLICATION_NAME: &str = env!("CARGO_PKG_NAME");

/// What the keywords mean together, or all mistakes.
pub(super) fn server(engine: Engine, mut fields: Fields) -> Result<Server, Vec<String>> {
    let (host, port) = place(engine, &mut fields);
    let tls = tls(engine, &host, &mut fields);
    let server = Server {
        host,
        port,
        database: fields.required(Field::Database),
        login: login(&mut fields),
        tls,
        application_name: fields.text(Field::Application).unwrap_or(APPLICATION_NAME).to_owned(),
        read_only: fields.word(Field::Intent, &[("ReadWrite", false), ("ReadOnly", true)]).unwrap_or(false),
        // Clients take 0 for no limit. Here every wait has one, so it is as good as not set.
        connect_timeout: fields
            .number(Field::ConnectTimeout, 0, " of seconds")
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into())),
        max_connections: fields.number(Field::Connections, 1, ""),
    };
    match fields.mistakes.is_empty() {
        true => Ok(server),
        false => Err(fields.mistakes),
    }
}

fn place(engine: Engine, fields: &mut Fields) -> (String, u16) {
    let text = fields.required(Field::Host);
    let split = match engine {
        Engine::SqlServer => sql_server_place(&text),
        Engine::Postgres | Engine::MySql => Ok(host_and_port(&text)),
    };
    let keyword = fields.keyword(Field::Host);
    let (host, beside) = split.unwrap_or_else(|problem| {
        fields.mistakes.push(format!("{keyword} {problem}"));
        ("localhost", None)
    });
    let host = host.trim().trim_start_matches('[').trim_end_matches(']');
    if !host.is_empty() && !is_host(host) {
        fields.mistakes.push(format!("{keyword} is not the name or address of one server"));
    }
    if beside.is_some() && fields.text(Field::Port).is_some_and(|port| Some(port) != beside) {
        fields.contradictory(&keyword, &fields.keyword(Field::Port));
    }
    let port = match beside.or(fields.text(Field::Port)).map(|port| port.trim().parse::<u16>()) {
        None => engine.port(),
        Some(Ok(port)) if port > 0 => port,
        Some(_) => {
            fields.mistakes.push(format!("{keyword}: the port is not a number from 1 to 65535"));
            0
        }
    };
    (host.to_owned(), port)
}

/// `[tcp:]host[\instance][,port]`.
fn sql_server_place(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    let lower = text.to_ascii_lowercase();
    if ["np:", "lpc:", "admin:", r"\\"].iter().any(|start| lower.starts_with(start)) {
        return Err("is not reached over TCP, which alone is possible: write host,port");
    }
    if lower.starts_with("(localdb)") {
        return Err("is LocalDB, which only Windows has");
    }
    let text = if lower.starts_with("tcp:") { &text["tcp:".len()..] } else { text };
    let (host, port) = match text.rsplit_once(',') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let host = match host.split_once('\\') {
        // Whoever names the port has found the instance, and clients then ignore its name.
        Some((host, _)) if port.is_some() => host,
        Some(_) => return Err("names an instance: name its port instead, as host,port"),
        None => host,
    };
    Ok((if matches!(host.trim(), "." | "(local)") { "localhost" } else { host }, port))
}

/// `host[:port]`, as Npgsql and Azure's in-app MySQL write it; an IPv6 address with a port is in brackets.
pub(super) fn host_and_port(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    }
}

fn login(fields: &mut Fields) -> Login {
    const SUPPORTED: &str = "one of SqlPassword, Active Directory Managed Identity, Active Directory Default";
    let text: String = fields.text(Field::Authentication).unwrap_or("").split_whitespace().collect();
    match text.to_ascii_lowercase().as_str() {
        "" | "sqlpassword" | "notspecified" => {}
        "activedirectorymanagedidentity" | "activedirectorymsi" | "activedirectorydefault" => {
            return managed_identity(fields);
        }
        _ => fields.wrong(Field::Authentication, SUPPORTED),
    }
    let password = Secret(fields.text(Field::Password).unwrap_or("").to_owned());
    Login::Password { user: fields.required(Field::User), password }
}

fn managed_identity(fields: &mut Fields) -> Login {
    if fields.text(Field::Password).is_some() {
        fields.contradictory(&fields.keyword(Field::Authentication), &fields.keyword(Field::Password));
    }
    let client_id = fields.text(Field::User).map(str::to_owned);
    if client_id.as_deref().is_some_and(|id| uuid::Uuid::try_parse(id).is_err()) {
        fields
            .wrong(Field::User, "the client id of a user-assigned identity (leave it out for the system-assigned one)");
    }
    Login::ManagedIdentity { client_id }
}

/// What the string asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    Off,
    Encrypted,
    Verified,
    Strict,
}

const SQL_SERVER_WORDS: &[(&str, Wish)] = &[
    ("True", Wish::Verified),
    ("Yes", Wish::Verified),
    ("Mandatory", Wish::Verified),
    ("False", Wish::Off),
    ("No", Wish::Off),
    ("Optional", Wish::Off),
    ("Strict", Wish::Strict),
];

const POSTGRES_WORDS: &[(&str, Wish)] = &[
    ("disable", Wish::Off),
    ("allow", Wish::Encrypted),
    ("prefer", Wish::Encrypted),
    ("require", Wish::Encrypted),
    ("verify-ca", Wish::Verified),
    ("verify-full", Wish::Verified),
];

const MYSQL_WORDS: &[(&str, Wish)] = &[
    ("DISABLED", Wish::Off),
    ("None", Wish::Off),
    ("PREFERRED", Wish::Encrypted),
    ("REQUIRED", Wish::Encrypted),
    ("VERIFY_CA", Wish::Verified),
    ("VERIFY_IDENTITY", Wish::Verified),
    ("VerifyFull", Wish::Verified),
];

fn tls(engine: Engine, host: &str, fields: &mut Fields) -> Tls {
    let words = match engine {
        Engine::SqlServer => SQL_SERVER_WORDS,
        Engine::Postgres => POSTGRES_WORDS,
        Engine::MySql => MYSQL_WORDS,
    };
    let said = fields.word(Field::Encryption, words);
    let trusts = fields.word(Field::Trust, words_of_truth()).unwrap_or(false);
    let ca_file = fields.text(Field::CaFile).map(PathBuf::from);
    // SQL Server encrypts unless told not to, and to trust any certificate is another keyword's matter. The others
    // have one keyword for both; servers on a developer's machine seldom have TLS at all.
    let wish = match (said, trusts) {
        (Some(Wish::Verified) | None, true) if engine == Engine::SqlServer => Wish::Encrypted,
        (Some(Wish::Verified), true) => {
            fields.contradictory(&fields.keyword(Field::Encryption), &fields.keyword(Field::Trust));
            Wish::Verified
        }
        (None, true) => Wish::Encrypted,
        (None, false) if engine != Engine::SqlServer && is_local(host) && ca_file.is_none() => Wish::Off,
        (None, false) => Wish::Verified,
        (Some(wish), _) => wish,
    };
    match wish {
        Wish::Off => Tls::Off,
        Wish::Encrypted if ca_file.is_some() && trusts => {
            fields.contradictory(&fields.keyword(Field::Trust), &fields.keyword(Field::CaFile));
            Tls::Unverified
        }
        // Whoever names an authority wants it to be asked; libpq does so too.
        Wish::Encrypted if ca_file.is_none() => Tls::Unverified,
        Wish::Encrypted | Wish::Verified | Wish::Strict => Tls::Verified {
            ca_file,
            server_name: fields.text(Field::CertificateName).map(str::to_owned),
            strict: wish == Wish::Strict,
        },
    }
}

/// What clients write for yes and no.
pub(super) fn words_of_truth() -> &'static [(&'static str, bool)] {
    &[("True", true), ("Yes", true), ("False", false), ("No", false)]
}

/// Whether text names or addresses one host.
pub(super) fn is_host(text: &str) -> bool {
    let is_name = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
    is_name || text.parse::<IpAddr>().is_ok()
}

/// Whether a host is this machine, so that nobody is between.
pub(crate) fn is_local(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}
