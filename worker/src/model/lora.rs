//! The adapter: which modules have one, its tensors, its gradients.
//!
//! A base model is frozen and shared; an adapter is a value beside it. [`LoraSet`] is indexed by [`ModuleId`], so the
//! same loaded model runs without an adapter, with this one, or with another.

use std::collections::HashSet;

use brightrun_kernels::{Backend, DType, Tensor};

use crate::error::{Failure, Result};
use crate::model::peft::PeftLayout;
use crate::model::random::CounterRandom;

/// Names within this Jaro–Winkler similarity are offered as near misses.
const NEAR_MISS: f64 = 0.75;

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
    /// Names of adapted modules: the last part or parts of their paths. Routed experts are meant only by names that say
    /// so: `experts.gate_up_proj`, `mlp.experts.down_proj`. `down_proj` alone is every module of that name and no expert.
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

    /// The targets as PEFT's `target_modules` and `target_parameters`.
    pub fn peft_targets(&self) -> (Vec<String>, Vec<String>) {
        let (mut parameters, mut modules): (Vec<String>, Vec<String>) =
            self.targets.iter().cloned().partition(|target| names_experts(target));
        for list in [&mut modules, &mut parameters] {
            list.sort();
            list.dedup();
        }
        (modules, parameters)
    }

    /// The modules that the targets name, in the model's order.
    ///
    /// # Errors
    /// `LORA_TARGET_UNKNOWN` when a target matches no module, with the nearest names that exist.
    pub fn resolve(&self, modules: &[Module]) -> Result<Vec<ModuleId>> {
        for target in &self.targets {
            if !modules.iter().any(|module| module.is_named(target)) {
                return Err(unknown_target(target, modules));
            }
        }
        let named = |module: &Module| self.targets.iter().any(|target| module.is_named(target));
        Ok((0..modules.len())
            .filter(|place| named(&modules[*place]))
            .map(ModuleId)
            .collect())
    }
}

impl Module {
    /// Whether the path ends with `target`, on a boundary between parts. PEFT 0.21 takes `down_proj` of a mixture of experts
    /// for the routed experts and doubles rank and alpha there; here a name means the module it names.
    fn is_named(&self, target: &str) -> bool {
        let ends_so = match self.path.strip_suffix(target) {
            Some(rest) => rest.is_empty() || rest.ends_with('.'),
            None => false,
        };
        ends_so && (self.experts.is_none() || names_experts(target))
    }

    /// Values of an adapter of this module.
    pub fn parameters(&self, rank: usize) -> usize {
        self.experts.unwrap_or(1) * rank * (self.inputs + self.outputs)
    }

    fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }
}

/// Whether a target means a projection of routed experts: the part before its last is `experts`.
fn names_experts(target: &str) -> bool {
    target.rsplit('.').nth(1) == Some("experts")
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

    /// An adapter whose factors come from `factors`, called once per adapted module in the model's order.
    pub(crate) fn build(
        config: LoraConfig,
        modules: &[Module],
        mut factors: impl FnMut(&Module, &PeftLayout) -> Result<(Tensor<B>, Tensor<B>)>,
    ) -> Result<Self> {
        let mut by_module = vec![None; modules.len()];
        let mut pairs = Vec::new();
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
        })
    }

    /// Rank, alpha and targets.
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
        for (a, b) in &mut self.pairs {
            device.fill_zero(a)?;
            device.fill_zero(b)?;
        }
        Ok(())
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

