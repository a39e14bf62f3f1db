//! Checkpoints made of seeded random numbers, for demonstrations, tests and benchmarks: ordinary Hugging Face folders, which
//! everything else treats like any other checkpoint. [`write_checkpoint`] makes small ones that train well, [`generate`] large ones
//! fast.

mod generate;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

pub use self::generate::{Generated, SyntheticDtype, SyntheticSettings, config_text, generate};
use crate::error::{Failure, Result};
use crate::model::config::{DeltaConfig, ExpectedTensor, Family, Mixing, ModelConfig, MoeConfig};
use crate::model::random::CounterRandom;

/// Standard deviation of the embedding's values: rows then have a length near that of a trained model's.
const EMBEDDING_DEVIATION: f64 = 0.5;

impl ModelConfig {
    /// A miniature of a family: small enough to train on a laptop in seconds, with every part a real one has.
    pub fn miniature(family: Family, vocabulary: usize) -> Self {
        let is_next = family == Family::Qwen3Next;
        let (head_dim, layers) = (32, if is_next { 4 } else { 2 });
        Self {
            family,
            vocabulary,
            hidden: 64,
            layers,
            heads: 4,
            key_value_heads: 2,
            head_dim,
            intermediate: 160,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            max_positions: 4096,
            tied_embeddings: false,
            qkv_bias: family == Family::Qwen2,
            output_bias: false,
            qk_norm: family != Family::Qwen2,
            rotary: if is_next { head_dim / 4 } else { head_dim },
            attention_gate: is_next,
            zero_centred_norms: is_next,
            moe: matches!(family, Family::Qwen3Moe | Family::Qwen3Next).then(|| MoeConfig {
                experts: 8,
                top: 3,
                intermediate: 40,
                renormalise: true,
                shared_intermediate: is_next.then_some(48),
                dense_layers: Vec::new(),
            }),
            delta: is_next.then(|| DeltaConfig {
                key_heads: 2,
                value_heads: 4,
                key_dim: 16,
                value_dim: 16,
                taps: 4,
                layers: vec![0, 1, 2],
            }),
            fp8_block: None,
        }
    }

    /// The text of a `config.json` that [`ModelConfig::parse`] and transformers read as this.
    pub fn to_json(&self) -> String {
        let (model_type, architecture) = match self.family {
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Family::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            Family::Qwen3Next => ("qwen3_next", "Qwen3NextForCausalLM"),
        };
        let mut value = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps.to_string().parse::<f64>().unwrap_or(1e-6),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "attention_bias": self.family != Family::Qwen2 && self.qkv_bias,
            "attention_dropout": 0.0,
            "use_sliding_window": false,
            "torch_dtype": "bfloat16",
        });
        for (key, part) in [self.moe_json(), self.delta_json()].into_iter().flatten() {
            value[key] = part;
        }
        format!("{value:#}\n")
    }

    fn moe_json(&self) -> Vec<(&'static str, Value)> {
        let Some(moe) = &self.moe else { return Vec::new() };
        let mut parts = vec![
            ("num_experts", json!(moe.experts)),
            ("num_experts_per_tok", json!(moe.top)),
            ("moe_intermediate_size", json!(moe.intermediate)),
            ("norm_topk_prob", json!(moe.renormalise)),
            ("decoder_sparse_step", json!(1)),
            ("mlp_only_layers", json!(moe.dense_layers)),
        ];
        if let Some(width) = moe.shared_intermediate {
            parts.push(("shared_expert_intermediate_size", json!(width)));
        }
        parts
    }

    fn delta_json(&self) -> Vec<(&'static str, Value)> {
        let Some(delta) = &self.delta else { return Vec::new() };
        let kind = |layer| match self.mixing(layer) {
            Mixing::Attention => "full_attention",
            Mixing::Delta(_) => "linear_attention",
        };
        let types: Vec<&str> = (0..self.layers).map(kind).collect();
        vec![
            ("linear_num_key_heads", json!(delta.key_heads)),
            ("linear_num_value_heads", json!(delta.value_heads)),
            ("linear_key_head_dim", json!(delta.key_dim)),
            ("linear_value_head_dim", json!(delta.value_dim)),
            ("linear_conv_kernel_dim", json!(delta.taps)),
            ("layer_types", json!(types)),
            (
                "partial_rotary_factor",
                json!(self.rotary as f64 / self.head_dim as f64),
            ),
        ]
    }
}

