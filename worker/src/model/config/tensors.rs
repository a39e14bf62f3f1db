//! Which tensors a checkpoint of some configuration must hold.

use super::{Mixing, ModelConfig, MoeConfig};

/// A tensor that a checkpoint of some configuration must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its extents.
    pub shape: Vec<usize>,
}

/// What a tensor is to the model, which decides how it may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A norm, a bias, a convolution and the like: kept as it is.
    Vector,
    /// The embedding, the head, a router, a projection with a handful of outputs: never quantised.
    Table,
    /// A matrix that may be quantised.
    Projection,
    /// Matrices of routed experts, which may be quantised each by itself.
    Expert,
}

impl ExpectedTensor {
    /// What it is to the model.
    pub fn role(&self) -> Role {
        let is_matrix_of = |names: &[&str]| names.iter().any(|name| self.name.ends_with(name));
        if self.name.contains(".mlp.experts.") {
            Role::Expert
        } else if is_matrix_of(&["_proj.weight", ".in_proj_qkvz.weight"]) {
            Role::Projection
        } else if is_matrix_of(&[
            "embed_tokens.weight",
            "lm_head.weight",
            ".mlp.gate.weight",
            ".shared_expert_gate.weight",
            ".in_proj_ba.weight",
        ]) {
            Role::Table
        } else {
            Role::Vector
        }
    }
}

/// How a checkpoint holds the matrices of routed experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertStorage {
    /// `experts.3.gate_proj.weight` and so on: what transformers saves and the hub holds.
    #[default]
    Each,
    /// `experts.gate_up_proj` `[E, 2·F, C]` and `experts.down_proj` `[E, C, F]`: what transformers 5 computes with.
    Stacked,
}

impl ModelConfig {
    /// Every tensor a checkpoint of this configuration must hold, each expert's matrices by themselves.
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        self.tensors_with(ExpertStorage::Each)
    }

    /// Every tensor a checkpoint of this configuration must hold.
    pub fn tensors_with(&self, experts: ExpertStorage) -> Vec<ExpectedTensor> {
        let mut list = vec![
            expected("model.embed_tokens.weight", &[self.vocabulary, self.hidden]),
            expected("model.norm.weight", &[self.hidden]),
        ];
        if !self.tied_embeddings {
            list.push(expected("lm_head.weight", &[self.vocabulary, self.hidden]));
        }
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            for name in ["input_layernorm", "post_attention_layernorm"] {
                list.push(expected(&format!("{prefix}.{name}.weight"), &[self.hidden]));
            }
            match self.mixing(layer) {
                Mixing::Attention => self.attention_tensors(&prefix, &mut list),
                Mixing::Delta(_) => self.delta_tensors(&prefix, &mut list),
            }
            match self.routing(layer) {
                None => self.mlp_tensors(&format!("{prefix}.mlp"), self.intermediate, &mut list),
                Some(moe) => self.moe_tensors(moe, experts, &format!("{prefix}.mlp"), &mut list),
            }
        }
        list
    }

    fn attention_tensors(&self, prefix: &str, list: &mut Vec<ExpectedTensor>) {
        let (heads, keys) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        let queries = if self.attention_gate { 2 * heads } else { heads };
        let projections = [
            ("q_proj", queries, self.hidden, self.qkv_bias),
            ("k_proj", keys, self.hidden, self.qkv_bias),
            ("v_proj", keys, self.hidden, self.qkv_bias),
            ("o_proj", self.hidden, heads, self.output_bias),
        ];
        for (name, outputs, inputs, bias) in projections {
            let path = format!("{prefix}.self_attn.{name}");
            list.push(expected(&format!("{path}.weight"), &[outputs, inputs]));
            if bias {
                list.push(expected(&format!("{path}.bias"), &[outputs]));
            }
        }
        if self.qk_norm {
            for name in ["q_norm", "k_norm"] {
                list.push(expected(&format!("{prefix}.self_attn.{name}.weight"), &[self.head_dim]));
            }
        }
    }

    fn delta_tensors(&self, prefix: &str, list: &mut Vec<ExpectedTensor>) {
        let Some(delta) = &self.delta else { return };
        let (keys, values) = (delta.key_width(), delta.value_width());
        let shapes: [(&str, &[usize]); 7] = [
            ("A_log", &[delta.value_heads]),
            ("dt_bias", &[delta.value_heads]),
            ("conv1d.weight", &[2 * keys + values, 1, delta.taps]),
            ("in_proj_ba.weight", &[2 * delta.value_heads, self.hidden]),
            ("in_proj_qkvz.weight", &[2 * keys + 2 * values, self.hidden]),
            ("norm.weight", &[delta.value_dim]),
            ("out_proj.weight", &[self.hidden, values]),
        ];
        for (name, shape) in shapes {
            list.push(expected(&format!("{prefix}.linear_attn.{name}"), shape));
        }
    }

    fn moe_tensors(&self, moe: &MoeConfig, storage: ExpertStorage, prefix: &str, list: &mut Vec<ExpectedTensor>) {
        list.push(expected(&format!("{prefix}.gate.weight"), &[moe.experts, self.hidden]));
        match storage {
            ExpertStorage::Each => {
                for expert in 0..moe.experts {
                    self.mlp_tensors(&format!("{prefix}.experts.{expert}"), moe.intermediate, list);
                }
            }
            ExpertStorage::Stacked => {
                let wide = [moe.experts, 2 * moe.intermediate, self.hidden];
                let narrow = [moe.experts, self.hidden, moe.intermediate];
                list.push(expected(&format!("{prefix}.experts.gate_up_proj"), &wide));
                list.push(expected(&format!("{prefix}.experts.down_proj"), &narrow));
            }
        }
        if let Some(width) = moe.shared_intermediate {
            self.mlp_tensors(&format!("{prefix}.shared_expert"), width, list);
            list.push(expected(
                &format!("{prefix}.shared_expert_gate.weight"),
                &[1, self.hidden],
            ));
        }
    }

    fn mlp_tensors(&self, prefix: &str, width: usize, list: &mut Vec<ExpectedTensor>) {
        list.push(expected(&format!("{prefix}.gate_proj.weight"), &[width, self.hidden]));
        list.push(expected(&format!("{prefix}.up_proj.weight"), &[width, self.hidden]));
        list.push(expected(&format!("{prefix}.down_proj.weight"), &[self.hidden, width]));
    }
}

fn expected(name: &str, shape: &[usize]) -> ExpectedTensor {
    ExpectedTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
    }
}
