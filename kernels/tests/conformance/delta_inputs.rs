//! What lies between DeltaNet's input projections and its delta rule, in one op each way: it must have the bits of the ops that it
//! stands for, each of which is judged by itself.

use brightrun_kernels::ops::{
    Columns, ConvolutionBackward, ConvolutionForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Segments, Tensor};

use super::backends::{Run, Traits};
use super::weights::dense;
use crate::on_every_backend;

/// Document lengths, key and value heads, their dimensions, taps.
struct Shape {
    documents: &'static [usize],
    heads: (usize, usize),
    dims: (usize, usize),
    taps: usize,
}

/// Lengths around a strip of rows and a convolution, heads of one lane to a whole warp, and heads that are not whole packs.
const SHAPES: &[Shape] = &[
    shape(&[], (1, 1), (8, 8), 4),
    shape(&[1], (1, 1), (8, 8), 4),
    shape(&[31, 1, 0, 2], (2, 4), (16, 8), 4),
    shape(&[32], (2, 2), (64, 24), 4),
    shape(&[33, 1, 1, 1], (1, 3), (256, 8), 4),
    shape(&[70], (3, 6), (32, 40), 4),
    shape(&[5, 9], (1, 2), (24, 8), 4),
    shape(&[40], (2, 4), (12, 20), 4),
    shape(&[9], (1, 1), (16, 16), 2),
];

const fn shape(documents: &'static [usize], heads: (usize, usize), dims: (usize, usize), taps: usize) -> Shape {
    Shape {
        documents,
        heads,
        dims,
        taps,
    }
}

const EPS: f32 = 1e-6;

/// q, k, v, z, decay and beta of one op after the other.
fn by_parts<B: Traits>(run: &Run<'_, B>, shape: &Shape, call: &DeltaInputsForward<'_, B>) -> Vec<Vec<u8>> {
    let (device, tokens, dtype) = (run.backend, call.segments.tokens(), call.fused.dtype());
    let (key_heads, value_heads) = shape.heads;
    let (key, group) = (shape.dims.0, value_heads / key_heads * shape.dims.1);
    let cut = |fused: &Tensor<B>, source: usize, width: usize| {
        let mut part = device.alloc(dtype, [tokens, key_heads * width]).unwrap();
        let columns = Columns {
            groups: key_heads,
            source,
            target: 0,
            width,
        };
        device.copy_columns(fused, &mut part, columns).unwrap();
        part
    };
    let convolved = |part: usize, source: usize, width: usize| {
        let x = cut(call.fused, source, width);
        let mut y = device.alloc(dtype, x.shape()).unwrap();
        let forward = ConvolutionForward {
            x: &x,
            weight: call.taps[part],
            bias: None,
            segments: call.segments,
            state: None,
            y: &mut y,
        };
        device.convolution_forward(forward).unwrap();
        y
    };
    let mut results = Vec::new();
    for part in 0..2 {
        let raw = convolved(part, part * key, key)
            .reshaped([tokens, key_heads, key])
            .unwrap();
        let mut y = device.alloc(dtype, raw.shape()).unwrap();
        let mut rnorm = device.alloc(DType::F32, [tokens * key_heads]).unwrap();
        device.l2_norm_forward(&raw, EPS, &mut y, &mut rnorm).unwrap();
        results.push(device.read(&y).unwrap());
    }
    results.push(device.read(&convolved(2, 2 * key, group)).unwrap());
    results.push(device.read(&cut(call.fused, 2 * key + group, group)).unwrap());
    let ratio = value_heads / key_heads;
    let [mut decay, mut beta] = [(); 2].map(|()| device.alloc(DType::F32, [tokens, value_heads]).unwrap());
    let gates = DeltaGatesForward {
        a: &cut(call.ba, ratio, ratio),
        b: &cut(call.ba, 0, ratio),
        a_log: call.a_log,
        dt_bias: call.dt_bias,
        decay: &mut decay,
        beta: &mut beta,
    };
    device.delta_gates_forward(gates).unwrap();
    results.extend([&decay, &beta].map(|tensor| device.read(tensor).unwrap()));
    results
}

