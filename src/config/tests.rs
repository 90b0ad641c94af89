//! Settings together: defaults, names, rules that span them, and what no message shows.

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
fn no_number_is_read_in_vain() {
    let shown = |frugal: &'static str, setting: Option<(&str, &str)>| {
        let given = [("Redis", "localhost"), ("REDIS_FRUGAL", frugal)].into_iter().chain(setting);
        let mut config = parse(&given.collect::<Vec<_>>()).ok()?;
        config.given.clear();
        Some(format!("{config:?}"))
    };
    for setting in SETTINGS {
        let Kind::Number(least, most) = setting.kind else { continue };
        let usually: u64 = setting.default.parse().unwrap_or(least);
        let near = [usually + 1, usually + 2, usually.saturating_sub(1), usually * 2];
        let others: Vec<_> = near.into_iter().filter(|other| (least..=most).contains(other)).collect();
        let counts = |frugal| {
            let with = others.iter().filter_map(|other| shown(frugal, Some((setting.name, &other.to_string()))));
            let usual = shown(frugal, None).expect("valid");
            with.into_iter().any(|shown| shown != usual)
        };
        assert!(counts("off") || counts("on"), "{}", setting.name);
    }
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
        ("DATABASE_MAX_CONECTIONS", "5"),
        ("REQUEST_TIMOUT_MS", "9000"),
        ("SQLAZURECONNSTR_sql", "Server=s"),
        ("Log_Level", "debug"),
        ("SQL_SERVER", "somebody's"),
        ("DATABASE_URL", "somebody's"),
        ("CACHE_LEASE_MS", "4000"),
        ("HTTP_CACHE_CONTROL", "no\ncache"),
        ("LOG_LEVEL", "loud"),
        ("Redis", "hunter2@nowhere"),
        ("Sql", "Server:x;Password=hunter2"),
        ("REDIS_PREFIX", "a b"),
    ])
    .expect_err("fourteen mistakes");
    let message = error.to_string();
    for name in [
        "FUNCTIONS_CUSTOMHANDLER_PORT is \"seven\"",
        "CACHE_DURATION_S is \"5m\"",
        "CACHE_JITTER_PERCENT is \"91\"",
        "CACHE_DURATON_S is not a setting; did you mean CACHE_DURATION_S?",
        "DATABASE_MAX_CONECTIONS is not a setting; did you mean DATABASE_MAX_CONNECTIONS?",
        "REQUEST_TIMOUT_MS is not a setting; did you mean REQUEST_TIMEOUT_MS?",
        "SQLAZURECONNSTR_sql is not a setting; did you mean SQLAZURECONNSTR_Sql?",
        "Log_Level is not a setting; did you mean LOG_LEVEL?",
        "CACHE_HARD_TIMEOUT_MS must be below",
        "HTTP_CACHE_CONTROL has characters",
        "LOG_LEVEL is \"loud\"",
        "Redis: a part that is no keyword is not of the form host:port",
        "Sql: it is none of",
        "REDIS_PREFIX has blanks",
    ] {
        assert!(message.contains(name), "{name} is missing in: {message}");
    }
    assert_eq!(error.mistakes.len(), 14, "{message}");
    assert!(!message.contains("hunter2"), "{message}");
}

#[test]
fn one_mistake_is_told_once_with_redis_and_without() {
    for redis in [&[][..], &[("Redis", "localhost")]] {
        for (name, value) in [("CACHE_HARD_TIMEOUT_MS", "5s"), ("REDIS_MAX_CLIENTS", "many")] {
            let error = parse(&[redis, &[(name, value)]].concat()).expect_err(name);
            let told = error.mistakes.iter().filter(|mistake| mistake.starts_with(name)).count();
            assert_eq!(told, 1, "{error}");
        }
    }
}

#[test]
fn no_more_threads_can_be_asked_for_than_the_server_takes() {
    assert!(parse(&[("HTTP_WORKERS", "512")]).is_ok());
    let error = parse(&[("HTTP_WORKERS", "513")]).expect_err("the server would panic").to_string();
    assert!(error.contains("HTTP_WORKERS"), "{error}");
}

#[test]
fn on_azure_the_sample_catalogue_must_be_asked_for() {
    let hosted = [("FUNCTIONS_CUSTOMHANDLER_PORT", "4001"), ("WEBSITE_SITE_NAME", "shop")];
    let error = parse(&hosted).expect_err("no database").to_string();
    assert!(error.starts_with("1 wrong setting: Sql is not set"), "{error}");
    assert!(parse(&hosted[..1]).is_ok() && parse(&hosted[1..]).is_ok(), "func start, and a shell on Azure");
    let asked_for = parse(&[&hosted[..], &[("Sql", "embedded")]].concat()).expect("it was asked for");
    assert!(asked_for.database.source == Source::Embedded);
}

#[test]
fn a_timeout_that_a_shorter_one_always_precedes_is_a_mistake_if_somebody_set_it() {
    let hard = ("CACHE_HARD_TIMEOUT_MS", "400");
    let config = parse(&[hard]).expect("the defaults give way");
    assert_eq!(config.database.connect_timeout, Duration::from_millis(320));
    for (name, below) in [("CACHE_SOFT_TIMEOUT_MS", "399"), ("DATABASE_CONNECT_TIMEOUT_MS", "400")] {
        assert!(parse(&[hard, (name, below)]).is_ok(), "{name}");
        let error = parse(&[hard, (name, "401")]).expect_err(name).to_string();
        assert!(error.starts_with(&format!("1 wrong setting: {name} must be")), "{error}");
    }
}

#[test]
fn what_tells_of_changes_is_asked_twice_while_memory_is_trusted() {
    let (redis, frugal) = (("Redis", "redis://127.0.0.1:1"), ("REDIS_FRUGAL", "on"));
    for (variables, mistake) in [
        (&[("FEED_INTERVAL_MS", "5001")][..], "FEED_INTERVAL_MS must be at most half"),
        (&[redis, frugal, ("REDIS_FRUGAL_POLL_MS", "1501"), ("CACHE_UNHEARD_MAX_S", "3")], "REDIS_FRUGAL_POLL_MS must"),
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
        (&[("Redis", "h,ssl=True,password=hunter2"), system, endpoint, header], "has a password, and REDIS_ENTRA_ID"),
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
        let text =
            if prefix.starts_with("MYSQL") { "Server=h;Database=db;UID=me" } else { "Server=h;Database=db;User ID=me" };
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
    let (url, header) = (("IDENTITY_ENDPOINT", "http://169.254.1.2:8081/msi/token"), ("IDENTITY_HEADER", "hunter2"));
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
    assert_eq!(limits(&[said, ("DATABASE_CONNECT_TIMEOUT_MS", "300"), ("DATABASE_MAX_CONNECTIONS", "5")]), (300, 5, 5));
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
