//! The same bits at any number of threads, for every op that is cut into tasks.

#![allow(clippy::unwrap_used, clippy::panic)]

use brightrun_kernels::cpu::{Cpu, SimdLevel};
use brightrun_kernels::emu::{Emulated, emulated, emulated_as};
use brightrun_kernels::ops::{
    ActivationOps, AdamW, AttentionBackward, AttentionForward, DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaOps,
    Device, EmbeddingOps, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, GroupedLoraForward,
    GroupedPairBackward, GroupedSwigluForward, LinearBackward, LinearCrossEntropy, LinearForward, LoraBackward,
    LoraForward, LossOps, MatmulOps, MoeOps, NormBackward, NormForward, NormOps, NormWeight, OptimizerOps, Precision,
    QuantizeOps, RopeDirection, RopeOps, RopeTable, Routing, RowOrder, Write,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{Backend, DType, Error, Nf4Scales, Segments, Shape, Tensor, Weight, WeightStack};

const THREADS: [usize; 5] = [1, 2, 3, 5, 2];

/// Runs `op` at every number of threads, level and precision; all results of one level must have the same bits.
fn same_bits(op: &str, run: impl Fn(&Cpu, Precision) -> Vec<Vec<u8>>) {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_supported()) {
        for precision in [Precision::F32, Precision::Bf16] {
            let results = THREADS.map(|threads| run(&Cpu::with_simd(Some(threads), level).unwrap(), precision));
            assert!(
                results[0].iter().any(|bytes| bytes.iter().any(|byte| *byte != 0)),
                "{op} computed something"
            );
            for (threads, result) in THREADS.iter().zip(&results) {
                assert!(
                    *result == results[0],
                    "{op} at {threads} threads, {level}, {precision:?}"
                );
            }
        }
    }
}

/// The same for the emulated kernels, whose blocks are spread over threads in any order.
fn same_bits_emulated(op: &str, run: impl Fn(&Emulated, Precision) -> Vec<Vec<u8>>) {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut first: Option<Vec<Vec<u8>>> = None;
        for threads in [1, 3, 3] {
            let device = match emulated(Some(threads)) {
                Ok(device) => device,
                Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent: {reason}"),
                Err(error) => panic!("{error}"),
            };
            let result = run(&device, precision);
            assert!(
                *first.get_or_insert_with(|| result.clone()) == result,
                "{op} at {threads} threads, {precision:?}"
            );
        }
    }
}

/// The same for the kernels that Hopper has of its own: the tiles of a block that stays, whatever other blocks do.
fn same_bits_on_hopper(run: impl Fn(&Emulated) -> Vec<Vec<u8>>) {
    let mut first: Option<Vec<Vec<u8>>> = None;
    for threads in [1, 3, 3] {
        let device = match emulated_as(Some(threads), (9, 0)) {
            Ok(device) => device,
            Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent: {reason}"),
            Err(error) => panic!("{error}"),
        };
        let bits = run(&device);
        assert!(
            *first.get_or_insert_with(|| bits.clone()) == bits,
            "at {threads} threads"
        );
    }
}

fn half<D: Device>(device: &D, shape: &[usize], seed: u64) -> Tensor<D> {
    activation(device, Precision::Bf16, shape, seed)
}

#[test]
fn layers_on_hopper_have_the_same_bits_in_any_order_of_blocks() {
    // Many tiles; and few, whose depth is cut into parts, of y and of dx.
    for (tokens, inputs, outputs, rank) in [(150, 192, 264, 8), (40, 2_112, 136, 16), (40, 128, 2_112, 8)] {
        same_bits_on_hopper(|device| {
            let weight = random(device, &[outputs, inputs], 1);
            let weight = Weight::Nf4(device.quantize_nf4(&weight, true).unwrap());
            let (x, dy) = (half(device, &[tokens, inputs], 2), half(device, &[tokens, outputs], 3));
            let (a, b) = (random(device, &[rank, inputs], 4), random(device, &[outputs, rank], 5));
            let mut hidden = device.alloc(DType::F32, [tokens, rank]).unwrap();
            let mut y = device.alloc(DType::BF16, [tokens, outputs]).unwrap();
            let lora = Some(LoraForward {
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &mut hidden,
            });
            let call = LinearForward {
                x: &x,
                weight: &weight,
                bias: None,
                lora,
                precision: Precision::Bf16,
                y: &mut y,
            };
            device.linear_forward(call).unwrap();
            let mut dx = device.alloc(DType::BF16, [tokens, inputs]).unwrap();
            let call = LinearBackward {
                dy: &dy,
                weight: &weight,
                lora: None,
                precision: Precision::Bf16,
                dx: Some((&mut dx, Write::Overwrite)),
            };
            device.linear_backward(call).unwrap();
            read(device, [&y, &hidden, &dx])
        });
    }
}

