//! `hot_path BOUND`: instructions of one warm hit under callgrind, of the handler and of `ceiling`, and their ratio.
//!
//! Exit codes: 0 within the bound, 1 above it, or nothing could be counted.

use std::{fs, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use product_cache_bench::{
    Result,
    catalogue::{self, Bodies, FIRST, Rows, Size},
    load::{self, Request},
    process::{Server, Settings, built, folder},
};

/// Hits that are counted: enough that timers which happen to run meanwhile do not count.
const HITS: i64 = 3_000;
const PRODUCTS: i64 = 100;
/// After so long what is in memory has an `Age`; before, a count would hang on how many hits came in time to have none.
const HAS_AGE: Duration = Duration::from_millis(1_100);

#[tokio::main]
async fn main() -> ExitCode {
    let bound = std::env::args().nth(1).and_then(|bound| bound.parse().ok()).unwrap_or(f64::INFINITY);
    match compare(bound).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hot path: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn compare(bound: f64) -> Result<bool> {
    let (bodies, folder) = (Bodies::new(Size::Large), folder()?);
    let file = folder.path().join("catalogue.db");
    catalogue::fill_sqlite(&file, PRODUCTS, Size::Large, Rows::Stored).await?;
    let handler = vec![
        ("Sql", format!("sqlite:{}", file.display())),
        ("FEED_INTERVAL_MS", "0".to_owned()),
        ("LOG_LEVEL", "warn".to_owned()),
    ];
    let products: Arc<[Request]> =
        (0..HITS).map(|n| Request::product(FIRST + n % PRODUCTS, &bodies, "L1; hit")).collect();
    let ours = per_hit("handler", handler, &bodies, &products).await?;
    let body = bytes::Bytes::from(vec![b'x'; bodies.len()]);
    let constant = (0..HITS).map(|n| Request::get(&load::target(FIRST + n % PRODUCTS), "", 200, &body, ""));
    let ceiling = vec![("BODY_BYTES", bodies.len().to_string()), ("AGE", "1".to_owned())];
    let theirs = per_hit("ceiling", ceiling, &bodies, &constant.collect()).await?;
    let ratio = ours / theirs;
    println!(
        "hot path: {ours:.0} instructions per warm hit, {theirs:.0} of ceiling: {ratio:.3} times, allowed {bound}"
    );
    if ratio > bound {
        eprintln!("hot path: a warm hit costs more than it may (callgrind_annotate shows where)");
    }
    Ok(ratio <= bound)
}

/// The difference between a run with twice as many hits and one with as many.
async fn per_hit(name: &str, settings: Settings, bodies: &Bodies, hits: &Arc<[Request]>) -> Result<f64> {
    let mut counts = [0.0; 2];
    for (times, count) in counts.iter_mut().enumerate() {
        let folder = folder()?;
        let out = folder.path().join("out");
        let program = [
            PathBuf::from("valgrind"),
            "--tool=callgrind".into(),
            format!("--callgrind-out-file={}", out.display()).into(),
            built(name),
        ];
        let mut settings = settings.clone();
        settings.extend([("HTTP_WORKERS", "1".to_owned()), ("PATH", std::env::var("PATH").unwrap_or_default())]);
        // Else valgrind counts one instruction for each byte that glibc clears or copies with "rep".
        settings.push((
            "GLIBC_TUNABLES",
            "glibc.cpu.x86_rep_stosb_threshold=1000000000:glibc.cpu.x86_rep_movsb_threshold=1000000000".to_owned(),
        ));
        let server = Server::start_program(&program, settings)?;
        if name == "handler" {
            load::all_once(&server, 1, &load::products(0..PRODUCTS, bodies, "fwd=miss")).await?;
            tokio::time::sleep(HAS_AGE).await;
        }
        for _ in 0..=times {
            load::all_once(&server, 1, hits).await?;
        }
        server.stop()?;
        let text = fs::read_to_string(&out).map_err(|error| format!("callgrind wrote nothing: {error}"))?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok());
        *count = total.ok_or("callgrind wrote no total")?;
    }
    Ok((counts[1] - counts[0]) / hits.len() as f64)
}
