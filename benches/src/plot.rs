//! The plot: each bounded ratio as a dot with its spread, beside what was asked. SVG, by hand.
//!
//! Knows the report's lines and nothing else.

use std::{fmt::Write, fs, path::Path};

use crate::{
    Result,
    report::{Bound, Line, Report},
};

const LABELS: f64 = 470.0;
const WIDTH: f64 = 940.0;
const ROW: f64 = 20.0;
/// Ratios from here to there are shown, by their logarithm.
const FROM: f64 = 0.05;
const TO: f64 = 20.0;

/// Writes the lines that have a bound.
pub fn write(report: &Report, file: &Path) -> Result<()> {
    let lines: Vec<_> = report.lines.iter().filter(|line| !matches!(line.bound, Bound::None)).collect();
    fs::write(file, svg(&lines)).map_err(|error| format!("{}: {error}", file.display()))
}

fn x(ratio: f64) -> f64 {
    let share = (ratio.clamp(FROM, TO) / FROM).ln() / (TO / FROM).ln();
    LABELS + share * (WIDTH - LABELS - 20.0)
}

fn svg(lines: &[&Line]) -> String {
    let height = ROW * (lines.len() as f64 + 3.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for tick in [0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0] {
        let (x, bottom, text) = (x(tick), height - ROW * 1.5, height - ROW * 0.8);
        let colour = if tick == 1.0 { "#888" } else { "#ddd" };
        let _ = writeln!(svg, "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"6\" y2=\"{bottom}\" stroke=\"{colour}\"/>");
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{text}\" text-anchor=\"middle\" fill=\"#555\">{tick}</text>");
    }
    for (index, line) in lines.iter().enumerate() {
        let y = ROW * (index as f64 + 1.0);
        let (bound, met, arrow) = match line.bound {
            Bound::AtLeast(bound) => (bound, line.ratio >= bound, "≥"),
            Bound::AtMost(bound) => (bound, line.ratio <= bound, "≤"),
            Bound::None => continue,
        };
        let colour = if met { "#1a7f37" } else { "#b35900" };
        let label = line.scenario.replace('&', "&amp;").replace('<', "&lt;");
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LABELS - 12.0, y + 4.0);
        let (low, high, dot, asked) = (x(line.low), x(line.high), x(line.ratio), x(bound));
        let _ = writeln!(
            svg,
            "<line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"3\"/>\
             <circle cx=\"{dot:.1}\" cy=\"{y}\" r=\"4\" fill=\"{colour}\"/>\
             <text x=\"{asked:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#222\">{arrow}<title>{arrow} {bound}</title></text>",
            y + 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{LABELS}\" y=\"{:.1}\" fill=\"#555\">ratio to the reference, rounds from–to; ≥ and ≤ stand at what was asked</text>\n</svg>",
        height - ROW * 0.1
    );
    svg
}
