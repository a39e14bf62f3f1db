//! Trains LoRA adapters from rows of a Postgres table.
//!
//! # Map
//!
//! | module | what it knows |
//! |---|---|
//! | [`dataset`] | bytes → examples, with every problem reported; split; packing |
//! | [`template`] | examples → text → token ids and the loss mask |
//! | [`model`] | Qwen families, written once over the op interface of `brightrun-kernels` |
//! | [`train`] | the step, the schedule, exact checkpoints, evaluation, generation |
//! | [`plan`] | parameters, memory, speed and cost of a run, from a configuration alone |
//! | [`artifact`] | the adapter's files: written atomically, reloaded, proven |
//! | [`storage`] | where files live: a local folder, Supabase Storage, S3 |
//! | [`hub`] | models from a hub to a folder: room checked first, resumed, verified |
//! | [`job`] | the life of one job, from claim to the final transaction |
//! | [`runpod`] | RunPod: the serverless worker, a local stand-in of its API, a client for an orchestrator |
//! | [`orchestrator`] | pushing waiting jobs to RunPod endpoints; what it counts |
//! | [`cli`] | the commands of `brightrun` |
//! | [`config`] | settings of the program: flags, environment, file |
//! | [`preflight`] | whether this machine can work: volume, model, storage, database, clock |
//! | [`recipe`] | from files to a proven adapter: what the command line and a job share |
//! | [`spec`] | every training setting: default, range, meaning |
//! | [`demo`] | the main job on one machine, with a private Postgres and a miniature model |
//! | [`error`] | the one outward error type, [`error::Failure`] |
//! | [`secret`] | a string that cannot be printed or serialised |
//!
//! # Absent on purpose
//!
//! SQL text (it lives in `schema.sql` and `queue/src/sql`), `unsafe`, and any name of a
//! compute backend in model code.

pub mod artifact;
pub mod bench;
pub mod cli;
pub mod config;
pub mod dataset;
pub mod demo;
pub mod error;
mod host;
pub mod hub;
pub mod job;
pub mod model;
pub mod orchestrator;
pub mod plan;
pub mod preflight;
pub mod recipe;
pub mod runpod;
pub mod secret;
pub mod spec;
pub mod storage;
pub mod template;
pub mod train;
