//! See main.rs.

pub mod facts;
