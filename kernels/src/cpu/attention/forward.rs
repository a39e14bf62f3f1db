//! The forward pass, with a running softmax (Milakov & Gimelshein 2018, arXiv 1805.02867).

use std::ops::Range;

use super::super::Cpu;
use super::super::matrix::Factor;
use super::super::scratch::with_local;
use super::super::simd::{Left, Start, multiply, rows};
use super::super::view::{floats, floats_mut};
use super::blocks::{HeadPlace, HeadRows, column_elements, multiply_steps, padded_elements, step_elements};
use super::{BLOCK, SCORES, cut};
use crate::contract::AttentionSizes;
use crate::error::Result;
use crate::ops::AttentionForward;

/// Queries of a task: enough to pay for packing the keys.
const TASK_QUERIES: usize = 512;

/// Some queries of one head of one document.
struct Task<'a> {
    head: usize,
    /// Rows of the tensor.
    queries: Range<usize>,
    /// Rows of the tensor; the last query sees all of them.
    keys: Range<usize>,
    /// `[queries, dim]`.
    out: &'a mut [f32],
    /// `[queries]`.
    lse: &'a mut [f32],
}

/// What all tasks share.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    sizes: AttentionSizes,
    scale: f32,
    rounded: bool,
}

impl Cpu {
    pub(super) fn attend<E: Factor>(
        &self,
        call: AttentionForward<'_, Self>,
        sizes: AttentionSizes,
        rounded: bool,
    ) -> Result<()> {
        const OP: &str = "attention_forward";
        let AttentionSizes { heads, dim, .. } = sizes;
        let inputs = Inputs {
            q: floats(OP, "q", call.q)?,
            k: floats(OP, "k", call.k)?,
            v: floats(OP, "v", call.v)?,
            sizes,
            scale: call.scale,
            rounded,
        };
        let stretches: Vec<(Range<usize>, Range<usize>)> = call
            .query_segments
            .ranges()
            .zip(call.key_segments.ranges())
            .flat_map(stretches)
            .collect();
        let tokens = call.query_segments.tokens();
        let mut out_regions = self.scratch::<f32>(tokens * heads * dim)?;
        let mut lse_regions = self.scratch::<f32>(tokens * heads)?;
        let each = || {
            stretches
                .iter()
                .flat_map(|stretch| (0..heads).map(move |head| (head, stretch)))
        };
        let outs = cut(
            out_regions.values_mut(),
            each().map(|(_, (queries, _))| queries.len() * dim),
        );
        let lses = cut(lse_regions.values_mut(), each().map(|(_, (queries, _))| queries.len()));
        let tasks = each()
            .zip(outs.into_iter().zip(lses))
            .map(|((head, (queries, keys)), (out, lse))| Task {
                head,
                queries: queries.clone(),
                keys: keys.clone(),
                out,
                lse,
            });
        self.for_each_item(tasks.collect(), |task| self.attend_task::<E>(&inputs, task));

        let (out, lse) = (floats_mut(OP, "out", call.out)?, floats_mut(OP, "lse", call.lse)?);
        let (out_regions, lse_regions) = (out_regions.values(), lse_regions.values());
        for (queries, _) in &stretches {
            let (count, first) = (queries.len(), queries.start * heads);
            let out = &mut out[first * dim..][..count * heads * dim];
            let lse = &mut lse[first..][..count * heads];
            self.for_rows2((out, lse), (heads * dim, heads), |row, out, lse| {
                let rows = out.chunks_exact_mut(heads * dim).zip(lse.chunks_exact_mut(heads));
                for (i, (out, lse)) in rows.enumerate() {
                    for head in 0..heads {
                        let at = first + head * count + row + i;
                        out[head * dim..][..dim].copy_from_slice(&out_regions[at * dim..][..dim]);
                        lse[head] = lse_regions[at];
                    }
                }
            });
        }
        Ok(())
    }

