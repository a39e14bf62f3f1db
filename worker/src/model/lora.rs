//! The adapter: which modules have one, its tensors, its gradients.
//!
//! A base model is frozen and shared; an adapter is a value beside it. [`LoraSet`] is indexed by [`ModuleId`], so the
//! same loaded model runs without an adapter, with this one, or with another.

use std::collections::HashSet;

use brightrun_kernels::{Backend, DType, Tensor};
use serde::Serialize;

use crate::error::{Failure, Result};
use crate::model::peft::{self, PeftLayout};
use crate::model::random::CounterRandom;
use crate::model::targets;
use crate::spec::OptimizerKind;
use crate::train::optimizer::moment_bytes;

/// Which adaptable module of a model: an index into [`Model::modules`](crate::model::Model::modules).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleId(pub(crate) usize);

/// A linear layer that may carry an adapter, or one projection of all routed experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path, such as `model.layers.0.self_attn.q_proj`, or `model.layers.0.mlp.experts.down_proj` for routed experts.
    pub path: String,
    /// `O`.
    pub outputs: usize,
    /// `I`.
    pub inputs: usize,
    /// `E` for the projections of routed experts: each has its own factors.
    pub experts: Option<usize>,
}

/// What an adapter is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `R`.
    pub rank: usize,
    /// The adapter's contribution is scaled by `alpha / rank`.
    pub alpha: f32,
    /// Names of adapted modules and presets, as [`targets`](crate::model::targets) describes them.
    pub targets: Vec<String>,
}

/// The two factors of one module's adapter.
#[derive(Debug)]
pub struct LoraPair<B: Backend> {
    /// The adapted module's path.
    pub path: String,
    /// f32 `[R, I]`, or `[E, R, I]`.
    pub a: Tensor<B>,
    /// f32 `[O, R]`, or `[E, O, R]`.
    pub b: Tensor<B>,
    layout: PeftLayout,
}

/// An adapter in a backend's memory.
#[derive(Debug)]
pub struct LoraSet<B: Backend> {
    config: LoraConfig,
    pairs: Vec<LoraPair<B>>,
    /// Position in `pairs` by module, `None` where the module is not adapted.
    by_module: Vec<Option<usize>>,
    /// Whether the model has routed experts, adapted or not.
    is_mixture: bool,
}

/// Gradients of a [`LoraSet`], pair by pair.
#[derive(Debug)]
pub struct LoraGradients<B: Backend> {
    pairs: Vec<(Tensor<B>, Tensor<B>)>,
}

impl LoraConfig {
    /// `s = alpha / rank`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// The modules that the targets name, in the model's order.
    ///
    /// # Errors
    /// `LORA_TARGET_UNKNOWN` when a target matches no module, with the nearest names that exist.
    pub fn resolve(&self, modules: &[Module]) -> Result<Vec<ModuleId>> {
        let names = targets::expand(&self.targets, modules)?;
        let named = |module: &Module| names.iter().any(|target| module.is_named(target));
        Ok((0..modules.len())
            .filter(|place| named(&modules[*place]))
            .map(ModuleId)
            .collect())
    }
}

/// What an adapter of some model takes in memory while it is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AdapterSize {
    /// Trained values.
    pub parameters: u64,
    /// Bytes of the factors, f32.
    pub weight_bytes: u64,
    /// Bytes of their gradients, f32.
    pub gradient_bytes: u64,
    /// Bytes of the optimizer's moments.
    pub optimizer_bytes: u64,
}

impl AdapterSize {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
    }
}

impl LoraConfig {
    /// What the adapter of these targets would take on a model of these modules.
    ///
    /// # Errors
    /// `LORA_TARGET_UNKNOWN`.
    pub fn size(&self, modules: &[Module], optimizer: OptimizerKind) -> Result<AdapterSize> {
        let mut size = AdapterSize::default();
        for id in self.resolve(modules)? {
            let module = &modules[id.0];
            let experts = module.experts.unwrap_or(1);
            for elements in [module.inputs, module.outputs].map(|side| experts * self.rank * side) {
                let bytes = elements as u64 * DType::F32.size_bytes() as u64;
                size.parameters += elements as u64;
                size.weight_bytes += bytes;
                size.gradient_bytes += bytes;
                size.optimizer_bytes += moment_bytes(optimizer, elements);
            }
        }
        Ok(size)
    }

