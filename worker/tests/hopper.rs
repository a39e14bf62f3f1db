//! A whole micro-batch by Hopper's own kernels, on an emulated device that claims to have them, beside the portable kernels and the
//! CPU: what conformance checks op by op must also come together.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "golden/bounds.rs"]
#[allow(dead_code)] // one of its measures is used here
mod bounds;
mod train_support;

use std::collections::BTreeMap;
use std::path::Path;

use bounds::relative_norm;
use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::emu::Emulation;
use brightrun_kernels::gpu::Gpu;
use brightrun_kernels::ops::Precision;
use brightrun_kernels::testing::Watched;
use brightrun_kernels::{Backend, Error};
use brightrun_worker::model::synthetic::write_checkpoint;
use brightrun_worker::model::{BackwardSettings, Encoding, Family, LoadOptions, LoraGradients, Model, ModelConfig};
use brightrun_worker::spec::TrainSpec;
use brightrun_worker::train::EncodedExample;
use brightrun_worker::train::step::packed;
use train_support::{REFERENCE, VOCABULARY, all_targets, spec, stirred_lora};

/// A miniature whose matrices Hopper's kernels take: blocks of NF4 end with a row. All experts are chosen, so that no rounding chooses.
fn config(family: Family) -> ModelConfig {
    let mut config = ModelConfig {
        intermediate: 192,
        ..ModelConfig::miniature(family, VOCABULARY)
    };
    if let Some(moe) = &mut config.moe {
        moe.top = moe.experts;
        moe.intermediate = 64;
        moe.shared_intermediate = moe.shared_intermediate.map(|_| 64);
    }
    config
}

/// A document of several tiles of keys, one of a part of one, one of a token with its label.
fn documents() -> Vec<EncodedExample> {
    let of = |length: usize| EncodedExample {
        ids: (0..length)
            .map(|t| ((7 * t + t / 5 + length) % VOCABULARY) as i32)
            .collect(),
        supervised: (0..length).map(|t| t % 3 != 0).collect(),
        line: length as u64,
    };
    [150, 41, 2].map(of).into()
}

/// Losses of a micro-batch's tokens and the gradients of the whole adapter, one behind the other.
struct Found {
    losses: Vec<f32>,
    gradients: Vec<f32>,
}

fn micro_batch<B: Backend>(device: &B, folder: &Path, family: Family, options: LoadOptions) -> Found {
    let model = Model::load(device, folder, options, &mut |_| {}).unwrap();
    let spec = TrainSpec {
        targets: all_targets(family),
        rank: 8, // whole 16 bytes, which the copy engine wants
        ..spec()
    };
    let lora = stirred_lora(&model, &spec);
    let mut gradients = LoraGradients::zeros(device, &lora).unwrap();
    let settings = BackwardSettings {
        gradient_scale: 0.1,
        activation_budget_bytes: 0,
    };
    let batch = packed(&documents());
    let losses = model.forward_backward(&lora, &mut gradients, &batch, settings).unwrap();
    let read = |tensor| device.read_f32(tensor).unwrap();
    let gradients = gradients
        .pairs()
        .iter()
        .flat_map(|(a, b)| [read(a), read(b)])
        .flatten()
        .collect();
    Found { losses, gradients }
}

/// The same on an emulated device of this compute capability, and what was launched there.
fn emulated(
    capability: (u32, u32),
    folder: &Path,
    family: Family,
    options: LoadOptions,
) -> Option<(Found, BTreeMap<String, u64>)> {
    let emulation = match Emulation::of(None, capability) {
        Ok(emulation) => emulation,
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let device = Gpu::new(Watched::new(emulation)).unwrap();
    let found = micro_batch(&device, folder, family, options);
    Some((found, device.runtime().entries()))
}

/// Hopper's kernels that the micro-batch must have gone through, by the beginnings of their names.
const OF_ALL: [&str; 8] = [
    "hopper_rows",
    "hopper_columns",
    "hopper_attention_forward",
    "hopper_attention_backward_queries",
    "hopper_attention_backward_keys",
    "hopper_attention_backward_values",
    "hopper_logits",
    "hopper_head_dx",
];
const OF_EXPERTS: [&str; 4] = [
    "hopper_grouped_swiglu",
    "hopper_grouped_rows",
    "hopper_grouped_columns",
    "hopper_grouped_pair",
];

/// Both levels round at the same places and add up in another order, so their errors are of one size: a wrong tile, document or
/// factor would be an error of another. (The gradients of Qwen3-Next's miniature magnify roundings some fifteenfold.)
const AS_NEAR: f64 = 1.5;

#[test]
fn a_micro_batch_by_hoppers_kernels_is_as_near_to_f32_as_one_by_the_portable_kernels() {
    let cases = [
        (Family::Qwen3, Encoding::Nf4, vec![]),
        (Family::Qwen3Next, Encoding::Nf4Experts, OF_EXPERTS.to_vec()),
    ];
    for (family, encoding, more) in cases {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &config(family), 11).unwrap();
        let options = |precision| LoadOptions {
            encoding,
            precision,
            ..REFERENCE
        };
        let exact = micro_batch(
            &Cpu::new(Some(2)).unwrap(),
            folder.path(),
            family,
            options(Precision::F32),
        );
        let half = options(Precision::Bf16);
        let Some((portable, _)) = emulated((8, 0), folder.path(), family, half) else {
            return;
        };
        let Some((hopper, entries)) = emulated((9, 0), folder.path(), family, half) else {
            return;
        };
        for kernel in OF_ALL.iter().chain(&more) {
            let launched = entries.keys().any(|entry| entry.starts_with(kernel));
            assert!(launched, "{family:?} did not launch {kernel}: {entries:?}");
        }
        for (what, of) in [
            ("losses", (|found| &found.losses) as fn(&Found) -> &Vec<f32>),
            ("gradients", |found| &found.gradients),
        ] {
            let error = |found| relative_norm(of(found), of(&exact));
            let (hopper, portable) = (error(&hopper), error(&portable));
            assert!(
                portable > 0.0 && hopper <= AS_NEAR * portable,
                "{family:?} {what}: {hopper:.2e}, portable {portable:.2e}"
            );
        }
    }
}
