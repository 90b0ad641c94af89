//! What happened: reads, writes and disturbances, with times from one monotonic clock, the test's own.

use std::{
    fmt,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// Time since the run began.
pub type Time = Duration;
/// Not yet.
pub const NEVER: Time = Duration::MAX;

/// What a read was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// 200, with this version in it.
    Version(u64),
    /// 404, or `null` in an array.
    Absent,
    /// 503.
    Unavailable,
    /// The connection ended without an answer.
    Nothing(String),
    /// What must never be answered.
    Nonsense(String),
}

/// One key of one GET.
#[derive(Clone, Debug)]
pub struct Read {
    pub instance: usize,
    pub life: u32,
    pub key: i64,
    pub from: Time,
    pub to: Time,
    pub seen: Seen,
    /// `Cache-Status` as it came.
    pub status: String,
    /// Whether it is about this key alone: of a GET of several it tells one reason for being stale, of one of them.
    pub alone: bool,
}

impl Read {
    /// Whether the answer itself says that it may be outdated.
    pub fn says_stale(&self) -> bool {
        self.says_failed() || self.says_slow()
    }

    /// Whether it says that the database is slow.
    pub fn says_slow(&self) -> bool {
        self.status.contains("database-slow")
    }

    /// Whether it says that the database failed.
    pub fn says_failed(&self) -> bool {
        self.status.contains("database-failed")
    }
}

/// One committed change of one row.
#[derive(Clone, Debug)]
pub struct Write {
    pub key: i64,
    pub version: u64,
    pub deleted: bool,
    pub begun: Time,
    pub committed: Time,
    pub acknowledged: Option<Acknowledgement>,
}

/// An instance took the responsibility for an expiry.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledgement {
    pub at: Time,
    pub instance: usize,
    /// By delivering later what it had answered with 503 (C7), not by a 2xx.
    pub late: bool,
}

/// What a disturbance excuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excuse {
    /// A stale answer that says so, or none: the database cannot be asked.
    Ignorance,
    /// Hearing the log late.
    Deafness,
    /// That, and answering late or, as loads time out, not at all.
    Pause,
    /// All of that, and not answering.
    Death,
}

/// Something the nemesis did, or that the machine did to the test.
#[derive(Clone, Debug)]
pub struct Disturbance {
    pub what: String,
    pub from: Time,
    pub to: Time,
    /// `None`: all of them.
    pub instance: Option<usize>,
    pub excuse: Excuse,
    /// How much longer than `to` its effects may last.
    pub recovery: Duration,
}

impl Disturbance {
    pub fn touches(&self, instance: usize, from: Time, to: Time) -> bool {
        self.instance.is_none_or(|own| own == instance)
            && self.from <= to
            && from <= self.to.saturating_add(self.recovery)
    }
}

/// All of it.
#[derive(Clone, Default)]
pub struct History {
    pub reads: Vec<Read>,
    pub writes: Vec<Write>,
    pub disturbances: Vec<Disturbance>,
    /// When each life of each instance began.
    pub births: Vec<(usize, u32, Time)>,
}

/// The clock, and the history so far.
pub struct Recorder {
    began: Instant,
    history: Mutex<History>,
}

impl Recorder {
    pub fn new() -> Self {
        Self { began: Instant::now(), history: Mutex::default() }
    }

    pub fn now(&self) -> Time {
        self.began.elapsed()
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap()
    }

    /// Notes that something goes wrong from now on; returns its place, for [`Self::over`].
    pub fn disturbed(&self, mut disturbance: Disturbance) -> usize {
        disturbance.from = self.now();
        let mut history = self.history();
        history.disturbances.push(disturbance);
        history.disturbances.len() - 1
    }

    pub fn over(&self, place: usize) {
        self.history().disturbances[place].to = self.now();
    }
}

/// Seconds with microseconds.
pub fn seconds(time: Time) -> String {
    if time == NEVER { "…".to_owned() } else { format!("{:.6}", time.as_secs_f64()) }
}

impl fmt::Display for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instance, life, key, seen, status, .. } = self;
        let (from, to) = (seconds(self.from), seconds(self.to));
        write!(f, "{from} – {to} read  {key} of instance {instance} (life {life}): {seen:?}  [{status}]")
    }
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (seconds(self.begun), seconds(self.committed));
        let kind = if self.deleted { "deletes" } else { "writes" };
        write!(f, "{from} – {to} write {} {kind} version {}; ", self.key, self.version)?;
        match self.acknowledged {
            None => write!(f, "never acknowledged"),
            Some(Acknowledgement { at, instance, late }) => {
                let how = if late { "delivered after a 503 by" } else { "acknowledged by" };
                write!(f, "{how} instance {instance} at {}", seconds(at))
            }
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} – {} fault {}", seconds(self.from), seconds(self.to), self.what)
    }
}
