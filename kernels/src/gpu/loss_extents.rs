//! How a loss is cut up, for the op and for the plan of its memory.
//!
//! On tensor cores a chunk's working memory is at most a tenth of what all logits would take in bf16, as long as that holds one tile of
//! [`CHUNK_ROWS`] rows; with fewer tokens it is that one tile. Shorter tiles would not be less work: the products are of whole
//! ones. At 151 936 entries, 2048 wide, a row takes 392 512 bytes, so the rule holds from 3308 tokens on.

use super::matmul::tensor::LARGE;
use crate::contract::LinearSizes;
use crate::dtype::DType;
use crate::ops::Precision;

/// The most bytes of a chunk: beyond two tiles of rows both products are as fast as they get.
pub(super) const CHUNK_BYTES: usize = 256 << 20;
/// The part of all logits in bf16 that a chunk may take: one of so many.
const SHARE: usize = 10;
/// A chunk on tensor cores is a multiple of so many rows: the tile of Hopper's kernels, and two of the others.
const CHUNK_ROWS: usize = 2 * LARGE.rows;
/// Columns that share a sum of exponentials. A part of the vocabulary is a multiple of so many entries.
pub(super) const RUN: usize = 64;
/// Blocks of the product with the head's columns for each tile of rows: one wave of 132 multiprocessors at 256 rows.
const GRADIENT_BLOCKS: usize = 128;
/// The most parts of the vocabulary: their sums take `4 · parts · C` bytes a row.
const MOST_PARTS: usize = 16;

/// How a loss is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LossExtents {
    /// Rows of logits at once.
    pub(crate) chunk: usize,
    /// Entries of a row of logits, or of their exponentials.
    pub(crate) pitch: usize,
    /// Parts of the vocabulary whose products with the head's columns are added afterwards; 0 where there are none.
    pub(crate) parts: usize,
    /// Entries of such a part.
    pub(crate) part: usize,
}

/// Entries of a part of the vocabulary; a function of `V` and `C` alone, because it decides the order of sums.
fn part_entries(vocabulary: usize, width: usize) -> usize {
    let parts = (GRADIENT_BLOCKS / width.div_ceil(LARGE.columns).max(1)).clamp(1, MOST_PARTS);
    vocabulary.div_ceil(parts).next_multiple_of(RUN)
}

/// The extents of a loss with or without its gradient.
pub(crate) fn loss_extents(sizes: LinearSizes, precision: Precision, has_gradient: bool) -> LossExtents {
    match precision {
        Precision::F32 => exact_extents(sizes, has_gradient),
        Precision::Bf16 => tensor_extents(sizes, has_gradient),
    }
}

/// The reference keeps logits and gradients, as many as fit the bound.
fn exact_extents(sizes: LinearSizes, has_gradient: bool) -> LossExtents {
    let (rows, pitch) = (sizes.tokens, sizes.outputs);
    let row_bytes = pitch * DType::F32.size_bytes() * if has_gradient { 2 } else { 1 };
    LossExtents {
        chunk: whole_tiles(CHUNK_BYTES / row_bytes.max(1), LARGE.rows, rows),
        pitch,
        parts: 0,
        part: 0,
    }
}

fn tensor_extents(sizes: LinearSizes, has_gradient: bool) -> LossExtents {
    let (rows, pitch) = (sizes.tokens, sizes.outputs.next_multiple_of(RUN));
    let part = part_entries(sizes.outputs, sizes.inputs);
    let mut extents = LossExtents {
        chunk: 1,
        pitch,
        parts: pitch.div_ceil(part),
        part,
    };
    let bytes = |extents: LossExtents| extents.tensor_bytes(sizes, has_gradient).iter().sum::<usize>();
    let row_bytes = bytes(extents) - bytes(LossExtents { chunk: 0, ..extents });
    let all = rows * sizes.outputs * DType::BF16.size_bytes();
    let most = (all / SHARE)
        .min(CHUNK_BYTES)
        .saturating_sub(bytes(LossExtents { chunk: 0, ..extents }));
    extents.chunk = whole_tiles(most / row_bytes, CHUNK_ROWS, rows);
    extents
}

