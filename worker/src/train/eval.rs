//! Mean loss per supervised token, in total and per example.

use brightrun_kernels::Backend;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::model::{ExpertLoads, LoraSet, Model, RoutingBalance};
use crate::train::example::{EncodedExample, check_examples};
use crate::train::step::{micro_batches, packed};

/// The loss of one example.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExampleLoss {
    /// Its 1-based line in the dataset.
    pub line: u64,
    /// Mean loss per supervised token.
    pub loss: f64,
    /// Tokens with a loss.
    pub supervised_tokens: usize,
}

/// The loss of a set of examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean loss per supervised token, over all tokens of all examples.
    pub loss: f64,
    /// Tokens with a loss.
    pub supervised_tokens: usize,
    /// Each example, in the order given.
    pub examples: Vec<ExampleLoss>,
    /// How evenly routed experts were used; `None` for a model without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingBalance>,
}

/// Evaluates a model, with or without an adapter. `keep_going` is asked before each micro-batch; when it says no, the result
/// is `None`.
///
/// # Errors
/// `EVAL_EMPTY` without examples, `TRAIN_EXAMPLE`, `EVAL_NON_FINITE` naming the line; the backend's own.
pub fn evaluate<B: Backend>(
    model: &Model<B>,
    lora: Option<&LoraSet<B>>,
    examples: &[EncodedExample],
    micro_batch_tokens: usize,
    keep_going: &mut dyn FnMut() -> bool,
) -> Result<Option<Evaluation>> {
    if examples.is_empty() {
        return Err(Failure::user("EVAL_EMPTY", "There is no example to evaluate")
            .hint("Give a dataset with at least one valid line"));
    }
    check_examples(model, examples)?;
    let all: Vec<&EncodedExample> = examples.iter().collect();
    let mut sums = vec![0.0f64; all.len()];
    let loads = ExpertLoads::default();
    for micro_batch in micro_batches(&all, micro_batch_tokens) {
        if !keep_going() {
            return Ok(None);
        }
        let batch = packed(micro_batch.iter().map(|place| all[*place]));
        let losses = model.forward_losses_counting(lora, &batch, Some(&loads))?;
        for (place, range) in micro_batch.into_iter().zip(batch.segments.ranges()) {
            sums[place] = losses[range].iter().map(|loss| f64::from(*loss)).sum();
        }
    }
    summarise(&all, &sums, loads.balance()).map(Some)
}

fn summarise(examples: &[&EncodedExample], sums: &[f64], routing: Option<RoutingBalance>) -> Result<Evaluation> {
    if let Some((example, _)) = examples.iter().zip(sums).find(|(_, sum)| !sum.is_finite()) {
        return Err(Failure::user("EVAL_NON_FINITE", "The loss of an example is not finite")
            .at(format!("Dataset line {}", example.line))
            .hint("The adapter or the model is broken; train again with a lower learning rate"));
    }
    let supervised_tokens = examples.iter().map(|example| example.supervised_tokens()).sum();
    Ok(Evaluation {
        loss: sums.iter().sum::<f64>() / supervised_tokens as f64,
        supervised_tokens,
        examples: examples
            .iter()
            .zip(sums)
            .map(|(example, sum)| ExampleLoss {
                line: example.line,
                loss: sum / example.supervised_tokens() as f64,
                supervised_tokens: example.supervised_tokens(),
            })
            .collect(),
        routing,
    })
}
