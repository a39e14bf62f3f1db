//! The gated delta rule in chunks against the recurrence token by token, and its gates.

use brightrun_kernels::ops::{
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, Device, Precision,
};
use brightrun_kernels::oracle::{
    DeltaHeads, DeltaInputs, Real, delta_gates_backward, delta_gates_forward, delta_rule_backward, delta_rule_forward,
    l2_norm_forward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Segments, Tensor};

use super::backends::{Run, Traits, narrow, wide};
use super::weights::dense;
use crate::{judged, on_every_backend};

/// Document lengths, key heads, value heads, key and value dimensions, and the size of a step's decay.
#[derive(Clone, Debug)]
struct Shape {
    documents: &'static [usize],
    key_heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    decay: f32,
}

const fn shape(documents: &'static [usize], heads: (usize, usize), dims: (usize, usize), decay: f32) -> Shape {
    Shape {
        documents,
        key_heads: heads.0,
        value_heads: heads.1,
        key_dim: dims.0,
        value_dim: dims.1,
        decay,
    }
}

/// Lengths around the chunk, splits at every kind of place, head ratios 1 to 3, and decays from none to total.
const SHAPES: &[Shape] = &[
    shape(&[], (1, 1), (4, 4), 0.1),
    shape(&[1], (1, 1), (1, 1), 0.1),
    shape(&[2], (1, 2), (3, 5), 0.0),
    shape(&[63], (1, 1), (16, 16), 0.1),
    shape(&[64], (1, 1), (16, 16), 0.1),
    shape(&[65], (1, 2), (16, 16), 0.1),
    shape(&[127], (2, 2), (8, 24), 0.05),
    shape(&[128], (1, 1), (20, 12), 0.05),
    shape(&[200], (1, 3), (16, 16), 0.01),
    shape(&[1, 0, 64, 3, 65], (2, 4), (16, 16), 0.1),
    shape(&[70, 70], (1, 1), (17, 33), 5.0),
    shape(&[150], (1, 1), (8, 8), 60.0),
    shape(&[70], (1, 2), (128, 128), 0.02),
    shape(&[330, 5], (1, 1), (72, 40), 0.02),
];

struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
    dout: Vec<f32>,
    state: Vec<f32>,
}

impl Shape {
    fn segments(&self) -> Segments {
        Segments::from_lengths(self.documents.iter().copied())
    }

    fn heads(&self) -> DeltaHeads {
        DeltaHeads {
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            scale: f64::from(self.scale()),
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.key_dim as f32).sqrt()
    }

    fn state_extents(&self) -> [usize; 4] {
        [self.documents.len(), self.value_heads, self.key_dim, self.value_dim]
    }

    /// What the model feeds in: q and k of length 1, strengths in 0..1, decays below 0.
    fn inputs(&self) -> Inputs {
        let mut random = Random::new(self.documents.iter().sum::<usize>() as u64);
        let tokens = self.segments().tokens();
        let mut unit = |count: usize| {
            let raw: Vec<f64> = random.normal(count).into_iter().map(f64::from).collect();
            let (unit, _) = l2_norm_forward(&raw, self.key_dim, 1e-6);
            unit.into_iter().map(|value| value as f32).collect::<Vec<_>>()
        };
        let keys = tokens * self.key_heads * self.key_dim;
        let (q, k) = (unit(keys), unit(keys));
        let values = tokens * self.value_heads * self.value_dim;
        let gates = tokens * self.value_heads;
        Inputs {
            q,
            k,
            v: random.normal(values),
            decay: (0..gates).map(|_| -self.decay * random.unit() as f32).collect(),
            beta: (0..gates).map(|_| random.unit() as f32).collect(),
            dout: random.normal(values),
            state: random.normal(self.state_extents().iter().product()),
        }
    }

    /// Terms behind one element: dot products over a head, and the tokens that still shine through.
    fn length(&self) -> usize {
        self.key_dim + self.value_dim + self.segments().longest()
    }
}

