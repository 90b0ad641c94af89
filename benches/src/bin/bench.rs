//! The driver behind `scripts/bench`: runs scenarios and writes what they gave.
//!
//! Exit codes: 0 everything was measured (met or not), 1 an answer was wrong or something could not be started, 2 unknown
//! arguments.

use std::{path::Path, process::ExitCode, time::Instant};

use product_cache_bench::{
    plot,
    report::Report,
    scenarios::{Bench, SCENARIOS},
};

const USAGE: &str = "usage: bench [--quick] [--bentocache FOLDER] [--results FOLDER] [SCENARIO...]";

/// One thread: it asks as fast as a worker answers, and leaves the other cores alone.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut bench = Bench { quick: false, report: Report::default(), bentocache: None };
    let (mut names, mut results) = (Vec::new(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => bench.quick = true,
            "--bentocache" => bench.bentocache = arguments.next().map(Into::into),
            "--results" => results = arguments.next(),
            name if SCENARIOS.iter().any(|(scenario, _)| *scenario == name) => names.push(argument),
            _ => {
                eprintln!("{argument}?\n{USAGE}");
                SCENARIOS.iter().for_each(|(name, _)| eprintln!("  {name}"));
                return ExitCode::from(2);
            }
        }
    }
    for (name, run) in SCENARIOS.iter().filter(|(name, _)| names.is_empty() || names.iter().any(|asked| asked == name))
    {
        let begin = Instant::now();
        if let Err(error) = run(&mut bench).await {
            eprintln!("{name}: failed: {error}");
            return ExitCode::FAILURE;
        }
        eprintln!("{name}: {:.0} s", begin.elapsed().as_secs_f64());
    }
    let Some(folder) = results else { return ExitCode::SUCCESS };
    let mut how = "Made by `scripts/bench".to_owned();
    how.push_str(if bench.quick { " --quick" } else { "" });
    names.iter().for_each(|name| how.push_str(&format!(" {name}")));
    how.push_str("`.");
    let folder = Path::new(&folder);
    let written = bench.report.write(folder, &how);
    if let Err(error) = written.and_then(|()| plot::write(&bench.report, &folder.join("latest.svg"))) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
