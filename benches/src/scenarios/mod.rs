//! The scenarios: what is measured, against what, and what it should reach.
//!
//! Each starts its own servers and stops them. Invariant: what is compared is measured in short turns (A B, B A, …), with
//! the same workers, bodies of the same size and the same number of connections. For hits in memory, servers of one worker
//! have a core to themselves ([`crate::process::Cores`]); where others take part, Linux places them all.

mod hits;
mod invalidation;
mod misses;
mod neighbours;
mod scale;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::future::{FutureExt, LocalBoxFuture};
use tokio::time::{Instant, sleep};

use crate::{
    Result,
    catalogue::{self, Bodies, Rows, Size},
    load::{self, Connection, Order, Outcome, Request},
    process::{Server, Settings},
    report::{Bound, Report},
};

/// A run.
pub struct Bench {
    /// Few and short rounds.
    pub quick: bool,
    /// What it has found.
    pub report: Report,
    /// Folder of BentoCache and what it needs, if it is installed.
    pub bentocache: Option<PathBuf>,
}

type Run = for<'a> fn(&'a mut Bench) -> LocalBoxFuture<'a, Result<()>>;

/// Names, in the order in which they run.
pub const SCENARIOS: &[(&str, Run)] = &[
    ("warm-hit", |bench| hits::warm(bench).boxed_local()),
    ("not-modified", |bench| hits::not_modified(bench).boxed_local()),
    ("l2-hit", |bench| hits::l2(bench).boxed_local()),
    ("batch", |bench| hits::batch(bench).boxed_local()),
    ("miss", |bench| misses::miss(bench).boxed_local()),
    ("stampede", |bench| misses::stampede(bench).boxed_local()),
    ("decode", |bench| invalidation::decode(bench).boxed_local()),
    ("expiry", |bench| invalidation::expiry(bench).boxed_local()),
    ("clients", |bench| scale::clients(bench).boxed_local()),
    ("growth", |bench| scale::growth(bench).boxed_local()),
    ("start", |bench| scale::start(bench).boxed_local()),
    ("memory", |bench| scale::memory(bench).boxed_local()),
    ("cache-aside", |bench| neighbours::cache_aside(bench).boxed_local()),
    ("bentocache", |bench| neighbours::bentocache(bench).boxed_local()),
];

impl Bench {
    /// Rounds per comparison.
    fn rounds(&self) -> usize {
        if self.quick { 3 } else { 9 }
    }

    /// How often servers are started anew for a comparison, and how many rounds each of their lives has. Where a process's
    /// memory comes to lie may change what its requests cost, for as long as it lives.
    fn lives(&self) -> (usize, usize) {
        (3, self.rounds() / 3)
    }

    /// How long each side is asked in a round, all its turns together.
    fn time(&self) -> Duration {
        if self.quick { Duration::from_millis(800) } else { Duration::from_secs(3) }
    }

    /// Adds throughput and processor time of the same rounds.
    fn add_both(
        &mut self,
        scenario: &str,
        reference: &str,
        throughput: Bound,
        cpu: Bound,
        rounds: &[(Outcome, Outcome)],
    ) {
        let each = |number: fn(&Outcome) -> f64| -> Vec<_> {
            rounds.iter().map(|(ours, theirs)| (number(ours), number(theirs))).collect()
        };
        let report = &mut self.report;
        report.add(&format!("{scenario}: throughput"), "1/s", reference, throughput, &each(Outcome::throughput));
        report.add(&format!("{scenario}: CPU per request"), "s", reference, cpu, &each(Outcome::cpu));
        // Whether the servers or the generator were what limited the throughput; apart, the generator is always busy.
        report.note(&format!("{scenario}: cores busy"), "server", &each(Outcome::server_cores));
        report.note(&format!("{scenario}: cores busy"), "generator", &each(Outcome::generator_cores));
    }
}

/// One of two that are compared.
struct Side<'a> {
    server: &'a Server,
    connections: usize,
    requests: &'a Arc<[Request]>,
    order: Order,
}

/// In how many turns a round is measured: what else a shared machine does lasts longer than one, and so meets both sides.
const TURNS: usize = 10;

/// Asks both in turns, for these rounds; what is asked for depends on the round.
async fn turns(
    bench: &Bench,
    rounds: Range<usize>,
    ours: Side<'_>,
    theirs: Side<'_>,
) -> Result<Vec<(Outcome, Outcome)>> {
    let sides =
        [(&ours, load::picks(ours.order, ours.requests)?), (&theirs, load::picks(theirs.order, theirs.requests)?)];
    let ask = async |index: usize, turn: usize, time: Duration| {
        let (side, picks) = &sides[index];
        let skip = turn * 10_007; // more than a connection asks in a turn
        load::for_a_while(side.server, side.connections, side.requests, picks, skip, time).await
    };
    for index in [0, 1] {
        ask(index, 0, bench.time() / 2).await?; // caches of the processor, branch predictors, page tables
    }
    let mut found = Vec::new();
    for round in rounds {
        let turn = async |index, turn| ask(index, round * TURNS + turn, bench.time() / TURNS as u32).await;
        found.push(one_round(turn).await?);
    }
    Ok(found)
}