impl Inputs {
    fn in_precision<'a, N: Real>(&self, own: &'a mut [Vec<N>; 5]) -> DeltaInputs<'a, N> {
        *own = [&self.q, &self.k, &self.v, &self.decay, &self.beta].map(|values| narrow(values));
        let [q, k, v, decay, beta] = own;
        DeltaInputs { q, k, v, decay, beta }
    }
}

/// An activation of these values, which are first rounded to what its dtype holds.
fn rounded<D: Device>(device: &D, dtype: DType, extents: [usize; 3], values: &mut [f32]) -> Tensor<D> {
    let [tokens, heads, dim] = extents;
    let tensor = dense(device, dtype, [tokens, heads * dim], values);
    values.copy_from_slice(&device.read_f32(&tensor).unwrap());
    tensor.reshaped(extents).unwrap()
}

/// The precision of a plain loop over activations of this dtype.
fn precision(activation: DType) -> Precision {
    match activation {
        DType::BF16 => Precision::Bf16,
        _ => Precision::F32,
    }
}

/// The inputs on a device.
struct Uploaded<D: Device> {
    q: Tensor<D>,
    k: Tensor<D>,
    v: Tensor<D>,
    decay: Tensor<D>,
    beta: Tensor<D>,
}

impl<D: Device> Uploaded<D> {
    /// The activations of `inputs` are first rounded to what their dtype holds.
    fn new(device: &D, shape: &Shape, inputs: &mut Inputs, activation: DType) -> Self {
        let tokens = inputs.decay.len() / shape.value_heads;
        let keys = [tokens, shape.key_heads, shape.key_dim];
        Self {
            q: rounded(device, activation, keys, &mut inputs.q),
            k: rounded(device, activation, keys, &mut inputs.k),
            v: rounded(
                device,
                activation,
                [tokens, shape.value_heads, shape.value_dim],
                &mut inputs.v,
            ),
            decay: device.upload_f32([tokens, shape.value_heads], &inputs.decay).unwrap(),
            beta: device.upload_f32([tokens, shape.value_heads], &inputs.beta).unwrap(),
        }
    }
}

impl<B: Traits> Uploaded<B> {
    /// `(out, solved)`.
    fn forward(
        &self,
        device: &B,
        segments: &Segments,
        scale: f32,
        state: Option<&mut Tensor<B>>,
    ) -> (Tensor<B>, Tensor<B>) {
        let mut out = device.alloc(self.v.dtype(), self.v.shape()).unwrap();
        let heads = self.decay.shape().row();
        let mut solved = device
            .alloc(DType::F32, [segments.tokens(), heads, DELTA_CHUNK])
            .unwrap();
        let call = DeltaForward {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            decay: &self.decay,
            beta: &self.beta,
            segments,
            scale,
            state,
            out: &mut out,
            solved: &mut solved,
        };
        device.delta_rule_forward(call).unwrap();
        (out, solved)
    }

    /// Gradients of q, k, v, decay and beta.
    fn backward(
        &self,
        device: &B,
        segments: &Segments,
        scale: f32,
        (solved, dout): (&Tensor<B>, &Tensor<B>),
    ) -> [Tensor<B>; 5] {
        let [mut dq, mut dk, mut dv, mut ddecay, mut dbeta] = [&self.q, &self.k, &self.v, &self.decay, &self.beta]
            .map(|tensor| device.alloc(tensor.dtype(), tensor.shape()).unwrap());
        let call = DeltaBackward {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            decay: &self.decay,
            beta: &self.beta,
            solved,
            dout,
            segments,
            scale,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        };
        device.delta_rule_backward(call).unwrap();
        [dq, dk, dv, ddecay, dbeta]
    }
}

