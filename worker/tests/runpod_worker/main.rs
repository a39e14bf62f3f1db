//! The serverless worker against a scripted control plane, case by case of the protocol's conformance list.
//!
//! A test's name begins with the case it covers; `docs/reference/runpod-conformance.md` has the whole list.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../../tests/support/fake_runpod.rs"]
mod fake_runpod;
#[path = "../../../tests/support/runpod_worker.rs"]
mod support;

mod conformance;
mod duplicates;
mod heartbeat;
mod leaving;
mod progress;
mod result;
mod stopping;
mod streaming;
mod taking;
