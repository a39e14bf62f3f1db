//! A model against transformers, PEFT and torch.

use std::path::Path;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::{Device, Precision};
use brightrun_worker::error::Failure;
use brightrun_worker::model::adapter::AdapterDtype;
use brightrun_worker::model::tensor_file::TensorFile;
use brightrun_worker::model::{
    BackwardSettings, Batch, Encoding, LoadOptions, LoraGradients, LoraSet, Model, RopeFrequencies,
};
use brightrun_worker::spec::{BaseDtype, Schedule, TrainSpec};
use brightrun_worker::train::EncodedExample;
use brightrun_worker::train::schedule::LearningRate;
use brightrun_worker::train::step::Trainer;
use serde::Deserialize;

use crate::bounds::{Bounds, relative, relative_median, relative_norm, relative_to_largest};
use crate::round_trip::{self, Decoding};
use crate::{CaseResult, Check};

/// The loss and the schedule are computed in float64 on one side and float32 on the other.
const FLOAT32_EPSILON: f64 = f32::EPSILON as f64;

#[derive(Deserialize)]
struct Expected {
    rank: Option<usize>,
    #[serde(default)]
    nf4_suffixes: Vec<String>,
    hyper: Option<Hyper>,
    #[serde(default)]
    losses: Vec<f64>,
    #[serde(default)]
    grad_norms: Vec<f64>,
    #[serde(default)]
    learning_rates: Vec<f64>,
}

#[derive(Deserialize)]
struct Hyper {
    learning_rate: f32,
    betas: [f32; 2],
    eps: f32,
    weight_decay: f32,
    max_grad_norm: f32,
    steps: usize,
    warmup_steps: usize,
    schedule: String,
}

struct Case<'a> {
    folder: &'a Path,
    device: Cpu,
    settings: Expected,
    tensors: TensorFile,
    examples: Vec<EncodedExample>,
    bounds: Bounds,
    options: LoadOptions,
}

/// Runs the case in a folder with `model/`, `expected.json` and `expected.safetensors`.
pub fn run(folder: &Path) -> CaseResult {
    checks(folder).map_err(|failure| failure.to_string())
}

fn checks(folder: &Path) -> Result<Vec<Check>, Failure> {
    let device = Cpu::new(None)?;
    let (case, model) = case_and_model(folder, device)?;
    let mut checks = vec![case.logits("base.logits", &model, None)?];
    if case.tensors.tensors().contains_key("base.nf4_logits") {
        checks.extend(case.quantised()?);
    }
    if case.settings.rank.is_some() {
        checks.extend(case.adapted(&model)?);
    }
    Ok(checks)
}

/// Loads the model as the peer held it. The peers' cases come in two kinds: made by a model loaded in float32, or by one that
/// was cast to bfloat16 as a whole and back, which leaves its rotary frequencies rounded to bfloat16 (checked with transformers
/// itself: so rounded, it gives the recorded logits bit for bit). Nothing in a case says which; its base logits do. Everything
/// else must then agree under the same choice.
fn case_and_model(folder: &Path, device: Cpu) -> Result<(Case<'_>, Model<Cpu>), Failure> {
    let options = |rope_frequencies| LoadOptions {
        encoding: Encoding::Stored,
        precision: Precision::F32,
        rope_frequencies,
    };
    let exact = Model::load(
        &device,
        &folder.join("model"),
        options(RopeFrequencies::F32),
        &mut |_| {},
    )?;
    let mut case = Case::read(folder, device, &exact)?;
    if case.logits("base.logits", &exact, None)?.holds() {
        return Ok((case, exact));
    }
    case.options = options(RopeFrequencies::Bf16);
    let model = Model::load(&case.device, &folder.join("model"), case.options, &mut |_| {})?;
    Ok((case, model))
}

