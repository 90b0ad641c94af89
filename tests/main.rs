//! The tests that need a process, a server or a socket: one binary, so that it is linked once.
//!
//! `support` starts private servers on free ports, breaks connections, and stands in for the Functions host.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod support;

mod cache;
mod coherence;
mod databases;
mod doctor;
mod faults;
mod get_product_by_id;
mod history;
#[cfg(unix)]
mod hooks;
mod host_stand_in;
mod infrastructure;
mod invalidate_cache;
mod model;
mod operations;
mod package;
mod redis_servers;
mod repository;
mod scenarios;
mod secrets;
mod sql_server;
mod startup;
