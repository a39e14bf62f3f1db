//! What a training run will take, before anything is downloaded or rented: parameters, bytes, speed, cost.
//!
//! # Map
//!
//! | file | what it knows |
//! |---|---|
//! | `skeleton.rs`, `contents.rs` | a model without weights, from a configuration; random weights for it |
//! | `memory.rs` | one step of it on a counting backend: bytes by component, and the work of each op |
//! | `search.rs` | the largest micro-batch and the longest sequence that fit |
//! | `parameters.rs` | parameters by group, in total and per token |
//! | `gpu.rs`, `roofline.rs` | cards as data; the time of that work on a card |
//! | `servers.rs` | which servers load an adapter of which module |
//! | `presets.rs` | public configurations by name |
//! | `report.rs` | the plan as text |
//!
//! # Why it can be trusted
//!
//! The model's own code runs on [`Counting`](brightrun_kernels::counting::Counting). Tests train small models of every family on
//! the CPU backend and on the emulated GPU and compare the peaks they report with the plans for them, also of the weights that a layer
//! decodes once for its recomputation and backward pass. Speed is a range.

mod contents;
mod gpu;
mod memory;
mod parameters;
mod presets;
mod report;
mod roofline;
mod search;
mod servers;
mod skeleton;

use std::collections::BTreeMap;

use brightrun_kernels::DType;
use brightrun_kernels::counting::Habits;
use serde::Serialize;

pub use self::gpu::{GPUS, Gpu, PRICE_SOURCE};
pub use self::memory::{Bytes, Footprint, Shape, footprint};
pub use self::parameters::{Parameters, parameters};
pub use self::presets::{PRESETS, preset};
pub use self::report::text;
pub use self::servers::{Acceptance, Kind, Server, acceptance};
pub use self::skeleton::{Contents, skeleton, skeleton_with};
use crate::error::Result;
use crate::model::lora::{AdapterSize, Module};
use crate::model::targets;
use crate::model::{LoraConfig, ModelConfig};
use crate::spec::{BaseDtype, OptimizerKind, TrainSpec};

/// Memory of a card that no tensor can have: the driver's context and libraries, and one percent lost between blocks.
const CONTEXT_BYTES: u64 = 512 << 20;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The model.
    pub config: ModelConfig,
    /// What its checkpoint holds.
    pub stored: DType,
    /// Settings of the run.
    pub spec: TrainSpec,
    /// Tokens of each sequence.
    pub sequence_length: usize,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// The card.
    pub gpu: &'static Gpu,
    /// Tokens of the data set, if known.
    pub dataset_tokens: Option<u64>,
    /// Dollars an hour; the card's example price where absent.
    pub price_per_hour: Option<f64>,
}

/// A lower and an upper bound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// The lower.
    pub low: f64,
    /// The upper.
    pub high: f64,
}

/// The answer. Bytes are exact multiples of bytes, not of 1024.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The model in a few numbers.
    pub model: ModelFacts,
    /// All parameters, multi-token-prediction heads apart: they are not loaded.
    pub total_parameters: u64,
    /// Parameters that take part in one token's forward pass, the embedding table included, as model cards count.
    pub active_parameters: u64,
    /// The same without the embedding table, of which a token reads one row.
    pub active_parameters_without_embedding: u64,
    /// Parameters by group.
    pub parameters: BTreeMap<&'static str, u64>,
    /// What was planned for.
    pub settings: Settings,
    /// The adapter.
    pub lora: AdapterSize,
    /// Bytes of the frozen weights by encoding.
    pub weight_bytes: BTreeMap<&'static str, u64>,
    /// Bytes by component; their sum is `total_bytes`.
    pub bytes: Bytes,
    /// The most bytes that are in use at once.
    pub total_bytes: u64,
    /// The card's memory.
    pub memory_bytes: u64,
    /// Whether the plan fits the card.
    pub fits: bool,
    /// The largest that fit, with every layer computed again in the backward pass.
    pub largest: Largest,
    /// Floating-point operations of matrix products for one trained token.
    pub flops_per_token: f64,
    /// Trained tokens per second to expect.
    pub tokens_per_second: Range,
    /// Time and cost of the data set, where its size is known.
    pub run: Option<RunCost>,
    /// The same plan on every card.
    pub cards: Vec<CardPlan>,
    /// What is adapted, and who serves it.
    pub targets: Vec<TargetPlan>,
    /// What users should know.
    pub notes: Vec<String>,
}

/// The model in a few numbers.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFacts {
    /// `qwen3_next` and so on.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Routed experts of a layer.
    pub experts: Option<usize>,
    /// Experts a token is sent to.
    pub experts_per_token: Option<usize>,
}

