//! A model against transformers, PEFT and torch.

use std::collections::HashMap;
use std::path::Path;

use brightrun_kernels::Backend;
use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::cuda::cuda;
use brightrun_kernels::emu::emulated;
use brightrun_kernels::ops::Precision;
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
use crate::twin;
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

struct Case<'a, B: Backend> {
    folder: &'a Path,
    device: B,
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

/// What a quantity was computed to be, and how it is compared.
struct Measured {
    quantity: String,
    got: Vec<f32>,
    expected: Vec<f32>,
    distance: fn(&[f32], &[f32]) -> f64,
    bound: f64,
}

impl Measured {
    fn logits(quantity: &str, got: Vec<f32>, expected: Vec<f32>, bound: f64) -> Self {
        Self {
            quantity: quantity.to_owned(),
            got,
            expected,
            distance: relative_to_largest,
            bound,
        }
    }

    fn error(&self) -> f64 {
        (self.distance)(&self.got, &self.expected)
    }

    /// How far apart this and its twins lie: the nearest of them before any training, since a twin in which a token changes its
    /// experts says nothing of the rest; the middle one after it, since no two trainings part alike.
    fn apart(&self, twins: &[&Self]) -> f64 {
        let apart = |twin: &&Self| (self.distance)(&twin.got, &self.got).max((self.distance)(&self.got, &twin.got));
        let mut all: Vec<f64> = twins.iter().map(apart).collect();
        all.sort_by(f64::total_cmp);
        let is_trained = self.quantity.contains("step") || self.quantity.starts_with("adapter_final");
        let place = if is_trained { all.len() / 2 } else { 0 };
        all.get(place).copied().unwrap_or(0.0)
    }
}

/// Errors against bounds. With twins, two right computations may lie as far apart as twins do, each on its own side; and what
/// training once threw apart stays apart, so that a step's bound is no less than that of the same number a step before.
fn judged(measured: Vec<Measured>, twins: &[Vec<Measured>]) -> Vec<Check> {
    let mut widest: HashMap<String, f64> = HashMap::new();
    let judge = |(place, one): (usize, Measured)| {
        let twins: Vec<&Measured> = twins.iter().filter_map(|twin| twin.get(place)).collect();
        let mut apart = one.apart(&twins);
        if let Some((number, _)) = one.quantity.split_once(" of step ") {
            let before = widest.entry(number.to_owned()).or_default();
            apart = apart.max(*before);
            *before = apart;
        }
        Check::new(&one.quantity, one.error(), one.bound.max(2.0 * apart))
    };
    measured.into_iter().enumerate().map(judge).collect()
}

/// Which backend computes: `cpu` (without the variable), `emulated` or `cuda`.
const DEVICE: &str = "BRIGHTRUN_GOLDEN_DEVICE";

fn checks(folder: &Path) -> Result<Vec<Check>, Failure> {
    match std::env::var(DEVICE).as_deref() {
        Err(_) | Ok("cpu") => checks_on(folder, Cpu::new(None)?),
        Ok("emulated") => checks_on(folder, emulated(None)?),
        Ok("cuda") => checks_on(folder, cuda(0)?),
        Ok(other) => Err(broken(format!("{DEVICE} names no backend: {other}"))),
    }
}

fn checks_on<B: Backend>(folder: &Path, device: B) -> Result<Vec<Check>, Failure> {
    let (case, model) = case_and_model(folder, device)?;
    let mut measured = case.measured(&model)?;
    let mut twins = Vec::new();
    if model.config().delta.is_some() {
        for seed in twin::SEEDS {
            let twin = twin::write(&folder.join("model"), case.bounds.one_sum(), seed)?;
            let twin = Model::load(&case.device, twin.path(), case.options, &mut |_| {})?;
            twins.push(case.measured(&twin)?);
        }
    }
    if case.tensors.tensors().contains_key("base.nf4_logits") {
        measured.extend(case.quantised()?);
    }
    let mut checks = judged(measured, &twins);
    if case.settings.rank.is_some() {
        checks.extend(case.exact(&model)?);
    }
    Ok(checks)
}

