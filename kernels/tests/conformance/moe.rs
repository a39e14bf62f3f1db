//! Mixture of experts: routing, grouped linear layers, their activation and their sum.

use brightrun_kernels::ops::{
    Device, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, GroupedLoraForward, MoeOps, Precision,
    RouteBackward, RoutedSwigluBackward, Routing, RowOrder, Write,
};
use brightrun_kernels::oracle::{
    Adapter, Layer, LinearGradients, Real, Route, by_token, combine, grouped_linear_backward, grouped_linear_forward,
    route, route_backward, routed_swiglu_backward, routed_swiglu_forward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Error, Tensor, WeightStack};

use super::backends::{PRECISIONS, Run, Traits, cpus, narrow, wide};
use super::weights::{ENCODINGS, Encoding, weight};
use crate::{judged, on_every_backend};

/// T, E, k.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    pub tokens: usize,
    pub experts: usize,
    pub top: usize,
}

const fn crowd(tokens: usize, experts: usize, top: usize) -> Crowd {
    Crowd { tokens, experts, top }
}

pub const CROWDS: &[Crowd] = &[
    crowd(0, 4, 2),
    crowd(1, 1, 1),
    crowd(1, 5, 5),
    crowd(7, 3, 1),
    crowd(9, 12, 5),
    crowd(150, 4, 2),
    crowd(3, 200, 2),
    crowd(33, 512, 10),
    crowd(MANY, 2, 1),
];

/// So many rows an expert that Hopper's kernels take their wide tiles: only for layers that these can do.
pub const MANY: usize = 640;

impl Crowd {
    pub fn slots(self) -> usize {
        self.tokens * self.top
    }

    pub fn logits(self, random: &mut Random) -> Vec<f32> {
        random.normal(self.tokens * self.experts)
    }

    /// The routing of `logits` on a device.
    pub fn routed<B: Traits>(self, device: &B, logits: &[f32], renormalise: bool) -> Routing<B> {
        let mut routing = Routing::alloc(device, self.tokens, self.experts, self.top).unwrap();
        let logits = device.upload_f32([self.tokens, self.experts], logits).unwrap();
        device.route(&logits, renormalise, &mut routing).unwrap();
        routing
    }
}

fn integers<D: Device>(device: &D, tensor: &Tensor<D>) -> Vec<usize> {
    let values: Vec<i32> = bytemuck::allocation::pod_collect_to_vec(&device.read(tensor).unwrap());
    values.into_iter().map(|value| value as usize).collect()
}

/// The routing of a device as the oracle writes one.
pub fn as_route<D: Device, N: Real>(device: &D, routing: &Routing<D>) -> Route<N> {
    Route {
        experts: integers(device, &routing.experts),
        weights: narrow(&device.read_f32(&routing.weights).unwrap()),
        slots: integers(device, &routing.slots),
    }
}