/// Asks both for each of their products once, in turns.
async fn each_once_in_turns(
    connections: usize,
    ours: (&Server, &Arc<[Request]>),
    theirs: (&Server, &Arc<[Request]>),
) -> Result<(Outcome, Outcome)> {
    one_round(async |index, turn| {
        let (server, requests) = [ours, theirs][index];
        let part = requests.len().div_ceil(TURNS);
        let range = (turn * part).min(requests.len())..((turn + 1) * part).min(requests.len());
        load::each_once(server, connections, requests, range).await
    })
    .await
}

/// Ours and theirs of a round: A B, B A, A B …
async fn one_round(ask: impl AsyncFn(usize, usize) -> Result<Outcome>) -> Result<(Outcome, Outcome)> {
    let mut both: [Option<Outcome>; 2] = [None, None];
    for turn in 0..TURNS {
        for index in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
            let outcome = ask(index, turn).await?;
            both[index] = Some(match both[index].take() {
                Some(before) => before.and(outcome)?,
                None => outcome,
            });
        }
    }
    let [Some(ours), Some(theirs)] = both else { return Err("a round without turns".to_owned()) };
    Ok((ours, theirs))
}

/// A SQLite file with products; it goes with its owner.
struct Catalogue {
    folder: tempfile::TempDir,
}

impl Catalogue {
    async fn new(count: i64, size: Size, rows: Rows) -> Result<Self> {
        let made = Self { folder: crate::process::folder()? };
        catalogue::fill_sqlite(&made.file(), count, size, rows).await?;
        Ok(made)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("catalogue.db")
    }

    fn url(&self) -> String {
        sqlite_url(&self.file())
    }
}

fn sqlite_url(file: &Path) -> String {
    format!("sqlite:{}", file.display())
}

/// Settings of a handler: nothing ends by itself while it is measured.
fn settings(sql: String, redis: Option<String>, workers: usize) -> Settings {
    let mut settings = vec![
        ("Sql", sql),
        ("HTTP_WORKERS", workers.to_string()),
        ("CACHE_DURATION_S", "36000".to_owned()),
        ("CACHE_L1_MAX_BYTES", (8_u64 << 30).to_string()),
        ("LOG_LEVEL", "warn".to_owned()),
    ];
    settings.extend(redis.map(|url| ("Redis", url)));
    settings
}

/// The same with a memory that is full after some 3,000 products of 3.4 kB and then forgets as much as it learns, as it is
/// where Redis and the database are asked often. If it grew, each page's first touch would be measured, too: on a
/// virtual machine that may cost more than the request.
fn settings_of_full_memory(sql: String, redis: Option<String>) -> Settings {
    let mut settings = settings(sql, redis, 1);
    settings.push(("CACHE_L1_MAX_BYTES", (16 << 20).to_string()));
    settings
}

/// Starts a handler and waits until it hears of changes: from then on what it remembers stays remembered.
async fn handler(settings: Settings) -> Result<Server> {
    let server = Server::start("handler", settings)?;
    let mut connection = Connection::open(server.port).await?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = status(&mut connection).await?;
        let feed = status["changeFeed"].is_null() || status["changeFeed"]["unheardSeconds"].is_number();
        let log = status["redis"].is_null() || status["redis"]["logUnheardSeconds"].is_number();
        if feed && log {
            return Ok(server);
        }
        if Instant::now() > deadline {
            return Err(format!("the handler never hears of changes: {status}"));
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// What a handler's `GET /` says.
async fn status(connection: &mut Connection) -> Result<serde_json::Value> {
    let (_, body) = connection.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").await?;
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

/// Makes a handler remember these products (counted from the first).
async fn fill(server: &Server, range: Range<i64>, bodies: &Bodies) -> Result<()> {
    // A thousand batches at a time: their bodies are all in memory meanwhile.
    for start in range.clone().step_by(100_000) {
        let part = start..(start + 100_000).min(range.end);
        load::all_once(server, 8, &load::batches(part, bodies)).await?;
    }
    Ok(())
}

fn ceiling(bodies: &Bodies, workers: usize, places: i64) -> Result<Server> {
    let (bytes, places) = (("BODY_BYTES", bodies.len().to_string()), ("BODIES", places.to_string()));
    Server::start("ceiling", vec![("HTTP_WORKERS", workers.to_string()), bytes, places])
}

/// What `ceiling` answers, however it is asked.
fn constant(bodies: &Bodies, count: i64) -> Arc<[Request]> {
    let body = vec![b'x'; bodies.len()];
    let target = |n| load::target(catalogue::FIRST + n);
    (0..count).map(|n| Request::get(&target(n), "", 200, &body, "")).collect()
}