/// Writes `config.json` and `model.safetensors` (bf16) into a folder. Matrices are normal with deviation 1/√inputs, norms
/// 1 (zero-centred ones 0), biases small. The same configuration and seed give the same bytes.
///
/// # Errors
/// `MODEL_WRITE` when the folder cannot be written.
pub fn write_checkpoint(directory: &Path, config: &ModelConfig, seed: u64) -> Result<()> {
    let failed = |error: std::io::Error| write_failure(directory, &error);
    std::fs::create_dir_all(directory).map_err(failed)?;
    std::fs::write(directory.join("config.json"), config.to_json()).map_err(failed)?;
    let mut tensors = config.tensors();
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let file = File::create(directory.join("model.safetensors")).map_err(failed)?;
    write_tensors(BufWriter::new(file), config, &tensors, seed).map_err(failed)
}

fn write_failure(directory: &Path, error: &std::io::Error) -> Failure {
    Failure::platform("MODEL_WRITE", format!("The checkpoint cannot be written: {error}"))
        .at(directory.display().to_string())
        .hint("Free space on this disk, or make the folder writable")
}

/// One tensor in memory at a time, so that a checkpoint may be larger than the machine.
fn write_tensors(
    mut file: BufWriter<File>,
    config: &ModelConfig,
    tensors: &[ExpectedTensor],
    seed: u64,
) -> std::io::Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += 2 * tensor.shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in tensors {
        for value in values(config, tensor, seed) {
            file.write_all(&bf16::from_f64(value).to_le_bytes())?;
        }
    }
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()
}

fn values(config: &ModelConfig, tensor: &ExpectedTensor, seed: u64) -> impl Iterator<Item = f64> {
    let (mean, deviation) = match tensor.shape.as_slice() {
        _ if tensor.name.ends_with("linear_attn.norm.weight") => (1.0, 0.0),
        _ if tensor.name.ends_with("norm.weight") && config.zero_centred_norms => (0.0, 0.0),
        _ if tensor.name.ends_with("norm.weight") => (1.0, 0.0),
        _ if tensor.name.ends_with("dt_bias") => (1.0, 0.0),
        [_, 1, taps] => (0.0, 1.0 / (*taps as f64).sqrt()),
        _ if tensor.name.ends_with("embed_tokens.weight") => (0.0, EMBEDDING_DEVIATION),
        [_, inputs] => (0.0, 1.0 / (*inputs as f64).sqrt()),
        _ => (0.0, 0.02),
    };
    let random = CounterRandom::new(seed, &format!("synthetic {}", tensor.name));
    let count = tensor.shape.iter().product::<usize>() as u64;
    (0..count).map(move |place| mean + deviation * random.normal(place))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::checkpoint::Checkpoint;

    #[test]
    fn a_written_configuration_is_read_back_as_it_was() {
        for family in [Family::Qwen2, Family::Qwen3, Family::Qwen3Moe, Family::Qwen3Next] {
            let config = ModelConfig::miniature(family, 320);
            assert_eq!(ModelConfig::parse(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn a_written_checkpoint_holds_what_its_configuration_asks_for_and_depends_on_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::miniature(Family::Qwen3Next, 64);
        let bytes = |name: &str, seed| {
            let path = folder.path().join(name);
            write_checkpoint(&path, &config, seed).unwrap();
            Checkpoint::open(&path).unwrap().check(&config.tensors()).unwrap();
            std::fs::read(path.join("model.safetensors")).unwrap()
        };
        assert_eq!(bytes("a", 1), bytes("b", 1));
        assert_ne!(bytes("a", 1), bytes("c", 2));
    }
}
