//! A case's operands, and one call of its op on them.

use brightrun_kernels::ops::{
    AdamW, AttentionBackward, AttentionForward, BlockMoment, ConvolutionBackward, DELTA_CHUNK, DeltaBackward,
    DeltaForward, DeltaInputsForward, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, LinearBackward,
    LinearCrossEntropy, LinearForward, LoraBackward, LoraForward, MomentsMut, NormForward, NormWeight, Precision,
    Routing, RowOrder, Trained, Write,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Result, Tensor, Weight, WeightStack};

use crate::clock::Clock;
use crate::operands::{Setting, documents, half, routing, single, single_of, stack, weight};
use crate::work::{Heads, Layer, Routed, Work};

/// What an op wrote: of each of its tensors the first and the last [`SUBSET`] elements.
pub type Results = Vec<Vec<f32>>;

/// One call of a case's op; given somewhere to, it also reads what was written.
pub type Body<'a> = Box<dyn FnMut(Option<&mut Results>) -> Result<()> + 'a>;

/// Elements of a tensor that are compared, from each end.
const SUBSET: usize = 1 << 18;

/// Makes the operands of a case, as many sets as are taken in `turns`.
pub fn prepare<'a, B: Clock>(backend: &'a B, work: Work, precision: Precision, turns: usize) -> Result<Body<'a>> {
    let setting = Setting { backend, precision };
    match work {
        Work::Copy { elements } => {
            let source = setting.activation(&[elements], 1.0, 1)?;
            let mut target = setting.room(&[elements])?;
            Ok(Box::new(move |results| {
                backend.copy(&source, &mut target)?;
                keep(backend, results, &[&target])
            }))
        }
        Work::Dequantize { outputs, inputs } => {
            let weight = weight(backend, outputs, inputs, true, 1)?;
            let mut out = backend.alloc(DType::BF16, [outputs, inputs])?;
            Ok(Box::new(move |results| {
                backend.dequantize(&weight, &mut out)?;
                keep(backend, results, &[&out])
            }))
        }
        Work::Quantize { outputs, inputs } => {
            let source = half(backend, &[outputs, inputs], 0.02, 1)?;
            Ok(Box::new(move |results| {
                let weight = Weight::Nf4(backend.quantize_nf4(&source, true)?);
                keep_weight(backend, results, &weight)
            }))
        }
        Work::QuantizeFp8 { outputs, inputs } => quantize_fp8(backend, outputs, inputs),
        Work::Linear(layer) => linear(setting, layer, turns),
        Work::LinearInput(layer) => linear_input(setting, layer, turns),
        Work::Grouped(routed) => grouped(setting, routed),
        Work::GroupedInput(routed) => grouped_input(setting, routed),
        Work::Experts(routed) => experts_forward(setting, routed),
        Work::GroupedLora { routed, rank } => grouped_lora(setting, routed, rank),
        Work::Delta(heads) => delta(setting, heads, false),
        Work::DeltaBackward(heads) => delta(setting, heads, true),
        Work::DeltaInputs(heads) => delta_inputs(setting, heads),
        Work::ConvolutionBackward {
            tokens,
            documents,
            channels,
        } => convolution_backward(setting, tokens, documents, channels),
        Work::Loss {
            tokens,
            width,
            vocabulary,
        } => loss(setting, tokens, width, vocabulary),
        Work::Attention(heads) => attention(setting, heads, turns, false),
        Work::AttentionBackward(heads) => attention(setting, heads, turns, true),
        Work::Adamw { tensors, elements } => adamw(backend, tensors, elements, false),
        Work::Adamw8bit { tensors, elements } => adamw(backend, tensors, elements, true),
        Work::Norm { tokens, width } => norm(setting, tokens, width),
        Work::Swiglu { tokens, width } => {
            let gate = setting.activation(&[tokens, width], 1.0, 1)?;
            let up = setting.activation(&[tokens, width], 1.0, 2)?;
            let mut y = setting.room(&[tokens, width])?;
            Ok(Box::new(move |results| {
                backend.swiglu_forward(&gate, &up, &mut y)?;
                keep(backend, results, &[&y])
            }))
        }
    }
}

fn keep<B: Clock>(backend: &B, results: Option<&mut Results>, outputs: &[&Tensor<B>]) -> Result<()> {
    let Some(results) = results else { return Ok(()) };
    for output in outputs {
        results.push(ends(backend, output)?);
    }
    Ok(())
}

