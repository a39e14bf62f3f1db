//! Everything a finished run hands over.

use brightrun_kernels::Backend;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::tensors::{AdapterDtype, AdapterTensor};
use crate::model::LoraSet;
use crate::spec::TrainSpec;
use crate::template::PassedFile;

/// A finished run, as [`write`](super::write()) wants it.
#[derive(Clone, Debug)]
pub struct ArtifactInput<'a> {
    /// The job; the artifact's id follows from it.
    pub job_id: Uuid,
    /// The model the adapter belongs to.
    pub base: BaseModel,
    /// The settings, resolved.
    pub spec: &'a TrainSpec,
    /// Which modules are adapted, and how.
    pub adapter: AdapterLayout,
    /// Every A and B.
    pub tensors: Vec<AdapterTensor<'a>>,
    /// What was learnt from.
    pub data: DataRecord,
    /// How the run went.
    pub metrics: RunMetrics,
    /// The loss that reloading must reproduce.
    pub proof: Proof,
    /// The logged steps, for `metrics.jsonl`.
    pub points: &'a [MetricPoint],
    /// The data set's problems as the validator reports them, for `validation.jsonl`.
    pub issues: &'a [Value],
    /// Answers side by side, for `samples.jsonl`.
    pub samples: &'a [Sample],
    /// Tokenizer and template files as used; copied under their own names, and refused when they have changed since.
    pub copied_files: Vec<PassedFile>,
    /// SHA-256 of the chat template's text as used.
    pub template_sha256: String,
    /// What users should know; shown in the model card.
    pub warnings: Vec<String>,
    /// What trained it.
    pub program: Program,
    /// When the run ended.
    pub created_at: DateTime<Utc>,
}

/// The model an adapter belongs to. An adapter is of no use on any other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseModel {
    /// Hub id, such as `Qwen/Qwen3-0.6B`.
    pub id: String,
    /// The hub's commit, where known.
    pub revision: Option<String>,
    /// SHA-256 of the model's `config.json`.
    pub config_sha256: String,
    /// The fingerprint of the model's weights.
    pub checkpoint_fingerprint: String,
}

/// Which modules are adapted, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    /// LoRA rank.
    pub rank: usize,
    /// LoRA alpha; the adapter is scaled by `alpha / rank`.
    pub alpha: f32,
    /// Module names as PEFT matches them: the whole path or its end after a dot.
    pub target_modules: Vec<String>,
    /// PEFT's names of adapted parameters: routed experts, such as `mlp.experts.gate_up_proj`, and what
    /// [`peft`](crate::model::peft) says must not be named as a module.
    pub target_parameters: Vec<String>,
    /// The type the tensors are saved in.
    pub dtype: AdapterDtype,
}

impl AdapterLayout {
    /// The layout of an adapter in a backend's memory.
    pub fn of<B: Backend>(lora: &LoraSet<B>, dtype: AdapterDtype) -> Self {
        let (target_modules, target_parameters) = lora.peft_targets();
        Self {
            rank: lora.config().rank,
            alpha: lora.config().alpha,
            target_modules,
            target_parameters,
            dtype,
        }
    }
}

/// What was learnt from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    /// The data set's name.
    pub name: String,
    /// SHA-256 of the file's bytes.
    pub sha256: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Lines of the file, or entries of a JSON document.
    pub lines: u64,
    /// Examples trained on.
    pub training_examples: u64,
    /// Examples held out.
    pub validation_examples: u64,
    /// Examples that lost their oldest turns to the length limit.
    pub trimmed_examples: u64,
    /// Lines that were not used, each with its reason.
    pub dropped: Vec<DroppedLine>,
}

/// A line of the data set that was not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedLine {
    /// Line number, from 1.
    pub line: u64,
    /// The reason's stable code.
    pub code: String,
    /// The reason, as a sentence.
    pub reason: String,
}

/// How the run went. Losses are means per supervised token, in nats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunMetrics {
    /// Training loss of the first step.
    pub first_training_loss: Option<f64>,
    /// Training loss of the last step.
    pub last_training_loss: Option<f64>,
    /// Held-out loss before training.
    pub first_validation_loss: Option<f64>,
    /// Held-out loss after training.
    pub last_validation_loss: Option<f64>,
    /// Optimizer steps.
    pub steps: u64,
    /// Passes over the examples.
    pub epochs: u64,
    /// Tokens processed.
    pub tokens: u64,
    /// Tokens that carried loss.
    pub supervised_tokens: u64,
    /// Seconds spent training.
    pub seconds: f64,
    /// Tokens processed per second of training.
    pub tokens_per_second: f64,
    /// Highest memory use in bytes.
    pub peak_memory_bytes: u64,
}

/// The loss that the saved files must reproduce when they are loaded again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Which examples it was computed on.
    pub split: ProofSplit,
    /// Mean loss per supervised token, computed with the final adapter before it was saved.
    pub loss: f64,
    /// Number of examples.
    pub examples: u64,
    /// Number of supervised tokens.
    pub supervised_tokens: u64,
}

/// Which examples a [`Proof`] rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProofSplit {
    /// The held-out examples.
    HeldOut,
    /// Training examples, where the data set was too small to hold any out.
    Training,
}

/// One logged step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricPoint {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Pass over the examples, from 1.
    pub epoch: u64,
    /// Training loss before the step's update.
    pub loss: f64,
    /// Held-out loss, where it was evaluated.
    pub validation_loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Tokens processed per second.
    pub tokens_per_second: f64,
}

/// One prompt answered twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// The base model's answer.
    pub base: String,
    /// The answer with the adapter.
    pub adapter: String,
}

/// What trained the adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program's version.
    pub version: String,
    /// The commit it was built from, where known.
    pub git_revision: Option<String>,
    /// The compute backend.
    pub backend: String,
}