/// Whole tiles among `fitting` rows, at least one, but no more rows than there are.
fn whole_tiles(fitting: usize, tile: usize, rows: usize) -> usize {
    (fitting / tile * tile).max(tile).min(rows)
}

impl LossExtents {
    /// Runs of a row.
    pub(crate) fn runs(&self) -> usize {
        self.pitch / RUN
    }

    /// Bytes of the working memory on tensor cores, tensor by tensor: the list of rows and its length; of a chunk the hidden rows, their
    /// labels and labels' logits, sums of runs; and for the gradient exponentials, factors and parts.
    pub(crate) fn tensor_bytes(&self, sizes: LinearSizes, has_gradient: bool) -> [usize; 9] {
        let (single, half) = (DType::F32.size_bytes(), DType::BF16.size_bytes());
        let gradient = if has_gradient { self.chunk } else { 0 };
        [
            sizes.tokens * single,
            single,
            self.chunk * sizes.inputs * half,
            self.chunk * single,
            self.chunk * single,
            self.chunk * self.runs() * 2 * single,
            gradient * self.pitch * half,
            gradient * 2 * single,
            gradient * self.parts * sizes.inputs * single,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(tokens: usize, width: usize, vocabulary: usize, has_gradient: bool) -> (LossExtents, usize) {
        let sizes = LinearSizes {
            tokens,
            inputs: width,
            outputs: vocabulary,
            rank: 0,
        };
        let extents = loss_extents(sizes, Precision::Bf16, has_gradient);
        (extents, extents.tensor_bytes(sizes, has_gradient).iter().sum())
    }

    #[test]
    fn parts_of_the_vocabulary_cover_it() {
        for (vocabulary, width) in [(1, 1), (151_936, 2_048), (151_936, 5_120), (70, 8), (32_000, 100_000)] {
            let part = part_entries(vocabulary, width);
            let parts = vocabulary.next_multiple_of(RUN).div_ceil(part);
            assert!(
                part.is_multiple_of(RUN) && (1..=MOST_PARTS).contains(&parts),
                "{vocabulary} × {width}"
            );
        }
    }

    #[test]
    fn a_chunk_is_at_most_a_tenth_of_all_logits_where_that_holds_a_tile() {
        for (vocabulary, width) in [(151_936, 2_048), (151_936, 5_120), (151_936, 1_024), (32_000, 4_096)] {
            let tile = extents(CHUNK_ROWS, width, vocabulary, true).1;
            for tokens in [1_024, 3_307, 3_308, 4_096, 6_000, 8_192, 16_384, 131_072] {
                let (extents, bytes) = extents(tokens, width, vocabulary, true);
                let tenth = 2 * tokens * vocabulary / SHARE;
                assert!(extents.chunk.is_multiple_of(CHUNK_ROWS), "{extents:?}");
                // Beside the tile there is the list of rows.
                let holds = tenth >= tile + 4 * tokens;
                assert!(
                    bytes <= tenth.min(CHUNK_BYTES) || !holds,
                    "{tokens} × {vocabulary}: {bytes}"
                );
                assert!(holds || extents.chunk == CHUNK_ROWS, "{extents:?}");
            }
        }
    }

    #[test]
    fn the_80b_models_chunks_are_one_tile_to_8k_tokens_and_two_from_there() {
        let share = |tokens: usize| {
            let (extents, bytes) = extents(tokens, 2_048, 151_936, true);
            (extents.chunk, bytes as f64 / (2 * tokens * 151_936) as f64)
        };
        let [(short, _), (usual, of_usual), (long, of_long)] = [1_024, 4_096, 16_384].map(share);
        assert_eq!([short, usual, long], [256, 256, 512]);
        assert!(of_usual < 0.082 && of_long < 0.041, "{of_usual} {of_long}");
        // Losses alone keep no exponentials.
        assert!(extents(4_096, 2_048, 151_936, false).0.chunk > 3_000);
    }
}