/// A quantised matrix is kept as what it decodes to.
fn keep_weight<B: Clock>(backend: &B, results: Option<&mut Results>, weight: &Weight<B>) -> Result<()> {
    if results.is_none() {
        return Ok(());
    }
    let (outputs, inputs) = weight.extents();
    let mut decoded = backend.alloc(DType::F32, [outputs, inputs])?;
    backend.dequantize(weight, &mut decoded)?;
    keep(backend, results, &[&decoded])
}

/// The first and the last elements of a tensor.
fn ends<B: Clock>(backend: &B, tensor: &Tensor<B>) -> Result<Vec<f32>> {
    let elements = tensor.shape().elements();
    if elements <= 2 * SUBSET {
        return backend.read_f32(tensor);
    }
    let size = tensor.dtype().size_bytes();
    let mut bytes = vec![0; 2 * SUBSET * size];
    let (first, last) = bytes.split_at_mut(SUBSET * size);
    backend.read_at(tensor, 0, first)?;
    backend.read_at(tensor, (elements - SUBSET) * size, last)?;
    // By way of a small tensor, so that the backend's own conversion is used.
    backend.read_f32(&backend.upload(tensor.dtype(), [2 * SUBSET], &bytes)?)
}

fn quantize_fp8<'a, B: Clock>(backend: &'a B, outputs: usize, inputs: usize) -> Result<Body<'a>> {
    const BLOCK: [usize; 2] = [128, 128];
    let mut random = Random::new(1);
    // All codes but those that are no number, with scales that bring them to a weight's size.
    let codes: Vec<u8> = (0..outputs * inputs).map(|_| random.bits() as u8 & 0xbf).collect();
    let codes = backend.upload(DType::F8E4M3, [outputs, inputs], &codes)?;
    let grid = [outputs.div_ceil(BLOCK[0]), inputs.div_ceil(BLOCK[1])];
    let scales = single_of(backend, &grid, 2, |normal| 0.01 + 0.005 * normal.abs())?;
    Ok(Box::new(move |results| {
        let weight = Weight::Nf4(backend.quantize_nf4_fp8(&codes, &scales, BLOCK, true)?);
        keep_weight(backend, results, &weight)
    }))
}

const LORA_SCALE: f32 = 2.0;

/// Sets of an activation and a frozen weight.
fn factor_sets<B: Clock>(
    setting: &Setting<'_, B>,
    layer: Layer,
    width: usize,
    turns: usize,
) -> Result<Vec<(Tensor<B>, Weight<B>)>> {
    let sets = (0..turns).map(|turn| {
        let seed = 10 * turn as u64 + 5;
        Ok((
            setting.activation(&[layer.tokens, width], 1.0, seed)?,
            weight(setting.backend, layer.outputs, layer.inputs, layer.nf4, seed + 1)?,
        ))
    });
    sets.collect()
}

fn linear<'a, B: Clock>(setting: Setting<'a, B>, layer: Layer, turns: usize) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let Layer {
        tokens,
        outputs,
        inputs,
        rank,
        ..
    } = layer;
    let mut sets = factor_sets(&setting, layer, inputs, turns)?;
    let a = single(backend, &[rank.max(1), inputs], 0.02, 2)?;
    let b = single(backend, &[outputs, rank.max(1)], 0.02, 3)?;
    let mut hidden = backend.alloc(DType::F32, [tokens, rank.max(1)])?;
    let mut y = setting.room(&[tokens, outputs])?;
    Ok(Box::new(move |results| {
        sets.rotate_left(1);
        let (x, weight) = &sets[0];
        let lora = LoraForward {
            a: &a,
            b: &b,
            scale: LORA_SCALE,
            hidden: &mut hidden,
        };
        backend.linear_forward(LinearForward {
            x,
            weight,
            bias: None,
            lora: (rank > 0).then_some(lora),
            precision,
            y: &mut y,
        })?;
        keep(backend, results, &[&y])
    }))
}