    /// Refuses an adapter that would not fit in a budget, before anything is allocated. Gives its size otherwise.
    ///
    /// # Errors
    /// `LORA_TOO_LARGE` with the numbers and what to lower; `LORA_TARGET_UNKNOWN`.
    pub fn check_budget(&self, modules: &[Module], optimizer: OptimizerKind, budget_bytes: u64) -> Result<AdapterSize> {
        let size = self.size(modules, optimizer)?;
        if size.total_bytes() <= budget_bytes {
            return Ok(size);
        }
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let routed = self.resolve(modules)?.iter().any(|id| modules[id.0].experts.is_some());
        let largest_rank = self.rank as u64 * budget_bytes / size.total_bytes();
        let mut advice = vec![match largest_rank {
            0 => "adapt fewer modules".to_owned(),
            rank => format!("lower rank to {rank}"),
        }];
        if optimizer == OptimizerKind::Adamw {
            advice.push("set optimizer to adamw-8bit".to_owned());
        }
        if routed {
            advice.push("leave `experts` out of targets".to_owned());
        }
        advice.push("raise adapter_budget_bytes if the memory is there".to_owned());
        Err(Failure::user(
            "LORA_TOO_LARGE",
            format!(
                "An adapter of rank {} on these targets has {} million parameters and takes {:.1} GB (factors {:.1}, gradients \
                 {:.1}, optimizer {:.1}), but the budget is {:.1} GB",
                self.rank,
                size.parameters / 1_000_000,
                gigabytes(size.total_bytes()),
                gigabytes(size.weight_bytes),
                gigabytes(size.gradient_bytes),
                gigabytes(size.optimizer_bytes),
                gigabytes(budget_bytes),
            ),
        )
        .hint(format!("To fit: {}", advice.join("; or "))))
    }
}

impl Module {
    /// Values of an adapter of this module.
    pub fn parameters(&self, rank: usize) -> usize {
        self.experts.unwrap_or(1) * rank * (self.inputs + self.outputs)
    }
}

impl<B: Backend> LoraPair<B> {
    /// PEFT's names of `a` and `b`.
    pub fn keys(&self) -> (String, String) {
        self.layout.keys.clone()
    }

    /// How PEFT names and orders these factors.
    pub fn layout(&self) -> &PeftLayout {
        &self.layout
    }
}

impl<B: Backend> LoraSet<B> {
    /// A new adapter as PEFT initialises it: A uniform in ±1/√I (Kaiming uniform with a = √5), B zero, so that it changes
    /// nothing until it is trained. Values depend on the seed and the module's path only.
    ///
    /// # Errors
    /// `LORA_TARGET_UNKNOWN`; the backend's own.
    pub fn initialise(device: &B, config: LoraConfig, modules: &[Module], seed: u64) -> Result<Self> {
        Self::build(config, modules, |module, layout| {
            let (shape_a, shape_b) = layout.shapes();
            let random = CounterRandom::new(seed, &format!("lora-init {}", module.path));
            let bound = 1.0 / (module.inputs as f32).sqrt();
            let values: Vec<f32> = (0..shape_a.elements())
                .map(|counter| (2.0 * random.unit(counter as u64) - 1.0) * bound)
                .collect();
            let a = device.upload_f32(shape_a, &values)?;
            Ok((a, device.zeros(DType::F32, shape_b)?))
        })
    }

    /// An adapter whose factors have no contents, for backends that only count.
    ///
    /// # Errors
    /// `LORA_TARGET_UNKNOWN`; the backend's own.
    pub fn unwritten(device: &B, config: LoraConfig, modules: &[Module]) -> Result<Self> {
        Self::build(config, modules, |_, layout| {
            let (shape_a, shape_b) = layout.shapes();
            Ok((device.alloc(DType::F32, shape_a)?, device.alloc(DType::F32, shape_b)?))
        })
    }

