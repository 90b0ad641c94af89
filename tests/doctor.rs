//! `handler doctor`, the real binary: each thing that a deployment gets wrong is one line with its remedy.

use std::{ffi::OsStr, fs, net::TcpListener, os::unix::ffi::OsStrExt, path::Path, process::Command};

use tempfile::{TempDir, tempdir};

use crate::support::{
    certificates::CERTIFICATES,
    database::{DatabaseServer, Engine},
    free_port,
    host::stage,
    instance::BINARY,
    redis::RedisServer,
    tds::{
        Answer, Cell, Server, Type,
        products::{Tracking, product, product_types, select, table, tracking},
    },
};

/// The app's folder, as a package leaves it.
fn app() -> TempDir {
    stage(Path::new(env!("CARGO_MANIFEST_DIR")), Path::new(BINARY)).unwrap()
}

/// What it says, and its exit code.
async fn doctor(folder: &Path, variables: &[(&str, &str)]) -> (String, i32) {
    let mut command = Command::new(BINARY);
    command.arg("doctor").current_dir(folder).env_clear().envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in said.lines().filter(|line| line.starts_with("FAIL") || line.starts_with("warn")) {
        assert!(line.split_once(" → ").is_some_and(|(_, remedy)| remedy.len() > 10), "a remedy: {line}");
    }
    (said, output.status.code().unwrap())
}

/// What it says about this has this in it.
#[track_caller]
fn assert_said((said, code): &(String, i32), line: &str) {
    let (severity, part) = line.split_once(' ').unwrap();
    let is_it = |line: &str| line.starts_with(severity) && line.contains(part.trim());
    assert!(said.lines().any(is_it), "{line}\nis not in\n{said}");
    let expected = i32::from(said.contains("\nFAIL") || said.starts_with("FAIL"));
    assert_eq!(*code, expected, "{said}");
}

const QUIET: [(&str, &str); 1] = [("AzureWebJobs.InvalidateCache.Disabled", "true")];

#[tokio::test]
async fn what_the_package_holds_is_fine_and_nothing_is_made() {
    let app = app();
    let report = doctor(app.path(), &QUIET).await;
    assert_said(&report, "ok host: host.json starts handler");
    assert_said(&report, "ok host: extension bundle");
    assert_said(&report, "ok host: changes are told by the change feed");
    assert_said(&report, "ok host: GetProductById/function.json fits");
    assert_said(&report, "ok host: InvalidateCache/function.json fits");
    assert!(report.0.ends_with("0 failed, 0 to look at, 7 fine\n"), "{}", report.0);
    let mut left: Vec<_> = fs::read_dir(app.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["GetProductById", "InvalidateCache", "handler", "host.json"]);
}