/// Loads the model as the peer held it. The peers' cases come in two kinds: made by a model loaded in float32, or by one that
/// was cast to bfloat16 as a whole and back, which leaves its rotary frequencies rounded to bfloat16 (checked with transformers
/// itself: so rounded, it gives the recorded logits bit for bit). Nothing in a case says which; its base logits do: the nearer
/// ones are right. Everything else must then agree under the same choice.
fn case_and_model<B: Backend>(folder: &Path, device: B) -> Result<(Case<'_, B>, Model<B>), Failure> {
    let options = |rope_frequencies| LoadOptions {
        encoding: Encoding::Stored,
        precision: Precision::F32,
        rope_frequencies,
    };
    let load = |device: &B, frequencies| Model::load(device, &folder.join("model"), options(frequencies), &mut |_| {});
    let exact = load(&device, RopeFrequencies::F32)?;
    let mut case = Case::read(folder, device, &exact)?;
    let rounded = load(&case.device, RopeFrequencies::Bf16)?;
    let error = |model: &Model<B>| Ok::<_, Failure>(case.logits("base.logits", model, None)?.error());
    let rounded_is_nearer = error(&rounded)? < error(&exact)?;
    case.options = options(match rounded_is_nearer {
        true => RopeFrequencies::Bf16,
        false => RopeFrequencies::F32,
    });
    Ok((case, if rounded_is_nearer { rounded } else { exact }))
}

