//! The ops, put together as a model does it, compute what transformers' own layers compute, forward and backward.
//!
//! `fixtures/transformers/ops.safetensors` holds inputs, outputs and gradients; its README says how it was made. Two f32
//! computations of one number may differ by what rounding costs: the bound is that of [`Judge`] with the peer as the oracle.

#![allow(clippy::unwrap_used, clippy::panic)]

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::{
    ActivationOps, ConvolutionBackward, ConvolutionForward, ConvolutionOps, DELTA_CHUNK, DeltaBackward, DeltaForward,
    DeltaOps, Device, GateOps, GatedNormBackward, GatedNormForward, GroupedLinearBackward, GroupedLinearForward,
    LinearBackward, LinearForward, MatmulOps, MoeOps, Precision, RouteBackward, RoutedSwigluBackward, Routing,
    RowOrder, SigmoidGateBackward, Write,
};
use brightrun_kernels::testing::Judge;
use brightrun_kernels::{DType, Segments, Tensor, Weight, WeightStack};
use safetensors::SafeTensors;

const RECORDED: &[u8] = include_bytes!("fixtures/transformers/ops.safetensors");

/// Documents of the recorded sequences.
const DOCUMENTS: [usize; 2] = [70, 5];

/// One recorded case.
struct Case {
    name: &'static str,
    cpu: Cpu,
    /// Terms of the longest sum.
    length: usize,
}

impl Case {
    fn new(name: &'static str, length: usize) -> Self {
        Self {
            name,
            cpu: Cpu::new(Some(2)).unwrap(),
            length,
        }
    }

    fn values(&self, tensor: &str) -> (Vec<usize>, Vec<f32>) {
        let all = SafeTensors::deserialize(RECORDED).unwrap();
        let name = format!("{}.{tensor}", self.name);
        let view = all.tensor(&name).unwrap_or_else(|_| panic!("{name} is not recorded"));
        let values = bytemuck::allocation::pod_collect_to_vec(view.data());
        (view.shape().to_vec(), values)
    }

    fn load(&self, tensor: &str) -> Tensor<Cpu> {
        let (shape, values) = self.values(tensor);
        self.cpu
            .upload_f32(brightrun_kernels::Shape::new(&shape), &values)
            .unwrap()
    }

    fn weight(&self, tensor: &str) -> Weight<Cpu> {
        Weight::Dense(self.load(tensor))
    }

    fn like(&self, tensor: &Tensor<Cpu>) -> Tensor<Cpu> {
        self.alloc(tensor.shape().extents())
    }

    fn alloc(&self, extents: &[usize]) -> Tensor<Cpu> {
        self.cpu
            .alloc(DType::F32, brightrun_kernels::Shape::new(extents))
            .unwrap()
    }

    /// Compares a whole tensor with the recorded one.
    fn agrees(&self, tensor: &str, ours: &Tensor<Cpu>) {
        let recorded: Vec<f64> = self.values(tensor).1.into_iter().map(f64::from).collect();
        let judge = Judge {
            case: self.name.to_owned(),
            length: self.length,
            cancelling: 0.0,
            roundings: 0,
        };
        let ours = self.cpu.read_f32(ours).unwrap();
        judge
            .compare(tensor, &ours, &recorded, &recorded)
            .unwrap_or_else(|message| panic!("{message}"));
    }
}

