//! Qwen families, written once over the op interface of `brightrun-kernels`.
//!
//! # Map
//!
//! | module | what |
//! |---|---|
//! | [`config`] | `config.json` → numbers; refuses what would be computed differently |
//! | [`tensor_file`], [`fp8`], [`checkpoint`] | safetensors by positioned reads; shards; everything headers can tell is checked first |
//! | [`load`] | checkpoint or snapshot → [`Model`]: files in order, several threads, quantised on the way |
//! | [`locate`] | where a model lies: volumes, hub caches; a given path that is missing is an error |
//! | [`transformer`] | embedding, layers, head: forward, and forward with backward |
//! | [`layer`] | one decoder layer: a mixer, a feed-forward part; what is kept and what is computed again |
//! | [`mixer`], [`feed_forward`] | which mixer, which feed-forward part |
//! | [`attention`], [`delta`], [`mlp`], [`moe`], [`experts`], [`norm`], [`linear`] | the parts, each with `forward` and `backward` |
//! | [`lora`], [`targets`] | adapters beside the frozen model; which modules they adapt |
//! | [`peft`], [`adapter`] | PEFT's names and order; its files, read |
//! | [`decode`], [`cache`] | one document, continued token by token |
//! | [`loads`] | how evenly routers spread the tokens of an evaluation |
//! | [`synthetic`] | checkpoints of seeded random numbers |
//! | [`synthetic`], [`presets`] | checkpoints of seeded random numbers; released configurations by name |
//! | [`batch`], [`inputs`], [`pass`] | packed documents; their tensors; what the layers of a pass share |
//! | [`rope`], [`random`] | rotations; seeded numbers |
//!
//! # Invariants
//!
//! - Model code is generic over [`Backend`](brightrun_kernels::Backend) and never learns which one runs.
//! - The base model is immutable after loading; only [`LoraSet`] values change.
//! - Whether a layer's activations were kept or computed again changes no bit of any gradient.

pub mod adapter;
pub mod attention;
pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decode;
pub mod delta;
pub mod experts;
pub mod feed_forward;
pub mod fp8;
pub mod inputs;
pub mod layer;
pub mod linear;
pub mod load;
pub mod loads;
pub mod locate;
pub mod lora;
pub mod mixer;
pub mod mlp;
pub mod moe;
pub mod norm;
pub mod pass;
pub mod peft;
pub mod presets;
pub mod random;
pub mod rope;
pub mod synthetic;
pub mod targets;
pub mod tensor_file;
pub mod transformer;

pub use self::batch::{Batch, IGNORED};
pub use self::config::{Family, ModelConfig};
pub use self::decode::Decoder;
pub use self::inputs::{InputShape, Inputs};
pub use self::load::{Encoding, LoadOptions, LoadProgress, LoadReport, LoadSettings, LoadSource, SnapshotOutcome};
pub use self::loads::{ExpertLoads, RoutingBalance};
pub use self::locate::ModelRoots;
pub use self::lora::{LoraConfig, LoraGradients, LoraSet, Module, ModuleId};
pub use self::rope::RopeFrequencies;
pub use self::transformer::{BackwardSettings, Model};

use crate::error::Failure;

impl From<brightrun_kernels::Error> for Failure {
    fn from(error: brightrun_kernels::Error) -> Self {
        use brightrun_kernels::Error;
        match error {
            Error::OutOfMemory { .. } => Self::system("COMPUTE_OUT_OF_MEMORY", error.to_string())
                .hint("Lower micro_batch_tokens, max_length or activation_budget_bytes, or use base_dtype nf4"),
            Error::Unsupported { .. } => Self::system("COMPUTE_UNSUPPORTED", error.to_string()),
            Error::Device { .. } => Self::system("COMPUTE_DEVICE", error.to_string()),
            _ => Self::system("COMPUTE_CONTRACT", error.to_string()),
        }
    }
}
