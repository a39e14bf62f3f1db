//! From files to a proven adapter: what the command line and a job have in common.
//!
//! ```text
//! Base::load ─┐
//!             ├─▶ learn ─▶ deliver (write → reload → recompute the loss → record the proof)
//! prepare ────┘
//! ```
//!
//! Nothing here knows of rows, queues or storage, and nothing names a compute backend.

use std::path::{Path, PathBuf};

use brightrun_kernels::Backend;
use chrono::Utc;
use serde_json::Value;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::artifact::input::{BaseModel, DataRecord, DroppedLine, MetricPoint, Program, Proof, ProofSplit, RunMetrics};
use crate::artifact::{self, AdapterDtype, AdapterLayout, ArtifactFiles, ArtifactInput, Verification};
use crate::dataset::{self, Dropped, Example, Report};
use crate::error::{Failure, Result};
use crate::model::{
    LoadOptions, LoadProgress, LoadReport, LoadSettings, LoraConfig, LoraSet, Model, ModelRoots, RoutingBalance,
};
use crate::spec::{BaseDtype, TrainSpec};
use crate::template::{self, ChatTemplate, LeftOutReason};
use crate::train::{
    self, CheckpointReport, Control, EncodedExample, Evaluation, EvaluationReport, StepReport, TrainEvents,
    TrainRequest, TrainSummary,
};

/// Most training examples that stand in for held-out ones when a data set is too small to hold any out.
const PROOF_EXAMPLES: usize = 4;

/// A base model in memory.
pub struct Base<B: Backend> {
    /// The frozen weights.
    pub model: Model<B>,
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// How the weights are kept.
    pub dtype: BaseDtype,
    /// How the load went.
    pub report: LoadReport,
}

impl<B: Backend> Base<B> {
    /// Loads a checkpoint folder.
    ///
    /// # Errors
    /// `MODEL_PATH_MISSING` when there is no such folder (it is never taken for a name on a hub); the loader's own.
    pub fn load(device: &B, folder: &Path, dtype: BaseDtype, progress: &mut dyn FnMut(LoadProgress)) -> Result<Self> {
        Self::load_with(device, folder, dtype, &LoadSettings::default(), progress)
    }

    /// As [`Base::load`], with snapshots or other limits.
    ///
    /// # Errors
    /// As [`Base::load`].
    pub fn load_with(
        device: &B,
        folder: &Path,
        dtype: BaseDtype,
        settings: &LoadSettings,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        check_folder(folder)?;
        let (model, report) = Model::load_with(device, folder, LoadOptions::from(dtype), settings, progress)?;
        Ok(Self {
            model,
            folder: folder.to_path_buf(),
            dtype,
            report,
        })
    }
}

/// Refuses a path that is not a folder.
///
/// # Errors
/// `MODEL_PATH_MISSING`.
pub fn check_folder(folder: &Path) -> Result<()> {
    ModelRoots::of_environment().locate(Some(folder), "").map(|_| ())
}

/// A data set, tokenised and split.
pub struct Prepared {
    /// Examples to learn from, in file order.
    pub train: Vec<EncodedExample>,
    /// Held-out examples; whole conversations.
    pub validation: Vec<EncodedExample>,
    /// What the parser found.
    pub report: Report,
    /// Examples that lost their oldest turns to the length limit.
    pub trimmed_examples: u64,
    /// Examples that could not be used, with the reason; those the parser dropped included.
    pub dropped: Vec<DroppedLine>,
}

