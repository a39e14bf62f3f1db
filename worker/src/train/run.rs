//! A whole run: rehearse, step, report, checkpoint, evaluate, stop when asked.

use std::path::{Path, PathBuf};
use std::time::Instant;

use brightrun_kernels::Backend;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::model::{LoraSet, Model};
use crate::spec::TrainSpec;
use crate::train::checkpoint::{CheckpointFolder, RunIdentity, TrainState};
use crate::train::data_order::DataOrder;
use crate::train::eval::{Evaluation, evaluate};
use crate::train::example::{EncodedExample, check_examples, fingerprint};
use crate::train::schedule::LearningRate;
use crate::train::step::{StepOutcome, Trainer, longest_micro_batch};

/// What a run needs.
pub struct TrainRequest<'a, B: Backend> {
    /// The frozen model.
    pub model: &'a Model<B>,
    /// The adapter: in, its initial values; out, the trained ones.
    pub lora: &'a mut LoraSet<B>,
    /// All settings.
    pub spec: &'a TrainSpec,
    /// Training examples.
    pub train: &'a [EncodedExample],
    /// Held-out examples; may be empty.
    pub validation: &'a [EncodedExample],
    /// Where checkpoints lie; without it there are none.
    pub checkpoint_dir: Option<&'a Path>,
    /// Whether to continue from the newest checkpoint; otherwise checkpoints found there are removed.
    pub resume: bool,
}

/// Why a run is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// Nobody wants the result any more.
    Cancel,
    /// The process is to end; another will continue.
    Shutdown,
}

/// The answer of an event: go on or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Write a checkpoint and stop.
    Stop(StopReason),
}

/// One finished optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Its number, counted from 1.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean loss per supervised token, before the update.
    pub loss: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Global gradient norm, before clipping.
    pub gradient_norm: f64,
    /// Tokens read by this step.
    pub tokens: usize,
    /// Tokens read by this step, per second.
    pub tokens_per_second: f64,
    /// Seconds of training so far, over all attempts.
    pub elapsed_seconds: f64,
    /// Seconds left, by this attempt's mean time per step.
    pub eta_seconds: f64,
}

/// A written checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointReport {
    /// Optimizer steps it holds.
    pub step: usize,
    /// Its file.
    pub path: PathBuf,
}

/// A finished evaluation on the held-out examples.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationReport {
    /// Optimizer steps done before it.
    pub step: usize,
    /// The result.
    pub evaluation: Evaluation,
}

/// What a run tells and asks. All are called on the training thread.
pub trait TrainEvents {
    /// Asked before each micro-batch: this is how fast a run stops. An answer once given is asked for again.
    fn control(&mut self) -> Control {
        Control::Continue
    }
    /// After each optimizer step.
    fn on_step(&mut self, report: &StepReport) -> Control;
    /// After each checkpoint.
    fn on_checkpoint(&mut self, _report: &CheckpointReport) {}
    /// After each evaluation.
    fn on_evaluate(&mut self, _report: &EvaluationReport) {}
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop; a checkpoint of the last whole step is written if there is a folder for it.
    Stopped(StopReason),
}

/// The run in numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSummary {
    /// How it ended.
    pub outcome: Outcome,
    /// Optimizer steps done, over all attempts.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Step at which this attempt took over; `None` when it started anew.
    pub resumed_from: Option<usize>,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// Tokens read, over all attempts.
    pub tokens: u64,
    /// Seconds of training, over all attempts.
    pub elapsed_seconds: f64,
    /// The evaluation after the last step, when there are held-out examples.
    pub evaluation: Option<Evaluation>,
    /// Number of trained values.
    pub trainable_parameters: usize,
    /// Bytes of the optimizer's moments.
    pub optimizer_bytes: u64,
    /// The most bytes that tensors occupied.
    pub peak_bytes: u64,
}

/// Trains `request.lora`.
///
/// # Errors
/// `SPEC_OUT_OF_RANGE`, `TRAIN_EMPTY`, `TRAIN_EXAMPLE`, `TRAIN_NON_FINITE`, `CHECKPOINT_MISMATCH`, `STORAGE_DISK_FULL`; the
/// backend's own, `COMPUTE_OUT_OF_MEMORY` only before the first step.
pub fn run<B: Backend>(request: TrainRequest<'_, B>, events: &mut dyn TrainEvents) -> Result<TrainSummary> {
    let mut run = Run::prepare(request)?;
    run.rehearse()?;
    let outcome = run.steps(events)?;
    run.finish(outcome, events)
}

