//! RunPod.
pub mod client;
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
