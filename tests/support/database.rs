//! Private database servers, each with the catalogue of its `sql/` script and a login that may only read.
//!
//! A server starts from a copy of a folder that is made once for each version of the script. SQL Server is not started:
//! where `TEST_SQLSERVER` names one (`Server=...;User ID=...;Password=...`, of somebody who may create databases), each
//! test has a database of its own on it.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use product_cache::config::{Config, Login, Server, Source};
use sha2::{Digest, Sha256};
use sqlx::{
    AssertSqlSafe, Connection, Executor, MySqlConnection, PgConnection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteSynchronous},
};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_util::compat::TokioAsyncWriteCompatExt;

use super::{SERVER_START, certificates::CERTIFICATES, eventually_within, free_port, signal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
    MariaDb,
    SqlServer,
}

/// Whether there is a server for tests of this engine. Says so, past the test harness, if there is none.
pub fn is_there(engine: Engine, test: &str) -> bool {
    let there = engine != Engine::SqlServer || std::env::var("TEST_SQLSERVER").is_ok();
    if !there {
        let _ = writeln!(std::io::stderr(), "skipped: {test} on SQL Server, as TEST_SQLSERVER names none");
    }
    there
}

pub struct DatabaseServer {
    pub engine: Engine,
    process: Option<Child>,
    folder: TempDir,
    pub port: u16,
    /// Where it is, if it is not ours.
    given: Option<Server>,
}

impl Drop for DatabaseServer {
    fn drop(&mut self) {
        if let Some(server) = self.given.take() {
            // What cannot be dropped now is dropped by whoever runs the server.
            thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                let drop_it = format!(
                    "USE master; ALTER DATABASE [{0}] SET SINGLE_USER WITH ROLLBACK IMMEDIATE; DROP DATABASE [{0}]",
                    server.database
                );
                runtime.block_on(async {
                    sql_server_session(&server).await.ok()?.simple_query(drop_it).await.ok().map(drop)
                });
            });
        }
        self.kill();
    }
}

impl DatabaseServer {
    pub async fn start(engine: Engine) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut server = Self { engine, process: None, folder, port: free_port(), given: None };
        if engine == Engine::SqlServer {
            server.given = Some(sql_server_database().await);
            server.port = server.given.as_ref().expect("set").port;
            return server;
        }
        if engine == Engine::Sqlite {
            super::catalogue(&server.data());
            return server;
        }
        run(Command::new("cp").arg("-r").arg(template(engine).await).arg(server.data()));
        let (certificate, key) = (server.data().join("server.crt"), server.data().join("server.key"));
        fs::write(&certificate, CERTIFICATES.certificate.pem()).expect("written");
        fs::write(&key, CERTIFICATES.key.serialize_pem()).expect("written");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("PostgreSQL insists on it");
        if is_root() {
            run(Command::new("chown").arg("-R").arg(owner(engine)).arg(server.folder.path()));
        }
        server.restart().await;
        server
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The connection string of the login that the handler uses.
    pub fn url(&self) -> String {
        self.url_by(self.port)
    }

    /// The same by TLS, if the server's certificate is from this authority and for this name.
    pub fn url_with_tls(&self, authority: &Path, host: &str) -> String {
        let (port, authority) = (self.port, authority.display());
        match self.engine {
            Engine::Sqlite | Engine::SqlServer => unreachable!("is not started here"),
            Engine::Postgres => {
                format!("postgres://handler@{host}:{port}/shop?sslmode=verify-full&sslrootcert={authority}")
            }
            Engine::MariaDb => {
                format!("mysql://handler@{host}:{port}/shop?ssl-mode=VERIFY_IDENTITY&ssl-ca={authority}")
            }
        }
    }

    /// The same, for a server that is reached at another port.
    pub fn url_by(&self, port: u16) -> String {
        match self.engine {
            Engine::Sqlite => format!("sqlite:{}", self.data().display()),
            Engine::Postgres => format!("postgres://handler@127.0.0.1:{port}/shop?sslmode=disable"),
            Engine::MariaDb => format!("mysql://handler@127.0.0.1:{port}/shop?ssl-mode=DISABLED"),
            Engine::SqlServer => {
                let server = self.given.as_ref().expect("given");
                let Login::Password { user, password } = &server.login else { panic!("TEST_SQLSERVER has a password") };
                let host = if port == self.port { &server.host } else { "127.0.0.1" };
                let password = password.reveal().replace('"', "\"\"");
                format!(
                    "Server=tcp:{host},{port};Database={};User ID={user};Password=\"{password}\";\
                     TrustServerCertificate=True",
                    server.database
                )
            }
        }
    }

