//! What was measured: ratios with their spread, the raw numbers, the machine; as CSV and as Markdown.
//!
//! Must not know how anything is measured. Invariant: a speed never fails the run, it is only said whether it is met.

use std::{fmt::Write, fs, path::Path};

use crate::Result;

/// What a ratio should reach.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
    /// Is shown, nothing more.
    None,
}

impl Bound {
    fn is_met(self, ratio: f64) -> Option<bool> {
        match self {
            Self::AtLeast(bound) => Some(ratio >= bound),
            Self::AtMost(bound) => Some(ratio <= bound),
            Self::None => None,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("≥ {bound}"),
            Self::AtMost(bound) => format!("≤ {bound}"),
            Self::None => "–".to_owned(),
        }
    }
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was measured.
    pub scenario: String,
    /// Median of the rounds' ratios.
    pub ratio: f64,
    /// The least of them.
    pub low: f64,
    /// The greatest of them.
    pub high: f64,
    /// What with.
    pub reference: String,
    /// What it should reach.
    pub bound: Bound,
}

/// Everything that was measured in a run.
#[derive(Default)]
pub struct Report {
    /// The table.
    pub lines: Vec<Line>,
    raw: String,
}

/// The middle of some numbers; 0 if there are none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut numbers = numbers.to_vec();
    numbers.sort_by(f64::total_cmp);
    match (numbers.get(numbers.len() / 2), numbers.len() % 2) {
        (None, _) => 0.0,
        (Some(middle), 1) => *middle,
        (Some(above), _) => (above + numbers[numbers.len() / 2 - 1]) / 2.0,
    }
}

impl Report {
    /// Adds what the rounds gave, the handler's number and the reference's of each.
    pub fn add(&mut self, scenario: &str, unit: &str, reference: &str, bound: Bound, rounds: &[(f64, f64)]) {
        self.note(scenario, unit, rounds);
        let ratios: Vec<_> = rounds.iter().map(|(ours, theirs)| ours / theirs).collect();
        let line = Line {
            scenario: scenario.to_owned(),
            ratio: median(&ratios),
            low: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            high: ratios.iter().copied().fold(0.0, f64::max),
            reference: reference.to_owned(),
            bound,
        };
        println!("{}", row(&line));
        self.lines.push(line);
    }

    /// Adds what belongs to the raw numbers alone.
    pub fn note(&mut self, what: &str, unit: &str, rounds: &[(f64, f64)]) {
        for (round, (ours, theirs)) in rounds.iter().enumerate() {
            let _ = writeln!(self.raw, "\"{what}\",{},{ours:.9},{theirs:.9},{unit}", round + 1);
        }
    }

    /// Writes `latest.csv`, `raw.csv` and `latest.md` into this folder.
    pub fn write(&self, folder: &Path, how: &str) -> Result<()> {
        let mut csv = "scenario,ratio,low,high,reference\n".to_owned();
        let mut table = format!(
            "{how}\n\n{}\n\n| scenario | ratio | rounds from–to | of | asked | met |\n|---|--:|--:|---|--:|---|\n",
            machine()
        );
        for line in &self.lines {
            let Line { scenario, ratio, low, high, reference, .. } = line;
            let _ = writeln!(csv, "\"{scenario}\",{ratio:.4},{low:.4},{high:.4},\"{reference}\"");
            let _ = writeln!(table, "{}", row(line));
        }
        fs::create_dir_all(folder).map_err(|error| error.to_string())?;
        let raw = format!("scenario,round,handler,reference,unit\n{}", self.raw);
        for (name, text) in [("latest.csv", csv), ("latest.md", table), ("raw.csv", raw)] {
            fs::write(folder.join(name), text).map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(())
    }
}

fn row(line: &Line) -> String {
    let met = line.bound.is_met(line.ratio).map_or("–", |met| if met { "yes" } else { "**no**" });
    format!(
        "| {} | {:.3} | {:.3}–{:.3} | {} | {} | {met} |",
        line.scenario,
        line.ratio,
        line.low,
        line.high,
        line.reference,
        line.bound.text()
    )
}

/// What the numbers were measured on.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (cpus, memory, kernel) = (read("/proc/cpuinfo"), read("/proc/meminfo"), read("/proc/sys/kernel/osrelease"));
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("an unnamed processor", |(_, model)| model.trim());
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    let gib = (kib.unwrap_or(0_u64) + 524_288) / 1_048_576;
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?");
    format!("Machine: {cores} × {model}, {gib} GiB, Linux {}; load at the end {load}.", kernel.trim())
}
