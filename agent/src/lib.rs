//! See main.rs.

pub mod cis;
pub mod facts;
pub mod init;
pub mod watch;
