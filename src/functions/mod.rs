//! The functions: one file per function folder, [`App`], which they share, and the routes that lead to them.
//!
//! Product and cache meet here and nowhere else. Invariant: whatever a handler does, panics included, the client gets
//! an answer and the process lives.

mod change_feed;
mod error;
mod get_product_by_id;
mod invalidate_cache;
mod invocation;
mod status;

use std::{
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use actix_http::Request;
use actix_web::{
    HttpResponse,
    dev::{Payload, RequestHead, ServiceFactory, fn_service},
    http::header::HeaderValue,
};
use futures_util::{
    FutureExt,
    future::{Either, LocalBoxFuture, ready},
};
use tokio::{runtime::Handle, time::timeout};

use self::error::Error;
use self::status::{Counter, Counts};
use crate::{
    background::{Task, keep_running},
    cache::{Cache, Entry, Failure, Feed, Key, Load, entry::Body},
    config::Config,
    database::Database,
    foreground::Foreground,
    product,
    redis::Redis,
    telemetry::LogLimiter,
};

/// How long a stop waits for Redis to take the last expiries.
const LAST_EXPIRIES: Duration = Duration::from_secs(1);

/// What all functions share: one Redis pool (inside the cache), one database pool, one cache.
pub struct App {
    config: Config,
    cache_control: HeaderValue,
    database: Arc<Database>,
    cache: Cache,
    load: Load,
    counts: Arc<Counts>,
    background: Handle,
    foreground: Foreground,
    /// Requests to what is the host's.
    strangers: LogLimiter,
    /// Requests that reached their deadline.
    late: LogLimiter,
    started: Instant,
}

impl App {
    /// Builds everything; connects to nothing before it is used. What no request asks for runs on `background`.
    pub fn start(config: Config, background: &Handle) -> Result<Arc<Self>, String> {
        let (database, counts) = (Arc::new(Database::new(&config.database)), Arc::new(Counts::default()));
        let foreground = Foreground::default();
        let redis = config.redis.as_ref().map(|redis| Redis::start(redis, background, &foreground)).transpose()?;
        let feed = if database.feed_interval().is_some() { Feed::Database } else { Feed::None };
        let cache = Cache::start(
            &config.cache,
            redis.zip(config.redis.as_ref()),
            feed,
            &[product::KIND],
            background,
            &foreground,
        );
        let cache_control = HeaderValue::from_str(&config.http.cache_control);
        Ok(Arc::new(Self {
            cache_control: cache_control.unwrap_or_else(|_| HeaderValue::from_static("no-cache")),
            load: load_products(database.clone(), counts.clone()),
            counts,
            background: background.clone(),
            foreground,
            strangers: LogLimiter::default(),
            late: LogLimiter::default(),
            started: Instant::now(),
            config,
            database,
            cache,
        }))
    }

    /// Follows the database's change feed until the task is dropped; `None` if it is off.
    pub fn follow_changes(self: &Arc<Self>) -> Option<Task> {
        let interval = self.database.feed_interval()?;
        let app = self.clone();
        let follow = move || change_feed::follow(app.clone(), interval);
        Some(keep_running(&self.background, "change feed", follow))
    }

    /// Waits a moment until Redis has been told of every expiry; says how many it has not.
    pub async fn settle(&self) {
        if timeout(LAST_EXPIRIES, self.cache.settled()).await.is_err() {
            let status = self.cache.status();
            let (expiries, everything) = (status.expiries_queued, status.everything_queued);
            tracing::warn!(expiries, everything, "stopping, though Redis was not told of all that changed");
        }
    }

    /// The database, for the start screen and the end.
    pub fn database(&self) -> &Database {
        &self.database
    }
}

/// The only place where products become entries.
fn load_products(database: Arc<Database>, counts: Arc<Counts>) -> Load {
    Arc::new(move |keys: Vec<Key>| {
        let database = database.clone();
        counts.add(Counter::Loads, 1);
        async move {
            let ids: Vec<_> = keys.iter().map(Key::id).collect();
            let products = product::load(&database, &ids).await;
            let products = products.map_err(|error| Failure::Unavailable(error.to_string()))?;
            let found = products.into_iter().map(|product| match product {
                Ok(product) => (Key::new(product::KIND, product.id), Ok(entry(product))),
                Err(row) => (Key::new(product::KIND, row.key), Err(Failure::Unavailable(row.to_string()))),
            });
            Ok(found.collect())
        }
        .boxed()
    })
}

fn entry(product: product::Product) -> Entry {
    // A date to come would be refused as a validator (RFC 9110, section 8.8.2.1).
    let modified = product.modified.filter(|modified| *modified <= chrono::Utc::now().naive_utc());
    let last_modified = modified.map(|modified| modified.format("%a, %d %b %Y %H:%M:%S GMT").to_string());
    Entry::Found(Body::new(&product.json, last_modified.as_deref()))
}

/// The answer, if it takes nothing but memory.
type AtOnce = fn(&App, &RequestHead) -> Option<Result<HttpResponse, Error>>;
/// Every other answer.
type Later = for<'a> fn(&'a App, &'a RequestHead, Payload) -> LocalBoxFuture<'a, Result<HttpResponse, Error>>;

/// What a path leads to.
pub(crate) struct Route {
    /// Name of the function's folder.
    pub(crate) function: &'static str,
    /// Who may call it, and where.
    pub(crate) trigger: Trigger,
    /// Allowed methods.
    pub(crate) methods: &'static [&'static str],
    at_once: AtOnce,
    later: Later,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// Clients, by way of the host, which passes their path on: `/<prefix>/<function>` in whatever case.
    Http,
    /// The host itself: `/<function>`, from this machine.
    Host,
}

