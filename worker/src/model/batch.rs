//! Documents packed one behind the other, as the model reads them.

use brightrun_kernels::Segments;

/// The label of a position where nothing is learnt.
pub const IGNORED: i32 = -100;

/// How many numbers of tokens [`Batch::in_few_shapes`] knows from one power of two to the next.
pub const SHAPES_PER_OCTAVE: usize = 32;

/// Packed documents. All vectors have one entry per token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids.
    pub input_ids: Vec<i32>,
    /// The token to be predicted at each position, or [`IGNORED`]. Shifted already: `labels[t]` is the document's token `t + 1`.
    pub labels: Vec<i32>,
    /// Position of each token in its own document.
    pub positions: Vec<i32>,
    /// Where the documents begin and end.
    pub segments: Segments,
}

impl Batch {
    /// Packs documents of token ids and a claim for each token: whether the model shall learn to produce it. A document's
    /// first token is never learnt, as nothing predicts it; where `supervised` is shorter than `ids`, the rest is not learnt.
    pub fn pack<'a>(documents: impl IntoIterator<Item = (&'a [i32], &'a [bool])>) -> Self {
        let (mut input_ids, mut labels, mut positions, mut lengths) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (ids, supervised) in documents {
            input_ids.extend_from_slice(ids);
            let next = ids.iter().zip(supervised).skip(1);
            labels.extend(next.map(|(id, learnt)| if *learnt { *id } else { IGNORED }));
            labels.resize(input_ids.len(), IGNORED);
            positions.extend(0..ids.len() as i32);
            lengths.push(ids.len());
        }
        Self {
            input_ids,
            labels,
            positions,
            segments: Segments::from_lengths(lengths),
        }
    }

    /// The same documents in one of few shapes, for backends that record a pass for each: a last document of unlearnt tokens fills
    /// the tokens up to one of [`SHAPES_PER_OCTAVE`] numbers between two powers of two, so that at most a 32nd is added, and empty
    /// documents fill their number up to a power of two. Nothing of the first documents changes: what is added comes last, and
    /// documents never see each other.
    pub fn in_few_shapes(&self) -> Self {
        let tokens = self.tokens();
        let step = (1 << tokens.max(1).ilog2()) / SHAPES_PER_OCTAVE;
        let filling = tokens.next_multiple_of(step.max(1)) - tokens;
        let mut filled = self.clone();
        filled.input_ids.resize(tokens + filling, 0);
        filled.labels.resize(tokens + filling, IGNORED);
        filled.positions.extend(0..filling as i32);
        let mut lengths: Vec<usize> = self.segments.ranges().map(|range| range.len()).collect();
        if filling > 0 {
            lengths.push(filling);
        }
        lengths.resize(lengths.len().next_power_of_two(), 0);
        filled.segments = Segments::from_lengths(lengths);
        filled
    }

    /// One document of which nothing is learnt.
    pub fn prompt(ids: &[i32]) -> Self {
        Self::pack([(ids, &[][..])])
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of positions with a label.
    pub fn supervised_tokens(&self) -> usize {
        self.labels.iter().filter(|label| **label != IGNORED).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_the_next_token_and_never_cross_a_document() {
        let batch = Batch::pack([
            (&[1, 2, 3][..], &[true, false, true][..]),
            (&[4][..], &[true][..]),
            (&[5, 6][..], &[false, true][..]),
        ]);
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 6]);
        assert_eq!(batch.labels, [IGNORED, 3, IGNORED, IGNORED, 6, IGNORED]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 1]);
        assert_eq!(batch.segments.offsets(), [0, 3, 4, 6]);
        assert_eq!(batch.supervised_tokens(), 2);
    }
}
