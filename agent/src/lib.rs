//! The agent beside one container: mutual TLS for its traffic, what it sees of it, and events that are not lost.
//!
//! Read in this order.

pub mod backoff;
pub mod config;
pub mod dial;
pub mod identity;
pub mod metrics;
pub mod policy;
pub mod proxy;
pub mod spool;
