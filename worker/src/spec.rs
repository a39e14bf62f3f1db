//! Every training setting: name, default, range, meaning.
//!
//! A [`TrainSpec`] is what a job row, a configuration file and the command line all resolve to.
//! The resolved value, defaults included, is written into the artifact's `manifest.json`, so a
//! run can be repeated from its own output. Unknown fields are refused.

use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::model::targets::Preset;

/// How the frozen base weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseDtype {
    /// 4-bit NormalFloat in blocks of 64, double-quantised: QLoRA. Embeddings, head and norms
    /// keep the checkpoint's type.
    #[default]
    Nf4,
    /// Routed experts as `nf4`, every other matrix in bfloat16: the choice for a model with many experts where memory allows.
    #[serde(rename = "nf4-experts")]
    Nf4Experts,
    /// bfloat16 weights, bfloat16 matmul inputs, float32 sums.
    Bf16,
    /// Weights as the checkpoint has them, all arithmetic in float32: the reference.
    F32,
}

/// The order in which training examples are visited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// As the file has them.
    File,
    /// A seeded permutation, a new one each epoch.
    #[default]
    Shuffled,
}

/// The learning-rate schedule after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine, to zero.
    #[default]
    Cosine,
    /// A straight line, to zero.
    Linear,
    /// No decay.
    Constant,
}

/// How the optimizer keeps its moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// AdamW with float32 moments: 8 bytes for each trained value.
    #[default]
    #[serde(rename = "adamw")]
    Adamw,
    /// AdamW with 8-bit moments in blocks of 256, as bitsandbytes has them: 2.03 bytes. Small tensors keep float32.
    #[serde(rename = "adamw-8bit")]
    Adamw8bit,
}

/// Which tokens are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Supervise {
    /// Only the last assistant message and its end token.
    #[default]
    FinalAnswer,
    /// Every assistant message and its end token.
    AllAnswers,
}

/// Everything that decides what a training run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSpec {
    /// How the frozen weights are kept.
    pub base_dtype: BaseDtype,
    /// LoRA rank, 1–256.
    pub rank: usize,
    /// LoRA alpha; the adapter is scaled by `alpha / rank`. `None` means twice the rank.
    pub alpha: Option<f32>,
    /// LoRA dropout. Only 0 is accepted: dropout would make packed and separate runs differ, and servers ignore it.
    pub dropout: f32,
    /// Adapted projections: PEFT's names (the end of a module's path) and the presets `default`, `attention`, `all-linear`,
    /// `shared-expert`, `experts`.
    pub targets: Vec<String>,
    /// Peak learning rate, 0 < x ≤ 1.
    pub learning_rate: f32,
    /// Schedule after warm-up.
    pub schedule: Schedule,
    /// Share of all steps used to warm up linearly from 0, 0–1. Ignored when `warmup_steps` is set.
    pub warmup_ratio: f32,
    /// Number of warm-up steps.
    pub warmup_steps: Option<usize>,
    /// How AdamW keeps its moments.
    pub optimizer: OptimizerKind,
    /// AdamW β₁.
    pub beta1: f32,
    /// AdamW β₂.
    pub beta2: f32,
    /// AdamW ε.
    pub epsilon: f32,
    /// Decoupled weight decay, on every LoRA tensor.
    pub weight_decay: f32,
    /// Gradient clipping by global norm; 0 switches it off.
    pub max_gradient_norm: f32,
    /// Examples per optimizer step, 1–1024.
    pub batch_size: usize,
    /// Tokens per micro-batch at most (an example longer than this still goes alone); the examples
    /// of one optimizer step are packed into as few micro-batches as this allows.
    pub micro_batch_tokens: usize,
    /// Passes over the training examples, 1–1000.
    pub epochs: usize,
    /// Optimizer steps; overrides `epochs`.
    pub max_steps: Option<usize>,
    /// Longest example in tokens; a longer one loses its oldest turns, never its answer.
    pub max_length: usize,
    /// Which tokens are learnt.
    pub supervise: Supervise,
    /// Order of the examples.
    pub order: Order,
    /// Share of conversations held out for validation, 0–0.5. At least one conversation is held out
    /// when this is above 0 and there are two or more.
    pub validation_share: f32,
    /// Seed of the adapter's initial values, the order and the split.
    pub seed: u64,
    /// Optimizer steps between checkpoints; 0 writes one only on interruption.
    pub checkpoint_every: usize,
    /// Optimizer steps between evaluations on the held-out examples; 0 evaluates only at the end.
    pub evaluate_every: usize,
    /// Bytes of activations that may be kept instead of being recomputed in the backward pass.
    pub activation_budget_bytes: u64,
    /// The most bytes that the adapter, its gradients and its moments may take together; a larger adapter is refused before
    /// anything is allocated. Rank 16 on all routed experts of an 80-billion-parameter model would take 36 GB.
    pub adapter_budget_bytes: u64,
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            base_dtype: BaseDtype::Nf4,
            rank: 16,
            alpha: None,
            dropout: 0.0,
            targets: vec![Preset::Default.name().to_owned()],
            learning_rate: 2e-4,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.1,
            warmup_steps: None,
            optimizer: OptimizerKind::Adamw,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_gradient_norm: 1.0,
            batch_size: 4,
            micro_batch_tokens: 4096,
            epochs: 3,
            max_steps: None,
            max_length: 4096,
            supervise: Supervise::FinalAnswer,
            order: Order::Shuffled,
            validation_share: 0.1,
            seed: 42,
            checkpoint_every: 50,
            evaluate_every: 0,
            activation_budget_bytes: 512 << 20,
            adapter_budget_bytes: 8 << 30,
        }
    }
}

