//! A Postgres job engine for long jobs.
//!
//! Jobs are rows; the engine is SQL functions in schema `brightrun` (see `schema.sql`); this crate
//! calls them and runs handlers. It knows queues, kinds, leases and attempts, and nothing of what
//! a job means: payloads, results and progress are opaque JSON.
//!
//! - [`Queue`] is the client: one method per function of the engine.
//! - [`Lane`] and [`LaneRunner`] are for jobs of milliseconds, where the engine would cost more than the work.
//! - [`Runner`] turns [`Handler`]s into a worker: it claims, beats, listens, sweeps and drains.
//! - [`private_server`] is a Postgres of one's own for demos and tests.
//!
//! Four promises, each spelt out with its test in the crate's README:
//!
//! 1. Each claim carries a fencing token, and every write about a running job is refused unless
//!    its token is the newest. A worker that was thought dead can do no harm.
//! 2. A cancel is never overwritten: whatever a worker reports afterwards ends as cancelled.
//! 3. Interruption is not failure: shutdown, preemption and snoozing use up no attempt.
//! 4. Only the database's clock decides, and nobody is declared dead because the database was away.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod bulk;
mod clock;
mod config;
mod connection;
mod dispatch;
mod error;
mod job;
mod lane;
mod operate;
mod outbox;
pub mod private_server;
mod queue;
mod runner;
mod sql;
mod subscription;
mod tls;
mod wake;

pub use config::QueueConfig;
pub use dispatch::{DispatchEnd, DispatchRequest, DispatchTicket, Dispatched, Spend, WaitingJob};
pub use error::{Error, Place, Result};
pub use job::{
    Blame, CancelReply, Claimed, Fallback, HeartbeatReply, JobEvent, JobFailure, JobState, JobStatus, KindStats, Lease,
    Machine, NewJob, Requirements,
};
pub use lane::{Batch, BatchJob, BatchPlace, Lane, LaneConfig, LaneHandler, LaneReport, LaneRunner, LaneStats};
pub use operate::{Alarm, Finding, OwnerBudget, Period, Rate, RateScope, Schedule, Scope, TopJob};
pub use outbox::OutboxMessage;
pub use queue::{ClaimRequest, ENGINE_VERSION, Queue};
pub use runner::{
    Ending, Granted, Handler, HeldJob, JobContext, NamedRun, OnDemand, Runner, RunnerConfig, RunnerReport, StopReason,
    StopSignal,
};

/// The examples of the README are compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