fn delta_rule(name: &'static str) {
    const EPS: f32 = 1e-6;
    let case = Case::new(name, 16 + 8 + 70);
    let cpu = &case.cpu;
    let segments = Segments::from_lengths(DOCUMENTS);
    let [q, k, v, decay, beta, dout] = ["q", "k", "v", "g", "beta", "dy"].map(|name| case.load(name));
    let norm = |x: &Tensor<Cpu>| {
        let (mut y, mut rnorm) = (case.like(x), case.alloc(&[x.shape().rows()]));
        cpu.l2_norm_forward(x, EPS, &mut y, &mut rnorm).unwrap();
        (y, rnorm)
    };
    let ((q_unit, q_rnorm), (k_unit, k_rnorm)) = (norm(&q), norm(&k));
    let (mut out, mut solved) = (case.like(&v), case.alloc(&[75, 4, DELTA_CHUNK]));
    cpu.delta_rule_forward(DeltaForward {
        q: &q_unit,
        k: &k_unit,
        v: &v,
        decay: &decay,
        beta: &beta,
        segments: &segments,
        scale: 0.25,
        state: None,
        out: &mut out,
        solved: &mut solved,
    })
    .unwrap();
    case.agrees("y", &out);

    let (mut dq_unit, mut dk_unit, mut dv) = (case.like(&q), case.like(&k), case.like(&v));
    let (mut ddecay, mut dbeta) = (case.like(&decay), case.like(&beta));
    cpu.delta_rule_backward(DeltaBackward {
        q: &q_unit,
        k: &k_unit,
        v: &v,
        decay: &decay,
        beta: &beta,
        solved: &solved,
        dout: &dout,
        segments: &segments,
        scale: 0.25,
        dq: &mut dq_unit,
        dk: &mut dk_unit,
        dv: &mut dv,
        ddecay: &mut ddecay,
        dbeta: &mut dbeta,
    })
    .unwrap();
    let (mut dq, mut dk) = (case.like(&q), case.like(&k));
    cpu.l2_norm_backward(&q, &q_rnorm, &dq_unit, &mut dq).unwrap();
    cpu.l2_norm_backward(&k, &k_rnorm, &dk_unit, &mut dk).unwrap();
    let ours = [
        ("dq", &dq),
        ("dk", &dk),
        ("dv", &dv),
        ("dg", &ddecay),
        ("dbeta", &dbeta),
    ];
    ours.iter().for_each(|(name, tensor)| case.agrees(name, tensor));
}

#[test]
fn the_delta_rule_is_that_of_transformers_in_chunks_and_token_by_token() {
    delta_rule("delta_chunked");
    delta_rule("delta_recurrent");
}

#[test]
fn the_convolution_is_that_of_transformers() {
    let case = Case::new("convolution", 16);
    let (x, weight, dy) = (case.load("x"), case.load("weight"), case.load("dy"));
    let segments = Segments::from_lengths(DOCUMENTS);
    let (mut y, mut dx) = (case.like(&x), case.like(&x));
    let call = ConvolutionForward {
        x: &x,
        weight: &weight,
        bias: None,
        segments: &segments,
        state: None,
        y: &mut y,
    };
    case.cpu.convolution_forward(call).unwrap();
    case.agrees("y", &y);
    let call = ConvolutionBackward {
        x: &x,
        weight: &weight,
        bias: None,
        segments: &segments,
        dy: &dy,
        dx: &mut dx,
    };
    case.cpu.convolution_backward(call).unwrap();
    case.agrees("dx", &dx);
}

#[test]
fn the_gated_norm_is_that_of_transformers() {
    let case = Case::new("gated_norm", 32);
    let [x, gate, weight, dy] = ["x", "z", "weight", "dy"].map(|name| case.load(name));
    let (mut y, mut dx, mut dgate, mut rstd) = (case.like(&x), case.like(&x), case.like(&x), case.alloc(&[9]));
    let call = GatedNormForward {
        x: &x,
        gate: &gate,
        weight: &weight,
        eps: 1e-6,
        y: &mut y,
        rstd: &mut rstd,
    };
    case.cpu.gated_norm_forward(call).unwrap();
    case.agrees("y", &y);
    let call = GatedNormBackward {
        x: &x,
        gate: &gate,
        weight: &weight,
        rstd: &rstd,
        dy: &dy,
        dx: &mut dx,
        dgate: &mut dgate,
    };
    case.cpu.gated_norm_backward(call).unwrap();
    case.agrees("dx", &dx);
    case.agrees("dz", &dgate);
}

/// Tokens, width, experts, best, width of an expert.
const MOE: [usize; 5] = [11, 10, 7, 3, 6];

