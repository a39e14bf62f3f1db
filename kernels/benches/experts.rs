//! The routed experts and the delta rule of Qwen3-Next-80B-A3B at their real width.
//!
//! `cargo bench -p brightrun-kernels --bench experts [-- TOKENS]` prints, for each part, busy and wall milliseconds (see the bench
//! `ops`), the best of five, and for the experts the rate at which their matrices are read. `benches/experts_vs_transformers.py` runs it beside the peer.

#![allow(clippy::unwrap_used)]

use brightrun_kernels::cpu::{Cpu, timed};
use brightrun_kernels::ops::{
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaOps, Device, GroupedLinearBackward, GroupedLinearForward, MoeOps,
    Precision, QuantizeOps, RoutedSwigluBackward, Routing, RowOrder, Write,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Segments, Tensor, Weight, WeightStack};

/// Hidden width, experts, best, width of an expert.
const SIZES: [usize; 4] = [2048, 512, 10, 512];

/// Busy and wall seconds.
type Times = (f64, f64);

fn best(cpu: &Cpu, mut body: impl FnMut()) -> Times {
    body();
    let times: Vec<Times> = (0..5).map(|_| timed(cpu, &mut body)).collect();
    let least = |time: fn(&Times) -> f64| times.iter().map(time).fold(f64::INFINITY, f64::min);
    (least(|time| time.0), least(|time| time.1))
}

fn random(cpu: &Cpu, shape: &[usize], seed: u64) -> Tensor<Cpu> {
    let shape = brightrun_kernels::Shape::new(shape);
    cpu.upload_f32(shape, &Random::new(seed).normal(shape.elements()))
        .unwrap()
}

/// A stack whose experts share their values: what matters here is that they lie in different places.
fn stack(cpu: &Cpu, outputs: usize, inputs: usize, nf4: bool) -> WeightStack<Cpu> {
    let source = random(cpu, &[outputs, inputs], 1);
    let weight = if nf4 {
        Weight::Nf4(cpu.quantize_nf4(&source, true).unwrap())
    } else {
        let mut half = cpu.alloc(DType::BF16, [outputs, inputs]).unwrap();
        cpu.copy(&source, &mut half).unwrap();
        Weight::Dense(half)
    };
    let mut stack = WeightStack::alloc_like(cpu, SIZES[1], &weight).unwrap();
    for expert in 0..SIZES[1] {
        cpu.stack_expert(&weight, expert, &mut stack).unwrap();
    }
    stack
}

fn report(what: &str, (busy, wall): Times, bytes: usize) {
    let rate = match bytes {
        0 => String::new(),
        bytes => format!("{:>6.1} GB/s", bytes as f64 / busy / 1e9),
    };
    println!(
        "{what:<48} {:>9.2} ms busy {:>9.2} ms wall {rate}",
        busy * 1e3,
        wall * 1e3
    );
}