    /// An adapter whose factors come from `factors`, called once per adapted module in the model's order.
    pub(crate) fn build(
        config: LoraConfig,
        modules: &[Module],
        mut factors: impl FnMut(&Module, &PeftLayout) -> Result<(Tensor<B>, Tensor<B>)>,
    ) -> Result<Self> {
        let mut by_module = vec![None; modules.len()];
        let mut pairs = Vec::new();
        let config = LoraConfig {
            targets: targets::expand(&config.targets, modules)?,
            ..config
        };
        let chosen = config.resolve(modules)?;
        let paths: HashSet<&str> = chosen.iter().map(|id| modules[id.0].path.as_str()).collect();
        for id in &chosen {
            let module = &modules[id.0];
            let layout = PeftLayout::new(module, config.rank, |path| paths.contains(path));
            let (a, b) = factors(module, &layout)?;
            by_module[id.0] = Some(pairs.len());
            pairs.push(LoraPair {
                path: module.path.clone(),
                a,
                b,
                layout,
            });
        }
        Ok(Self {
            config,
            pairs,
            by_module,
            is_mixture: modules.iter().any(|module| module.experts.is_some()),
        })
    }

    /// The targets as PEFT's `target_modules` and `target_parameters`.
    pub fn peft_targets(&self) -> (Vec<String>, Vec<String>) {
        peft::targets(&self.config.targets, self.is_mixture)
    }

    /// Rank, alpha and targets, presets spelt out.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// All pairs, in the model's order.
    pub fn pairs(&self) -> &[LoraPair<B>] {
        &self.pairs
    }

    /// All pairs, to be updated.
    pub fn pairs_mut(&mut self) -> &mut [LoraPair<B>] {
        &mut self.pairs
    }

    /// A module's adapter, if it has one.
    pub fn pair(&self, module: ModuleId) -> Option<&LoraPair<B>> {
        self.pairs.get(self.place(module)?)
    }

    /// Whether a module is adapted.
    pub fn adapts(&self, module: ModuleId) -> bool {
        self.place(module).is_some()
    }

    fn place(&self, module: ModuleId) -> Option<usize> {
        *self.by_module.get(module.0)?
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        self.pairs
            .iter()
            .map(|pair| pair.a.shape().elements() + pair.b.shape().elements())
            .sum()
    }

    /// Bytes of all factors.
    pub fn size_bytes(&self) -> u64 {
        self.pairs
            .iter()
            .map(|pair| (pair.a.size_bytes() + pair.b.size_bytes()) as u64)
            .sum()
    }
}

impl<B: Backend> LoraGradients<B> {
    /// Zero gradients for an adapter.
    ///
    /// # Errors
    /// The backend's own.
    pub fn zeros(device: &B, lora: &LoraSet<B>) -> Result<Self> {
        let pairs = lora
            .pairs
            .iter()
            .map(|pair| {
                Ok((
                    device.zeros(DType::F32, pair.a.shape())?,
                    device.zeros(DType::F32, pair.b.shape())?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self { pairs })
    }

    /// Sets all to zero.
    ///
    /// # Errors
    /// The backend's own.
    pub fn clear(&mut self, device: &B) -> Result<()> {
        let tensors = self.pairs.iter_mut().flat_map(|(a, b)| [a, b]);
        Ok(device.zero_many(tensors.collect())?)
    }

    /// dA and dB of every pair, in the adapter's order.
    pub fn pairs(&self) -> &[(Tensor<B>, Tensor<B>)] {
        &self.pairs
    }

    /// dA and dB of a module, to be added to.
    pub(crate) fn of(&mut self, lora: &LoraSet<B>, module: ModuleId) -> Option<&mut (Tensor<B>, Tensor<B>)> {
        self.pairs.get_mut(lora.place(module)?)
    }

    /// Global L2 norm.
    ///
    /// # Errors
    /// The backend's own.
    pub fn norm(&self, device: &B) -> Result<f64> {
        let tensors: Vec<&Tensor<B>> = self.pairs.iter().flat_map(|(a, b)| [a, b]).collect();
        Ok(device.squared_norm(&tensors)?.sqrt())
    }
}
