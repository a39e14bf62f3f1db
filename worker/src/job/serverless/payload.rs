//! Progress and results in the words that the app's poller reads in a RunPod job's `output`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::recipe::Delivery;

/// Measurements the poller knows.
const METRICS: [&str; 5] = [
    "training_loss",
    "validation_loss",
    "learning_rate",
    "throughput",
    "gradient_norm",
];

/// A progress update: `{progress, current_epoch, current_step, total_steps?, stage, status, metrics {…}}`, from a job's own
/// [`Progress`](crate::job::projection::Progress). The chart's points stay behind: an update is small.
pub fn progress(own: &Value) -> Value {
    let number = |name: &str| own.get(name).filter(|value| value.is_number()).cloned();
    let known = |name: &&str| {
        let value = own.pointer(&format!("/metrics/{name}"))?;
        value.is_number().then(|| ((*name).to_owned(), value.clone()))
    };
    let metrics: Map<String, Value> = METRICS.iter().filter_map(known).collect();
    let mut told = json!({
        "status": "running",
        "stage": own.get("stage"),
        "progress": number("progress").unwrap_or_else(|| json!(0)),
        "current_epoch": number("epoch").unwrap_or_else(|| json!(0)),
        "current_step": number("step").unwrap_or_else(|| json!(0)),
        "metrics": metrics,
    });
    for (name, own_name) in [("total_steps", "total_steps"), ("eta_seconds", "seconds_left")] {
        if let Some(value) = number(own_name) {
            told[name] = value;
        }
    }
    told
}

/// The result of a job whose row has ended well: references only. `result` is the row's own.
pub fn of_row(job_id: uuid::Uuid, result: &Value) -> Value {
    let at = |pointer: &str| result.pointer(pointer).cloned().unwrap_or(Value::Null);
    json!({
        "status": "success",
        "job_id": job_id,
        "artifact_id": at("/artifact/id"),
        "artifacts": at("/artifact/artifacts"),
        "model_metadata": {
            "base_model": at("/artifact/configuration/hyperparameters/base_model"),
            "final_loss": at("/metrics/training_loss"),
            "training_time": at("/gpu_seconds"),
        },
        "progress": 100,
        "current_epoch": at("/epoch"),
        "current_step": at("/step"),
    })
}

/// What is told of a finished whole job.
pub struct Success<'a> {
    /// The client's name of the job.
    pub job_id: &'a str,
    /// The base model's name.
    pub base_model: &'a str,
    /// LoRA rank.
    pub rank: usize,
    /// File name → address that reads it without a credential.
    pub urls: BTreeMap<String, String>,
    /// File name → path in the bucket.
    pub paths: &'a BTreeMap<String, String>,
    /// The proven files and the run's numbers.
    pub delivery: &'a Delivery,
    /// Seconds from the model's loading to the last upload.
    pub seconds: f64,
    /// What was asked for and not done as asked.
    pub warnings: &'a [String],
}

impl Success<'_> {
    /// The output.
    pub fn output(&self) -> Value {
        let finite = |value: Option<f64>| value.filter(|number| number.is_finite());
        let metrics = &self.delivery.metrics;
        let mut output = json!({
            "status": "success",
            "job_id": self.job_id,
            "model_files": self.urls,
            "artifacts": self.paths,
            "model_metadata": {
                "base_model": self.base_model,
                "lora_rank": self.rank,
                "final_loss": finite(metrics.last_training_loss),
                "validation_loss": finite(metrics.last_validation_loss),
                "training_time": finite(Some(self.seconds)),
            },
            "progress": 100,
            "current_epoch": metrics.epochs,
            "current_step": metrics.steps,
        });
        if !self.warnings.is_empty() {
            output["warnings"] = json!(self.warnings);
        }
        output
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_speaks_the_pollers_words_and_leaves_the_chart_behind() {
        let own = json!({
            "progress": 40.5, "stage": "training", "epoch": 1, "step": 7, "total_steps": 20, "seconds_left": 12.0,
            "metrics": {"training_loss": 2.5, "learning_rate": 1e-4, "strange": 1},
            "points": [{"step": 1}], "gpu_seconds": 3.0,
        });
        assert_eq!(
            progress(&own),
            json!({
                "status": "running", "stage": "training", "progress": 40.5, "current_epoch": 1, "current_step": 7,
                "metrics": {"training_loss": 2.5, "learning_rate": 1e-4}, "total_steps": 20, "eta_seconds": 12.0,
            })
        );
    }

    #[test]
    fn before_the_first_step_epoch_and_step_are_zero() {
        let told = progress(&json!({"progress": 4.0, "stage": "loading"}));
        assert_eq!((&told["current_epoch"], &told["current_step"]), (&json!(0), &json!(0)));
    }
}