/// Reads, checks, tokenises and splits a data set.
///
/// # Errors
/// `DATASET_INVALID` when the parser finds an error, `DATASET_NO_EXAMPLES` when no example fits, the reader's own.
pub fn prepare(path: &Path, template: &ChatTemplate, spec: &TrainSpec) -> Result<Prepared> {
    let (examples, report) = dataset::load(path)?;
    report.failure().map_or(Ok(()), Err)?;
    let parts = dataset::split(&examples, spec.validation_share, spec.seed);
    let mut prepared = Prepared {
        train: Vec::new(),
        validation: Vec::new(),
        trimmed_examples: 0,
        dropped: report.dropped.iter().map(dropped_by_parser).collect(),
        report,
    };
    let held_out: std::collections::BTreeSet<usize> = parts.validation.iter().copied().collect();
    for (index, example) in examples.iter().enumerate() {
        if let Some(encoded) = prepared.encode(example, template, spec)? {
            let part = if held_out.contains(&index) {
                &mut prepared.validation
            } else {
                &mut prepared.train
            };
            part.push(encoded);
        }
    }
    if prepared.train.is_empty() {
        return Err(
            Failure::user("DATASET_NO_EXAMPLES", "No example of the data set can be trained on")
                .at(path.display().to_string())
                .hint("Raise max_length, or shorten the answers"),
        );
    }
    Ok(prepared)
}

impl Prepared {
    fn encode(
        &mut self,
        example: &Example,
        template: &ChatTemplate,
        spec: &TrainSpec,
    ) -> Result<Option<EncodedExample>> {
        match template.encode(example, spec.supervise, spec.max_length)? {
            template::Outcome::Used(encoded) => {
                self.trimmed_examples += u64::from(encoded.trimmed_turns > 0);
                Ok(Some(EncodedExample {
                    ids: encoded.ids,
                    supervised: encoded.supervised,
                    line: encoded.line,
                }))
            }
            template::Outcome::LeftOut(left_out) => {
                self.dropped.push(dropped_by_length(&left_out, spec.max_length));
                Ok(None)
            }
        }
    }

    /// The examples whose loss proves the adapter: the held-out ones, or the first training examples where none are.
    pub fn proof_examples(&self) -> (ProofSplit, &[EncodedExample]) {
        if self.validation.is_empty() {
            (
                ProofSplit::Training,
                &self.train[..self.train.len().min(PROOF_EXAMPLES)],
            )
        } else {
            (ProofSplit::HeldOut, &self.validation)
        }
    }
}

fn dropped_by_length(left_out: &template::LeftOut, limit: usize) -> DroppedLine {
    let (code, what) = match left_out.reason {
        LeftOutReason::AnswerTooLong => ("DATA_ANSWER_TOO_LONG", "The answer alone"),
        LeftOutReason::TurnTooLong => (
            "DATA_TURN_TOO_LONG",
            "The answer with its question and the system prompt",
        ),
    };
    DroppedLine {
        line: left_out.line,
        code: code.to_owned(),
        reason: format!("{what} has {} tokens, and max_length is {limit}", left_out.tokens),
    }
}

fn dropped_by_parser(dropped: &Dropped) -> DroppedLine {
    DroppedLine {
        line: dropped.line,
        code: dropped.reason.to_string(),
        reason: dropped.reason.meaning().to_owned(),
    }
}

/// A trained adapter in memory.
pub struct Learnt<B: Backend> {
    /// The adapter.
    pub lora: LoraSet<B>,
    /// The run in numbers.
    pub summary: TrainSummary,
    /// Loss of the base model on the held-out examples; `None` without any, or when the run was stopped before it was known.
    pub base_loss: Option<f64>,
    /// Every step of this attempt.
    pub points: Vec<MetricPoint>,
}

/// Where a run keeps its checkpoints, and whether it continues from one.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// Continue from the newest whole checkpoint there.
    pub resume: bool,
}

/// Trains a fresh adapter, or continues an interrupted one.
///
/// # Errors
/// `LORA_TARGET_UNKNOWN`, `LORA_TOO_LARGE`, `TRAIN_…`, `CHECKPOINT_…`; the backend's own.
pub fn learn<B: Backend>(
    base: &Base<B>,
    data: &Prepared,
    spec: &TrainSpec,
    checkpoints: Option<Checkpoints<'_>>,
    events: &mut dyn TrainEvents,
) -> Result<Learnt<B>> {
    let config = LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    };
    config.check_budget(base.model.modules(), spec.optimizer, spec.adapter_budget_bytes)?;
    let mut lora = LoraSet::initialise(base.model.device(), config, base.model.modules(), spec.seed)?;
    let base_loss = match data.validation.as_slice() {
        [] => None,
        held_out => evaluate(base, None, held_out, spec, events)?.map(|evaluation| evaluation.loss),
    };
    let mut recorder = Recorder {
        events,
        points: Vec::new(),
        validation_loss: None,
        routing: None,
    };
    let summary = train::run(
        TrainRequest {
            model: &base.model,
            lora: &mut lora,
            spec,
            train: &data.train,
            validation: &data.validation,
            checkpoint_dir: checkpoints.map(|place| place.folder),
            resume: checkpoints.is_some_and(|place| place.resume),
        },
        &mut recorder,
    )?;
    let points = recorder.points;
    Ok(Learnt {
        lora,
        summary,
        base_loss,
        points,
    })
}

