//! The agent beside one container: mutual TLS for its traffic, what it sees of it, and events that are not lost.
//!
//! Read in this order.

pub mod config;
pub mod app;
pub mod proxy;
pub mod policy;
pub mod identity;
pub mod facts;
pub mod cis;
pub mod watch;
pub mod init;
pub mod spool;
pub mod uplink;
pub mod admin;
pub mod metrics;
pub mod dial;
pub mod backoff;
