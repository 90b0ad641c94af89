//! Growth: many clients, many keys, many instances; memory, and the start.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{Bench, Catalogue, Side, ceiling, constant, fill, handler, invalidation::trigger, settings, turns};
use crate::{
    Result,
    catalogue::{Bodies, FIRST, Rows, Size},
    load::{self, Connection, Order, Outcome},
    process::{Cores, Server, built, command, folder},
    report::{Bound, median},
    servers::redis::RedisServer,
};

/// Ten thousand clients that stay connected, or what the descriptor limit allows.
pub(super) async fn clients(bench: &mut Bench) -> Result<()> {
    let limit = rlimit::increase_nofile_limit(u64::MAX).map_err(|error| error.to_string())?;
    let many = 10_000.min(limit.saturating_sub(500) as usize);
    let bodies = Bodies::new(Size::Large);
    let (catalogue, redis) = (Catalogue::new(1_000, Size::Large, Rows::Stored).await?, RedisServer::start().await);
    let server = handler(settings(catalogue.url(), Some(redis.url()), 2)).await?;
    fill(&server, 0..1_000, &bodies).await?;
    let requests = load::products(0..1_000, &bodies, "L1; hit");
    let before = redis.clients().await as f64;
    let picks = load::picks(Order::Uniform, &requests)?;
    let mut rounds = Vec::new();
    let mut connected = Vec::new();
    for _ in 0..bench.rounds() {
        let time = bench.time().max(Duration::from_secs(2));
        let ours = load::for_a_while(&server, many, &requests, &picks, 0, time).await?;
        connected.push((redis.clients().await as f64, before));
        rounds.push((ours, load::for_a_while(&server, 64, &requests, &picks, 0, time).await?));
    }
    bench.add_both(&format!("{many} clients"), "64 clients", Bound::None, Bound::None, &rounds);
    bench.report.add(&format!("{many} clients: Redis connections"), "", "before", Bound::AtMost(1.0), &connected);
    Ok(())
}

/// What a hit costs with many keys, and an expiry with many instances.
pub(super) async fn growth(bench: &mut Bench) -> Result<()> {
    const FEW: i64 = 1_000;
    let bodies = Bodies::new(Size::Small);
    let many = if bench.quick { 100_000 } else { 1_000_000 };
    let catalogue = Catalogue::new(many, Size::Small, Rows::Computed).await?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for count in [many, FEW] {
        let server = handler(settings(catalogue.url(), None, 1)).await?;
        fill(&server, 0..count, &bodies).await?;
        ours.push((server, load::products(0..count, &bodies, "L1; hit")));
        theirs.push((ceiling(&bodies, 1, count)?, constant(&bodies, count)));
    }
    let all: Vec<_> = ours.iter().chain(&theirs).map(|(server, _)| server).collect();
    let cores = Cores::apart(&all);
    let side = |(server, requests)| Side { server, connections: 64, requests, order: Order::Uniform };
    let (mut grown, mut ceiling_grown) = (Vec::new(), Vec::new());
    for round in 0..bench.rounds() {
        for (servers, grown) in [(&ours, &mut grown), (&theirs, &mut ceiling_grown)] {
            let [full, few] = [0, 1].map(|index| side((&servers[index].0, &servers[index].1)));
            grown.extend(turns(bench, round..round + 1, full, few).await?);
        }
    }
    drop((cores, ours, theirs));
    let growth = |(full, few): &(Outcome, Outcome)| full.cpu() / few.cpu();
    let both: Vec<_> = grown.iter().map(growth).zip(ceiling_grown.iter().map(growth)).collect();
    let (few_keys, few_bodies) = (format!("{FEW} keys"), format!("ceiling of {FEW}"));
    bench.add_both(&format!("{many} keys, each as hot"), &few_keys, Bound::None, Bound::None, &grown);
    bench.add_both(&format!("ceiling of {many} bodies"), &few_bodies, Bound::None, Bound::None, &ceiling_grown);
    // Reaching that much memory costs any program something: the ceiling shows how much.
    let scenario = format!("growth to {many} keys: CPU per request");
    bench.report.add(&scenario, &format!("times that of {FEW}"), "the ceiling's growth", Bound::AtMost(1.15), &both);

    let mut costs = Vec::new();
    for instances in [2, 16] {
        let redis = RedisServer::start().await;
        let mut servers = Vec::new();
        for _ in 0..instances {
            let mut settings = settings(catalogue.url(), Some(redis.url()), 1);
            settings.push(("FEED_INTERVAL_MS", "0".to_owned()));
            servers.push(handler(settings).await?);
        }
        let mut of_these = Vec::new();
        for _ in 0..bench.rounds() {
            of_these.push(per_expiry(&servers).await?);
        }
        costs.push(of_these);
    }
    let rounds: Vec<_> = costs[1].iter().copied().zip(costs[0].iter().copied()).collect();
    bench.report.add("expiry: CPU per listening one of 16", "s", "one of 2", Bound::AtMost(1.15), &rounds);
    Ok(())
}

