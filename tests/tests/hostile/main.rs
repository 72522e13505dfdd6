//! Everybody who should not get in, and everything that is hard about letting the others in: an agent with a real
//! collector behind it, attacked from outside. Each test tells what the attacker saw, which reason the event gave, and
//! that a good client still gets through.
//!
//! What needs a process of its own (descriptors that run out, SIGTERM) is in `agent/tests/pressure.rs`, what needs a
//! change of identity in the middle in `agent/src/proxy/tests`.

#[allow(dead_code)]
#[path = "../world/mod.rs"]
mod world;

mod certificates;
mod crowd;
mod gate;
mod hellos;
#[allow(dead_code)] // what other tests make of it
mod mint;
mod records;
mod resumption;
mod streams;
mod tools;
