//! RunPod.
pub mod environment;
pub mod handler;
pub mod job;
pub mod logs;
pub mod outcome;
pub mod pace;
pub mod redact;
pub mod routes;
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

pub use environment::Environment;
pub use handler::{Claim, Handler, JobContext, OutputForm, StopReason, StopSignal};
pub use job::RunPodJob;
pub use logs::LogLayer;
pub use pace::Pace;
pub use redact::Redactor;
pub use worker::{DrainMode, Exit, Settings, Shutdown, Worker};