/// The routed experts of a block.
struct Experts {
    router: Weight<Cpu>,
    gate: WeightStack<Cpu>,
    up: WeightStack<Cpu>,
    down: WeightStack<Cpu>,
}

impl Experts {
    fn load(case: &Case) -> Self {
        let [_, width, experts, _, inner] = MOE;
        let (_, fused) = case.values("experts.gate_up_proj");
        let half = |which: usize| -> Vec<f32> {
            let matrices = fused.chunks_exact(2 * inner * width);
            matrices
                .flat_map(|both| &both[which * inner * width..][..inner * width])
                .copied()
                .collect()
        };
        let stack = |values: &[f32]| WeightStack::Dense(case.cpu.upload_f32([experts, inner, width], values).unwrap());
        Self {
            router: case.weight("gate.weight"),
            gate: stack(&half(0)),
            up: stack(&half(1)),
            down: WeightStack::Dense(case.load("experts.down_proj")),
        }
    }
}

fn linear(case: &Case, x: &Tensor<Cpu>, weight: &Weight<Cpu>) -> Tensor<Cpu> {
    let mut y = case.alloc(&[x.shape().rows(), weight.extents().0]);
    let call = LinearForward {
        x,
        weight,
        bias: None,
        lora: None,
        precision: Precision::F32,
        y: &mut y,
    };
    case.cpu.linear_forward(call).unwrap();
    y
}

fn linear_backward(case: &Case, dy: &Tensor<Cpu>, weight: &Weight<Cpu>, dx: &mut Tensor<Cpu>, write: Write) {
    let call = LinearBackward {
        dy,
        weight,
        lora: None,
        precision: Precision::F32,
        dx: Some((dx, write)),
    };
    case.cpu.linear_backward(call).unwrap();
}

fn grouped(case: &Case, x: (&Tensor<Cpu>, RowOrder), routing: &Routing<Cpu>, weight: &WeightStack<Cpu>) -> Tensor<Cpu> {
    let mut y = case.alloc(&[MOE[0] * MOE[3], weight.extents().1]);
    let call = GroupedLinearForward {
        x: x.0,
        x_order: x.1,
        routing,
        weight,
        lora: None,
        precision: Precision::F32,
        y: &mut y,
    };
    case.cpu.grouped_linear_forward(call).unwrap();
    y
}

fn grouped_backward(
    case: &Case,
    dy: (&Tensor<Cpu>, RowOrder),
    routing: &Routing<Cpu>,
    weight: &WeightStack<Cpu>,
    dx: &mut Tensor<Cpu>,
    write: Write,
) {
    let call = GroupedLinearBackward {
        dy: dy.0,
        dy_order: dy.1,
        routing,
        weight,
        lora: None,
        precision: Precision::F32,
        dx: Some((dx, write)),
    };
    case.cpu.grouped_linear_backward(call).unwrap();
}

