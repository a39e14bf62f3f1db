//! `config.json` as it lies on the disk, and what each of its spellings means.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::{DeltaConfig, Family, MoeConfig, SUPPORTED, extent, invalid, unsupported};
use crate::error::Result;

/// Share of each head that Qwen3-Next rotates where its config does not say, as in transformers.
const QWEN3_NEXT_ROTARY_SHARE: f64 = 0.25;
/// Every how many layers Qwen3-Next has softmax attention where its config does not say, as in transformers.
const QWEN3_NEXT_ATTENTION_INTERVAL: usize = 4;

/// `config.json`, reduced to what changes the computation.
#[derive(Deserialize)]
pub(super) struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    pub(super) vocab_size: Option<u64>,
    pub(super) hidden_size: Option<u64>,
    pub(super) num_hidden_layers: Option<u64>,
    pub(super) num_attention_heads: Option<u64>,
    pub(super) num_key_value_heads: Option<u64>,
    pub(super) head_dim: Option<u64>,
    pub(super) intermediate_size: Option<u64>,
    pub(super) max_position_embeddings: Option<u64>,
    pub(super) rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    #[serde(default)]
    pub(super) tie_word_embeddings: bool,
    #[serde(default)]
    pub(super) attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<u64>,
    max_window_layers: Option<u64>,
    layer_types: Option<Vec<String>>,
    full_attention_interval: Option<u64>,
    quantization_config: Option<RawQuantization>,
    num_experts: Option<u64>,
    num_local_experts: Option<u64>,
    num_experts_per_tok: Option<u64>,
    moe_intermediate_size: Option<u64>,
    shared_expert_intermediate_size: Option<u64>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<u64>,
    mlp_only_layers: Option<Vec<u64>>,
    linear_num_key_heads: Option<u64>,
    linear_num_value_heads: Option<u64>,
    linear_key_head_dim: Option<u64>,
    linear_value_head_dim: Option<u64>,
    linear_conv_kernel_dim: Option<u64>,
}

/// Both spellings of the RoPE settings: `rope_parameters` (transformers 5) and `rope_scaling` (before).
#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    fmt: Option<String>,
    weight_block_size: Option<Vec<u64>>,
}

