//! The load generator: HTTP/1.1 over connections that are kept alive, every status and body checked.
//!
//! Knows no server. Invariant: an answer that is not exactly what was expected ends the run with an error.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Result,
    catalogue::{Bodies, FIRST},
    process::{Server, cpu},
};

/// How long answers may take: one, and all that are asked for once.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_FOR_ALL: Duration = Duration::from_secs(600);

/// What is sent, and what must come back.
pub struct Request {
    /// The whole request.
    pub bytes: Vec<u8>,
    /// The status.
    pub status: u16,
    /// The body, of which little is kept: ten thousand whole ones would compete with the servers for the processor's
    /// caches.
    body: Digest,
    /// A part of `Cache-Status`.
    pub cache_status: &'static str,
}

impl Request {
    /// `GET`s this path and query.
    pub fn get(target: &str, headers: &str, status: u16, body: &[u8], cache_status: &'static str) -> Self {
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n").into_bytes();
        Self { bytes, status, body: Digest::of(body), cache_status }
    }

    /// `GET`s a product.
    pub fn product(id: i64, bodies: &Bodies, cache_status: &'static str) -> Self {
        Self::get(&target(id), "", 200, bodies.json(id).as_bytes(), cache_status)
    }
}

/// What a body is told by.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Digest {
    length: usize,
    hash: u64,
}

impl Digest {
    fn of(body: &[u8]) -> Self {
        Self { length: body.len(), hash: xxh3_64(body) }
    }
}

/// Path and query of a product.
pub fn target(id: i64) -> String {
    format!("/api/GetProductById?productid={id}")
}

/// Requests for the products from..to (counted from the first), one for each.
pub fn products(range: std::ops::Range<i64>, bodies: &Bodies, cache_status: &'static str) -> Arc<[Request]> {
    range.map(|n| Request::product(FIRST + n, bodies, cache_status)).collect()
}

/// Requests for the products from..to, a hundred in each.
pub fn batches(range: std::ops::Range<i64>, bodies: &Bodies) -> Arc<[Request]> {
    let ids: Vec<_> = range.map(|n| FIRST + n).collect();
    ids.chunks(100).map(|ids| batch(ids, bodies)).collect()
}

/// One request for several products.
pub fn batch(ids: &[i64], bodies: &Bodies) -> Request {
    let list: Vec<_> = ids.iter().map(i64::to_string).collect();
    let parts: Vec<_> = ids.iter().map(|id| bodies.json(*id)).collect();
    let body = if parts.len() == 1 { parts.concat() } else { format!("[{}]", parts.join(",")) };
    Request::get(&format!("/api/GetProductById?productid={}", list.join(",")), "", 200, body.as_bytes(), "")
}

/// Which request comes when.
#[derive(Clone, Copy)]
pub enum Order {
    /// Zipf (exponent 1) over all, the first most often.
    Zipf,
    /// Each as often as any other, at random.
    Uniform,
}

/// What happened.
pub struct Outcome {
    /// Answers.
    pub answers: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Nanoseconds from a request to its whole answer.
    pub latency: Histogram<u64>,
    /// Processor time of the server meanwhile.
    pub server: Duration,
    /// Processor time of the generator meanwhile.
    pub generator: Duration,
}

impl Outcome {
    /// Both together, as if one had followed the other at once.
    pub fn and(mut self, other: Self) -> Result<Self> {
        self.latency.add(&other.latency).map_err(|error| error.to_string())?;
        Ok(Self {
            answers: self.answers + other.answers,
            elapsed: self.elapsed + other.elapsed,
            latency: self.latency,
            server: self.server + other.server,
            generator: self.generator + other.generator,
        })
    }

    /// Answers per second.
    pub fn throughput(&self) -> f64 {
        self.answers as f64 / self.elapsed.as_secs_f64()
    }

    /// Seconds of the server's processor time per answer.
    pub fn cpu(&self) -> f64 {
        self.server.as_secs_f64() / self.answers as f64
    }

