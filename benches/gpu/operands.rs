//! Operands: normal numbers of the size that activations and weights have.

use brightrun_kernels::ops::{Backend, Precision};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Result, Segments, Shape, Tensor, Weight, WeightStack};

/// Numbers made on the host; a larger tensor repeats them, which no kernel notices.
const DISTINCT: usize = 1 << 20;

fn values(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let distinct = Random::new(seed).normal(count.min(DISTINCT));
    let scaled = distinct.iter().map(|value| value * scale);
    scaled.cycle().take(count).collect()
}

/// A float32 tensor.
pub fn single<B: Backend>(backend: &B, shape: &[usize], scale: f32, seed: u64) -> Result<Tensor<B>> {
    let shape = Shape::new(shape);
    backend.upload_f32(shape, &values(shape.elements(), scale, seed))
}

/// An activation, in the dtype the backend wants for bf16 products.
pub fn activation<B: Backend>(backend: &B, shape: &[usize], scale: f32, seed: u64) -> Result<Tensor<B>> {
    converted(
        backend,
        single(backend, shape, scale, seed)?,
        backend.activation_dtype(Precision::Bf16),
    )
}

/// Room for an activation.
pub fn room<B: Backend>(backend: &B, shape: &[usize]) -> Result<Tensor<B>> {
    backend.alloc(backend.activation_dtype(Precision::Bf16), Shape::new(shape))
}

fn converted<B: Backend>(backend: &B, source: Tensor<B>, dtype: DType) -> Result<Tensor<B>> {
    if source.dtype() == dtype {
        return Ok(source);
    }
    let mut target = backend.alloc(dtype, source.shape())?;
    backend.copy(&source, &mut target)?;
    Ok(target)
}

/// A frozen matrix, as Xavier would draw it.
pub fn weight<B: Backend>(backend: &B, outputs: usize, inputs: usize, nf4: bool, seed: u64) -> Result<Weight<B>> {
    let scale = 1.0 / (inputs as f32).sqrt();
    let half = converted(backend, single(backend, &[outputs, inputs], scale, seed)?, DType::BF16)?;
    if nf4 {
        return Ok(Weight::Nf4(backend.quantize_nf4(&half, true)?));
    }
    Ok(Weight::Dense(half))
}

/// The matrices of all experts: the same values in different places.
pub fn stack<B: Backend>(backend: &B, experts: usize, outputs: usize, inputs: usize) -> Result<WeightStack<B>> {
    let first = weight(backend, outputs, inputs, true, 1)?;
    let mut stack = WeightStack::alloc_like(backend, experts, &first)?;
    for expert in 0..experts {
        backend.stack_expert(&first, expert, &mut stack)?;
    }
    Ok(stack)
}

/// Router logits whose choice is as skewed as a trained router's: an expert's mean falls with its rank as Zipf's law has it,
/// so the busiest gets several times the mean and some get nothing. The experts' order is shuffled, the same way each time.
pub fn skewed_logits(tokens: usize, experts: usize) -> Vec<f32> {
    let mut order: Vec<usize> = (0..experts).collect();
    let mut random = Random::new(11);
    for last in (1..experts).rev() {
        order.swap(last, random.below(last + 1));
    }
    let mut logits = random.normal(tokens * experts);
    for row in logits.chunks_exact_mut(experts) {
        for (logit, rank) in row.iter_mut().zip(&order) {
            *logit -= 0.8 * ((rank + 1) as f32).ln();
        }
    }
    logits
}

/// Documents of equal length.
pub fn documents(tokens: usize, count: usize) -> Segments {
    Segments::from_lengths((0..count).map(|_| tokens / count))
}
