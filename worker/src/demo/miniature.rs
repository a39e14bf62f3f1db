//! A miniature Qwen3 checkpoint: a real one in every file, only small and untrained.
//!
//! The weights are seeded random numbers, so a demo or a test needs no download. The tokenizer is a byte-level BPE learnt
//! from the texts it will meet, with Qwen's control tokens and a ChatML template. Everything a Hugging Face loader asks for
//! is there; `transformers` loads it as `Qwen3ForCausalLM`.

use std::path::Path;

use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{Failure, Result};
use crate::model::config::{Family, ModelConfig};
use crate::model::synthetic::write_checkpoint;

/// Sizes of a miniature model.
#[derive(Clone, Copy, Debug)]
pub struct Miniature {
    /// Model width.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Feed-forward width.
    pub intermediate: usize,
    /// Most tokens the tokenizer may have; it has fewer when the texts do not yield as many.
    pub vocabulary: usize,
    /// Seed of the weights.
    pub seed: u64,
}

impl Default for Miniature {
    /// 1.5 million parameters: an epoch over the sample data takes seconds on two cores.
    fn default() -> Self {
        Self {
            hidden: 128,
            layers: 4,
            heads: 4,
            key_value_heads: 2,
            head_dim: 32,
            intermediate: 384,
            vocabulary: 2048,
            seed: 7,
        }
    }
}

/// Qwen's control tokens.
const CONTROL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// ChatML, as Qwen's own templates write a plain conversation.
const CHAT_TEMPLATE: &str = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

impl Miniature {
    /// Writes `config.json`, `generation_config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json` into
    /// `folder`; the tokenizer is learnt from `texts`. The same arguments give the same bytes.
    ///
    /// # Errors
    /// `DEMO_MODEL_UNWRITABLE` when the folder cannot be written.
    pub fn write(&self, folder: &Path, texts: &[String]) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
        let tokenizer = learn_tokenizer(texts, self.vocabulary)?;
        let vocabulary = tokenizer.get_vocab_size(true);
        let save = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|error| unwritable(&path, &error))
        };
        save(
            "tokenizer.json",
            tokenizer.to_string(true).map_err(|error| tokenizer_failure(&error))?,
        )?;
        save("tokenizer_config.json", pretty(&tokenizer_config()))?;
        let id = |token| tokenizer.token_to_id(token);
        let (end, pad) = (id("<|im_end|>"), id("<|endoftext|>"));
        save(
            "generation_config.json",
            pretty(&json!({"eos_token_id": [end, pad], "pad_token_id": pad})),
        )?;
        write_checkpoint(folder, &self.config(vocabulary), self.seed)
    }

    fn config(&self, vocabulary: usize) -> ModelConfig {
        ModelConfig {
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
            intermediate: self.intermediate,
            max_positions: 8192,
            ..ModelConfig::miniature(Family::Qwen3, vocabulary)
        }
    }
}

fn learn_tokenizer(texts: &[String], vocabulary: usize) -> Result<Tokenizer> {
    let control: Vec<AddedToken> = CONTROL_TOKENS
        .iter()
        .map(|token| AddedToken::from(*token, true).normalized(false))
        .collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocabulary.saturating_sub(control.len()))
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer
        .train(&mut TrainerWrapper::from(trainer), texts.iter())
        .map_err(|error| tokenizer_failure(&error))?;
    tokenizer
        .add_special_tokens(control)
        .map_err(|error| tokenizer_failure(&error))?;
    Ok(tokenizer)
}

fn tokenizer_config() -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": false,
    })
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn unwritable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::system(
        "DEMO_MODEL_UNWRITABLE",
        format!("The miniature model cannot be written: {error}"),
    )
    .at(path.display().to_string())
}

fn tokenizer_failure(error: &dyn std::fmt::Display) -> Failure {
    Failure::system(
        "DEMO_TOKENIZER_FAILED",
        format!("The miniature tokenizer cannot be made: {error}"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_other_weights() {
        let folder = tempfile::tempdir().unwrap();
        let texts = vec!["the cat sat on the mat, the cat sat again\n".repeat(20)];
        let write = |name: &str, seed| {
            Miniature {
                seed,
                ..Miniature::default()
            }
            .write(&folder.path().join(name), &texts)
            .unwrap();
            let read = |file: &str| std::fs::read(folder.path().join(name).join(file)).unwrap();
            (read("model.safetensors"), read("tokenizer.json"))
        };
        let (first, again, other) = (write("first", 1), write("again", 1), write("other", 2));
        assert!(first == again);
        assert!(first.0 != other.0 && first.1 == other.1);
    }
}
