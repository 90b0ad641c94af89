//! What people would use instead: the cache-aside of most samples, and BentoCache, the nearest library outside .NET.

use std::path::PathBuf;

use super::{Bench, Catalogue, Side, fill, handler, settings, turns};
use crate::{
    Result,
    catalogue::{Bodies, Rows, Size},
    load::{self, Order},
    process::{Cores, Server},
    report::Bound,
    servers::redis::RedisServer,
};

const PRODUCTS: i64 = 10_000;
const CONNECTIONS: usize = 64;

async fn compare(
    bench: &mut Bench,
    name: &str,
    reference: &str,
    asks_redis: bool,
    start: impl Fn(&Catalogue, &RedisServer) -> Result<Server>,
    bounds: [Bound; 2],
) -> Result<()> {
    let bodies = Bodies::new(Size::Large);
    let (catalogue, redis) = (Catalogue::new(PRODUCTS, Size::Large, Rows::Stored).await?, RedisServer::start().await);
    let server = handler(settings(catalogue.url(), Some(redis.url()), 1)).await?;
    fill(&server, 0..PRODUCTS, &bodies).await?;
    let theirs = start(&catalogue, &redis)?;
    let (hits, any) = (load::products(0..PRODUCTS, &bodies, "L1; hit"), load::products(0..PRODUCTS, &bodies, ""));
    load::all_once(&theirs, 8, &any).await?;
    let _cores = (!asks_redis).then(|| Cores::apart(&[&server, &theirs]));
    let ours = Side { server: &server, connections: CONNECTIONS, requests: &hits, order: Order::Zipf };
    let theirs = Side { server: &theirs, connections: CONNECTIONS, requests: &any, order: Order::Zipf };
    let rounds = turns(bench, 0..bench.rounds(), ours, theirs).await?;
    let [throughput, cpu] = bounds;
    bench.add_both(name, reference, throughput, cpu, &rounds);
    Ok(())
}

/// GET, query, SET, with a connection per request and with one for all.
pub(super) async fn cache_aside(bench: &mut Bench) -> Result<()> {
    for (client, reference) in
        [("per-request", "cache-aside, connection per request"), ("singleton", "cache-aside, one connection")]
    {
        let start = |catalogue: &Catalogue, redis: &RedisServer| {
            let settings = vec![
                ("Sql", catalogue.url()),
                ("HTTP_WORKERS", "1".to_owned()),
                ("REDIS_URL", redis.url()),
                ("REDIS_CLIENT", client.to_owned()),
            ];
            Server::start("cache_aside", settings)
        };
        let name = format!("warm hit against cache-aside ({client})");
        compare(bench, &name, reference, true, start, [Bound::None, Bound::None]).await?;
    }
    Ok(())
}

/// BentoCache with memory, Redis and its bus, behind node:http.
pub(super) async fn bentocache(bench: &mut Bench) -> Result<()> {
    let Some(folder) = bench.bentocache.clone() else {
        println!("bentocache: skipped, as npm has not installed it");
        return Ok(());
    };
    let start = move |_: &Catalogue, redis: &RedisServer| {
        let path = std::env::var("PATH").unwrap_or_default();
        let bodies = Bodies::new(Size::Large);
        // Rows come from a template instead of a database: only hits are compared.
        let settings = vec![("PATH", path), ("REDIS_URL", redis.url()), ("TEMPLATE", bodies.json(0))];
        Server::start_program(&[PathBuf::from("node"), folder.join("server.mjs")], settings)
    };
    let bounds = [Bound::AtLeast(4.5), Bound::AtMost(0.25)];
    compare(bench, "warm hit against BentoCache", "BentoCache", false, start, bounds).await
}
