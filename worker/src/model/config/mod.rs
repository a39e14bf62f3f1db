//! `config.json` → [`ModelConfig`]: what a checkpoint says it is.
//!
//! Everything this program would compute differently from the checkpoint's authors is refused here, before a weight is
//! read: another architecture, another activation, a sliding window that is switched on, a scaled RoPE, a quantisation other
//! than block-wise FP8.

mod raw;
mod tensors;

use std::path::Path;

use self::raw::Raw;
pub use self::tensors::{ExpectedTensor, ExpertStorage, Role};
use crate::error::{Failure, Result};

/// The `model_type`s this program trains.
pub const SUPPORTED: [&str; 4] = ["qwen2", "qwen3", "qwen3_moe", "qwen3_next"];

/// No extent of a real model is larger; keeps products of a few extents inside `usize`.
const LARGEST_EXTENT: u64 = 1 << 24;

/// A model family: one way to put the same parts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 dense: an RMS norm on each query and key head, no biases by default.
    Qwen3,
    /// Qwen3 with a mixture of experts in place of the MLP.
    Qwen3Moe,
    /// Qwen3-Next: Gated DeltaNet layers between gated attention layers, experts and a shared expert, zero-centred norms.
    Qwen3Next,
}

impl Family {
    /// Its `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Qwen3Next => "qwen3_next",
        }
    }
}

/// The numbers a decoder is built from.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which family.
    pub family: Family,
    /// `V`: rows of the embedding.
    pub vocabulary: usize,
    /// `C`: width of the residual stream.
    pub hidden: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// `H`: query heads.
    pub heads: usize,
    /// `K`: key/value heads.
    pub key_value_heads: usize,
    /// `D`: width of one head; not always `hidden / heads`.
    pub head_dim: usize,
    /// `F`: width of the MLP.
    pub intermediate: usize,
    /// ε of every RMS norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest position the model was made for.
    pub max_positions: usize,
    /// Whether the head is the embedding's transpose.
    pub tied_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether query and key heads are normalised before RoPE.
    pub qk_norm: bool,
    /// How many of a head's elements are rotated, the first ones.
    pub rotary: usize,
    /// Whether q_proj also holds a gate of the attention's output, head by head.
    pub attention_gate: bool,
    /// Whether the norms multiply by `1 + w`; Gated DeltaNet's own norm never does.
    pub zero_centred_norms: bool,
    /// The mixture of experts, where the family has one.
    pub moe: Option<MoeConfig>,
    /// The Gated DeltaNet layers, where the family has some.
    pub delta: Option<DeltaConfig>,
    /// Rows and columns of a matrix that share one scale, in an FP8 release.
    pub fp8_block: Option<[usize; 2]>,
}

/// A mixture of experts: the same numbers in every layer that has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// `E`.
    pub experts: usize,
    /// `k`: experts a token is sent to.
    pub top: usize,
    /// `F`: width of each expert.
    pub intermediate: usize,
    /// Whether the weights of a token's experts are made to sum to 1.
    pub renormalise: bool,
    /// Width of the expert that every token is sent to, where there is one.
    pub shared_intermediate: Option<usize>,
    /// Layers with an ordinary MLP instead.
    pub dense_layers: Vec<usize>,
}

/// Gated DeltaNet layers: the same numbers in each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads; a multiple of the key heads.
    pub value_heads: usize,
    /// Width of a query or key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Width of the convolution.
    pub taps: usize,
    /// Which layers; the others have attention.
    pub layers: Vec<usize>,
}

/// What lets the positions of a layer see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixing<'a> {
    /// Softmax attention.
    Attention,
    /// Gated DeltaNet.
    Delta(&'a DeltaConfig),
}