    fn attend_task<E: Factor>(&self, inputs: &Inputs<'_>, task: Task<'_>) {
        let AttentionSizes { heads, kv_heads, dim } = inputs.sizes;
        let (simd, rounded) = (self.inner.simd, inputs.rounded);
        let (count, keys) = (task.queries.len(), task.keys.len());
        let padded = padded_elements::<E>(count.max(keys), dim);
        let needed = 2 * padded + column_elements::<E>(keys, dim) + step_elements(keys, dim) + SCORES;
        let kv_head = task.head * kv_heads / heads;
        let kv = HeadPlace {
            tokens: task.keys.clone(),
            heads: kv_heads,
            head: kv_head,
            dim,
        };
        let place = HeadPlace {
            tokens: task.queries.clone(),
            heads,
            head: task.head,
            dim,
        };
        with_local::<E, _>(needed, |buffer| {
            let lengths = [
                padded,
                padded,
                column_elements::<E>(keys, dim),
                step_elements(keys, dim),
                SCORES,
            ];
            let mut parts = cut(buffer, lengths).into_iter();
            let mut next = || parts.next().unwrap_or_default();
            let (rows_buffer, queries_buffer) = (next(), next());
            let k = HeadRows::gather(simd, inputs.k, &kv, rounded, rows_buffer).pack_columns_into(simd, next());
            let v = HeadRows::gather(simd, inputs.v, &kv, rounded, rows_buffer).pack_steps_into(simd, next());
            let q = HeadRows::gather(simd, inputs.q, &place, rounded, queries_buffer);
            let probabilities = next();
            let mut scores = [0.0f32; SCORES];
            for block in 0..q.blocks() {
                let queries = q.block(block);
                let out = &mut task.out[queries.start * dim..queries.end * dim];
                let (mut maxima, mut sums) = ([f32::NEG_INFINITY; BLOCK], [0.0f32; BLOCK]);
                // The first query of the block sees this many keys, each further one sees one more.
                let visible = queries.start + 1 + keys - count;
                let last_visible = visible + queries.len() - 1;
                for (index, first_key) in (0..last_visible).step_by(BLOCK).enumerate() {
                    let in_block = BLOCK.min(keys - first_key);
                    multiply(
                        simd,
                        q.left(block),
                        k.block(index),
                        q.steps(),
                        in_block,
                        &mut scores,
                        BLOCK,
                        Start::Zero,
                    );
                    let hidden_from = visible as isize - first_key as isize;
                    mask(&mut scores[..queries.len() * BLOCK], in_block, hidden_from);
                    let mut corrections = [0.0f32; BLOCK];
                    rows::softmax_block(
                        simd,
                        &mut scores[..queries.len() * BLOCK],
                        inputs.scale,
                        &mut maxima,
                        &mut sums,
                        &mut corrections,
                    );
                    E::fill(simd, &scores, 1.0, rounded, probabilities);
                    let start = if index == 0 {
                        Start::Zero
                    } else {
                        rows::scale_rows(simd, out, dim, &corrections);
                        Start::Output
                    };
                    let left = Left {
                        values: &*probabilities,
                        stride: BLOCK,
                        rows: queries.len(),
                    };
                    multiply_steps(simd, left, v.block(index), in_block, dim, out, start);
                }
                let inverse = sums.map(|sum| 1.0 / sum);
                rows::scale_rows(simd, out, dim, &inverse);
                for ((lse, maximum), sum) in task.lse[queries].iter_mut().zip(maxima).zip(sums) {
                    *lse = maximum + sum.ln();
                }
            }
        });
    }
}

/// Stretches of a document's queries, each with the keys its last query sees.
fn stretches((queries, keys): (Range<usize>, Range<usize>)) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    queries.clone().step_by(TASK_QUERIES).map(move |first| {
        let end = queries.end.min(first + TASK_QUERIES);
        (first..end, keys.start..keys.end - (queries.end - end))
    })
}

/// Takes the keys a query must not see out of its row: beyond the block's keys, and beyond `visible` in the first row, one more
/// in each further row.
fn mask(scores: &mut [f32], in_block: usize, visible: isize) {
    if in_block == BLOCK && visible >= BLOCK as isize {
        return;
    }
    for (row, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
        let visible = (visible + row as isize).clamp(0, in_block as isize) as usize;
        scores[visible..].fill(f32::NEG_INFINITY);
    }
}
