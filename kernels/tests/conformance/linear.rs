//! Linear layers, forward and backward.

use brightrun_kernels::DType;
use brightrun_kernels::ops::{
    Device, LinearBackward, LinearForward, LoraBackward, LoraForward, MatmulOps, Precision, Write,
};
use brightrun_kernels::oracle::{Adapter, Layer, Real, linear_backward, linear_forward};
use brightrun_kernels::testing::Random;

use super::backends::{PRECISIONS, Run, Traits, narrow, wide};
use super::weights::{ENCODINGS, Encoding, weight};
use crate::{judged, on_every_backend};

/// One layer: extents, rank (0: no adapter), bias, and whether `dx` accumulates.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    bias: bool,
    accumulate: bool,
    encoding: Encoding,
    precision: Precision,
    activation: DType,
    seed: u64,
}

/// T, I, O, R, bias, accumulate.
const SHAPES: &[(usize, usize, usize, usize, bool, bool)] = &[
    (0, 8, 8, 2, true, false),
    (1, 1, 1, 0, false, false),
    (1, 64, 64, 0, true, false),
    (1, 65, 130, 4, true, true),
    (2, 63, 1, 1, false, true),
    (5, 7, 13, 3, true, false),
    (6, 128, 64, 16, false, false),
    (7, 33, 65, 8, false, true),
    (13, 96, 31, 5, true, true),
    (31, 576, 192, 16, false, false),
    (65, 100, 257, 17, true, false),
    (3, 2_050, 70, 2, false, true),
    (130, 40, 2_070, 0, false, false),
    (40, 288, 150, 16, true, true),
    (129, 96, 200, 9, false, false),
    // Tiles of 64, 128 and 256 tokens of Hopper's kernels, with tails in every direction and several tiles a block.
    (50, 192, 264, 24, true, false),
    (200, 128, 136, 8, false, true),
    (530, 128, 136, 16, true, true),
    (600, 72, 264, 0, false, false),
    // So few tiles for their depth that it is cut into parts: of y, of dx, of the adapter's products.
    (33, CUT, 72, 24, true, true),
    (33, 128, CUT, 8, false, true),
];

/// From this depth on shapes are there for the parts that tensor-core kernels cut them into, and tried at bf16 only.
const CUT: usize = 2_112;

/// Every shape with every encoding, precision and dtype of activations that the backend can afford.
fn shapes<B: Traits>(run: &mut Run<'_, B>) -> Vec<Shape> {
    let mut all = Vec::new();
    for (i, &(tokens, inputs, outputs, rank, bias, accumulate)) in SHAPES.iter().enumerate() {
        for (encoding, precision) in ENCODINGS.into_iter().flat_map(|e| PRECISIONS.map(|p| (e, p))) {
            if precision == Precision::F32 && inputs.max(outputs) >= CUT {
                continue;
            }
            for activation in run.activations() {
                // Tiles are whole, whatever is asked of them.
                if run.affords(tokens.max(32) * inputs.max(64) * outputs.max(64)) {
                    all.push(Shape {
                        tokens,
                        inputs,
                        outputs,
                        rank,
                        bias,
                        accumulate,
                        encoding,
                        precision,
                        activation: *activation,
                        seed: i as u64,
                    });
                }
            }
        }
    }
    all
}

/// Host values of one case.
struct Inputs {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
    old_dx: Vec<f32>,
    old_a: Vec<f32>,
    old_b: Vec<f32>,
}

const SCALE: f32 = 1.75;

impl Inputs {
    fn new(shape: &Shape) -> Self {
        let mut random = Random::new(shape.seed);
        let Shape {
            tokens,
            inputs,
            outputs,
            rank,
            ..
        } = *shape;
        Self {
            x: random.adversarial(tokens * inputs),
            weight: random.normal(outputs * inputs),
            bias: random.normal(outputs),
            a: random.normal(rank * inputs),
            b: random.normal(outputs * rank),
            dy: random.adversarial(tokens * outputs),
            old_dx: random.normal(tokens * inputs),
            old_a: random.normal(rank * inputs),
            old_b: random.normal(outputs * rank),
        }
    }
}

/// The layer's host values in one number type.
struct Host<N> {
    weight: Vec<N>,
    bias: Vec<N>,
    a: Vec<N>,
    b: Vec<N>,
}

impl<N: Real> Host<N> {
    fn new(inputs: &Inputs, weight: &[f32]) -> Self {
        Self {
            weight: narrow(weight),
            bias: narrow(&inputs.bias),
            a: narrow(&inputs.a),
            b: narrow(&inputs.b),
        }
    }