#[tokio::test]
async fn each_mistake_in_the_apps_files_is_found() {
    let edit = |file: &'static str, from: &'static str, to: &'static str| {
        move |root: &Path| {
            let text = fs::read_to_string(root.join(file)).unwrap();
            assert!(text.contains(from), "{file} has no {from}");
            fs::write(root.join(file), text.replace(from, to)).unwrap();
        }
    };
    let (get, invalidate) = ("GetProductById/function.json", "InvalidateCache/function.json");
    type Edit = Box<dyn Fn(&Path)>;
    let cases: Vec<(Edit, &str)> = vec![
        (Box::new(|root| fs::remove_file(root.join("host.json")).unwrap()), "warn there is no ./host.json"),
        (Box::new(edit("host.json", "{", "{{")), "FAIL host.json is not JSON"),
        (Box::new(edit("host.json", "\"handler\"", "\"another\"")), "warn starts another, which is not here"),
        (Box::new(edit("host.json", "\"handler\"", "\"\"")), "FAIL names no customHandler.description"),
        (Box::new(edit("host.json", "HttpRequest\": true", "HttpRequest\": false")), "FAIL forwards no HTTP"),
        (Box::new(edit("host.json", "[4.*, 5.0.0)", "[3.*, 4.0.0)")), "warn extension bundle [3.*"),
        (Box::new(edit("host.json", "extensionBundle", "bundle")), "FAIL has no extensionBundle"),
        (Box::new(edit("host.json", "00:05:00", "00:00:30")), "FAIL functionTimeout is 30 s"),
        (Box::new(edit("host.json", "00:05:00", "5m")), "FAIL functionTimeout is not hh:mm:ss"),
        (
            Box::new(edit("host.json", "\"MaxBatchSize\": 1000,", "\"maxBatchSize\": 5000,")),
            "warn MaxBatchSize is 5000",
        ),
        (Box::new(edit(get, "\"get\", \"head\"", "\"get\"")), "warn lets no HEAD through"),
        (Box::new(edit(get, "\"function\"", "\"Anonymous\"")), "warn can be called by anybody"),
        (
            Box::new(edit(get, "\"name\": \"req\"", "\"name\": \"req\", \"route\": \"products/{id}\"")),
            "FAIL has the route",
        ),
        (Box::new(edit(get, "httpTrigger", "queueTrigger")), "FAIL no binding of type httptrigger"),
        (Box::new(edit(get, "{", "")), "FAIL function.json is not JSON"),
        (Box::new(edit(invalidate, "[SalesLT].[Product]", "dbo.Product")), "FAIL watches the table \"dbo.Product\""),
        (Box::new(edit(invalidate, "\"Sql\"", "\"Sql2\"")), "warn the database of the setting \"Sql2\""),
        (
            Box::new(|root| fs::rename(root.join("InvalidateCache"), root.join("invalidate")).unwrap()),
            "FAIL the folder invalidate has a function.json",
        ),
        (
            Box::new(|root| fs::remove_dir_all(root.join("InvalidateCache")).unwrap()),
            "FAIL there is no InvalidateCache/function.json",
        ),
        #[cfg(unix)]
        (
            Box::new(|root| {
                // The staged one is the binary under test itself, by another name.
                fs::remove_file(root.join("handler")).unwrap();
                fs::write(root.join("handler"), "").unwrap();
            }),
            "FAIL handler is not executable",
        ),
    ];
    for (change, line) in cases {
        let app = app();
        change(app.path());
        assert_said(&doctor(app.path(), &QUIET).await, line);
    }
    let app = app();
    assert_said(&doctor(app.path(), &[]).await, "FAIL has a SQL trigger, and Sql is no SQL Server");
    let off = [QUIET[0], ("FEED_INTERVAL_MS", "0")];
    assert_said(&doctor(app.path(), &off).await, "FAIL nothing tells of changes");
    let wrong = [("CACHE_DURATION_S", "5m"), ("LOG_LEVEL", "loud")];
    let report = doctor(app.path(), &wrong).await;
    assert_said(&report, "FAIL settings: CACHE_DURATION_S is");
    assert_said(&report, "FAIL settings: LOG_LEVEL is");
}