fn linear_input<'a, B: Clock>(setting: Setting<'a, B>, layer: Layer, turns: usize) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let Layer {
        tokens,
        outputs,
        inputs,
        rank,
        ..
    } = layer;
    let mut sets = factor_sets(&setting, layer, outputs, turns)?;
    let x = setting.activation(&[tokens, inputs], 1.0, 1)?;
    let a = single(backend, &[rank.max(1), inputs], 0.02, 2)?;
    let b = single(backend, &[outputs, rank.max(1)], 0.02, 3)?;
    let hidden = single(backend, &[tokens, rank.max(1)], 1.0, 4)?;
    let mut gradient_a = backend.zeros(DType::F32, [rank.max(1), inputs])?;
    let mut gradient_b = backend.zeros(DType::F32, [outputs, rank.max(1)])?;
    let mut dx = setting.room(&[tokens, inputs])?;
    Ok(Box::new(move |results| {
        sets.rotate_left(1);
        let (dy, weight) = &sets[0];
        let lora = LoraBackward {
            x: &x,
            a: &a,
            b: &b,
            scale: LORA_SCALE,
            hidden: &hidden,
            gradient_a: &mut gradient_a,
            gradient_b: &mut gradient_b,
        };
        backend.linear_backward(LinearBackward {
            dy,
            weight,
            lora: (rank > 0).then_some(lora),
            precision,
            dx: Some((&mut dx, Write::Overwrite)),
        })?;
        match rank {
            0 => keep(backend, results, &[&dx]),
            _ => keep(backend, results, &[&dx, &gradient_a, &gradient_b]),
        }
    }))
}

fn grouped<'a, B: Clock>(setting: Setting<'a, B>, routed: Routed) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let routing = routing(backend, &routed)?;
    let x = setting.activation(&[routed.tokens, routed.inputs], 1.0, 1)?;
    let stack = stack(backend, routed.experts, routed.outputs, routed.inputs)?;
    let mut y = setting.room(&[routed.tokens * routed.top, routed.outputs])?;
    Ok(Box::new(move |results| {
        through(backend, precision, (&x, RowOrder::Token), &stack, &routing, &mut y)?;
        keep(backend, results, &[&y])
    }))
}

fn through<B: Clock>(
    backend: &B,
    precision: Precision,
    (x, x_order): (&Tensor<B>, RowOrder),
    weight: &WeightStack<B>,
    routing: &Routing<B>,
    y: &mut Tensor<B>,
) -> Result<()> {
    backend.grouped_linear_forward(GroupedLinearForward {
        x,
        x_order,
        routing,
        weight,
        lora: None,
        precision,
        y,
    })
}

/// All of the routed experts' forward pass, from tokens to their weighted sums.
fn experts_forward<'a, B: Clock>(setting: Setting<'a, B>, routed: Routed) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let (inner, width, rows) = (routed.outputs, routed.inputs, routed.tokens * routed.top);
    let routing = routing(backend, &routed)?;
    let x = setting.activation(&[routed.tokens, width], 1.0, 1)?;
    let gate = stack(backend, routed.experts, inner, width)?;
    let up = stack(backend, routed.experts, inner, width)?;
    let down = stack(backend, routed.experts, width, inner)?;
    let (mut gated, mut upped) = (setting.room(&[rows, inner])?, setting.room(&[rows, inner])?);
    let mut activated = setting.room(&[rows, inner])?;
    let (mut grouped, mut y) = (setting.room(&[rows, width])?, setting.room(&[routed.tokens, width])?);
    Ok(Box::new(move |results| {
        let tokens = (&x, RowOrder::Token);
        through(backend, precision, tokens, &gate, &routing, &mut gated)?;
        through(backend, precision, tokens, &up, &routing, &mut upped)?;
        backend.routed_swiglu_forward(&gated, &upped, &routing, &mut activated)?;
        let rows = (&activated, RowOrder::Grouped);
        through(backend, precision, rows, &down, &routing, &mut grouped)?;
        backend.combine(&grouped, &routing, &mut y, Write::Overwrite)?;
        keep(backend, results, &[&y])
    }))
}

fn grouped_input<'a, B: Clock>(setting: Setting<'a, B>, routed: Routed) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let rows = routed.tokens * routed.top;
    let routing = routing(backend, &routed)?;
    let dy = setting.activation(&[rows, routed.outputs], 1.0, 1)?;
    let stack = stack(backend, routed.experts, routed.outputs, routed.inputs)?;
    let mut dx = setting.room(&[rows, routed.inputs])?;
    Ok(Box::new(move |results| {
        backend.grouped_linear_backward(GroupedLinearBackward {
            dy: &dy,
            dy_order: RowOrder::Grouped,
            routing: &routing,
            weight: &stack,
            lora: None,
            precision,
            dx: Some((&mut dx, Write::Overwrite)),
        })?;
        keep(backend, results, &[&dx])
    }))
}