fn routing<B: Traits>(run: &mut Run<'_, B>, crowd: Crowd, renormalise: bool) {
    let mut random = Random::new(crowd.experts as u64);
    // Values on a coarse grid, so that many logits are equal.
    let mut logits = crowd.logits(&mut random);
    logits.iter_mut().for_each(|z| *z = (*z * 2.0).round() * 3.0);
    let dweights = random.normal(crowd.slots());
    let device = run.backend;
    let ours = crowd.routed(device, &logits, renormalise);
    let exact = route::<f64>(&narrow(&logits), crowd.experts, crowd.top, renormalise);
    assert_eq!(integers(device, &ours.experts), exact.experts, "{crowd:?}");
    let slots = integers(device, &ours.slots);
    assert_eq!(slots, exact.slots, "{crowd:?}");
    let rows = integers(device, &ours.rows);
    assert!(
        slots.iter().enumerate().all(|(row, slot)| rows[*slot] == row),
        "{crowd:?}"
    );
    let offsets = integers(device, &ours.offsets);
    for (expert, pair) in offsets.windows(2).enumerate() {
        let count = exact.experts.iter().filter(|other| **other == expert).count();
        assert_eq!(pair[1] - pair[0], count, "{crowd:?}");
    }
    let logits_t = device.upload_f32([crowd.tokens, crowd.experts], &logits).unwrap();
    let dweights_t = device.upload_f32([crowd.tokens, crowd.top], &dweights).unwrap();
    let mut dlogits = device.alloc(DType::F32, logits_t.shape()).unwrap();
    let call = RouteBackward {
        logits: &logits_t,
        routing: &ours,
        renormalise,
        dweights: &dweights_t,
        dlogits: &mut dlogits,
    };
    device.route_backward(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let logits = narrow::<N>(&logits);
        let route = route(&logits, crowd.experts, crowd.top, renormalise);
        let dlogits = route_backward(&logits, &route, crowd.experts, renormalise, &narrow::<N>(&dweights));
        vec![wide(route.weights), wide(dlogits)]
    });
    let mut case = run.case(
        format_args!("route {crowd:?} renormalise: {renormalise}"),
        crowd.experts + crowd.top,
    );
    case.compare("weights", &ours.weights, &plain[0], &oracle[0]);
    case.compare("dlogits", &dlogits, &plain[1], &oracle[1]);
}

#[test]
fn routing_takes_the_largest_logits_and_of_equals_the_first() {
    on_every_backend!("route", [Route, RouteBackward], |run| {
        for crowd in CROWDS {
            routing(run, *crowd, false);
            routing(run, *crowd, true);
        }
    });
}

/// One grouped layer.
#[derive(Clone, Copy, Debug)]
struct Shape {
    crowd: Crowd,
    inputs: usize,
    outputs: usize,
    rank: usize,
    order: RowOrder,
    write: Write,
    encoding: Encoding,
    precision: Precision,
    activation: DType,
    /// All tokens go to the last expert first.
    crowded: bool,
}

/// I, O, R.
const LAYERS: &[(usize, usize, usize)] = &[
    (64, 32, 0),
    (33, 7, 3),
    (1, 1, 1),
    (130, 65, 8),
    // Within the limits of Hopper's kernels, with tails of everything else.
    (192, 136, 8),
    (128, 200, 24),
    (64, 264, 0),
];

/// Every crowd, layer and encoding that the backend can afford, with precisions, orders and dtypes of activations by turns.
fn shapes<B: Traits>(run: &mut Run<'_, B>) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (i, crowd) in CROWDS.iter().enumerate() {
        for (j, (inputs, outputs, rank)) in LAYERS.iter().enumerate() {
            for (k, encoding) in ENCODINGS.into_iter().enumerate() {
                let odd = |number: usize| number % 2 == 1;
                // The large crowd runs once in every encoding.
                if crowd.experts > 100 && j > 0 || crowd.tokens == MANY && j < 4 {
                    continue;
                }
                // Tiles are whole, whatever is asked of them.
                let tiles = crowd.slots().div_ceil(64) + crowd.experts.min(crowd.slots());
                if !run.affords(tiles * 64 * inputs.next_multiple_of(64) * outputs.next_multiple_of(128)) {
                    continue;
                }
                let activations = run.activations();
                shapes.push(Shape {
                    crowd: *crowd,
                    inputs: *inputs,
                    outputs: *outputs,
                    rank: *rank,
                    order: if odd(i + j) { RowOrder::Token } else { RowOrder::Grouped },
                    write: if odd(j) { Write::Accumulate } else { Write::Overwrite },
                    encoding,
                    precision: PRECISIONS[(i + j / 2) % 2],
                    activation: activations[(i + j + k) % activations.len()],
                    crowded: odd(j),
                });
            }
        }
    }
    shapes
}

pub const SCALE: f32 = 1.75;

/// Host values of a case.
struct Inputs {
    logits: Vec<f32>,
    x: Vec<f32>,
    weights: Vec<Vec<f32>>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
    old_dx: Vec<f32>,
    old_a: Vec<f32>,
    old_b: Vec<f32>,
}