/// A stack of random experts in NF4.
fn experts<D: Device + QuantizeOps + MoeOps>(
    device: &D,
    [count, outputs, inputs]: [usize; 3],
    seed: u64,
) -> WeightStack<D> {
    let matrix = |expert: usize| {
        let values = random(device, &[outputs, inputs], seed + expert as u64);
        Weight::Nf4(device.quantize_nf4(&values, true).unwrap())
    };
    let mut stack = WeightStack::alloc_like(device, count, &matrix(0)).unwrap();
    for expert in 0..count {
        device.stack_expert(&matrix(expert), expert, &mut stack).unwrap();
    }
    stack
}

#[test]
fn both_wide_projections_on_hopper_have_the_same_bits_in_any_order_of_blocks() {
    let (tokens, inputs, width, rank) = (150, 192, 136, 8);
    let (count, top) = (4, 2);
    same_bits_on_hopper(|device| {
        let [gate, up] = [10, 20].map(|seed| experts(device, [count, width, inputs], seed));
        let mut routing = Routing::alloc(device, tokens, count, top).unwrap();
        let logits = random(device, &[tokens, count], 1);
        device.route(&logits, true, &mut routing).unwrap();
        let x = half(device, &[tokens, inputs], 2);
        let [dgate, dup] = [3, 4].map(|seed| half(device, &[tokens * top, width], seed));
        let a = random(device, &[count, rank, inputs], 5);
        let b = random(device, &[count, 2 * width, rank], 6);
        let mut hidden = device.alloc(DType::F32, [tokens * top, rank]).unwrap();
        let [mut gate_y, mut up_y, mut y] = [(); 3].map(|()| device.alloc(DType::BF16, [tokens * top, width]).unwrap());
        let call = GroupedSwigluForward {
            x: &x,
            routing: &routing,
            gate: &gate,
            up: &up,
            lora: Some(GroupedLoraForward {
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &mut hidden,
            }),
            precision: Precision::Bf16,
            wide: Some((&mut gate_y, &mut up_y)),
            y: Some(&mut y),
        };
        device.grouped_swiglu_forward(call).unwrap();
        let [mut da, mut db] = [&a, &b].map(|like| device.zeros(DType::F32, like.shape()).unwrap());
        let mut dx = device.alloc(DType::BF16, [tokens * top, inputs]).unwrap();
        let call = GroupedPairBackward {
            dgate: &dgate,
            dup: &dup,
            routing: &routing,
            gate: &gate,
            up: &up,
            lora: Some(GroupedLoraBackward {
                x: &x,
                x_order: RowOrder::Token,
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &hidden,
                gradient_a: &mut da,
                gradient_b: &mut db,
            }),
            precision: Precision::Bf16,
            dx: Some(&mut dx),
        };
        device.grouped_pair_backward(call).unwrap();
        read(device, [&gate_y, &up_y, &y, &dx, &da, &db])
    });
}