fn grouped_lora<'a, B: Clock>(setting: Setting<'a, B>, routed: Routed, rank: usize) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let Routed {
        tokens,
        experts,
        top,
        outputs,
        inputs,
        ..
    } = routed;
    let routing = routing(backend, &routed)?;
    let x = setting.activation(&[tokens, inputs], 1.0, 1)?;
    let dy = setting.activation(&[tokens * top, outputs], 1.0, 2)?;
    let stack = stack(backend, experts, outputs, inputs)?;
    let a = single(backend, &[experts, rank, inputs], 0.02, 3)?;
    let b = single(backend, &[experts, outputs, rank], 0.02, 4)?;
    let hidden = single(backend, &[tokens * top, rank], 1.0, 5)?;
    let mut gradient_a = backend.zeros(DType::F32, [experts, rank, inputs])?;
    let mut gradient_b = backend.zeros(DType::F32, [experts, outputs, rank])?;
    Ok(Box::new(move |results| {
        let lora = GroupedLoraBackward {
            x: &x,
            x_order: RowOrder::Token,
            a: &a,
            b: &b,
            scale: LORA_SCALE,
            hidden: &hidden,
            gradient_a: &mut gradient_a,
            gradient_b: &mut gradient_b,
        };
        backend.grouped_linear_backward(GroupedLinearBackward {
            dy: &dy,
            dy_order: RowOrder::Grouped,
            routing: &routing,
            weight: &stack,
            lora: Some(lora),
            precision,
            dx: None,
        })?;
        keep(backend, results, &[&gradient_a, &gradient_b])
    }))
}

fn delta<'a, B: Clock>(setting: Setting<'a, B>, shape: Heads, backward: bool) -> Result<Body<'a>> {
    let backend = setting.backend;
    let Heads {
        tokens,
        keys,
        heads,
        dim,
        ..
    } = shape;
    let segments = documents(tokens, shape.documents);
    let unit = 1.0 / (dim as f32).sqrt();
    let (keys, values) = ([tokens, keys, dim], [tokens, heads, dim]);
    let (q, k) = (setting.activation(&keys, unit, 1)?, setting.activation(&keys, unit, 2)?);
    let (v, dout) = (
        setting.activation(&values, 1.0, 3)?,
        setting.activation(&values, 1.0, 4)?,
    );
    let gates = [tokens, heads];
    let decay = single_of(backend, &gates, 6, |normal| -0.05 * normal.exp())?;
    let beta = single_of(backend, &gates, 7, |normal| 1.0 / (1.0 + (-normal).exp()))?;
    let mut out = setting.room(&values)?;
    let mut solved = backend.alloc(DType::F32, [tokens, heads, DELTA_CHUNK])?;
    let (mut dq, mut dk, mut dv) = (setting.room(&keys)?, setting.room(&keys)?, setting.room(&values)?);
    let mut ddecay = backend.alloc(DType::F32, gates)?;
    let mut dbeta = backend.alloc(DType::F32, gates)?;
    let mut solve = true;
    Ok(Box::new(move |results| {
        // A backward pass needs one forward pass before it, for the solved triangle.
        if !backward || std::mem::take(&mut solve) {
            backend.delta_rule_forward(DeltaForward {
                q: &q,
                k: &k,
                v: &v,
                decay: &decay,
                beta: &beta,
                segments: &segments,
                scale: unit,
                state: None,
                out: &mut out,
                solved: &mut solved,
            })?;
        }
        if !backward {
            return keep(backend, results, &[&out]);
        }
        backend.delta_rule_backward(DeltaBackward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            solved: &solved,
            dout: &dout,
            segments: &segments,
            scale: unit,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        })?;
        keep(backend, results, &[&dq, &dk, &dv, &ddecay, &dbeta])
    }))
}

/// Taps of the convolution.
const TAPS: usize = 4;

