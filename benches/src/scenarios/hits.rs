//! Hits: in memory, answered with 304, in Redis, and batches of both.

use std::sync::Arc;

use super::{
    Bench, Catalogue, Side, ceiling, constant, each_once_in_turns, fill, handler, settings, settings_of_full_memory,
    turns,
};
use crate::{
    Result,
    catalogue::{Bodies, FIRST, Rows, Size},
    load::{self, Connection, Order, Request},
    process::{Cores, Server},
    report::{Bound, median},
    servers::redis::RedisServer,
};

const PRODUCTS: i64 = 10_000;
/// What a processor's own caches hold, as they hold the one body of `ceiling`.
const FEW_PRODUCTS: i64 = 8;
const CONNECTIONS: usize = 64;

/// Zipf over 10,000 products in memory, against `ceiling`; over a few; and against one that has as many bodies to send.
pub(super) async fn warm(bench: &mut Bench) -> Result<()> {
    let redis = RedisServer::start().await;
    for size in Size::BOTH {
        let (bodies, catalogue) = (Bodies::new(size), Catalogue::new(PRODUCTS, size, Rows::Stored).await?);
        for (workers, count, places) in
            [(1, PRODUCTS, 1), (2, PRODUCTS, 1), (1, FEW_PRODUCTS, 1), (1, PRODUCTS, PRODUCTS)]
        {
            let (requests, constant) = (load::products(0..count, &bodies, "L1; hit"), constant(&bodies, count));
            let mut rounds = Vec::new();
            let (lives, rounds_each) = bench.lives();
            for _ in 0..lives {
                let server = handler(settings(catalogue.url(), Some(redis.url()), workers)).await?;
                fill(&server, 0..count, &bodies).await?;
                let reference = ceiling(&bodies, workers, places)?;
                let _cores = (workers == 1).then(|| Cores::apart(&[&server, &reference]));
                let side = |server, requests| Side { server, connections: CONNECTIONS, requests, order: Order::Zipf };
                let (ours, theirs) = (side(&server, &requests), side(&reference, &constant));
                rounds.extend(turns(bench, 0..rounds_each, ours, theirs).await?);
            }
            let name = format!("warm hit, {}, {workers} worker{}", size.name(), if workers == 1 { "" } else { "s" });
            let (name, reference, throughput, cpu) = match (count, places) {
                (FEW_PRODUCTS, _) => (format!("{name}, {count} products"), "ceiling", Bound::None, Bound::None),
                (_, 1) => (name, "ceiling", Bound::AtLeast(0.95), Bound::AtMost(1.05)),
                _ => (format!("{name}, as many bodies"), "ceiling of 10,000 bodies", Bound::None, Bound::None),
            };
            bench.add_both(&name, reference, throughput, cpu, &rounds);
        }
    }
    Ok(())
}

/// The same with `If-None-Match`, against the 200.
pub(super) async fn not_modified(bench: &mut Bench) -> Result<()> {
    let size = Size::Large;
    let (bodies, catalogue) = (Bodies::new(size), Catalogue::new(PRODUCTS, size, Rows::Stored).await?);
    let server = handler(settings(catalogue.url(), None, 1)).await?;
    fill(&server, 0..PRODUCTS, &bodies).await?;
    let requests = load::products(0..PRODUCTS, &bodies, "L1; hit");
    let conditional: Arc<[Request]> = (0..PRODUCTS)
        .map(|n| {
            let etag = product_cache::cache::entry::etag([bodies.json(FIRST + n).as_bytes()]);
            let header = format!("If-None-Match: {}\r\n", String::from_utf8_lossy(&etag));
            Request::get(&load::target(FIRST + n), &header, 304, b"", "L1; hit")
        })
        .collect();
    let _cores = Cores::apart(&[&server]);
    let ours = Side { server: &server, connections: CONNECTIONS, requests: &conditional, order: Order::Zipf };
    let theirs = Side { server: &server, connections: CONNECTIONS, requests: &requests, order: Order::Zipf };
    let rounds = turns(bench, 0..bench.rounds(), ours, theirs).await?;
    let (faster, cheaper) = (Bound::AtLeast(1.0), Bound::AtMost(1.0));
    bench.add_both("304 on a warm hit, 3.4kB", "the 200", faster, cheaper, &rounds);
    Ok(())
}

/// Redis with products that another instance has loaded, and the same bodies for `redis_ceiling`.
async fn filled_redis(catalogue: &Catalogue, bodies: &Bodies, count: i64) -> Result<RedisServer> {
    let redis = RedisServer::start().await;
    let other = handler(settings(catalogue.url(), Some(redis.url()), 2)).await?;
    fill(&other, 0..count, bodies).await?;
    Ok(redis)
}