/// One line per function folder.
pub(crate) const ROUTES: &[Route] = &[
    Route {
        function: "GetProductById",
        trigger: Trigger::Http,
        methods: &["GET", "HEAD"],
        at_once: get_product_by_id::at_once,
        later: |app, head, _| get_product_by_id::later(app, head).boxed_local(),
    },
    Route {
        function: "InvalidateCache",
        trigger: Trigger::Host,
        methods: &["POST"],
        at_once: |_, _| None,
        later: |app, head, payload| invalidate_cache::handle(app, head, payload).boxed_local(),
    },
];

/// What the server does with each request: what memory can answer is answered on the spot, without a future to box and a
/// router to walk; the rest waits for Redis, the database or the request's body.
pub fn service<C>(
    app: Arc<App>,
) -> impl ServiceFactory<Request, Config = C, Response = HttpResponse, Error = actix_web::Error, InitError = ()> {
    app.foreground.is_here();
    fn_service(move |mut request: Request| match answer_at_once(&app, request.head(), request.peer_addr()) {
        Ok(response) => Either::Left(ready(Ok(response))),
        Err(route) => {
            let app = app.clone();
            Either::Right(async move {
                let payload = request.take_payload();
                let answer = AssertUnwindSafe((route.later)(&app, request.head(), payload)).catch_unwind().await;
                Ok(respond(&app.counts, request.head(), answer))
            })
        }
    })
}

/// The response, or the route that leads to it.
fn answer_at_once(app: &App, head: &RequestHead, peer: Option<SocketAddr>) -> Result<HttpResponse, &'static Route> {
    let answer = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let path = head.uri.path();
        if path == "/" {
            // The host's readiness probe and health ping: answers from memory alone.
            return Ok(Ok(HttpResponse::Ok().json(app.status())));
        }
        match find(app, path, head, peer) {
            Ok(route) => (route.at_once)(app, head).ok_or(route),
            Err(error) => Ok(Err(error)),
        }
    }));
    match answer {
        Ok(Err(route)) => Err(route),
        Ok(Ok(answer)) => Ok(respond(&app.counts, head, Ok(answer))),
        Err(panic) => Ok(respond(&app.counts, head, Err(panic))),
    }
}

/// Turns whatever a handler did into a response.
fn respond(counts: &Counts, head: &RequestHead, outcome: thread::Result<Result<HttpResponse, Error>>) -> HttpResponse {
    let outcome = outcome.unwrap_or_else(|_| Err(Error::Broken("a handler panicked".to_owned())));
    outcome.unwrap_or_else(|error| {
        if let Error::Broken(problem) = &error {
            counts.add(Counter::Bugs, 1);
            tracing::error!(problem, invocation = invocation_id(head), "a bug");
        }
        error.response(invocation_id(head))
    })
}

/// The route of a request that may take it.
fn find(app: &App, path: &str, head: &RequestHead, peer: Option<SocketAddr>) -> Result<&'static Route, Error> {
    let nothing_here = || Error::NotFound("there is no such function".to_owned());
    let prefix = &app.config.http.route_prefix;
    let route = ROUTES.iter().find(|route| route.matches(path, prefix)).ok_or_else(nothing_here)?;
    if route.trigger == Trigger::Host
        && let Some(why) = why_not_the_host(head, peer)
    {
        if let Some(unsaid) = app.strangers.next() {
            tracing::warn!(unsaid, "{}: a request that is not the host's is refused: {why}", route.function);
        }
        return Err(nothing_here());
    }
    if !route.methods.contains(&head.method.as_str()) {
        return Err(Error::MethodNotAllowed(route.methods));
    }
    Ok(route)
}