/// What the fused kernel keeps of gate and up is what each projection alone gives, to the bit: a pass may recompute one way what
/// another pass stored.
#[test]
fn gate_and_up_on_hopper_have_the_bits_of_each_projection_alone() {
    let (tokens, inputs, width, rank) = (150, 128, 136, 8);
    let (count, top) = (4, 2);
    let device = match emulated_as(Some(2), (9, 0)) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent: {reason}"),
        Err(error) => panic!("{error}"),
    };
    let stacks = [10, 20].map(|seed| experts(&device, [count, width, inputs], seed));
    let mut routing = Routing::alloc(&device, tokens, count, top).unwrap();
    device
        .route(&random(&device, &[tokens, count], 1), true, &mut routing)
        .unwrap();
    let x = half(&device, &[tokens, inputs], 2);
    let a = random(&device, &[count, rank, inputs], 5);
    let b = random(&device, &[count, 2 * width, rank], 6);
    let mut hidden = device.alloc(DType::F32, [tokens * top, rank]).unwrap();
    let mut wide = [(); 2].map(|()| device.alloc(DType::BF16, [tokens * top, width]).unwrap());
    let [gate_y, up_y] = &mut wide;
    let call = GroupedSwigluForward {
        x: &x,
        routing: &routing,
        gate: &stacks[0],
        up: &stacks[1],
        lora: Some(GroupedLoraForward {
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &mut hidden,
        }),
        precision: Precision::Bf16,
        wide: Some((gate_y, up_y)),
        y: None,
    };
    device.grouped_swiglu_forward(call).unwrap();
    let values = device.read_f32(&b).unwrap();
    for (half, (stack, together)) in stacks.iter().zip(&wide).enumerate() {
        let own: Vec<f32> = values
            .chunks_exact(2 * width * rank)
            .flat_map(|of_expert| of_expert[half * width * rank..][..width * rank].to_vec())
            .collect();
        let b = device.upload_f32([count, width, rank], &own).unwrap();
        let mut alone = device.alloc(DType::BF16, [tokens * top, width]).unwrap();
        let call = GroupedLinearForward {
            x: &x,
            x_order: RowOrder::Token,
            routing: &routing,
            weight: stack,
            lora: Some(GroupedLoraForward {
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &mut hidden,
            }),
            precision: Precision::Bf16,
            y: &mut alone,
        };
        device.grouped_linear_forward(call).unwrap();
        assert!(
            device.read(together).unwrap() == device.read(&alone).unwrap(),
            "projection {half}"
        );
    }
}

#[test]
fn the_head_on_hopper_has_the_same_bits_in_any_order_of_blocks() {
    let (tokens, width, vocabulary) = (400, 136, 2_008);
    same_bits_on_hopper(|device| {
        let head = Weight::Dense(half(device, &[vocabulary, width], 1));
        let x = half(device, &[tokens, width], 2);
        let labels: Vec<i32> = (0..tokens)
            .map(|t| if t % 3 == 0 { -100 } else { (t * 5) as i32 })
            .collect();
        let labels = device.upload_i32([tokens], &labels).unwrap();
        let mut losses = device.alloc(DType::F32, [tokens]).unwrap();
        let mut dx = device.alloc(DType::BF16, [tokens, width]).unwrap();
        let factor = device.upload_f32([1], &[0.5]).unwrap();
        let call = LinearCrossEntropy {
            x: &x,
            head: &head,
            labels: &labels,
            precision: Precision::Bf16,
            losses: &mut losses,
            dx: Some((&mut dx, &factor)),
        };
        device.linear_cross_entropy(call).unwrap();
        read(device, [&losses, &dx])
    });
}

/// Compiles a body for the CPU and for the emulated kernels.
macro_rules! same_bits_everywhere {
    ($op:expr, |$device:ident, $precision:ident| $body:block) => {{
        same_bits($op, |$device, $precision| $body);
        same_bits_emulated($op, |$device, $precision| $body);
    }};
}

fn random<D: Device>(device: &D, shape: &[usize], seed: u64) -> Tensor<D> {
    let shape = Shape::new(shape);
    device
        .upload_f32(shape, &Random::new(seed).normal(shape.elements()))
        .unwrap()
}

/// An activation as the device wants it at a precision.
fn activation<D: Device>(device: &D, precision: Precision, shape: &[usize], seed: u64) -> Tensor<D> {
    let values = random(device, shape, seed);
    let mut activation = device
        .alloc(device.activation_dtype(precision), values.shape())
        .unwrap();
    device.copy(&values, &mut activation).unwrap();
    activation
}

fn read<D: Device, const COUNT: usize>(device: &D, tensors: [&Tensor<D>; COUNT]) -> Vec<Vec<u8>> {
    tensors.map(|tensor| device.read(tensor).unwrap()).into()
}

/// Tokens, inputs, outputs, rank: more than a task of each.
const LAYER: (usize, usize, usize, usize) = (230, 600, 200, 6);

