//! HTTP functions: the front a client talks to, and the two dialects in which the host passes a request on.
//!
//! The front decides by route, method, key and setting whether the handler is asked at all. *Forward* rebuilds the
//! request from what ASP.NET parsed; *Proxy* passes on what arrived. Whatever status the handler answers is the
//! client's answer; only a lost handler is a 500, without a body.

use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, Uri};
use tokio::time::{Instant, sleep, timeout_at};

use super::Host;
use super::client::{Answer, Lost, Outgoing, Payload};
use super::functions::{AuthLevel, Function, Segment, Trigger};
use super::options::Dialect;
use super::trigger::new_guid;

const DEFAULT_BODY_LIMIT: usize = 104_857_600;
const PROXY_ATTEMPTS: usize = 10;
const PROXY_FIRST_PAUSE: Duration = Duration::from_millis(50);
const PROXY_LONGEST_PAUSE: Duration = Duration::from_millis(250);
const CLIENT_ADDRESS: &str = "127.0.0.1";
const DEFAULT_HOST: &str = "localhost:7071";
/// What a rebuilt query leaves alone beside letters and digits: merged values arrive as `680%2C706`.
const QUERY_LITERALS: &str = "-._~";
/// Headers .NET files under the content, so that a copy to the request fails silently.
const CONTENT_HEADERS: [&str; 11] = [
    "allow",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "expires",
    "last-modified",
];
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "te",
    "transfer-encoding",
    "upgrade",
    "trailer",
];

/// What a client sends to the host.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query exactly as typed.
    pub target: String,
    /// `Host` and the body's `Content-Length` are added if missing; `Transfer-Encoding: chunked` makes the body chunked.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn new(method: &str, target: &str) -> Self {
        Self { method: method.into(), target: target.into(), headers: Vec::new(), body: Vec::new() }
    }

    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn is_chunked(&self) -> bool {
        self.values("transfer-encoding").any(|value| value.to_ascii_lowercase().contains("chunked"))
    }

    fn host(&self) -> &str {
        self.values("host").next().unwrap_or(DEFAULT_HOST)
    }

    fn path_and_query(&self) -> (&str, &str) {
        let target = self.target.split('#').next().unwrap_or_default();
        target.split_once('?').unwrap_or((target, ""))
    }
}

/// What the client gets; header names in lower case.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    pub(super) fn of(answer: Answer) -> Self {
        Self { status: answer.status, headers: answer.headers, body: answer.body.to_vec() }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// # Panics
    /// If the body is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }
}

impl Host {
    pub async fn get(&self, target: &str) -> Response {
        self.http(Request::get(target)).await
    }

