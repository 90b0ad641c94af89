//! Serves *GET product by id* from memory, Redis and SQL, and keeps every instance's memory right when a product
//! changes: an Azure Functions custom handler.
//!
//! Two journeys cross the modules, top to bottom:
//!
//! ```text
//! read        GetProductById → functions → cache::get_or_load → memory → Redis → product::load → the stored bytes
//! invalidate  InvalidateCache → functions → cache::expire → Redis → the invalidation log → every instance's memory
//! ```
//!
//! Modules, from the outside in (each uses only those below it):
//!
//! | module | owns |
//! |---|---|
//! | [`doctor`] | `handler doctor`: what a deployment usually gets wrong |
//! | [`functions`] | one file per function folder, the routes, the [`functions::App`] they share; product and cache meet here |
//! | [`product`] | the entity: its id, its columns, its JSON |
//! | [`cache`] | get-or-load and expire: memory, Redis, leases, the log; knows no entity |
//! | [`redis`] | the one Redis pool |
//! | [`database`] | the one database pool; the only place that names an engine |
//! | `entra`, `finding` | tokens of the app's managed identity; what the doctor finds |
//! | [`foreground`], [`background`] | the threads that answer requests, and tasks that must not die |
//! | [`config`], [`telemetry`] | settings, logs |
//!
//! What always holds, and is tested (docs/coherence.md): one load per key and instance (C1) and, while Redis answers, per cluster (C2); no
//! load that began before an expiry is stored or shown after it (C3); an acknowledged expiry is in Redis and in the
//! log (C4); nothing in the log is missed (C5); an instance that cannot hear trusts its memory for seconds only (C6);
//! an expiry is never dropped (C7); no instances' clocks are compared (C8). Reads forgive the cache (S1), every wait
//! is bounded (S2), nothing is needed to start (S3), no answer lies about where it is from (S4), and no secret is
//! printed (S5).

pub mod background;
pub mod cache;
pub mod config;
pub mod database;
pub mod doctor;
mod entra;
mod finding;
pub mod foreground;
pub mod functions;
pub mod product;
pub mod redis;
pub mod telemetry;
