//! Changes: how fast a batch of them is read, and how soon the last instance is right.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::try_join_all};
use tokio::time::timeout;

use super::{Bench, Catalogue, fill, handler, settings};
use crate::{
    Result,
    catalogue::{Bodies, FIRST, Rows, Size, sqlite},
    load::{self, Connection, Order, Request},
    process::Server,
    report::Bound,
    servers::redis::RedisServer,
};

/// A trigger's batch, as the host sends it: JSON in a string in a string.
pub(super) fn trigger(rows: &[String]) -> Vec<u8> {
    let rows: Vec<_> = rows.iter().map(|row| format!("{{\"Operation\":1,\"Item\":{row}}}")).collect();
    let text = format!("[{}]", rows.join(","));
    let once = serde_json::Value::from(text).to_string();
    let twice = serde_json::Value::from(once).to_string();
    post("/InvalidateCache", &format!("{{\"Data\":{{\"changes\":{twice}}},\"Metadata\":{{}}}}"))
}

fn post(path: &str, body: &str) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json");
    format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn deliver(connection: &mut Connection, batch: &[u8]) -> Result<()> {
    match connection.send(batch).await? {
        (200, _) => Ok(()),
        (status, body) => Err(format!("a change: {status} {}", String::from_utf8_lossy(body))),
    }
}

/// A thousand rows with photos: bytes per second of processor time, everything that the handler does with them included.
pub(super) async fn decode(bench: &mut Bench) -> Result<()> {
    let catalogue = Catalogue::new(1_000, Size::Large, Rows::Stored).await?;
    let bodies = Bodies::new(Size::Large);
    let rows: Vec<_> = (0..1_000).map(|n| bodies.json(FIRST + n).replacen("productID", "ProductID", 1)).collect();
    let batch = trigger(&rows);
    let server = handler(settings(catalogue.url(), None, 1)).await?;
    let mut connection = Connection::open(server.port).await?;
    let mut rounds = Vec::new();
    for round in 0..=bench.rounds() {
        let before = server.cpu();
        for _ in 0..10 {
            deliver(&mut connection, &batch).await?;
        }
        let seconds = (server.cpu() - before).as_secs_f64();
        if round > 0 {
            rounds.push((batch.len() as f64 * 10.0 / seconds / 1e6, 200.0));
        }
    }
    let scenario = "InvalidateCache, 1,000 rows with photos: MB per second of CPU";
    bench.report.add(scenario, "MB/s", "200 MB/s", Bound::AtLeast(1.0), &rounds);
    Ok(())
}

/// From the moment an expiry is sent to one instance until the last of them answers with the new row.
pub(super) async fn expiry(bench: &mut Bench) -> Result<()> {
    let catalogue = Catalogue::new(1_000, Size::Large, Rows::Stored).await?;
    for instances in if bench.quick { vec![4] } else { vec![4, 16] } {
        let redis = RedisServer::start().await;
        let (mut servers, mut functions) = (Vec::new(), Vec::new());
        for _ in 0..instances {
            let mut settings = settings(catalogue.url(), Some(redis.url()), 1);
            settings.push(("FEED_INTERVAL_MS", "0".to_owned()));
            servers.push(handler(settings).await?);
            functions.push(Server::start("pub_sub", vec![("REDIS_URL", redis.url())])?);
        }
        let name = format!("expiry to the last of {instances} instances");
        let mut pub_sub = PubSub::new(&redis, instances).await?;
        let idle = expiries(bench, &catalogue, &servers, &functions, &mut pub_sub).await?;
        add(bench, &format!("{name}, idle"), &idle, 0.4e-3, 1.5e-3);
        let load = HalfLoad::start(&servers).await?;
        let busy = expiries(bench, &catalogue, &servers, &functions, &mut pub_sub).await?;
        load.stop().await?;
        add(bench, &format!("{name}, 50 % load"), &busy, f64::INFINITY, 5e-3);
    }
    Ok(())
}

/// What one change took, and what the references took for one like it: in the same state, right after a row was changed.
struct Expiry {
    ours: Told,
    /// Plain pub/sub, to the last of as many subscribers, in seconds.
    pub_sub: f64,
    /// A function that does no more than that.
    function: Told,
}

/// Seconds from sending a change to one instance.
struct Told {
    acknowledged: f64,
    /// The last wrong answer of any instance; the acknowledgement, if there is none.
    no_longer_wrong: f64,
    /// The first right answer of the last instance; ours load the row for it.
    right: f64,
}