impl<'a, B: Backend> Case<'a, B> {
    fn read(folder: &'a Path, device: B, model: &Model<B>) -> Result<Self, Failure> {
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

    fn all_logits(&self, model: &Model<B>, lora: Option<&LoraSet<B>>) -> Result<Vec<f32>, Failure> {
        let mut logits = Vec::new();
        for batch in self.separate() {
            logits.extend(model.logits(lora, &batch)?);
        }
        Ok(logits)
    }

    fn logits(&self, name: &str, model: &Model<B>, lora: Option<&LoraSet<B>>) -> Result<Measured, Failure> {
        let (got, expected) = (self.all_logits(model, lora)?, self.expected(name)?);
        Ok(Measured::logits(name, got, expected, self.bounds.forward()))
    }

    /// Everything that a model of this case computes, in an order that does not depend on the model.
    fn measured(&self, model: &Model<B>) -> Result<Vec<Measured>, Failure> {
        let mut list = vec![self.logits("base.logits", model, None)?];
        if self.settings.rank.is_some() {
            list.extend(self.adapted(model)?);
        }
        Ok(list)
    }

    /// Our codes and scales, decoded as the peer decoded them, give the peer's logits; and a model that holds NF4 gives the logits
    /// of its own decoded values.
    fn quantised(&self) -> Result<Vec<Measured>, Failure> {
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
        Ok(vec![
            peer,
            Measured::logits("nf4-used-directly", direct, decoded, self.bounds.forward()),
        ])
    }

    fn adapted(&self, model: &Model<B>) -> Result<Vec<Measured>, Failure> {
        let lora = LoraSet::load(&self.device, &self.folder.join("adapter_init"), model.modules())?;
        let mut list = vec![
            self.logits("lora.logits", model, Some(&lora))?,
            self.token_losses(model, &lora)?,
        ];
        list.extend(self.gradients(model, &lora)?);
        list.extend(self.training(model, lora)?);
        Ok(list)
    }

    /// What is held to its bound whatever the model does with errors: packing, coverage, the schedule.
    fn exact(&self, model: &Model<B>) -> Result<Vec<Check>, Failure> {
        let lora = LoraSet::load(&self.device, &self.folder.join("adapter_init"), model.modules())?;
        let named = self.tensors.tensors().keys().filter(|name| name.starts_with("grad."));
        let uncovered = named.count() as f64 - 2.0 * lora.pairs().len() as f64;
        let mut checks = vec![
            self.packed_is_separate(model, &lora)?,
            Check::new("gradients-not-compared", uncovered.abs(), 0.0),
        ];
        let hyper = self.hyper()?;
        let rate = LearningRate::new(&spec(hyper)?, hyper.steps);
        for (step, expected) in self.settings.learning_rates.iter().enumerate() {
            let error = relative(rate.at(step), *expected);
            checks.push(Check::new(
                format!("learning_rate of step {step}"),
                error,
                FLOAT32_EPSILON,
            ));
        }
        Ok(checks)
    }

    fn hyper(&self) -> Result<&Hyper, Failure> {
        self.settings
            .hyper
            .as_ref()
            .ok_or_else(|| broken("no `hyper`".to_owned()))
    }

    /// The last position of a sequence predicts nothing and has no loss in the peer's `[N, T − 1]`.
    fn token_losses(&self, model: &Model<B>, lora: &LoraSet<B>) -> Result<Measured, Failure> {
        let mut got = Vec::new();
        for batch in self.separate() {
            let losses = model.forward_losses(Some(lora), &batch)?;
            got.extend_from_slice(&losses[..losses.len() - 1]);
        }
        let expected = self.expected("lora.token_loss")?;
        Ok(Measured::logits(
            "lora.token_loss",
            got,
            expected,
            self.bounds.forward(),
        ))
    }

    /// Both sequences in one row give the logits that each gives alone.
    fn packed_is_separate(&self, model: &Model<B>, lora: &LoraSet<B>) -> Result<Check, Failure> {
        let alone = self.all_logits(model, Some(lora))?;
        let together = model.logits(Some(lora), &self.packed())?;
        Ok(Check::new(
            "packed",
            relative_to_largest(&together, &alone),
            self.bounds.forward(),
        ))
    }

    /// The gradient of the mean loss over both sequences, packed into one row.
    fn gradients(&self, model: &Model<B>, lora: &LoraSet<B>) -> Result<Vec<Measured>, Failure> {
        let batch = self.packed();
        let settings = BackwardSettings {
            gradient_scale: 1.0 / batch.supervised_tokens() as f32,
            activation_budget_bytes: u64::MAX,
        };
        let mut gradients = LoraGradients::zeros(&self.device, lora)?;
        model.forward_backward(lora, &mut gradients, &batch, settings)?;
        let mut list = Vec::new();
        for (pair, (a, b)) in lora.pairs().iter().zip(gradients.pairs()) {
            let gradients = pair
                .layout()
                .to_peft(self.device.read_f32(a)?, self.device.read_f32(b)?);
            for gradient in gradients {
                let expected = self.expected(&format!("grad.{}", gradient.key))?;
                let quantity = format!("grad of {}", gradient.key);
                list.push(Measured::logits(
                    &quantity,
                    gradient.values,
                    expected,
                    self.bounds.backward(),
                ));
            }
        }
        Ok(list)
    }

    /// The optimizer steps, through the very code that trains.
    fn training(&self, model: &Model<B>, mut lora: LoraSet<B>) -> Result<Vec<Measured>, Failure> {
        let hyper = self.hyper()?;
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
        let number = |quantity: String, got: f64, expected: f64, bound: f64| Measured {
            quantity,
            got: vec![got as f32],
            expected: vec![expected as f32],
            distance: relative_norm,
            bound,
        };
        let mut list = Vec::new();
        let mut trainer = Trainer::new(model, &mut lora, &spec)?;
        for step in 0..hyper.steps {
            let outcome = trainer
                .step(&examples, step, rate.at(step), &mut || true)?
                .ok_or_else(|| broken("the step stopped by itself".to_owned()))?;
            let bound = self.bounds.after_steps(step);
            let (loss, norm) = (self.settings.losses[step], self.settings.grad_norms[step]);
            list.push(number(format!("loss of step {step}"), outcome.loss, loss, bound));
            list.push(number(
                format!("grad_norm of step {step}"),
                outcome.gradient_norm,
                norm,
                bound,
            ));
        }
        let losses = model.forward_losses(Some(&lora), &self.packed())?;
        let mean = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / self.packed().supervised_tokens() as f64;
        let bound = self.bounds.after_steps(hyper.steps);
        let last = self.settings.losses[hyper.steps];
        list.push(number("loss after the last step".to_owned(), mean, last, bound));
        list.extend(self.final_adapter(model, &lora)?);
        Ok(list)
    }

    /// The trained factors, as they would be saved, by how far they moved.
    fn final_adapter(&self, model: &Model<B>, lora: &LoraSet<B>) -> Result<Vec<Measured>, Failure> {
        let first = LoraSet::load(&self.device, &self.folder.join("adapter_init"), model.modules())?;
        let last = TensorFile::open(&self.folder.join("adapter_final/adapter_model.safetensors"))?;
        let saved = tempfile::NamedTempFile::new().map_err(|error| broken(error.to_string()))?;
        std::fs::write(saved.path(), lora.to_safetensors(&self.device, AdapterDtype::F32)?)
            .map_err(|error| broken(error.to_string()))?;
        let saved = TensorFile::open(saved.path())?;
        let mut list = Vec::new();
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
                list.push(Measured {
                    quantity: format!("adapter_final {key}"),
                    got: got.clone(),
                    expected: expected.clone(),
                    distance: relative_norm,
                    bound: self.bounds.movement(),
                });
                list.push(Measured {
                    quantity: format!("adapter_final-median {key}"),
                    got,
                    expected,
                    distance: relative_median,
                    bound: self.bounds.median_movement(),
                });
            }
        }
        Ok(list)
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
