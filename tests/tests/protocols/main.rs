//! Real protocols through a pair of agents: servers and clients of Debian and of PyPI, unchanged, which know nothing of
//! the two agents between them. Their own load tools run too.
//!
//! client -> web's agent -> a wire that is looked into -> orders' agent -> server. Each test tells what the client got,
//! that the wire carried nothing but sealed records, and that metrics and events of both agents counted every
//! connection once.
//!
//! `cargo verify` provides the programs; a test that lacks one fails and says what to install.

#[allow(dead_code)]
#[path = "../world/mod.rs"]
mod world;

mod bulk;
mod databases;
mod messaging;
mod pair;
mod storage;
mod ways;
mod web;
