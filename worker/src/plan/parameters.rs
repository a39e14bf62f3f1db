//! Parameters by group.

use std::collections::BTreeMap;

use crate::model::ModelConfig;
use crate::model::config::ExpertStorage;

/// Numbers of parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// By group.
    pub groups: BTreeMap<&'static str, u64>,
    /// Those of the embedding table.
    pub embedding: u64,
    /// Those that take part in one token's forward pass, the embedding table included.
    pub active: u64,
}

impl Parameters {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.groups.values().sum()
    }
}

/// Counts the tensors that a checkpoint of this configuration holds; multi-token-prediction heads are not among them.
pub fn parameters(config: &ModelConfig) -> Parameters {
    let mut counted = Parameters {
        groups: BTreeMap::new(),
        embedding: 0,
        active: 0,
    };
    for tensor in config.tensors_with(ExpertStorage::Stacked) {
        let elements = tensor.shape.iter().map(|extent| *extent as u64).product::<u64>();
        let group = group_of(&tensor.name);
        *counted.groups.entry(group).or_default() += elements;
        counted.active += match (&config.moe, group) {
            (Some(moe), "routed_experts") => elements / moe.experts as u64 * moe.top as u64,
            _ => elements,
        };
        if group == "embedding" {
            counted.embedding += elements;
        }
    }
    counted
}

fn group_of(name: &str) -> &'static str {
    let contains = |part: &str| name.contains(part);
    match () {
        () if contains("embed_tokens") => "embedding",
        () if contains("lm_head") => "head",
        () if contains(".experts.") => "routed_experts",
        () if contains(".shared_expert") => "shared_experts",
        () if contains(".mlp.gate.weight") => "routers",
        () if contains(".mlp.") => "mlp",
        () if contains(".linear_attn.") => "gated_delta_net",
        () if contains(".self_attn.") => "attention",
        () => "norms",
    }
}