struct Run<'a, B: Backend> {
    trainer: Trainer<'a, B>,
    spec: &'a TrainSpec,
    train: &'a [EncodedExample],
    validation: &'a [EncodedExample],
    folder: Option<CheckpointFolder>,
    order: DataOrder,
    learning_rate: LearningRate,
    state: TrainState,
    resumed_from: Option<usize>,
    /// Step of the newest checkpoint on the disk.
    saved_step: Option<usize>,
    /// The stop that was asked for.
    stop: Option<StopReason>,
    started: Instant,
    elapsed_before: f64,
}

impl<'a, B: Backend> Run<'a, B> {
    fn prepare(request: TrainRequest<'a, B>) -> Result<Self> {
        let TrainRequest {
            model,
            lora,
            spec,
            train,
            validation,
            checkpoint_dir,
            resume,
        } = request;
        spec.check()?;
        if train.is_empty() {
            return Err(Failure::user("TRAIN_EMPTY", "There is no example to train on")
                .hint("Give a dataset with at least one valid line"));
        }
        check_examples(model, train)?;
        check_examples(model, validation)?;
        let order = DataOrder::new(spec, train.len());
        let identity = RunIdentity::new(spec, model.fingerprint(), fingerprint(train))?;
        let folder = checkpoint_dir.map(CheckpointFolder::open).transpose()?;
        let mut trainer = Trainer::new(model, lora, spec)?;
        let restored = match &folder {
            Some(folder) if resume => {
                folder.restore(model.device(), &identity, trainer.lora, &mut trainer.optimizer)?
            }
            Some(folder) => {
                folder.clear();
                None
            }
            None => None,
        };
        let resumed_from = restored.as_ref().map(|state| state.step);
        let state = restored.unwrap_or_else(|| TrainState::new(identity));
        Ok(Self {
            trainer,
            spec,
            train,
            validation,
            folder,
            learning_rate: LearningRate::new(spec, order.total_steps()),
            order,
            resumed_from,
            saved_step: resumed_from,
            stop: None,
            started: Instant::now(),
            elapsed_before: state.elapsed_seconds,
            state,
        })
    }

    /// Runs a micro-batch as long as any to come once and forgets it, so that memory runs out now or never.
    fn rehearse(&mut self) -> Result<()> {
        if self.state.step == self.order.total_steps() {
            return Ok(());
        }
        let longest = longest_micro_batch(self.train, self.spec.batch_size, self.spec.micro_batch_tokens);
        self.trainer.rehearse(&longest)?;
        if let Some(remark) = self.trainer.model.device().remark() {
            tracing::info!("{remark}");
        }
        Ok(())
    }

