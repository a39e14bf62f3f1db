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
//! Cases of the protocol's list and the tests that cover them. Tests are in `worker/tests/runpod_worker/` unless another file is named.
//!
//! | cases | where |
//! |---|---|
//! | T01–T18, T21, T22 | `taking` (each test's name begins with its cases) |
//! | T19, T20 | unit tests of [`routes`] |
//! | R01–R07 | `result::r01_to_r07…`, the rows of values; rows of streams are S04 and S05 |
//! | R08–R25 | `result` (R09–R11: `streaming::s04…`, `s05…`, `stopping::c01…`) |
//! | S01–S06 | `streaming` |
//! | P01–P04 | `progress` |
//! | H01–H06 | `heartbeat`; the watchdog: unit test of `heartbeat` |
//! | H07 | unit test of [`environment`] |
//! | H08, X01, X05, X06, L01–L03 | `runpod_process.rs`, with real signals and exit codes |
//! | C01–C06 | `stopping` |
//! | D01, D02, D04, D05 | `duplicates` |
//! | X02–X05, X07, F01–F03 | `leaving`; X02, X03, F01 also in `runpod_process.rs` |
//! | A01–A06 | `runpod_local.rs`; A03 with RunPod's Python client by hand: `tests/support/runpod_client.py` |
//! | G01 | `runpod_deploy.rs` |
//! | Z01 | `runpod_process.rs`, with 3,000 jobs and not 10,000 |
//! | Z02 | property tests of [`job`] |
//!
//! **D03** (resume after a crash) is a property of the handler: `tests/journeys/runpod.rs`.
//!
//! Not covered, and why: **H01**'s upper bound of ten
//! per cent and **T17**'s 100 ms are not timed, since tests time nothing; intervals are bounded from below, and T17 counts heartbeats
//! during fifty jobs. **R21** refuses an oversize output and never spills it to storage: outputs are references here. **S06** refuses and
//! never splits. **R22** runs for seconds and not for sixty. The **realtime** mode (`RUNPOD_REALTIME_PORT`) does not exist: no current
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