impl Raw {
    pub(super) fn family(&self) -> Result<Family> {
        match self.model_type.as_deref() {
            Some("qwen2") => Ok(Family::Qwen2),
            Some("qwen3") => Ok(Family::Qwen3),
            Some("qwen3_moe") => Ok(Family::Qwen3Moe),
            Some("qwen3_next") => Ok(Family::Qwen3Next),
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

    pub(super) fn refuse_what_is_not_computed(&self, family: Family) -> Result<()> {
        if let Some(activation) = self.hidden_act.as_deref().filter(|name| *name != "silu") {
            return Err(unsupported(format!(
                "The activation `{activation}` is not supported, only `silu`"
            )));
        }
        if family != Family::Qwen3Next && self.window_is_on() {
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

    fn rope_settings(&self) -> impl Iterator<Item = &RawRope> {
        [&self.rope_parameters, &self.rope_scaling].into_iter().flatten()
    }

    /// θ from wherever this version of transformers wrote it; its own default where nobody did.
    pub(super) fn rope_theta(&self) -> Result<f64> {
        for rope in self.rope_settings() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|kind| *kind != "default") {
                return Err(unsupported(format!("RoPE scaling of type `{kind}` is not supported"))
                    .hint("Remove rope_scaling from config.json if your examples fit the unscaled context"));
            }
        }
        let nested = self.rope_settings().find_map(|rope| rope.rope_theta);
        Ok(nested.or(self.rope_theta).unwrap_or(10_000.0))
    }

    /// How many elements of a head are rotated. Only Qwen3-Next knows of a share; in the other families transformers rotates
    /// whole heads whatever the config says.
    pub(super) fn rotary(&self, family: Family, head_dim: usize) -> Result<usize> {
        if family != Family::Qwen3Next {
            return Ok(head_dim);
        }
        let nested = self.rope_settings().find_map(|rope| rope.partial_rotary_factor);
        let share = nested.or(self.partial_rotary_factor).unwrap_or(QWEN3_NEXT_ROTARY_SHARE);
        if !(share > 0.0 && share <= 1.0) {
            return Err(invalid(format!(
                "`partial_rotary_factor` is {share}, but must be above 0 and at most 1"
            )));
        }
        Ok((head_dim as f64 * share) as usize)
    }

    /// The blocks of an FP8 release's scales; any other quantisation is refused.
    pub(super) fn fp8_block(&self) -> Result<Option<[usize; 2]>> {
        let Some(settings) = &self.quantization_config else {
            return Ok(None);
        };
        let method = settings.quant_method.as_deref().unwrap_or("unknown");
        let format = settings.fmt.as_deref().unwrap_or("e4m3");
        if method != "fp8" || format != "e4m3" {
            return Err(
                unsupported(format!("The checkpoint is already quantised (`{method}`, {format})"))
                    .hint("Use the bf16, f16, f32 or block-wise FP8 (e4m3) release of this model"),
            );
        }
        match settings.weight_block_size.as_deref() {
            Some([rows, columns]) => Ok(Some([
                extent("weight_block_size", Some(*rows))?,
                extent("weight_block_size", Some(*columns))?,
            ])),
            _ => Err(
                unsupported("The checkpoint is fp8 without blocks of scales (no weight_block_size)".to_owned())
                    .hint("Use the bf16 or the block-wise FP8 release of this model"),
            ),
        }
    }

    /// The layers' mixture of experts; `None` for families without one, or with no layer that has it.
    pub(super) fn moe(&self, family: Family, layers: usize) -> Result<Option<MoeConfig>> {
        let experts = self.num_experts.or(self.num_local_experts);
        if !matches!(family, Family::Qwen3Moe | Family::Qwen3Next) || experts == Some(0) {
            return Ok(None);
        }
        let step = match self.decoder_sparse_step {
            Some(step) => extent("decoder_sparse_step", Some(step))?,
            None => 1,
        };
        let always_dense: BTreeSet<u64> = self.mlp_only_layers.iter().flatten().copied().collect();
        if let Some(layer) = always_dense.iter().find(|layer| **layer >= layers as u64) {
            return Err(invalid(format!(
                "`mlp_only_layers` names layer {layer}, but the model has {layers}"
            )));
        }
        let is_dense = |layer: &usize| always_dense.contains(&(*layer as u64)) || !(layer + 1).is_multiple_of(step);
        let shared_intermediate = match family {
            Family::Qwen3Next => Some(extent(
                "shared_expert_intermediate_size",
                self.shared_expert_intermediate_size,
            )?),
            _ => None,
        };
        Ok(Some(MoeConfig {
            experts: extent("num_experts", experts)?,
            top: extent("num_experts_per_tok", self.num_experts_per_tok)?,
            intermediate: extent("moe_intermediate_size", self.moe_intermediate_size)?,
            renormalise: self.norm_topk_prob.unwrap_or(family == Family::Qwen3Next),
            shared_intermediate,
            dense_layers: (0..layers).filter(is_dense).collect(),
        }))
    }

    /// The Gated DeltaNet layers; `None` for families without any.
    pub(super) fn delta(&self, family: Family, layers: usize) -> Result<Option<DeltaConfig>> {
        if family != Family::Qwen3Next {
            return Ok(None);
        }
        Ok(Some(DeltaConfig {
            key_heads: extent("linear_num_key_heads", self.linear_num_key_heads)?,
            value_heads: extent("linear_num_value_heads", self.linear_num_value_heads)?,
            key_dim: extent("linear_key_head_dim", self.linear_key_head_dim)?,
            value_dim: extent("linear_value_head_dim", self.linear_value_head_dim)?,
            taps: extent("linear_conv_kernel_dim", self.linear_conv_kernel_dim)?,
            layers: self.delta_layers(layers)?,
        }))
    }

    fn delta_layers(&self, layers: usize) -> Result<Vec<usize>> {
        let Some(types) = &self.layer_types else {
            let interval = match self.full_attention_interval {
                Some(interval) => extent("full_attention_interval", Some(interval))?,
                None => QWEN3_NEXT_ATTENTION_INTERVAL,
            };
            return Ok((0..layers)
                .filter(|layer| !(layer + 1).is_multiple_of(interval))
                .collect());
        };
        if types.len() != layers {
            return Err(invalid(format!(
                "`layer_types` has {} entries, but the model has {layers} layers",
                types.len()
            )));
        }
        let known = ["linear_attention", "full_attention"];
        if let Some(kind) = types.iter().find(|kind| !known.contains(&kind.as_str())) {
            return Err(unsupported(format!("The layer type `{kind}` is not supported")));
        }
        Ok((0..layers).filter(|layer| types[*layer] == known[0]).collect())
    }
}
