//! Logins with a token of the app's managed identity.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use product_cache::{
    config::{self, IdentityEndpoint, Login, Tls},
    database::Database,
    product::TABLE,
};
use tokio::time::sleep;

use super::{server, settings};
use crate::support::{
    eventually,
    identity::{HEADER, Identity},
    tds::{
        Server, Welcome,
        products::{product, products},
    },
};

/// A database that is logged in to anew for each query, so that each asks for a token.
fn database(port: u16, identity: Option<IdentityEndpoint>, client_id: Option<&str>) -> Database {
    let login = Login::ManagedIdentity { client_id: client_id.map(str::to_owned) };
    let server = config::Server { login, tls: Tls::Unverified, ..server(port) };
    Database::new(&config::Database { identity, max_age: Duration::ZERO, ..settings(server) })
}

fn token(text: &str, life_s: u64) -> (u16, String) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    (200, format!(r#"{{"access_token":"{text}","expires_on":"{}","token_type":"Bearer"}}"#, now + life_s))
}

fn tokens(fake: &Server) -> Vec<String> {
    fake.logins().into_iter().map(|login| login.token.expect("a token")).collect()
}

#[tokio::test]
async fn a_token_is_asked_for_once_and_every_login_brings_it() {
    let fake = Server::start(products(vec![product(1)])).await;
    let identity = Identity::start(|number| token(&format!("ey.{number}"), 3600)).await;
    let database = database(fake.port, Some(identity.endpoint()), None);
    for _ in 0..3 {
        database.rows(&TABLE, &[1]).await.expect("rows");
    }
    assert_eq!(tokens(&fake), ["ey.1", "ey.1", "ey.1"]);
    assert!(fake.logins().iter().all(|login| login.user.is_empty() && login.password.is_empty() && login.encrypted));
    let [asked] = &identity.asked()[..] else { panic!("asked once: {:?}", identity.asked()) };
    assert!(
        asked.starts_with(
            "GET /msi/token?api-version=2019-08-01&resource=https%3A%2F%2Fdatabase.windows.net%2F HTTP/1.1\r\n"
        ),
        "{asked}"
    );
    assert!(asked.to_lowercase().contains(&format!("\r\nx-identity-header: {HEADER}\r\n")), "{asked}");
}

#[tokio::test]
async fn a_user_assigned_identity_is_asked_for_by_its_client_id() {
    let fake = Server::start(products(vec![product(1)])).await;
    let identity = Identity::start(|_| (200, r#"{"access_token":"ey.user","expires_in":3599}"#.to_owned())).await;
    let database = database(fake.port, Some(identity.endpoint()), Some("2a7c&x"));
    database.rows(&TABLE, &[1]).await.expect("rows");
    assert_eq!(tokens(&fake), ["ey.user"]);
    assert!(identity.asked()[0].contains("&client_id=2a7c%26x HTTP/1.1"), "{:?}", identity.asked());
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends_and_an_old_one_serves_while_that_fails() {
    let fake = Server::start(products(vec![product(1)])).await;
    let failing = Arc::new(AtomicBool::new(true));
    let fails = failing.clone();
    let identity = Identity::start(move |number| match number {
        1 => token("ey.first", 4),
        _ if fails.load(Ordering::SeqCst) => (500, r#"{"statusCode":500,"message":"down"}"#.to_owned()),
        _ => token("ey.second", 3600),
    })
    .await;
    let database = database(fake.port, Some(identity.endpoint()), None);
    eventually("a renewal was tried", async || {
        database.rows(&TABLE, &[1]).await.expect("rows");
        (identity.asked().len() > 1).then_some(())
    })
    .await;
    assert!(tokens(&fake).iter().all(|token| token == "ey.first"), "{:?}", tokens(&fake));
    failing.store(false, Ordering::SeqCst);
    eventually("the new token is used", async || {
        database.rows(&TABLE, &[1]).await.ok()?;
        (tokens(&fake).last()? == "ey.second").then_some(())
    })
    .await;
    assert!(identity.asked().len() < 20, "a failing endpoint is not asked at each login");
}

#[tokio::test]
async fn many_logins_at_once_ask_once_and_fail_together() {
    let fake = Server::start(products(vec![product(1)])).await;
    let healthy = Arc::new(AtomicBool::new(false));
    let (answers, is_healthy) = (healthy.clone(), healthy);
    let identity = Identity::start(move |_| match answers.load(Ordering::SeqCst) {
        true => token("ey.one", 3600),
        false => (400, r#"{"statusCode":400,"message":"No User Assigned or Delegated Managed Identity found"}"#.into()),
    })
    .await;
    let database = database(fake.port, Some(identity.endpoint()), None);
    let eight = async || {
        let queries = (0..8).map(|_| database.rows(&TABLE, &[1]));
        futures_util::future::join_all(queries).await.into_iter().filter(Result::is_ok).count()
    };
    assert_eq!(eight().await, 0);
    assert_eq!(identity.asked().len(), 1, "those who waited for the answer take it");
    is_healthy.store(true, Ordering::SeqCst);
    assert_eq!(eight().await, 8);
    assert_eq!(identity.asked().len(), 2);
}

#[tokio::test]
async fn why_there_is_no_token_is_told_without_secrets() {
    let fake = Server::start(products(vec![product(1)])).await;
    let refused = format!(r#"{{"error":{{"code":"bad","message":"no identity for\n{HEADER}"}}}}"#);
    for (answer, told) in [
        ((400, refused), "answered 400 Bad Request: no identity for *** (is the identity assigned"),
        ((403, "<html>secret</html>".to_owned()), "answered 403 Forbidden: it does not say why"),
        ((200, r#"{"access_token":"ey.secret"}"#.to_owned()), "answered 200 OK without a token"),
        ((200, r#"{"access_token":"","expires_in":"60"}"#.to_owned()), "answered 200 OK without a token"),
        ((200, r#"{"access_token":"ey.secret","expires_on":"1"}"#.to_owned()), "answered 200 OK without a token"),
        ((200, "x".repeat(200_000)), "length limit exceeded"),
        ((0, String::new()), "did not answer within 3 s"),
    ] {
        let identity = Identity::start(move |_| answer.clone()).await;
        let database = database(fake.port, Some(identity.endpoint()), None);
        let error = database.open().await.expect_err(told).to_string();
        assert!(error.contains(told), "{told}: {error}");
        assert!(!error.contains("secret") && !error.contains(HEADER) && !error.contains('\n'), "{error}");
    }
    assert_eq!(fake.connections(), 0, "the server is not troubled");
}

#[tokio::test]
async fn without_an_endpoint_the_missing_settings_are_named() {
    for (endpoint, told) in [
        (None, "IDENTITY_ENDPOINT and IDENTITY_HEADER are not set"),
        (Some(IdentityEndpoint { url: "https://x".into(), header: HEADER.into() }), "is not an http: URL"),
        (Some(IdentityEndpoint { url: "http://127.0.0.1:1/".into(), header: HEADER.into() }), "cannot be reached"),
    ] {
        let error = database(1, endpoint, None).open().await.expect_err(told).to_string();
        assert!(error.contains(told), "{error}");
    }
}

#[tokio::test]
async fn a_token_is_never_sent_in_the_clear() {
    let fake = Server::start(products(vec![product(1)])).await;
    let identity = Identity::start(|_| token("ey.1", 3600)).await;
    let login = Login::ManagedIdentity { client_id: None };
    let server = config::Server { login, tls: Tls::Off, ..server(fake.port) };
    let database = Database::new(&config::Database { identity: Some(identity.endpoint()), ..settings(server) });
    let error = database.open().await.expect_err("refused").to_string();
    assert!(error.contains("Encrypt=True"), "{error}");
    assert_eq!(fake.logins().len(), 0);
}

#[tokio::test]
async fn an_identity_that_is_no_user_of_the_database_is_told_what_makes_it_one() {
    let fake = Server::start(products(vec![product(1)])).await;
    fake.welcome(Welcome::Refused(18_456, "Login failed for user '<token-identified principal>'."));
    let identity = Identity::start(|_| token("ey.1", 3600)).await;
    let error = database(fake.port, Some(identity.endpoint()), None).open().await.expect_err("refused").to_string();
    assert!(error.contains("token-identified principal") && error.contains("sql/sqlserver-access.sql"), "{error}");
}

#[tokio::test]
async fn a_token_that_the_server_refuses_is_asked_for_anew_though_it_has_not_ended_here() {
    /// Between two tokens, so that one that helps nothing is not asked for at each login.
    const PAUSE: Duration = Duration::from_secs(30);
    let fake = Server::start(products(vec![product(1)])).await;
    let identity = Identity::start(|number| token(&format!("ey.{number}"), 3600)).await;
    let database = database(fake.port, Some(identity.endpoint()), None);
    let rows = || database.rows(&TABLE, &[1]);
    rows().await.unwrap();
    fake.welcome(Welcome::Refused(18_456, "Login failed for user '<token-identified principal>'."));
    assert!(rows().await.is_err() && rows().await.is_err());
    assert_eq!(identity.asked().len(), 1, "it was given just now");
    sleep(PAUSE).await;
    eventually("another one is asked for", async || {
        assert!(rows().await.is_err());
        (identity.asked().len() == 2).then_some(())
    })
    .await;
    fake.welcome(Welcome::In);
    eventually("it is used", async || {
        rows().await.unwrap();
        (tokens(&fake).last()? == "ey.2").then_some(())
    })
    .await;
}
