//! `cargo verify`: every test, with what they need installed, started and built first. Arguments go to `cargo test`.
fn main() {}
