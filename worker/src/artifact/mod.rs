//! The adapter's files: written atomically, reloaded, proven, delivered.
//!
//! # Map
//!
//! | file | what it knows |
//! |---|---|
//! | `adapter_config.rs` | PEFT's `adapter_config.json`, key for key |
//! | `tensors.rs` | PEFT's names and shapes; safetensors out, and in again as a stream |
//! | `input.rs` | everything a finished run hands over |
//! | `manifest.rs` | `manifest.json`: what proves the other files, and repeats the run |
//! | `model_card.rs` | `README.md` for people and model hubs |
//! | `write.rs` | the folder appears complete or not at all |
//! | `verify.rs` | the saved files, read again, are what the run produced |
//! | `upload.rs` | the files in the bucket, each confirmed, nothing else beside them |
//! | `quality.rs`, `summary.rs` | the app's stars and the pieces of its `model_artifacts` row |
//!
//! # Rules
//!
//! * The artifact's id follows from the job's, so a second attempt replaces the first.
//! * A run is `completed` only after [`verify`] has reloaded the saved files and recomputed the loss.
//! * The same run gives the same bytes in `adapter_model.safetensors` and `adapter_config.json`.
//!
//! Everything here but the upload is blocking disk work: call it where blocking is allowed.

use uuid::Uuid;

pub mod adapter_config;
pub mod input;
pub mod manifest;
mod model_card;
pub mod quality;
pub mod summary;
pub mod tensors;
pub mod upload;
mod verify;
mod write;

pub use adapter_config::AdapterConfig;
pub use input::{AdapterLayout, ArtifactInput};
pub use manifest::Manifest;
pub use tensors::{AdapterDtype, AdapterTensor, encode_tensors, tensors_of};
pub use upload::{Destination, upload};
pub use verify::{Verification, verify};
pub use write::{ArtifactFile, ArtifactFiles, record_verification, write, write_adapter};

/// The adapter's weights.
pub const WEIGHTS: &str = crate::model::adapter::ADAPTER_WEIGHTS;
/// PEFT's description of the adapter.
pub const CONFIG: &str = crate::model::adapter::ADAPTER_CONFIG;
/// Hashes, settings and metrics.
pub const MANIFEST: &str = "manifest.json";
/// The model card.
pub const MODEL_CARD: &str = "README.md";
/// One object per logged step.
pub const METRICS: &str = "metrics.jsonl";
/// One object per problem found in the data set.
pub const VALIDATION: &str = "validation.jsonl";
/// Answers of the base model and of the adapter side by side; absent when none were made.
pub const SAMPLES: &str = "samples.jsonl";
/// The bucket of finished adapters.
pub const BUCKET: &str = "lora-models";

/// The namespace of artifact ids: the ASCII bytes of `brightRunArtifac`. It must never change, or
/// a repeated job would leave its earlier artifact behind.
pub const ID_NAMESPACE: Uuid = Uuid::from_bytes(*b"brightRunArtifac");

/// The id of a job's artifact: UUID version 5 of the job's id in [`ID_NAMESPACE`].
///
/// ```
/// # use brightrun_worker::artifact::artifact_id;
/// # use uuid::Uuid;
/// let job = Uuid::from_u128(7);
/// assert_eq!(artifact_id(job), artifact_id(job));
/// assert_ne!(artifact_id(job), artifact_id(Uuid::from_u128(8)));
/// ```
pub fn artifact_id(job_id: Uuid) -> Uuid {
    Uuid::new_v5(&ID_NAMESPACE, job_id.as_bytes())
}

/// Where a file lies in the bucket: `{user_id}/{artifact_id}/{file name}`.
pub fn object_path(user_id: Uuid, artifact_id: Uuid, file_name: &str) -> String {
    format!("{user_id}/{artifact_id}/{file_name}")
}