impl Shape {
    fn rows(&self) -> usize {
        match self.order {
            RowOrder::Token => self.crowd.tokens,
            RowOrder::Grouped => self.crowd.slots(),
        }
    }

    fn host(&self) -> Inputs {
        let mut random = Random::new((self.inputs * self.outputs) as u64);
        let mut logits = self.crowd.logits(&mut random);
        if self.crowded {
            for row in logits.chunks_exact_mut(self.crowd.experts) {
                row[self.crowd.experts - 1] += 100.0;
            }
        }
        let Self {
            inputs, outputs, rank, ..
        } = *self;
        let experts = self.crowd.experts;
        Inputs {
            logits,
            x: random.adversarial(self.rows() * inputs),
            weights: (0..experts).map(|_| random.normal(outputs * inputs)).collect(),
            a: random.normal(experts * rank * inputs),
            b: random.normal(experts * outputs * rank),
            dy: random.adversarial(self.rows() * outputs),
            old_dx: random.normal(self.crowd.slots() * inputs),
            old_a: random.normal(experts * rank * inputs),
            old_b: random.normal(experts * outputs * rank),
        }
    }

    /// The stack on a device, and the values each expert's matrix then has.
    fn stack<B: Traits>(&self, device: &B, host: &Inputs) -> (WeightStack<B>, Vec<Vec<f32>>) {
        let (mut stack, mut decoded) = (None, Vec::new());
        for (expert, values) in host.weights.iter().enumerate() {
            let (weight, values) = weight(device, self.encoding, [self.outputs, self.inputs], values);
            let stack =
                stack.get_or_insert_with(|| WeightStack::alloc_like(device, self.crowd.experts, &weight).unwrap());
            device.stack_expert(&weight, expert, stack).unwrap();
            decoded.push(values);
        }
        (stack.unwrap(), decoded)
    }

    /// Rows that the grouped rows read.
    fn gathered<N: Real>(&self, values: &[f32], route: &Route<N>, width: usize) -> Vec<N> {
        match self.order {
            RowOrder::Token => by_token(&narrow(values), route, self.crowd.top, width),
            RowOrder::Grouped => narrow(values),
        }
    }
}

/// The experts' host values in one number type.
struct Host<N> {
    weights: Vec<Vec<N>>,
    a: Vec<N>,
    b: Vec<N>,
}

impl<N: Real> Host<N> {
    fn new(host: &Inputs, decoded: &[Vec<f32>]) -> Self {
        Self {
            weights: decoded.iter().map(|values| narrow(values)).collect(),
            a: narrow(&host.a),
            b: narrow(&host.b),
        }
    }

    fn layers(&self, shape: &Shape) -> Vec<Layer<'_, N>> {
        let (of_a, of_b) = (shape.rank * shape.inputs, shape.outputs * shape.rank);
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
            outputs: shape.outputs,
        };
        self.weights.iter().enumerate().map(layer).collect()
    }
}

fn linear_forward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let (mut host, device, crowd) = (shape.host(), run.backend, shape.crowd);
    let (stack, decoded) = shape.stack(device, &host);
    let routing = crowd.routed(device, &host.logits, true);
    let x = run.upload(shape.activation, [shape.rows(), shape.inputs], &mut host.x);
    let a = device
        .upload_f32([crowd.experts, shape.rank, shape.inputs], &host.a)
        .unwrap();
    let b = device
        .upload_f32([crowd.experts, shape.outputs, shape.rank], &host.b)
        .unwrap();
    let mut hidden = device.alloc(DType::F32, [crowd.slots(), shape.rank]).unwrap();
    let mut y = run.output(shape.activation, [crowd.slots(), shape.outputs]);
    let lora = GroupedLoraForward {
        a: &a,
        b: &b,
        scale: SCALE,
        hidden: &mut hidden,
    };
    let call = GroupedLinearForward {
        x: &x,
        x_order: shape.order,
        routing: &routing,
        weight: &stack,
        lora: (shape.rank > 0).then_some(lora),
        precision: shape.precision,
        y: &mut y,
    };
    device.grouped_linear_forward(call).unwrap();
    let (plain, oracle) = judged!(shape.precision, N, {
        let (own, route) = (Host::<N>::new(&host, &decoded), as_route::<B, N>(device, &routing));
        let x = shape.gathered(&host.x, &route, shape.inputs);
        let (y, u) = grouped_linear_forward(&x, &route.row_experts(), &own.layers(shape));
        vec![wide(y), wide(u)]
    });
    let mut case = run.case(
        format_args!("grouped_linear_forward {shape:?}"),
        shape.inputs + shape.rank + 1,
    );
    case.compare("y", &y, &plain[0], &oracle[0]);
    if shape.rank > 0 {
        case.compare("hidden", &hidden, &plain[1], &oracle[1]);
    }
}

