//! The cache against a real Redis, with a source of truth that can be held back, fail and hang: C1–C8 of the design, and
//! what it does when what it depends on is slow, fails or is scarce.

mod expiries;
mod l2;
mod loads;
mod log;
mod resilience;
mod stale_sets;

/// The invalidation log's name in Redis.
const LOG: &str = "{product-cache}:log";
