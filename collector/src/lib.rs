//! The collector: takes the events of all agents in, keeps them, and knows what is true now.
//!
//! Read in this order: what is true (`state`), how an event gets to disk (`log`, `commit`), how it is found again
//! (`index`), what is told to people (`alert`).

pub mod alert;
pub mod commit;
pub mod index;
pub mod log;
pub mod state;