    /// Cores that the server kept busy.
    pub fn server_cores(&self) -> f64 {
        self.server.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Cores that the generator kept busy.
    pub fn generator_cores(&self) -> f64 {
        self.generator.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Seconds of real time per answer.
    pub fn time(&self) -> f64 {
        self.elapsed.as_secs_f64() / self.answers as f64
    }

    /// Seconds at this share of the latencies.
    pub fn latency(&self, share: f64) -> f64 {
        self.latency.value_at_quantile(share) as f64 / 1e9
    }
}

/// The requests of a million picks, in this order.
pub fn picks(order: Order, requests: &[Request]) -> Result<Arc<[u32]>> {
    let (mut random, most) = (StdRng::seed_from_u64(7), requests.len() as f64);
    let zipf = rand_distr::Zipf::new(most, 1.0).map_err(|error| error.to_string())?;
    let mut pick = || match order {
        Order::Zipf => random.sample(zipf) as u32 - 1,
        Order::Uniform => random.random_range(0..requests.len() as u32),
    };
    Ok((0..1_000_000).map(|_| pick()).collect())
}

/// Asks for a time, as picked; each connection begins this many picks after its first.
pub async fn for_a_while(
    server: &Server,
    connections: usize,
    requests: &Arc<[Request]>,
    picks: &Arc<[u32]>,
    skip: usize,
    time: Duration,
) -> Result<Outcome> {
    let (stride, picks) = (picks.len() / connections, picks.clone());
    let pick = move |connection, n| Some(picks[(connection * stride + skip + n) % picks.len()] as usize);
    run(server, connections, pick, requests, Some(time)).await
}

/// Asks for each of these once, all connections together.
pub async fn each_once(
    server: &Server,
    connections: usize,
    requests: &Arc<[Request]>,
    range: Range<usize>,
) -> Result<Outcome> {
    let pick = move |connection, n| Some(range.start + connection + n * connections).filter(|index| *index < range.end);
    run(server, connections, pick, requests, None).await
}

/// Asks for each once, all connections together.
pub async fn all_once(server: &Server, connections: usize, requests: &Arc<[Request]>) -> Result<Outcome> {
    each_once(server, connections, requests, 0..requests.len()).await
}

async fn run(
    server: &Server,
    connections: usize,
    pick: impl Fn(usize, usize) -> Option<usize> + Clone + Send + 'static,
    requests: &Arc<[Request]>,
    time: Option<Duration>,
) -> Result<Outcome> {
    let mut opened = Vec::with_capacity(connections);
    for _ in 0..connections {
        opened.push(Connection::open(server.port).await?);
    }
    let (own, theirs, begin) = (cpu(std::process::id()), server.cpu(), Instant::now());
    let mut tasks = JoinSet::new();
    for (index, mut connection) in opened.into_iter().enumerate() {
        let (pick, requests) = (pick.clone(), requests.clone());
        let ask_on = async move {
            let mut times = Vec::new();
            for n in 0.. {
                let sent = Instant::now();
                let over = time.is_some_and(|time| sent - begin >= time);
                let Some(next) = pick(index, n).filter(|_| !over) else { break };
                let request = &requests[next];
                connection.exchange(&request.bytes, Some(request)).await?;
                times.push(sent.elapsed().as_nanos() as u64);
            }
            Ok::<_, String>((times, connection))
        };
        // One timer for all that a connection asks: one for each would cost as much as a small request.
        let late = time.map_or(PATIENCE_FOR_ALL, |time| time + PATIENCE);
        tasks.spawn(async move { timeout(late, ask_on).await.unwrap_or_else(|_| Err("no answer in time".to_owned())) });
    }
    let mut latency = Histogram::new(3).map_err(|error| error.to_string())?;
    let (mut all, mut open) = (Vec::new(), Vec::new());
    while let Some(done) = tasks.join_next().await {
        let (times, connection) = done.map_err(|error| error.to_string())??;
        all.push(times);
        open.push(connection); // closing costs the server time that is none of the requests'
    }
    if time.is_some() && all.iter().any(Vec::is_empty) {
        return Err("a connection asked nothing".to_owned());
    }
    let (elapsed, server, generator) = (begin.elapsed(), server.cpu() - theirs, cpu(std::process::id()) - own);
    all.iter().flatten().for_each(|nanos| latency.saturating_record(*nanos));
    Ok(Outcome { answers: latency.len(), elapsed, latency, server, generator })
}

/// A connection that is kept alive.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What came back; the rest is in the connection's buffer.
struct Head {
    status: u16,
    length: usize,
    body: usize,
}

impl Connection {
    /// Connects to a port of this machine.
    pub async fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| format!("connect: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        // Filled once: the kernel finds memory for it now and not when the first answer comes.
        Ok(Self { stream, buffer: vec![b'-'; 8 * 1024] })
    }

    /// Sends a request and checks its answer.
    pub async fn ask(&mut self, request: &Request) -> Result<()> {
        let exchange = self.exchange(&request.bytes, Some(request));
        timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("no answer in time".to_owned())).map(drop)
    }

    /// Sends any request; gives its status and body, whatever they are.
    pub async fn send(&mut self, request: &[u8]) -> Result<(u16, &[u8])> {
        let head = timeout(PATIENCE, self.exchange(request, None)).await;
        let head = head.unwrap_or_else(|_| Err("no answer in time".to_owned()))?;
        Ok((head.status, &self.buffer[head.body..]))
    }

    async fn exchange(&mut self, request: &[u8], expected: Option<&Request>) -> Result<Head> {
        self.buffer.clear();
        self.stream.write_all(request).await.map_err(|error| format!("send: {error}"))?;
        let head = loop {
            self.receive().await?;
            if let Some(head) = head(&self.buffer)? {
                break head;
            }
        };
        let whole = head.body + head.length;
        self.buffer.reserve(whole.saturating_sub(self.buffer.len()));
        while self.buffer.len() < whole {
            self.receive().await?;
        }
        match expected {
            Some(expected) => self.check(&head, expected).map(|()| head),
            None => Ok(head),
        }
    }

    async fn receive(&mut self) -> Result<()> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err("the server closed a connection".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(format!("receive: {error}")),
        }
    }

    fn check(&self, head: &Head, request: &Request) -> Result<()> {
        let body = Digest::of(&self.buffer[head.body..]);
        let told = find(&self.buffer[..head.body], request.cache_status);
        if head.status == request.status && body == request.body && told {
            return Ok(());
        }
        let first = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(600)]).into_owned();
        Err(format!(
            "a wrong answer to {}: expected {} with {} bytes and {:?}, got {}",
            first(&request.bytes).lines().next().unwrap_or_default(),
            request.status,
            request.body.length,
            request.cache_status,
            first(&self.buffer)
        ))
    }
}

fn head(bytes: &[u8]) -> Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).map_err(|error| format!("not HTTP: {error}"))?;
    let httparse::Status::Complete(body) = parsed else { return Ok(None) };
    let status = response.code.unwrap_or(0);
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse().ok());
    let length = if status == 304 { Some(0) } else { length };
    Ok(Some(Head { status, length: length.ok_or("an answer without a length")?, body }))
}

fn find(head: &[u8], part: &str) -> bool {
    part.is_empty() || head.windows(part.len()).any(|window| window == part.as_bytes())
}
