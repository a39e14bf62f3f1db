//! A whole training step measured without a checkpoint.
//!
//! The model has the shapes of a configuration and random contents that the device makes ([`Contents::Random`]): 40 GB of codes take it
//! as long as writing them, and the host holds none of it. No matrix is like another, weights are of the size of trained ones, and routers
//! choose as unevenly. A step is all of one: the batch's copies, forward,
//! computing again, backward, norm, clipping and update, as [`Trainer`] does it.
//!
//! Time is the host's clock around whole steps, which end with a copy from the device. Of that the device was idle as long as it
//! was not between the beginning of the first micro-batch and the end of the update, where the backend can tell ([`Meter`]): the
//! device waiting for the host. Gaps between kernels within are not seen so; [`BenchEvent::Measuring`] says when measured steps begin,
//! for whoever samples the device's own counter of busy time beside this.
//!
//! Memory is what the device says is in use after the steps, by all its users: the pool and the arena give nothing back until the end,
//! so this is the peak. What was in use before the model is told too. Operations are counted by the planner's own step
//! ([`footprint`]): what this program does, recomputation included, and nothing else.

mod meter;

use std::time::Instant;

use brightrun_kernels::counting::Habits;
use brightrun_kernels::{Backend, DType};
use serde::Serialize;

pub use self::meter::{Meter, NoMeter};
use crate::error::{Failure, Result};
use crate::model::random::CounterRandom;
use crate::model::{ExpertLoads, LoadOptions, LoraConfig, LoraSet, Model, ModelConfig, RoutingBalance};
use crate::plan::{Contents, Footprint, Shape, footprint, skeleton_with};
use crate::spec::TrainSpec;
use crate::train::EncodedExample;
use crate::train::step::{Trainer, packed};

/// Steps that need not be measured: the first plans memory and compiles kernels, the second records.
pub const WARM_UP: usize = 3;

/// What is measured.
#[derive(Clone, Debug)]
pub struct BenchRequest {
    /// The model's numbers.
    pub config: ModelConfig,
    /// Adapter, optimizer, precision of the frozen weights.
    pub spec: TrainSpec,
    /// Tokens of a micro-batch, one measurement each.
    pub tokens: Vec<usize>,
    /// Documents of equal length in it.
    pub documents: usize,
    /// Steps before those that are measured; [`WARM_UP`] or more for times, 0 where memory is what is asked.
    pub warm_up: usize,
    /// Steps that are measured.
    pub steps: usize,
}

