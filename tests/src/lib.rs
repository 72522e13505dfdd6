//! The stage on which agent and collector are shown together: the demo, and what the tests in real containers need.
//!
//! Both programs are used from outside only, as their users do: command line, metrics, alerts.

pub mod story;

pub mod alertmanager;
pub mod attacks;
pub mod events;
pub mod http;
pub mod metrics;
pub mod scene;
pub mod wire;

pub mod service;
pub mod tap;

pub mod stage;

pub mod docker;
pub mod images;
pub mod packages;
pub mod programs;
pub mod python;
pub mod suite;
pub mod workspace;

pub mod command;
pub mod interrupt;
pub mod progress;