fn inputs<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, activation: DType, weights: DType) {
    let segments = Segments::from_lengths(shape.documents.iter().copied());
    let (tokens, (key_heads, value_heads), (key_dim, value_dim)) = (segments.tokens(), shape.heads, shape.dims);
    let mut random = Random::new((tokens * key_dim + value_dim) as u64);
    let device = run.backend;
    let columns = 2 * key_heads * key_dim + 2 * value_heads * value_dim;
    let mut fused_values = random.adversarial(tokens * columns);
    let fused = run.upload(activation, [tokens, columns], &mut fused_values);
    let ba = run.upload(
        activation,
        [tokens, 2 * value_heads],
        &mut random.normal(tokens * 2 * value_heads),
    );
    let (keys, values) = (key_heads * key_dim, value_heads * value_dim);
    let taps = [keys, keys, values].map(|channels| {
        dense(
            device,
            weights,
            [channels, shape.taps],
            &random.normal(channels * shape.taps),
        )
    });
    let [a_log, dt_bias] = [(); 2].map(|()| device.upload_f32([value_heads], &random.normal(value_heads)).unwrap());
    let [mut q, mut k] = [(); 2].map(|()| run.output(activation, [tokens, key_heads, key_dim]));
    let [mut v, mut z] = [(); 2].map(|()| run.output(activation, [tokens, value_heads, value_dim]));
    let [mut decay, mut beta] = [(); 2].map(|()| device.alloc(DType::F32, [tokens, value_heads]).unwrap());
    let call = DeltaInputsForward {
        fused: &fused,
        ba: &ba,
        taps: taps.each_ref(),
        a_log: &a_log,
        dt_bias: &dt_bias,
        eps: EPS,
        segments: &segments,
        q: &mut q,
        k: &mut k,
        v: &mut v,
        z: &mut z,
        decay: &mut decay,
        beta: &mut beta,
    };
    let parts = by_parts(run, shape, &call);
    device.delta_inputs_forward(call).unwrap();
    let names = ["q", "k", "v", "z", "decay", "beta"];
    for ((name, ours), part) in names.into_iter().zip([&q, &k, &v, &z, &decay, &beta]).zip(parts) {
        let ours = device.read(ours).unwrap();
        let different = ours.iter().zip(&part).position(|(a, b)| a != b);
        assert!(
            ours.len() == part.len() && different.is_none(),
            "{name} differs at byte {different:?}: {:?} {:?} {:?} {activation} {weights} on {}",
            shape.documents,
            shape.heads,
            shape.dims,
            run.name
        );
    }
    run.case("delta_inputs_forward", 0);
}

#[test]
fn one_op_in_front_of_the_delta_rule_has_the_bits_of_its_parts() {
    on_every_backend!(
        "delta_inputs_forward",
        [ConvolutionForward, L2NormForward, DeltaGatesForward, CopyColumns],
        |run| {
            for (i, shape) in SHAPES.iter().enumerate() {
                for (j, activation) in run.activations().iter().enumerate() {
                    let weights = [DType::F32, DType::BF16][(i + j) % 2];
                    inputs(run, shape, *activation, weights);
                }
            }
        }
    );
}

/// dfused and dba of one op after the other.
fn back_by_parts<B: Traits>(run: &Run<'_, B>, shape: &Shape, call: &DeltaInputsBackward<'_, B>) -> [Vec<u8>; 2] {
    let (device, tokens, dtype) = (run.backend, call.segments.tokens(), call.fused.dtype());
    let (key_heads, value_heads) = shape.heads;
    let (key, ratio) = (shape.dims.0, value_heads / key_heads);
    let group = ratio * shape.dims.1;
    let place = |source: usize, target: usize, width: usize| Columns {
        groups: key_heads,
        source,
        target,
        width,
    };
    let cut = |from: &Tensor<B>, source: usize, width: usize| {
        let mut part = device.alloc(dtype, [tokens, key_heads * width]).unwrap();
        device.copy_columns(from, &mut part, place(source, 0, width)).unwrap();
        part
    };
    let mut dfused = device.alloc(dtype, call.fused.shape()).unwrap();
    let mut dba = device.alloc(dtype, call.ba.shape()).unwrap();
    let units = [(0, Some(call.dq)), (key, Some(call.dk)), (2 * key, None)];
    for ((source, dy), taps) in units.into_iter().zip(call.taps) {
        let width = if dy.is_some() { key } else { group };
        let x = cut(call.fused, source, width);
        let mut own = device.alloc(dtype, x.shape()).unwrap();
        match dy {
            Some(dy) => {
                let mut raw = device.alloc(dtype, x.shape()).unwrap();
                let forward = ConvolutionForward {
                    x: &x,
                    weight: taps,
                    bias: None,
                    segments: call.segments,
                    state: None,
                    y: &mut raw,
                };
                device.convolution_forward(forward).unwrap();
                let raw = raw.reshaped(dy.shape()).unwrap();
                let mut unit = device.alloc(dtype, raw.shape()).unwrap();
                let mut rnorm = device.alloc(DType::F32, [tokens * key_heads]).unwrap();
                device.l2_norm_forward(&raw, EPS, &mut unit, &mut rnorm).unwrap();
                device.l2_norm_backward(&raw, &rnorm, dy, &mut unit).unwrap();
                own = unit.reshaped(own.shape()).unwrap();
            }
            None => device.copy_columns(call.dv, &mut own, place(0, 0, group)).unwrap(),
        }
        let mut dx = device.alloc(dtype, x.shape()).unwrap();
        let backward = ConvolutionBackward {
            x: &x,
            weight: taps,
            bias: None,
            segments: call.segments,
            dy: &own,
            dx: &mut dx,
        };
        device.convolution_backward(backward).unwrap();
        device.copy_columns(&dx, &mut dfused, place(0, source, width)).unwrap();
    }
    device
        .copy_columns(call.dz, &mut dfused, place(0, 2 * key + group, group))
        .unwrap();
    let a = cut(call.ba, ratio, ratio);
    let [mut da, mut db] = [(); 2].map(|()| device.alloc(dtype, a.shape()).unwrap());
    let gates = DeltaGatesBackward {
        a: &a,
        a_log: call.a_log,
        dt_bias: call.dt_bias,
        beta: call.beta,
        ddecay: call.ddecay,
        dbeta: call.dbeta,
        da: &mut da,
        db: &mut db,
    };
    device.delta_gates_backward(gates).unwrap();
    device.copy_columns(&db, &mut dba, place(0, 0, ratio)).unwrap();
    device.copy_columns(&da, &mut dba, place(0, ratio, ratio)).unwrap();
    [dfused, dba].map(|tensor| device.read(&tensor).unwrap())
}

