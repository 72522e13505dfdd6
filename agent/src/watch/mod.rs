//! When to look.
mod differ;
mod gate;
mod mask;
mod tracker;

pub use differ::differ;
pub use mask::mask;
