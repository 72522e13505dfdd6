//! See main.rs.

pub mod alert;