fn delta_inputs<'a, B: Clock>(setting: Setting<'a, B>, shape: Heads) -> Result<Body<'a>> {
    let backend = setting.backend;
    let Heads {
        tokens,
        keys,
        heads,
        dim,
        ..
    } = shape;
    let segments = documents(tokens, shape.documents);
    let fused = setting.activation(&[tokens, 2 * (keys + heads) * dim], 1.0, 1)?;
    let ba = setting.activation(&[tokens, 2 * heads], 1.0, 2)?;
    let taps = |channels, seed| single(backend, &[channels, TAPS], 0.5, seed);
    let taps = [taps(keys * dim, 3)?, taps(keys * dim, 4)?, taps(heads * dim, 5)?];
    let (a_log, dt_bias) = (single(backend, &[heads], 0.5, 6)?, single(backend, &[heads], 0.5, 7)?);
    let (mut q, mut k) = (setting.room(&[tokens, keys, dim])?, setting.room(&[tokens, keys, dim])?);
    let (mut v, mut z) = (
        setting.room(&[tokens, heads, dim])?,
        setting.room(&[tokens, heads, dim])?,
    );
    let mut decay = backend.alloc(DType::F32, [tokens, heads])?;
    let mut beta = backend.alloc(DType::F32, [tokens, heads])?;
    Ok(Box::new(move |results| {
        backend.delta_inputs_forward(DeltaInputsForward {
            fused: &fused,
            ba: &ba,
            taps: [&taps[0], &taps[1], &taps[2]],
            a_log: &a_log,
            dt_bias: &dt_bias,
            eps: 1e-6,
            segments: &segments,
            q: &mut q,
            k: &mut k,
            v: &mut v,
            z: &mut z,
            decay: &mut decay,
            beta: &mut beta,
        })?;
        keep(backend, results, &[&q, &k, &v, &z, &decay, &beta])
    }))
}

fn convolution_backward<'a, B: Clock>(
    setting: Setting<'a, B>,
    tokens: usize,
    count: usize,
    channels: usize,
) -> Result<Body<'a>> {
    let backend = setting.backend;
    let segments = documents(tokens, count);
    let x = setting.activation(&[tokens, channels], 1.0, 1)?;
    let dy = setting.activation(&[tokens, channels], 1.0, 2)?;
    let weight = single(backend, &[channels, TAPS], 0.5, 3)?;
    let mut dx = setting.room(&[tokens, channels])?;
    Ok(Box::new(move |results| {
        backend.convolution_backward(ConvolutionBackward {
            x: &x,
            weight: &weight,
            bias: None,
            segments: &segments,
            dy: &dy,
            dx: &mut dx,
        })?;
        keep(backend, results, &[&dx])
    }))
}

fn loss<'a, B: Clock>(setting: Setting<'a, B>, tokens: usize, width: usize, vocabulary: usize) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let x = setting.activation(&[tokens, width], 1.0, 1)?;
    let head = weight(backend, vocabulary, width, false, 2)?;
    let mut random = Random::new(3);
    let labels: Vec<i32> = (0..tokens).map(|_| random.below(vocabulary) as i32).collect();
    let labels = backend.upload_i32([tokens], &labels)?;
    let mut losses = backend.alloc(DType::F32, [tokens])?;
    let mut dx = setting.room(&[tokens, width])?;
    let one = backend.upload_f32([1], &[1.0])?;
    Ok(Box::new(move |results| {
        backend.linear_cross_entropy(LinearCrossEntropy {
            x: &x,
            head: &head,
            labels: &labels,
            precision,
            losses: &mut losses,
            dx: Some((&mut dx, &one)),
        })?;
        keep(backend, results, &[&losses, &dx])
    }))
}

