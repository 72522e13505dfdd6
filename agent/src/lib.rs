//! See main.rs.

pub mod cis;
pub mod facts;
pub mod watch;
