//! `brightrun export`: a finished adapter, rewritten for another reader.

use std::path::PathBuf;

use brightrun_kernels::DType;
use brightrun_kernels::counting::{Counting, Habits};
use brightrun_kernels::cpu::Cpu;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::OutputArguments;
use super::output::{print_json, print_line, thousands};
use crate::artifact::input::BaseModel;
use crate::artifact::{
    AdapterConfig, AdapterDtype, AdapterLayout, CONFIG, ExpertLayout, WEIGHTS, tensors_in, write_adapter,
};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::model::{LoadOptions, LoraSet, ModelConfig};
use crate::plan::skeleton;
use crate::spec::BaseDtype;

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArguments {
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Checkpoint the adapter belongs to; only its config.json is read [setting: model.path]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// How routed experts lie in the files
    #[arg(long, value_enum, default_value_t = LayoutChoice::Stacked)]
    pub layout: LayoutChoice,
    /// Write bfloat16 instead of float32
    #[arg(long)]
    pub bf16: bool,
    /// Folder for the two files
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `--layout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayoutChoice {
    /// One pair of factors for all experts of a layer, as PEFT loads
    Stacked,
    /// A pair for each expert and projection, as vLLM loads
    PerExpert,
}

/// `brightrun export`.
pub fn run(config: &Config, arguments: &ExportArguments) -> Result<()> {
    let folder = super::model::model_folder(arguments.model.as_ref(), config)?;
    let model = ModelConfig::load(&folder)?;
    // The modules that the model has, without its weights.
    let empty = Counting::new(Habits::gpu());
    let options = LoadOptions::from(BaseDtype::Bf16);
    let modules = skeleton(&empty, model, options, DType::BF16, 1)?.modules().to_vec();
    // Rewriting files needs no GPU.
    let device = Cpu::new(config.worker.backend_threads())?;
    let lora = LoraSet::load(&device, &arguments.adapter, &modules)?;

    let dtype = if arguments.bf16 {
        AdapterDtype::Bf16
    } else {
        AdapterDtype::F32
    };
    let stacked = AdapterLayout::of(&lora, dtype);
    let (layout, experts) = match arguments.layout {
        LayoutChoice::Stacked => (stacked, ExpertLayout::Stacked),
        LayoutChoice::PerExpert => (stacked.per_expert(), ExpertLayout::PerExpert),
    };
    let tensors = tensors_in(&device, &lora, experts)?;
    let description = AdapterConfig::new(&layout, &base_of(arguments)?)?;
    std::fs::create_dir_all(&arguments.out).map_err(|error| crate::storage::disk_failure(&error, &arguments.out))?;
    write_adapter(&arguments.out, &description, &tensors, dtype)?;
    if arguments.output.json {
        return print_json(&json!({
            "adapter": arguments.out, "tensors": tensors.len(), "parameters": lora.parameters(),
            "files": [WEIGHTS, CONFIG],
        }));
    }
    print_line(&format!(
        "Adapter with {} tensors and {} parameters written to {}.",
        thousands(tensors.len() as u64),
        thousands(lora.parameters() as u64),
        arguments.out.display()
    ))
}

/// The base model that the adapter's own description names.
fn base_of(arguments: &ExportArguments) -> Result<BaseModel> {
    let path = arguments.adapter.join(CONFIG);
    let invalid = |why: String| {
        Failure::user("ADAPTER_INVALID", format!("The adapter's config cannot be read: {why}"))
            .at(path.display().to_string())
            .hint("Name the folder of a PEFT LoRA adapter trained for this base model")
    };
    let text = std::fs::read_to_string(&path).map_err(|error| invalid(error.to_string()))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    let field = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    Ok(BaseModel {
        id: field("base_model_name_or_path").unwrap_or_default(),
        revision: field("revision"),
        config_sha256: String::new(),
        checkpoint_fingerprint: String::new(),
    })
}