#[test]
fn linear_layers() {
    let (tokens, inputs, outputs, rank) = LAYER;
    same_bits_everywhere!("linear", |cpu, precision| {
        let weight = Weight::Nf4(cpu.quantize_nf4(&random(cpu, &[outputs, inputs], 1), true).unwrap());
        let (x, dy) = (random(cpu, &[tokens, inputs], 2), random(cpu, &[tokens, outputs], 3));
        let (a, b) = (random(cpu, &[rank, inputs], 4), random(cpu, &[outputs, rank], 5));
        let mut hidden = cpu.alloc(DType::F32, [tokens, rank]).unwrap();
        let mut y = cpu.alloc(DType::F32, [tokens, outputs]).unwrap();
        let lora = Some(LoraForward {
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &mut hidden,
        });
        let bias = random(cpu, &[outputs], 6);
        let call = LinearForward {
            x: &x,
            weight: &weight,
            bias: Some(&bias),
            lora,
            precision,
            y: &mut y,
        };
        cpu.linear_forward(call).unwrap();
        let (mut da, mut db) = (random(cpu, &[rank, inputs], 7), random(cpu, &[outputs, rank], 8));
        let mut dx = random(cpu, &[tokens, inputs], 9);
        let lora = LoraBackward {
            x: &x,
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &hidden,
            gradient_a: &mut da,
            gradient_b: &mut db,
        };
        let dx_out = Some((&mut dx, Write::Accumulate));
        let call = LinearBackward {
            dy: &dy,
            weight: &weight,
            lora: Some(lora),
            precision,
            dx: dx_out,
        };
        cpu.linear_backward(call).unwrap();
        read(cpu, [&y, &hidden, &dx, &da, &db])
    });
}

/// Both passes of attention over q and dout `[T, H, D]` and k and v `[T, K, D]`: out, lse, dq, dk and dv.
fn attention_both_ways<B: Backend>(
    device: &B,
    segments: &Segments,
    [q, k, v, dout]: [&Tensor<B>; 4],
    precision: Precision,
) -> Vec<Vec<u8>> {
    let mut out = device.alloc(q.dtype(), q.shape()).unwrap();
    let mut lse = device.alloc(DType::F32, Shape::new(&q.shape().extents()[..2])).unwrap();
    let call = AttentionForward {
        q,
        k,
        v,
        query_segments: segments,
        key_segments: segments,
        scale: 0.2,
        precision,
        out: &mut out,
        lse: &mut lse,
    };
    device.attention_forward(call).unwrap();
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|like| device.alloc(q.dtype(), like.shape()).unwrap());
    let call = AttentionBackward {
        q,
        k,
        v,
        out: &out,
        lse: &lse,
        dout,
        segments,
        scale: 0.2,
        precision,
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
    };
    device.attention_backward(call).unwrap();
    read(device, [&out, &lse, &dq, &dk, &dv])
}

#[test]
fn attention() {
    let segments = Segments::from_lengths([130, 1, 0, 300]);
    let (tokens, heads, kv_heads, dim) = (segments.tokens(), 4, 2, 32);
    same_bits_everywhere!("attention", |cpu, precision| {
        let of = |heads, seed| activation(cpu, precision, &[tokens, heads, dim], seed);
        let (q, k, v, dout) = (of(heads, 1), of(kv_heads, 2), of(kv_heads, 3), of(heads, 4));
        attention_both_ways(cpu, &segments, [&q, &k, &v, &dout], precision)
    });
}

#[test]
fn attention_on_hopper_has_the_same_bits_in_any_order_of_blocks() {
    let segments = Segments::from_lengths([130, 1, 0, 300]);
    let (tokens, heads, kv_heads) = (segments.tokens(), 6, 2);
    for dim in [32, 256] {
        same_bits_on_hopper(|device| {
            let of = |heads, seed| half(device, &[tokens, heads, dim], seed);
            let (q, k, v, dout) = (of(heads, 1), of(kv_heads, 2), of(kv_heads, 3), of(heads, 4));
            attention_both_ways(device, &segments, [&q, &k, &v, &dout], Precision::Bf16)
        });
    }
}

#[test]
fn cross_entropy() {
    let (tokens, width, vocabulary) = (300, 40, 2_000);
    same_bits_everywhere!("linear_cross_entropy", |cpu, precision| {
        let head = Weight::Dense(random(cpu, &[vocabulary, width], 1));
        let x = activation(cpu, precision, &[tokens, width], 2);
        let labels: Vec<i32> = (0..tokens)
            .map(|t| if t % 3 == 0 { -100 } else { (t * 6) as i32 })
            .collect();
        let labels = cpu.upload_i32([tokens], &labels).unwrap();
        let mut losses = cpu.alloc(DType::F32, [tokens]).unwrap();
        let mut dx = cpu.alloc(x.dtype(), [tokens, width]).unwrap();
        let half = cpu.upload_f32([1], &[0.5]).unwrap();
        let dx_out = Some((&mut dx, &half));
        let call = LinearCrossEntropy {
            x: &x,
            head: &head,
            labels: &labels,
            precision,
            losses: &mut losses,
            dx: dx_out,
        };
        cpu.linear_cross_entropy(call).unwrap();
        read(cpu, [&losses, &dx])
    });
}

