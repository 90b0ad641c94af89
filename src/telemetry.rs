//! Logs, in the form the Functions host understands: one event per line, errors and warnings on stderr, the rest on stdout.
//!
//! The host turns a stdout line into Information, a stderr line that contains "warn" into Warning and any other stderr
//! line into Error (functions host, `WorkerProcess`). Invariant: an event is one line, whatever its values hold.

use std::{
    io::{self, Write},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tracing_subscriber::fmt::{MakeWriter, time::Uptime};

use crate::config::Role;

/// Installs the subscriber and the panic hook. A second call in one process (tests) changes nothing.
pub fn init(level: &str, role: Role) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(format!("{level},sqlx=warn,tiberius=off,actix_server=warn,actix_http=off"))
        .with_ansi(false)
        .with_target(false)
        .with_writer(Streams);
    let _ = match role {
        Role::Handler => builder.without_time().try_init(), // the host stamps each line
        Role::Standalone => builder.with_timer(Uptime::default()).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(place, "panic: {message}");
    }));
}

/// Lets a message through once a second at most, so that an outage does not fill the log.
#[derive(Default)]
pub(crate) struct LogLimiter(Mutex<Said>);

#[derive(Default)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

impl LogLimiter {
    /// `Some` if it is time to say it, with how often it went unsaid since the last time.
    pub(crate) fn next(&self) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            said.unsaid += 1;
            return None;
        }
        said.last = Some(Instant::now());
        Some(std::mem::take(&mut said.unsaid))
    }
}

/// Chooses the stream by level.
struct Streams;

impl<'a> MakeWriter<'a> for Streams {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Box::new(io::stdout()))
    }

    fn make_writer_for(&'a self, event: &tracing::Metadata<'_>) -> Line {
        match *event.level() <= tracing::Level::WARN {
            true => Line(Box::new(io::stderr())),
            false => self.make_writer(),
        }
    }
}

/// Writes one event as one line: line breaks inside it become the two characters `\n`.
struct Line(Box<dyn Write>);

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let inner = event.strip_suffix(b"\n").unwrap_or(event);
        let mut line = Vec::with_capacity(event.len());
        for &byte in inner {
            match byte {
                b'\n' => line.extend_from_slice(b"\\n"),
                b'\r' => line.extend_from_slice(b"\\r"),
                byte => line.push(byte),
            }
        }
        line.push(b'\n');
        // A closed stdout (`handler | head`) must not turn every event into a panic or an error.
        let _ = self.0.write_all(&line);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_message_is_let_through_once_a_second_and_tells_how_often_it_was_not() {
        let limiter = LogLimiter::default();
        assert_eq!(limiter.next(), Some(0), "the first one");
        assert_eq!([limiter.next(), limiter.next(), limiter.next()], [None; 3]);
        advance(Duration::from_millis(999)).await;
        assert_eq!(limiter.next(), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!(limiter.next(), Some(4), "a second after the last one that was said");
        assert_eq!(limiter.next(), None);
        advance(Duration::from_secs(60)).await;
        assert_eq!(limiter.next(), Some(1), "each is counted once");
        advance(Duration::from_secs(60)).await;
        assert_eq!(limiter.next(), Some(0), "and nothing that was said");
    }
}
