//! A miniature model and made-up examples, for the tests of training.
#![allow(dead_code)] // Each test binary uses its own part.

use std::path::Path;

use brightrun_kernels::Backend;
use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::Precision;
use brightrun_worker::artifact::input::BaseModel;
use brightrun_worker::artifact::{
    AdapterConfig, AdapterDtype, AdapterLayout, encode_tensors, tensors_of, write_adapter,
};
use brightrun_worker::model::random::CounterRandom;
use brightrun_worker::model::synthetic::write_checkpoint;
use brightrun_worker::model::{
    Encoding, Family, LoadOptions, LoraConfig, LoraSet, Model, ModelConfig, RopeFrequencies,
};
use brightrun_worker::spec::{BaseDtype, TrainSpec};
use brightrun_worker::train::{Control, EncodedExample, StepReport, TrainEvents, TrainRequest, TrainSummary, run};

pub const VOCABULARY: usize = 96;

pub const REFERENCE: LoadOptions = LoadOptions {
    encoding: Encoding::Stored,
    precision: Precision::F32,
    rope_frequencies: RopeFrequencies::F32,
};

pub const ALL_FAMILIES: [Family; 4] = [Family::Qwen2, Family::Qwen3, Family::Qwen3Moe, Family::Qwen3Next];

/// Everything of a family's miniature that can carry an adapter.
pub fn all_targets(family: Family) -> Vec<String> {
    groups_of_targets(family)
        .concat()
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// The same in groups, each of which must have a gradient of its own.
pub fn groups_of_targets(family: Family) -> Vec<Vec<&'static str>> {
    let mut groups = vec![vec!["q_proj", "k_proj"], vec!["v_proj", "o_proj"]];
    groups.extend(match family {
        Family::Qwen2 | Family::Qwen3 => vec![vec!["gate_proj"], vec!["up_proj", "down_proj"]],
        Family::Qwen3Moe => vec![vec!["mlp.experts.gate_up_proj"], vec!["experts.down_proj"]],
        Family::Qwen3Next => vec![
            vec!["in_proj_qkvz"],
            vec!["in_proj_ba"],
            vec!["out_proj"],
            vec!["shared_expert.gate_proj", "up_proj", "down_proj"],
            vec!["shared_expert_gate"],
            vec!["mlp.experts.gate_up_proj"],
            vec!["mlp.experts.down_proj"],
        ],
    });
    groups
}

/// A miniature model on a device of `threads` threads.
pub fn model(family: Family, threads: usize, options: LoadOptions) -> Model<Cpu> {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &ModelConfig::miniature(family, VOCABULARY), 11).unwrap();
    load(folder.path(), threads, options)
}

/// A miniature model in which no token has to choose between experts.
pub fn smooth_model(family: Family) -> Model<Cpu> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = ModelConfig::miniature(family, VOCABULARY);
    if let Some(moe) = &mut config.moe {
        moe.top = moe.experts;
    }
    write_checkpoint(folder.path(), &config, 11).unwrap();
    load(folder.path(), 2, REFERENCE)
}

pub fn load(folder: &Path, threads: usize, options: LoadOptions) -> Model<Cpu> {
    Model::load(&Cpu::new(Some(threads)).unwrap(), folder, options, &mut |_| {}).unwrap()
}

pub fn lora<B: Backend>(model: &Model<B>, spec: &TrainSpec) -> LoraSet<B> {
    let config = LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    };
    LoraSet::initialise(model.device(), config, model.modules(), spec.seed).unwrap()
}

/// An adapter whose B is not zero, so that every gradient has something to say.
pub fn stirred_lora<B: Backend>(model: &Model<B>, spec: &TrainSpec) -> LoraSet<B> {
    let mut set = lora(model, spec);
    for pair in set.pairs_mut() {
        let random = CounterRandom::new(spec.seed, &format!("b {}", pair.path));
        let values: Vec<f32> = (0..pair.b.shape().elements())
            .map(|place| 0.1 * random.normal(place as u64) as f32)
            .collect();
        model
            .device()
            .write(&mut pair.b, bytemuck::cast_slice(&values))
            .unwrap();
    }
    set
}

/// Examples with a rule to learn: each token follows from the one before.
pub fn examples(count: usize) -> Vec<EncodedExample> {
    let random = CounterRandom::new(5, "examples");
    (0..count)
        .map(|place| {
            let length = 6 + random.below(place as u64, 20);
            let start = random.below(1000 + place as u64, VOCABULARY);
            EncodedExample {
                ids: (0..length)
                    .map(|step| ((start + 7 * step) % VOCABULARY) as i32)
                    .collect(),
                supervised: (0..length).map(|step| step >= length / 3).collect(),
                line: place as u64 + 1,
            }
        })
        .collect()
}

pub fn spec() -> TrainSpec {
    TrainSpec {
        base_dtype: BaseDtype::F32,
        rank: 4,
        learning_rate: 5e-3,
        weight_decay: 0.01,
        batch_size: 3,
        micro_batch_tokens: 40,
        epochs: 2,
        max_length: 64,
        checkpoint_every: 0,
        ..TrainSpec::default()
    }
}

/// Collects what a run reports, and asks `decide` whether it shall go on after each step.
pub struct Recorder<F: FnMut(&StepReport) -> Control> {
    pub steps: Vec<StepReport>,
    pub decide: F,
}

impl<F: FnMut(&StepReport) -> Control> Recorder<F> {
    pub fn new(decide: F) -> Self {
        Self {
            steps: Vec::new(),
            decide,
        }
    }
}

impl<F: FnMut(&StepReport) -> Control> TrainEvents for Recorder<F> {
    fn on_step(&mut self, report: &StepReport) -> Control {
        self.steps.push(*report);
        (self.decide)(report)
    }
}

/// Trains a fresh adapter on `examples` and gives its bytes, the reports and the summary.
pub fn trained(
    model: &Model<Cpu>,
    spec: &TrainSpec,
    examples: &[EncodedExample],
    checkpoints: Option<(&Path, bool)>,
    decide: impl FnMut(&StepReport) -> Control,
) -> (Vec<u8>, Vec<StepReport>, TrainSummary) {
    let mut adapter = lora(model, spec);
    let mut events = Recorder::new(decide);
    let request = TrainRequest {
        model,
        lora: &mut adapter,
        spec,
        train: examples,
        validation: &[],
        checkpoint_dir: checkpoints.map(|(path, _)| path),
        resume: checkpoints.is_some_and(|(_, resume)| resume),
    };
    let summary = run(request, &mut events).unwrap();
    (adapter_bytes(&adapter, model), events.steps, summary)
}

/// The bytes of the adapter's file.
pub fn adapter_bytes(adapter: &LoraSet<Cpu>, model: &Model<Cpu>) -> Vec<u8> {
    encode_tensors(&tensors_of(model.device(), adapter).unwrap(), AdapterDtype::F32).unwrap()
}

/// Writes an adapter's files as a run does.
pub fn save(adapter: &LoraSet<Cpu>, model: &Model<Cpu>, folder: &Path) {
    let base = BaseModel {
        id: "base".to_owned(),
        revision: None,
        config_sha256: String::new(),
        checkpoint_fingerprint: String::new(),
    };
    let config = AdapterConfig::new(&AdapterLayout::of(adapter, AdapterDtype::F32), &base).unwrap();
    let tensors = tensors_of(model.device(), adapter).unwrap();
    write_adapter(folder, &config, &tensors, AdapterDtype::F32).unwrap();
}
