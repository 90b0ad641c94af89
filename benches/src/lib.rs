//! What `scripts/bench` runs: the driver's parts, and what the small servers that the handler is compared with share.
//!
//! Owns nothing of the handler: it is started as a process and asked over HTTP, as a client would. Invariant: a number is
//! only ever a ratio of two things measured in turns, in one run, on one machine; a wrong answer ends the run.

pub mod catalogue;
pub mod load;
pub mod plot;
pub mod process;
pub mod reference;
pub mod report;
pub mod scenarios;
pub mod servers;

/// Why a run ends: an answer was wrong, or something could not be started.
pub type Result<T> = std::result::Result<T, String>;
