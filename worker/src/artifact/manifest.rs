//! `manifest.json`: what proves the other files, and repeats the run.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::input::{BaseModel, DataRecord, Program, Proof, RunMetrics};
use super::tensors::{AdapterDtype, Shapes};
use super::verify::Verification;
use crate::spec::TrainSpec;

/// The version of this layout. A reader refuses a newer one.
pub const SCHEMA_VERSION: u32 = 1;

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The artifact, which follows from the job.
    pub artifact_id: Uuid,
    /// The job.
    pub job_id: Uuid,
    /// When the run ended.
    pub created_at: DateTime<Utc>,
    /// What trained the adapter.
    pub program: Program,
    /// The model the adapter belongs to.
    pub base: BaseModel,
    /// Every training setting, defaults included.
    pub spec: TrainSpec,
    /// The seed of initial values, order and split; also in `spec`, repeated for readers.
    pub seed: u64,
    /// Layout of the adapter.
    pub adapter: AdapterRecord,
    /// What was learnt from.
    pub data: DataRecord,
    /// SHA-256 of the chat template's text as used.
    pub template_sha256: String,
    /// How the run went.
    pub metrics: RunMetrics,
    /// The loss that reloading must reproduce.
    pub proof: Proof,
    /// How far the reloaded loss may lie from the recorded one, in nats per token.
    pub loss_tolerance: f64,
    /// What reloading found; absent until [`record_verification`](super::record_verification).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// What users should know.
    pub warnings: Vec<String>,
    /// Every other file of the artifact.
    pub files: BTreeMap<String, FileRecord>,
}

/// Layout of the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// The type the tensors are saved in.
    pub dtype: AdapterDtype,
    /// Number of trained values.
    pub parameters: u64,
    /// Shape of every tensor, by PEFT's key.
    pub tensors: Shapes,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}