    fn examples_of(&mut self, step: usize) -> Vec<&'a EncodedExample> {
        let train = self.train;
        self.order
            .examples_of(step)
            .into_iter()
            .map(|place| &train[place])
            .collect()
    }

    fn steps(&mut self, events: &mut dyn TrainEvents) -> Result<Outcome> {
        self.started = Instant::now();
        while self.state.step < self.order.total_steps() {
            let begun = Instant::now();
            let step = self.state.step;
            let examples = self.examples_of(step);
            let rate = self.learning_rate.at(step);
            let stop = &mut self.stop;
            let mut keep_going = || goes_on(events.control(), stop);
            let Some(outcome) = self.trainer.step(&examples, step, rate, &mut keep_going)? else {
                break;
            };
            self.count(&outcome);
            let report = self.report(&outcome, rate, begun);
            if !goes_on(events.on_step(&report), &mut self.stop) {
                break;
            }
            self.between_steps(events)?;
            if self.stop.is_some() {
                break;
            }
        }
        match self.stop {
            Some(reason) => Ok(Outcome::Stopped(reason)),
            None => Ok(Outcome::Finished),
        }
    }

    fn count(&mut self, outcome: &StepOutcome) {
        self.state.step += 1;
        self.state.tokens += outcome.tokens as u64;
        self.state.first_loss.get_or_insert(outcome.loss);
        self.state.last_loss = Some(outcome.loss);
        self.state.elapsed_seconds = self.elapsed_before + self.started.elapsed().as_secs_f64();
    }

    fn report(&self, outcome: &StepOutcome, learning_rate: f64, begun: Instant) -> StepReport {
        let steps_here = self.state.step - self.resumed_from.unwrap_or(0);
        let seconds_per_step = self.started.elapsed().as_secs_f64() / steps_here as f64;
        StepReport {
            step: self.state.step,
            total_steps: self.order.total_steps(),
            epoch: self.order.epochs_after(self.state.step),
            loss: outcome.loss,
            learning_rate,
            gradient_norm: outcome.gradient_norm,
            tokens: outcome.tokens,
            // A clock that did not move between two readings must not give an infinite rate.
            tokens_per_second: outcome.tokens as f64 / begun.elapsed().as_secs_f64().max(1e-9),
            elapsed_seconds: self.state.elapsed_seconds,
            eta_seconds: seconds_per_step * (self.order.total_steps() - self.state.step) as f64,
        }
    }

    /// Periodic checkpoint and evaluation. The last step's evaluation is [`Run::finish`]'s.
    fn between_steps(&mut self, events: &mut dyn TrainEvents) -> Result<()> {
        let is_due = |every: usize| every > 0 && self.state.step.is_multiple_of(every);
        let (is_last, save_due, evaluate_due) = (
            self.state.step == self.order.total_steps(),
            is_due(self.spec.checkpoint_every),
            is_due(self.spec.evaluate_every),
        );
        if save_due || is_last && self.spec.checkpoint_every > 0 {
            self.save(events)?;
        }
        if evaluate_due && !is_last {
            self.evaluate(events)?;
        }
        Ok(())
    }

    fn save(&mut self, events: &mut dyn TrainEvents) -> Result<()> {
        let Some(folder) = self
            .folder
            .as_ref()
            .filter(|_| self.saved_step != Some(self.state.step))
        else {
            return Ok(());
        };
        let device = self.trainer.model.device();
        let path = folder.save(device, &self.state, self.trainer.lora, &self.trainer.optimizer)?;
        self.saved_step = Some(self.state.step);
        events.on_checkpoint(&CheckpointReport {
            step: self.state.step,
            path,
        });
        Ok(())
    }

    /// `None` when there is nothing to evaluate on, or when it was asked to stop.
    fn evaluate(&mut self, events: &mut dyn TrainEvents) -> Result<Option<Evaluation>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let stop = &mut self.stop;
        let evaluation = evaluate(
            self.trainer.model,
            Some(&*self.trainer.lora),
            self.validation,
            self.spec.micro_batch_tokens,
            &mut || goes_on(events.control(), stop),
        )?;
        if let Some(evaluation) = &evaluation {
            events.on_evaluate(&EvaluationReport {
                step: self.state.step,
                evaluation: evaluation.clone(),
            });
        }
        Ok(evaluation)
    }

    fn finish(mut self, outcome: Outcome, events: &mut dyn TrainEvents) -> Result<TrainSummary> {
        let evaluation = match outcome {
            Outcome::Finished => self.evaluate(events)?,
            Outcome::Stopped(_) => None,
        };
        let outcome = self.stop.map_or(outcome, Outcome::Stopped);
        if matches!(outcome, Outcome::Stopped(_)) {
            self.save(events)?;
        }
        Ok(TrainSummary {
            outcome,
            step: self.state.step,
            total_steps: self.order.total_steps(),
            resumed_from: self.resumed_from,
            first_loss: self.state.first_loss,
            last_loss: self.state.last_loss,
            tokens: self.state.tokens,
            elapsed_seconds: self.state.elapsed_seconds,
            evaluation,
            trainable_parameters: self.trainer.lora.parameters(),
            optimizer_bytes: self.trainer.optimizer.size_bytes(),
            peak_bytes: self.trainer.model.device().memory().peak_bytes,
        })
    }
}

/// Notes a stop; the first reason given stays.
fn goes_on(control: Control, stop: &mut Option<StopReason>) -> bool {
    if let Control::Stop(reason) = control {
        stop.get_or_insert(reason);
    }
    stop.is_none()
}