/// What is there, plus the gradients of all experts.
pub fn accumulated<N: Real>(old: &[f32], gradients: impl Iterator<Item = Vec<N>>) -> Vec<f64> {
    let all = gradients.flatten();
    wide(
        narrow::<N>(old)
            .into_iter()
            .zip(all)
            .map(|(old, own)| old + own)
            .collect(),
    )
}

fn linear_backward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape) {
    let (mut host, device, crowd) = (shape.host(), run.backend, shape.crowd);
    let x = run.upload(shape.activation, [shape.rows(), shape.inputs], &mut host.x);
    let dy = run.upload(shape.activation, [shape.rows(), shape.outputs], &mut host.dy);
    let mut dx = run.upload(shape.activation, [crowd.slots(), shape.inputs], &mut host.old_dx);
    let (stack, decoded) = shape.stack(device, &host);
    let routing = crowd.routed(device, &host.logits, true);
    let (of_a, of_b) = (
        [crowd.experts, shape.rank, shape.inputs],
        [crowd.experts, shape.outputs, shape.rank],
    );
    // The forward pass's `u`, rounded to f32 once for everybody.
    let (exact, exact_route) = (Host::<f64>::new(&host, &decoded), as_route::<B, f64>(device, &routing));
    let gathered = shape.gathered(&host.x, &exact_route, shape.inputs);
    let (_, u) = grouped_linear_forward(&gathered, &exact_route.row_experts(), &exact.layers(shape));
    let u: Vec<f32> = u.into_iter().map(|value| value as f32).collect();

    let (a, b) = (
        device.upload_f32(of_a, &host.a).unwrap(),
        device.upload_f32(of_b, &host.b).unwrap(),
    );
    let hidden = device.upload_f32([crowd.slots(), shape.rank], &u).unwrap();
    let mut da = device.upload_f32(of_a, &host.old_a).unwrap();
    let mut db = device.upload_f32(of_b, &host.old_b).unwrap();
    let lora = GroupedLoraBackward {
        x: &x,
        x_order: shape.order,
        a: &a,
        b: &b,
        scale: SCALE,
        hidden: &hidden,
        gradient_a: &mut da,
        gradient_b: &mut db,
    };
    let call = GroupedLinearBackward {
        dy: &dy,
        dy_order: shape.order,
        routing: &routing,
        weight: &stack,
        lora: (shape.rank > 0).then_some(lora),
        precision: shape.precision,
        dx: Some((&mut dx, shape.write)),
    };
    device.grouped_linear_backward(call).unwrap();
    let (plain, oracle) = judged!(shape.precision, N, {
        let (own, route) = (Host::<N>::new(&host, &decoded), as_route::<B, N>(device, &routing));
        let x = shape.gathered(&host.x, &route, shape.inputs);
        let dy = shape.gathered(&host.dy, &route, shape.outputs);
        let layers = own.layers(shape);
        let each = grouped_linear_backward(&x, &narrow::<N>(&u), &dy, &route.row_experts(), &layers);
        let old_dx = match shape.write {
            Write::Accumulate => host.old_dx.clone(),
            Write::Overwrite => vec![0.0; host.old_dx.len()],
        };
        let of = |part: fn(&LinearGradients<N>) -> Vec<N>| each.iter().map(part);
        vec![
            accumulated(&old_dx, of(|own| own.dx.clone())),
            accumulated(&host.old_a, of(|own| own.da.clone())),
            accumulated(&host.old_b, of(|own| own.db.clone())),
        ]
    });
    let length = shape.outputs + shape.rank + crowd.slots() + 1;
    let mut case = run.case(format_args!("grouped_linear_backward {shape:?}"), length);
    case.compare("dx", &dx, &plain[0], &oracle[0]);
    if shape.rank > 0 {
        case.compare("da", &da, &plain[1], &oracle[1]);
        case.compare("db", &db, &plain[2], &oracle[2]);
    }
}

