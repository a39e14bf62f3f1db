//! PEFT's `adapter_config.json`, key for key as PEFT 0.21 writes it for a LoRA adapter.
//!
//! PEFT warns about unknown keys and fills missing ones with its own defaults; vLLM reads `r`,
//! `lora_alpha`, `target_modules`, `bias`, `use_rslora` and `use_dora`. Writing exactly PEFT's keys leaves
//! nothing to a reader's guess. The fields stand in the order PEFT sorts them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use super::input::{AdapterLayout, BaseModel};
use crate::error::{Failure, Result};

/// The PEFT release whose keys and tensor layout are written. The layout of routed experts
/// changed with 0.19, so readers may need to know.
pub const PEFT_VERSION: &str = "0.21.2";

/// The content of `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the fields are PEFT's, and its documentation describes them")]
pub struct AdapterConfig {
    pub alora_invocation_tokens: Value,
    pub alpha_pattern: BTreeMap<String, Value>,
    pub arrow_config: Value,
    pub auto_mapping: Value,
    pub base_model_name_or_path: String,
    pub bias: String,
    pub corda_config: Value,
    pub ensure_weight_tying: bool,
    pub eva_config: Value,
    pub exclude_modules: Value,
    pub fan_in_fan_out: bool,
    pub inference_mode: bool,
    pub init_lora_weights: bool,
    pub kasa_config: Value,
    pub layer_replication: Value,
    pub layers_pattern: Value,
    pub layers_to_transform: Value,
    pub loftq_config: BTreeMap<String, Value>,
    pub lora_alpha: Number,
    pub lora_bias: bool,
    pub lora_dropout: f64,
    pub lora_ga_config: Value,
    pub megatron_config: Value,
    pub megatron_core: String,
    pub modules_to_save: Value,
    pub monteclora_config: Value,
    pub peft_type: String,
    pub peft_version: String,
    pub qalora_group_size: u32,
    pub r: usize,
    pub rank_pattern: BTreeMap<String, Value>,
    pub revision: Option<String>,
    pub target_modules: Vec<String>,
    pub target_parameters: Option<Vec<String>>,
    pub task_type: String,
    pub trainable_token_indices: Value,
    pub use_bdlora: Value,
    pub use_dora: bool,
    pub use_qalora: bool,
    pub use_rslora: bool,
    pub velora_config: Value,
}

impl AdapterConfig {
    /// The description of an adapter of `base`. `target_modules` are sorted, as PEFT keeps a set of them, so that equal runs
    /// give equal bytes. `target_parameters` keep their order, as in PEFT's own files; it means nothing there: PEFT wraps the
    /// parameters of a module in the order in which the module declares them, see [`PeftLayout`](crate::model::peft::PeftLayout).
    pub fn new(layout: &AdapterLayout, base: &BaseModel) -> Result<Self> {
        let mut target_modules = layout.target_modules.clone();
        target_modules.sort_unstable();
        target_modules.dedup();
        Ok(Self {
            alora_invocation_tokens: Value::Null,
            alpha_pattern: BTreeMap::new(),
            arrow_config: Value::Null,
            auto_mapping: Value::Null,
            base_model_name_or_path: base.id.clone(),
            bias: "none".to_owned(),
            corda_config: Value::Null,
            ensure_weight_tying: false,
            eva_config: Value::Null,
            exclude_modules: Value::Null,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            kasa_config: Value::Null,
            layer_replication: Value::Null,
            layers_pattern: Value::Null,
            layers_to_transform: Value::Null,
            loftq_config: BTreeMap::new(),
            lora_alpha: number(layout.alpha)?,
            lora_bias: false,
            lora_dropout: 0.0,
            lora_ga_config: Value::Null,
            megatron_config: Value::Null,
            megatron_core: "megatron.core".to_owned(),
            modules_to_save: Value::Null,
            monteclora_config: Value::Null,
            peft_type: "LORA".to_owned(),
            peft_version: PEFT_VERSION.to_owned(),
            qalora_group_size: 16,
            r: layout.rank,
            rank_pattern: BTreeMap::new(),
            revision: base.revision.clone(),
            target_modules,
            target_parameters: Some(layout.target_parameters.clone()).filter(|names| !names.is_empty()),
            task_type: "CAUSAL_LM".to_owned(),
            trainable_token_indices: Value::Null,
            use_bdlora: Value::Null,
            use_dora: false,
            use_qalora: false,
            use_rslora: false,
            velora_config: Value::Null,
        })
    }
}

/// PEFT declares alpha an integer, and readers are strict: a whole number is written as one.
fn number(alpha: f32) -> Result<Number> {
    if alpha.is_finite() && alpha.fract() == 0.0 && alpha.abs() < 1e9 {
        return Ok(Number::from(alpha as i64));
    }
    // Through text: 0.1 stays 0.1 instead of 0.10000000149….
    let shortest = alpha.to_string().parse().ok().and_then(Number::from_f64);
    shortest.ok_or_else(|| Failure::system("ADAPTER_CONFIG_INVALID", "The adapter's alpha is not a finite number"))
}