    /// One request through the host's front, as a client would send it.
    ///
    /// 400 for what is no HTTP; 404 for no such route, a method not listed, or a disabled function; 401 for a missing or
    /// wrong key; 503 if the host has stopped; 500 if the handler was lost or overran. All of these have no body. Else
    /// the handler's answer.
    pub async fn http(&self, request: Request) -> Response {
        if self.stopped() {
            return Response::empty(503);
        }
        let Ok(method) = Method::from_bytes(request.method.as_bytes()) else { return Response::empty(400) };
        if !request.target.starts_with('/') || request.target.parse::<Uri>().is_err() {
            return Response::empty(400);
        }
        let (path, query) = request.path_and_query();
        let functions = &self.supervisor.files.functions;
        let Some((function, auth)) = functions.iter().find_map(|function| admits(function, &method, path)) else {
            return Response::empty(404);
        };
        if !self.is_authorized(auth, &request, query) {
            return Response::empty(401);
        }
        if function.disabled {
            return Response::empty(404);
        }
        let body_limit = self.supervisor.environment.get("FUNCTIONS_REQUEST_BODY_SIZE_LIMIT");
        if request.body.len() > body_limit.and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_BODY_LIMIT) {
            self.supervisor.note("Request body too large.");
            return Response::empty(500);
        }
        self.execute(function, method, &request).await
    }

    async fn execute(&self, function: &Function, method: Method, request: &Request) -> Response {
        let name = &function.name;
        let worker = match self.supervisor.ready().await {
            Ok(worker) => worker,
            Err(_) => return Response::empty(500),
        };
        let id = new_guid();
        let deadline = Instant::now() + self.supervisor.files.function_timeout;
        let sent = async {
            match self.supervisor.files.dialect {
                Dialect::Forward => self.forward(method, request, &id).await,
                Dialect::Proxy => self.proxy(method, request, &id).await,
            }
        };
        match timeout_at(deadline, sent).await {
            Ok(Ok(response)) => {
                self.supervisor.note(format!("Executed 'Functions.{name}' (Succeeded, Id={id})"));
                response
            }
            Ok(Err(reason)) => {
                self.supervisor.note(format!("Executed 'Functions.{name}' (Failed, Id={id}): {reason}"));
                Response::empty(500)
            }
            Err(_) => {
                let limit = self.supervisor.files.function_timeout;
                self.supervisor
                    .note(format!("Timeout value of {limit:?} exceeded by function 'Functions.{name}' (Id={id})"));
                self.overran(&worker).await;
                Response::empty(500)
            }
        }
    }

    async fn forward(&self, method: Method, request: &Request, id: &str) -> Result<Response, String> {
        let has_content = !request.body.is_empty() && !request.is_chunked();
        if request.is_chunked() {
            // The header is copied, the content is not.
            return Err(
                "'Transfer-Encoding: chunked' header can not be used when content object is not specified".into()
            );
        }
        let mut headers: Vec<_> = request.headers.clone();
        headers.retain(|(name, _)| !CONTENT_HEADERS.contains(&name.to_ascii_lowercase().as_str()));
        if request.values("host").next().is_none() {
            headers.push(("Host".into(), DEFAULT_HOST.into()));
        }
        if has_content {
            headers.extend(request.values("content-type").take(1).map(|value| ("Content-Type".into(), value.into())));
        }
        headers.extend(self.added_headers(id));
        headers.push(("User-Agent".into(), self.user_agent()));
        let (path, query) = request.path_and_query();
        let target = escape_path(&decode(path, false)) + &rebuild_query(query);
        let payload = if has_content { sized(request) } else { Payload::Empty };
        let outgoing = Outgoing { method, target, headers: joined(headers), payload };
        let mut response = Response::of(self.supervisor.client.send(&outgoing).await.map_err(|lost| lost.to_string())?);
        response
            .headers
            .retain(|(name, value)| !(name == "transfer-encoding" && value.eq_ignore_ascii_case("chunked")));
        Ok(response)
    }

    async fn proxy(&self, method: Method, request: &Request, id: &str) -> Result<Response, String> {
        let added: Vec<(String, String)> = self
            .added_headers(id)
            .into_iter()
            .chain([
                ("x-ms-invocation-id".into(), id.into()),
                ("X-Forwarded-For".into(), CLIENT_ADDRESS.into()),
                ("X-Forwarded-Host".into(), request.host().into()),
                ("X-Forwarded-Proto".into(), "http".into()),
                ("Host".into(), format!("127.0.0.1:{}", self.port())),
            ])
            .collect();
        let mut headers = request.headers.clone();
        headers.retain(|(name, _)| {
            let lower = name.to_ascii_lowercase();
            let replaced = added.iter().any(|(name, _)| name.eq_ignore_ascii_case(&lower));
            !replaced && lower != "content-length" && !HOP_BY_HOP.contains(&lower.as_str())
        });
        headers.extend(added);
        let payload = match request.body.is_empty() {
            true => Payload::Empty,
            false if request.is_chunked() => Payload::Chunked(Bytes::copy_from_slice(&request.body)),
            false => sized(request),
        };
        let outgoing = Outgoing { method, target: request.target.clone(), headers: joined(headers), payload };
        let mut response = Response::of(self.send_with_retries(&outgoing).await?);
        response.headers.retain(|(name, _)| !HOP_BY_HOP.contains(&name.as_str()));
        Ok(response)
    }

    /// Ten tries in all. A payload that has begun to stream cannot be sent again.
    async fn send_with_retries(&self, outgoing: &Outgoing) -> Result<Answer, String> {
        let mut pause = PROXY_FIRST_PAUSE;
        for attempt in 1.. {
            let lost = match self.supervisor.client.send(outgoing).await {
                Ok(answer) => return Ok(answer),
                Err(lost) => lost,
            };
            let again = match lost {
                Lost::Connect(_) => true,
                Lost::Transport(_) => matches!(outgoing.payload, Payload::Empty),
                Lost::Unsendable(_) => false,
            };
            if !again || attempt == PROXY_ATTEMPTS {
                return Err(format!("Failed to proxy request with ForwarderError: Request: {lost}"));
            }
            self.supervisor.note(format!(
                "Failed to proxy request to the worker. Retrying in {}ms. Attempt {attempt} of {PROXY_ATTEMPTS}.",
                pause.as_millis()
            ));
            sleep(pause).await;
            pause = (pause * 2).min(PROXY_LONGEST_PAUSE);
        }
        unreachable!("the loop returns at its last attempt")
    }

    fn is_authorized(&self, auth: AuthLevel, request: &Request, query: &str) -> bool {
        let Some(expected) = &self.function_key else { return true };
        let given = match request.values("x-functions-key").next() {
            Some(key) => Some(key.to_string()),
            None => parse_query(query).into_iter().find_map(|(name, values)| {
                if name.eq_ignore_ascii_case("code") { values.into_iter().next() } else { None }
            }),
        };
        match auth {
            AuthLevel::Anonymous => true,
            AuthLevel::Function => given.as_ref() == Some(expected),
            AuthLevel::Admin => false,
        }
    }

    /// The two headers every invocation carries.
    pub(super) fn added_headers(&self, id: &str) -> Vec<(String, String)> {
        vec![
            ("X-Azure-Functions-HostVersion".into(), self.version().into()),
            ("X-Azure-Functions-InvocationId".into(), id.into()),
        ]
    }

    pub(super) fn user_agent(&self) -> String {
        format!("Azure-Functions-Host/{}", self.version())
    }
}

