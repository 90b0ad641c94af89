//! The handler's output as the host's log shows it: a level and a category per line.
//!
//! It owns the mapping and nothing else. Invariant: a line of stdout is never more than information.

use super::options::Dialect;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Information,
    Warning,
    Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Where the host files a console line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// `Host.Function.Console`, which the user sees.
    Console,
    /// Prefix `LanguageWorkerConsoleLog`, which is cut off.
    System,
    /// Prefix `azfuncjsonlog:`.
    Tooling,
}

/// One line of the handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleLine {
    pub level: Level,
    pub stream: Stream,
    pub category: Category,
    pub text: String,
}

impl ConsoleLine {
    /// A line as a host takes it; a newer host rewords a busy port.
    pub(super) fn read(stream: Stream, text: String, stderr_is_for_errors: bool, host: Dialect) -> Self {
        let lower = text.to_ascii_lowercase();
        let speaks_of_error =
            ["error", "fail", "severe", "unhandled exception"].iter().any(|word| lower.contains(word));
        let level = match stream {
            Stream::Stdout => Level::Information,
            Stream::Stderr if lower.contains("warn") => Level::Warning,
            Stream::Stderr if stderr_is_for_errors || speaks_of_error => Level::Error,
            Stream::Stderr => Level::Information,
        };
        let port_is_busy = lower.contains("address already in use") || lower.contains("eaddrinuse");
        let (category, text) = if let Some(rest) = text.strip_prefix("LanguageWorkerConsoleLog") {
            (Category::System, rest.to_string())
        } else if lower.starts_with("azfuncjsonlog:") {
            (Category::Tooling, text)
        } else if port_is_busy && stream == Stream::Stderr && host == Dialect::Proxy {
            (Category::Console, "Port is already in use. Process cannot start.".into())
        } else {
            (Category::Console, text)
        };
        Self { level, stream, category, text }
    }
}
