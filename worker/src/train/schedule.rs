//! The learning rate of each optimizer step, by Hugging Face's convention: the first step of a warm-up has rate 0.

use crate::spec::{Schedule, TrainSpec};

/// A schedule over a known number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    peak: f64,
    schedule: Schedule,
    warmup_steps: usize,
    total_steps: usize,
}

impl LearningRate {
    /// The schedule of a run of `total_steps`. A warm-up given as a ratio is rounded up to whole steps, but
    /// never takes the last one: a run of one step would else learn nothing.
    pub fn new(spec: &TrainSpec, total_steps: usize) -> Self {
        let by_ratio = (f64::from(spec.warmup_ratio) * total_steps as f64).ceil() as usize;
        let by_ratio = by_ratio.min(total_steps.saturating_sub(1));
        Self {
            peak: f64::from(spec.learning_rate),
            schedule: spec.schedule,
            warmup_steps: spec.warmup_steps.unwrap_or(by_ratio),
            total_steps,
        }
    }

    /// The rate of a step, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        self.peak * self.share(step)
    }

    fn share(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decaying_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / decaying_steps).min(1.0);
        match self.schedule {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => 1.0 - progress,
            Schedule::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup_steps: usize, total: usize) -> Vec<f64> {
        let spec = TrainSpec {
            learning_rate: 1.0,
            schedule,
            warmup_steps: Some(warmup_steps),
            ..TrainSpec::default()
        };
        let rate = LearningRate::new(&spec, total);
        (0..=total).map(|step| rate.at(step)).collect()
    }

    #[test]
    fn a_warm_up_starts_at_zero_and_reaches_the_peak_after_its_steps() {
        for schedule in [Schedule::Cosine, Schedule::Linear, Schedule::Constant] {
            assert_eq!(rates(schedule, 4, 10)[..5], [0.0, 0.25, 0.5, 0.75, 1.0]);
        }
    }

    #[test]
    fn cosine_and_line_end_at_zero_and_are_half_way_in_the_middle() {
        for schedule in [Schedule::Cosine, Schedule::Linear] {
            let rates = rates(schedule, 0, 8);
            assert_eq!(rates[0], 1.0);
            assert!((rates[4] - 0.5).abs() < 1e-15 && rates[8].abs() < 1e-15);
        }
    }

    #[test]
    fn a_ratio_is_rounded_up_to_whole_steps() {
        let spec = TrainSpec {
            learning_rate: 1.0,
            warmup_ratio: 0.1,
            ..TrainSpec::default()
        };
        let rate = LearningRate::new(&spec, 11);
        assert_eq!([rate.at(0), rate.at(1), rate.at(2)], [0.0, 0.5, 1.0]);
    }

    #[test]
    fn a_run_of_one_step_learns() {
        let spec = TrainSpec {
            learning_rate: 1.0,
            ..TrainSpec::default()
        };
        assert_eq!(LearningRate::new(&spec, 1).at(0), 1.0);
        assert_eq!(LearningRate::new(&spec, 2).at(1), 1.0);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_cut_off_without_harm() {
        let rates = rates(Schedule::Cosine, 100, 3);
        assert_eq!(rates, [0.0, 0.01, 0.02, 0.03]);
    }
}
