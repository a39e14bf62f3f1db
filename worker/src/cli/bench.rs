//! `brightrun bench`: whole training steps of a model without a checkpoint.

use std::cell::RefCell;
use std::path::Path;

use brightrun_kernels::Backend;
use brightrun_kernels::cuda::{Cuda, Mark};
use clap::Args;
use serde_json::json;

use super::device::{Chosen, on_device};
use super::output::{print_json, print_line};
use super::{OutputArguments, TrainFlags};
use crate::bench::{BenchEvent, BenchModel, BenchRequest, BenchStep, Meter, NoMeter, WARM_UP, bench, serve};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::model::ModelConfig;
use crate::plan::preset;

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// The name of a preset such as qwen3-next-80b-a3b, or a config.json, or a folder that holds one
    #[arg(long, value_name = "FILE|PRESET", default_value = "qwen3-next-80b-a3b")]
    pub model: String,
    /// Only the first N layers
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Tokens of a step, one measurement each
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1024,4096,16384")]
    pub tokens: Vec<usize>,
    /// Documents of equal length in a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub documents: usize,
    /// Steps before those; fewer than 3 leave planning and compiling in the times
    #[arg(long, value_name = "N", default_value_t = WARM_UP)]
    pub warm_up: usize,
    /// Steps that are measured, for each number of tokens
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub repetitions: usize,
    /// Measure when asked: reads numbers of steps from standard input, a line each, and answers with their milliseconds
    #[arg(long)]
    pub serve: bool,
    /// Settings of the run.
    #[command(flatten)]
    pub train: TrainFlags,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// Runs it on the backend that the settings name.
pub fn run(config: &Config, arguments: &BenchArguments) -> Result<()> {
    let mut model = ModelConfig::parse(&config_text(&arguments.model)?)?;
    if let Some(layers) = arguments.layers {
        model.layers = layers.clamp(1, model.layers);
    }
    let mut spec = config.train.clone();
    arguments.train.apply(&mut spec);
    let request = BenchRequest {
        config: model,
        spec,
        tokens: arguments.tokens.clone(),
        documents: arguments.documents,
        warm_up: arguments.warm_up,
        steps: arguments.repetitions,
    };
    if arguments.serve {
        return on_device!(config, |device| served(&device, &request));
    }
    match Chosen::by(config)? {
        Chosen::Cpu(device) => measured(&device, &NoMeter, &request, arguments.output.json),
        Chosen::Emulated(device) => measured(&device, &NoMeter, &request, arguments.output.json),
        Chosen::Cuda(device) => measured(&device, &Marks::of(&device), &request, arguments.output.json),
    }
}

fn served<B: Backend>(device: &B, request: &BenchRequest) -> Result<()> {
    let lines = std::io::stdin().lines().map_while(std::result::Result::ok);
    let mut counts = lines.filter_map(|line| line.trim().parse().ok());
    serve(device, request, &mut counts, &mut |milliseconds, loss| {
        print_json(&json!({ "device": device.name(), "milliseconds": milliseconds, "loss": loss }))
    })
}

/// The text of a `config.json` that is named, or of a preset.
fn config_text(named: &str) -> Result<String> {
    let path = Path::new(named);
    let file = if path.is_dir() {
        path.join("config.json")
    } else {
        path.to_owned()
    };
    if !file.is_file() {
        return preset(named).map(str::to_owned);
    }
    std::fs::read_to_string(&file).map_err(|error| {
        Failure::user(
            "MODEL_CONFIG_MISSING",
            format!("The model's config.json cannot be read: {error}"),
        )
        .at(file.display().to_string())
        .hint("Make the file readable, or give the name of a preset")
    })
}

fn measured<B: Backend>(device: &B, meter: &dyn Meter, request: &BenchRequest, as_json: bool) -> Result<()> {
    bench(device, meter, request, &mut |event| match (event, as_json) {
        (BenchEvent::Model(model), true) => print_json(&json!({ "device": device.name(), "model": model })),
        (BenchEvent::Model(model), false) => print_line(&model_text(device.name(), model)),
        (BenchEvent::Measuring(tokens), true) => print_json(&json!({ "measuring": tokens })),
        (BenchEvent::Measuring(_), false) => Ok(()),
        (BenchEvent::Step(step), true) => print_json(step),
        (BenchEvent::Step(step), false) => print_line(&text(step)),
    })
}

fn model_text(device: &str, model: &BenchModel) -> String {
    format!(
        "{} with {} layers on {device}: {:.1} GB of weights, {} trained values, made in {:.1} s",
        model.model_type,
        model.layers,
        model.weight_bytes as f64 / 1e9,
        model.trainable_parameters,
        model.build_seconds
    )
}

fn text(step: &BenchStep) -> String {
    let [median, fast, slow] = step.seconds;
    let told = |value: Option<String>| value.unwrap_or_else(|| "not told".to_owned());
    format!(
        "{:>6} tokens  {median:.3} s ({fast:.3} to {slow:.3})  {:.0} tokens/s  {:.1} TFLOP/s  tensors {:.2} GB  device {}  idle {}  {}",
        step.tokens,
        step.tokens_per_second,
        step.flops as f64 / median / 1e12,
        step.tensor_peak_bytes as f64 / 1e9,
        told(step.device_bytes.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9))),
        told(step.idle_share.map(|share| format!("{:.1} %", 100.0 * share))),
        if step.is_recorded { "replayed" } else { "op by op" },
    )
}

/// Marks in a CUDA device's queue.
struct Marks<'a> {
    device: &'a Cuda,
    first: RefCell<Option<Mark>>,
}

impl<'a> Marks<'a> {
    fn of(device: &'a Cuda) -> Self {
        Self {
            device,
            first: RefCell::new(None),
        }
    }
}

impl Meter for Marks<'_> {
    fn begin(&self) {
        let mut first = self.first.borrow_mut();
        if first.is_none() {
            // A device that cannot mark will say so in the ops that follow.
            *first = self.device.runtime().mark().ok();
        }
    }

    fn end(&self) -> Result<Option<f64>> {
        let Some(first) = self.first.borrow_mut().take() else {
            return Ok(None);
        };
        let last = self.device.runtime().mark()?;
        Ok(Some(f64::from(first.milliseconds_until(&last)?) / 1e3))
    }

    fn device_bytes(&self) -> Result<Option<u64>> {
        let (free, total) = self.device.runtime().free_and_total_bytes()?;
        Ok(Some(total - free))
    }
}
