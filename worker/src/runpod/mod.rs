//! RunPod: a serverless worker, a local stand-in of its API, and a client for an orchestrator.
//!
//! The worker is a *client*: it long-polls one address for jobs, posts results to another, sends heartbeats to a third and
//! long-polls a fourth for jobs to be stopped. Nothing here knows about training; the work is a [`Handler`].
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use brightrun_worker::runpod::{Environment, Handler, Settings, Worker};
//! # fn main_of_worker(handler: Arc<dyn Handler>) -> brightrun_worker::error::Result<u8> {
//! let variables = Environment::variables();
//! let settings = Settings::default().with_variables(&variables)?;
//! let jobs = tokio::runtime::Runtime::new().expect("a runtime");
//! let exit = Worker::new(Environment::read(&variables)?, settings).run(handler, jobs.handle().clone());
//! jobs.shutdown_background(); // A handler that cannot be stopped is not waited for.
//! Ok(exit.code)
//! # }
//! ```
//!
//! # Map
//!
//! | module | what it knows |
//! |---|---|
//! | [`environment`], [`routes`] | the platform's variables and address templates |
//! | [`handler`] | the seam: what a job may do while it runs |
//! | [`worker`] | settings in, exit code out |
//! | `supervisor` | the loop: takes, slots, stops, the ways out |
//! | `take`, `stop`, `heartbeat` | the three polls; the heartbeat has a thread of its own |
//! | `running` | one job from its slot to its acknowledged result |
//! | `pump`, `post` | progress, chunks and results on one ordered channel |
//! | `memory` | results on disk before they are posted, remembered after |
//! | [`job`], [`outcome`] | JSON in, JSON out |
//! | `fitness` | checks before the first job |
//! | [`logs`], [`redact`] | lines as RunPod's console reads them, without credentials |
//! | [`local`] | the public API on this machine |
//! | [`client`], [`status`] | the public API from an orchestrator's side |
//! | [`deploy`] | the calls that would create an endpoint |
//! | [`pace`] | every waiting time |
//!
//! # Invariants
//!
//! 1. A job is in every heartbeat from the moment its take answer is read until its result is acknowledged or given up.
//! 2. No progress update is sent once a job has ended; its result is posted after the last one was answered or cut off.
//! 3. A result is on disk before it is posted (where a folder is given), and posted until an answer decides.
//! 4. A stopped job posts nothing. A job that does not stop ends the process: the platform replaces the worker.
//! 5. A take is never cancelled to change its parameters; a job on the open take of a leaving worker is run, or never reported.
//! 6. `error` is a non-empty string.
//! 7. No credential is in an error, a log line or a file.
//!
//! # Where this differs from RunPod's SDK 1.12.0
//!
//! On purpose, each after a measured defect: results survive dropped connections and 429; errors of a take are paced; progress is
//! ordered and cannot overtake the result; heartbeats stop with the process; an element without id does not end the worker; an absent
//! input is `{}`; the next take follows a result at once; SIGTERM does not wait for open polls; a returned refresh ends the taking;
//! the network check asks the control plane.
//!
//! # Conformance
//!
//! `docs/reference/runpod-conformance.md` has every case of the protocol's list with the tests that cover it; a test reads that table. Tests
//! time nothing: intervals are bounded from below, and what is bounded from above (heartbeats within ten per cent of their interval,
//! 100 ms from a result to the next take, 300 ms from start to ready) is measured by `worker/examples/serverless_bench.rs`.
//!
//! An oversize output is refused and never spilled to storage (R21), since outputs are references here, and a large chunk is refused and
//! never split (S06). The **realtime** mode (`RUNPOD_REALTIME_PORT`) does not exist, only its route in the SDK's local API: no current
//! documentation mentions it. Bundled root certificates are not carried; the image has the system's.

pub mod client;
pub mod deploy;
pub mod environment;
pub mod handler;
pub mod job;
pub mod local;
pub mod logs;
pub mod outcome;
pub mod pace;
pub mod redact;
pub mod routes;
pub mod status;
pub mod worker;

mod fitness;
mod heartbeat;
mod http;
mod memory;
mod post;
mod pump;
mod running;
mod stop;
mod supervisor;
mod take;

pub use client::{ClientOptions, Health, Policy, RemoteJob, RunPodClient};
pub use environment::Environment;
pub use handler::{Claim, Handler, JobContext, OutputForm, StopReason, StopSignal};
pub use job::RunPodJob;
pub use local::{Compatibility, LocalApi, LocalFlags, LocalOptions};
pub use logs::LogLayer;
pub use pace::Pace;
pub use redact::Redactor;
pub use status::JobStatus;
pub use worker::{DrainMode, Exit, Settings, Shutdown, Worker};
