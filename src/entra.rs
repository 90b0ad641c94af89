//! Access tokens of the app's managed identity, from the endpoint that App Service gives each app on its machine.
//!
//! Owns asking, keeping and renewing; knows nothing of what a token is for but its resource. Invariants: a token that
//! is still valid is given out at once, whatever the endpoint does; at most one request is under way; no message holds
//! a token or the endpoint's secret.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as URL_SAFE_NO_PAD};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{
    net::TcpStream,
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use url::Url;

use crate::config::{IdentityEndpoint, Secret};

/// How long before its end a token is renewed; for one that lives for less than twice that, half its life.
const EARLY: Duration = Duration::from_secs(5 * 60);
/// Up to this much earlier still, so that instances that started together do not ask together.
const EARLY_JITTER: Duration = Duration::from_secs(60);
/// Pause after an attempt that failed while the token was still valid.
const RETRY: Duration = Duration::from_secs(30);
/// Pause between two looks whether a renewal has come to its end.
const LOOK: Duration = Duration::from_millis(200);
/// Bound of one request. The endpoint answers from its own cache in milliseconds, and from Entra within a second.
const ANSWER: Duration = Duration::from_secs(3);
/// Bound of one answer: tokens are 2 to 10 KB.
const LARGEST_ANSWER: usize = 128 * 1024;
/// As much of the endpoint's own words as a message may hold.
const LONGEST_REASON: usize = 300;

/// Gives out tokens for one resource.
pub(crate) struct TokenSource {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Option<IdentityEndpoint>,
    resource: &'static str,
    client_id: Option<String>,
    kept: Mutex<Kept>,
    /// Held by whoever asks the endpoint.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Kept {
    token: Option<Token>,
    /// When the endpoint last failed, and why: whoever waited for that answer need not ask again.
    failed: Option<(Instant, String)>,
    renewal: Option<AbortHandle>,
}

/// What a token says about whom it was given to; its signature is its reader's business.
#[derive(Deserialize)]
struct Claims {
    oid: String,
}

/// The object id of the identity that a token was given to: its user name in Redis.
pub(crate) fn object_id(token: &Secret) -> Option<String> {
    let claims = URL_SAFE_NO_PAD.decode(token.reveal().split('.').nth(1)?.trim_end_matches('=')).ok()?;
    serde_json::from_slice::<Claims>(&claims).ok().map(|claims| claims.oid)
}

#[derive(Clone)]
struct Token {
    text: Secret,
    given_at: Instant,
    renew_at: Instant,
    ends_at: Instant,
}

impl Token {
    fn new(text: Secret, life: Duration) -> Self {
        let now = Instant::now();
        Self { text, given_at: now, renew_at: now + life - early(life), ends_at: now + life }
    }
}

fn early(life: Duration) -> Duration {
    (EARLY + EARLY_JITTER.mul_f64(rand::random_range(0.0..=1.0))).min(life / 2)
}

impl TokenSource {
    /// Describes the tokens; nothing is asked for before the first use.
    pub(crate) fn new(endpoint: Option<IdentityEndpoint>, resource: &'static str, client_id: Option<String>) -> Self {
        let (kept, asking) = Default::default();
        Self { shared: Arc::new(Shared { endpoint, resource, client_id, kept, asking }) }
    }