fn add(bench: &mut Bench, name: &str, expiries: &[Expiry], p50: f64, p99: f64) {
    let at = |seconds: fn(&Expiry) -> f64, share: f64| {
        let mut seconds: Vec<_> = expiries.iter().map(seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[((seconds.len() - 1) as f64 * share).round() as usize]
    };
    // Plain pub/sub took 0.16 ms (p50) and 0.27 ms (p99) where the milliseconds were set: as ratios they hold anywhere.
    for (share, label, target, plain) in [(0.5, "p50", p50, 0.16e-3), (0.99, "p99", p99, 0.27e-3)] {
        let bound =
            if p50.is_finite() { Bound::AtMost((target / plain * 10.0_f64).round() / 10.0) } else { Bound::None };
        let scenario = format!("{name}, no longer wrong against pub/sub: {label}");
        let ours = at(|expiry| expiry.ours.no_longer_wrong, share);
        bench.report.add(&scenario, "s", "plain pub/sub", bound, &[(ours, at(|expiry| expiry.pub_sub, share))]);
        let scenario = format!("{name}, no longer wrong against a function with pub/sub: {label}");
        let function = at(|expiry| expiry.function.no_longer_wrong, share);
        bench.report.add(&scenario, "s", "pub_sub", Bound::None, &[(ours, function)]);
    }
    type Moment = (&'static str, fn(&Expiry) -> f64, bool);
    let moments: [Moment; 3] = [
        ("acknowledged", |expiry| expiry.ours.acknowledged, false),
        ("no longer wrong", |expiry| expiry.ours.no_longer_wrong, true),
        ("right, the row loaded anew", |expiry| expiry.ours.right, false),
    ];
    for (moment, seconds, bounded) in moments {
        for (share, label, target) in [(0.5, "p50", p50), (0.99, "p99", p99)] {
            let bound = if bounded && target.is_finite() { Bound::AtMost(1.0) } else { Bound::None };
            let target = if target.is_finite() { target } else { 0.4e-3 };
            let scenario = format!("{name}, {moment}: {label}");
            let reference = format!("{} ms", target * 1e3);
            bench.report.add(&scenario, "s", &reference, bound, &[(at(seconds, share), target)]);
        }
    }
}

async fn expiries(
    bench: &Bench,
    catalogue: &Catalogue,
    servers: &[Server],
    functions: &[Server],
    pub_sub: &mut PubSub,
) -> Result<Vec<Expiry>> {
    let count = if bench.quick { 100 } else { 1_000 };
    let (mut ours, mut theirs) = (Instances::new(servers).await?, Instances::new(functions).await?);
    let mut found = Vec::new();
    for n in 0..count {
        let id = FIRST + n % 900; // the others are read meanwhile
        let request = format!("GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", load::target(id)).into_bytes();
        let name = format!("Changed {n} of {}", servers[0].port);
        // What was done just before counts, so the same comes before each.
        let change = async |ours: &mut Instances| {
            ours.ask(&request).await?;
            sqlite(&catalogue.file(), &format!("UPDATE product SET Name = '{name}' WHERE ProductID = {id}")).await
        };
        change(&mut ours).await?;
        let pub_sub = pub_sub.publish().await?;
        change(&mut ours).await?;
        let function = theirs.tell(&post("/", &name), &request, &name).await?;
        change(&mut ours).await?;
        let ours = ours.tell(&trigger(&[format!("{{\"ProductID\":{id}}}")]), &request, &name).await?;
        found.push(Expiry { ours, pub_sub, function });
    }
    Ok(found)
}

/// One to tell of changes, and all to ask.
struct Instances {
    told: Connection,
    readers: Vec<Connection>,
}

impl Instances {
    async fn new(servers: &[Server]) -> Result<Self> {
        let told = Connection::open(servers[0].port).await?;
        let readers = try_join_all(servers.iter().map(|server| Connection::open(server.port))).await?;
        Ok(Self { told, readers })
    }

    async fn ask(&mut self, request: &[u8]) -> Result<()> {
        for reader in &mut self.readers {
            reader.send(request).await?;
        }
        Ok(())
    }

    /// Tells one of a change, and then asks all until each answers with this in the body.
    async fn tell(&mut self, change: &[u8], request: &[u8], new: &str) -> Result<Told> {
        let sent = Instant::now();
        deliver(&mut self.told, change).await?;
        let acknowledged = Instant::now();
        let right = self.readers.iter_mut().map(|reader| async {
            let mut wrong = acknowledged;
            loop {
                let (status, body) = reader.send(request).await?;
                if status != 200 {
                    return Err(format!("{status} after an expiry"));
                }
                if body.windows(new.len()).any(|part| part == new.as_bytes()) {
                    return Ok((wrong, Instant::now()));
                }
                wrong = Instant::now();
                if acknowledged.elapsed() > Duration::from_secs(10) {
                    return Err("an instance stayed wrong for 10 s".to_owned());
                }
            }
        });
        let moments = try_join_all(right).await?;
        let last = |moment: Option<Instant>| (moment.unwrap_or(acknowledged) - sent).as_secs_f64();
        Ok(Told {
            acknowledged: last(None),
            no_longer_wrong: last(moments.iter().map(|(wrong, _)| *wrong).max()),
            right: last(moments.iter().map(|(_, right)| *right).max()),
        })
    }
}

/// The least that Redis can tell others with: a channel, and subscribers that do nothing.
struct PubSub {
    publisher: ::redis::aio::MultiplexedConnection,
    subscribers: Vec<::redis::aio::PubSub>,
}

impl PubSub {
    const CHANNEL: &str = "bench:plain";

    async fn new(redis: &RedisServer, subscribers: usize) -> Result<Self> {
        let client = ::redis::Client::open(redis.url()).map_err(|error| error.to_string())?;
        let publisher = client.get_multiplexed_async_connection().await.map_err(|error| error.to_string())?;
        let mut made = Self { publisher, subscribers: Vec::new() };
        for _ in 0..subscribers {
            let mut subscriber = client.get_async_pubsub().await.map_err(|error| error.to_string())?;
            subscriber.subscribe(Self::CHANNEL).await.map_err(|error| error.to_string())?;
            made.subscribers.push(subscriber);
        }
        Ok(made)
    }

    /// Seconds until the last one has it.
    async fn publish(&mut self) -> Result<f64> {
        let Self { publisher, subscribers } = self;
        let mut command = ::redis::cmd("PUBLISH");
        command.arg(Self::CHANNEL).arg("product:680");
        let hear = subscribers.iter_mut().map(|subscriber| async {
            let message = timeout(Duration::from_secs(10), subscriber.on_message().next()).await;
            message.ok().flatten().map(|_| Instant::now()).ok_or_else(|| "a message is missing".to_owned())
        });
        let sent = Instant::now();
        let published = async { command.query_async::<i64>(publisher).await.map_err(|error| error.to_string()) };
        let (_, heard) = tokio::try_join!(published, try_join_all(hear))?;
        Ok((heard.into_iter().max().unwrap_or(sent) - sent).as_secs_f64())
    }
}

/// Warm hits on all instances at half of what one core can do with them, from a thread of their own.
struct HalfLoad {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl HalfLoad {
    async fn start(servers: &[Server]) -> Result<Self> {
        // Not those that are changed: their bodies are known.
        let bodies = Bodies::new(Size::Large);
        let requests = load::products(900..1_000, &bodies, "L1; hit");
        let picks = load::picks(Order::Zipf, &requests)?;
        let mut most = 0.0;
        for server in servers {
            fill(server, 900..1_000, &bodies).await?;
            let time = Duration::from_millis(400);
            most = load::for_a_while(server, 8, &requests, &picks, 0, time).await?.throughput();
        }
        let ports: Vec<_> = servers.iter().map(|server| server.port).collect();
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(|error| error.to_string())?.block_on(ask_evenly(&ports, most / 2.0, &requests, &until))
        });
        Ok(Self { over, thread })
    }

    async fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err("the load's thread panicked".to_owned()))
    }
}

/// Asks all ports in turn, this often per second together, until it is over.
async fn ask_evenly(ports: &[u16], per_second: f64, requests: &[Request], over: &AtomicBool) -> Result<()> {
    let connections = (16 / ports.len()).max(1) * ports.len();
    let pause = Duration::from_secs_f64(connections as f64 / per_second);
    let ask = |n: usize| async move {
        let mut connection = Connection::open(ports[n % ports.len()]).await?;
        let begin = Instant::now();
        let mut asked = 0;
        while !over.load(Ordering::Relaxed) {
            let due = begin + pause * asked;
            let early = due.saturating_duration_since(Instant::now());
            if early > Duration::ZERO {
                tokio::time::sleep(early).await; // a millisecond at least: then some are due at once
            }
            connection.ask(&requests[(n + asked as usize) % requests.len()]).await?;
            asked += 1;
        }
        Ok::<_, String>(())
    };
    try_join_all((0..connections).map(ask)).await.map(drop)
}
