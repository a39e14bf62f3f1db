//! Fused ops of routed experts: both wide projections with their activation, the way back through them, and the sum that ends a
//! layer. What they fuse is judged as its parts are: gate and up are one layer of `2·F` outputs to the oracle.

use brightrun_kernels::ops::{
    CombineResidual, GroupedLoraBackward, GroupedLoraForward, GroupedPairBackward, GroupedSwigluForward, Precision,
    RowOrder,
};
use brightrun_kernels::oracle::{
    Adapter, Layer, LinearGradients, Real, by_token, combine, grouped_linear_backward, grouped_linear_forward,
    routed_swiglu_forward, sigmoid_gate_forward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, WeightStack};

use super::backends::{PRECISIONS, Run, Traits, narrow, wide};
use super::moe::{CROWDS, Crowd, MANY, SCALE, accumulated, as_route};
use super::weights::{ENCODINGS, Encoding, weight};
use crate::{judged, on_every_backend};

/// Both wide projections of one layer.
#[derive(Clone, Copy, Debug)]
struct Shape {
    crowd: Crowd,
    inputs: usize,
    /// `F`.
    width: usize,
    rank: usize,
    encoding: Encoding,
    precision: Precision,
    activation: DType,
    /// All tokens go to the last expert first.
    crowded: bool,
}

/// I, F, R: whole tiles and one more, less than a tile, odd, and a rank beyond a tile; then what Hopper's kernels take, with tails in
/// every direction and a rank beyond a stage.
const LAYERS: &[(usize, usize, usize)] = &[
    (64, 65, 0),
    (33, 7, 3),
    (130, 64, 8),
    (192, 24, 65),
    (128, 72, 16),
    (64, 136, 0),
    (72, 24, 72),
];

fn shapes<B: Traits>(run: &mut Run<'_, B>) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (i, crowd) in CROWDS.iter().enumerate() {
        for (j, (inputs, width, rank)) in LAYERS.iter().enumerate() {
            for (k, encoding) in ENCODINGS.into_iter().enumerate() {
                // The large crowds run once in every encoding.
                let tiles = crowd.slots().div_ceil(64) + crowd.experts.min(crowd.slots());
                let work = 2 * tiles * 64 * inputs.next_multiple_of(64) * width.next_multiple_of(64);
                let is_beside_the_point = crowd.experts > 100 && j > 0 || crowd.tokens == MANY && j < 4;
                if is_beside_the_point || !run.affords(work) {
                    continue;
                }
                let activations = run.activations();
                shapes.push(Shape {
                    crowd: *crowd,
                    inputs: *inputs,
                    width: *width,
                    rank: *rank,
                    encoding,
                    precision: PRECISIONS[usize::from((i + j + k) % 3 > 0)],
                    activation: activations[(i + k) % activations.len()],
                    crowded: (i + j) % 2 == 1,
                });
            }
        }
    }
    shapes
}

/// Host values of a case.
struct Host {
    logits: Vec<f32>,
    x: Vec<f32>,
    /// Of gate and of up, expert by expert.
    weights: [Vec<Vec<f32>>; 2],
    a: Vec<f32>,
    b: Vec<f32>,
    /// Gradients of gate and of up.
    dy: [Vec<f32>; 2],
    hidden: Vec<f32>,
    old_a: Vec<f32>,
    old_b: Vec<f32>,
}

impl Shape {
    fn host(&self) -> Host {
        let Self {
            crowd,
            inputs,
            width,
            rank,
            ..
        } = *self;
        let mut random = Random::new((inputs * width + rank) as u64);
        let mut logits = crowd.logits(&mut random);
        if self.crowded {
            for row in logits.chunks_exact_mut(crowd.experts) {
                row[crowd.experts - 1] += 100.0;
            }
        }
        let mut experts = || (0..crowd.experts).map(|_| random.normal(width * inputs)).collect();
        let weights = [experts(), experts()];
        Host {
            logits,
            x: random.adversarial(crowd.tokens * inputs),
            weights,
            a: random.normal(crowd.experts * rank * inputs),
            b: random.normal(crowd.experts * 2 * width * rank),
            dy: [(); 2].map(|()| random.adversarial(crowd.slots() * width)),
            hidden: random.normal(crowd.slots() * rank),
            old_a: random.normal(crowd.experts * rank * inputs),
            old_b: random.normal(crowd.experts * 2 * width * rank),
        }
    }