#[test]
fn grouped_layers_apply_each_experts_own_matrix_and_adapter() {
    on_every_backend!(
        "grouped_linear_forward",
        [Route, StackExpert, GroupedLinearForward],
        |run| {
            shapes(run).iter().for_each(|shape| linear_forward(run, shape));
        }
    );
}

#[test]
fn grouped_gradients_stay_with_their_expert() {
    on_every_backend!(
        "grouped_linear_backward",
        [Route, StackExpert, GroupedLinearForward, GroupedLinearBackward],
        |run| {
            shapes(run).iter().for_each(|shape| linear_backward(run, shape));
        }
    );
}

fn activation_and_sum<B: Traits>(
    run: &mut Run<'_, B>,
    crowd: Crowd,
    (width, write): (usize, Write),
    activation: DType,
) {
    let mut random = Random::new(width as u64);
    let logits = crowd.logits(&mut random);
    let count = crowd.slots() * width;
    let [mut gate, mut up, mut dy] = [(); 3].map(|()| random.adversarial(count));
    let mut old = random.normal(crowd.tokens * width);
    let device = run.backend;
    let routing = crowd.routed(device, &logits, false);
    let rows = [crowd.slots(), width];
    let [gate_t, up_t, dy_t] = [&mut gate, &mut up, &mut dy].map(|values| run.upload(activation, rows, values));
    let [mut y, mut dgate, mut dup] = [(); 3].map(|()| run.output(activation, rows));
    let mut dweights = device.alloc(DType::F32, [crowd.tokens, crowd.top]).unwrap();
    device.routed_swiglu_forward(&gate_t, &up_t, &routing, &mut y).unwrap();
    let call = RoutedSwigluBackward {
        gate: &gate_t,
        up: &up_t,
        routing: &routing,
        dy: &dy_t,
        dgate: &mut dgate,
        dup: &mut dup,
        dweights: &mut dweights,
    };
    device.routed_swiglu_backward(call).unwrap();
    let mut sum = run.upload(activation, [crowd.tokens, width], &mut old);
    device.combine(&gate_t, &routing, &mut sum, write).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let route = as_route::<B, N>(device, &routing);
        let (gate, up, dy) = (narrow::<N>(&gate), narrow::<N>(&up), narrow::<N>(&dy));
        let y = routed_swiglu_forward(&gate, &up, &route, width);
        let (dgate, dup, dweights) = routed_swiglu_backward(&gate, &up, &route, &dy, width);
        let old = match write {
            Write::Accumulate => old.clone(),
            Write::Overwrite => vec![0.0; old.len()],
        };
        let sum = accumulated(&old, std::iter::once(combine(&gate, &route, crowd.top, width)));
        vec![wide(y), wide(dgate), wide(dup), wide(dweights), sum]
    });
    let mut case = run.case(
        format_args!("routed_swiglu, combine {crowd:?} {width} {write:?} {activation}"),
        width + crowd.top,
    );
    let ours = [
        ("y", &y),
        ("dgate", &dgate),
        ("dup", &dup),
        ("dweights", &dweights),
        ("sum", &sum),
    ];
    for (i, (name, tensor)) in ours.into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

