//! From the training thread to the heartbeat: progress, chart points, and the question whether to stop.

use std::sync::Arc;
use std::time::Instant;

use brightrun_queue::StopReason;

use super::chart::is_charted;
use super::link::Link;
use super::projection::{self, Metrics, Point, Progress};
use crate::recipe::Delivery;
use crate::train::{self, Control, EvaluationReport, StepReport, TrainEvents};

/// What a job is doing, in the order it does it. The names are shown to users as `current_stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Copying the data set from storage.
    FetchingDataset,
    /// Reading and tokenising it.
    Validating,
    /// Loading the base model.
    Loading,
    /// Optimizer steps.
    Training,
    /// Writing the files, loading them again, recomputing the loss.
    Verifying,
    /// Copying the files to storage.
    Uploading,
}

impl Stage {
    /// The word in `current_stage`.
    pub fn name(self) -> &'static str {
        match self {
            Self::FetchingDataset => "fetching_dataset",
            Self::Validating => "validating",
            Self::Loading => "loading",
            Self::Training => "training",
            Self::Verifying => "verifying",
            Self::Uploading => "uploading",
        }
    }

    /// Percent of the job done when the stage begins.
    pub fn begins_at(self) -> f64 {
        match self {
            Self::FetchingDataset => 1.0,
            Self::Validating => 2.0,
            Self::Loading => 4.0,
            Self::Training => 8.0,
            Self::Verifying => 95.0,
            Self::Uploading => 97.0,
        }
    }
}

/// Listens to a run and speaks to the queue, or to whoever sent the job.
pub struct Reporter {
    link: Arc<dyn Link>,
    started: Instant,
    stage: Stage,
    points: Vec<Point>,
    latest: Option<StepReport>,
    validation_loss: Option<f64>,
}

impl Reporter {
    /// A reporter for a job whose compute began at `started`.
    pub fn new(link: Arc<dyn Link>, started: Instant) -> Self {
        Self {
            link,
            started,
            stage: Stage::Training,
            points: Vec::new(),
            latest: None,
            validation_loss: None,
        }
    }

    /// Begins a stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        tracing::info!(stage = stage.name(), "stage");
        self.say();
    }

    /// The chart so far.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Why the run was stopped.
    pub fn stop_reason(&self) -> StopReason {
        self.link.stop().unwrap_or(StopReason::Shutdown)
    }

    /// The last step's measurements with the proven held-out loss.
    pub fn final_metrics(&self, delivery: &Delivery) -> Metrics {
        let mut metrics = self
            .latest
            .as_ref()
            .map(|report| self.metrics(report))
            .unwrap_or_default();
        metrics.training_loss = metrics.training_loss.or(delivery.metrics.last_training_loss);
        metrics.validation_loss = delivery.metrics.last_validation_loss.or(metrics.validation_loss);
        metrics
    }

    fn metrics(&self, report: &StepReport) -> Metrics {
        Metrics {
            training_loss: Some(report.loss),
            validation_loss: self.validation_loss,
            learning_rate: Some(report.learning_rate),
            throughput: Some(report.tokens_per_second),
            gradient_norm: Some(report.gradient_norm),
        }
    }

    fn say(&self) {
        let latest = self.latest.as_ref();
        let (begin, end) = (Stage::Training.begins_at(), Stage::Verifying.begins_at());
        let trained = latest.map_or(0.0, |report| {
            begin + (end - begin) * (report.step as f64 / report.total_steps.max(1) as f64)
        });
        self.link.progress(projection::encode(&Progress {
            progress: self.stage.begins_at().max(trained),
            stage: self.stage.name(),
            epoch: latest.map(epoch_of),
            step: latest.map(|report| report.step as u64),
            total_steps: latest.map(|report| report.total_steps as u64),
            metrics: latest.map(|report| self.metrics(report)),
            seconds_left: latest.map(|report| report.eta_seconds),
            points: &self.points,
            gpu_seconds: self.started.elapsed().as_secs_f64(),
        }));
    }
}

fn epoch_of(report: &StepReport) -> u64 {
    report.epoch.ceil().max(1.0) as u64
}

impl TrainEvents for Reporter {
    fn control(&mut self) -> Control {
        match self.link.stop() {
            None => Control::Continue,
            Some(StopReason::Shutdown) => Control::Stop(train::StopReason::Shutdown),
            Some(_) => Control::Stop(train::StopReason::Cancel),
        }
    }

    fn on_step(&mut self, report: &StepReport) -> Control {
        if is_charted(report.step as u64, report.total_steps as u64) {
            self.points.push(Point {
                step: report.step as u64,
                epoch: epoch_of(report),
                metrics: self.metrics(report),
            });
        }
        tracing::debug!(step = report.step, loss = report.loss, "step");
        self.latest = Some(*report);
        self.say();
        self.control()
    }

    fn on_evaluate(&mut self, report: &EvaluationReport) {
        self.validation_loss = Some(report.evaluation.loss);
    }
}
