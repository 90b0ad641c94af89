//! Connection strings of databases → [`Source`].
//!
//! Knows the forms that users have: a SQLite file, a URL, or `Keyword=value;…`; opens nothing and names no driver.
//! Keywords are `keywords`' business, what they mean together `server`'s. Invariant: no message quotes a value that
//! may hold a secret.

use super::{
    Secret, ado,
    keywords::{self, Dialect, Fields},
    server::{self, Engine, Server},
    url,
};

/// Which database, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The catalogue that the program brings along, in SQLite.
    Embedded,
    /// A SQLite file, as an `sqlite:` URL.
    Sqlite(Secret),
    /// PostgreSQL.
    Postgres(Server),
    /// MySQL or MariaDB.
    MySql(Server),
    /// SQL Server or Azure SQL.
    SqlServer(Server),
}

impl Source {
    /// The server, if it is one.
    pub fn server(&self) -> Option<&Server> {
        match self {
            Self::Embedded | Self::Sqlite(_) => None,
            Self::Postgres(server) | Self::MySql(server) | Self::SqlServer(server) => Some(server),
        }
    }

    fn of(engine: Engine, server: Server) -> Self {
        match engine {
            Engine::Postgres => Self::Postgres(server),
            Engine::MySql => Self::MySql(server),
            Engine::SqlServer => Self::SqlServer(server),
        }
    }
}

const FORMS: &str = "it is none of sqlite:<file>, postgres://user:password@host/database, \
                     mysql://user:password@host/database, Server=...;Database=...;User ID=...;Password=... and \
                     embedded";
/// The word for the embedded catalogue, where it has to be asked for.
const EMBEDDED: &str = "embedded";

/// The meaning of a text that was found in the variable `name`, or all that is wrong with it.
///
/// The name matters, because App Service writes the type that a connection string was given there in front of it.
pub(super) fn parse(name: &str, text: &str) -> Result<Source, Vec<String>> {
    if text.is_empty() || text.eq_ignore_ascii_case(EMBEDDED) {
        return Ok(Source::Embedded);
    }
    // A colon before any sign: a scheme, ours or another's. No keyword has one.
    match text.split('=').next().and_then(|start| start.split_once(':')) {
        Some(("sqlite", file)) => sqlite(text, file),
        Some((scheme, _)) => match scheme.to_ascii_lowercase().as_str() {
            "postgres" | "postgresql" => server_url(Engine::Postgres, keywords::POSTGRES_URL, text),
            "mysql" | "mariadb" => server_url(Engine::MySql, keywords::MYSQL_URL, text),
            _ => Err(vec![FORMS.to_owned()]),
        },
        None if !text.contains('=') => Err(vec![FORMS.to_owned()]),
        None => {
            let (engine, dialect) = match name {
                _ if name.starts_with("POSTGRESQLCONNSTR_") => (Engine::Postgres, keywords::NPGSQL),
                _ if name.starts_with("MYSQLCONNSTR_") => (Engine::MySql, keywords::MYSQL_CONNECTOR),
                _ => (Engine::SqlServer, keywords::SQL_SERVER),
            };
            let pairs = ado::pairs(text).map_err(|mistake| vec![mistake])?;
            server::server(engine, Fields::read(dialect, pairs)).map(|server| Source::of(engine, server))
        }
    }
}

const SQLITE_PARAMETERS: &str = "it has a parameter other than mode=ro, mode=rw, mode=rwc, cache=private, cache=shared, \
                                 immutable=true, immutable=false and vfs=<name>";

fn sqlite(text: &str, file: &str) -> Result<Source, Vec<String>> {
    let (whole, file) = (text.trim_start_matches("sqlite:"), file.trim_start_matches('/'));
    if file.is_empty() {
        return Err(vec!["it names no file; write sqlite:<file>".to_owned()]);
    }
    // Each connection would have a database of its own.
    if file.starts_with(":memory:") || whole.contains("mode=memory") {
        return Err(vec!["it names a database in memory; write embedded for the embedded catalogue".to_owned()]);
    }
    let parameters = whole.split_once('?').map_or("", |(_, parameters)| parameters);
    let is_known = |parameter: &str| match parameter.split_once('=') {
        Some(("mode", value)) => ["ro", "rw", "rwc"].contains(&value),
        Some(("cache", value)) => ["private", "shared"].contains(&value),
        Some(("immutable", value)) => ["true", "1", "false", "0"].contains(&value),
        Some((name, _)) => name == "vfs",
        None => false,
    };
    match parameters.split('&').filter(|parameter| !parameter.is_empty()).all(is_known) {
        true => Ok(Source::Sqlite(text.into())),
        false => Err(vec![SQLITE_PARAMETERS.to_owned()]),
    }
}

