//! The collector: takes the events of all agents in, keeps them, and knows what is true now.
//!
//! Read in this order: how it is put together (`app`, `config`), what is true (`state`), how an event gets to disk
//! (`log`, `commit`) and is found again (`index`), who may come in (`ca`, `fleet`, `identity`, `ingest`), what is told to people
//! (`alert`, `api`, `page`) and to Prometheus (`metrics`), and the commands that ask a running collector (`client`,
//! `table`).

pub mod app;
pub mod config;

pub mod commit;
pub mod evidence;
pub mod index;
pub mod log;
pub mod posture;
pub mod report;
pub mod state;

pub mod ca;
pub mod fleet;
pub mod identity;
pub mod ingest;
pub mod trust;

pub mod alert;
pub mod api;
pub mod metrics;
pub mod page;

pub mod client;
pub mod table;

/// Fills `bytes` from the system's randomness.
///
/// aws-lc aborts the process rather than give weak randomness, so there is no error to handle.
pub fn random(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the system has randomness");
}