    fn layer(&self, shape: &Shape) -> Layer<'_, N> {
        let adapter = Adapter {
            a: &self.a,
            b: &self.b,
            scale: N::new(f64::from(SCALE)),
            rank: shape.rank,
        };
        Layer {
            weight: &self.weight,
            bias: shape.bias.then_some(self.bias.as_slice()),
            adapter: (shape.rank > 0).then_some(adapter),
            inputs: shape.inputs,
            outputs: shape.outputs,
        }
    }
}

fn forward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let mut host = Inputs::new(shape);
    let (
        device,
        Shape {
            tokens,
            inputs,
            outputs,
            rank,
            ..
        },
    ) = (run.backend, *shape);
    let (weight, values) = weight(device, shape.encoding, [outputs, inputs], &host.weight);
    let x = run.upload(shape.activation, [tokens, inputs], &mut host.x);
    let bias = device.upload_f32([outputs], &host.bias).unwrap();
    let a = device.upload_f32([rank, inputs], &host.a).unwrap();
    let b = device.upload_f32([outputs, rank], &host.b).unwrap();
    let mut hidden = device.alloc(DType::F32, [tokens, rank]).unwrap();
    let mut y = run.output(shape.activation, [tokens, outputs]);
    let lora = LoraForward {
        a: &a,
        b: &b,
        scale: SCALE,
        hidden: &mut hidden,
    };
    let call = LinearForward {
        x: &x,
        weight: &weight,
        bias: shape.bias.then_some(&bias),
        lora: (rank > 0).then_some(lora),
        precision: shape.precision,
        y: &mut y,
    };
    device.linear_forward(call).unwrap();
    let (plain, oracle) = judged!(shape.precision, N, {
        let layer = Host::<N>::new(&host, &values);
        let (y, u) = linear_forward(&narrow::<N>(&host.x), &layer.layer(shape));
        vec![wide(y), wide(u)]
    });
    let mut case = run.case(format_args!("linear_forward {shape:?}"), inputs + rank + 1);
    case.compare("y", &y, &plain[0], &oracle[0]);
    if rank > 0 {
        case.compare("hidden", &hidden, &plain[1], &oracle[1]);
    }
}

fn backward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let mut host = Inputs::new(shape);
    let (
        device,
        Shape {
            tokens,
            inputs,
            outputs,
            rank,
            ..
        },
    ) = (run.backend, *shape);
    let (weight, values) = weight(device, shape.encoding, [outputs, inputs], &host.weight);
    let dy = run.upload(shape.activation, [tokens, outputs], &mut host.dy);
    let x = run.upload(shape.activation, [tokens, inputs], &mut host.x);
    let mut dx = run.upload(shape.activation, [tokens, inputs], &mut host.old_dx);
    // The forward pass's `u`, rounded to f32 once for everybody.
    let exact = Host::<f64>::new(&host, &values);
    let (_, hidden) = linear_forward(&narrow::<f64>(&host.x), &exact.layer(shape));
    let hidden: Vec<f32> = hidden.into_iter().map(|u| u as f32).collect();

    let a = device.upload_f32([rank, inputs], &host.a).unwrap();
    let b = device.upload_f32([outputs, rank], &host.b).unwrap();
    let u = device
        .upload_f32([if rank > 0 { tokens } else { 0 }, rank], &hidden)
        .unwrap();
    let mut gradient_a = device.upload_f32([rank, inputs], &host.old_a).unwrap();
    let mut gradient_b = device.upload_f32([outputs, rank], &host.old_b).unwrap();
    let lora = LoraBackward {
        x: &x,
        a: &a,
        b: &b,
        scale: SCALE,
        hidden: &u,
        gradient_a: &mut gradient_a,
        gradient_b: &mut gradient_b,
    };
    let call = LinearBackward {
        dy: &dy,
        weight: &weight,
        lora: (rank > 0).then_some(lora),
        precision: shape.precision,
        dx: Some((
            &mut dx,
            if shape.accumulate {
                Write::Accumulate
            } else {
                Write::Overwrite
            },
        )),
    };
    device.linear_backward(call).unwrap();
    let (plain, oracle) = judged!(shape.precision, N, {
        let layer = Host::<N>::new(&host, &values);
        let (x, u, dy) = (narrow::<N>(&host.x), narrow::<N>(&hidden), narrow::<N>(&host.dy));
        let gradients = linear_backward(&x, &u, &dy, &layer.layer(shape));
        let add = |new: Vec<N>, old: &[f32]| wide(new.into_iter().zip(narrow::<N>(old)).map(|(a, b)| a + b).collect());
        let dx = if shape.accumulate {
            add(gradients.dx, &host.old_dx)
        } else {
            wide(gradients.dx)
        };
        vec![dx, add(gradients.da, &host.old_a), add(gradients.db, &host.old_b)]
    });
    let mut case = run.case(
        format_args!("linear_backward {shape:?}"),
        outputs.max(tokens) + rank + 1,
    );
    case.compare("dx", &dx, &plain[0], &oracle[0]);
    if rank > 0 {
        case.compare("dA", &gradient_a, &plain[1], &oracle[1]);
        case.compare("dB", &gradient_b, &plain[2], &oracle[2]);
    }
}

