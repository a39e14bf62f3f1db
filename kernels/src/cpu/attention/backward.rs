//! The backward pass: probabilities are recomputed from the forward pass's `lse`, a pair of blocks at a time.

use std::ops::Range;

use super::super::Cpu;
use super::super::matrix::Factor;
use super::super::scratch::with_local;
use super::super::simd::{Left, Simd, Start, multiply, rows, transpose_rows};
use super::super::view::{floats, floats_mut};
use super::blocks::{HeadPlace, HeadRows, Panels, column_elements, multiply_steps, padded_elements, step_elements};
use super::{BLOCK, SCORES, cut};
use crate::contract::AttentionSizes;
use crate::error::Result;
use crate::ops::AttentionBackward;

/// What all tasks share.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
    sizes: AttentionSizes,
    scale: f32,
    rounded: bool,
}

/// One head's rows of a document, packed for every product they enter.
struct Packed<'a, E> {
    q: HeadRows<'a, E>,
    dout: HeadRows<'a, E>,
    /// Columns: for the scores, and for `dout · vᵀ`.
    k_columns: Panels<'a, E>,
    v_columns: Panels<'a, E>,
    /// Steps: for `dq`, `dk` and `dv`.
    k_steps: Panels<'a, E>,
    q_steps: Panels<'a, E>,
    dout_steps: Panels<'a, E>,
}

impl Cpu {
    pub(super) fn attend_backward<E: Factor>(
        &self,
        call: AttentionBackward<'_, Self>,
        sizes: AttentionSizes,
        rounded: bool,
    ) -> Result<()> {
        const OP: &str = "attention_backward";
        let AttentionSizes { heads, kv_heads, dim } = sizes;
        let inputs = Inputs {
            q: floats(OP, "q", call.q)?,
            k: floats(OP, "k", call.k)?,
            v: floats(OP, "v", call.v)?,
            out: floats(OP, "out", call.out)?,
            lse: floats(OP, "lse", call.lse)?,
            dout: floats(OP, "dout", call.dout)?,
            sizes,
            scale: call.scale,
            rounded,
        };
        let documents: Vec<Range<usize>> = call.segments.ranges().collect();
        let mut regions = self.scratch::<f32>(3 * call.segments.tokens() * heads * dim)?;
        let each = || {
            documents
                .iter()
                .flat_map(|document| (0..heads).map(move |head| (document.clone(), head)))
        };
        let parts = cut(
            regions.values_mut(),
            each().map(|(document, _)| 3 * document.len() * dim),
        );
        let tasks: Vec<_> = each().zip(parts).collect();
        self.for_each_item(tasks, |((document, head), region)| {
            self.backward_task::<E>(&inputs, document, head, region)
        });

        let dq = floats_mut(OP, "dq", call.dq)?;
        let dk = floats_mut(OP, "dk", call.dk)?;
        let dv = floats_mut(OP, "dv", call.dv)?;
        let (regions, group, simd) = (regions.values(), heads / kv_heads, self.inner.simd);
        for document in documents {
            let (first, count) = (document.start, document.len());
            // Row `t` of gradient `which` of a head.
            let row = |head: usize, which: usize, t: usize| {
                &regions[((3 * first * heads) + (head * 3 + which) * count + t) * dim..][..dim]
            };
            let dq = &mut dq[first * heads * dim..document.end * heads * dim];
            self.for_rows(dq, heads * dim, |t, dq| {
                for (i, dq) in dq.chunks_exact_mut(dim).enumerate() {
                    dq.copy_from_slice(row(i % heads, 0, t + i / heads));
                    rows::scale(simd, dq, inputs.scale);
                }
            });
            let range = first * kv_heads * dim..document.end * kv_heads * dim;
            for (which, gradient, factor) in [(1, &mut dk[range.clone()], inputs.scale), (2, &mut dv[range], 1.0)] {
                self.for_rows(gradient, kv_heads * dim, |t, gradient| {
                    for (i, sum) in gradient.chunks_exact_mut(dim).enumerate() {
                        sum.fill(0.0);
                        let kv_head = i % kv_heads;
                        for head in kv_head * group..(kv_head + 1) * group {
                            rows::add(simd, sum, row(head, which, t + i / kv_heads));
                        }
                        rows::scale(simd, sum, factor);
                    }
                });
            }
        }
        Ok(())
    }

