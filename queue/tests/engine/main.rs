//! The engine against a real Postgres, a module per property. One binary, so that one private
//! server serves all of them; each test has a database of its own.
#![allow(clippy::unwrap_used, clippy::panic)]

mod access;
mod budgets;
mod bulk;
mod cancel;
mod claim;
mod connect;
mod enqueue;
mod features;
mod fencing;
mod invariants;
mod lane;
mod lease_expiry;
mod lock_order;
mod machines;
mod newest;
mod operate;
mod outbox;
mod outside;
mod pg_cron;
mod projector;
mod rates;
mod retry;
mod runner;
mod state_machine;
mod support;