/// `y` of the routed experts, and what adds their part to `dx`.
fn routed<'a>(
    case: &'a Case,
    x: &'a Tensor<Cpu>,
    renormalise: bool,
) -> (Tensor<Cpu>, impl FnOnce(&Tensor<Cpu>, &mut Tensor<Cpu>) + 'a) {
    let [tokens, width, count, top, inner] = MOE;
    let (cpu, experts) = (&case.cpu, Experts::load(case));
    let logits = linear(case, x, &experts.router);
    let mut routing = Routing::alloc(cpu, tokens, count, top).unwrap();
    cpu.route(&logits, renormalise, &mut routing).unwrap();
    let gate = grouped(case, (x, RowOrder::Token), &routing, &experts.gate);
    let up = grouped(case, (x, RowOrder::Token), &routing, &experts.up);
    let mut activation = case.like(&gate);
    cpu.routed_swiglu_forward(&gate, &up, &routing, &mut activation)
        .unwrap();
    let rows = grouped(case, (&activation, RowOrder::Grouped), &routing, &experts.down);
    let mut y = case.alloc(&[tokens, width]);
    cpu.combine(&rows, &routing, &mut y, Write::Overwrite).unwrap();

    let backward = move |dy: &Tensor<Cpu>, dx: &mut Tensor<Cpu>| {
        let mut dactivation = case.alloc(&[tokens * top, inner]);
        let dy = (dy, RowOrder::Token);
        grouped_backward(case, dy, &routing, &experts.down, &mut dactivation, Write::Overwrite);
        let (mut dgate, mut dup) = (case.like(&gate), case.like(&up));
        let mut dweights = case.alloc(&[tokens, top]);
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
        let mut drows = case.alloc(&[tokens * top, width]);
        let grouped_order = |tensor| (tensor, RowOrder::Grouped);
        grouped_backward(
            case,
            grouped_order(&dgate),
            &routing,
            &experts.gate,
            &mut drows,
            Write::Overwrite,
        );
        grouped_backward(
            case,
            grouped_order(&dup),
            &routing,
            &experts.up,
            &mut drows,
            Write::Accumulate,
        );
        cpu.combine(&drows, &routing, dx, Write::Accumulate).unwrap();
        let mut dlogits = case.like(&logits);
        let call = RouteBackward {
            logits: &logits,
            routing: &routing,
            renormalise,
            dweights: &dweights,
            dlogits: &mut dlogits,
        };
        cpu.route_backward(call).unwrap();
        linear_backward(case, &dlogits, &experts.router, dx, Write::Accumulate);
    };
    (y, backward)
}

#[test]
fn a_sparse_block_without_renormalisation_is_that_of_transformers() {
    let case = Case::new("moe_plain", 64);
    let (x, dy) = (case.load("x"), case.load("dy"));
    let (y, backward) = routed(&case, &x, false);
    case.agrees("y", &y);
    let mut dx = case.cpu.zeros(DType::F32, x.shape()).unwrap();
    backward(&dy, &mut dx);
    case.agrees("dx", &dx);
}

#[test]
fn a_sparse_block_with_renormalisation_and_shared_expert_is_that_of_transformers() {
    let case = Case::new("moe_renormalised", 64);
    let cpu = &case.cpu;
    let (x, dy) = (case.load("x"), case.load("dy"));
    let [gate_w, up_w, down_w] =
        ["gate", "up", "down"].map(|part| case.weight(&format!("shared_expert.{part}_proj.weight")));
    let scalar_w = case.weight("shared_expert_gate.weight");
    let (mut y, backward) = routed(&case, &x, true);
    let (gate, up, scalar) = (
        linear(&case, &x, &gate_w),
        linear(&case, &x, &up_w),
        linear(&case, &x, &scalar_w),
    );
    let mut activation = case.like(&gate);
    cpu.swiglu_forward(&gate, &up, &mut activation).unwrap();
    let shared = linear(&case, &activation, &down_w);
    cpu.sigmoid_gate_forward(&shared, &scalar, &mut y, Write::Accumulate)
        .unwrap();
    case.agrees("y", &y);

    let mut dx = cpu.zeros(DType::F32, x.shape()).unwrap();
    backward(&dy, &mut dx);
    let (mut dshared, mut dscalar) = (case.like(&shared), case.like(&scalar));
    let call = SigmoidGateBackward {
        x: &shared,
        gate: &scalar,
        dy: &dy,
        dx: &mut dshared,
        dgate: &mut dscalar,
    };
    cpu.sigmoid_gate_backward(call).unwrap();
    linear_backward(&case, &dscalar, &scalar_w, &mut dx, Write::Accumulate);
    let mut dactivation = case.like(&activation);
    linear_backward(&case, &dshared, &down_w, &mut dactivation, Write::Overwrite);
    let (mut dgate, mut dup) = (case.like(&gate), case.like(&up));
    cpu.swiglu_backward(&gate, &up, &dactivation, &mut dgate, &mut dup)
        .unwrap();
    linear_backward(&case, &dgate, &gate_w, &mut dx, Write::Accumulate);
    linear_backward(&case, &dup, &up_w, &mut dx, Write::Accumulate);
    case.agrees("dx", &dx);
}