    /// A valid token, or why there is none. Renews one that is about to end in the background; one that is asked for is kept
    /// though whoever asked may not wait for it.
    pub(crate) async fn token(&self) -> Result<Secret, String> {
        let began = Instant::now();
        if let Some(token) = self.shared.valid() {
            if token.renew_at <= began {
                self.renew();
            }
            return Ok(token.text);
        }
        let shared = self.shared.clone();
        tokio::spawn(async move { shared.ask(began).await }).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Waits until there is another token than this one, renewing it when it is due; for ever, if need be.
    pub(crate) async fn after(&self, old: &Secret) -> Secret {
        loop {
            let now = Instant::now();
            match self.shared.valid() {
                Some(token) if token.text != *old => return token.text,
                Some(token) if token.renew_at > now => sleep_until(token.renew_at).await,
                token => {
                    self.renew();
                    sleep(if token.is_some() { LOOK } else { RETRY }).await;
                }
            }
        }
    }

    /// The resource did not take this token, though it has not ended by this machine's clock: it is renewed, but not
    /// again and again.
    pub(crate) fn refused(&self, text: &Secret) {
        if let Some(token) = &mut self.shared.kept().token
            && token.text == *text
            && token.given_at.elapsed() >= RETRY
        {
            token.renew_at = Instant::now();
        }
    }

    fn renew(&self) {
        let mut kept = self.shared.kept();
        if kept.renewal.as_ref().is_some_and(|renewal| !renewal.is_finished()) {
            return;
        }
        let shared = self.shared.clone();
        let renewal = tokio::spawn(async move {
            let _asking = shared.asking.lock().await;
            if let Err(problem) = shared.fetch().await {
                tracing::warn!(problem, "the identity's token cannot be renewed yet");
                let mut kept = shared.kept();
                if let Some(token) = &mut kept.token {
                    let left = token.ends_at.saturating_duration_since(Instant::now());
                    token.renew_at = Instant::now() + RETRY.min(left / 2);
                }
            }
        });
        kept.renewal = Some(renewal.abort_handle());
    }
}

impl Drop for TokenSource {
    fn drop(&mut self) {
        if let Some(renewal) = &self.shared.kept().renewal {
            renewal.abort();
        }
    }
}

impl Shared {
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn valid(&self) -> Option<Token> {
        self.kept().token.clone().filter(|token| token.ends_at > Instant::now())
    }

    /// Waits for its turn, and asks only if nobody did since `began`.
    async fn ask(&self, began: Instant) -> Result<Secret, String> {
        let _asking = self.asking.lock().await;
        if let Some(token) = self.valid() {
            return Ok(token.text);
        }
        if let Some((_, problem)) = self.kept().failed.clone().filter(|(failed, _)| *failed >= began) {
            return Err(problem);
        }
        self.fetch().await
    }

    async fn fetch(&self) -> Result<Secret, String> {
        let answer = match &self.endpoint {
            Some(endpoint) => timeout(ANSWER, self.request(endpoint))
                .await
                .unwrap_or_else(|_| Err(format!("the identity endpoint did not answer within {} s", ANSWER.as_secs()))),
            None => Err("no managed identity: IDENTITY_ENDPOINT and IDENTITY_HEADER are not set, which the platform \
                         does for an app that has an identity (it does not exist on a developer's machine)"
                .to_owned()),
        };
        let mut kept = self.kept();
        match answer {
            Ok(token) => {
                let text = token.text.clone();
                kept.token = Some(token);
                Ok(text)
            }
            Err(problem) => {
                kept.failed = Some((Instant::now(), problem.clone()));
                Err(problem)
            }
        }
    }

