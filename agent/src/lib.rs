//! The agent beside one container: mutual TLS for its traffic, what it sees of it, and events that are not lost.
//!
//! Read in this order.

pub mod admin;
pub mod app;
pub mod cis;
pub mod config;
pub mod dial;
pub mod facts;
pub mod identity;
pub mod image;
pub mod init;
pub mod intercept;
pub mod metrics;
pub mod node;
pub mod policy;
pub mod proxy;
pub mod report;
pub mod respond;
pub mod spool;
pub mod uplink;
pub mod watch;
