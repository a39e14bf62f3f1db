//! Checkpoints made of seeded random numbers, for demonstrations, tests and benchmarks: ordinary Hugging Face folders, which
//! everything else treats like any other checkpoint.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use crate::error::{Failure, Result};
use crate::model::config::{ExpectedTensor, Family, ModelConfig};
use crate::model::random::CounterRandom;

/// Standard deviation of the embedding's values: rows then have a length near that of a trained model's.
const EMBEDDING_DEVIATION: f64 = 0.5;

impl ModelConfig {
    /// A miniature of a family: small enough to train on a laptop in seconds, with every part a real one has.
    pub fn miniature(family: Family, vocabulary: usize) -> Self {
        Self {
            family,
            vocabulary,
            hidden: 64,
            layers: 2,
            heads: 4,
            key_value_heads: 2,
            head_dim: 32,
            intermediate: 160,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            max_positions: 4096,
            tied_embeddings: false,
            qkv_bias: family == Family::Qwen2,
            output_bias: false,
            qk_norm: family == Family::Qwen3,
        }
    }

    /// The text of a `config.json` that [`ModelConfig::parse`] and transformers read as this.
    pub fn to_json(&self) -> String {
        let (model_type, architecture) = match self.family {
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        };
        let value = json!({
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
            "attention_bias": self.family == Family::Qwen3 && self.qkv_bias,
            "attention_dropout": 0.0,
            "use_sliding_window": false,
            "torch_dtype": "bfloat16",
        });
        format!("{value:#}\n")
    }
}

/// Writes `config.json` and `model.safetensors` (bf16) into a folder. Matrices are normal with deviation 1/√inputs, norms
/// 1, biases small. The same configuration and seed give the same bytes.
///
/// # Errors
/// `MODEL_WRITE` when the folder cannot be written.
pub fn write_checkpoint(directory: &Path, config: &ModelConfig, seed: u64) -> Result<()> {
    let failed = |error: std::io::Error| {
        Failure::platform("MODEL_WRITE", format!("The checkpoint cannot be written: {error}"))
            .at(directory.display().to_string())
            .hint("Free space on this disk, or make the folder writable")
    };
    std::fs::create_dir_all(directory).map_err(failed)?;
    std::fs::write(directory.join("config.json"), config.to_json()).map_err(failed)?;
    let mut tensors = config.tensors();
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let file = File::create(directory.join("model.safetensors")).map_err(failed)?;
    write_tensors(BufWriter::new(file), &tensors, seed).map_err(failed)
}

/// One tensor in memory at a time, so that a checkpoint may be larger than the machine.
fn write_tensors(mut file: BufWriter<File>, tensors: &[ExpectedTensor], seed: u64) -> std::io::Result<()> {
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
        for value in values(tensor, seed) {
            file.write_all(&bf16::from_f64(value).to_le_bytes())?;
        }
    }
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()
}

fn values(tensor: &ExpectedTensor, seed: u64) -> impl Iterator<Item = f64> {
    let (mean, deviation) = match tensor.shape.as_slice() {
        _ if tensor.name.ends_with("norm.weight") => (1.0, 0.0),
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
        for family in [Family::Qwen2, Family::Qwen3] {
            let config = ModelConfig::miniature(family, 320);
            assert_eq!(ModelConfig::parse(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn a_written_checkpoint_holds_what_its_configuration_asks_for_and_depends_on_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::miniature(Family::Qwen3, 64);
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
