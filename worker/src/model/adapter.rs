//! PEFT's adapter files: `adapter_model.safetensors` and `adapter_config.json`.

use std::collections::HashMap;
use std::path::Path;

use brightrun_kernels::Backend;
use half::bf16;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use serde::Deserialize;
use serde_json::json;

use crate::error::{Failure, Result};
use crate::model::lora::{LoraConfig, LoraPair, LoraSet, Module};
use crate::model::tensor_file::TensorFile;

/// File of the factors.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// File of the settings.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Element type of saved factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterDtype {
    /// Exact.
    #[default]
    F32,
    /// Half the size; rounded to nearest even.
    Bf16,
}

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
        let config = LoraConfig {
            rank: self.r,
            alpha: self.lora_alpha,
            targets: [modules.clone(), parameters.clone()].concat(),
        };
        if config.rank == 0 || config.targets.is_empty() {
            return Err(invalid(
                "The adapter's config has rank 0 or names no targets".to_owned(),
            ));
        }
        let (as_modules, as_parameters) = config.peft_targets();
        let is_same = |given: &[String], own: &[String]| given.iter().all(|name| own.contains(name));
        if !is_same(&modules, &as_modules) || !is_same(&parameters, &as_parameters) {
            return Err(invalid(format!(
                "The adapter adapts parameters that are not supported: {parameters:?}"
            )));
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

    /// The text of `adapter_config.json`, as PEFT and vLLM read it.
    pub fn to_peft_json(&self, base_model: &str) -> String {
        let (targets, parameters) = self.peft_targets();
        // PEFT writes an integer where it can, and vLLM parses one.
        let alpha = match self.alpha.fract() == 0.0 {
            true => json!(self.alpha as i64),
            false => json!(self.alpha),
        };
        let value = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": targets,
            "target_parameters": (!parameters.is_empty()).then_some(parameters),
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": false,
            "use_dora": false,
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "inference_mode": true,
            "modules_to_save": null,
            "layers_to_transform": null,
            "layers_pattern": null,
            "revision": null,
        });
        format!("{value:#}\n")
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

    /// The bytes of `adapter_model.safetensors`. The same factors give the same bytes.
    ///
    /// # Errors
    /// The backend's own.
    pub fn to_safetensors(&self, device: &B, dtype: AdapterDtype) -> Result<Vec<u8>> {
        let mut tensors = Vec::new();
        for pair in self.pairs() {
            for factor in pair.to_peft(device)? {
                tensors.push((factor.key, factor.shape, encoded(&factor.values, dtype)));
            }
        }
        let stored = match dtype {
            AdapterDtype::F32 => StoredDtype::F32,
            AdapterDtype::Bf16 => StoredDtype::BF16,
        };
        let views = tensors
            .iter()
            .map(|(key, shape, bytes)| Ok((key, TensorView::new(stored, shape.to_vec(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        views
            .and_then(|views| safetensors::serialize(views, Some(format)))
            .map_err(|error| Failure::system("ADAPTER_WRITE", format!("The adapter cannot be encoded: {error}")))
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

/// Values in the wanted dtype, little-endian.
fn encoded(values: &[f32], dtype: AdapterDtype) -> Vec<u8> {
    match dtype {
        AdapterDtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        AdapterDtype::Bf16 => values
            .iter()
            .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
            .collect(),
    }
}

fn invalid(message: String) -> Failure {
    Failure::user("ADAPTER_INVALID", message).hint("Name the folder of a PEFT LoRA adapter trained for this base model")
}