    /// Starts the server again, with the data it had.
    pub async fn restart(&mut self) {
        self.kill();
        if matches!(self.engine, Engine::Sqlite | Engine::SqlServer) {
            return;
        }
        self.process = Some(start_server(self.engine, &self.data(), self.port));
        eventually_within(SERVER_START, "the database server answers", async || Session::open(self).await.ok()).await;
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // A child that it starts meanwhile would outlive it, and hold the data folder.
            signal(process.id(), "STOP");
            for pid in children(process.id()) {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Sends a signal to the server and all its processes.
    pub fn signal(&self, name: &str) {
        let pid = self.process.as_ref().expect("it runs").id();
        signal(pid, name);
        for pid in children(pid) {
            let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }

    /// A connection as the owner of everything, in another database of the server.
    pub async fn session_in(&self, database: &str) -> Session {
        let url = format!("postgres://owner@127.0.0.1:{}/{database}?sslmode=disable", self.port);
        Session::Postgres(PgConnection::connect(&url).await.expect("the owner may come in"))
    }

    /// A connection as the owner of everything.
    pub async fn session(&self) -> Session {
        Session::open(self).await.expect("the owner may come in")
    }

    /// Runs SQL as the owner.
    pub async fn sql(&self, sql: &str) {
        self.session().await.sql(sql).await;
    }

    /// Ends every connection of the handler's login.
    pub async fn kill_sessions(&self) {
        self.sql(match self.engine {
            Engine::Sqlite => unreachable!("has none"),
            Engine::Postgres => "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'handler'",
            Engine::MariaDb => "KILL USER handler",
            Engine::SqlServer => unreachable!("is not ours to disturb"),
        })
        .await;
    }

    /// Connections of the handler's login.
    pub async fn connections(&self) -> i64 {
        let count = match self.engine {
            Engine::Sqlite => return 0,
            Engine::Postgres => "SELECT count(*) FROM pg_stat_activity WHERE usename = 'handler'",
            Engine::MariaDb => "SELECT count(*) FROM information_schema.processlist WHERE user = 'handler'",
            Engine::SqlServer => {
                "SELECT count_big(*) FROM sys.dm_exec_sessions \
                 WHERE program_name = 'product-cache' AND database_id = DB_ID()"
            }
        };
        self.session().await.number(count).await
    }
}

/// A connection as the owner.
pub enum Session {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
    MySql(MySqlConnection),
    SqlServer(Box<SqlServerSession>),
}

type SqlServerSession = tiberius::Client<tokio_util::compat::Compat<TcpStream>>;

impl Session {
    async fn open(server: &DatabaseServer) -> sqlx::Result<Self> {
        let port = server.port;
        Ok(match server.engine {
            Engine::Sqlite => {
                let options: SqliteConnectOptions = server.url().parse()?;
                // As [`super::sqlite`] does.
                let options = options.busy_timeout(Duration::from_secs(60)).synchronous(SqliteSynchronous::Off);
                Self::Sqlite(SqliteConnection::connect_with(&options).await?)
            }
            Engine::Postgres => {
                let url = format!("postgres://owner@127.0.0.1:{port}/shop?sslmode=disable");
                Self::Postgres(PgConnection::connect(&url).await?)
            }
            Engine::MariaDb => {
                let url = format!("mysql://root@127.0.0.1:{port}/shop?ssl-mode=DISABLED");
                Self::MySql(MySqlConnection::connect(&url).await?)
            }
            Engine::SqlServer => {
                let session = sql_server_session(server.given.as_ref().expect("given")).await;
                Self::SqlServer(Box::new(session.expect("a session")))
            }
        })
    }

    pub async fn sql(&mut self, sql: &str) {
        if let Self::SqlServer(session) = self {
            let sql = if sql == "BEGIN" { "BEGIN TRANSACTION" } else { sql };
            session.simple_query(sql).await.expect("valid SQL").into_results().await.expect("valid SQL");
            return;
        }
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        let done = match self {
            Self::Sqlite(connection) => connection.execute(sql).await.map(drop),
            Self::Postgres(connection) => connection.execute(sql).await.map(drop),
            Self::MySql(connection) => connection.execute(sql).await.map(drop),
            Self::SqlServer(_) => unreachable!("done above"),
        };
        done.expect("valid SQL");
    }

    pub async fn number(&mut self, sql: &str) -> i64 {
        if let Self::SqlServer(session) = self {
            let row = session.simple_query(sql).await.expect("valid SQL").into_row().await.expect("valid SQL");
            return row.and_then(|row| row.get(0)).expect("a number");
        }
        let sql = AssertSqlSafe(sql.to_owned());
        let number = match self {
            Self::Sqlite(connection) => sqlx::query_scalar(sql).fetch_one(connection).await,
            Self::Postgres(connection) => sqlx::query_scalar(sql).fetch_one(connection).await,
            Self::MySql(connection) => sqlx::query_scalar(sql).fetch_one(connection).await,
            Self::SqlServer(_) => unreachable!("done above"),
        };
        number.expect("a number")
    }
}

/// A new database on the server that `TEST_SQLSERVER` names.
async fn sql_server_database() -> Server {
    let text = std::env::var("TEST_SQLSERVER").expect("asked for before");
    let text = if text.to_ascii_lowercase().contains("database=") { text } else { format!("{text};Database=master") };
    let variables = [("Sql", text.as_str()), ("DATABASE_ALLOW_UNVERIFIED", "on")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let source = Config::from_variables(&variables).expect("TEST_SQLSERVER is a connection string").database.source;
    let Source::SqlServer(mut server) = source else { panic!("TEST_SQLSERVER is of another engine") };
    let name = format!("test_{:08x}", rand::random::<u32>());
    let run = async |server: &Server, sql: String| {
        let mut session = sql_server_session(server).await.expect("a session on TEST_SQLSERVER");
        session.simple_query(sql).await.expect("valid SQL").into_results().await.expect("valid SQL");
    };
    run(&server, format!("CREATE DATABASE [{name}]")).await;
    server.database = name;
    for script in ["sql/sqlserver.sql", "sql/sqlserver-access.sql"] {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
        run(&server, fs::read_to_string(script).expect("a script")).await;
    }
    // The other engines' name of the table.
    run(&server, "CREATE SYNONYM dbo.product FOR SalesLT.Product".to_owned()).await;
    server
}

async fn sql_server_session(server: &Server) -> Result<SqlServerSession, tiberius::error::Error> {
    let Login::Password { user, password } = &server.login else { panic!("TEST_SQLSERVER has a password") };
    let mut config = tiberius::Config::new();
    config.database(&server.database);
    config.authentication(tiberius::AuthMethod::sql_server(user, password.reveal()));
    config.trust_cert();
    let stream = TcpStream::connect((server.host.as_str(), server.port)).await?;
    tiberius::Client::connect(config, stream.compat_write()).await
}

/// The folder that servers of this engine start from.
async fn template(engine: Engine) -> PathBuf {
    static BEING_MADE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = BEING_MADE.lock().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(match engine {
        Engine::Sqlite => "sql/sqlite.sql",
        Engine::Postgres => "sql/postgresql.sql",
        Engine::MariaDb => "sql/mysql.sql",
        Engine::SqlServer => unreachable!("is not started here"),
    });
    let version = Sha256::digest(fs::read(&script).expect("a script"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{engine:?}-{:x}", version)).join("data");
    if folder.exists() {
        return folder;
    }
    let made = tempfile::tempdir().expect("a folder");
    let (data, port) = (made.path().join("data"), free_port());
    if is_root() {
        run(Command::new("chown").arg(owner(engine)).arg(made.path()));
    }
    match engine {
        Engine::Sqlite | Engine::SqlServer => unreachable!("is not started here"),
        Engine::Postgres => {
            let options = ["--username=owner", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"];
            run(as_owner(engine, &program(engine, "initdb")).args(options).arg("-D").arg(&data));
        }
        Engine::MariaDb => {
            let options = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"];
            let install = &mut Command::new("mariadb-install-db");
            run(install
                .args(options)
                .args(SMALL_MARIADB)
                .args(user_option())
                .arg(format!("--datadir={}", data.display())));
        }
    }
    // Killed with its owner should the script be wrong.
    let process = Some(start_server(engine, &data, port));
    let mut server = DatabaseServer { engine, process, folder: made, port, given: None };
    let port_argument = port.to_string();
    let client = |arguments: &[&str]| {
        let mut client = match engine {
            Engine::Postgres => Command::new(program(engine, "psql")),
            _ => Command::new("mariadb"),
        };
        match engine {
            Engine::Postgres => client.args(["-U", "owner", "-q", "-v", "ON_ERROR_STOP=1"]),
            _ => client.args(["-u", "root", "--default-character-set=utf8mb4"]),
        };
        client.args(["-h", "127.0.0.1", if engine == Engine::Postgres { "-p" } else { "-P" }, &port_argument]);
        client.args(arguments);
        client
    };
    match engine {
        Engine::Sqlite | Engine::SqlServer => {}
        Engine::Postgres => {
            let ready = || client(&["-c", "SELECT 1", "postgres"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            let answers = async || ready().is_ok_and(|status| status.success()).then_some(());
            eventually_within(SERVER_START, "PostgreSQL answers", answers).await;
            run(&mut client(&["-c", "CREATE DATABASE shop", "-c", "CREATE ROLE handler LOGIN", "postgres"]));
            run(client(&["--single-transaction", "shop", "-f"]).arg(&script));
            let grant = "GRANT SELECT ON product, product_change, product_change_pruned TO handler";
            run(&mut client(&["-c", grant, "shop"]));
        }
        Engine::MariaDb => {
            let ready = || client(&["-e", "SELECT 1"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            let answers = async || ready().is_ok_and(|status| status.success()).then_some(());
            eventually_within(SERVER_START, "MariaDB answers", answers).await;
            run(&mut client(&["-e", "CREATE DATABASE shop; CREATE USER handler@'%'"]));
            run(client(&["shop"]).stdin(fs::File::open(&script).expect("a script")));
            for table in ["product", "product_change", "product_change_pruned"] {
                run(&mut client(&["shop", "-e", &format!("GRANT SELECT ON {table} TO handler")]));
            }
        }
    }
    let mut process = server.process.take().expect("started above");
    signal(process.id(), "TERM");
    process.wait().expect("stops");
    fs::create_dir_all(folder.parent().expect("has one")).expect("made");
    // Another test process may have been as quick: then its folder is as good.
    let _ = Command::new("cp").arg("-r").arg(&data).arg(folder.with_extension("new")).status();
    let _ = fs::rename(folder.with_extension("new"), &folder);
    folder
}

const SMALL_MARIADB: [&str; 2] = ["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M"];

fn start_server(engine: Engine, data: &Path, port: u16) -> Child {
    let mut command = match engine {
        Engine::Sqlite | Engine::SqlServer => unreachable!("is not started here"),
        Engine::Postgres => {
            let _ = fs::remove_file(data.join("postmaster.pid")); // of one that was killed
            let tls = if data.join("server.key").exists() { "ssl=on" } else { "ssl=off" };
            let mut command = as_owner(engine, &program(engine, "postgres"));
            command.arg("-D").arg(data).args(["-p", &port.to_string()]);
            for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", tls] {
                command.args(["-c", setting]);
            }
            command
        }
        Engine::MariaDb => {
            let mut command = Command::new(program(engine, "mariadbd"));
            command.args(["--no-defaults", "--bind-address=127.0.0.1"]).args(user_option()).args(SMALL_MARIADB);
            command.arg(format!("--port={port}")).arg(format!("--datadir={}", data.display()));
            command.arg(format!("--socket={}", data.with_file_name("socket").display()));
            if data.join("server.key").exists() {
                command.arg(format!("--ssl-cert={}", data.join("server.crt").display()));
                command.arg(format!("--ssl-key={}", data.join("server.key").display()));
            }
            command.args(["--innodb-flush-log-at-trx-commit=2", "--skip-log-bin", "--innodb-use-native-aio=0"]);
            command
        }
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("{engine:?} is not installed ({error}): run scripts/test"))
}

/// A command as the user that the server's files belong to: PostgreSQL refuses to run as root.
fn as_owner(engine: Engine, program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    let user = owner(engine);
    command.args([format!("--reuid={user}"), format!("--regid={user}")]).arg("--init-groups").arg(program);
    command
}

fn owner(engine: Engine) -> &'static str {
    match engine {
        Engine::Postgres => "postgres",
        _ => "mysql",
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Debian keeps PostgreSQL's programs apart by version, and MariaDB's server where only root looks for it.
fn program(engine: Engine, name: &str) -> PathBuf {
    let found = match engine {
        Engine::Postgres => {
            let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
            versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).max()
        }
        _ => Some(Path::new("/usr/sbin").join(name)).filter(|path| path.exists()),
    };
    found.unwrap_or_else(|| name.into())
}

/// MariaDB's server gives up root's rights by itself.
fn user_option() -> Option<&'static str> {
    is_root().then_some("--user=mysql")
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: run scripts/test"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn children(pid: u32) -> Vec<u32> {
    let output = Command::new("pgrep").args(["-P", &pid.to_string()]).output().expect("pgrep");
    String::from_utf8_lossy(&output.stdout).lines().filter_map(|pid| pid.parse().ok()).collect()
}
