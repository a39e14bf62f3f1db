//! Operands: normal numbers of the size that activations and weights have.

use brightrun_kernels::ops::{Backend, Precision, Routing};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Result, Segments, Shape, Tensor, Weight, WeightStack};
use half::bf16;

use crate::routing::chosen;
use crate::work::Routed;

/// Numbers made on the host; a larger tensor repeats them, which no kernel notices.
const DISTINCT: usize = 1 << 20;

fn values(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let distinct = Random::new(seed).normal(count.min(DISTINCT));
    // As bf16 has them: the same operands at every precision.
    let scaled = distinct.iter().map(|value| bf16::from_f32(value * scale).to_f32());
    let scaled: Vec<f32> = scaled.collect();
    scaled.into_iter().cycle().take(count).collect()
}

/// A float32 tensor.
pub fn single<B: Backend>(backend: &B, shape: &[usize], scale: f32, seed: u64) -> Result<Tensor<B>> {
    let shape = Shape::new(shape);
    backend.upload_f32(shape, &values(shape.elements(), scale, seed))
}

/// A float32 tensor of `convert` of normal numbers.
pub fn single_of<B: Backend>(
    backend: &B,
    shape: &[usize],
    seed: u64,
    convert: impl Fn(f32) -> f32,
) -> Result<Tensor<B>> {
    let shape = Shape::new(shape);
    let values = values(shape.elements(), 1.0, seed);
    backend.upload_f32(shape, &values.into_iter().map(convert).collect::<Vec<f32>>())
}

/// A tensor in bf16, whatever the precision.
pub fn half<B: Backend>(backend: &B, shape: &[usize], scale: f32, seed: u64) -> Result<Tensor<B>> {
    converted(backend, single(backend, shape, scale, seed)?, DType::BF16)
}

fn converted<B: Backend>(backend: &B, source: Tensor<B>, dtype: DType) -> Result<Tensor<B>> {
    if source.dtype() == dtype {
        return Ok(source);
    }
    let mut target = backend.alloc(dtype, source.shape())?;
    backend.copy(&source, &mut target)?;
    Ok(target)
}

/// A backend and the precision that a case is done in.
pub struct Setting<'a, B> {
    pub backend: &'a B,
    pub precision: Precision,
}

impl<B: Backend> Setting<'_, B> {
    /// An activation, in the dtype the backend wants.
    pub fn activation(&self, shape: &[usize], scale: f32, seed: u64) -> Result<Tensor<B>> {
        let source = single(self.backend, shape, scale, seed)?;
        converted(self.backend, source, self.backend.activation_dtype(self.precision))
    }

    /// Room for an activation.
    pub fn room(&self, shape: &[usize]) -> Result<Tensor<B>> {
        let dtype = self.backend.activation_dtype(self.precision);
        self.backend.alloc(dtype, Shape::new(shape))
    }
}

/// A frozen matrix, as Xavier would draw it.
pub fn weight<B: Backend>(backend: &B, outputs: usize, inputs: usize, nf4: bool, seed: u64) -> Result<Weight<B>> {
    let scale = 1.0 / (inputs as f32).sqrt();
    let half = half(backend, &[outputs, inputs], scale, seed)?;
    if nf4 {
        return Ok(Weight::Nf4(backend.quantize_nf4(&half, true)?));
    }
    Ok(Weight::Dense(half))
}

/// Different matrices of a stack; expert by expert they are taken in turn.
const DIFFERENT: usize = 8;

/// The matrices of all experts.
pub fn stack<B: Backend>(backend: &B, experts: usize, outputs: usize, inputs: usize) -> Result<WeightStack<B>> {
    let different = (0..DIFFERENT.min(experts)).map(|seed| weight(backend, outputs, inputs, true, 100 + seed as u64));
    let different = different.collect::<Result<Vec<_>>>()?;
    let mut stack = WeightStack::alloc_like(backend, experts, &different[0])?;
    for expert in 0..experts {
        backend.stack_expert(&different[expert % different.len()], expert, &mut stack)?;
    }
    Ok(stack)
}

/// Tokens sent where the stored histogram sends them: their logits are normal, and high at their experts.
pub fn routing<B: Backend>(backend: &B, routed: &Routed) -> Result<Routing<B>> {
    let Routed {
        tokens, experts, top, ..
    } = *routed;
    let mut logits = Random::new(11).normal(tokens * experts);
    for (row, chosen) in logits
        .chunks_exact_mut(experts)
        .zip(chosen(tokens, experts, top, routed.skewed))
    {
        for expert in chosen {
            row[expert] += 20.0;
        }
    }
    let mut routing = Routing::alloc(backend, tokens, experts, top)?;
    let logits = backend.upload_f32([tokens, experts], &logits)?;
    backend.route(&logits, true, &mut routing)?;
    Ok(routing)
}

/// Documents of equal length.
pub fn documents(tokens: usize, count: usize) -> Segments {
    Segments::from_lengths((0..count).map(|_| tokens / count))
}