/// Processor time that one expiry costs each instance that hears of it, if it hears of each alone: of some that follow
/// each other at once it hears together, and the sooner each is acknowledged the more are heard at a time.
async fn per_expiry(servers: &[Server]) -> Result<f64> {
    const EXPIRIES: u32 = 300;
    const PAUSE: Duration = Duration::from_millis(4);
    let mut connection = Connection::open(servers[0].port).await?;
    let before: Duration = servers[1..].iter().map(Server::cpu).sum();
    for n in 0..EXPIRIES {
        let batch = trigger(&[format!("{{\"ProductID\":{}}}", FIRST + i64::from(n))]);
        let (status, _) = connection.send(&batch).await?;
        if status != 200 {
            return Err(format!("InvalidateCache: {status}"));
        }
        sleep(PAUSE).await;
    }
    sleep(Duration::from_millis(50)).await; // the last notices
    let after: Duration = servers[1..].iter().map(Server::cpu).sum();
    Ok((after - before).as_secs_f64() / f64::from(EXPIRIES) / (servers.len() - 1) as f64)
}

/// From the start of the process to its first 200, against an actix-web that does nothing.
pub(super) async fn start(bench: &mut Bench) -> Result<()> {
    /// Of each kind in a round, in turns: one takes a few milliseconds, and the next may take twice as many.
    const STARTS: usize = 15;
    let bodies = Bodies::new(Size::Large);
    let catalogue = Catalogue::new(1_000, Size::Large, Rows::Stored).await?;
    let (mut ready, mut seeded) = (Vec::new(), Vec::new());
    let product = load::target(FIRST);
    for _ in 0..bench.rounds() {
        let (mut nothing, mut file, mut seed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..STARTS {
            let empty = vec![("HTTP_WORKERS", "1".to_owned()), ("BODY_BYTES", bodies.len().to_string())];
            nothing.push(first_answer("ceiling", empty, &product).await?);
            file.push(first_answer("handler", settings(catalogue.url(), None, 1), &product).await?);
            let embedded = vec![("HTTP_WORKERS", "1".to_owned()), ("LOG_LEVEL", "warn".to_owned())];
            seed.push(first_answer("handler", embedded, "/api/GetProductById?productid=680").await?);
        }
        let nothing = median(&nothing);
        ready.push((median(&file), nothing));
        seeded.push((median(&seed), nothing));
    }
    bench.report.add("start to the first product", "s", "empty actix-web", Bound::AtMost(2.0), &ready);
    bench.report.add("start with a new SQLite file to seed", "s", "empty actix-web", Bound::None, &seeded);
    Ok(())
}

async fn first_answer(name: &str, mut settings: Vec<(&'static str, String)>, target: &str) -> Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.map_err(|error| error.to_string())?.port();
    settings.push(("HTTP_PORT", port.to_string()));
    let (folder, program): (_, PathBuf) = (folder()?, built(name));
    let mut command = command(&[program], &settings, &folder);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let begin = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
    let request = format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    let answered = loop {
        if let Ok(mut connection) = Connection::open(port).await {
            match connection.send(request.as_bytes()).await {
                Ok((200, _)) => break Ok(begin.elapsed().as_secs_f64()),
                Ok((status, body)) => {
                    break Err(format!("{name}'s first answer: {status} {}", String::from_utf8_lossy(body)));
                }
                Err(_) => {}
            }
        }
        if begin.elapsed() > Duration::from_secs(20) {
            break Err(format!("{name} does not answer"));
        }
        std::thread::sleep(Duration::from_micros(50));
    };
    let _ = child.kill();
    let _ = child.wait();
    answered
}

/// How much the process grows by what it remembers, against the bytes of the bodies.
pub(super) async fn memory(bench: &mut Bench) -> Result<()> {
    for (size, most) in [(Size::Large, 1.2), (Size::Small, 1.6)] {
        let bodies = Bodies::new(size);
        for count in if bench.quick { vec![100_000] } else { vec![100_000, 1_000_000] } {
            let catalogue = Catalogue::new(count, size, Rows::Computed).await?;
            let server = handler(settings(catalogue.url(), None, 2)).await?;
            // What requests, batches and connections need once.
            load::all_once(&server, 8, &load::batches(0..1_000, &bodies)).await?;
            let before = server.resident();
            fill(&server, 1_000..count, &bodies).await?;
            let stored = (count - 1_000) as f64 * bodies.len() as f64;
            let scenario = format!("memory for {count} entries of {}", size.name());
            let rounds = [((server.resident() - before) as f64, stored)];
            bench.report.add(&scenario, "bytes", "bytes of the bodies", Bound::AtMost(most), &rounds);
            drop(server);
            let _ = fs::remove_file(catalogue.file());
        }
    }
    Ok(())
}
