//! What agent and collector say to each other, and the rules both must keep alike.
//!
//! Almost everything here is data in, data out: no sockets, no clock. Read in this order.

pub mod backoff;
pub mod batch;
pub mod config;
pub mod crl;
pub mod directive;
pub mod enrol;
pub mod event;
pub mod evidence;
pub mod finding;
pub mod given;
pub mod guards;
pub mod identity;
pub mod policy;
pub mod secret;
pub mod session;
pub mod time;
pub mod tls;
pub mod traffic;
pub mod wire;
