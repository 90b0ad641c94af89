//! Logging in with tokens of a managed identity, on a real Redis whose user has them as passwords.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use tokio::time::{Duration, Instant, sleep};

use crate::support::{
    eventually,
    identity::{HEADER, Identity},
    node::{Node, Truth},
    redis::RedisServer,
};

const OID: &str = "6f1c7b1e-1d3f-4a55-9d0a-2f6b7a1f0c11";

/// The `number`th token that the endpoint gives out.
fn token(number: usize) -> String {
    let claims = BASE64_URL_SAFE_NO_PAD.encode(format!("{{\"oid\":\"{OID}\",\"n\":{number}}}"));
    format!("eyJhbGciOiJub25lIn0.{claims}.signature{number}")
}

fn answer(number: usize, life_s: u64) -> (u16, String) {
    (200, format!("{{\"access_token\":\"{}\",\"expires_in\":\"{life_s}\",\"token_type\":\"Bearer\"}}", token(number)))
}

/// A server on which these tokens are the identity's passwords.
async fn server(tokens: std::ops::RangeInclusive<usize>) -> RedisServer {
    let server = RedisServer::start().await;
    let mut words = vec!["ACL".to_owned(), "SETUSER".into(), OID.into(), "on".into(), "~*".into(), "+@all".into()];
    words.extend(tokens.map(|number| format!(">{}", token(number))));
    server.command(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
    server
}

fn settings(identity: &Identity) -> [(&'static str, String); 3] {
    let endpoint = identity.endpoint();
    [("REDIS_ENTRA_ID", "system".into()), ("IDENTITY_ENDPOINT", endpoint.url), ("IDENTITY_HEADER", HEADER.into())]
}

fn node(truth: &Truth, server: &RedisServer, identity: &Identity) -> Node {
    let settings = settings(identity);
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Node::new(truth, Some(&format!("127.0.0.1:{}", server.port)), &settings)
}

/// The server's names for the identity's connections.
async fn connections(server: &RedisServer) -> Vec<String> {
    let list: String = redis::from_redis_value(server.command(&["CLIENT", "LIST"]).await).unwrap();
    let ours = list.lines().filter(|line| line.contains(&format!("user={OID}")));
    let mut ids: Vec<_> = ours.map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

#[tokio::test]
async fn tokens_follow_each_other_on_the_same_connections_and_no_request_notices() {
    let (server, truth) = (server(1..=9).await, Truth::new(&[(1, 10)]));
    let identity = Identity::start(|number| answer(number, 10)).await;
    let node = node(&truth, &server, &identity);
    node.until_it_hears().await;
    eventually("all are logged in", async || (connections(&server).await.len() == 3).then_some(())).await;
    let (before, logins) = (connections(&server).await, server.calls("auth").await);

    // Every key is new, so every read asks Redis.
    let began = Instant::now();
    let mut id = 100;
    while server.calls("auth").await < logins + 6 {
        assert!(began.elapsed() < Duration::from_secs(60), "two renewals of three connections");
        for _ in 0..20 {
            id += 1;
            truth.set(id, 1);
            assert_eq!(node.value(id).await, Some(1));
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(connections(&server).await, before, "none of them was made anew");
    let filled = redis::from_redis_value::<usize>(server.command(&["DBSIZE"]).await).unwrap();
    assert!(filled as i64 >= id - 100, "{filled} of {}: every load was stored in Redis", id - 100);
    let asked = identity.asked();
    assert!(asked.len() >= 3, "one request for each token, for all connections: {}", asked.len());
    assert!(asked.len() <= 5, "{}", asked.len());
    assert!(asked[0].contains("resource=https%3A%2F%2Fredis.azure.com"), "{}", asked[0]);
}

#[tokio::test]
async fn a_token_that_redis_does_not_take_costs_redis_and_no_read_until_it_does() {
    let (server, truth) = (server(1..=1).await, Truth::new(&[(1, 10)]));
    let identity = Identity::start(|number| answer(number, if number == 1 { 2 } else { 600 })).await;
    let node = node(&truth, &server, &identity);
    node.until_it_hears().await;
    eventually("the second token is refused", async || {
        assert_eq!(node.value(1).await, Some(10));
        (node.cache.status().redis_connected == Some(false)).then_some(())
    })
    .await;
    truth.set(2, 20);
    assert_eq!(node.value(2).await, Some(20));
    server.command(&["ACL", "SETUSER", OID, &format!(">{}", token(2))]).await;
    node.until_it_hears().await;
    truth.set(3, 30);
    assert_eq!(node.value(3).await, Some(30));
    assert_ne!(server.command(&["EXISTS", "{product-cache}:thing:3"]).await, redis::Value::Int(0));
}

#[tokio::test]
async fn an_endpoint_that_is_away_costs_nothing_while_the_token_lasts_and_then_only_redis() {
    let (server, truth) = (server(1..=20).await, Truth::new(&[(1, 10)]));
    let (is_away, given) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (away, count) = (is_away.clone(), given.clone());
    let identity = Identity::start(move |_| match away.load(Ordering::SeqCst) {
        true => (0, String::new()),
        false => answer(count.fetch_add(1, Ordering::SeqCst) + 1, 3),
    })
    .await;
    let node = node(&truth, &server, &identity);
    let began = Instant::now();
    assert_eq!(node.value(1).await, Some(10), "a first read without a token");
    assert!(began.elapsed() < Duration::from_millis(2500), "it does not wait for the platform: {:?}", began.elapsed());

    is_away.store(false, Ordering::SeqCst);
    node.until_it_hears().await;
    is_away.store(true, Ordering::SeqCst);
    sleep(Duration::from_millis(1000)).await;
    assert_eq!(node.cache.status().redis_connected, Some(true));
    is_away.store(false, Ordering::SeqCst);
    let before = given.load(Ordering::SeqCst);
    eventually("it is renewed", async || (given.load(Ordering::SeqCst) > before).then_some(())).await;
}