/// What happens, in this order.
#[derive(Clone, Debug)]
pub enum BenchEvent<'a> {
    /// The model was built.
    Model(&'a BenchModel),
    /// Steps of so many tokens have warmed up, and those that count begin.
    Measuring(usize),
    /// They are done.
    Step(&'a BenchStep),
}

/// The model as it was built.
#[derive(Clone, Debug, Serialize)]
pub struct BenchModel {
    /// `qwen3_next` and so on.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Bytes of the frozen weights.
    pub weight_bytes: u64,
    /// Trained values.
    pub trainable_parameters: usize,
    /// Seconds it took to make.
    pub build_seconds: f64,
    /// Bytes of the device's memory in use before it, by all its users.
    pub device_bytes_before: Option<u64>,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct BenchStep {
    /// Tokens of the step.
    pub tokens: usize,
    /// Its documents.
    pub documents: usize,
    /// Seconds of a step: median, and the 10th and 90th of a hundred.
    pub seconds: [f64; 3],
    /// Steps measured.
    pub steps: usize,
    /// By the median.
    pub tokens_per_second: f64,
    /// Seconds of the first step, which compiles, plans and fills caches.
    pub first_step_seconds: f64,
    /// Operations of matrix products of a step, as counted.
    pub flops: u64,
    /// The most bytes that a step was planned to take.
    pub planned_bytes: u64,
    /// Whether the micro-batch was replayed from a recording.
    pub is_recorded: bool,
    /// The most bytes of tensors at once.
    pub tensor_peak_bytes: u64,
    /// Bytes of the device's memory in use after the steps, by all its users, as the device counts them.
    pub device_bytes: Option<u64>,
    /// Share of the steps' time in which the device had nothing to do.
    pub idle_share: Option<f64>,
    /// The loss of the last step.
    pub loss: f64,
    /// How the routers spread the tokens.
    pub routing: Option<RoutingBalance>,
}

/// Measures steps of a model that is made on `device`. `on_event` gets each measurement as soon as it is there: a later one may
/// not fit the device.
///
/// # Errors
/// `SPEC_OUT_OF_RANGE`, `BENCH_OUT_OF_RANGE`, `BENCH_MEMORY`; the backend's own.
pub fn bench<B: Backend>(
    device: &B,
    meter: &dyn Meter,
    request: &BenchRequest,
    on_event: &mut dyn FnMut(BenchEvent<'_>) -> Result<()>,
) -> Result<()> {
    request.check()?;
    request.check_room(meter)?;
    let device_bytes_before = meter.device_bytes()?;
    let begun = Instant::now();
    let model = request.model(device)?;
    let mut lora = request.lora(&model)?;
    device.read(&lora.pairs()[0].a)?;
    on_event(BenchEvent::Model(&BenchModel {
        model_type: request.config.family.model_type(),
        layers: request.config.layers,
        weight_bytes: model.weight_bytes().values().sum(),
        trainable_parameters: lora.parameters(),
        build_seconds: begun.elapsed().as_secs_f64(),
        device_bytes_before,
    }))?;
    for tokens in &request.tokens {
        let measured = request.measure(&model, &mut lora, meter, *tokens, on_event)?;
        on_event(BenchEvent::Step(&measured))?;
    }
    Ok(())
}

/// Measures when asked, to be run in turns with something else: for each of `counts` so many steps of the first number of tokens,
/// which `on_steps` gets the milliseconds of. Warm-up is apart, before the first.
///
/// # Errors
/// As [`bench`].
pub fn serve<B: Backend>(
    device: &B,
    request: &BenchRequest,
    counts: &mut dyn Iterator<Item = usize>,
    on_steps: &mut dyn FnMut(&[f64], f64) -> Result<()>,
) -> Result<()> {
    request.check()?;
    let model = request.model(device)?;
    let mut lora = request.lora(&model)?;
    let tokens = request.tokens.first().copied().unwrap_or(0);
    let mut trainer = request.trainer(&model, &mut lora, tokens)?;
    let mut done = 0;
    let mut steps = |count: usize| -> Result<(Vec<f64>, f64)> {
        let (mut times, mut loss) = (Vec::new(), f64::NAN);
        for _ in 0..count {
            let timed = request.step(&mut trainer, &NoMeter, tokens, done)?;
            times.push(1e3 * timed.seconds);
            loss = timed.loss;
            done += 1;
        }
        Ok((times, loss))
    };
    let (_, loss) = steps(WARM_UP)?;
    on_steps(&[], loss)?;
    for count in counts {
        let (times, loss) = steps(count)?;
        on_steps(&times, loss)?;
    }
    Ok(())
}

impl BenchRequest {
    fn check(&self) -> Result<()> {
        self.spec.check()?;
        let longest = self.config.max_positions;
        let fits = |tokens: &usize| (2..=longest).contains(&(tokens / self.documents.max(1)));
        if self.documents > 0 && self.steps > 0 && self.tokens.iter().all(fits) {
            return Ok(());
        }
        Err(Failure::user(
            "BENCH_OUT_OF_RANGE",
            format!(
                "{} steps of {:?} tokens in {} documents cannot be measured",
                self.steps, self.tokens, self.documents
            ),
        )
        .hint(format!(
            "Ask for at least one step, and for documents of 2 to {longest} tokens"
        )))
    }

    /// Refuses what cannot fit whatever a step takes beside it: the weights, the adapter and its optimizer.
    fn check_room(&self, meter: &dyn Meter) -> Result<()> {
        let least = self.tokens.iter().min().copied().unwrap_or(0);
        let planned = self.planned(least)?.bytes;
        let state = planned.weights + planned.lora + planned.gradients + planned.optimizer;
        match meter.room()? {
            Some(room) if room < state => Err(Failure::user(
                "BENCH_MEMORY",
                format!(
                    "{} layers take {:.1} GB before the first step; the device can give {:.1}",
                    self.config.layers,
                    state as f64 / 1e9,
                    room as f64 / 1e9
                ),
            )
            .hint("Measure fewer layers (--layers), or on a device with more memory")),
            _ => Ok(()),
        }
    }

    fn model<B: Backend>(&self, device: &B) -> Result<Model<B>> {
        let longest = self.tokens.iter().max().map_or(1, |tokens| tokens / self.documents);
        let options = LoadOptions::from(self.spec.base_dtype);
        let config = self.config.clone();
        skeleton_with(
            device,
            config,
            options,
            DType::BF16,
            longest,
            Contents::Random(self.spec.seed),
        )
    }

    fn lora<B: Backend>(&self, model: &Model<B>) -> Result<LoraSet<B>> {
        let config = LoraConfig {
            rank: self.spec.rank,
            alpha: self.spec.lora_alpha(),
            targets: self.spec.targets.clone(),
        };
        config.check_budget(model.modules(), self.spec.optimizer, self.spec.adapter_budget_bytes)?;
        LoraSet::initialise(model.device(), config, model.modules(), self.spec.seed)
    }

    /// Documents of random tokens, all of them learnt.
    fn examples(&self, tokens: usize, seed: u64) -> Vec<EncodedExample> {
        let random = CounterRandom::new(seed, "tokens");
        let length = tokens / self.documents;
        (0..self.documents)
            .map(|document| EncodedExample {
                ids: (0..length)
                    .map(|t| random.below((document * length + t) as u64, self.config.vocabulary) as i32)
                    .collect(),
                supervised: vec![true; length],
                line: document as u64 + 1,
            })
            .collect()
    }

    fn trainer<'a, B: Backend>(
        &self,
        model: &'a Model<B>,
        lora: &'a mut LoraSet<B>,
        tokens: usize,
    ) -> Result<Trainer<'a, B>> {
        let spec = TrainSpec {
            batch_size: self.documents,
            micro_batch_tokens: tokens,
            ..self.spec.clone()
        };
        Trainer::new(model, lora, &spec)
    }

    /// One step, its number counted from 0.
    fn step<B: Backend>(
        &self,
        trainer: &mut Trainer<'_, B>,
        meter: &dyn Meter,
        tokens: usize,
        step: usize,
    ) -> Result<Timed> {
        let examples = self.examples(tokens, step as u64);
        let examples: Vec<&EncodedExample> = examples.iter().collect();
        let begun = Instant::now();
        let mut queued = || {
            meter.begin();
            true
        };
        let rate = f64::from(self.spec.learning_rate);
        let outcome = trainer.step(&examples, step, rate, &mut queued)?;
        let busy = meter.end()?;
        Ok(Timed {
            seconds: begun.elapsed().as_secs_f64(),
            busy,
            loss: outcome.map_or(f64::NAN, |outcome| outcome.loss),
        })
    }

    fn measure<B: Backend>(
        &self,
        model: &Model<B>,
        lora: &mut LoraSet<B>,
        meter: &dyn Meter,
        tokens: usize,
        on_event: &mut dyn FnMut(BenchEvent<'_>) -> Result<()>,
    ) -> Result<BenchStep> {
        let planned = self.planned(tokens)?;
        let device = model.device();
        device.reset_peak();
        let mut trainer = self.trainer(model, lora, tokens)?;
        let warm = (0..self.warm_up).map(|step| self.step(&mut trainer, meter, tokens, step));
        let warm = warm.collect::<Result<Vec<_>>>()?;
        on_event(BenchEvent::Measuring(tokens))?;
        let timed = (0..self.steps).map(|step| self.step(&mut trainer, meter, tokens, self.warm_up + step));
        let timed = timed.collect::<Result<Vec<_>>>()?;
        let first = warm.iter().chain(&timed).next().map_or(f64::NAN, |one| one.seconds);
        let is_recorded = trainer.recorded() > 0;
        drop(trainer);
        let total: f64 = timed.iter().map(|one| one.seconds).sum();
        let busy = timed.iter().try_fold(0.0, |sum, one| Some(sum + one.busy?));
        let loss = timed.last().map_or(f64::NAN, |one| one.loss);
        let seconds = spread(timed.iter().map(|one| one.seconds).collect());
        Ok(BenchStep {
            tokens,
            documents: self.documents,
            seconds,
            steps: self.steps,
            tokens_per_second: tokens as f64 / seconds[0].max(1e-9),
            first_step_seconds: first,
            flops: planned.work.iter().map(|work| work.flops).sum(),
            planned_bytes: planned.bytes.total(),
            is_recorded,
            tensor_peak_bytes: device.memory().peak_bytes,
            device_bytes: meter.device_bytes()?,
            idle_share: busy.map(|busy| (1.0 - busy / total.max(1e-9)).max(0.0)),
            loss,
            routing: self.routing(model, tokens)?,
        })
    }

    /// What a step takes, as planned: its operations, and its bytes.
    fn planned(&self, tokens: usize) -> Result<Footprint> {
        let shape = Shape {
            sequences: self.documents,
            length: tokens / self.documents,
        };
        footprint(&self.config, DType::BF16, &self.spec, Habits::gpu(), shape)
    }

    fn routing<B: Backend>(&self, model: &Model<B>, tokens: usize) -> Result<Option<RoutingBalance>> {
        if self.config.moe.is_none() {
            return Ok(None);
        }
        let loads = ExpertLoads::default();
        model.forward_losses_counting(None, &packed(&self.examples(tokens, 0)), Some(&loads))?;
        Ok(loads.balance())
    }
}

/// One step, measured.
struct Timed {
    seconds: f64,
    busy: Option<f64>,
    loss: f64,
}

/// Median, 10th and 90th of a hundred.
fn spread(mut times: Vec<f64>) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    let last = times.len().saturating_sub(1) as f64;
    [0.5, 0.1, 0.9].map(|share| times.get((last * share).round() as usize).copied().unwrap_or(f64::NAN))
}
