//! Gates, gated and l2 norms, columns, and the short convolution.

use brightrun_kernels::ops::{
    Columns, ConvolutionBackward, ConvolutionForward, Device, GateOps, GatedNormBackward, GatedNormForward, Precision,
    SigmoidGateBackward, Write,
};
use brightrun_kernels::oracle::{
    Filter, Real, convolution_backward, convolution_forward, gated_norm_backward, gated_norm_forward, l2_norm_backward,
    l2_norm_forward, sigmoid_gate_backward, sigmoid_gate_forward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Error, Segments};

use super::backends::{Run, Traits, narrow, wide};
use super::weights::dense;
use crate::{judged, on_every_backend};

/// Rows and columns: nothing, one, odd tails, more than a task.
const SHAPES: &[[usize; 2]] = &[[0, 4], [1, 1], [3, 16], [5, 17], [7, 63], [2, 64], [33, 65], [40, 1000]];

/// Gates far out on both sides too, where a careless logistic overflows.
fn gates(random: &mut Random, count: usize) -> Vec<f32> {
    let values = random.normal(count);
    values
        .into_iter()
        .map(|value| value * [1.0, 10.0, 40.0, 200.0][random.below(4)])
        .collect()
}

fn sigmoid_gate<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], (scalar, write): (bool, Write), activation: DType) {
    let [rows, width] = shape;
    let mut random = Random::new(width as u64);
    let gate_shape = [rows, if scalar { 1 } else { width }];
    let count = rows * width;
    let mut gate = gates(&mut random, gate_shape[0] * gate_shape[1]);
    let (mut x, mut dy, mut old) = (
        random.adversarial(count),
        random.adversarial(count),
        random.normal(count),
    );
    let device = run.backend;
    let [x_t, dy_t, mut y] = [&mut x, &mut dy, &mut old].map(|values| run.upload(activation, shape, values));
    let gate_t = run.upload(activation, gate_shape, &mut gate);
    let (mut dx, mut dgate) = (run.output(activation, shape), run.output(activation, gate_shape));
    device.sigmoid_gate_forward(&x_t, &gate_t, &mut y, write).unwrap();
    let call = SigmoidGateBackward {
        x: &x_t,
        gate: &gate_t,
        dy: &dy_t,
        dx: &mut dx,
        dgate: &mut dgate,
    };
    device.sigmoid_gate_backward(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (x, gate, dy) = (narrow::<N>(&x), narrow::<N>(&gate), narrow::<N>(&dy));
        let mut y = sigmoid_gate_forward(&x, &gate);
        if write == Write::Accumulate {
            y = y.into_iter().zip(narrow::<N>(&old)).map(|(y, old)| y + old).collect();
        }
        let (dx, dgate) = sigmoid_gate_backward(&x, &gate, &dy);
        vec![wide(y), wide(dx), wide(dgate)]
    });
    let mut case = run.case(
        format_args!("sigmoid_gate {shape:?} scalar: {scalar} {write:?} {activation}"),
        4 + width,
    );
    for (i, (name, tensor)) in [("y", &y), ("dx", &dx), ("dgate", &dgate)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

fn gated_norm<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], dtype: DType, activation: DType) {
    const EPS: f32 = 1e-6;
    let [rows, width] = shape;
    let mut random = Random::new(width as u64);
    let count = rows * width;
    let (mut x, mut gate, mut dy) = (
        random.adversarial(count),
        gates(&mut random, count),
        random.normal(count),
    );
    // A row of zeros must neither divide by zero nor leave NaN behind.
    x.iter_mut().take(width).for_each(|x| *x = 0.0);
    let device = run.backend;
    let weight_t = dense(device, dtype, [1, width], &random.normal(width))
        .reshaped([width])
        .unwrap();
    let weight = device.read_f32(&weight_t).unwrap();
    let [x_t, gate_t, dy_t] = [&mut x, &mut gate, &mut dy].map(|values| run.upload(activation, shape, values));
    let [mut y, mut dx, mut dgate] = [(); 3].map(|()| run.output(activation, shape));
    let mut rstd = device.alloc(DType::F32, [rows]).unwrap();
    let call = GatedNormForward {
        x: &x_t,
        gate: &gate_t,
        weight: &weight_t,
        eps: EPS,
        y: &mut y,
        rstd: &mut rstd,
    };
    device.gated_norm_forward(call).unwrap();
    let reciprocals = device.read_f32(&rstd).unwrap();
    let call = GatedNormBackward {
        x: &x_t,
        gate: &gate_t,
        weight: &weight_t,
        rstd: &rstd,
        dy: &dy_t,
        dx: &mut dx,
        dgate: &mut dgate,
    };
    device.gated_norm_backward(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (x, gate, weight) = (narrow::<N>(&x), narrow::<N>(&gate), narrow::<N>(&weight));
        let (y, rstd) = gated_norm_forward(&x, &gate, &weight, N::new(f64::from(EPS)));
        let given = narrow::<N>(&reciprocals);
        let (dx, dgate) = gated_norm_backward(&x, &gate, &weight, &given, &narrow::<N>(&dy));
        vec![wide(y), wide(rstd), wide(dx), wide(dgate)]
    });
    let mut case = run.case(format_args!("gated_norm {shape:?} {dtype} {activation}"), width + 4);
    let ours = [("y", &y), ("rstd", &rstd), ("dx", &dx), ("dgate", &dgate)];
    for (i, (name, tensor)) in ours.into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

