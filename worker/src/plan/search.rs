//! The largest micro-batch and the longest sequence that fit a card.

use brightrun_kernels::counting::Habits;

use super::memory::{Shape, footprint};
use super::{Largest, Question, reserve};
use crate::error::Result;
use crate::spec::TrainSpec;

/// A micro-batch of more tokens brings nothing: every card is busy long before.
const MOST_TOKENS: usize = 1 << 20;

/// Longest sequences are found in steps of this many tokens.
const LENGTH_STEP: usize = 256;

/// Searches by halving: memory grows with every token.
pub(super) fn largest(question: &Question) -> Result<Largest> {
    let lean = TrainSpec {
        activation_budget_bytes: 0,
        ..question.spec.clone()
    };
    let limit = question.gpu.memory_bytes().saturating_sub(reserve(question.gpu));
    let fits = |shape: Shape| -> Result<bool> {
        let taken = footprint(&question.config, question.stored, &lean, Habits::gpu(), shape)?;
        Ok(taken.bytes.total() <= limit)
    };
    let length = question.sequence_length;
    let sequences = last_that(MOST_TOKENS / length.max(1), |sequences| {
        fits(Shape { sequences, length })
    })?;
    let longest = question.config.max_positions.min(MOST_TOKENS);
    let steps = last_that(longest.div_ceil(LENGTH_STEP), |steps| {
        let length = (steps * LENGTH_STEP).min(longest);
        fits(Shape { sequences: 1, length })
    })?;
    Ok(Largest {
        micro_batch: sequences,
        sequence_length: (steps * LENGTH_STEP).min(longest),
    })
}

/// The last number up to `end` for which `holds`, which holds up to some number and then never again; 0 for none.
fn last_that(end: usize, mut holds: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    let (mut known, mut beyond) = (0, end + 1);
    // Small answers are common and small trials cheap: double before halving.
    let mut trial = 1;
    while known + 1 < beyond {
        if holds(trial)? {
            known = trial;
        } else {
            beyond = trial;
        }
        trial = match beyond > end {
            true => (2 * trial).min(end),
            false => known + (beyond - known) / 2,
        };
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_search_finds_the_last_number_that_holds() {
        for end in [1, 2, 7, 64, 1000] {
            for last in [0, 1, 2, 3, 6, 7, 63, 64, 999, 1000, 5000] {
                let found = last_that(end, |number| Ok(number <= last)).unwrap();
                assert_eq!(found, last.min(end), "of {end}");
            }
        }
    }
}