    /// One head of one document; `region` is `dq`, `dk` and `dv`, `[3, document, dim]`, without the factor of the scores.
    fn backward_task<E: Factor>(&self, inputs: &Inputs<'_>, document: Range<usize>, head: usize, region: &mut [f32]) {
        let AttentionSizes { heads, kv_heads, dim } = inputs.sizes;
        let (simd, rounded, count) = (self.inner.simd, inputs.rounded, document.len());
        if count == 0 || dim == 0 {
            return;
        }
        let place = HeadPlace {
            tokens: document.clone(),
            heads,
            head,
            dim,
        };
        let kv = HeadPlace {
            tokens: document.clone(),
            heads: kv_heads,
            head: head * kv_heads / heads,
            dim,
        };
        let delta: Vec<f32> = document
            .clone()
            .map(|t| rows::dot(simd, &inputs.dout[place.row(t)], &inputs.out[place.row(t)]))
            .collect();
        let lse: Vec<f32> = document.map(|t| inputs.lse[t * heads + head]).collect();
        let (padded, columns, steps) = (
            padded_elements::<E>(count, dim),
            column_elements::<E>(count, dim),
            step_elements(count, dim),
        );
        let lengths = [padded, padded, padded, columns, columns, steps, steps, steps];
        with_local::<E, _>(lengths.iter().sum(), |buffer| {
            let mut parts = cut(buffer, lengths).into_iter();
            let mut next = || parts.next().unwrap_or_default();
            let (spare, q_rows, dout_rows) = (next(), next(), next());
            let v_columns = HeadRows::gather(simd, inputs.v, &kv, rounded, spare).pack_columns_into(simd, next());
            let k = HeadRows::gather(simd, inputs.k, &kv, rounded, spare);
            let q = HeadRows::gather(simd, inputs.q, &place, rounded, q_rows);
            let dout = HeadRows::gather(simd, inputs.dout, &place, rounded, dout_rows);
            let packed = Packed {
                q,
                dout,
                v_columns,
                k_columns: k.pack_columns_into(simd, next()),
                k_steps: k.pack_steps_into(simd, next()),
                q_steps: q.pack_steps_into(simd, next()),
                dout_steps: dout.pack_steps_into(simd, next()),
            };
            region.fill(0.0);
            self.backward_blocks(&packed, inputs, dim, &delta, &lse, region);
        });
    }

    /// All pairs of a query block and a key block it sees.
    fn backward_blocks<E: Factor>(
        &self,
        packed: &Packed<'_, E>,
        inputs: &Inputs<'_>,
        dim: usize,
        delta: &[f32],
        lse: &[f32],
        region: &mut [f32],
    ) {
        let (simd, rounded) = (self.inner.simd, inputs.rounded);
        let (q, dout) = (packed.q, packed.dout);
        let (dq, rest) = region.split_at_mut(q.count * dim);
        let (dk, dv) = rest.split_at_mut(q.count * dim);
        let (mut p, mut ds, mut turned) = ([0.0f32; SCORES], [0.0f32; SCORES], [0.0f32; SCORES]);
        with_local::<E, _>(SCORES, |factors| {
            for key_block in 0..q.blocks() {
                let keys = q.block(key_block);
                for query_block in key_block..q.blocks() {
                    let queries = q.block(query_block);
                    let columns = keys.len();
                    let (k, v) = (packed.k_columns.block(key_block), packed.v_columns.block(key_block));
                    multiply(
                        simd,
                        q.left(query_block),
                        k,
                        q.steps(),
                        columns,
                        &mut p,
                        BLOCK,
                        Start::Zero,
                    );
                    multiply(
                        simd,
                        dout.left(query_block),
                        v,
                        q.steps(),
                        columns,
                        &mut ds,
                        BLOCK,
                        Start::Zero,
                    );
                    let (lse, delta) = (&lse[queries.clone()], &delta[queries.clone()]);
                    rows::score_gradients(simd, &mut p, &mut ds, inputs.scale, lse, delta);
                    for scores in [&mut p, &mut ds] {
                        clear_unseen(scores, queries.len(), columns, key_block == query_block);
                    }

                    // Queries as rows: dq += ds · k.
                    E::fill(simd, &ds, 1.0, rounded, factors);
                    let left = Left {
                        values: &*factors,
                        stride: BLOCK,
                        rows: queries.len(),
                    };
                    let target = &mut dq[queries.start * dim..queries.end * dim];
                    multiply_steps(
                        simd,
                        left,
                        packed.k_steps.block(key_block),
                        columns,
                        dim,
                        target,
                        Start::Output,
                    );

                    // Keys as rows: dv += pᵀ · dout, dk += dsᵀ · q.
                    for (scores, right, gradient) in
                        [(&p, &packed.dout_steps, &mut *dv), (&ds, &packed.q_steps, &mut *dk)]
                    {
                        turn(simd, scores, &mut turned);
                        E::fill(simd, &turned, 1.0, rounded, factors);
                        let left = Left {
                            values: &*factors,
                            stride: BLOCK,
                            rows: columns,
                        };
                        let target = &mut gradient[keys.start * dim..keys.end * dim];
                        let depth = queries.len();
                        multiply_steps(simd, left, right.block(query_block), depth, dim, target, Start::Output);
                    }
                }
            }
        });
    }
}

/// Sets what lies outside the blocks' rows and columns, and above the diagonal, to zero.
fn clear_unseen(scores: &mut [f32; SCORES], rows: usize, columns: usize, diagonal: bool) {
    if rows == BLOCK && columns == BLOCK && !diagonal {
        return;
    }
    for (row, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
        let seen = match (row < rows, diagonal) {
            (false, _) => 0,
            (true, true) => columns.min(row + 1),
            (true, false) => columns,
        };
        scores[seen..].fill(0.0);
    }
}

/// The transpose of a block of scores.
fn turn(simd: Simd, scores: &[f32; SCORES], out: &mut [f32; SCORES]) {
    const GROUP: usize = 16;
    for at in (0..BLOCK).step_by(GROUP) {
        let rows: [&[f32]; GROUP] = std::array::from_fn(|row| &scores[(at + row) * BLOCK..][..BLOCK]);
        transpose_rows(simd, &rows, BLOCK, out, BLOCK, at);
    }
}