    /// One projection's stack on a device, and the values each expert's matrix then has.
    fn stack<B: Traits>(&self, device: &B, weights: &[Vec<f32>]) -> (WeightStack<B>, Vec<Vec<f32>>) {
        let (mut stack, mut decoded) = (None, Vec::new());
        for (expert, values) in weights.iter().enumerate() {
            let (weight, values) = weight(device, self.encoding, [self.width, self.inputs], values);
            let stack =
                stack.get_or_insert_with(|| WeightStack::alloc_like(device, self.crowd.experts, &weight).unwrap());
            device.stack_expert(&weight, expert, stack).unwrap();
            decoded.push(values);
        }
        (stack.unwrap(), decoded)
    }
}

/// Gate over up, for each expert, in one number type.
struct Both<N> {
    weights: Vec<Vec<N>>,
    a: Vec<N>,
    b: Vec<N>,
}

impl<N: Real> Both<N> {
    fn new(host: &Host, gate: &[Vec<f32>], up: &[Vec<f32>]) -> Self {
        let both = gate.iter().zip(up);
        Self {
            weights: both
                .map(|(gate, up)| [narrow::<N>(gate), narrow(up)].concat())
                .collect(),
            a: narrow(&host.a),
            b: narrow(&host.b),
        }
    }

    fn layers(&self, shape: &Shape) -> Vec<Layer<'_, N>> {
        let (of_a, of_b) = (shape.rank * shape.inputs, 2 * shape.width * shape.rank);
        let layer = |(expert, weight): (usize, &'_ Vec<N>)| Layer {
            weight: &self.weights[expert][..weight.len()],
            bias: None,
            adapter: (shape.rank > 0).then(|| Adapter {
                a: &self.a[expert * of_a..][..of_a],
                b: &self.b[expert * of_b..][..of_b],
                scale: N::new(f64::from(SCALE)),
                rank: shape.rank,
            }),
            inputs: shape.inputs,
            outputs: 2 * shape.width,
        };
        self.weights.iter().enumerate().map(layer).collect()
    }
}

/// One half of rows of `2·F`.
fn half(rows: &[f64], width: usize, half: usize) -> Vec<f64> {
    let rows = rows.chunks_exact(2 * width);
    rows.flat_map(|row| row[half * width..][..width].to_vec()).collect()
}