fn l2_norm<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], activation: DType) {
    const EPS: f32 = 1e-6;
    let [rows, width] = shape;
    let mut random = Random::new(width as u64);
    let count = rows * width;
    let (mut x, mut dy) = (random.adversarial(count), random.normal(count));
    x.iter_mut().take(width).for_each(|x| *x = 0.0);
    let device = run.backend;
    let [x_t, dy_t] = [&mut x, &mut dy].map(|values| run.upload(activation, shape, values));
    let [mut y, mut dx] = [(); 2].map(|()| run.output(activation, shape));
    let mut rnorm = device.alloc(DType::F32, [rows]).unwrap();
    device.l2_norm_forward(&x_t, EPS, &mut y, &mut rnorm).unwrap();
    let reciprocals = device.read_f32(&rnorm).unwrap();
    device.l2_norm_backward(&x_t, &rnorm, &dy_t, &mut dx).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let x = narrow::<N>(&x);
        let (y, rnorm) = l2_norm_forward(&x, width, N::new(f64::from(EPS)));
        let dx = l2_norm_backward(&x, width, &narrow::<N>(&reciprocals), &narrow::<N>(&dy));
        vec![wide(y), wide(rnorm), wide(dx)]
    });
    let mut case = run.case(format_args!("l2_norm {shape:?} {activation}"), width + 4);
    for (i, (name, tensor)) in [("y", &y), ("rnorm", &rnorm), ("dx", &dx)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

/// Every shape in every dtype that activations may have.
fn cases<B: Traits>(run: &Run<'_, B>) -> impl Iterator<Item = ([usize; 2], DType)> + use<B> {
    let dtypes = run.activations();
    SHAPES
        .iter()
        .flat_map(|shape| dtypes.iter().map(|dtype| (*shape, *dtype)))
}

#[test]
fn gates_follow_their_formulas() {
    on_every_backend!("sigmoid_gate", [SigmoidGateForward, SigmoidGateBackward], |run| {
        for (shape, activation) in cases(run) {
            sigmoid_gate(run, shape, (false, Write::Overwrite), activation);
            sigmoid_gate(run, shape, (true, Write::Accumulate), activation);
        }
    });
}

#[test]
fn gated_norms_follow_their_formulas() {
    on_every_backend!("gated_norm", [GatedNormForward, GatedNormBackward], |run| {
        for (shape, activation) in cases(run) {
            gated_norm(run, shape, DType::F32, activation);
            gated_norm(run, shape, DType::BF16, activation);
        }
    });
}

#[test]
fn l2_norms_follow_their_formulas_and_survive_a_row_of_zeros() {
    on_every_backend!(
        "l2_norm",
        [L2NormForward, L2NormBackward],
        |run| for (shape, activation) in cases(run) {
            l2_norm(run, shape, activation);
        }
    );
}

#[test]
fn columns_go_from_group_to_group_and_leave_the_rest_alone() {
    on_every_backend!("copy_columns", [CopyColumns], |run| {
        let device = run.backend;
        // Two heads of (query, gate), each two wide; take the gates behind a first column.
        let columns = Columns {
            groups: 2,
            source: 2,
            target: 1,
            width: 2,
        };
        // Activations, and frozen tables, which are bf16 on the CPU too.
        for dtype in [DType::F32, DType::BF16] {
            let mut numbers: Vec<f32> = (0..16).map(|i| i as f32).collect();
            let source = run.upload(dtype, [2, 8], &mut numbers);
            let mut target = run.upload(dtype, [2, 2, 3], &mut [-1.0; 12]);
            device.copy_columns(&source, &mut target, columns).unwrap();
            let expected = [-1.0, 2.0, 3.0, -1.0, 6.0, 7.0, -1.0, 10.0, 11.0, -1.0, 14.0, 15.0];
            run.case(format_args!("copy_columns {dtype}"), 0)
                .compare("target", &target, &expected, &expected);
        }
        let source = device.zeros(DType::F32, [2, 8]).unwrap();
        let mut target = device.zeros(DType::F32, [2, 2, 3]).unwrap();
        for columns in [
            Columns { groups: 3, ..columns },
            Columns { groups: 0, ..columns },
            Columns { source: 3, ..columns },
            Columns {
                width: usize::MAX,
                ..columns
            },
        ] {
            let refused = device.copy_columns(&source, &mut target, columns);
            assert!(matches!(refused, Err(Error::Value { .. })), "{}: {columns:?}", run.name);
        }
    });
}

/// Document lengths, channels, taps, bias.
const CONVOLUTIONS: &[(&[usize], usize, usize, bool)] = &[
    (&[], 3, 4, false),
    (&[1], 1, 1, true),
    (&[5], 8, 2, false),
    (&[2, 0, 1, 7, 3], 17, 4, true),
    (&[3, 3], 5, 3, false),
    (&[1, 1, 1], 4, 6, true),
    (&[40, 25], 1000, 4, false),
    (&[1, 70, 2, 33], 20, 4, true),
    (&[66, 2], 9, 5, false),
];

fn convolution<B: Traits>(run: &mut Run<'_, B>, case: usize, dtype: DType, activation: DType) {
    let (documents, channels, taps, biased) = CONVOLUTIONS[case];
    let segments = Segments::from_lengths(documents.iter().copied());
    let mut random = Random::new(case as u64);
    let shape = [segments.tokens(), channels];
    let (mut x, mut dy) = (random.normal(shape[0] * channels), random.normal(shape[0] * channels));
    let past = random.normal(documents.len() * (taps - 1) * channels);
    let device = run.backend;
    let weight_t = dense(device, dtype, [channels, taps], &random.normal(channels * taps));
    let bias_t = dense(device, dtype, [1, channels], &random.normal(channels))
        .reshaped([channels])
        .unwrap();
    let weight = device.read_f32(&weight_t).unwrap();
    let bias = if biased {
        device.read_f32(&bias_t).unwrap()
    } else {
        vec![0.0; channels]
    };
    let bias_t = biased.then_some(&bias_t);
    let [x_t, dy_t] = [&mut x, &mut dy].map(|values| run.upload(activation, shape, values));
    let extents = [documents.len(), taps - 1, channels];
    let mut state = device.upload_f32(extents, &past).unwrap();
    let [mut y, mut continued, mut dx] = [(); 3].map(|()| run.output(activation, shape));
    for (y, state) in [(&mut y, None), (&mut continued, Some(&mut state))] {
        let call = ConvolutionForward {
            x: &x_t,
            weight: &weight_t,
            bias: bias_t,
            segments: &segments,
            state,
            y,
        };
        device.convolution_forward(call).unwrap();
    }
    let call = ConvolutionBackward {
        x: &x_t,
        weight: &weight_t,
        bias: bias_t,
        segments: &segments,
        dy: &dy_t,
        dx: &mut dx,
    };
    device.convolution_backward(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (x, weight, bias) = (narrow::<N>(&x), narrow::<N>(&weight), narrow::<N>(&bias));
        let filter = Filter {
            weight: &weight,
            bias: &bias,
        };
        let (mut nothing, mut state) = (vec![N::new(0.0); past.len()], narrow::<N>(&past));
        let y = convolution_forward(&x, &filter, &segments, &mut nothing);
        let continued = convolution_forward(&x, &filter, &segments, &mut state);
        let dx = convolution_backward(&x, &filter, &segments, &narrow::<N>(&dy));
        vec![wide(y), wide(continued), wide(state), wide(dx)]
    });
    let mut judge = run.case(
        format_args!("convolution {:?} {dtype} {activation}", CONVOLUTIONS[case]),
        taps + 4,
    );
    let ours = [("y", &y), ("y continued", &continued), ("state", &state), ("dx", &dx)];
    for (i, (name, tensor)) in ours.into_iter().enumerate() {
        judge.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

#[test]
fn convolutions_follow_their_formulas_and_stop_at_documents() {
    on_every_backend!("convolution", [ConvolutionForward, ConvolutionBackward], |run| {
        for case in 0..CONVOLUTIONS.len() {
            for activation in run.activations() {
                convolution(run, case, DType::F32, *activation);
                convolution(run, case, DType::BF16, *activation);
            }
        }
    });
}