impl DeltaConfig {
    /// Width of all query heads, or of all key heads.
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of all value heads.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// `MODEL_CONFIG_MISSING` when there is none; else as [`ModelConfig::parse`].
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Failure::user(
                "MODEL_CONFIG_MISSING",
                format!("The model has no readable config.json: {error}"),
            )
            .at(path.display().to_string())
            .hint("Name a folder that holds a Hugging Face checkpoint")
        })?;
        Self::parse(&text).map_err(|failure| failure.at(path.display().to_string()))
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// `MODEL_CONFIG_INVALID` for bad JSON, a missing or impossible number; `MODEL_UNSUPPORTED` for anything that this
    /// program would compute differently from the checkpoint's authors.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Raw =
            serde_json::from_str(text).map_err(|error| invalid(format!("config.json is not valid: {error}")))?;
        let family = raw.family()?;
        raw.refuse_what_is_not_computed(family)?;
        let hidden = extent("hidden_size", raw.hidden_size)?;
        let heads = extent("num_attention_heads", raw.num_attention_heads)?;
        let key_value_heads = match raw.num_key_value_heads {
            Some(count) => extent("num_key_value_heads", Some(count))?,
            None => heads,
        };
        let layers = extent("num_hidden_layers", raw.num_hidden_layers)?;
        let head_dim = match raw.head_dim {
            Some(width) => extent("head_dim", Some(width))?,
            None => hidden / heads,
        };
        let config = Self {
            family,
            vocabulary: extent("vocab_size", raw.vocab_size)?,
            hidden,
            layers,
            heads,
            key_value_heads,
            head_dim,
            intermediate: extent("intermediate_size", raw.intermediate_size)?,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: raw.rope_theta()?,
            max_positions: extent("max_position_embeddings", raw.max_position_embeddings)?,
            tied_embeddings: raw.tie_word_embeddings,
            qkv_bias: family == Family::Qwen2 || raw.attention_bias,
            output_bias: family != Family::Qwen2 && raw.attention_bias,
            qk_norm: family != Family::Qwen2,
            rotary: raw.rotary(family, head_dim)?,
            attention_gate: family == Family::Qwen3Next,
            zero_centred_norms: family == Family::Qwen3Next,
            moe: raw.moe(family, layers)?,
            delta: raw.delta(family, layers)?,
            fp8_block: raw.fp8_block()?,
        };
        config.check()?;
        Ok(config)
    }

    /// Relations between the numbers.
    fn check(&self) -> Result<()> {
        let rules = [
            (
                self.heads.is_multiple_of(self.key_value_heads),
                "num_attention_heads must be a multiple of num_key_value_heads",
            ),
            (
                self.head_dim >= 2 && self.head_dim.is_multiple_of(2),
                "head_dim must be even and above 0",
            ),
            (
                self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite(),
                "rms_norm_eps must be positive",
            ),
            (
                self.rope_theta > 1.0 && self.rope_theta.is_finite(),
                "rope_theta must be above 1",
            ),
            (
                self.rotary >= 2 && self.rotary.is_multiple_of(2) && self.rotary <= self.head_dim,
                "partial_rotary_factor must leave an even number of rotated elements",
            ),
            (
                self.moe.as_ref().is_none_or(|moe| moe.top <= moe.experts),
                "num_experts_per_tok must not be above num_experts",
            ),
            (
                self.delta
                    .as_ref()
                    .is_none_or(|delta| delta.value_heads.is_multiple_of(delta.key_heads)),
                "linear_num_value_heads must be a multiple of linear_num_key_heads",
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, rule)) => Err(invalid(format!("config.json contradicts itself: {rule}"))),
        }
    }

    /// What mixes the positions of a layer.
    pub fn mixing(&self, layer: usize) -> Mixing<'_> {
        match &self.delta {
            Some(delta) if delta.layers.contains(&layer) => Mixing::Delta(delta),
            _ => Mixing::Attention,
        }
    }

    /// The mixture of experts of a layer, or `None` where it has an ordinary MLP.
    pub fn routing(&self, layer: usize) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| !moe.dense_layers.contains(&layer))
    }
}

fn extent(name: &str, value: Option<u64>) -> Result<usize> {
    match value {
        Some(number @ 1..=LARGEST_EXTENT) => Ok(number as usize),
        Some(number) => Err(invalid(format!("`{name}` is {number}, which no model has"))),
        None => Err(invalid(format!("`{name}` is missing from config.json"))),
    }
}

fn invalid(message: String) -> Failure {
    Failure::user("MODEL_CONFIG_INVALID", message).hint("Download the checkpoint again, or correct its config.json")
}

fn unsupported(message: String) -> Failure {
    Failure::user("MODEL_UNSUPPORTED", message)
}

#[cfg(test)]
mod tests;
