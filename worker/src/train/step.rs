//! One optimizer step: its examples packed into micro-batches, their gradients added up, clipped, applied.
//!
//! The loss of a step is the sum of the token losses of all its examples over the number of their supervised tokens, so it
//! does not depend on how they were packed.

use brightrun_kernels::Backend;

use crate::error::{Blame, Failure, Result};
use crate::model::{Batch, LoraGradients, LoraSet, Model};
use crate::spec::TrainSpec;
use crate::train::example::EncodedExample;
use crate::train::optimizer::Optimizer;
use crate::train::repeat::Repeats;

/// Added to the norm before dividing by it, as torch's `clip_grad_norm_` does.
const CLIP_EPSILON: f64 = 1e-6;

/// How many dataset lines a message names.
const LINES_IN_A_MESSAGE: usize = 16;

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss per supervised token, before the update.
    pub loss: f64,
    /// Global L2 norm of the gradient, before clipping.
    pub gradient_norm: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens with a loss.
    pub supervised_tokens: usize,
}

/// An adapter in training.
pub struct Trainer<'a, B: Backend> {
    /// The frozen model.
    pub model: &'a Model<B>,
    /// The adapter.
    pub lora: &'a mut LoraSet<B>,
    /// Its optimizer.
    pub optimizer: Optimizer<B>,
    gradients: LoraGradients<B>,
    repeats: Repeats<B>,
    max_gradient_norm: f64,
    micro_batch_tokens: usize,
}

impl<'a, B: Backend> Trainer<'a, B> {
    /// A trainer with fresh moments.
    ///
    /// # Errors
    /// The backend's own.
    pub fn new(model: &'a Model<B>, lora: &'a mut LoraSet<B>, spec: &TrainSpec) -> Result<Self> {
        Ok(Self {
            optimizer: Optimizer::new(model.device(), spec, lora)?,
            gradients: LoraGradients::zeros(model.device(), lora)?,
            repeats: Repeats::new(spec.activation_budget_bytes),
            model,
            lora,
            max_gradient_norm: f64::from(spec.max_gradient_norm),
            micro_batch_tokens: spec.micro_batch_tokens,
        })
    }