#[tokio::test]
async fn a_redis_that_lacks_something_is_told_what() {
    let folder = tempdir().unwrap();
    let redis = RedisServer::start_with(&["--maxclients", "40", "--maxmemory", "100mb"]).await;
    let at = |text: String| [QUIET[0], ("Redis", Box::leak(text.into_boxed_str()) as &str), ("MAX_INSTANCES", "20")];
    let report = doctor(folder.path(), &at(redis.url())).await;
    assert_said(&report, "ok redis: connected to 127.0.0.1");
    assert_said(&report, "ok redis: every command that is needed is allowed");
    assert_said(&report, "warn redis: when its memory is full, Redis refuses whatever is new");
    let allowed = "40 connections are allowed (1 in use now), 3 for each instance: enough for 13";
    assert_said(&report, &format!("FAIL redis: {allowed}, and 20 may run"));
    assert_eq!(redis.command(&["DBSIZE"]).await, redis::Value::Int(0), "nothing is left there");

    redis.command(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let string = format!("127.0.0.1:{}", redis.port);
    let few = [&at(string.clone())[..2], &[("REDIS_FRUGAL", "on"), ("MAX_INSTANCES", "30")]].concat();
    let report = doctor(folder.path(), &few).await;
    assert_said(
        &report,
        "ok redis: 40 connections are allowed (1 in use now), 1 for each instance: enough for 40; 30 may run",
    );
    assert_said(&report, "warn redis: when its memory is full, Redis may evict the invalidation log (allkeys-lru)");

    redis.command(&["ACL", "SETUSER", "app", "on", ">hunter2", "~*", "+@all", "-evalsha", "-xadd", "-info"]).await;
    let report = doctor(folder.path(), &at(format!("{string},user=app,password=hunter2"))).await;
    assert_said(&report, "FAIL redis: 2 of 13 commands failed");
    assert_said(&report, "warn redis: INFO is not allowed");
    assert!(!report.0.contains("hunter2"), "{}", report.0);
    assert_said(
        &doctor(folder.path(), &at(format!("{string},user=app,password=hunter3"))).await,
        "FAIL check user and password",
    );
    redis.command(&["CONFIG", "SET", "requirepass", "x"]).await;
    assert_said(&doctor(folder.path(), &at(string.clone())).await, "FAIL check user and password");
    assert_said(&doctor(folder.path(), &at(format!("{string},ssl=True"))).await, "FAIL redis: ");
    redis.signal("STOP");
    assert_said(&doctor(folder.path(), &at(string.clone())).await, "FAIL redis: ");
    redis.signal("CONT");
    assert_said(&doctor(folder.path(), &at("127.0.0.1:1".into())).await, "FAIL redis: Connection refused");
}

#[tokio::test]
async fn a_database_that_lacks_something_is_told_what() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("empty.db");
    fs::write(&file, "").unwrap();
    let sql = format!("sqlite:{}", file.display());
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &sql)]).await;
    assert_said(&report, "FAIL database: database unavailable: there is no table product");

    let server = DatabaseServer::start(Engine::Postgres).await;
    let url = server.url();
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "ok database: PostgreSQL");
    assert_said(&report, "ok database: the change feed can be read");
    assert_said(&report, "ok database: a row by its key takes");
    assert!(!report.0.contains("\nwarn  database"), "{}", report.0);
    assert_said(
        &doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "500")]).await,
        "FAIL and 500 may run",
    );
    assert_said(&doctor(folder.path(), &[QUIET[0], ("Sql", &url)]).await, "warn set MAX_INSTANCES");
    server.sql("ALTER TABLE product DISABLE TRIGGER product_deleted").await;
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "FAIL database: database unavailable: the table lacks the triggers that tell of changes");
    server.sql("ALTER TABLE product ENABLE TRIGGER product_deleted").await;
    let old = "INSERT INTO product_change (ProductID, changed_at)
               SELECT 706, now() - interval '4 days' FROM generate_series(1, 10001)";
    server.sql(old).await;
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "warn database: more than 10000 changes are older than three days");
    server.sql("DROP TABLE product_change_pruned").await;
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "FAIL database:");
    server.sql("UPDATE product SET SellStartDate = 'infinity' WHERE ProductID = 680").await;
    assert_said(
        &doctor(folder.path(), &[QUIET[0], ("Sql", &url)]).await,
        "FAIL database: row 680: column SellStartDate: is out of range",
    );
    server.sql("ALTER TABLE product ALTER COLUMN ProductID TYPE numeric").await;
    assert_said(
        &doctor(folder.path(), &[QUIET[0], ("Sql", &url)]).await,
        "FAIL database: database unavailable: column ProductID is of type NUMERIC",
    );
    server.sql("ALTER TABLE product DROP COLUMN rowguid").await;
    assert_said(
        &doctor(folder.path(), &[QUIET[0], ("Sql", &url)]).await,
        "FAIL database: database unavailable: column \"rowguid\"",
    );

    let server = DatabaseServer::start(Engine::MariaDb).await;
    let url = server.url();
    server.sql("SET GLOBAL event_scheduler = OFF").await;
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "warn database: the event scheduler is off");
    assert_said(&report, "ok database: whether product has its triggers is not for this login to see");
    assert!(!report.0.contains("changes are kept"), "{}", report.0);
    server.sql("INSERT INTO product_change (version, ProductID) VALUES (1, 706), (1000002, 706)").await;
    let report = doctor(folder.path(), &[QUIET[0], ("Sql", &url), ("MAX_INSTANCES", "5")]).await;
    assert_said(&report, "warn database: more than 1000000 changes are kept");
    assert_said(&report, "ok database: the change feed can be read");
}

/// What the views and tables of SQL Server would say.
async fn sql_server(retention: (i64, i64), snapshots: i64, given_up: i64, tracked: Tracking) -> Server {
    let types = product_types();
    let feed = tracking(&std::sync::Arc::new(std::sync::Mutex::new(tracked)));
    Server::start(move |query| {
        let numbers = |numbers: &[i64]| {
            let row = numbers.iter().map(|number| Cell::Int(*number)).collect();
            Answer::Tables(vec![table(&vec![Type::Int(8); numbers.len()], vec![row])])
        };
        match &query.sql {
            sql if sql.contains("SERVERPROPERTY") => {
                let row = vec!["SQL Azure".into(), "12.0".into()];
                Answer::Tables(vec![table(&[Type::NVarchar(128), Type::NVarchar(128)], vec![row])])
            }
            sql if sql.contains("change_tracking_databases") => numbers(&[retention.0, retention.1]),
            sql if sql.contains("is_read_committed_snapshot_on") => numbers(&[snapshots]),
            sql if sql.contains("MIN([ProductID])") => numbers(&[1]),
            sql if sql.contains("MAX_CONNECTIONS") => numbers(&[32_767]),
            sql if sql.contains("sys.tables") => {
                let name = vec!["Leases_0123456789abcdef_42".into()];
                Answer::Tables(vec![table(&[Type::NVarchar(128)], vec![name])])
            }
            sql if sql.contains("[az_func].[Leases_0123456789abcdef_42]") => numbers(&[7, given_up]),
            sql if sql.contains("CHANGE_TRACKING_CURRENT_VERSION") => feed(query),
            _ => Answer::Tables(vec![select(query, &types, &[product(1)])]),
        }
    })
    .await
}