fn inputs_back<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, activation: DType, weights: DType) {
    let segments = Segments::from_lengths(shape.documents.iter().copied());
    let (tokens, (key_heads, value_heads), (key_dim, value_dim)) = (segments.tokens(), shape.heads, shape.dims);
    let mut random = Random::new((tokens * key_dim + 3 * value_dim) as u64);
    let device = run.backend;
    let columns = 2 * key_heads * key_dim + 2 * value_heads * value_dim;
    let mut activations = |heads: usize, width: usize| {
        let mut values = random.normal(tokens * heads * width);
        run.upload(activation, [tokens, heads, width], &mut values)
    };
    let [fused, ba] = [columns, 2 * value_heads].map(|width| {
        let values = activations(1, width);
        values.reshaped([tokens, width]).unwrap()
    });
    let [dq, dk] = [(); 2].map(|()| activations(key_heads, key_dim));
    let [dv, dz] = [(); 2].map(|()| activations(value_heads, value_dim));
    let (keys, values) = (key_heads * key_dim, value_heads * value_dim);
    let taps = [keys, keys, values].map(|channels| {
        let values = random.normal(channels * shape.taps);
        dense(device, weights, [channels, shape.taps], &values)
    });
    let [a_log, dt_bias] = [(); 2].map(|()| device.upload_f32([value_heads], &random.normal(value_heads)).unwrap());
    let [beta, ddecay, dbeta] = [(); 3].map(|()| {
        let gates: Vec<f32> = (0..tokens * value_heads).map(|_| random.unit() as f32).collect();
        device.upload_f32([tokens, value_heads], &gates).unwrap()
    });
    let mut dfused = run.output(activation, [tokens, columns]);
    let mut dba = run.output(activation, [tokens, 2 * value_heads]);
    let call = DeltaInputsBackward {
        fused: &fused,
        ba: &ba,
        taps: taps.each_ref(),
        a_log: &a_log,
        dt_bias: &dt_bias,
        eps: EPS,
        segments: &segments,
        beta: &beta,
        dq: &dq,
        dk: &dk,
        dv: &dv,
        dz: &dz,
        ddecay: &ddecay,
        dbeta: &dbeta,
        dfused: &mut dfused,
        dba: &mut dba,
    };
    let parts = back_by_parts(run, shape, &call);
    device.delta_inputs_backward(call).unwrap();
    for ((name, ours), part) in ["dfused", "dba"].into_iter().zip([&dfused, &dba]).zip(parts) {
        let ours = device.read(ours).unwrap();
        let different = ours.iter().zip(&part).position(|(a, b)| a != b);
        assert!(
            ours.len() == part.len() && different.is_none(),
            "{name} differs at byte {different:?}: {:?} {:?} {:?} {activation} {weights} on {}",
            shape.documents,
            shape.heads,
            shape.dims,
            run.name
        );
    }
    run.case("delta_inputs_backward", 0);
}

#[test]
fn one_op_behind_the_delta_rule_has_the_bits_of_its_parts() {
    on_every_backend!(
        "delta_inputs_backward",
        [ConvolutionBackward, L2NormBackward, DeltaGatesBackward, CopyColumns],
        |run| {
            for (i, shape) in SHAPES.iter().enumerate() {
                for (j, activation) in run.activations().iter().enumerate() {
                    let weights = [DType::F32, DType::BF16][(i + j) % 2];
                    inputs_back(run, shape, *activation, weights);
                }
            }
        }
    );
}