/// What was planned for.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// The card.
    pub gpu: &'static str,
    /// How the frozen weights are kept.
    pub base_dtype: BaseDtype,
    /// LoRA rank.
    pub rank: usize,
    /// Adapted modules by name, presets spelt out.
    pub targets: Vec<String>,
    /// How the optimizer keeps its moments.
    pub optimizer: OptimizerKind,
    /// Tokens of each sequence.
    pub sequence_length: usize,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Bytes of activations kept instead of computed again.
    pub activation_budget_bytes: u64,
}

/// The largest that fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Largest {
    /// Sequences of the asked length in one micro-batch; 0 when not even one fits.
    pub micro_batch: usize,
    /// Tokens of a single sequence alone in its micro-batch, at most what the model was made for.
    pub sequence_length: usize,
}

/// Time and cost of a run.
#[derive(Clone, Debug, Serialize)]
pub struct RunCost {
    /// Tokens trained on, all passes together.
    pub tokens: u64,
    /// Hours; `low` is the shorter time.
    pub hours: Range,
    /// Dollars.
    pub cost: Range,
    /// Dollars an hour.
    pub price_per_hour: f64,
    /// Where the price is from.
    pub price_source: String,
}

/// One card.
#[derive(Clone, Debug, Serialize)]
pub struct CardPlan {
    /// The card's data.
    #[serde(flatten)]
    pub gpu: Gpu,
    /// The plan's bytes there.
    pub total_bytes: u64,
    /// Its memory.
    pub memory_bytes: u64,
    /// Whether it fits.
    pub fits: bool,
    /// Trained tokens per second to expect.
    pub tokens_per_second: Range,
    /// Dollars per million tokens at the example price; `low` is the lower cost.
    pub example_cost_per_million_tokens: Range,
}

/// One adapted kind of module.
#[derive(Clone, Debug, Serialize)]
pub struct TargetPlan {
    /// Its name.
    pub target: String,
    /// How many modules have it.
    pub modules: usize,
    /// Trained values of all of them.
    pub parameters: u64,
    /// What each server makes of its adapter.
    pub servers: BTreeMap<&'static str, Acceptance>,
}

/// Plans a run.
///
/// # Errors
/// `SPEC_OUT_OF_RANGE`, `LORA_TARGET_UNKNOWN`, `LORA_TOO_LARGE`, `PLAN_OUT_OF_RANGE`.
pub fn plan(question: &Question) -> Result<Plan> {
    question.check()?;
    let shape = question.shape();
    let mut spec = question.spec.clone();
    let mut taken = footprint(&question.config, question.stored, &spec, Habits::gpu(), shape)?;
    let lora_config = lora_config(&spec);
    let lora = lora_config.check_budget(&taken.modules, spec.optimizer, spec.adapter_budget_bytes)?;
    let mut notes = Vec::new();
    if !fits(&taken, question.gpu) && spec.activation_budget_bytes > 0 {
        spec.activation_budget_bytes = 0;
        let lean = footprint(&question.config, question.stored, &spec, Habits::gpu(), shape)?;
        if fits(&lean, question.gpu) {
            notes.push("It fits only with activation_budget_bytes = 0, for which this plan is".to_owned());
            taken = lean;
        }
    }
    let counted = parameters(&question.config);
    let tokens = shape.tokens() as f64;
    let speed = |gpu: &Gpu| {
        let (slow, fast) = roofline::seconds(&taken.work, gpu);
        Range {
            low: tokens / slow,
            high: tokens / fast,
        }
    };
    let tokens_per_second = speed(question.gpu);
    question.add_notes(&mut notes);
    Ok(Plan {
        model: ModelFacts::of(&question.config),
        total_parameters: counted.total(),
        active_parameters: counted.active,
        active_parameters_without_embedding: counted.active - counted.embedding,
        settings: Settings {
            gpu: question.gpu.name,
            base_dtype: spec.base_dtype,
            rank: spec.rank,
            targets: targets::expand(&spec.targets, &taken.modules)?,
            optimizer: spec.optimizer,
            sequence_length: question.sequence_length,
            micro_batch: question.micro_batch,
            activation_budget_bytes: spec.activation_budget_bytes,
        },
        lora,
        weight_bytes: taken.weight_bytes.clone(),
        bytes: taken.bytes.with_reserve(reserve(question.gpu)),
        total_bytes: taken.bytes.total() + reserve(question.gpu),
        memory_bytes: question.gpu.memory_bytes(),
        fits: fits(&taken, question.gpu),
        largest: search::largest(question)?,
        flops_per_token: taken.work.iter().map(|work| work.flops as f64).sum::<f64>() / tokens,
        tokens_per_second,
        run: question.run_cost(tokens_per_second),
        cards: GPUS.iter().map(|gpu| card(gpu, &taken, speed(gpu))).collect(),
        targets: target_plans(&question.config, &lora_config, &taken.modules)?,
        parameters: counted.groups,
        notes,
    })
}

