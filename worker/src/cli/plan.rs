//! `brightrun plan`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::output::{print_json, print_line};
use super::{OutputArguments, TrainFlags};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::model::ModelConfig;
use crate::plan::{Gpu, Question, plan, preset, stored_dtype, text};

/// `plan`.
#[derive(Debug, Args)]
pub struct PlanArguments {
    /// Checkpoint folder, or the name of a preset such as qwen3-next-80b-a3b; a bare config.json goes to --config
    #[arg(long, value_name = "DIR|PRESET")]
    pub model: Option<PathBuf>,
    /// The card, such as H200, A100 or L40S
    #[arg(long, value_name = "NAME", default_value = "H200")]
    pub gpu: String,
    /// Tokens of each sequence [default: --max-length]
    #[arg(long, value_name = "N")]
    pub sequence_length: Option<usize>,
    /// Sequences of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub micro_batch: usize,
    /// Tokens of the data set, for time and cost
    #[arg(long, value_name = "N")]
    pub dataset_tokens: Option<u64>,
    /// Price of an hour in dollars [default: an example]
    #[arg(long, value_name = "X")]
    pub price_per_hour: Option<f64>,
    /// Settings of the run.
    #[command(flatten)]
    pub train: TrainFlags,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// Whether a `--config` file is a model's configuration, which is JSON, and not this program's, which is TOML: no TOML document
/// begins with a brace.
pub fn is_model_config(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.trim_start().starts_with('{'))
}

/// `brightrun plan`; `model_config` is a bare config.json.
pub fn run(config: &Config, model_config: Option<&Path>, arguments: &PlanArguments) -> Result<()> {
    let (text_of_config, place) = source(config, model_config, arguments.model.as_deref())?;
    let model = ModelConfig::parse(&text_of_config).map_err(|failure| failure.at(place))?;
    let mut spec = config.train.clone();
    arguments.train.apply(&mut spec);
    let question = Question {
        stored: stored_dtype(&text_of_config),
        sequence_length: arguments
            .sequence_length
            .unwrap_or(spec.max_length)
            .min(model.max_positions),
        micro_batch: arguments.micro_batch,
        gpu: Gpu::named(&arguments.gpu)?,
        dataset_tokens: arguments.dataset_tokens,
        price_per_hour: arguments.price_per_hour,
        config: model,
        spec,
    };
    let planned = plan(&question)?;
    if arguments.output.json {
        return print_json(&planned);
    }
    print_line(text(&planned).trim_end())
}

/// The text of the model's `config.json` and where it lies.
fn source(config: &Config, model_config: Option<&Path>, model: Option<&Path>) -> Result<(String, String)> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::user(
                "MODEL_CONFIG_MISSING",
                format!("The model's config.json cannot be read: {error}"),
            )
            .at(path.display().to_string())
            .hint("Give a checkpoint folder with --model, a config.json with --config, or the name of a preset")
        })?;
        Ok((text, path.display().to_string()))
    };
    if let Some(path) = model_config {
        return read(path);
    }
    let Some(model) = model.map(Path::to_owned).or_else(|| config.model.path.clone()) else {
        return Err(Failure::user("MODEL_PATH_UNSET", "No model is named")
            .hint("Give a checkpoint folder or the name of a preset with --model, or a config.json with --config"));
    };
    if model.is_dir() {
        return read(&model.join("config.json"));
    }
    let name = model.to_string_lossy();
    Ok((preset(&name)?.to_owned(), format!("preset {name}")))
}