    /// Step number `step`, counted from 0, at a learning rate. `keep_going` is asked before each micro-batch; when it says no,
    /// nothing has changed and the result is `None`.
    ///
    /// # Errors
    /// `TRAIN_NON_FINITE` when the loss or the gradient is not finite, before anything is updated; the backend's own.
    pub fn step(
        &mut self,
        examples: &[&EncodedExample],
        step: usize,
        learning_rate: f64,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<StepOutcome>> {
        let Some((loss, supervised_tokens)) = self.accumulate(examples, keep_going)? else {
            return Ok(None);
        };
        let device = self.model.device();
        let gradient_norm = device.step(|| self.gradients.norm(device))?;
        if !loss.is_finite() || !gradient_norm.is_finite() {
            return Err(non_finite(step, loss, gradient_norm, examples));
        }
        let schedule = (step as u64 + 1, learning_rate, self.clipping(gradient_norm));
        device.step(|| self.optimizer.apply(device, self.lora, &self.gradients, schedule))?;
        Ok(Some(StepOutcome {
            loss,
            gradient_norm,
            tokens: examples.iter().map(|example| example.ids.len()).sum(),
            supervised_tokens,
        }))
    }

    /// Runs one micro-batch forward and backward and forgets the result: memory is then as full as it will ever get.
    ///
    /// # Errors
    /// The backend's own, out of memory above all.
    pub fn rehearse(&mut self, examples: &[EncodedExample]) -> Result<()> {
        let batch = packed(examples);
        self.repeats
            .forward_backward(self.model, (&*self.lora, &mut self.gradients), &batch, 1.0)?;
        Ok(())
    }

    /// The gradients of the last step, before clipping.
    pub fn gradients(&self) -> &LoraGradients<B> {
        &self.gradients
    }

    /// How many shapes of micro-batches are replayed from a recording.
    pub fn recorded(&self) -> usize {
        self.repeats.recorded()
    }

    /// Gradients of all examples; gives the loss and the number of supervised tokens.
    fn accumulate(
        &mut self,
        examples: &[&EncodedExample],
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<(f64, usize)>> {
        self.gradients.clear(self.model.device())?;
        let supervised_tokens: usize = examples.iter().map(|example| example.supervised_tokens()).sum();
        let scale = (1.0 / supervised_tokens as f64) as f32;
        let mut total = 0.0;
        for micro_batch in micro_batches(examples, self.micro_batch_tokens) {
            if !keep_going() {
                return Ok(None);
            }
            let batch = packed(micro_batch.into_iter().map(|place| examples[place]));
            let adapter = (&*self.lora, &mut self.gradients);
            let losses = self.repeats.forward_backward(self.model, adapter, &batch, scale)?;
            total += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        }
        Ok(Some((total / supervised_tokens as f64, supervised_tokens)))
    }

    fn clipping(&self, norm: f64) -> f64 {
        if self.max_gradient_norm == 0.0 {
            return 1.0;
        }
        (self.max_gradient_norm / (norm + CLIP_EPSILON)).min(1.0)
    }
}

/// Examples as one batch.
pub fn packed<'a>(examples: impl IntoIterator<Item = &'a EncodedExample>) -> Batch {
    Batch::pack(
        examples
            .into_iter()
            .map(|example| (example.ids.as_slice(), example.supervised.as_slice())),
    )
}

/// Distributes examples over micro-batches of at most `limit` tokens, by first-fit decreasing (at most 11/9 of the fewest
/// possible, Johnson 1973); a longer example goes alone. Gives indices, in rising order within a micro-batch.
pub fn micro_batches(examples: &[&EncodedExample], limit: usize) -> Vec<Vec<usize>> {
    let length = |place: usize| examples[place].ids.len();
    let mut by_length: Vec<usize> = (0..examples.len()).collect();
    by_length.sort_by_key(|place| (std::cmp::Reverse(length(*place)), *place));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for place in by_length {
        match bins.iter_mut().find(|(tokens, _)| tokens + length(place) <= limit) {
            Some((tokens, members)) => {
                *tokens += length(place);
                members.push(place);
            }
            None => bins.push((length(place), vec![place])),
        }
    }
    bins.into_iter()
        .map(|(_, mut members)| {
            members.sort_unstable();
            members
        })
        .collect()
}

/// A micro-batch with as many tokens as any step of `batch_size` of these examples can get, whatever the order: the longest
/// examples, the last of them cut where the limit falls.
pub fn longest_micro_batch(examples: &[EncodedExample], batch_size: usize, limit: usize) -> Vec<EncodedExample> {
    let mut by_length: Vec<&EncodedExample> = examples.iter().collect();
    by_length.sort_by_key(|example| std::cmp::Reverse(example.ids.len()));
    by_length.truncate(batch_size);
    let longest = by_length.first().map_or(0, |example| example.ids.len());
    let mut room = limit.max(longest);
    let mut chosen = Vec::new();
    for example in by_length {
        let length = example.ids.len().min(room);
        if length == 0 {
            break;
        }
        room -= length;
        chosen.push(EncodedExample {
            ids: example.ids[..length].to_vec(),
            supervised: example.supervised[..length].to_vec(),
            line: example.line,
        });
    }
    chosen
}

fn non_finite(step: usize, loss: f64, gradient_norm: f64, examples: &[&EncodedExample]) -> Failure {
    let lines: Vec<String> = examples
        .iter()
        .take(LINES_IN_A_MESSAGE)
        .map(|example| example.line.to_string())
        .collect();
    Failure::new(
        Blame::User,
        "TRAIN_NON_FINITE",
        format!(
            "Training stopped at step {}: the loss is {loss} and the gradient norm {gradient_norm}",
            step + 1
        ),
    )
    .at(format!("Dataset lines {}", lines.join(", ")))
    .hint("Lower the learning rate; if it happens at the first steps, look at these lines")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(lengths: &[usize]) -> Vec<EncodedExample> {
        lengths
            .iter()
            .map(|length| EncodedExample {
                ids: vec![0; *length],
                supervised: vec![true; *length],
                line: 1,
            })
            .collect()
    }

    #[test]
    fn micro_batches_hold_every_example_once_and_respect_the_limit() {
        let examples = examples(&[5, 9, 3, 7, 1, 20, 2]);
        let list: Vec<&EncodedExample> = examples.iter().collect();
        let bins = micro_batches(&list, 10);
        assert_eq!(bins, [vec![5], vec![1, 4], vec![2, 3], vec![0, 6]]);
    }

    #[test]
    fn the_rehearsed_micro_batch_is_as_long_as_any_other_can_be() {
        let lengths = |examples: &[EncodedExample]| examples.iter().map(|one| one.ids.len()).collect::<Vec<_>>();
        let list = examples(&[3, 7, 5, 6]);
        assert_eq!(lengths(&longest_micro_batch(&list, 2, 100)), [7, 6]);
        assert_eq!(lengths(&longest_micro_batch(&list, 4, 10)), [7, 3]);
        assert_eq!(lengths(&longest_micro_batch(&list, 4, 2)), [7]);
    }
}