fn forward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, activation: DType) {
    let (mut inputs, segments, heads) = (shape.inputs(), shape.segments(), shape.heads());
    let device = run.backend;
    let on = Uploaded::new(device, shape, &mut inputs, activation);
    for with_state in [false, true] {
        let start = if with_state {
            inputs.state.clone()
        } else {
            vec![0.0; inputs.state.len()]
        };
        let mut state = device.upload_f32(shape.state_extents(), &start).unwrap();
        let given = with_state.then_some(&mut state);
        let (out, _) = on.forward(device, &segments, shape.scale(), given);
        let (plain, oracle) = judged!(precision(activation), N, {
            let (mut own, mut state) = (Default::default(), narrow::<N>(&start));
            let out = delta_rule_forward(&inputs.in_precision::<N>(&mut own), &heads, &segments, &mut state);
            vec![wide(out), wide(state)]
        });
        let what = format_args!("delta_rule_forward {shape:?} state: {with_state} {activation}");
        // In chunks, A and P are factors too.
        let extra = if activation == DType::BF16 { 2 } else { 0 };
        let mut case = run.case(what, shape.length()).rounding(extra);
        case.compare("out", &out, &plain[0], &oracle[0]);
        if with_state {
            case.compare("state", &state, &plain[1], &oracle[1]);
        }
    }
}

const GRADIENTS: [&str; 5] = ["dq", "dk", "dv", "ddecay", "dbeta"];