impl TrainSpec {
    /// The adapter's alpha, resolved.
    pub fn lora_alpha(&self) -> f32 {
        self.alpha.unwrap_or(2.0 * self.rank as f32)
    }

    /// Refuses values outside their ranges; names all of them at once.
    pub fn check(&self) -> Result<()> {
        let rules: [(bool, &str); 15] = [
            ((1..=256).contains(&self.rank), "rank must be between 1 and 256"),
            (
                self.lora_alpha().is_finite() && self.lora_alpha() > 0.0,
                "alpha must be a positive number",
            ),
            (self.dropout == 0.0, "dropout must be 0"),
            (!self.targets.is_empty(), "targets must name at least one projection"),
            (
                self.learning_rate > 0.0 && self.learning_rate <= 1.0,
                "learning_rate must be above 0 and at most 1",
            ),
            (
                (0.0..=1.0).contains(&self.warmup_ratio),
                "warmup_ratio must be between 0 and 1",
            ),
            (
                (0.0..1.0).contains(&self.beta1) && (0.0..1.0).contains(&self.beta2),
                "beta1 and beta2 must be at least 0 and below 1",
            ),
            (
                self.epsilon > 0.0 && self.epsilon.is_finite(),
                "epsilon must be positive",
            ),
            (
                self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
                "weight_decay must be 0 or more",
            ),
            (
                self.max_gradient_norm >= 0.0 && self.max_gradient_norm.is_finite(),
                "max_gradient_norm must be 0 or more",
            ),
            (
                (1..=1024).contains(&self.batch_size),
                "batch_size must be between 1 and 1024",
            ),
            (self.micro_batch_tokens >= 1, "micro_batch_tokens must be at least 1"),
            (
                (1..=1000).contains(&self.epochs) && self.max_steps != Some(0),
                "epochs must be between 1 and 1000, and max_steps at least 1",
            ),
            (self.max_length >= 16, "max_length must be at least 16"),
            (
                (0.0..=0.5).contains(&self.validation_share),
                "validation_share must be between 0 and 0.5",
            ),
        ];
        let broken: Vec<&str> = rules
            .iter()
            .filter(|(holds, _)| !holds)
            .map(|(_, rule)| *rule)
            .collect();
        if broken.is_empty() {
            return Ok(());
        }
        Err(Failure::user(
            "SPEC_OUT_OF_RANGE",
            format!("The training settings are out of range: {}", broken.join("; ")),
        )
        .hint("Correct these settings and try again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_within_their_ranges() {
        assert_eq!(TrainSpec::default().check(), Ok(()));
    }

    #[test]
    fn every_broken_rule_is_named_at_once() {
        let spec = TrainSpec {
            rank: 0,
            batch_size: 0,
            learning_rate: f32::NAN,
            ..TrainSpec::default()
        };
        let failure = spec.check().expect_err("three rules are broken");
        for word in ["rank", "batch_size", "learning_rate"] {
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        let parsed: std::result::Result<TrainSpec, _> = serde_json::from_str(r#"{"lora_alhpa": 32}"#);
        assert!(
            parsed
                .expect_err("a typo is not ignored")
                .to_string()
                .contains("lora_alhpa")
        );
    }
}