fn unknown_target(target: &str, modules: &[Module]) -> Failure {
    let tensor = match target {
        "gate_proj" | "up_proj" => "gate_up_proj",
        other => other,
    };
    let is_meant = |module: &&Module| module.experts.is_some() && module.name() == tensor;
    if let Some(module) = modules.iter().find(is_meant) {
        let name = module.name();
        return Failure::user(
            "LORA_TARGET_UNKNOWN",
            format!("The LoRA target `{target}` matches no module of this model but its routed experts"),
        )
        .hint(format!(
            "Name `mlp.experts.{name}` if you mean every routed expert, else leave `{target}` out"
        ));
    }
    let mut names: Vec<&str> = modules.iter().map(Module::name).collect();
    names.sort_unstable();
    names.dedup();
    let wanted = target.rsplit('.').next().unwrap_or(target);
    let mut near: Vec<(f64, &str)> = names
        .iter()
        .map(|name| (strsim::jaro_winkler(wanted, name), *name))
        .filter(|(similarity, _)| *similarity >= NEAR_MISS)
        .collect();
    near.sort_by(|left, right| right.0.total_cmp(&left.0));
    let hint = match near.as_slice() {
        [] => format!("This model has {}", names.join(", ")),
        _ => format!(
            "Did you mean {}?",
            near.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(" or ")
        ),
    };
    Failure::user(
        "LORA_TARGET_UNKNOWN",
        format!("The LoRA target `{target}` matches no module of this model"),
    )
    .hint(hint)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn modules() -> Vec<Module> {
        ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
            .iter()
            .map(|name| Module {
                path: format!("model.layers.0.{name}"),
                outputs: 4,
                inputs: 4,
                experts: None,
            })
            .collect()
    }

    fn resolve(targets: &[&str]) -> Result<Vec<ModuleId>> {
        let config = LoraConfig {
            rank: 2,
            alpha: 4.0,
            targets: targets.iter().map(ToString::to_string).collect(),
        };
        config.resolve(&modules())
    }

    #[test]
    fn targets_match_whole_parts_of_a_path() {
        assert_eq!(resolve(&["up_proj"]).unwrap(), [ModuleId(2)]);
        assert_eq!(
            resolve(&["self_attn.q_proj", "up_proj"]).unwrap(),
            [ModuleId(0), ModuleId(2)]
        );
        assert!(resolve(&["proj"]).is_err());
    }

    #[test]
    fn a_target_that_matches_nothing_names_what_was_probably_meant() {
        let failure = resolve(&["q_proj", "upproj"]).unwrap_err();
        assert_eq!(failure.code, "LORA_TARGET_UNKNOWN");
        assert!(
            failure.message.contains("upproj") && failure.hint.contains("up_proj"),
            "{failure}"
        );
        assert!(resolve(&["xyz"]).unwrap_err().hint.contains("k_proj, q_proj, up_proj"));
    }

    fn mixture() -> Vec<Module> {
        let module = |name: &str, experts| Module {
            path: format!("model.layers.0.{name}"),
            outputs: 4,
            inputs: 4,
            experts,
        };
        vec![
            module("self_attn.q_proj", None),
            module("mlp.shared_expert.down_proj", None),
            module("mlp.experts.gate_up_proj", Some(8)),
            module("mlp.experts.down_proj", Some(8)),
        ]
    }

    fn resolve_in_mixture(targets: &[&str]) -> Result<Vec<ModuleId>> {
        let config = LoraConfig {
            rank: 2,
            alpha: 4.0,
            targets: targets.iter().map(ToString::to_string).collect(),
        };
        config.resolve(&mixture())
    }

    #[test]
    fn routed_experts_are_adapted_only_by_names_that_say_so() {
        assert_eq!(resolve_in_mixture(&["down_proj"]).unwrap(), [ModuleId(1)]);
        assert_eq!(resolve_in_mixture(&["experts.down_proj"]).unwrap(), [ModuleId(3)]);
        assert_eq!(
            resolve_in_mixture(&["mlp.experts.gate_up_proj", "q_proj"]).unwrap(),
            [ModuleId(0), ModuleId(2)]
        );
        for target in ["gate_proj", "up_proj"] {
            let failure = resolve_in_mixture(&[target]).unwrap_err();
            assert!(failure.hint.contains("mlp.experts.gate_up_proj"), "{failure}");
        }
    }
}
