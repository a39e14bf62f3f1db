//! `config.json` → [`ModelConfig`]: what a checkpoint says it is.
//!
//! Everything this program would compute differently from the checkpoint's authors is refused here, before a weight is
//! read: another architecture, another activation, a sliding window that is switched on, a scaled RoPE.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Failure, Result};

/// The `model_type`s this program trains.
pub const SUPPORTED: [&str; 2] = ["qwen2", "qwen3"];

/// No extent of a real model is larger; keeps products of a few extents inside `usize`.
const LARGEST_EXTENT: u64 = 1 << 24;

/// A model family: one way to put the same parts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 dense: an RMS norm on each query and key head, no biases by default.
    Qwen3,
}

/// The numbers a dense decoder is built from.
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
}

/// A tensor that a checkpoint of some configuration must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its extents.
    pub shape: Vec<usize>,
}

/// `config.json` as it lies on the disk, reduced to what changes the computation.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<RawRope>,
    hidden_act: Option<String>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<u64>,
    max_window_layers: Option<u64>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<serde_json::Value>,
}

/// Both spellings of the RoPE settings: `rope_parameters` (transformers 5) and `rope_scaling` (before).
#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
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
        raw.refuse_what_is_not_computed()?;
        let hidden = extent("hidden_size", raw.hidden_size)?;
        let heads = extent("num_attention_heads", raw.num_attention_heads)?;
        let key_value_heads = match raw.num_key_value_heads {
            Some(count) => extent("num_key_value_heads", Some(count))?,
            None => heads,
        };
        let config = Self {
            family,
            vocabulary: extent("vocab_size", raw.vocab_size)?,
            hidden,
            layers: extent("num_hidden_layers", raw.num_hidden_layers)?,
            heads,
            key_value_heads,
            head_dim: match raw.head_dim {
                Some(width) => extent("head_dim", Some(width))?,
                None => hidden / heads,
            },
            intermediate: extent("intermediate_size", raw.intermediate_size)?,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: raw.rope_theta()?,
            max_positions: extent("max_position_embeddings", raw.max_position_embeddings)?,
            tied_embeddings: raw.tie_word_embeddings,
            qkv_bias: family == Family::Qwen2 || raw.attention_bias,
            output_bias: family == Family::Qwen3 && raw.attention_bias,
            qk_norm: family == Family::Qwen3,
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
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, rule)) => Err(invalid(format!("config.json contradicts itself: {rule}"))),
        }
    }

    /// Every tensor a checkpoint of this configuration must hold.
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let mut list = vec![
            expected("model.embed_tokens.weight", &[self.vocabulary, self.hidden]),
            expected("model.norm.weight", &[self.hidden]),
        ];
        if !self.tied_embeddings {
            list.push(expected("lm_head.weight", &[self.vocabulary, self.hidden]));
        }
        for layer in 0..self.layers {
            self.layer_tensors(&format!("model.layers.{layer}"), &mut list);
        }
        list
    }

    fn layer_tensors(&self, prefix: &str, list: &mut Vec<ExpectedTensor>) {
        let (queries, keys) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        let projections = [
            ("self_attn.q_proj", queries, self.hidden, self.qkv_bias),
            ("self_attn.k_proj", keys, self.hidden, self.qkv_bias),
            ("self_attn.v_proj", keys, self.hidden, self.qkv_bias),
            ("self_attn.o_proj", self.hidden, queries, self.output_bias),
            ("mlp.gate_proj", self.intermediate, self.hidden, false),
            ("mlp.up_proj", self.intermediate, self.hidden, false),
            ("mlp.down_proj", self.hidden, self.intermediate, false),
        ];
        for (name, outputs, inputs, bias) in projections {
            list.push(expected(&format!("{prefix}.{name}.weight"), &[outputs, inputs]));
            if bias {
                list.push(expected(&format!("{prefix}.{name}.bias"), &[outputs]));
            }
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            list.push(expected(&format!("{prefix}.{name}.weight"), &[self.hidden]));
        }
        if self.qk_norm {
            for name in ["self_attn.q_norm", "self_attn.k_norm"] {
                list.push(expected(&format!("{prefix}.{name}.weight"), &[self.head_dim]));
            }
        }
    }
}

impl Raw {
    fn family(&self) -> Result<Family> {
        match self.model_type.as_deref() {
            Some("qwen2") => Ok(Family::Qwen2),
            Some("qwen3") => Ok(Family::Qwen3),
            other => {
                let name = other
                    .or_else(|| self.architectures.as_ref()?.first().map(String::as_str))
                    .unwrap_or("none given");
                Err(
                    unsupported(format!("The model's architecture `{name}` is not supported")).hint(format!(
                        "Use a checkpoint whose model_type is one of: {}",
                        SUPPORTED.join(", ")
                    )),
                )
            }
        }
    }