#[test]
fn norms_activations_and_rotations() {
    let (tokens, width) = (200, 192);
    same_bits_everywhere!("element-wise", |cpu, _precision| {
        let [x, gate, up, dy] = [1, 2, 3, 4].map(|seed| random(cpu, &[tokens, width], seed));
        let weight = random(cpu, &[width], 5);
        let [mut y, mut dx, mut z, mut dgate, mut dup] =
            [6, 7, 8, 9, 10].map(|seed| random(cpu, &[tokens, width], seed));
        let mut rstd = cpu.alloc(DType::F32, [tokens]).unwrap();
        let style = NormWeight::ZeroCentred;
        let call = NormForward {
            x: &x,
            weight: &weight,
            style,
            eps: 1e-6,
            y: &mut y,
            rstd: &mut rstd,
        };
        cpu.rms_norm_forward(call).unwrap();
        let dx_out = (&mut dx, Write::Accumulate);
        let call = NormBackward {
            x: &x,
            weight: &weight,
            style,
            rstd: &rstd,
            dy: &dy,
            dx: dx_out,
        };
        cpu.rms_norm_backward(call).unwrap();
        cpu.swiglu_forward(&gate, &up, &mut z).unwrap();
        cpu.swiglu_backward(&gate, &up, &dy, &mut dgate, &mut dup).unwrap();
        cpu.add_assign(&mut z, &x).unwrap();

        let table = RopeTable {
            cos: random(cpu, &[300, 16], 11),
            sin: random(cpu, &[300, 16], 12),
        };
        let positions: Vec<i32> = (0..tokens as i32).collect();
        let positions = cpu.upload_i32([tokens], &positions).unwrap();
        let mut rotated = random(cpu, &[tokens, 4, 48], 13);
        cpu.rope(&mut rotated, &positions, &table, RopeDirection::Backward)
            .unwrap();
        let mut rows = cpu.alloc(DType::F32, [tokens, width]).unwrap();
        cpu.gather_rows(&Weight::Dense(random(cpu, &[tokens, width], 14)), &positions, &mut rows)
            .unwrap();
        cpu.copy_rows(&x, &mut rows, 0).unwrap();
        read(cpu, [&y, &rstd, &dx, &z, &dgate, &dup, &rotated, &rows])
    });
}

#[test]
fn optimizer_steps_and_norms() {
    same_bits_everywhere!("adamw", |cpu, _precision| {
        let [mut w, g, mut m] = [1, 2, 3].map(|seed| random(cpu, &[90_001], seed));
        let mut v = cpu.zeros(DType::F32, [90_001]).unwrap();
        let settings = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: 4,
            gradient_scale: 0.5,
        };
        cpu.adamw_step(&mut w, &g, &mut m, &mut v, &settings).unwrap();
        let norm = cpu.squared_norm(&[&w, &g, &m, &v]).unwrap();
        let mut results = read(cpu, [&w, &m, &v]);
        results.push(norm.to_le_bytes().to_vec());
        results
    });
}

#[test]
fn quantised_weights() {
    same_bits_everywhere!("quantize_nf4", |cpu, _precision| {
        let weight = cpu.quantize_nf4(&random(cpu, &[301, 333], 1), true).unwrap();
        let Nf4Scales::Nested {
            codes,
            nested_absmax,
            offset,
            ..
        } = &weight.scales
        else {
            unreachable!("nested was asked for");
        };
        let mut results = read(cpu, [&weight.codes, codes, nested_absmax]);
        results.push(offset.to_le_bytes().to_vec());
        let mut values = cpu.alloc(DType::F32, [301, 333]).unwrap();
        cpu.dequantize(&Weight::Nf4(weight), &mut values).unwrap();
        results.extend(read(cpu, [&values]));
        results
    });
}