/// Mean loss per supervised token; `None` when a stop was asked for meanwhile.
fn evaluate<B: Backend>(
    base: &Base<B>,
    lora: Option<&LoraSet<B>>,
    examples: &[EncodedExample],
    spec: &TrainSpec,
    events: &mut dyn TrainEvents,
) -> Result<Option<Evaluation>> {
    let mut keep_going = || events.control() == Control::Continue;
    train::evaluate(&base.model, lora, examples, spec.micro_batch_tokens, &mut keep_going)
}

/// Passes events on and keeps every step for `metrics.jsonl`.
struct Recorder<'a> {
    events: &'a mut dyn TrainEvents,
    points: Vec<MetricPoint>,
    validation_loss: Option<f64>,
    routing: Option<RoutingBalance>,
}

impl TrainEvents for Recorder<'_> {
    fn control(&mut self) -> Control {
        self.events.control()
    }

    fn on_step(&mut self, report: &StepReport) -> Control {
        self.points.push(MetricPoint {
            step: report.step as u64,
            epoch: report.epoch.ceil().max(1.0) as u64,
            loss: report.loss,
            validation_loss: self.validation_loss.take(),
            routing: self.routing.take(),
            learning_rate: report.learning_rate,
            gradient_norm: report.gradient_norm,
            tokens_per_second: report.tokens_per_second,
        });
        self.events.on_step(report)
    }

    fn on_checkpoint(&mut self, report: &CheckpointReport) {
        self.events.on_checkpoint(report);
    }

    fn on_evaluate(&mut self, report: &EvaluationReport) {
        self.validation_loss = Some(report.evaluation.loss);
        self.routing = report.evaluation.routing;
        if let Some(routing) = &self.routing {
            tracing::info!(
                step = report.step,
                entropy = routing.entropy,
                max_over_mean = routing.max_over_mean,
                idle_share = routing.idle_share,
                "routing"
            );
        }
        self.events.on_evaluate(report);
    }
}

/// What an artifact says about itself besides what was computed.
pub struct Labels<'a> {
    /// Tokenizer and template the examples were made with; its files are part of the artifact.
    pub template: &'a ChatTemplate,
    /// The job; the artifact's id follows from it.
    pub job_id: Uuid,
    /// The base model's name, for PEFT and for people.
    pub base_model: String,
    /// The data set's name.
    pub dataset_name: String,
    /// The type the adapter is saved in.
    pub adapter_dtype: AdapterDtype,
    /// What users should know.
    pub warnings: Vec<String>,
}

/// A proven artifact on disk.
pub struct Delivery {
    /// Its files.
    pub files: ArtifactFiles,
    /// The proof.
    pub verification: Verification,
    /// The run in numbers, as the manifest has them.
    pub metrics: RunMetrics,
}

