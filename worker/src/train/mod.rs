//! Training: from encoded examples and a frozen model to a trained adapter.
//!
//! # Map
//!
//! | module | what |
//! |---|---|
//! | [`run`](mod@run) | the whole of a run: [`run()`](run::run), its request, events and summary |
//! | [`step`] | one optimizer step: packing, accumulation, clipping, the non-finite stop |
//! | [`repeat`] | micro-batches recorded once and replayed, where the backend can |
//! | [`optimizer`], [`schedule`] | AdamW's moments; the learning rate of each step |
//! | [`data_order`] | which examples a step sees: a pure function of seed and step |
//! | [`checkpoint`] | everything exact continuation needs, in one file that is whole or absent |
//! | [`eval`] | mean loss per supervised token, in total and per example |
//! | [`generate`](mod@generate) | text from a prompt, greedy or sampled |
//!
//! # Invariants
//!
//! - The same model, examples, settings and seed give the same adapter bytes, at any number of threads.
//! - A resumed run gives the same adapter bytes as an uninterrupted one, wherever it was interrupted.
//! - No example is dropped or cut here: what cannot be trained is an error that names its line.

pub mod checkpoint;
pub mod data_order;
pub mod eval;
pub mod example;
pub mod generate;
pub mod optimizer;
pub mod repeat;
pub mod run;
pub mod schedule;
pub mod step;

pub use self::eval::{Evaluation, ExampleLoss, evaluate};
pub use self::example::EncodedExample;
pub use self::generate::{GenerateSettings, generate};
pub use self::run::{
    CheckpointReport, Control, EvaluationReport, Outcome, StepReport, StopReason, TrainEvents, TrainRequest,
    TrainSummary, run,
};