#[test]
fn grouped_layers() {
    let (tokens, inputs, outputs, rank) = (150, 192, 70, 5);
    let (experts, top) = (6, 3);
    same_bits_everywhere!("grouped_linear", |cpu, precision| {
        let matrix = |seed| Weight::Nf4(cpu.quantize_nf4(&random(cpu, &[outputs, inputs], seed), true).unwrap());
        let mut weight = WeightStack::alloc_like(cpu, experts, &matrix(0)).unwrap();
        for expert in 0..experts {
            cpu.stack_expert(&matrix(expert as u64), expert, &mut weight).unwrap();
        }
        let mut routing = Routing::alloc(cpu, tokens, experts, top).unwrap();
        cpu.route(&random(cpu, &[tokens, experts], 1), true, &mut routing)
            .unwrap();
        let (x, dy) = (random(cpu, &[tokens, inputs], 2), random(cpu, &[tokens, outputs], 3));
        let (a, b) = (
            random(cpu, &[experts, rank, inputs], 4),
            random(cpu, &[experts, outputs, rank], 5),
        );
        let mut hidden = cpu.alloc(DType::F32, [tokens * top, rank]).unwrap();
        let mut y = cpu.alloc(DType::F32, [tokens * top, outputs]).unwrap();
        let lora = Some(GroupedLoraForward {
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &mut hidden,
        });
        let call = GroupedLinearForward {
            x: &x,
            x_order: RowOrder::Token,
            routing: &routing,
            weight: &weight,
            lora,
            precision,
            y: &mut y,
        };
        cpu.grouped_linear_forward(call).unwrap();
        let (mut da, mut db) = (
            cpu.zeros(DType::F32, a.shape()).unwrap(),
            cpu.zeros(DType::F32, b.shape()).unwrap(),
        );
        let mut dx = cpu.alloc(DType::F32, [tokens * top, inputs]).unwrap();
        let lora = Some(GroupedLoraBackward {
            x: &x,
            x_order: RowOrder::Token,
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &hidden,
            gradient_a: &mut da,
            gradient_b: &mut db,
        });
        let call = GroupedLinearBackward {
            dy: &dy,
            dy_order: RowOrder::Token,
            routing: &routing,
            weight: &weight,
            lora,
            precision,
            dx: Some((&mut dx, Write::Overwrite)),
        };
        cpu.grouped_linear_backward(call).unwrap();
        let mut sum = cpu.alloc(DType::F32, [tokens, inputs]).unwrap();
        cpu.combine(&dx, &routing, &mut sum, Write::Overwrite).unwrap();
        read(cpu, [&y, &hidden, &da, &db, &sum])
    });
}

#[test]
fn the_delta_rule() {
    let segments = Segments::from_lengths([70, 1, 66]);
    let (tokens, key_heads, value_heads, dim) = (137, 2, 6, 16);
    same_bits_everywhere!("delta_rule", |cpu, precision| {
        let (q, k) = (
            activation(cpu, precision, &[tokens, key_heads, dim], 1),
            activation(cpu, precision, &[tokens, key_heads, dim], 2),
        );
        let v = activation(cpu, precision, &[tokens, value_heads, dim], 3);
        let decay = cpu
            .upload_f32([tokens, value_heads], &vec![-0.7; tokens * value_heads])
            .unwrap();
        let beta = cpu
            .upload_f32([tokens, value_heads], &vec![0.04; tokens * value_heads])
            .unwrap();
        let like = |tensor: &Tensor<_>| cpu.alloc(tensor.dtype(), tensor.shape()).unwrap();
        let (mut out, mut solved) = (
            like(&v),
            cpu.alloc(DType::F32, [tokens, value_heads, DELTA_CHUNK]).unwrap(),
        );
        let call = DeltaForward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            segments: &segments,
            scale: 0.25,
            state: None,
            out: &mut out,
            solved: &mut solved,
        };
        cpu.delta_rule_forward(call).unwrap();
        let (mut dq, mut dk, mut dv) = (like(&q), like(&k), like(&v));
        let (mut ddecay, mut dbeta) = (like(&decay), like(&beta));
        let call = DeltaBackward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            solved: &solved,
            dout: &v,
            segments: &segments,
            scale: 0.25,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        };
        cpu.delta_rule_backward(call).unwrap();
        read(cpu, [&out, &solved, &dq, &dk, &dv, &ddecay, &dbeta])
    });
}