fn attention<'a, B: Clock>(setting: Setting<'a, B>, shape: Heads, turns: usize, backward: bool) -> Result<Body<'a>> {
    let Setting { backend, precision } = setting;
    let Heads {
        tokens,
        keys,
        heads,
        dim,
        ..
    } = shape;
    let segments = documents(tokens, shape.documents);
    let (queries, keys) = ([tokens, heads, dim], [tokens, keys, dim]);
    let sets = (0..turns).map(|turn| {
        let seed = 10 * turn as u64;
        let (q, dout) = (
            setting.activation(&queries, 1.0, seed + 1)?,
            setting.activation(&queries, 1.0, seed + 2)?,
        );
        let (k, v) = (
            setting.activation(&keys, 1.0, seed + 3)?,
            setting.activation(&keys, 1.0, seed + 4)?,
        );
        let (out, lse) = (setting.room(&queries)?, backend.alloc(DType::F32, [tokens, heads])?);
        Ok((q, k, v, dout, out, lse))
    });
    let mut sets = sets.collect::<Result<Vec<_>>>()?;
    let (mut dq, mut dk, mut dv) = (setting.room(&queries)?, setting.room(&keys)?, setting.room(&keys)?);
    let scale = 1.0 / (dim as f32).sqrt();
    // A backward pass needs one forward pass before it, for the outputs and their sums.
    let mut unprepared = turns;
    Ok(Box::new(move |results| {
        sets.rotate_left(1);
        let (q, k, v, dout, out, lse) = &mut sets[0];
        if !backward || unprepared > 0 {
            unprepared = unprepared.saturating_sub(1);
            backend.attention_forward(AttentionForward {
                q,
                k,
                v,
                query_segments: &segments,
                key_segments: &segments,
                scale,
                precision,
                out,
                lse,
            })?;
        }
        if !backward {
            return keep(backend, results, &[out]);
        }
        backend.attention_backward(AttentionBackward {
            q,
            k,
            v,
            out,
            lse,
            dout,
            segments: &segments,
            scale,
            precision,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        })?;
        keep(backend, results, &[&dq, &dk, &dv])
    }))
}

const SETTINGS: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.0,
    step: 3,
    gradient_scale: 1.0,
};

/// One of the tensors of an optimizer's step.
struct Adapted<B: Clock> {
    parameter: Tensor<B>,
    gradient: Tensor<B>,
    moments: Moments<B>,
}

enum Moments<B: Clock> {
    Single([Tensor<B>; 2]),
    Blocks([BlockMoment<B>; 2]),
}

impl<B: Clock> Adapted<B> {
    fn new(backend: &B, elements: usize, in_8_bits: bool, seed: u64) -> Result<Self> {
        let zeros = || backend.zeros(DType::F32, [elements]);
        let parameter = zeros()?;
        let blocks = || BlockMoment::zeros(backend, parameter.shape());
        let moments = match in_8_bits {
            true => Moments::Blocks([blocks()?, blocks()?]),
            false => Moments::Single([zeros()?, zeros()?]),
        };
        Ok(Self {
            gradient: single(backend, &[elements], 0.01, seed)?,
            moments,
            parameter,
        })
    }

    fn trained(&mut self) -> Trained<'_, B> {
        Trained {
            parameter: &mut self.parameter,
            gradient: &self.gradient,
            moments: match &mut self.moments {
                Moments::Single([m, v]) => MomentsMut::Single { m, v },
                Moments::Blocks([m, v]) => MomentsMut::Blocks { m, v },
            },
        }
    }
}

/// Parameters begin as zeros: what they are after one step is that step. The first and the last are kept.
fn adamw<'a, B: Clock>(backend: &'a B, tensors: usize, elements: usize, in_8_bits: bool) -> Result<Body<'a>> {
    let made = (1..=tensors as u64).map(|seed| Adapted::new(backend, elements, in_8_bits, seed));
    let mut all = made.collect::<Result<Vec<_>>>()?;
    Ok(Box::new(move |results| {
        backend.adamw_step_many(all.iter_mut().map(Adapted::trained).collect(), &SETTINGS)?;
        let ends = [all.first(), all.last()].into_iter().flatten();
        keep(backend, results, &ends.map(|one| &one.parameter).collect::<Vec<_>>())
    }))
}

fn norm<'a, B: Clock>(setting: Setting<'a, B>, tokens: usize, width: usize) -> Result<Body<'a>> {
    let backend = setting.backend;
    let x = setting.activation(&[tokens, width], 1.0, 1)?;
    let weight = single(backend, &[width], 1.0, 2)?;
    let mut y = setting.room(&[tokens, width])?;
    let mut rstd = backend.alloc(DType::F32, [tokens])?;
    Ok(Box::new(move |results| {
        backend.rms_norm_forward(NormForward {
            x: &x,
            weight: &weight,
            style: NormWeight::Plain,
            eps: 1e-6,
            y: &mut y,
            rstd: &mut rstd,
        })?;
        keep(backend, results, &[&y])
    }))
}
