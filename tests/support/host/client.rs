//! The host's one HTTP client towards the handler: HTTP/1.1, kept-alive connections, no cookies, no redirects.
//!
//! It owns the pool and counts every connection it opens, so a test can tell whether a pause reset one. It knows
//! nothing of dialects: what it is given goes out as it stands, plus the framing header the payload asks for.
//! Invariant: a connection is in `idle` only after a whole response was read from it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::{Body, Frame};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Method, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An idle connection older than this is closed instead of reused. The host's own limit is about 60 s; a longer one
/// here shows a handler that hangs up after 65 s of silence, which the host would meet under steady slow traffic.
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// Loopback answers a connect at once, unless the handler's backlog is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// After the last byte of a response the connection becomes writable again within one turn of its task.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// The pieces of a chunked payload; small, so that a handler which reads only one chunk is found out.
const CHUNK_BYTES: usize = 4096;

pub(super) enum Payload {
    Empty,
    /// Sent with `Content-Length`.
    Sized(Bytes),
    /// Sent with `Transfer-Encoding: chunked`.
    Chunked(Bytes),
}

pub(super) struct Outgoing {
    pub method: Method,
    /// Path and query, as they stand on the request line.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub payload: Payload,
}

/// A whole response; header names are in lower case.
pub(super) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

#[derive(Debug)]
pub(super) enum Lost {
    /// No connection: nothing listens, or it refused.
    Connect(String),
    /// The connection broke, or what came back was not HTTP.
    Transport(String),
    /// The request itself cannot be written.
    Unsendable(String),
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Lost::Connect(reason) => write!(f, "connection failed: {reason}"),
            Lost::Transport(reason) => write!(f, "connection lost: {reason}"),
            Lost::Unsendable(reason) => write!(f, "request cannot be sent: {reason}"),
        }
    }
}

type Sender = SendRequest<BoxBody<Bytes, Infallible>>;

pub(super) struct Client {
    address: SocketAddr,
    idle: Mutex<Vec<(Sender, Instant)>>,
    opened: AtomicUsize,
}

impl Client {
    /// The host always dials IPv4 loopback, never `localhost`.
    pub fn new(port: u16) -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, port).into(), idle: Mutex::default(), opened: AtomicUsize::new(0) }
    }

    pub fn connections_opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    /// Closes the idle connections; their process is gone.
    pub fn clear(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// One request and its whole response. The caller sets the deadline; dropping the future closes the connection.
    ///
    /// A kept connection that turns out to be dead is replaced once by a new one if no response byte came and no
    /// payload was sent, as `SocketsHttpHandler` does.
    pub async fn send(&self, request: &Outgoing) -> Result<Answer, Lost> {
        while let Some(sender) = self.take_idle() {
            match self.exchange(sender, request).await {
                Err(Broken { replayable: true, .. }) => continue,
                other => return other.map_err(|broken| broken.lost),
            }
        }
        let sender = self.connect().await?;
        self.exchange(sender, request).await.map_err(|broken| broken.lost)
    }

    fn take_idle(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((sender, since)) = idle.pop() {
            if since.elapsed() < IDLE_LIMIT && !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    async fn connect(&self) -> Result<Sender, Lost> {
        let failed = |error: &dyn std::fmt::Display| Lost::Connect(error.to_string());
        let stream = timeout(CONNECT_LIMIT, TcpStream::connect(self.address))
            .await
            .map_err(|_| Lost::Connect("timed out".into()))?
            .map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        self.opened.fetch_add(1, Ordering::SeqCst);
        let (sender, connection) = http1::Builder::new()
            .title_case_headers(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Lost::Transport(error.to_string()))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn exchange(&self, mut sender: Sender, request: &Outgoing) -> Result<Answer, Broken> {
        let built = request.build().map_err(|reason| Broken { lost: Lost::Unsendable(reason), replayable: false })?;
        let no_payload = matches!(request.payload, Payload::Empty);
        sender.ready().await.map_err(|error| Broken::of(error, true))?;
        let response = sender.send_request(built).await.map_err(|error| {
            let never_sent = error.is_canceled();
            let unanswered = error.is_incomplete_message() || error.is_closed();
            Broken::of(error, never_sent || (no_payload && unanswered))
        })?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| Broken::of(error, false))?.to_bytes();
        if let Ok(Ok(())) = timeout(SETTLE_LIMIT, sender.ready()).await {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push((sender, Instant::now()));
        }
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        Ok(Answer { status: head.status.as_u16(), headers, body })
    }
}

struct Broken {
    lost: Lost,
    replayable: bool,
}

impl Broken {
    fn of(error: hyper::Error, replayable: bool) -> Self {
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Self { lost: Lost::Transport(reason), replayable }
    }
}

impl Outgoing {
    fn build(&self) -> Result<hyper::Request<BoxBody<Bytes, Infallible>>, String> {
        let body = match &self.payload {
            Payload::Empty => Full::new(Bytes::new()).boxed(),
            Payload::Sized(bytes) => Full::new(bytes.clone()).boxed(),
            Payload::Chunked(bytes) => Pieces::of(bytes).boxed(),
        };
        let mut request = hyper::Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target.parse::<Uri>().map_err(|error| format!("{:?}: {error}", self.target))?;
        for (name, value) in &self.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|error| format!("{name:?}: {error}"))?;
            let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|error| format!("{name}: {error}"))?;
            request.headers_mut().append(name, value);
        }
        Ok(request)
    }
}

/// A body that does not tell its length.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    fn of(bytes: &Bytes) -> Self {
        Self(
            (0..bytes.len())
                .step_by(CHUNK_BYTES)
                .map(|at| bytes.slice(at..bytes.len().min(at + CHUNK_BYTES)))
                .collect(),
        )
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}
