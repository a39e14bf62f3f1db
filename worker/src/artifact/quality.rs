//! The app's quality stars, by the rules its earlier backend had: the UI shows these keys and
//! sorts by `overall_score`.

use serde::{Deserialize, Serialize};

use crate::model::RoutingBalance;

/// `model_artifacts.quality_metrics`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QualityMetrics {
    /// Stars, 1–5.
    pub overall_score: u8,
    /// `excellent`, `good`, `fair`, `poor`, `overfit` or `unknown`.
    pub convergence_quality: String,
    /// Training loss of the last point.
    pub final_training_loss: Option<f64>,
    /// Held-out loss of the last point.
    pub final_validation_loss: Option<f64>,
    /// e to the final held-out loss.
    pub perplexity: Option<f64>,
    /// By how much the training loss fell, in percent of the first; absent without points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_reduction_percent: Option<f64>,
    /// How evenly routed experts were used; absent for models without any. It does not enter the stars.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingBalance>,
}

/// One point of the chart: training loss and, where evaluated, held-out loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossPoint {
    /// Training loss.
    pub training: f64,
    /// Held-out loss.
    pub validation: Option<f64>,
}

/// A held-out loss this far above the training loss counts as overfitting.
const OVERFIT_GAP: f64 = 0.5;

/// Rates a run by the points the app will show, in order of time.
pub fn rate(points: &[LossPoint]) -> QualityMetrics {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return unknown();
    };
    let reduction = (first.training - last.training) / first.training * 100.0;
    let reduction = if reduction.is_finite() { reduction } else { 0.0 };
    let (mut quality, mut score) = by_reduction(reduction);
    // The app's backend tests both for truth, so a loss of exactly zero is no ground to judge.
    let validation = last.validation.filter(|loss| loss.is_finite() && *loss != 0.0);
    if validation.is_some_and(|loss| last.training != 0.0 && loss - last.training > OVERFIT_GAP) {
        (quality, score) = ("overfit", (score - 1).max(2));
    }
    QualityMetrics {
        overall_score: score,
        convergence_quality: quality.to_owned(),
        final_training_loss: finite(last.training),
        final_validation_loss: last.validation.and_then(finite),
        perplexity: validation.map(f64::exp).and_then(finite),
        loss_reduction_percent: Some(reduction),
        routing: None,
    }
}

fn by_reduction(percent: f64) -> (&'static str, u8) {
    match percent {
        _ if percent > 50.0 => ("excellent", 5),
        _ if percent > 30.0 => ("good", 4),
        _ if percent > 15.0 => ("fair", 3),
        _ if percent > 5.0 => ("poor", 2),
        _ => ("poor", 1),
    }
}

fn unknown() -> QualityMetrics {
    QualityMetrics {
        overall_score: 3,
        convergence_quality: "unknown".to_owned(),
        final_training_loss: None,
        final_validation_loss: None,
        perplexity: None,
        loss_reduction_percent: None,
        routing: None,
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[track_caller]
    fn check(first: f64, last: f64, validation: Option<f64>, quality: &str, score: u8) {
        let point = |training, validation| LossPoint { training, validation };
        let rated = rate(&[point(first, None), point(9.0, Some(9.0)), point(last, validation)]);
        assert_eq!(
            (rated.convergence_quality.as_str(), rated.overall_score),
            (quality, score),
            "{rated:?}"
        );
    }

    #[test]
    fn stars_follow_the_reduction_with_exclusive_bounds() {
        check(2.0, 0.9, None, "excellent", 5);
        check(2.0, 1.0, None, "good", 4);
        check(2.0, 1.5, None, "fair", 3);
        check(2.0, 1.75, None, "poor", 2);
        check(2.0, 2.0, None, "poor", 1);
        check(2.0, 3.0, None, "poor", 1);
    }

    #[test]
    fn a_gap_above_one_half_is_overfitting_and_costs_a_star_down_to_two() {
        check(2.0, 0.5, Some(1.25), "overfit", 4);
        check(2.0, 0.5, Some(1.0), "excellent", 5);
        check(2.0, 2.0, Some(3.0), "overfit", 2);
        check(2.0, 0.0, Some(3.0), "excellent", 5);
    }

    #[test]
    fn no_points_are_three_stars_and_unknown() {
        let value = serde_json::to_value(rate(&[])).unwrap();
        let expected = serde_json::json!({
            "overall_score": 3, "convergence_quality": "unknown", "final_training_loss": null,
            "final_validation_loss": null, "perplexity": null,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn every_number_is_finite_or_null() {
        for training in [0.0, f64::NAN, f64::INFINITY, 1.0] {
            for validation in [None, Some(f64::NAN), Some(1e6), Some(0.0)] {
                let text = serde_json::to_string(&rate(&[LossPoint { training, validation }; 2])).unwrap();
                assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
                assert!(!text.contains("\"loss_reduction_percent\":null"), "{text}");
            }
        }
    }
}