impl<'a> Case<'a> {
    fn read(folder: &'a Path, device: Cpu, model: &Model<Cpu>) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(folder.join("expected.json")).map_err(|error| broken(error.to_string()))?;
        let settings = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
        let tensors = TensorFile::open(&folder.join("expected.safetensors"))?;
        let examples = examples(&tensors)?;
        let config = model.config();
        let tokens: usize = examples.iter().map(|example| example.ids.len()).sum();
        let widths = [
            config.hidden,
            config.intermediate,
            config.heads * config.head_dim,
            tokens,
        ];
        Ok(Self {
            folder,
            device,
            settings,
            tensors,
            examples,
            bounds: Bounds::new(config.layers, widths.into_iter().max().unwrap_or(1)),
            options: LoadOptions::from(BaseDtype::F32),
        })
    }

    fn expected(&self, name: &str) -> Result<Vec<f32>, Failure> {
        self.tensors.read(name)?.to_f32()
    }

    fn separate(&self) -> impl Iterator<Item = Batch> + '_ {
        self.examples
            .iter()
            .map(|example| Batch::pack([(example.ids.as_slice(), example.supervised.as_slice())]))
    }

    fn packed(&self) -> Batch {
        brightrun_worker::train::step::packed(&self.examples)
    }

    fn all_logits(&self, model: &Model<Cpu>, lora: Option<&LoraSet<Cpu>>) -> Result<Vec<f32>, Failure> {
        let mut logits = Vec::new();
        for batch in self.separate() {
            logits.extend(model.logits(lora, &batch)?);
        }
        Ok(logits)
    }

    fn logits(&self, name: &str, model: &Model<Cpu>, lora: Option<&LoraSet<Cpu>>) -> Result<Check, Failure> {
        let got = self.all_logits(model, lora)?;
        Ok(Check::new(
            name,
            relative_to_largest(&got, &self.expected(name)?),
            self.bounds.forward(),
        ))
    }

    /// Our codes and scales, decoded as the peer decoded them, give the peer's logits; and a model that holds NF4 gives the logits
    /// of its own decoded values.
    fn quantised(&self) -> Result<Vec<Check>, Failure> {
        let source = self.folder.join("model");
        let as_peer = round_trip::write(&self.device, &source, &self.settings.nf4_suffixes, Decoding::Peer)?;
        let as_ours = round_trip::write(&self.device, &source, &self.settings.nf4_suffixes, Decoding::Ours)?;
        let load = |folder: &Path, encoding| {
            let options = LoadOptions {
                encoding,
                ..self.options
            };
            Model::load(&self.device, folder, options, &mut |_| {})
        };
        let peer = self.logits("base.nf4_logits", &load(as_peer.path(), Encoding::Stored)?, None)?;
        let direct = self.all_logits(&load(&source, Encoding::Nf4)?, None)?;
        let decoded = self.all_logits(&load(as_ours.path(), Encoding::Stored)?, None)?;
        let error = relative_to_largest(&direct, &decoded);
        Ok(vec![
            peer,
            Check::new("nf4-used-directly", error, self.bounds.forward()),
        ])
    }

    fn adapted(&self, model: &Model<Cpu>) -> Result<Vec<Check>, Failure> {
        let lora = LoraSet::load(&self.device, &self.folder.join("adapter_init"), model.modules())?;
        let mut checks = vec![
            self.logits("lora.logits", model, Some(&lora))?,
            self.token_losses(model, &lora)?,
            self.packed_is_separate(model, &lora)?,
        ];
        checks.extend(self.gradients(model, &lora)?);
        checks.extend(self.training(model, lora)?);
        Ok(checks)
    }

    /// The last position of a sequence predicts nothing and has no loss in the peer's `[N, T − 1]`.
    fn token_losses(&self, model: &Model<Cpu>, lora: &LoraSet<Cpu>) -> Result<Check, Failure> {
        let mut got = Vec::new();
        for batch in self.separate() {
            let losses = model.forward_losses(Some(lora), &batch)?;
            got.extend_from_slice(&losses[..losses.len() - 1]);
        }
        let expected = self.expected("lora.token_loss")?;
        Ok(Check::new(
            "lora.token_loss",
            relative_to_largest(&got, &expected),
            self.bounds.forward(),
        ))
    }

    /// Both sequences in one row give the logits that each gives alone.
    fn packed_is_separate(&self, model: &Model<Cpu>, lora: &LoraSet<Cpu>) -> Result<Check, Failure> {
        let alone = self.all_logits(model, Some(lora))?;
        let together = model.logits(Some(lora), &self.packed())?;
        Ok(Check::new(
            "packed",
            relative_to_largest(&together, &alone),
            self.bounds.forward(),
        ))
    }

    /// The gradient of the mean loss over both sequences, packed into one row.
    fn gradients(&self, model: &Model<Cpu>, lora: &LoraSet<Cpu>) -> Result<Vec<Check>, Failure> {
        let batch = self.packed();
        let settings = BackwardSettings {
            gradient_scale: 1.0 / batch.supervised_tokens() as f32,
            activation_budget_bytes: u64::MAX,
        };
        let mut gradients = LoraGradients::zeros(&self.device, lora)?;
        model.forward_backward(lora, &mut gradients, &batch, settings)?;
        let mut checks = Vec::new();
        for (pair, (a, b)) in lora.pairs().iter().zip(gradients.pairs()) {
            let gradients = pair
                .layout()
                .to_peft(self.device.read_f32(a)?, self.device.read_f32(b)?);
            for gradient in gradients {
                let key = gradient.key;
                let expected = self.expected(&format!("grad.{key}"))?;
                let error = relative_to_largest(&gradient.values, &expected);
                checks.push(Check::new(format!("grad of {key}"), error, self.bounds.backward()));
            }
        }
        let named = self
            .tensors
            .tensors()
            .keys()
            .filter(|name| name.starts_with("grad."))
            .count();
        let uncovered = named as f64 - checks.len() as f64;
        checks.push(Check::new("gradients-not-compared", uncovered.abs(), 0.0));
        Ok(checks)
    }

    /// The optimizer steps, through the very code that trains.
    fn training(&self, model: &Model<Cpu>, mut lora: LoraSet<Cpu>) -> Result<Vec<Check>, Failure> {
        let hyper = self
            .settings
            .hyper
            .as_ref()
            .ok_or_else(|| broken("no `hyper`".to_owned()))?;
        let spec = spec(hyper)?;
        let rate = LearningRate::new(&spec, hyper.steps);
        let examples: Vec<&EncodedExample> = self.examples.iter().collect();
        let counts = [
            self.settings.losses.len(),
            self.settings.grad_norms.len() + 1,
            self.settings.learning_rates.len() + 1,
        ];
        if counts != [hyper.steps + 1; 3] {
            return Err(broken(format!(
                "{} steps need other numbers of values than {counts:?}",
                hyper.steps
            )));
        }
        let mut checks = Vec::new();
        let mut trainer = Trainer::new(model, &mut lora, &spec)?;
        for step in 0..hyper.steps {
            let learning_rate = rate.at(step);
            let outcome = trainer
                .step(&examples, step, learning_rate, &mut || true)?
                .ok_or_else(|| broken("the step stopped by itself".to_owned()))?;
            let bound = self.bounds.after_steps(step);
            let loss = relative(outcome.loss, self.settings.losses[step]);
            let norm = relative(outcome.gradient_norm, self.settings.grad_norms[step]);
            let rate = relative(learning_rate, self.settings.learning_rates[step]);
            checks.push(Check::new(format!("loss of step {step}"), loss, bound));
            checks.push(Check::new(format!("grad_norm of step {step}"), norm, bound));
            checks.push(Check::new(
                format!("learning_rate of step {step}"),
                rate,
                FLOAT32_EPSILON,
            ));
        }
        let losses = model.forward_losses(Some(&lora), &self.packed())?;
        let mean = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / self.packed().supervised_tokens() as f64;
        let bound = self.bounds.after_steps(hyper.steps);
        checks.push(Check::new(
            "loss after the last step",
            relative(mean, self.settings.losses[hyper.steps]),
            bound,
        ));
        checks.extend(self.final_adapter(model, &lora)?);
        Ok(checks)
    }

    /// The trained factors, as they would be saved, by how far they moved.
    fn final_adapter(&self, model: &Model<Cpu>, lora: &LoraSet<Cpu>) -> Result<Vec<Check>, Failure> {
        let first = LoraSet::load(&self.device, &self.folder.join("adapter_init"), model.modules())?;
        let last = TensorFile::open(&self.folder.join("adapter_final/adapter_model.safetensors"))?;
        let saved = tempfile::NamedTempFile::new().map_err(|error| broken(error.to_string()))?;
        std::fs::write(saved.path(), lora.to_safetensors(&self.device, AdapterDtype::F32)?)
            .map_err(|error| broken(error.to_string()))?;
        let saved = TensorFile::open(saved.path())?;
        let mut checks = Vec::new();
        for pair in first.pairs() {
            for factor in pair.to_peft(&self.device)? {
                let key = factor.key;
                let moved = |end: Vec<f32>| {
                    end.iter()
                        .zip(&factor.values)
                        .map(|(end, start)| end - start)
                        .collect::<Vec<f32>>()
                };
                let (got, expected) = (moved(saved.read(&key)?.to_f32()?), moved(last.read(&key)?.to_f32()?));
                let (norm, median) = (relative_norm(&got, &expected), relative_median(&got, &expected));
                checks.push(Check::new(format!("adapter_final {key}"), norm, self.bounds.movement()));
                checks.push(Check::new(
                    format!("adapter_final-median {key}"),
                    median,
                    self.bounds.median_movement(),
                ));
            }
        }
        Ok(checks)
    }
}