#[tokio::test]
async fn changes_that_the_sql_trigger_gave_up_are_counted() {
    let folder = tempdir().unwrap();
    let authority = CERTIFICATES.authority_file(folder.path());
    let look = async |server: &Server| {
        let sql = format!(
            "Server=127.0.0.1,{};Database=shop;User ID=me;Password=hunter2;ServerCertificate={}",
            server.port,
            authority.display()
        );
        let report = doctor(folder.path(), &[("Sql", &sql), ("MAX_INSTANCES", "5")]).await;
        assert!(!report.0.contains("hunter2"), "{}", report.0);
        report
    };
    let report = look(&sql_server((2 * 24 * 60, 1), 1, 0, Tracking::default()).await).await;
    assert_said(&report, "ok database: SQL Server (SQL Azure 12.0), database shop");
    assert_said(&report, "ok database: changes are kept for 48 hours");
    assert_said(&report, "ok database: the SQL trigger has 7 changes at work");
    assert_said(
        &report,
        "ok database: 32767 connections are allowed, 8 for each instance: enough for 4095; 5 may run (by",
    );
    assert_said(
        &report,
        "ok @@MAX_CONNECTIONS; a tier of Azure SQL ends sooner, at its workers, which are not visible",
    );
    assert!(!report.0.contains("FAIL") && !report.0.contains("warn  database"), "{}", report.0);
    let forgetful = Tracking { first_known: Some(11), ..Tracking::default() };
    let report = look(&sql_server((60, 0), 0, 3, forgetful).await).await;
    assert_said(&report, "FAIL database: the change feed says at every look that everything may have changed");
    assert_said(&report, "warn database: changes are kept for 60 minutes");
    assert_said(&report, "warn database: changes are never cleaned up");
    assert_said(&report, "warn database: READ_COMMITTED_SNAPSHOT is off");
    assert_said(
        &report,
        "FAIL database: the SQL trigger has given up 3 of 7 changes in [az_func].[Leases_0123456789abcdef_42]",
    );
}

#[tokio::test]
async fn where_the_identity_is_missing_everything_else_is_looked_at() {
    let app = app();
    // On a laptop, with the strings of infra/: both servers could be reached, and nobody could log in.
    let (there, gone) = (TcpListener::bind("127.0.0.1:0").unwrap(), free_port());
    let (port, id) = (there.local_addr().unwrap().port(), "0f8fad5b-d9cb-469f-a165-70867728950e");
    let sql = format!(
        "Server=tcp:localhost,{port};Database=shop;Authentication=Active Directory Managed Identity;User Id={id};Encrypt=True"
    );
    for (redis, found) in [(port, "ok"), (gone, "FAIL")] {
        let redis_string = format!("localhost:{redis},ssl=True,abortConnect=False");
        let settings = [("Sql", &*sql), ("Redis", &redis_string), ("REDIS_ENTRA_ID", id), ("MAX_INSTANCES", "40")];
        let report = doctor(app.path(), &settings).await;
        assert_said(&report, "FAIL settings: Redis is to be opened with a managed identity, and IDENTITY_ENDPOINT");
        assert_said(
            &report,
            "FAIL settings: the database is to be opened with a managed identity, and IDENTITY_ENDPOINT",
        );
        let shown = format!("Sql = SQL Server, database shop on localhost:{port}, as the identity {id}, TLS");
        assert!(report.0.contains(&shown), "{}", report.0);
        assert_said(&report, "ok host: GetProductById/function.json fits");
        assert_said(&report, "ok host: changes are told by the SQL trigger");
        assert_said(&report, &format!("ok database: localhost:{port} can be reached"));
        assert_said(&report, &format!("{found} redis: localhost:{redis} can"));
    }
    // What is wrong besides still ends it, and is told with it.
    let report = doctor(app.path(), &[("Sql", &*sql), ("CACHE_DURATION_S", "5m")]).await;
    assert_said(&report, "FAIL settings: CACHE_DURATION_S is");
    assert_said(&report, "FAIL settings: the database is to be opened with a managed identity");
}

#[test]
fn an_unknown_argument_is_told_the_known_ones() {
    let output = Command::new(BINARY).arg("docter").env_clear().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("handler doctor"));
    let output = Command::new(BINARY).arg("--version").env_clear().output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("product-cache {}", env!("CARGO_PKG_VERSION")));
}

/// Both ended in a panic.
#[test]
fn an_argument_that_is_no_text_is_unknown_and_a_version_that_nobody_reads_is_no_failure() {
    let output = Command::new(BINARY).arg(OsStr::from_bytes(b"doctor\xff")).env_clear().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("handler doctor"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = Command::new(BINARY).arg("--version").env_clear().stdout(writer).status().unwrap();
    assert!(status.success(), "{status}");
}