    fn refuse_what_is_not_computed(&self) -> Result<()> {
        if let Some(activation) = self.hidden_act.as_deref().filter(|name| *name != "silu") {
            return Err(unsupported(format!(
                "The activation `{activation}` is not supported, only `silu`"
            )));
        }
        if let Some(settings) = self.quantization_config.as_ref().filter(|value| !value.is_null()) {
            let method = settings
                .get("quant_method")
                .and_then(|value| value.as_str())
                .unwrap_or("unknown");
            return Err(unsupported(format!("The checkpoint is already quantised (`{method}`)"))
                .hint("Use the bf16, f16 or f32 release of this model"));
        }
        if self.window_is_on() {
            return Err(
                unsupported("The model's layers use a sliding attention window".to_owned())
                    .hint("Use a checkpoint with full attention in every layer"),
            );
        }
        Ok(())
    }

    fn window_is_on(&self) -> bool {
        match &self.layer_types {
            Some(types) => types.iter().any(|kind| kind != "full_attention"),
            None => {
                let windowed_layers = self.max_window_layers.unwrap_or(0) < self.num_hidden_layers.unwrap_or(0);
                self.use_sliding_window && self.sliding_window.is_some() && windowed_layers
            }
        }
    }

    /// θ from wherever this version of transformers wrote it; its own default where nobody did.
    fn rope_theta(&self) -> Result<f64> {
        let settings = [&self.rope_parameters, &self.rope_scaling];
        for rope in settings.into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|kind| *kind != "default") {
                return Err(unsupported(format!("RoPE scaling of type `{kind}` is not supported"))
                    .hint("Remove rope_scaling from config.json if your examples fit the unscaled context"));
            }
        }
        let nested = settings.into_iter().flatten().find_map(|rope| rope.rope_theta);
        Ok(nested.or(self.rope_theta).unwrap_or(10_000.0))
    }
}

fn extent(name: &str, value: Option<u64>) -> Result<usize> {
    match value {
        Some(number @ 1..=LARGEST_EXTENT) => Ok(number as usize),
        Some(number) => Err(invalid(format!("`{name}` is {number}, which no model has"))),
        None => Err(invalid(format!("`{name}` is missing from config.json"))),
    }
}

fn expected(name: &str, shape: &[usize]) -> ExpectedTensor {
    ExpectedTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
    }
}

fn invalid(message: String) -> Failure {
    Failure::user("MODEL_CONFIG_INVALID", message).hint("Download the checkpoint again, or correct its config.json")
}

fn unsupported(message: String) -> Failure {
    Failure::user("MODEL_UNSUPPORTED", message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"
        })
    }

    fn parse_with(changes: Value) -> Result<ModelConfig> {
        let mut config = base();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::parse(&config.to_string())
    }

    #[test]
    fn an_absent_head_dim_is_hidden_over_heads() {
        let mut config = base();
        config.as_object_mut().unwrap().remove("head_dim");
        assert_eq!(ModelConfig::parse(&config.to_string()).unwrap().head_dim, 16);
    }

    #[test]
    fn theta_is_found_in_every_spelling() {
        let nested = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}});
        assert_eq!(parse_with(nested).unwrap().rope_theta, 5e5);
        let scaling = json!({"rope_scaling": {"type": "default"}});
        assert_eq!(parse_with(scaling).unwrap().rope_theta, 1e6);
    }

    #[test]
    fn what_would_be_computed_differently_is_refused() {
        for (change, word) in [
            (json!({"model_type": "llama"}), "llama"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
            (
                json!({"layer_types": ["full_attention", "sliding_attention"]}),
                "window",
            ),
            (
                json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 1}),
                "window",
            ),
            (json!({"quantization_config": {"quant_method": "fp8"}}), "fp8"),
        ] {
            let failure = parse_with(change).unwrap_err();
            assert_eq!(failure.code, "MODEL_UNSUPPORTED");
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn a_window_that_no_layer_uses_is_accepted() {
        let unused = json!({"use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 0});
        assert!(parse_with(unused).is_ok());
    }

    #[test]
    fn impossible_numbers_are_named() {
        for (change, word) in [
            (json!({"num_key_value_heads": 3}), "multiple"),
            (json!({"head_dim": 31}), "head_dim"),
            (json!({"vocab_size": 0}), "vocab_size"),
            (json!({"hidden_size": 1u64 << 40}), "hidden_size"),
            (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        ] {
            let failure = parse_with(change).unwrap_err();
            assert_eq!(failure.code, "MODEL_CONFIG_INVALID");
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn biases_and_norms_follow_the_family() {
        let names = |config: ModelConfig| {
            config
                .tensors()
                .into_iter()
                .map(|tensor| tensor.name)
                .collect::<Vec<_>>()
        };
        let qwen2 = names(parse_with(json!({"model_type": "qwen2", "tie_word_embeddings": true})).unwrap());
        assert!(qwen2.contains(&"model.layers.1.self_attn.k_proj.bias".to_owned()));
        assert!(
            !qwen2
                .iter()
                .any(|name| name.contains("o_proj.bias") || name.contains("q_norm") || name == "lm_head.weight")
        );
        let qwen3 = names(parse_with(json!({})).unwrap());
        assert!(qwen3.contains(&"model.layers.0.self_attn.q_norm.weight".to_owned()));
        assert!(!qwen3.iter().any(|name| name.ends_with("bias")));
    }
}