async fn fill_for_ceiling(redis: &RedisServer, bodies: &Bodies, count: i64) -> Result<()> {
    let client = ::redis::Client::open(redis.url()).map_err(|error| error.to_string())?;
    let mut connection = client.get_multiplexed_async_connection().await.map_err(|error| error.to_string())?;
    for start in (0..count).step_by(500) {
        let mut pipeline = ::redis::pipe();
        for id in (start..(start + 500).min(count)).map(|n| FIRST + n) {
            pipeline.cmd("SET").arg(format!("bench:{id}")).arg(bodies.json(id)).ignore();
        }
        let _: () = pipeline.query_async(&mut connection).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Products that are in Redis and not in memory, each asked for once, against `redis_ceiling`.
pub(super) async fn l2(bench: &mut Bench) -> Result<()> {
    const PER_ROUND: i64 = 10_000;
    let (lives, rounds_each) = bench.lives();
    let count = PER_ROUND * (lives * (rounds_each + 1)) as i64;
    let bodies = Bodies::new(Size::Large);
    let catalogue = Catalogue::new(count, Size::Large, Rows::Computed).await?;
    let redis = filled_redis(&catalogue, &bodies, count).await?;
    fill_for_ceiling(&redis, &bodies, count).await?;
    let mut ranges = (0..count).step_by(PER_ROUND as usize).map(|start| start..start + PER_ROUND);
    let (mut rounds, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..lives {
        let server = handler(settings_of_full_memory(catalogue.url(), Some(redis.url()))).await?;
        let settings = vec![("HTTP_WORKERS", "1".to_owned()), ("REDIS_URL", redis.url())];
        let reference = Server::start("redis_ceiling", settings)?;
        for (round, range) in ranges.by_ref().take(rounds_each + 1).enumerate() {
            let requests = |cache_status| load::products(range.clone(), &bodies, cache_status);
            let (ours, theirs) = (requests("L2; hit"), requests(""));
            let both = each_once_in_turns(CONNECTIONS, (&server, &ours), (&reference, &theirs)).await?;
            // But for the log's, and redis_ceiling's own.
            clients.push((redis.clients().await as f64 - 2.0, 2.0));
            if round > 0 {
                rounds.push(both); // in the first one the memory fills
            }
        }
    }
    bench.add_both("L2 hit, 3.4kB", "redis_ceiling", Bound::AtLeast(0.85), Bound::None, &rounds);
    bench.report.add("L2 hit: Redis connections", "connections", "2", Bound::AtMost(1.0), &clients);
    Ok(())
}

/// A hundred ids, half in memory and half in Redis, against one hit in Redis.
pub(super) async fn batch(bench: &mut Bench) -> Result<()> {
    const WARM: i64 = 50;
    /// More than the memory holds of either size.
    const FULL: i64 = 20_000;
    const BATCHES: i64 = 20;
    const SINGLES_PER_BATCH: i64 = 25;
    let per_batch = 50 + SINGLES_PER_BATCH;
    let count = WARM + FULL + per_batch * BATCHES * (bench.rounds() as i64 + 1);
    for size in Size::BOTH {
        let bodies = Bodies::new(size);
        let catalogue = Catalogue::new(count, size, Rows::Computed).await?;
        let redis = filled_redis(&catalogue, &bodies, count).await?;
        let server = handler(settings_of_full_memory(catalogue.url(), Some(redis.url()))).await?;
        fill(&server, WARM..WARM + FULL, &bodies).await?;
        for _ in 0..3 {
            fill(&server, 0..WARM, &bodies).await?; // often enough to be kept
        }
        let mut connection = Connection::open(server.port).await?;
        let mut next = FIRST + WARM + FULL;
        let mut rounds = Vec::new();
        for round in 0..=bench.rounds() {
            let (mut batches, mut singles) = (Vec::new(), Vec::new());
            for _ in 0..BATCHES {
                for id in next..next + SINGLES_PER_BATCH {
                    singles.push(timed(&mut connection, &Request::product(id, &bodies, "L2; hit")).await?);
                }
                // By turns, as a page of products would mix them.
                let cold = next + SINGLES_PER_BATCH;
                let ids: Vec<_> = (0..50).flat_map(|n| [FIRST + n, cold + n]).collect();
                let mut request = load::batch(&ids, &bodies);
                request.cache_status = "memory 50, redis 50, database 0";
                batches.push(timed(&mut connection, &request).await?);
                next += per_batch;
            }
            if round > 0 {
                rounds.push((median(&batches), median(&singles)));
            }
        }
        let scenario = format!("batch of 100, 50 in L1 and 50 in L2, {}: time", size.name());
        bench.report.add(&scenario, "s", "one L2 hit", Bound::AtMost(3.0), &rounds);
    }
    Ok(())
}

async fn timed(connection: &mut Connection, request: &Request) -> Result<f64> {
    let sent = std::time::Instant::now();
    connection.ask(request).await?;
    Ok(sent.elapsed().as_secs_f64())
}