fn forward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let (mut host, device, crowd) = (shape.host(), run.backend, shape.crowd);
    let routing = crowd.routed(device, &host.logits, true);
    let x = run.upload(shape.activation, [crowd.tokens, shape.inputs], &mut host.x);
    let (gate, gate_values) = shape.stack(device, &host.weights[0]);
    let (up, up_values) = shape.stack(device, &host.weights[1]);
    let a = device
        .upload_f32([crowd.experts, shape.rank, shape.inputs], &host.a)
        .unwrap();
    let b = device
        .upload_f32([crowd.experts, 2 * shape.width, shape.rank], &host.b)
        .unwrap();
    let rows = [crowd.slots(), shape.width];
    // Everything at once, the activation alone, the projections alone.
    let results = [(true, true), (false, true), (true, false)].map(|(keeps, activates)| {
        let mut hidden = device.alloc(DType::F32, [crowd.slots(), shape.rank]).unwrap();
        let [mut gate_y, mut up_y, mut y] = [(); 3].map(|()| run.output(shape.activation, rows));
        let lora = GroupedLoraForward {
            a: &a,
            b: &b,
            scale: SCALE,
            hidden: &mut hidden,
        };
        let call = GroupedSwigluForward {
            x: &x,
            routing: &routing,
            gate: &gate,
            up: &up,
            lora: (shape.rank > 0).then_some(lora),
            precision: shape.precision,
            wide: keeps.then_some((&mut gate_y, &mut up_y)),
            y: activates.then_some(&mut y),
        };
        device.grouped_swiglu_forward(call).unwrap();
        (gate_y, up_y, y, hidden)
    });
    let [(gate_y, up_y, y, hidden), (.., alone, _), (gate_alone, up_alone, ..)] = results;
    for (name, whole, part) in [
        ("y", &y, &alone),
        ("gate", &gate_y, &gate_alone),
        ("up", &up_y, &up_alone),
    ] {
        let same = device.read(whole).unwrap() == device.read(part).unwrap();
        assert!(
            same,
            "{name} depends on what else is asked for: {shape:?} on {}",
            run.name
        );
    }
    let (plain, oracle) = judged!(shape.precision, N, {
        let own = Both::<N>::new(&host, &gate_values, &up_values);
        let route = as_route::<B, N>(device, &routing);
        let x = by_token(&narrow::<N>(&host.x), &route, crowd.top, shape.inputs);
        let (y, u) = grouped_linear_forward(&x, &route.row_experts(), &own.layers(shape));
        vec![wide(y), wide(u)]
    });
    // The activation is that of the projections as they are stored.
    let stored = [&gate_y, &up_y].map(|tensor| device.read_f32(tensor).unwrap());
    let (plain_y, oracle_y) = judged!(Precision::F32, N, {
        let route = as_route::<B, N>(device, &routing);
        let [gate, up] = [0, 1].map(|part: usize| narrow::<N>(&stored[part]));
        vec![wide(routed_swiglu_forward(&gate, &up, &route, shape.width))]
    });
    let mut case = run.case(
        format_args!("grouped_swiglu_forward {shape:?}"),
        shape.inputs + shape.rank + 1,
    );
    for (i, (name, tensor)) in [("gate", &gate_y), ("up", &up_y)].into_iter().enumerate() {
        let [plain, oracle] = [&plain, &oracle].map(|both| half(&both[0], shape.width, i));
        case.compare(name, tensor, &plain, &oracle);
    }
    case.compare("y", &y, &plain_y[0], &oracle_y[0]);
    if shape.rank > 0 {
        case.compare("hidden", &hidden, &plain[1], &oracle[1]);
    }
}

fn backward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let (mut host, device, crowd) = (shape.host(), run.backend, shape.crowd);
    let routing = crowd.routed(device, &host.logits, true);
    let x = run.upload(shape.activation, [crowd.tokens, shape.inputs], &mut host.x);
    let rows = [crowd.slots(), shape.width];
    let [dgate, dup] = [0, 1].map(|part: usize| run.upload(shape.activation, rows, &mut host.dy[part]));
    let (gate, gate_values) = shape.stack(device, &host.weights[0]);
    let (up, up_values) = shape.stack(device, &host.weights[1]);
    let of_a = [crowd.experts, shape.rank, shape.inputs];
    let of_b = [crowd.experts, 2 * shape.width, shape.rank];
    let [a, mut da] = [&host.a, &host.old_a].map(|values| device.upload_f32(of_a, values).unwrap());
    let [b, mut db] = [&host.b, &host.old_b].map(|values| device.upload_f32(of_b, values).unwrap());
    let hidden = device.upload_f32([crowd.slots(), shape.rank], &host.hidden).unwrap();
    let mut dx = run.output(shape.activation, [crowd.slots(), shape.inputs]);
    let lora = GroupedLoraBackward {
        x: &x,
        x_order: RowOrder::Token,
        a: &a,
        b: &b,
        scale: SCALE,
        hidden: &hidden,
        gradient_a: &mut da,
        gradient_b: &mut db,
    };
    let call = GroupedPairBackward {
        dgate: &dgate,
        dup: &dup,
        routing: &routing,
        gate: &gate,
        up: &up,
        lora: (shape.rank > 0).then_some(lora),
        precision: shape.precision,
        dx: Some(&mut dx),
    };
    device.grouped_pair_backward(call).unwrap();
    let (plain, oracle) = judged!(shape.precision, N, {
        let own = Both::<N>::new(&host, &gate_values, &up_values);
        let route = as_route::<B, N>(device, &routing);
        let x = by_token(&narrow::<N>(&host.x), &route, crowd.top, shape.inputs);
        let halves = host.dy[0]
            .chunks_exact(shape.width)
            .zip(host.dy[1].chunks_exact(shape.width));
        let dy: Vec<f32> = halves.flat_map(|(gate, up)| [gate, up].concat()).collect();
        let layers = own.layers(shape);
        let u = narrow::<N>(&host.hidden);
        let each = grouped_linear_backward(&x, &u, &narrow::<N>(&dy), &route.row_experts(), &layers);
        let of = |part: fn(&LinearGradients<N>) -> Vec<N>| each.iter().map(part);
        vec![
            wide(of(|own| own.dx.clone()).flatten().collect::<Vec<N>>()),
            accumulated(&host.old_a, of(|own| own.da.clone())),
            accumulated(&host.old_b, of(|own| own.db.clone())),
        ]
    });
    let length = 2 * shape.width + shape.rank + crowd.slots() + 1;
    // In two products, the first one's rows are stored before the second one's are added.
    let roundings = usize::from(shape.activation == DType::BF16);
    let mut case = run
        .case(format_args!("grouped_pair_backward {shape:?}"), length)
        .rounding(roundings);
    case.compare("dx", &dx, &plain[0], &oracle[0]);
    if shape.rank > 0 {
        case.compare("da", &da, &plain[1], &oracle[1]);
        case.compare("db", &db, &plain[2], &oracle[2]);
    }
}

