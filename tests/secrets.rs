//! S5 as a property: whatever a secret looks like, and wherever it is put, nobody is told it.
//!
//! Random secrets in every setting that holds one, in headers and in the query, against servers that take them and
//! servers that refuse them, at the level that says most. Then all that was written, sent and stored is searched.

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::time::Instant;

use crate::support::{
    certificates::CERTIFICATES,
    eventually,
    host::stage,
    identity::Identity,
    instance::{hears, start},
    redis::RedisServer,
    tds::{Answer, Server, Welcome},
};

/// How many random secrets: each is a handful of processes.
const CASES: u32 = 6;

/// A secret that is nowhere by chance, with characters that need quoting or escaping somewhere.
fn secrets() -> impl Strategy<Value = String> {
    "[A-Za-z0-9+/=_.~!@#$%^&*(){}<>?:| -]{0,24}".prop_map(|rest| format!("Qz7{}kV{rest}", rest.len()))
}

fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// The forms in which it might be written: as it is, as in a URL, as in JSON, as `Debug` shows it, as base64.
fn forms(secret: &str) -> Vec<String> {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let quoted = format!("{secret:?}");
    let json = serde_json::to_string(secret).unwrap();
    let inner = |text: &str| text[1..text.len() - 1].to_owned();
    vec![secret.to_owned(), encoded(secret), inner(&quoted), inner(&json), BASE64_STANDARD.encode(secret)]
}

fn assert_untold(secret: &str, place: &str, text: &str) {
    for form in forms(secret) {
        // Long enough to be no chance, short enough to find a part.
        let start = &form[..form.len().min(8)];
        assert!(
            !text.contains(start),
            "{secret:?} is in {place}: {}",
            &text[text.find(start).unwrap_or(0)..][..80.min(text.len())]
        );
    }
}

async fn try_one(secret: String) {
    let redis = RedisServer::start().await;
    let by_hash = |text: &str| format!("#{}", sha256(text));
    redis.command(&["ACL", "SETUSER", "app", "on", &by_hash(&secret), "~*", "&*", "+@all"]).await;
    let identity = Identity::start(|_| (500, "{}".to_owned())).await;
    let folder = tempfile::tempdir().unwrap();
    let authority = CERTIFICATES.authority_file(folder.path());
    let refusing = Server::start(|_| Answer::Close).await;
    refusing.welcome(Welcome::Refused(18_456, "Login failed for user 'me'."));
    let ado = format!("\"{}\"", secret.replace('"', "\"\""));
    let right = format!("redis://app:{}@127.0.0.1:{}", encoded(&secret), redis.port);
    let wrong = format!("redis://app:{}x@127.0.0.1:{}", encoded(&secret), redis.port);
    let header = secret.replace(|c: char| !c.is_ascii_graphic(), "-");
    let settings = [
        vec![("Redis", right)],
        vec![("Redis", wrong), ("Sql", format!("postgres://me:{}@127.0.0.1:1/shop", encoded(&secret)))],
        vec![
            ("Redis", format!("127.0.0.1:1,user=app,password={}", secret.replace(',', ""))),
            ("Sql", format!("mysql://me:{}@127.0.0.1:1/shop", encoded(&secret))),
        ],
        vec![(
            "Sql",
            format!(
                "Server=127.0.0.1,{};Database=shop;User ID=me;Password={ado};ServerCertificate={}",
                refusing.port,
                authority.display()
            ),
        )],
        vec![
            ("Redis", format!("127.0.0.1:{}", redis.port)),
            ("REDIS_ENTRA_ID", "system".to_owned()),
            ("IDENTITY_ENDPOINT", identity.endpoint().url),
            ("IDENTITY_HEADER", header.clone()),
        ],
    ];
    for variables in settings {
        let mut instance = start().env("LOG_LEVEL", "trace");
        for (name, value) in &variables {
            instance = instance.env(name, value);
        }
        let began = Instant::now();
        let mut instance = instance.listening().await;
        if variables.len() == 1 && variables[0].0 == "Redis" {
            // Before it hears the log nothing is stored in Redis.
            eventually("it hears", async || hears(&instance.status().await, began).then_some(())).await;
        }
        let code = encoded(&secret);
        let mut sent = String::new();
        for target in ["productid=680", "productid=680,x", "productid=999999", ""] {
            let headers = [("x-functions-key", &*header), ("authorization", &*header), ("cookie", &*header)];
            let target = format!("/api/GetProductById?{target}&code={code}&clientId={code}");
            let reply = instance.get_with(&target, &headers).await;
            sent += &format!("{reply:?} {}", reply.text());
        }
        let reply = instance.get_with(&format!("/api/{code}?code={code}"), &[("x-functions-key", &header)]).await;
        sent += &format!("{reply:?} {}", reply.text());
        sent += &instance.status().await.to_string();
        instance.signal("TERM");
        instance.exit_code().await;
        assert_untold(&secret, "an answer", &sent);
        let said = instance.stdout.text() + &instance.stderr.text();
        assert!(["DEBUG", "WARN"].iter().any(|level| said.contains(level)), "something is said: {said}");
        assert_untold(&secret, "the log", &said);
        assert_untold(&secret, "the doctor's report", &doctor(&variables));
    }
    // Refused at the start: the message names the setting and not what it is.
    for (name, value) in [
        ("Redis", format!("http://{secret}")),
        ("Redis", format!("{secret}=")),
        ("Redis", format!("h:1,ssl=True,password={secret},{secret}")),
        ("Sql", secret.clone()),
        ("Sql", format!("{secret}==")),
        ("Sql", format!("Server=h;Password={ado};{secret}=1")),
        ("Sql", format!("postgres://me:{secret}@h/d")),
        ("CUSTOMCONNSTR_Redis", format!("redis://:{secret}/@h")),
    ] {
        let mut instance = start().env(name, value).env("CACHE_DURATION_S", "never").spawn();
        assert_eq!(instance.exit_code().await, Some(2), "{name}");
        let said = instance.stderr.text();
        assert!(said.contains("CACHE_DURATION_S"), "something is said: {said}");
        assert_untold(&secret, name, &said);
    }
    // What was stored: names and contents.
    let mut stored = String::new();
    for key in redis::from_redis_value::<Vec<String>>(redis.command(&["KEYS", "*"]).await).unwrap() {
        let dump: Vec<u8> = redis::from_redis_value(redis.command(&["DUMP", &key]).await).unwrap();
        stored += &format!("{key} {}", String::from_utf8_lossy(&dump));
    }
    assert!(stored.contains("{product-cache}:product:680"), "something was stored");
    assert_untold(&secret, "Redis", &stored);
}

fn doctor(variables: &[(&str, String)]) -> String {
    let app = stage(env!("CARGO_MANIFEST_DIR").as_ref(), crate::support::instance::BINARY.as_ref()).unwrap();
    let mut command = std::process::Command::new(crate::support::instance::BINARY);
    command.arg("doctor").current_dir(app.path()).env_clear().env("LOG_LEVEL", "trace");
    command.envs(variables.iter().map(|(name, value)| (*name, value)));
    let output = command.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn sha256(text: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn no_random_secret_is_told_to_anybody() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let config = Config { cases: CASES, max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&secrets(), |secret| {
            runtime.block_on(try_one(secret));
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn a_secret_that_was_told_would_be_found() {
    let secret = "Qz75kVa\"b c".to_owned();
    for form in forms(&secret) {
        let found = std::panic::catch_unwind(|| {
            assert_untold("Qz75kVa\"b c", "a text", &format!("before {form} after{}", " ".repeat(99)))
        });
        assert!(found.is_err(), "{form}");
    }
}
