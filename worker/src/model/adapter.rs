//! PEFT's adapter files, read: `adapter_model.safetensors` and `adapter_config.json`. They are written by
//! [`artifact`](crate::artifact).

use std::collections::HashMap;
use std::path::Path;

use brightrun_kernels::Backend;
use serde::Deserialize;

use crate::error::{Failure, Result};
use crate::model::lora::{LoraConfig, LoraPair, LoraSet, Module};
use crate::model::peft;
use crate::model::targets::names_experts;
use crate::model::tensor_file::TensorFile;

/// File of the factors.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// File of the settings.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The settings of `adapter_config.json` that change what an adapter computes.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f32,
    target_modules: Option<Targets>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: HashMap<String, usize>,
    #[serde(default)]
    alpha_pattern: HashMap<String, f32>,
    target_parameters: Option<Vec<String>>,
    modules_to_save: Option<Vec<String>>,
    layers_to_transform: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Targets {
    Names(Vec<String>),
    Pattern(String),
}

impl PeftConfig {
    fn into_config(self) -> Result<LoraConfig> {
        let refused = [
            (
                self.peft_type.as_deref().is_some_and(|kind| kind != "LORA"),
                "peft_type other than LORA",
            ),
            (self.use_rslora, "use_rslora"),
            (self.use_dora, "use_dora"),
            (self.fan_in_fan_out, "fan_in_fan_out"),
            (
                self.lora_bias || self.bias.as_deref().is_some_and(|bias| bias != "none"),
                "a trained bias",
            ),
            (
                !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty(),
                "rank_pattern or alpha_pattern",
            ),
            (
                self.modules_to_save.is_some_and(|list| !list.is_empty()),
                "modules_to_save",
            ),
            (
                self.layers_to_transform.is_some_and(|value| !value.is_null()),
                "layers_to_transform",
            ),
        ];
        let used: Vec<&str> = refused
            .iter()
            .filter(|(is_used, _)| *is_used)
            .map(|(_, name)| *name)
            .collect();
        if !used.is_empty() {
            return Err(invalid(format!(
                "The adapter uses what is not supported: {}",
                used.join(", ")
            )));
        }
        let modules = match self.target_modules {
            Some(Targets::Names(names)) => names,
            Some(Targets::Pattern(name)) => vec![name],
            None => Vec::new(),
        };
        let parameters = self.target_parameters.unwrap_or_default();
        let mut targets = modules;
        for parameter in &parameters {
            let target = peft::target_of_parameter(parameter).ok_or_else(|| {
                invalid(format!(
                    "The adapter adapts a parameter that is not supported: `{parameter}`"
                ))
            })?;
            targets.push(target.to_owned());
        }
        if let Some(target) = targets
            .iter()
            .find(|target| names_experts(target) && !parameters.contains(target))
        {
            return Err(invalid(format!(
                "The adapter names routed experts among its modules: `{target}`"
            )));
        }
        let config = LoraConfig {
            rank: self.r,
            alpha: self.lora_alpha,
            targets,
        };
        if config.rank == 0 || config.targets.is_empty() {
            return Err(invalid(
                "The adapter's config has rank 0 or names no targets".to_owned(),
            ));
        }
        Ok(config)
    }
}

impl LoraConfig {
    /// Reads `adapter_config.json` of a PEFT adapter folder.
    ///
    /// # Errors
    /// `ADAPTER_INVALID` when it cannot be read or uses what this program does not compute.
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(ADAPTER_CONFIG);
        let at = |failure: Failure| failure.at(path.display().to_string());
        let text = std::fs::read_to_string(&path)
            .map_err(|error| at(invalid(format!("The adapter's config cannot be read: {error}"))))?;
        let parsed: PeftConfig = serde_json::from_str(&text)
            .map_err(|error| at(invalid(format!("The adapter's config is not valid: {error}"))))?;
        parsed.into_config().map_err(at)
    }
}

impl<B: Backend> LoraSet<B> {
    /// Loads a PEFT adapter folder for a model with these modules.
    ///
    /// # Errors
    /// `ADAPTER_INVALID` when a factor is missing, has another shape than the model asks for, is not finite, or when the
    /// file holds tensors that belong to no adapted module; `LORA_TARGET_UNKNOWN`; the backend's own.
    pub fn load(device: &B, directory: &Path, modules: &[Module]) -> Result<Self> {
        let config = LoraConfig::load(directory)?;
        let file = TensorFile::open(&directory.join(ADAPTER_WEIGHTS))?;
        let at = |failure: Failure| failure.at(file.path().display().to_string());
        let set = Self::build(config, modules, |_, layout| {
            let ((key_a, key_b), (stored_a, stored_b)) = (&layout.keys, layout.stored_shapes());
            let (shape_a, shape_b) = layout.shapes();
            let a = read_factor(&file, key_a, stored_a).map_err(at)?;
            let b = read_factor(&file, key_b, stored_b).map_err(at)?;
            Ok((
                device.upload_f32(shape_a, &a)?,
                device.upload_f32(shape_b, &layout.b_from_peft(b))?,
            ))
        })?;
        if file.tensors().len() != 2 * set.pairs().len() {
            return Err(at(invalid(format!(
                "The adapter holds {} tensors, but its target_modules account for {}",
                file.tensors().len(),
                2 * set.pairs().len()
            ))));
        }
        Ok(set)
    }
}

/// One factor as PEFT has it.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftFactor {
    /// Its name.
    pub key: String,
    /// Its extents.
    pub shape: [usize; 2],
    /// Its values, row-major.
    pub values: Vec<f32>,
}

impl<B: Backend> LoraPair<B> {
    /// Both factors, A first, in PEFT's order.
    ///
    /// # Errors
    /// The backend's own.
    pub fn to_peft(&self, device: &B) -> Result<[PeftFactor; 2]> {
        Ok(self
            .layout()
            .to_peft(device.read_f32(&self.a)?, device.read_f32(&self.b)?))
    }
}

fn read_factor(file: &TensorFile, key: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
    let stored = file
        .tensors()
        .get(key)
        .ok_or_else(|| invalid(format!("The adapter has no tensor `{key}`")))?;
    if stored.shape != shape {
        return Err(invalid(format!(
            "The adapter's tensor `{key}` has the shape {:?}, but the model asks for {shape:?}",
            stored.shape
        )));
    }
    let host = file.read(key)?;
    if let Some(element) = host.first_non_finite() {
        return Err(invalid(format!(
            "Element {element} of the adapter's tensor `{key}` is infinite or not a number"
        )));
    }
    host.to_f32()
}

fn invalid(message: String) -> Failure {
    Failure::user("ADAPTER_INVALID", message).hint("Name the folder of a PEFT LoRA adapter trained for this base model")
}
