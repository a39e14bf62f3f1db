//! What a job tells the database, as typed messages.
//!
//! The app's tables are written by SQL functions in `schema.sql` (section 4), inside each transition of the queue. The
//! comment table there defines what every event may carry; these structs are its Rust side, and nothing else in this
//! program builds such JSON. All numbers are finite: what is not is left out.

use std::collections::BTreeMap;

use brightrun_kernels::Backend;
use chrono::Utc;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use uuid::Uuid;

use super::input::{Resolved, TrainJob};
use crate::artifact;
use crate::artifact::quality::LossPoint;
use crate::artifact::summary::{ArtifactRow, TrainingSummary, artifact_name, configuration};
use crate::error::Failure;
use crate::recipe::{Delivery, Learnt};

/// The report `resolved`: settings complete, both dialects.
#[derive(Clone, Debug, Serialize)]
pub struct ResolvedReport<'a> {
    hyperparameters: &'a Value,
    gpu_config: &'a Value,
    base_model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_steps: Option<u64>,
    total_epochs: usize,
}

impl<'a> ResolvedReport<'a> {
    /// From a resolved job; `total_steps` once the dataset has been counted.
    pub fn new(resolved: &'a Resolved, total_steps: Option<u64>) -> Self {
        Self {
            hyperparameters: &resolved.hyperparameters,
            gpu_config: &resolved.gpu_config,
            base_model: &resolved.base_model,
            total_steps,
            total_epochs: resolved.spec.epochs,
        }
    }
}

/// The report `running`: from here on compute time is billed.
#[derive(Clone, Debug, Serialize)]
pub struct RunningReport<'a> {
    /// What is being done, at most 50 characters.
    pub stage: &'a str,
    /// GPU type in the app's words.
    pub gpu_type: &'a str,
    /// Number of GPUs the user asked for.
    pub gpu_count: u32,
}

/// Measurements of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Mean loss per supervised token of the step.
    #[serde(serialize_with = "finite", skip_serializing_if = "is_absent")]
    pub training_loss: Option<f64>,
    /// Mean loss per supervised token of the held-out examples.
    #[serde(serialize_with = "finite", skip_serializing_if = "is_absent")]
    pub validation_loss: Option<f64>,
    /// Rate of the step.
    #[serde(serialize_with = "finite", skip_serializing_if = "is_absent")]
    pub learning_rate: Option<f64>,
    /// Tokens per second.
    #[serde(serialize_with = "finite", skip_serializing_if = "is_absent")]
    pub throughput: Option<f64>,
    /// Global norm before clipping.
    #[serde(serialize_with = "finite", skip_serializing_if = "is_absent")]
    pub gradient_norm: Option<f64>,
}

fn is_absent(value: &Option<f64>) -> bool {
    !value.is_some_and(f64::is_finite)
}

fn finite<S: Serializer>(value: &Option<f64>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    value.filter(|number| number.is_finite()).serialize(serializer)
}

/// One point of the app's chart.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    /// Optimizer step, counted from 1.
    pub step: u64,
    /// Epoch, counted from 1.
    pub epoch: u64,
    /// What was measured.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// Carried by a heartbeat.
#[derive(Clone, Debug, Serialize)]
pub struct Progress<'a> {
    /// 0–100, never falling.
    pub progress: f64,
    /// What is being done.
    pub stage: &'a str,
    /// Current epoch, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Current step, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// All steps of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
    /// Latest measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Estimated seconds to the end; absent while unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
    /// Points of the chart so far.
    #[serde(skip_serializing_if = "<[Point]>::is_empty")]
    pub points: &'a [Point],
    /// Seconds of compute of this attempt.
    pub gpu_seconds: f64,
}

/// The result of a finished job.
#[derive(Clone, Debug, Serialize)]
pub struct Completed<'a> {
    /// What was delivered.
    pub artifact: &'a CompletedArtifact,
    /// Final measurements.
    pub metrics: Metrics,
    /// Epochs done.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// The chart.
    pub points: &'a [Point],
    /// Seconds of compute of this attempt.
    pub gpu_seconds: f64,
    /// What was asked for and not done as asked, and what was dropped.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub warnings: &'a [String],
}

/// Compute time used by an attempt that ended without a result.
pub fn spend(gpu_seconds: f64) -> Value {
    json!({ "gpu_seconds": if gpu_seconds.is_finite() { gpu_seconds } else { 0.0 } })
}

/// The detail of a failure, besides its code, blame and message.
pub fn failure_detail(failure: &Failure, gpu_seconds: f64) -> Value {
    let mut detail = spend(gpu_seconds);
    detail["place"] = Value::from(failure.place.as_str());
    detail["hint"] = Value::from(failure.hint.as_str());
    detail
}

/// The artifact's row without its id's column type: what the projection stores in `model_artifacts`.
#[derive(Clone, Debug, Serialize)]
pub struct CompletedArtifact {
    /// Derived from the job's id.
    pub id: Uuid,
    /// The row.
    #[serde(flatten)]
    pub row: ArtifactRow,
}

/// The artifact row of a finished job.
pub fn artifact<B: Backend>(
    job: &TrainJob,
    resolved: &Resolved,
    learnt: &Learnt<B>,
    delivery: &Delivery,
    points: &[Point],
    paths: BTreeMap<String, String>,
) -> CompletedArtifact {
    let losses: Vec<LossPoint> = points
        .iter()
        .filter_map(|point| {
            Some(LossPoint {
                training: point.metrics.training_loss?,
                validation: point.metrics.validation_loss,
            })
        })
        .collect();
    let hours = learnt.summary.elapsed_seconds / 3600.0;
    let summary = TrainingSummary {
        epochs_completed: delivery.metrics.epochs,
        total_steps: delivery.metrics.steps,
        final_loss: delivery.metrics.last_training_loss,
        training_duration_hours: hours,
        total_cost: resolved.price_per_hour * f64::from(resolved.gpu_count) * hours,
    };
    CompletedArtifact {
        id: artifact::artifact_id(job.job_id),
        row: ArtifactRow::new(
            artifact_name(Some(&job.dataset.name), Utc::now().date_naive()),
            artifact::quality::QualityMetrics {
                routing: delivery.metrics.routing,
                ..artifact::quality::rate(&losses)
            },
            &summary,
            configuration(&job.preset_id, &resolved.hyperparameters, &resolved.gpu_config),
            paths,
        ),
    }
}

/// Any message as JSON.
pub fn encode(message: &impl Serialize) -> Value {
    serde_json::to_value(message).unwrap_or_else(|error| json!({ "encoding_error": error.to_string() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_left_out() {
        let metrics = Metrics {
            training_loss: Some(f64::NAN),
            learning_rate: Some(1e-4),
            ..Metrics::default()
        };
        assert_eq!(encode(&metrics), json!({ "learning_rate": 1e-4 }));
        assert_eq!(spend(f64::INFINITY), json!({ "gpu_seconds": 0.0 }));
    }

    #[test]
    fn a_point_is_flat() {
        let metrics = Metrics {
            training_loss: Some(2.5),
            ..Metrics::default()
        };
        assert_eq!(
            encode(&Point {
                step: 3,
                epoch: 1,
                metrics
            }),
            json!({ "step": 3, "epoch": 1, "training_loss": 2.5 })
        );
    }
}