#[test]
fn activations_carry_the_routing_weights_and_rows_return_to_their_tokens() {
    on_every_backend!(
        "routed_swiglu, combine",
        [Route, RoutedSwigluForward, RoutedSwigluBackward, Combine],
        |run| {
            for crowd in CROWDS {
                for activation in run.activations() {
                    activation_and_sum(run, *crowd, (17, Write::Overwrite), *activation);
                    activation_and_sum(run, *crowd, (64, Write::Accumulate), *activation);
                }
            }
        }
    );
}

#[test]
fn a_nan_logit_poisons_its_own_token_only() {
    on_every_backend!("route, NaN", [Route], |run| {
        let crowd = crowd(2, 3, 2);
        let routing = crowd.routed(run.backend, &[0.0, f32::NAN, 1.0, 0.0, 2.0, 1.0], true);
        assert_eq!(integers(run.backend, &routing.experts), [1, 2, 1, 2], "{}", run.name);
        let kept = [
            f64::NAN,
            f64::NAN,
            1.0 / (1.0 + (-1.0f64).exp()),
            1.0 / (1.0 + 1.0f64.exp()),
        ];
        run.case("route", 4).compare("weights", &routing.weights, &kept, &kept);
    });
}

#[test]
fn a_routing_that_was_not_routed_is_refused() {
    on_every_backend!("combine, refused", [Route, Combine], |run| {
        let (device, crowd) = (run.backend, crowd(2, 3, 2));
        let rows = device.zeros(DType::F32, [4, 5]).unwrap();
        // Of what the op reads: the CPU's other checks are its own.
        let mut routing = crowd.routed(device, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], false);
        routing.rows = device.upload_i32([4], &[7, 0, 1, 2]).unwrap();
        let mut y = device.zeros(DType::F32, [2, 5]).unwrap();
        let refused = device.combine(&rows, &routing, &mut y, Write::Overwrite);
        let refused = refused.and_then(|()| device.read(&y).map(drop));
        assert!(matches!(refused, Err(Error::Value { .. })), "{}: {refused:?}", run.name);
        let fine = crowd.routed(device, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], false);
        device.combine(&rows, &fine, &mut y, Write::Overwrite).unwrap();
        run.case("after the refusal", 0)
            .compare("y", &y, &[0.0; 10], &[0.0; 10]);
    });
    for (name, device) in cpus() {
        let crowd = crowd(2, 3, 2);
        let rows = device.zeros(DType::F32, [4, 5]).unwrap();
        for broken in 0..2 {
            let mut routing = crowd.routed(&device, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], false);
            match broken {
                0 => routing.slots = device.upload_i32([4], &[0, 0, 1, 2]).unwrap(),
                _ => routing.offsets = device.upload_i32([4], &[0, 3, 1, 4]).unwrap(),
            }
            let mut y = device.zeros(DType::F32, [2, 5]).unwrap();
            let refused = device.combine(&rows, &routing, &mut y, Write::Overwrite);
            assert!(matches!(refused, Err(Error::Value { .. })), "{name}: {broken}");
        }
    }
}

#[test]
fn a_matrix_of_another_shape_or_encoding_is_refused_by_the_stack() {
    for (name, device) in cpus() {
        let values = vec![1.0; 64];
        let (first, _) = weight(&device, Encoding::Nf4, [8, 8], &values);
        let mut stack = WeightStack::alloc_like(&device, 2, &first).unwrap();
        let (nested, _) = weight(&device, Encoding::Nf4Nested, [8, 8], &values);
        let (other, _) = weight(&device, Encoding::Nf4, [16, 4], &values);
        assert!(device.stack_expert(&first, 1, &mut stack).is_ok(), "{name}");
        for (expert, wrong) in [(2, &first), (0, &nested), (0, &other)] {
            let refused = device.stack_expert(wrong, expert, &mut stack);
            assert!(
                matches!(refused, Err(Error::Value { .. })),
                "{name}: {expert} {}",
                wrong.encoding()
            );
        }
    }
}
