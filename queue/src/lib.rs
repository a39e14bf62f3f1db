//! A Postgres job engine for long jobs.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod config;
mod error;
pub mod private_server;
mod tls;

pub use config::QueueConfig;
pub use error::{Error, Place, Result};