#[test]
fn linear_forward_agrees_with_the_oracle() {
    on_every_backend!("linear_forward", [LinearForward], |run| {
        shapes(run).iter().for_each(|shape| forward(run, shape))
    });
}

#[test]
fn linear_backward_agrees_with_the_oracle() {
    on_every_backend!("linear_backward", [LinearForward, LinearBackward], |run| {
        shapes(run).iter().for_each(|shape| backward(run, shape))
    });
}

#[test]
fn without_dx_only_the_adapter_gradients_are_made() {
    on_every_backend!("linear_backward, no dx", [LinearBackward], |run| {
        let device = run.backend;
        let (weight, _) = weight(device, Encoding::Bf16, [2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let one = |shape: [usize; 2]| device.upload_f32(shape, &vec![1.0; shape[0] * shape[1]]).unwrap();
        let (x, dy, a, b, u) = (one([3, 2]), one([3, 2]), one([1, 2]), one([2, 1]), one([3, 1]));
        let (mut gradient_a, mut gradient_b) = (one([1, 2]), one([2, 1]));
        let lora = LoraBackward {
            x: &x,
            a: &a,
            b: &b,
            scale: 0.5,
            hidden: &u,
            gradient_a: &mut gradient_a,
            gradient_b: &mut gradient_b,
        };
        let call = LinearBackward {
            dy: &dy,
            weight: &weight,
            lora: Some(lora),
            precision: Precision::Bf16,
            dx: None,
        };
        device.linear_backward(call).unwrap();
        // v = 0.5 · (1 + 1) = 1 for each of three tokens; the old gradient is 1.
        let mut case = run.case("no dx", 3);
        case.compare("dA", &gradient_a, &[4.0, 4.0], &[4.0, 4.0]);
        case.compare("dB", &gradient_b, &[2.5, 2.5], &[2.5, 2.5]);
    });
}

#[test]
fn a_layer_without_inputs_gives_its_bias_and_an_adapter_of_rank_zero_nothing() {
    on_every_backend!("degenerate layers", [LinearForward, LinearBackward], |run| {
        let device = run.backend;
        let empty = |shape: [usize; 2]| device.upload_f32(shape, &[]).unwrap();
        let bias = device.upload_f32([2], &[3.0, 4.0]).unwrap();
        for (precision, inputs) in PRECISIONS
            .into_iter()
            .flat_map(|precision| [(precision, 0), (precision, 1)])
        {
            let (weight, _) = weight(device, Encoding::F32, [2, inputs], &vec![2.0; 2 * inputs]);
            let x = device.upload_f32([3, inputs], &vec![1.0; 3 * inputs]).unwrap();
            let (a, b, mut hidden) = (empty([0, inputs]), empty([2, 0]), empty([3, 0]));
            let mut y = device.alloc(DType::F32, [3, 2]).unwrap();
            let lora = Some(LoraForward {
                a: &a,
                b: &b,
                scale: 1.0,
                hidden: &mut hidden,
            });
            let call = LinearForward {
                x: &x,
                weight: &weight,
                bias: Some(&bias),
                lora,
                precision,
                y: &mut y,
            };
            device.linear_forward(call).unwrap();
            let (mut gradient_a, mut gradient_b) = (empty([0, inputs]), empty([2, 0]));
            let lora = Some(LoraBackward {
                x: &x,
                a: &a,
                b: &b,
                scale: 1.0,
                hidden: &hidden,
                gradient_a: &mut gradient_a,
                gradient_b: &mut gradient_b,
            });
            let mut dx = device.alloc(DType::F32, [3, inputs]).unwrap();
            let dx_out = Some((&mut dx, Write::Overwrite));
            device
                .linear_backward(LinearBackward {
                    dy: &y,
                    weight: &weight,
                    lora,
                    precision,
                    dx: dx_out,
                })
                .unwrap();
            let extra = 2.0 * inputs as f64;
            let row = [3.0 + extra, 4.0 + extra];
            let mut case = run.case("degenerate layer", 1);
            case.compare("y", &y, &row.repeat(3), &row.repeat(3));
            let gradient = vec![2.0 * (row[0] + row[1]); 3 * inputs];
            case.compare("dx", &dx, &gradient, &gradient);
        }
    });
}