fn spec(hyper: &Hyper) -> Result<TrainSpec, Failure> {
    let schedule = match hyper.schedule.split(' ').next() {
        Some("cosine") => Schedule::Cosine,
        Some("linear") => Schedule::Linear,
        Some("constant") => Schedule::Constant,
        _ => return Err(broken(format!("unknown schedule `{}`", hyper.schedule))),
    };
    Ok(TrainSpec {
        learning_rate: hyper.learning_rate,
        schedule,
        warmup_steps: Some(hyper.warmup_steps),
        beta1: hyper.betas[0],
        beta2: hyper.betas[1],
        epsilon: hyper.eps,
        weight_decay: hyper.weight_decay,
        max_gradient_norm: hyper.max_grad_norm,
        ..TrainSpec::default()
    })
}

/// `input_ids` and `labels` `[N, T]` as examples: a label that is not −100 marks its own token as learnt.
fn examples(tensors: &TensorFile) -> Result<Vec<EncodedExample>, Failure> {
    let integers = |name: &str| -> Result<(Vec<usize>, Vec<i32>), Failure> {
        let host = tensors.read(name)?;
        Ok((host.shape, bytemuck::allocation::pod_collect_to_vec(&host.bytes)))
    };
    let (shape, ids) = integers("input_ids")?;
    let labels = match tensors.tensors().contains_key("labels") {
        true => integers("labels")?.1,
        false => ids.clone(),
    };
    let length = *shape
        .last()
        .ok_or_else(|| broken("input_ids has no extents".to_owned()))?;
    Ok(ids
        .chunks(length)
        .zip(labels.chunks(length))
        .zip(1..)
        .map(|((ids, labels), line)| EncodedExample {
            ids: ids.to_vec(),
            supervised: labels.iter().map(|label| *label != -100).collect(),
            line,
        })
        .collect())
}

fn broken(message: String) -> Failure {
    Failure::user("GOLDEN_CASE", format!("The case itself cannot be read: {message}"))
}