const URL_FORM: &str = "it is not a URL of the form postgres://user:password@host:port/database (likewise mysql)";

fn server_url(engine: Engine, dialect: Dialect, text: &str) -> Result<Source, Vec<String>> {
    let pairs = url::pairs(text, URL_FORM).map_err(|mistake| vec![mistake.to_owned()])?;
    server::server(engine, Fields::read(dialect, pairs)).map(|server| Source::of(engine, server))
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use proptest::prelude::*;

    use super::{
        super::{Login, Tls},
        *,
    };

    const VERIFIED: Tls = Tls::Verified { ca_file: None, server_name: None, strict: false };

    fn read(name: &str, text: &str) -> Source {
        parse(name, text).unwrap_or_else(|mistakes| panic!("{text}: {mistakes:?}"))
    }

    fn mistakes(name: &str, text: &str) -> Vec<String> {
        parse(name, text).expect_err(text)
    }

    /// A server with what most cases have.
    fn server(host: &str, port: u16, tls: Tls) -> Server {
        let (host, database, application_name) = (host.into(), "db".into(), "product-cache".into());
        let login = Login::Password { user: "me".into(), password: "pw".into() };
        let (read_only, connect_timeout, max_connections) = (false, None, None);
        Server { host, port, database, login, tls, application_name, read_only, connect_timeout, max_connections }
    }

    fn at(host: &str, port: u16) -> Server {
        server(host, port, VERIFIED)
    }

    #[test]
    fn each_form_is_told_by_its_beginning() {
        assert_eq!([parse("Sql", ""), parse("Sql", "embedded")], [Ok(Source::Embedded), Ok(Source::Embedded)]);
        assert_eq!(read("Sql", "sqlite:shop.db"), Source::Sqlite("sqlite:shop.db".into()));
        for text in ["sqlite:///shop.db?mode=ro", "sqlite:a?cache=private&immutable=1&vfs=unix"] {
            assert_eq!(read("Sql", text), Source::Sqlite(text.into()));
        }
        for (text, mistake) in [
            ("sqlite:", "names no file"),
            ("sqlite://", "names no file"),
            ("sqlite::memory:", "in memory"),
            ("sqlite:a?mode=memory", "in memory"),
            ("sqlite:a?mode=ro&mod=hunter2", "has a parameter other than mode=ro"),
            ("sqlite:a?mode=readonly", "has a parameter other than mode=ro"),
            ("shop.db", "none of"),
            ("jdbc:sqlserver://h;user=hunter2;x=y", "none of"),
            ("mssql://me:hunter2@h/db?x=y", "none of"),
            ("hunter2", "none of"),
        ] {
            let [found] = &mistakes("Sql", text)[..] else { panic!("one mistake: {text}") };
            assert!(found.contains(mistake) && !found.contains("hunter2"), "{text}: {found}");
        }
    }

    #[test]
    fn sql_server_is_found_under_each_of_its_spellings() {
        for (text, expected) in [
            ("Server=h;Database=db;User ID=me;Password=pw", at("h", 1433)),
            ("data source = tcp:h,1400 ; INITIAL CATALOG = db;uid='me';PWD=\"pw\";", at("h", 1400)),
            ("Address=h, 1400;Database=db;User=me;pwd=pw", at("h", 1400)),
            ("Addr=h\\sales,1400;Database=db;User=me;pwd=pw", at("h", 1400)),
            ("Network Address=(local);Database=db;User=me;pwd=pw", at("localhost", 1433)),
            ("Server=.;Database=db;User=me;pwd=pw;Server=.", at("localhost", 1433)),
            ("Server=::1,1400;Database=db;User=me;pwd=pw", at("::1", 1400)),
            ("Server=h;Database=db;User=me;pwd=pw;Encrypt=mandatory;TrustServerCertificate=no", at("h", 1433)),
            (
                "Server=h;Database=db;User=me;pwd=pw;Integrated Security=false;Authentication=Sql Password",
                at("h", 1433),
            ),
            (
                "Server=h;Database=db;User=me;pwd=pw;MultipleActiveResultSets=True;Persist Security Info=False;\
                 MultiSubnetFailover=True;Column Encryption Setting=Disabled;Workstation ID=;Pooling=true",
                at("h", 1433),
            ),
        ] {
            assert_eq!(read("Sql", text), Source::SqlServer(expected), "{text}");
        }
    }

    #[test]
    fn the_string_of_azures_portal_is_read_whole() {
        let text = "Server=tcp:shop.database.windows.net,1433;Initial Catalog=db;Persist Security Info=False;\
                    User ID=me;Password='p;w';MultipleActiveResultSets=False;Encrypt=True;\
                    TrustServerCertificate=False;Connection Timeout=30;Max Pool Size=20;\
                    ApplicationIntent=ReadOnly;App=shop";
        let expected = Server {
            login: Login::Password { user: "me".into(), password: "p;w".into() },
            application_name: "shop".into(),
            read_only: true,
            connect_timeout: Some(Duration::from_secs(30)),
            max_connections: Some(20),
            ..at("shop.database.windows.net", 1433)
        };
        assert_eq!(read("SQLAZURECONNSTR_Sql", text), Source::SqlServer(expected));
    }

    #[test]
    fn a_managed_identity_needs_no_user_and_takes_a_client_id_as_one() {
        let id = "0f8fad5b-d9cb-469f-a165-70867728950e";
        for (text, client_id) in [
            ("Authentication=Active Directory Managed Identity", None),
            ("Authentication=ActiveDirectoryDefault;User ID=", None),
            ("Authentication=active directory msi;UID=0f8fad5b-d9cb-469f-a165-70867728950e", Some(id.to_owned())),
        ] {
            let source = read("Sql", &format!("Server=h;Database=db;{text}"));
            let login = Login::ManagedIdentity { client_id };
            assert_eq!(source.server().map(|server| &server.login), Some(&login), "{text}");
        }
    }

    #[test]
    fn protection_is_what_was_asked_for_and_full_where_nothing_was() {
        let with = |ca_file: Option<&str>, server_name: Option<&str>, strict| Tls::Verified {
            ca_file: ca_file.map(PathBuf::from),
            server_name: server_name.map(str::to_owned),
            strict,
        };
        let (sql, npgsql, mysql) = ("Sql", "POSTGRESQLCONNSTR_Sql", "MYSQLCONNSTR_Sql");
        for (name, text, expected) in [
            (sql, "Server=h;Database=db;UID=me", VERIFIED),
            (sql, "Server=localhost;Database=db;UID=me", VERIFIED),
            (sql, "Server=h;Database=db;UID=me;Encrypt=Optional", Tls::Off),
            (sql, "Server=h;Database=db;UID=me;Encrypt=No;Trust Server Certificate=yes", Tls::Off),
            (sql, "Server=h;Database=db;UID=me;TrustServerCertificate=True", Tls::Unverified),
            (sql, "Server=h;Database=db;UID=me;Encrypt=Strict;TrustServerCertificate=True", with(None, None, true)),
            (sql, "Server=h;Database=db;UID=me;HostNameInCertificate=n", with(None, Some("n"), false)),
            (sql, "Server=h;Database=db;UID=me;ServerCertificate=/a.pem", with(Some("/a.pem"), None, false)),
            (npgsql, "Host=h;Database=db;Username=me", VERIFIED),
            (npgsql, "Host=h;Database=db;Username=me;SSL Mode=Require", Tls::Unverified),
            (npgsql, "Host=h;Database=db;Username=me;SslMode=VerifyFull", VERIFIED),
            (npgsql, "Host=h;Database=db;Username=me;Trust Server Certificate=true", Tls::Unverified),
            (npgsql, "Host=h;Database=db;Username=me;Root Certificate=/a", with(Some("/a"), None, false)),
            (mysql, "Server=h;Database=db;UID=me;SslMode=None", Tls::Off),
            (mysql, "Server=h;Database=db;UID=me;SSL Mode=Required", Tls::Unverified),
            (mysql, "Server=h;Database=db;UID=me;SslCa=/a;SslMode=VerifyCA", with(Some("/a"), None, false)),
            (sql, "postgres://me@h/db", VERIFIED),
            (sql, "postgres://me@localhost/db", Tls::Off),
            (sql, "postgres://me@[::1]/db", Tls::Off),
            (sql, "postgres://me@127.1.2.3/db?sslmode=verify-full", VERIFIED),
            (sql, "postgres://me@h/db?sslmode=disable", Tls::Off),
            (sql, "postgres://me@h/db?sslmode=prefer", Tls::Unverified),
            (sql, "postgres://me@h/db?sslmode=require&sslrootcert=%2Fa", with(Some("/a"), None, false)),
            (sql, "mysql://me@h/db?ssl-mode=VERIFY_IDENTITY", VERIFIED),
            (sql, "mysql://me@h/db?sslMode=DISABLED", Tls::Off),
            (sql, "mysql://me@h/db?ssl-mode=required", Tls::Unverified),
        ] {
            assert_eq!(read(name, text).server().map(|server| &server.tls), Some(&expected), "{text}");
        }
    }

    #[test]
    fn urls_are_decoded_and_their_parameters_read() {
        let odd = Login::Password { user: "m:e".into(), password: "p@/?#%w ü".into() };
        for (text, expected) in [
            ("postgres://me:pw@h/db", Source::Postgres(at("h", 5432))),
            ("postgresql://me:pw@h:6432/db?keepalives=1", Source::Postgres(at("h", 6432))),
            ("PostgreSQL://me:pw@[2001:db8::1]:6432/db", Source::Postgres(at("2001:db8::1", 6432))),
            ("postgres://h/db?user=me&password=pw", Source::Postgres(at("h", 5432))),
            ("mysql://me:pw@h/db", Source::MySql(at("h", 3306))),
            ("mariadb://me:pw@h:3307/db?charset=utf8mb4", Source::MySql(at("h", 3307))),
            (
                "postgres://m%3Ae:p%40%2F%3F%23%25w%20%C3%BC@h/d%2Fb",
                Source::Postgres(Server { login: odd, database: "d/b".into(), ..at("h", 5432) }),
            ),
            (
                "postgres://me:pw@h/db?application_name=a%20b&connect_timeout=3",
                Source::Postgres(Server {
                    application_name: "a b".into(),
                    connect_timeout: Some(Duration::from_secs(3)),
                    ..at("h", 5432)
                }),
            ),
            ("mysql://me:pw@h/db?connect_timeout=0", Source::MySql(Server { connect_timeout: None, ..at("h", 3306) })),
        ] {
            assert_eq!(read("Sql", text), expected, "{text}");
        }
    }

    #[test]
    fn the_type_given_in_app_service_decides_the_dialect() {
        for (name, text, expected) in [
            ("POSTGRESQLCONNSTR_Sql", "Host=h;Database=db;Username=me;Password=pw", Source::Postgres(at("h", 5432))),
            ("POSTGRESQLCONNSTR_Sql", "Server=h;Port=6432;DB=db;User Id=me;PSW=pw", Source::Postgres(at("h", 6432))),
            ("POSTGRESQLCONNSTR_Sql", "postgres://me:pw@h/db", Source::Postgres(at("h", 5432))),
            ("MYSQLCONNSTR_Sql", "Server=h;Port=3307;Database=db;Uid=me;Pwd=pw", Source::MySql(at("h", 3307))),
            (
                "MYSQLCONNSTR_Sql",
                "Database=db;Data Source=127.0.0.1:50249;User Id=me;Password=pw",
                Source::MySql(server("127.0.0.1", 50249, Tls::Off)),
            ),
            ("SQLCONNSTR_Sql", "Server=h;Database=db;UID=me;PWD=pw", Source::SqlServer(at("h", 1433))),
        ] {
            assert_eq!(read(name, text), expected, "{name} {text}");
        }
    }

    #[test]
    fn each_mistake_is_told_in_words_and_without_secrets() {
        let (sql, npgsql, mysql) = ("Sql", "POSTGRESQLCONNSTR_Sql", "MYSQLCONNSTR_Sql");
        for (name, text, expected) in [
            (sql, "Database=db;UID=me", &["Server is missing"][..]),
            (sql, "Server=;PWD=hunter2", &["Server is missing", "Database is missing", "User ID is missing"]),
            (
                sql,
                "Server=h;Database=db;UID=me;Encrypt=maybe",
                &["Encrypt is \"maybe\", not one of True, Yes, Mandatory"],
            ),
            (sql, "Server=h;Database=db;UID=me;Encrypt=PWD=hunter2", &["Encrypt is not one of True"]),
            (
                sql,
                "Server=h;Database=db;UID=me;Encrpyt=True",
                &["Encrpyt is not a known keyword; did you mean Encrypt?"],
            ),
            (sql, "Server=h;Database=db;UID=me;Colour=hunter2", &["Colour is not a known keyword"]),
            (sql, "Server=h;Database=db;UID=me;PWD=a;hunter2=b", &["keyword 5, not shown because"]),
            (
                sql,
                "hunter2=",
                &["keyword 1, not shown", "Server is missing", "Database is missing", "User ID is missing"],
            ),
            (
                sql,
                "Server=h;Database=db;UID=me;Pasword=a;hunter2=b",
                &["did you mean Password?", "keyword 5, not shown"],
            ),
            (sql, "Server=h;Data Source=i;Database=db;UID=me", &["Server and Data Source are contradictory"]),
            (sql, "Server=h;Database=db;Database=other;UID=me", &["Database is there twice, with different values"]),
            (sql, "Server=h;Database=db;UID=me;PWD=hunter2;Password=hunter3", &["PWD and Password are contradictory"]),
            (sql, "Server=h\\sales;Database=db;UID=me", &["Server names an instance: name its port instead"]),
            (sql, "Server=np:h;Database=db;UID=me", &["Server is not reached over TCP"]),
            (sql, "Server=LPC:h;Database=db;UID=me", &["Server is not reached over TCP"]),
            (sql, "Server=(LocalDB)\\v11;Database=db;UID=me", &["Server is LocalDB"]),
            (sql, "Server=h,0;Database=db;UID=me", &["Server: the port is not a number from 1 to 65535"]),
            (sql, "Server=h PWD=hunter2;Database=db;UID=me", &["Server is not the name or address of one server"]),
            (
                sql,
                "Server=h;Database=db;Trusted_Connection=SSPI",
                &["Trusted_Connection: a Windows login", "User ID is missing"],
            ),
            (sql, "Server=h;Database=db;UID=me;Failover Partner=i", &["Failover Partner: a mirror is not switched to"]),
            (
                sql,
                "Server=h;Database=db;UID=me;AttachDbFilename=x;User Instance=true",
                &["AttachDbFilename:", "User Instance:"],
            ),
            (
                sql,
                "Server=h;Database=db;UID=me;Connect Timeout=30s;Max Pool Size=0",
                &["Connect Timeout is \"30s\"", "Max Pool Size is \"0\""],
            ),
            (
                sql,
                "Server=h;Database=db;UID=me;ApplicationIntent=Read",
                &["ApplicationIntent is \"Read\", not one of ReadWrite, ReadOnly"],
            ),
            (
                sql,
                "Server=h;Database=db;UID=me;Authentication=Active Directory Password",
                &["Authentication is \"Active Directory Password\", not one of SqlPassword"],
            ),
            (
                sql,
                "Server=h;Database=db;Authentication=Active Directory Default;PWD=hunter2",
                &["Authentication and PWD are contradictory"],
            ),
            (
                sql,
                "Server=h;Database=db;Authentication=Active Directory Default;UID=sa",
                &["UID is \"sa\", not the client id"],
            ),
            (sql, "Server=h;Database=db;UID=me;PWD='hunter2", &["the value of part 4 has a quote"]),
            (
                sql,
                "Server=h;Database=db;UID=me;TrustServerCertificate=True;ServerCertificate=/a",
                &["TrustServerCertificate and ServerCertificate are contradictory"],
            ),
            (npgsql, "Host=h:1;Port=2;Database=db;Username=me", &["Host and Port are contradictory"]),
            (npgsql, "Host=h,i;Database=db;Username=me", &["Host is not the name or address of one server"]),
            (npgsql, "Host=h;Database=db;Username=me;SSL Password=hunter2", &["SSL Password: client certificates"]),
            (npgsql, "Host=h;Database=db;Username=me;Password=;SSL Mode=hunter2", &["SSL Mode is not one of"]),
            (
                npgsql,
                "Host=h;Database=db;Username=me;SSL Mode=VerifyCA;Trust Server Certificate=true",
                &["SSL Mode and Trust Server Certificate are contradictory"],
            ),
            (mysql, "Server=h;Database=db", &["User ID is missing"]),
            (mysql, "Server=h;Port=x;Database=db;UID=me", &["Server: the port is not a number"]),
            (sql, "postgres://", &["host is missing", "database is missing", "user is missing"]),
            (sql, "postgres:db", &["not a URL of the form"]),
            (sql, "postgres://me:hunter2@h", &["database is missing"]),
            (sql, "postgres:///db", &["host is missing", "user is missing"]),
            (sql, "postgres://me:hunter2@h:0/db", &["host: the port is not"]),
            (sql, "postgres://me:hunter2@h:99999/db", &["not a URL of the form"]),
            (sql, "postgres://me:1?hunter2=x@h/db", &["reserved characters"]),
            (sql, "postgres://me:1/hunter2@h/db", &["reserved characters"]),
            (sql, "postgres://me:hunter2#@h/db", &["reserved characters"]),
            (sql, "postgres://me:?hunter2", &["keyword 6, not shown", "database is missing", "user is missing"]),
            (sql, "postgres://me:12?hunter2=", &["keyword 6, not shown", "database is missing", "user is missing"]),
            (sql, "postgres://me:%ff@h/db", &["not UTF-8"]),
            (sql, "postgres://me@%2Frun/db", &["host is not the name"]),
            (sql, "postgres://me@h/db?sslmod=require", &["sslmod is not a known keyword; did you mean sslmode?"]),
            (sql, "postgres://me@h/db?password=a&hunter2=b", &["keyword 6, not shown because"]),
            (sql, "postgres://me@h/db?sslmode=full", &["sslmode is \"full\", not one of disable, allow"]),
            (sql, "mysql://me@h/db?socket=/run/x", &["socket: only TCP is possible"]),
        ] {
            let found = mistakes(name, text);
            assert_eq!(found.len(), expected.len(), "{text}: {found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.contains(expected) && !found.contains("hunter"), "{text}: {found}");
            }
        }
    }

    #[test]
    fn a_server_shown_for_debugging_hides_its_password() {
        let source = read("Sql", "Server=h;Database=db;UID=me;PWD=hunter2");
        assert!(!format!("{source:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn whatever_surrounds_a_password_no_mistake_shows_it(
            name in prop::sample::select(vec!["Sql", "POSTGRESQLCONNSTR_Sql", "MYSQLCONNSTR_Sql"]),
            before in "([a-zA-Z ]{0,9}|Server|Encrypt|Port|SSL Mode|[;='\"/:@?&#%. ]{0,3}|\\PC{0,3}){0,8}",
            password in "(Password ?= ?['\"]?|pwd=|postgres://me:|mysql://x/y\\?password=|mariadb://me@h/db\\?sslmode=x&password=)",
            after in "([a-zA-Z ]{0,9}|;Server=|;Encrypt=|[;='\"/:@?&#%. ]{0,3}|\\PC{0,3}){0,8}",
        ) {
            for text in [format!("{before}{password}hunter2{after}"), format!("{password}{before}hunter2{after}")] {
                for mistake in parse(name, &text).err().unwrap_or_default() {
                    prop_assert!(!mistake.contains("hunter2"), "{}: {}", text, mistake);
                }
            }
        }
    }
}