fn backward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, activation: DType) {
    let (mut inputs, segments, heads) = (shape.inputs(), shape.segments(), shape.heads());
    let device = run.backend;
    let on = Uploaded::new(device, shape, &mut inputs, activation);
    let (_, solved) = on.forward(device, &segments, shape.scale(), None);
    let dout = [segments.tokens(), shape.value_heads, shape.value_dim];
    let dout = rounded(device, activation, dout, &mut inputs.dout);
    let gradients = on.backward(device, &segments, shape.scale(), (&solved, &dout));
    let (plain, oracle) = judged!(precision(activation), N, {
        let mut own = Default::default();
        let inputs_n = inputs.in_precision::<N>(&mut own);
        let gradients = delta_rule_backward(&inputs_n, &narrow::<N>(&inputs.dout), &heads, &segments);
        vec![
            wide(gradients.dq),
            wide(gradients.dk),
            wide(gradients.dv),
            wide(gradients.ddecay),
            wide(gradients.dbeta),
        ]
    });
    // In chunks, A or P, u, dr and the products of gradients with u are factors too.
    let extra = if activation == DType::BF16 { 4 } else { 0 };
    let what = format_args!("delta_rule_backward {shape:?} {activation}");
    let mut case = run.case(what, shape.length()).rounding(extra);
    for (i, (name, tensor)) in GRADIENTS.into_iter().zip(&gradients).enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

/// Every shape in every dtype that activations may have.
fn cases<B: Traits>(run: &Run<'_, B>) -> impl Iterator<Item = (&'static Shape, DType)> + use<B> {
    let dtypes = run.activations();
    SHAPES
        .iter()
        .flat_map(|shape| dtypes.iter().map(move |dtype| (shape, *dtype)))
}

#[test]
fn delta_rule_in_chunks_is_the_recurrence() {
    on_every_backend!("delta_rule_forward", [DeltaRuleForward], |run| {
        for (shape, activation) in cases(run) {
            forward(run, shape, activation);
        }
    });
}

#[test]
fn delta_rule_gradients_are_those_of_the_recurrence() {
    on_every_backend!("delta_rule_backward", [DeltaRuleForward, DeltaRuleBackward], |run| {
        for (shape, activation) in cases(run) {
            backward(run, shape, activation);
        }
    });
}

/// A part of a packed tensor's rows.
fn rows(values: &[f32], width: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    values[range.start * width..range.end * width].to_vec()
}

impl Inputs {
    /// Only these tokens.
    fn part(&self, shape: &Shape, range: std::ops::Range<usize>) -> Self {
        let (keys, values) = (shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim);
        Self {
            q: rows(&self.q, keys, range.clone()),
            k: rows(&self.k, keys, range.clone()),
            v: rows(&self.v, values, range.clone()),
            decay: rows(&self.decay, shape.value_heads, range.clone()),
            beta: rows(&self.beta, shape.value_heads, range.clone()),
            dout: rows(&self.dout, values, range),
            state: self.state.clone(),
        }
    }
}

impl Shape {
    /// Widths of a token in q, k, v, decay and beta, and so in their gradients.
    fn widths(&self) -> [usize; 5] {
        let (keys, values) = (self.key_heads * self.key_dim, self.value_heads * self.value_dim);
        [keys, keys, values, self.value_heads, self.value_heads]
    }

    /// The output and all gradients of these documents.
    fn both<B: Traits>(&self, device: &B, inputs: &mut Inputs, segments: &Segments, dtype: DType) -> Vec<Vec<f32>> {
        let on = Uploaded::new(device, self, inputs, dtype);
        let (out, solved) = on.forward(device, segments, self.scale(), None);
        let dout = [segments.tokens(), self.value_heads, self.value_dim];
        let dout = rounded(device, dtype, dout, &mut inputs.dout);
        let gradients = on.backward(device, segments, self.scale(), (&solved, &dout));
        let all = std::iter::once(&out).chain(&gradients);
        all.map(|tensor| device.read_f32(tensor).unwrap()).collect()
    }
}

#[test]
fn packed_documents_give_the_bits_they_give_alone() {
    let packed = shape(&[70, 1, 64, 129], (2, 4), (16, 8), 0.2);
    let inputs = packed.inputs();
    let widths = std::iter::once(packed.value_heads * packed.value_dim).chain(packed.widths());
    let widths: Vec<usize> = widths.collect();
    on_every_backend!("delta_rule, packed", [DeltaRuleForward, DeltaRuleBackward], |run| {
        let device = run.backend;
        for activation in run.activations() {
            let together = packed.both(device, &mut packed.inputs(), &packed.segments(), *activation);
            for range in packed.segments().ranges() {
                let segments = Segments::from_lengths([range.len()]);
                let mut part = inputs.part(&packed, range.clone());
                let alone = packed.both(device, &mut part, &segments, *activation);
                for (i, ((together, alone), width)) in together.iter().zip(&alone).zip(&widths).enumerate() {
                    let same = rows(together, *width, range.clone()) == *alone;
                    assert!(same, "tensor {i} of {range:?} {activation} on {}", run.name);
                }
                run.case(format_args!("document {range:?} {activation}"), 0);
            }
        }
    });
}

#[test]
fn a_prompt_and_then_single_tokens_continue_the_recurrence() {
    let whole = shape(&[90], (1, 2), (16, 16), 0.1);
    let (inputs, heads) = (whole.inputs(), whole.heads());
    on_every_backend!("delta_rule_forward", [DeltaRuleForward], |run| {
        let device = run.backend;
        let mut state = device.zeros(DType::F32, whole.state_extents()).unwrap();
        let mut outputs = Vec::new();
        for range in std::iter::once(0..70).chain((70..90).map(|t| t..t + 1)) {
            let mut part = inputs.part(&whole, range.clone());
            let on = Uploaded::new(device, &whole, &mut part, DType::F32);
            let segments = Segments::from_lengths([range.len()]);
            let (out, _) = on.forward(device, &segments, whole.scale(), Some(&mut state));
            outputs.extend(device.read_f32(&out).unwrap());
        }
        let out = device.upload_f32([outputs.len()], &outputs).unwrap();
        let (plain, oracle) = judged!(Precision::F32, N, {
            let (mut own, mut state) = (Default::default(), vec![N::new(0.0); inputs.state.len()]);
            let inputs = inputs.in_precision::<N>(&mut own);
            vec![wide(delta_rule_forward(&inputs, &heads, &whole.segments(), &mut state))]
        });
        let mut case = run.case("delta_rule_forward, token by token", whole.length());
        case.compare("out", &out, &plain[0], &oracle[0]);
    });
}

fn gates<B: Traits>(run: &mut Run<'_, B>, tokens: usize, width: usize, activation: DType) {
    let mut random = Random::new(width as u64);
    let mut spread = |count: usize, factor: f32| -> Vec<f32> {
        random.normal(count).into_iter().map(|value| factor * value).collect()
    };
    let count = tokens * width;
    // Far enough out that softplus is flat on one side and linear on the other.
    let (mut a, mut b) = (spread(count, 20.0), spread(count, 4.0));
    let (ddecay, dbeta) = (spread(count, 1.0), spread(count, 1.0));
    let (a_log, dt_bias) = (spread(width, 1.0), spread(width, 1.0));
    let device = run.backend;
    let wide_tensor = |values: &[f32]| device.upload_f32([tokens, width], values).unwrap();
    let alloc = || device.alloc(DType::F32, [tokens, width]).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let vector = |values: &[f32]| dense(device, dtype, [1, width], values).reshaped([width]).unwrap();
        let (a_log_t, dt_bias_t) = (vector(&a_log), vector(&dt_bias));
        let (a_log, dt_bias) = (device.read_f32(&a_log_t).unwrap(), device.read_f32(&dt_bias_t).unwrap());
        let [a_t, b_t] = [&mut a, &mut b].map(|values| run.upload(activation, [tokens, width], values));
        let (ddecay_t, dbeta_t) = (wide_tensor(&ddecay), wide_tensor(&dbeta));
        let (mut decay, mut beta) = (alloc(), alloc());
        let [mut da, mut db] = [(); 2].map(|()| run.output(activation, [tokens, width]));
        device
            .delta_gates_forward(DeltaGatesForward {
                a: &a_t,
                b: &b_t,
                a_log: &a_log_t,
                dt_bias: &dt_bias_t,
                decay: &mut decay,
                beta: &mut beta,
            })
            .unwrap();
        let strengths = device.read_f32(&beta).unwrap();
        device
            .delta_gates_backward(DeltaGatesBackward {
                a: &a_t,
                a_log: &a_log_t,
                dt_bias: &dt_bias_t,
                beta: &beta,
                ddecay: &ddecay_t,
                dbeta: &dbeta_t,
                da: &mut da,
                db: &mut db,
            })
            .unwrap();
        let (plain, oracle) = judged!(Precision::F32, N, {
            let (a, b) = (narrow::<N>(&a), narrow::<N>(&b));
            let frozen = (&narrow::<N>(&a_log)[..], &narrow::<N>(&dt_bias)[..]);
            let (decay, beta) = delta_gates_forward(&a, &b, frozen.0, frozen.1);
            let gradients = (&narrow::<N>(&ddecay)[..], &narrow::<N>(&dbeta)[..]);
            let (da, db) = delta_gates_backward(&a, &narrow::<N>(&strengths), frozen, gradients);
            vec![wide(decay), wide(beta), wide(da), wide(db)]
        });
        let mut case = run.case(format_args!("delta_gates {tokens}×{width} {dtype} {activation}"), 8);
        for (i, (name, tensor)) in [("decay", &decay), ("beta", &beta), ("da", &da), ("db", &db)]
            .into_iter()
            .enumerate()
        {
            case.compare(name, tensor, &plain[i], &oracle[i]);
        }
    }
}

#[test]
fn delta_gates_follow_their_formulas() {
    on_every_backend!("delta_gates", [DeltaGatesForward, DeltaGatesBackward], |run| {
        for (tokens, width) in [(0, 3), (1, 1), (7, 5), (33, 32)] {
            for activation in run.activations() {
                gates(run, tokens, width, *activation);
            }
        }
    });
}
