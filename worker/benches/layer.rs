//! One layer of Qwen3-Next-80B-A3B at its real width, forward and backward: the mixture of experts by itself, and the whole
//! layer with Gated DeltaNet.
//!
//! `cargo bench -p brightrun-worker --bench layer [-- TOKENS [ENCODING]]` prints busy and wall milliseconds (busy is processor time
//! divided by threads), the best of five. `ENCODING` is `bf16` (bf16 weights and products), `nf4` or `f32` (bf16 weights, f32
//! products). Weights are frozen, random, and without adapters: gradients flow to the input, as in the peer that
//! `benches/experts_vs_transformers.py` runs beside it.

#![allow(clippy::unwrap_used)]

use brightrun_kernels::cpu::{Cpu, timed};
use brightrun_kernels::ops::Device;
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Tensor};
use brightrun_worker::model::feed_forward::Purpose;
use brightrun_worker::model::{Batch, LoadOptions, LoraConfig, LoraGradients, LoraSet, Model, ModelConfig};
use brightrun_worker::plan::{Contents, preset, skeleton_with};
use brightrun_worker::spec::BaseDtype;

/// Busy and wall seconds of a forward and a backward pass.
type Times = [(f64, f64); 2];

fn best(mut pass: impl FnMut() -> Times) -> Times {
    pass();
    let rounds: Vec<Times> = (0..5).map(|_| pass()).collect();
    let least = |way: usize, time: fn(&(f64, f64)) -> f64| {
        rounds
            .iter()
            .map(|times| time(&times[way]))
            .fold(f64::INFINITY, f64::min)
    };
    [0, 1].map(|way| (least(way, |time| time.0), least(way, |time| time.1)))
}

fn report(what: &str, times: Times) {
    for (way, (busy, wall)) in ["forward", "backward"].iter().zip(times) {
        println!("{what} {way} {:>9.2} ms busy {:>9.2} ms wall", busy * 1e3, wall * 1e3);
    }
}

/// One layer, its first, with a small vocabulary.
fn one_layer(device: &Cpu, dtype: BaseDtype) -> Model<Cpu> {
    let mut config = ModelConfig::parse(preset("qwen3-next-80b-a3b").unwrap()).unwrap();
    config.layers = 1;
    config.vocabulary = 512;
    if let Some(delta) = &mut config.delta {
        delta.layers = vec![0];
    }
    skeleton_with(
        device,
        config,
        LoadOptions::from(dtype),
        DType::BF16,
        1024,
        Contents::Random(7),
    )
    .unwrap()
}

fn noise(device: &Cpu, shape: [usize; 2], seed: u64) -> Tensor<Cpu> {
    let values = Random::new(seed).normal(shape[0] * shape[1]);
    device.upload_f32(shape, &values).unwrap()
}

fn copy(device: &Cpu, source: &Tensor<Cpu>) -> Tensor<Cpu> {
    let mut copy = device.alloc(source.dtype(), source.shape()).unwrap();
    device.copy(source, &mut copy).unwrap();
    copy
}

fn measure(tokens: usize, name: &str, dtype: BaseDtype) {
    let device = Cpu::new(None).unwrap();
    let model = one_layer(&device, dtype);
    let batch = Batch::prompt(&vec![1; tokens]);
    let inputs = model.inputs(&batch, 0.0).unwrap();
    let pass = model.pass(None, &inputs);
    let layer = &model.layers()[0];
    // Nobody adds to these: the pass has no adapter.
    let idle = LoraConfig {
        rank: 1,
        alpha: 1.0,
        targets: vec!["out_proj".to_owned()],
    };
    let idle = LoraSet::initialise(&device, idle, model.modules(), 1).unwrap();
    let mut gradients = LoraGradients::zeros(&device, &idle).unwrap();
    let width = model.config().hidden;
    let (x, dy) = (noise(&device, [tokens, width], 1), noise(&device, [tokens, width], 2));

    let block = layer.feed_forward();
    let times = best(|| {
        let mut kept = None;
        let mut residual = copy(&device, &x);
        let forward = timed(&device, || {
            let mut trace = block.open(&pass, &x, Purpose::Both).unwrap();
            let hidden = block.close(&pass, &mut trace, &mut residual).unwrap();
            kept = Some((trace, hidden));
        });
        let (trace, hidden) = kept.take().unwrap();
        let mut dx = device.alloc(DType::F32, [tokens, width]).unwrap();
        let mut saved = Some((trace, hidden.as_ref()));
        let backward = timed(&device, || {
            let saved = saved.take().unwrap();
            block
                .backward(&pass, &mut gradients, saved, &x, &dy, Some(&mut dx))
                .unwrap();
        });
        [forward, backward]
    });
    report(&format!("moe block {name}"), times);

    let times = best(|| {
        let mut stream = copy(&device, &x);
        let mut kept = None;
        let forward = timed(&device, || {
            kept = Some(layer.forward_traced(&pass, &mut stream, true).unwrap());
        });
        let mut gradient = copy(&device, &dy);
        let backward = timed(&device, || {
            let trace = kept.take().unwrap();
            layer
                .backward(&pass, &mut gradients, trace, &mut gradient, true)
                .unwrap();
        });
        [forward, backward]
    });
    report(&format!("layer {name}"), times);
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let tokens = arguments
        .iter()
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(256);
    for (name, dtype) in [
        ("bf16", BaseDtype::Bf16),
        ("nf4", BaseDtype::Nf4),
        ("f32", BaseDtype::F32),
    ] {
        let is_wanted = |argument: &String| argument == name || argument.parse::<usize>().is_ok();
        if arguments.is_empty() || arguments.iter().any(|argument| argument == name) || arguments.iter().all(is_wanted)
        {
            measure(tokens, name, dtype);
        }
    }
}