    async fn request(&self, endpoint: &IdentityEndpoint) -> Result<Token, String> {
        let mut url = Url::parse(&endpoint.url).map_err(|error| format!("IDENTITY_ENDPOINT is not a URL: {error}"))?;
        let (Some(host), "http") = (url.host_str(), url.scheme()) else {
            return Err("IDENTITY_ENDPOINT is not an http: URL".to_owned());
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = url.port_or_known_default().unwrap_or(80);
        let authority = url.authority().to_owned();
        url.query_pairs_mut().append_pair("api-version", "2019-08-01").append_pair("resource", self.resource);
        if let Some(client_id) = &self.client_id {
            url.query_pairs_mut().append_pair("client_id", client_id);
        }
        let request = Request::get(&url[url::Position::BeforePath..])
            .header(header::HOST, authority)
            .header("X-IDENTITY-HEADER", endpoint.header.reveal())
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|error| format!("IDENTITY_HEADER cannot be sent: {error}"))?;

        let unreachable = |problem: &dyn std::fmt::Display| {
            format!("the identity endpoint {host}:{port} cannot be reached: {problem}")
        };
        let stream = TcpStream::connect((&*host, port)).await.map_err(|error| unreachable(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
            Ok::<_, String>((status, body.map_err(|error| unreachable(&error))?.to_bytes()))
        };
        // The connection must be driven while it is used, and ends with it.
        let (status, body) = tokio::select! {
            biased;
            answer = exchange => answer?,
            Err(error) = connection => return Err(unreachable(&error)),
        };
        if !status.is_success() {
            let reason = reason(&body).replace(endpoint.header.reveal(), "***");
            return Err(format!(
                "the identity endpoint answered {status}: {reason} (is the identity assigned to the app, and the \
                 client id its own?)"
            ));
        }
        token(&body).ok_or_else(|| format!("the identity endpoint answered {status} without a token"))
    }
}

/// What the endpoint sends: times are text or numbers, by version.
#[derive(Deserialize)]
struct Answer {
    access_token: String,
    expires_on: Option<Seconds>,
    expires_in: Option<Seconds>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(u64),
    Text(String),
}

impl Seconds {
    fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.parse().ok(),
        }
    }
}

fn token(body: &[u8]) -> Option<Token> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let on = answer.expires_on.and_then(|seconds| seconds.number()).map(|on| on.saturating_sub(now));
    let life = on.or_else(|| answer.expires_in?.number()).filter(|life| *life > 0)?;
    // Nobody issues tokens for longer than a day; a longer one would be a clock that is wrong.
    let life = Duration::from_secs(life.min(24 * 60 * 60));
    Some(Token::new(Secret::from(answer.access_token.as_str()), life)).filter(|token| !token.text.reveal().is_empty())
}

/// The endpoint's own words, in whichever of its forms, shortened; never a whole body, which might hold anything.
fn reason(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let said = ["/message", "/Message", "/error_description", "/error/message", "/error"]
        .iter()
        .find_map(|place| json.pointer(place)?.as_str());
    let said = said.unwrap_or("it does not say why");
    said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST_REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_that_is_refused_is_renewed_but_not_again_and_again() {
        let source = TokenSource::new(None, "r", None);
        let (text, life) = (Secret::from("t"), Duration::from_secs(3600));
        let due = || source.shared.kept().token.as_ref().is_some_and(|token| token.renew_at <= Instant::now());
        source.shared.kept().token = Some(Token::new(text.clone(), life));
        source.refused(&text);
        assert!(!due(), "it was given just now");
        source.refused(&Secret::from("another"));
        let long_ago = Instant::now().checked_sub(RETRY).expect("the machine runs for longer");
        source.shared.kept().token = Some(Token { given_at: long_ago, ..Token::new(text.clone(), life) });
        assert!(!due());
        source.refused(&text);
        assert!(due());
    }

    #[tokio::test]
    async fn a_token_is_kept_though_whoever_asked_for_it_is_gone() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/token", listener.local_addr().expect("bound"));
        let endpoint = IdentityEndpoint { url, header: Secret::from("h") };
        let source = TokenSource::new(Some(endpoint), "r", None);
        assert!(timeout(Duration::from_millis(50), source.token()).await.is_err(), "nobody has answered");
        let (mut client, _) = listener.accept().await.expect("it has asked");
        let body = r#"{"access_token":"t","expires_in":3600}"#;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        tokio::io::AsyncWriteExt::write_all(&mut client, answer.as_bytes()).await.expect("it is still there");
        drop(listener); // nobody can ask again
        assert_eq!(source.token().await.as_ref().map(Secret::reveal), Ok("t"));
    }

    #[test]
    fn the_object_id_is_read_from_the_token() {
        let token = |claims: &str| Secret::from(&*format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims)));
        assert_eq!(object_id(&token(r#"{"oid":"6f1c","aud":"r"}"#)).as_deref(), Some("6f1c"));
        assert!(object_id(&token("{}")).is_none() && object_id(&Secret::from("opaque")).is_none());
    }
}