/// Writes the artifact to `folder`, loads it again from there, recomputes the loss and records the proof.
///
/// # Errors
/// `ARTIFACT_…`, `ADAPTER_…`, `STORAGE_…`.
pub fn deliver<B: Backend>(
    base: &Base<B>,
    data: &Prepared,
    spec: &TrainSpec,
    learnt: &Learnt<B>,
    labels: &Labels<'_>,
    folder: &Path,
) -> Result<Delivery> {
    let (split, examples) = data.proof_examples();
    let proof = prove(base, &learnt.lora, examples, spec)?;
    let metrics = run_metrics(learnt, data, &proof);
    let tensors = artifact::tensors_of(base.model.device(), &learnt.lora)?;
    let issues: Vec<Value> = data
        .report
        .issues
        .iter()
        .filter_map(|issue| serde_json::to_value(issue).ok())
        .collect();
    let input = ArtifactInput {
        job_id: labels.job_id,
        base: base_record(base, &labels.base_model)?,
        spec,
        adapter: AdapterLayout::of(&learnt.lora, labels.adapter_dtype),
        tensors,
        data: data_record(data, &labels.dataset_name),
        metrics: metrics.clone(),
        proof: Proof {
            split,
            loss: proof.loss,
            examples: examples.len() as u64,
            supervised_tokens: proof.supervised_tokens as u64,
        },
        points: &learnt.points,
        issues: &issues,
        samples: &[],
        copied_files: labels.template.files(),
        template_sha256: labels.template.hash(),
        warnings: labels.warnings.clone(),
        program: Program {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            git_revision: option_env!("BRIGHTRUN_GIT_REVISION").map(str::to_owned),
            backend: base.model.device().name().to_owned(),
        },
        created_at: Utc::now(),
    };
    artifact::write(folder, &input)?;
    let verification = artifact::verify(folder, |saved| {
        let reloaded = LoraSet::load(base.model.device(), saved, base.model.modules())?;
        prove(base, &reloaded, examples, spec).map(|evaluation| evaluation.loss)
    })?;
    let files = artifact::record_verification(folder, &verification)?;
    Ok(Delivery {
        files,
        verification,
        metrics,
    })
}

fn prove<B: Backend>(
    base: &Base<B>,
    lora: &LoraSet<B>,
    examples: &[EncodedExample],
    spec: &TrainSpec,
) -> Result<Evaluation> {
    train::evaluate(&base.model, Some(lora), examples, spec.micro_batch_tokens, &mut || true)?.ok_or_else(|| {
        Failure::system(
            "PROOF_INTERRUPTED",
            "The evaluation of the finished adapter was interrupted",
        )
    })
}

fn base_record<B: Backend>(base: &Base<B>, name: &str) -> Result<BaseModel> {
    let path = base.folder.join("config.json");
    let config = std::fs::read(&path).map_err(|error| {
        Failure::system(
            "MODEL_UNREADABLE",
            format!("The model's configuration cannot be read: {error}"),
        )
        .at(path.display().to_string())
    })?;
    Ok(BaseModel {
        id: name.to_owned(),
        revision: None,
        config_sha256: hex::encode(Sha256::digest(&config)),
        checkpoint_fingerprint: base.model.fingerprint().to_owned(),
    })
}

fn data_record(data: &Prepared, name: &str) -> DataRecord {
    DataRecord {
        name: name.to_owned(),
        sha256: data.report.sha256.clone(),
        bytes: data.report.bytes,
        lines: data.report.lines,
        training_examples: data.train.len() as u64,
        validation_examples: data.validation.len() as u64,
        trimmed_examples: data.trimmed_examples,
        dropped: data.dropped.clone(),
    }
}

fn run_metrics<B: Backend>(learnt: &Learnt<B>, data: &Prepared, proof: &Evaluation) -> RunMetrics {
    let summary = &learnt.summary;
    let is_held_out = !data.validation.is_empty();
    let epochs = learnt.points.last().map_or(0, |point| point.epoch);
    RunMetrics {
        first_training_loss: summary.first_loss,
        last_training_loss: summary.last_loss,
        first_validation_loss: learnt.base_loss,
        last_validation_loss: is_held_out.then_some(proof.loss),
        steps: summary.step as u64,
        epochs,
        tokens: summary.tokens,
        supervised_tokens: data
            .train
            .iter()
            .map(|example| example.supervised_tokens() as u64)
            .sum(),
        seconds: summary.elapsed_seconds,
        tokens_per_second: if summary.elapsed_seconds > 0.0 {
            summary.tokens as f64 / summary.elapsed_seconds
        } else {
            0.0
        },
        peak_memory_bytes: summary.peak_bytes,
        routing: proof.routing,
    }
}
