//! Whom else our agents trust: roots of other trust domains and of peers with DNS names, as people hand them in.
//!
//! `trust import` reads what there is ([`read`]), says what each certificate is ([`judge`]) and keeps the roots
//! ([`store`]); the running collector notices and tells its agents in the directive. `trust verify` compares what agents
//! say they hold with what they were told ([`matrix`]).

pub mod command;
pub mod judge;
pub mod matrix;
pub mod read;
pub mod store;

#[cfg(test)]
mod made_up;

pub use store::{Applied, Store};