fn sized(request: &Request) -> Payload {
    Payload::Sized(Bytes::copy_from_slice(&request.body))
}

fn admits<'a>(function: &'a Function, method: &Method, path: &str) -> Option<(&'a Function, AuthLevel)> {
    let Trigger::Http { route, methods, auth } = &function.trigger else { return None };
    let listed = methods.as_ref().is_none_or(|methods| methods.iter().any(|listed| listed == method.as_str()));
    (listed && matches_route(route, path)).then_some((function, *auth))
}

/// Without regard to case; one trailing slash is tolerated.
fn matches_route(route: &[Segment], path: &str) -> bool {
    let decoded = decode(path, false);
    let Some(inner) = decoded.strip_prefix('/') else { return false };
    let parts: Vec<&str> = inner.strip_suffix('/').unwrap_or(inner).split('/').collect();
    parts.len() == route.len()
        && route.iter().zip(parts).all(|(segment, part)| match segment {
            Segment::Literal(literal) => literal.to_lowercase() == part.to_lowercase(),
            Segment::Any => !part.is_empty(),
        })
}

/// .NET sends a header once: its values joined by a comma, a space (User-Agent) or a semicolon (Cookie).
fn joined(headers: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut sent: Vec<(String, String)> = Vec::new();
    for (name, value) in headers {
        let separator = match name.to_ascii_lowercase().as_str() {
            "user-agent" => " ",
            "cookie" => "; ",
            _ => ", ",
        };
        match sent.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(&name)) {
            Some((_, values)) => *values = format!("{values}{separator}{value}"),
            None => sent.push((name, value)),
        }
    }
    sent
}

/// Each key once, in its first spelling, with all its values in order.
fn parse_query(query: &str) -> Vec<(String, Vec<String>)> {
    let mut pairs: Vec<(String, Vec<String>)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (decode(key, true), decode(value, true));
        match pairs.iter_mut().find(|(known, _)| known.to_lowercase() == key.to_lowercase()) {
            Some((_, values)) => values.push(value),
            None => pairs.push((key, vec![value])),
        }
    }
    pairs
}

fn rebuild_query(query: &str) -> String {
    let mut rebuilt = String::new();
    for (key, values) in parse_query(query) {
        rebuilt.push(if rebuilt.is_empty() { '?' } else { '&' });
        rebuilt = format!("{rebuilt}{}={}", encode(&key, QUERY_LITERALS), encode(&values.join(","), QUERY_LITERALS));
    }
    rebuilt
}

/// Percent-decodes; `%2F` stays in a path, and `+` is a space in a query.
fn decode(text: &str, query: bool) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text
            .get(at + 1..at + 3)
            .filter(|hex| bytes[at] == b'%' && hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if query || byte != b'/' => {
                decoded.push(byte);
                at += 3;
                continue;
            }
            _ if query && bytes[at] == b'+' => decoded.push(b' '),
            _ => decoded.push(bytes[at]),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn encode(text: &str, literal: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || literal.as_bytes().contains(&byte) {
            encoded.push(byte as char);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}

/// `Uri.AbsolutePath` of the decoded path: what a path may hold stays, the rest is escaped.
fn escape_path(path: &str) -> String {
    encode(path, "-._~!$&'()*+,;=:@/%")
}