#[test]
fn both_wide_projections_and_their_activation_are_what_their_parts_give() {
    on_every_backend!(
        "grouped_swiglu_forward",
        [Route, StackExpert, GroupedLinearForward, RoutedSwigluForward],
        |run| {
            shapes(run).iter().for_each(|shape| forward(run, shape));
        }
    );
}

#[test]
fn gradients_of_both_wide_projections_meet_in_their_input_and_their_adapter() {
    on_every_backend!(
        "grouped_pair_backward",
        [Route, StackExpert, GroupedLinearBackward],
        |run| {
            shapes(run).iter().for_each(|shape| backward(run, shape));
        }
    );
}

fn sum<B: Traits>(run: &mut Run<'_, B>, crowd: Crowd, width: usize, activation: DType, has_shared: bool) {
    let mut random = Random::new(width as u64);
    let logits = crowd.logits(&mut random);
    let mut grouped = random.adversarial(crowd.slots() * width);
    let (mut shared, mut gate) = (random.adversarial(crowd.tokens * width), random.normal(crowd.tokens));
    let mut stream = random.normal(crowd.tokens * width);
    let device = run.backend;
    let routing = crowd.routed(device, &logits, false);
    let grouped_t = run.upload(activation, [crowd.slots(), width], &mut grouped);
    let shared_t = run.upload(activation, [crowd.tokens, width], &mut shared);
    let gate_t = run.upload(activation, [crowd.tokens, 1], &mut gate);
    let mut x = run.upload(activation, [crowd.tokens, width], &mut stream);
    let call = CombineResidual {
        grouped: &grouped_t,
        routing: &routing,
        shared: has_shared.then_some((&shared_t, &gate_t)),
        x: &mut x,
    };
    device.combine_residual(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let route = as_route::<B, N>(device, &routing);
        let mut sum = combine(&narrow::<N>(&grouped), &route, crowd.top, width);
        if has_shared {
            let gated = sigmoid_gate_forward(&narrow::<N>(&shared), &narrow::<N>(&gate));
            sum = sum.into_iter().zip(gated).map(|(sum, gated)| sum + gated).collect();
        }
        vec![accumulated(&stream, std::iter::once(sum))]
    });
    let what = format_args!("combine_residual {crowd:?} {width} {activation} shared: {has_shared}");
    let mut case = run.case(what, crowd.top + 3);
    case.compare("x", &x, &plain[0], &oracle[0]);
}

#[test]
fn a_layer_of_experts_ends_in_the_residual_stream() {
    on_every_backend!(
        "combine_residual",
        [Route, Combine, SigmoidGateForward, AddAssign],
        |run| {
            for crowd in CROWDS {
                for activation in run.activations() {
                    for (width, has_shared) in [(1, true), (17, false), (64, true)] {
                        sum(run, *crowd, width, *activation, has_shared);
                    }
                }
            }
        }
    );
}