impl Route {
    fn matches(&self, path: &str, prefix: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        match self.trigger {
            Trigger::Host => path == self.function,
            Trigger::Http => {
                let path = path.strip_suffix('/').unwrap_or(path);
                let rest = match path.get(..prefix.len()) {
                    _ if prefix.is_empty() => Some(path),
                    Some(start) if start.eq_ignore_ascii_case(prefix) => path[prefix.len()..].strip_prefix('/'),
                    _ => None,
                };
                rest.is_some_and(|rest| rest == self.function || rest.eq_ignore_ascii_case(self.function))
            }
        }
    }
}

/// What shows that the Functions host did not make this request of its own accord: from this machine, to this machine's
/// address, and not on behalf of somebody else.
fn why_not_the_host(head: &RequestHead, peer: Option<SocketAddr>) -> Option<&'static str> {
    if !peer.is_some_and(|peer| peer.ip().is_loopback()) {
        return Some("it comes from another machine");
    }
    if head.headers.keys().any(|name| name.as_str().starts_with("x-forwarded-")) {
        return Some("it was forwarded");
    }
    if head.headers.contains_key("origin") {
        return Some("a web page sent it");
    }
    let host = head.headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let is_port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let name = host.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(host, |(name, _)| name);
    let to_loopback = name.eq_ignore_ascii_case("localhost")
        || name.trim_matches(['[', ']']).parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
    (!to_loopback).then_some("it is addressed to another machine")
}

/// The host's id of this invocation, which it adds after what a client sent under that name.
fn invocation_id(head: &RequestHead) -> Option<&str> {
    let last = head.headers.get_all("x-azure-functions-invocationid").last()?.to_str().ok()?;
    let id = last.rsplit(',').next()?.trim();
    Some(id.get(..64).unwrap_or(id)).filter(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_graphic()))
}

#[cfg(test)]
mod tests {
    use actix_web::{body::to_bytes, test::TestRequest};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_handler_that_panics_is_a_500_with_the_invocations_id_and_nothing_else() {
        let counts = Counts::default();
        let request = TestRequest::default().insert_header(("x-azure-functions-invocationid", "an-id")).to_request();
        let response = respond(&counts, request.head(), std::panic::catch_unwind(|| panic!("secret")));
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers().get("content-type").expect("a type"), "application/problem+json");
        let body = to_bytes(response.into_body()).await.expect("a body");
        let problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        let expected =
            json!({"type": "about:blank", "title": "Internal Server Error", "status": 500, "invocationId": "an-id"});
        assert_eq!(problem, expected);
        assert_eq!(counts.read()[Counter::Bugs as usize], 1);
    }

    #[test]
    fn an_invocations_id_is_the_last_one_which_the_host_adds() {
        let ids = |values: &[&str]| {
            let name = "x-azure-functions-invocationid";
            let request =
                values.iter().fold(TestRequest::default(), |request, value| request.append_header((name, *value)));
            invocation_id(request.to_request().head()).map(str::to_owned)
        };
        for values in [&["hosts"][..], &["a client's", "hosts"], &["a,b, hosts"]] {
            assert_eq!(ids(values).as_deref(), Some("hosts"), "{values:?}");
        }
        assert_eq!(ids(&["x".repeat(65).as_str()]).map(|id| id.len()), Some(64));
        for values in [&[][..], &[""], &["hosts,"], &["two words"]] {
            assert_eq!(ids(values), None, "{values:?}");
        }
    }

    #[test]
    fn only_this_machine_and_only_for_itself_may_call_what_is_the_hosts() {
        let from = |peer: &str, host: &str| {
            let request = TestRequest::default().peer_addr(peer.parse().expect("an address"));
            let request = request.insert_header(("host", host)).to_request();
            why_not_the_host(request.head(), request.peer_addr()).is_none()
        };
        assert!(from("127.0.0.1:5000", "127.0.0.1:7071") && from("[::1]:5000", "[::1]"));
        assert!(!from("192.0.2.1:5000", "127.0.0.1:7071"), "another machine");
        assert!(!from("127.0.0.1:5000", "shop.example"), "another name");
        assert!(why_not_the_host(TestRequest::default().to_request().head(), None).is_some(), "nobody knows who");
    }
}