fn lora_config(spec: &TrainSpec) -> LoraConfig {
    LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    }
}

fn reserve(gpu: &Gpu) -> u64 {
    reserve_bytes(gpu.memory_bytes())
}

/// Bytes of a card with this much memory that no tensor can have.
pub fn reserve_bytes(memory_bytes: u64) -> u64 {
    CONTEXT_BYTES + memory_bytes / 100
}

/// What the checkpoint's tensors are, by the text of its `config.json`; FP8 is told by its own section.
pub fn stored_dtype(config: &str) -> DType {
    let value: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
    let name = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|key| value.get(*key)?.as_str());
    match name {
        Some("float32") => DType::F32,
        Some("float16") => DType::F16,
        _ => DType::BF16,
    }
}

fn fits(taken: &Footprint, gpu: &Gpu) -> bool {
    taken.bytes.total() + reserve(gpu) <= gpu.memory_bytes()
}

fn card(gpu: &Gpu, taken: &Footprint, tokens_per_second: Range) -> CardPlan {
    let cost = |speed: f64| gpu.example_price_per_hour / 3600.0 * 1e6 / speed;
    CardPlan {
        gpu: *gpu,
        total_bytes: taken.bytes.total() + reserve(gpu),
        memory_bytes: gpu.memory_bytes(),
        fits: fits(taken, gpu),
        tokens_per_second,
        example_cost_per_million_tokens: Range {
            low: cost(tokens_per_second.high),
            high: cost(tokens_per_second.low),
        },
    }
}

fn target_plans(config: &ModelConfig, lora: &LoraConfig, modules: &[Module]) -> Result<Vec<TargetPlan>> {
    let mut plans: Vec<TargetPlan> = Vec::new();
    for id in lora.resolve(modules)? {
        let module = &modules[id.0];
        let target = module.target(modules);
        let parameters = module.parameters(lora.rank) as u64;
        if let Some(plan) = plans.iter_mut().find(|plan| plan.target == target) {
            plan.modules += 1;
            plan.parameters += parameters;
            continue;
        }
        let kind = Kind::of(module);
        plans.push(TargetPlan {
            target: target.to_owned(),
            modules: 1,
            parameters,
            servers: Server::ALL
                .map(|server| (server.name(), acceptance(config.family, kind, server)))
                .into(),
        });
    }
    Ok(plans)
}

impl Question {
    fn shape(&self) -> Shape {
        Shape {
            sequences: self.micro_batch,
            length: self.sequence_length,
        }
    }

    fn check(&self) -> Result<()> {
        self.spec.check()?;
        let longest = self.config.max_positions;
        if self.micro_batch >= 1 && (1..=longest).contains(&self.sequence_length) {
            return Ok(());
        }
        Err(crate::error::Failure::user(
            "PLAN_OUT_OF_RANGE",
            format!(
                "A micro-batch of {} sequences of {} tokens cannot be planned",
                self.micro_batch, self.sequence_length
            ),
        )
        .hint(format!("Ask for at least one sequence, of 1 to {longest} tokens")))
    }

    fn add_notes(&self, notes: &mut Vec<String>) {
        if self.config.fp8_block.is_some() {
            notes.push("The FP8 weights are decoded when they are loaded".to_owned());
        }
        notes.push(
            "For GPUs the working memory of kernels is an assumption and the speed a range by the data sheet; nothing of it \
             is measured"
                .to_owned(),
        );
    }

    fn run_cost(&self, speed: Range) -> Option<RunCost> {
        let tokens = self.dataset_tokens? * self.spec.epochs as u64;
        let price = self.price_per_hour.unwrap_or(self.gpu.example_price_per_hour);
        let hours = Range {
            low: tokens as f64 / speed.high / 3600.0,
            high: tokens as f64 / speed.low / 3600.0,
        };
        Some(RunCost {
            tokens,
            hours,
            cost: Range {
                low: hours.low * price,
                high: hours.high * price,
            },
            price_per_hour: price,
            price_source: match self.price_per_hour {
                Some(_) => "as given".to_owned(),
                None => PRICE_SOURCE.to_owned(),
            },
        })
    }
}

impl ModelFacts {
    fn of(config: &ModelConfig) -> Self {
        Self {
            model_type: config.family.model_type(),
            layers: config.layers,
            hidden: config.hidden,
            vocabulary: config.vocabulary,
            experts: config.moe.as_ref().map(|moe| moe.experts),
            experts_per_token: config.moe.as_ref().map(|moe| moe.top),
        }
    }
}