/// All of the routed experts, forward and backward.
fn experts(cpu: &Cpu, tokens: usize, nf4: bool, precision: Precision) {
    let [width, count, top, inner] = SIZES;
    let (gate_w, up_w, down_w) = (
        stack(cpu, inner, width, nf4),
        stack(cpu, inner, width, nf4),
        stack(cpu, width, inner, nf4),
    );
    let bytes = [&gate_w, &up_w, &down_w].iter().map(|stack| stack.size_bytes()).sum();
    let mut routing = Routing::alloc(cpu, tokens, count, top).unwrap();
    cpu.route(&random(cpu, &[tokens, count], 2), true, &mut routing)
        .unwrap();
    let (x, dy) = (random(cpu, &[tokens, width], 3), random(cpu, &[tokens, width], 4));
    let rows = |width: usize| cpu.alloc(DType::F32, [tokens * top, width]).unwrap();
    let (mut gate, mut up, mut activation, mut out) = (rows(inner), rows(inner), rows(inner), rows(width));
    let mut y = cpu.alloc(DType::F32, [tokens, width]).unwrap();
    let linear = |x: &Tensor<Cpu>, x_order, weight: &WeightStack<Cpu>, y: &mut Tensor<Cpu>| {
        let call = GroupedLinearForward {
            x,
            x_order,
            routing: &routing,
            weight,
            lora: None,
            precision,
            y,
        };
        cpu.grouped_linear_forward(call).unwrap();
    };
    let name = format!("experts T{tokens} {} {precision:?}", gate_w.encoding());
    let forward = best(cpu, || {
        linear(&x, RowOrder::Token, &gate_w, &mut gate);
        linear(&x, RowOrder::Token, &up_w, &mut up);
        cpu.routed_swiglu_forward(&gate, &up, &routing, &mut activation)
            .unwrap();
        linear(&activation, RowOrder::Grouped, &down_w, &mut out);
        cpu.combine(&out, &routing, &mut y, Write::Overwrite).unwrap();
    });
    report(&format!("{name} forward"), forward, bytes);
    let (mut dactivation, mut dgate, mut dup, mut drows) = (rows(inner), rows(inner), rows(inner), rows(width));
    let (mut dweights, mut dx) = (
        cpu.alloc(DType::F32, [tokens, top]).unwrap(),
        cpu.alloc(DType::F32, [tokens, width]).unwrap(),
    );
    let linear = |dy: &Tensor<Cpu>, dy_order, weight: &WeightStack<Cpu>, dx: &mut Tensor<Cpu>, write| {
        let call = GroupedLinearBackward {
            dy,
            dy_order,
            routing: &routing,
            weight,
            lora: None,
            precision,
            dx: Some((dx, write)),
        };
        cpu.grouped_linear_backward(call).unwrap();
    };
    let backward = best(cpu, || {
        linear(&dy, RowOrder::Token, &down_w, &mut dactivation, Write::Overwrite);
        let call = RoutedSwigluBackward {
            gate: &gate,
            up: &up,
            routing: &routing,
            dy: &dactivation,
            dgate: &mut dgate,
            dup: &mut dup,
            dweights: &mut dweights,
        };
        cpu.routed_swiglu_backward(call).unwrap();
        linear(&dgate, RowOrder::Grouped, &gate_w, &mut drows, Write::Overwrite);
        linear(&dup, RowOrder::Grouped, &up_w, &mut drows, Write::Accumulate);
        cpu.combine(&drows, &routing, &mut dx, Write::Overwrite).unwrap();
    });
    report(&format!("{name} backward"), backward, bytes);
}

/// The delta rule of one layer: 16 key heads, 32 value heads of 128.
fn delta_rule(cpu: &Cpu, tokens: usize) {
    let segments = Segments::from_lengths([tokens]);
    let (mut q, mut k) = (random(cpu, &[tokens, 16, 128], 1), random(cpu, &[tokens, 16, 128], 2));
    for x in [&mut q, &mut k] {
        let values: Vec<f32> = cpu.read_f32(x).unwrap().iter().map(|value| value / 11.3).collect();
        cpu.write(x, bytemuck::cast_slice(&values)).unwrap();
    }
    let (v, dout) = (random(cpu, &[tokens, 32, 128], 3), random(cpu, &[tokens, 32, 128], 4));
    let decay = cpu.upload_f32([tokens, 32], &vec![-0.05; tokens * 32]).unwrap();
    let beta = cpu.upload_f32([tokens, 32], &vec![0.5; tokens * 32]).unwrap();
    let like = |tensor: &Tensor<Cpu>| cpu.alloc(DType::F32, tensor.shape()).unwrap();
    let (mut out, mut solved) = (like(&v), cpu.alloc(DType::F32, [tokens, 32, DELTA_CHUNK]).unwrap());
    let forward = best(cpu, || {
        let call = DeltaForward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            segments: &segments,
            scale: 0.088,
            state: None,
            out: &mut out,
            solved: &mut solved,
        };
        cpu.delta_rule_forward(call).unwrap();
    });
    report(&format!("delta rule T{tokens} forward"), forward, 0);
    let (mut dq, mut dk, mut dv, mut ddecay, mut dbeta) = (like(&q), like(&k), like(&v), like(&decay), like(&beta));
    let backward = best(cpu, || {
        let call = DeltaBackward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            solved: &solved,
            dout: &dout,
            segments: &segments,
            scale: 0.088,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        };
        cpu.delta_rule_backward(call).unwrap();
    });
    report(&format!("delta rule T{tokens} backward"), backward, 0);
}

fn main() {
    let tokens = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(256);
    let cpu = Cpu::new(None).unwrap();
    println!("{} with {} threads", cpu.simd_level(), cpu.threads());
    delta_rule(&cpu, tokens);
    for (nf4, precision) in [
        (true, Precision::Bf16),
        (false, Precision::Bf16),
        (false, Precision::F32),
    ] {
        experts(&cpu, tokens, nf4, precision);
    }
}
