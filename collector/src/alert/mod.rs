//! Conditions that last, told to people: rules read events, the engine decides what fires, sinks pass it on.

pub mod engine;
pub mod rule;
