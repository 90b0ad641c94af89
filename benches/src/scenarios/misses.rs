//! Misses: the query behind the cache, alone and for a thousand who wait for it.

use std::{sync::Arc, time::Instant};

use sqlx::{Executor, PgConnection};
use tokio::{sync::Barrier, task::JoinSet};

use super::{Bench, Catalogue, ceiling, constant, each_once_in_turns, handler, settings, settings_of_full_memory};
use crate::{
    Result,
    catalogue::{self, Bodies, Rows, Size},
    load::{self, Connection, Outcome, Request},
    process::Server,
    report::Bound,
    servers::{Postgres, redis::RedisServer},
};

/// As many as the handler has database connections.
const CONNECTIONS: usize = 8;

/// Products that nobody has asked for yet, against the same query behind actix-web.
pub(super) async fn miss(bench: &mut Bench) -> Result<()> {
    let per_round = 5_000;
    let count = 2 * per_round * (bench.rounds() as i64 + 1);
    let bodies = Bodies::new(Size::Large);
    let catalogue = Catalogue::new(count, Size::Large, Rows::Stored).await?;
    let postgres = Postgres::start().await?;
    catalogue::fill_postgres(&mut postgres.owner().await?, count, Size::Large).await?;
    let redis = RedisServer::start().await;
    let bound = Bound::AtMost(1.3);
    for (name, url, redis, bound) in [
        ("miss on SQLite", catalogue.url(), None, bound),
        ("miss on PostgreSQL", postgres.url(), None, bound),
        ("miss on PostgreSQL with Redis", postgres.url(), Some(redis.url()), Bound::None),
    ] {
        let server = handler(settings_of_full_memory(url.clone(), redis)).await?;
        let reference = Server::start("bare_query", settings(url, None, 1))?;
        let mut rounds = Vec::new();
        for round in 0..=bench.rounds() as i64 {
            // Each has products of its own: whoever came second would find the first one's rows in the database's memory.
            let (start, middle, end) =
                (2 * round * per_round, (2 * round + 1) * per_round, 2 * (round + 1) * per_round);
            let ours = load::products(start..middle, &bodies, "fwd=miss");
            let theirs = load::products(middle..end, &bodies, "");
            let both = each_once_in_turns(CONNECTIONS, (&server, &ours), (&reference, &theirs)).await?;
            if round > 0 {
                rounds.push(both);
            }
        }
        let times: Vec<_> = rounds.iter().map(|(ours, theirs)| (ours.time(), theirs.time())).collect();
        let cpu: Vec<_> = rounds.iter().map(|(ours, theirs)| (Outcome::cpu(ours), Outcome::cpu(theirs))).collect();
        bench.report.add(&format!("{name}: time"), "s", "bare_query", bound, &times);
        bench.report.add(&format!("{name}: CPU per request"), "s", "bare_query", Bound::None, &cpu);
    }
    Ok(())
}

/// Every query of products takes 50 ms and is counted.
const SLOW: &str = "CREATE SEQUENCE queries;
    ALTER TABLE product RENAME TO product_rows;
    CREATE VIEW product AS SELECT * FROM product_rows
      WHERE (SELECT nextval('queries') + length(pg_sleep(0.05)::text)) IS NOT NULL;
    GRANT SELECT ON product TO handler; GRANT USAGE ON queries TO handler";

/// A thousand clients, one product, a query of 50 ms.
pub(super) async fn stampede(bench: &mut Bench) -> Result<()> {
    const WAITERS: usize = 1_000;
    let bodies = Bodies::new(Size::Large);
    let postgres = Postgres::start().await?;
    let mut owner = postgres.owner().await?;
    catalogue::fill_postgres(&mut owner, 1_000, Size::Large).await?;
    owner.execute(sqlx::raw_sql(SLOW)).await.map_err(|error| error.to_string())?;
    let redis = RedisServer::start().await;
    let reference = Server::start("bare_query", settings(postgres.url(), None, 1))?;
    let (mut next, constant) = (0, constant(&bodies, 1));
    for instances in [1, 4] {
        let (mut servers, mut ceilings) = (Vec::new(), Vec::new());
        for _ in 0..instances {
            let workers = if instances == 1 { 2 } else { 1 };
            servers.push(handler(settings(postgres.url(), Some(redis.url()), workers)).await?);
            ceilings.push(ceiling(&bodies, workers, 1)?);
        }
        let (mut times, mut beyond, mut queries) = (Vec::new(), Vec::new(), Vec::new());
        // One takes a tenth of a second, and scatters much.
        for round in 0..=3 * bench.rounds() {
            let mut connection = Connection::open(reference.port).await?;
            let product = load::products(next..next + 1, &bodies, "");
            let begin = Instant::now();
            connection.ask(&product[0]).await?;
            let query = begin.elapsed().as_secs_f64();
            let before = count(&mut owner).await?;
            let all = ask_all_at_once(&servers, WAITERS, &product).await?;
            let queried = count(&mut owner).await? - before;
            // What as many answers take that wait for nothing.
            let at_once = ask_all_at_once(&ceilings, WAITERS, &constant).await?;
            next += 1;
            if round > 0 {
                times.push((all, query));
                beyond.push((all - query, at_once));
                queries.push((queried as f64, 1.0));
            }
        }
        let name = format!("stampede of 1,000 on {instances} instance{}", if instances == 1 { "" } else { "s" });
        let report = &mut bench.report;
        report.add(&format!("{name}: queries"), "queries", "1", Bound::AtMost(1.0), &queries);
        report.add(&format!("{name}: time until all are answered"), "s", "one query", Bound::AtMost(1.3), &times);
        report.add(&format!("{name}: time beyond the query"), "s", "ceiling", Bound::None, &beyond);
    }
    Ok(())
}

async fn count(owner: &mut PgConnection) -> Result<i64> {
    let sql = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM queries";
    sqlx::query_scalar(sql).fetch_one(owner).await.map_err(|error| error.to_string())
}

/// Seconds until as many have the answer to the first of these requests.
async fn ask_all_at_once(servers: &[Server], waiters: usize, requests: &Arc<[Request]>) -> Result<f64> {
    let barrier = Arc::new(Barrier::new(waiters + 1));
    let mut tasks = JoinSet::new();
    for n in 0..waiters {
        let mut connection = Connection::open(servers[n % servers.len()].port).await?;
        let (requests, barrier) = (requests.clone(), barrier.clone());
        tasks.spawn(async move {
            barrier.wait().await;
            connection.ask(&requests[0]).await.map(|()| connection)
        });
    }
    let begin = Instant::now();
    barrier.wait().await;
    let mut open = Vec::new();
    while let Some(done) = tasks.join_next().await {
        open.push(done.map_err(|error| error.to_string())??);
    }
    Ok(begin.elapsed().as_secs_f64())
}
