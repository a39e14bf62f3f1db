//! The pieces of the app's `model_artifacts` row.

use std::collections::BTreeMap;

use chrono::{Datelike, NaiveDate};
use serde::Serialize;
use serde_json::{Value, json};

use super::quality::QualityMetrics;

/// `model_artifacts.name` is VARCHAR(200), which counts characters.
const MAX_NAME_CHARS: usize = 200;

/// What the app reads from a finished adapter's row, by column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArtifactRow {
    /// Shown name.
    pub name: String,
    /// Always `1.0.0`.
    pub version: String,
    /// Always `stored`.
    pub status: String,
    /// Stars and losses.
    pub quality_metrics: QualityMetrics,
    /// Steps, loss, duration, cost.
    pub training_summary: Value,
    /// Preset, hyper-parameters, GPU.
    pub configuration: Value,
    /// File name → object path inside the bucket.
    pub artifacts: BTreeMap<String, String>,
}

impl ArtifactRow {
    /// Joins the pieces.
    pub fn new(
        name: String,
        quality_metrics: QualityMetrics,
        summary: &TrainingSummary,
        configuration: Value,
        artifacts: BTreeMap<String, String>,
    ) -> Self {
        Self {
            name,
            version: "1.0.0".to_owned(),
            status: "stored".to_owned(),
            quality_metrics,
            training_summary: summary.to_value(),
            configuration,
            artifacts,
        }
    }
}

/// `{data set|Model} - {M/D/YYYY}` in at most 200 characters; a long data set name gives way, the date
/// stays.
pub fn artifact_name(dataset_name: Option<&str>, date: NaiveDate) -> String {
    let ending = format!(" - {}/{}/{}", date.month(), date.day(), date.year());
    let name = dataset_name
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .unwrap_or("Model");
    let room = MAX_NAME_CHARS.saturating_sub(ending.chars().count());
    let shortened: String = name.chars().take(room).collect();
    shortened + &ending
}

/// What `training_summary` says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainingSummary {
    /// Passes over the examples.
    pub epochs_completed: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Last training loss.
    pub final_loss: Option<f64>,
    /// Duration in hours.
    pub training_duration_hours: f64,
    /// Cost in dollars.
    pub total_cost: f64,
}

impl TrainingSummary {
    /// The JSON the app formats: duration and cost are always finite numbers.
    pub fn to_value(&self) -> Value {
        let finite = |number: f64| if number.is_finite() { number } else { 0.0 };
        json!({
            "epochs_completed": self.epochs_completed,
            "total_steps": self.total_steps,
            "final_loss": self.final_loss.filter(|loss| loss.is_finite()),
            "training_duration_hours": finite(self.training_duration_hours),
            "total_cost": finite(self.total_cost),
        })
    }
}

/// `configuration`: the job's own JSON, in which both of the app's key dialects are present.
pub fn configuration(preset_id: &str, hyperparameters: &Value, gpu_config: &Value) -> Value {
    json!({ "preset_id": preset_id, "hyperparameters": hyperparameters, "gpu_config": gpu_config })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_name_fits_its_column_and_keeps_its_date() {
        let date = NaiveDate::from_ymd_opt(2026, 3, 7).unwrap();
        assert_eq!(artifact_name(Some("Support"), date), "Support - 3/7/2026");
        assert_eq!(artifact_name(None, date), "Model - 3/7/2026");
        assert_eq!(artifact_name(Some("  "), date), "Model - 3/7/2026");
        let long = artifact_name(Some(&"é".repeat(300)), date);
        assert_eq!(long.chars().count(), 200);
        assert!(long.ends_with("é - 3/7/2026"));
    }

    #[test]
    fn a_summary_has_only_finite_numbers() {
        let summary = TrainingSummary {
            final_loss: Some(f64::NAN),
            total_cost: f64::INFINITY,
            training_duration_hours: 0.25,
            ..TrainingSummary::default()
        };
        let expected = json!({
            "epochs_completed": 0, "total_steps": 0, "final_loss": null,
            "training_duration_hours": 0.25, "total_cost": 0.0,
        });
        assert_eq!(summary.to_value(), expected);
    }
}
