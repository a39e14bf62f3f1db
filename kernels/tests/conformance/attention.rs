//! Attention, forward and backward.

use brightrun_kernels::ops::{AttentionBackward, AttentionForward, Precision};
use brightrun_kernels::oracle::{Heads, attention_backward, attention_forward};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Segments};

use super::backends::{PRECISIONS, Run, Traits, narrow, wide};
use crate::{judged, on_every_backend};

/// Document lengths of queries, extra keys each document has before them, query heads, key/value heads, head dimension.
#[derive(Clone, Debug)]
struct Shape {
    documents: &'static [usize],
    extra_keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

const fn shape(documents: &'static [usize], extra_keys: usize, heads: usize, kv_heads: usize, dim: usize) -> Shape {
    Shape {
        documents,
        extra_keys,
        heads,
        kv_heads,
        dim,
    }
}

const SHAPES: &[Shape] = &[
    shape(&[], 0, 1, 1, 4),
    shape(&[1], 0, 1, 1, 1),
    shape(&[1, 1, 1], 0, 2, 1, 8),
    shape(&[0, 5, 0, 1, 17], 0, 4, 2, 16),
    shape(&[63], 0, 3, 1, 64),
    shape(&[64, 65], 0, 2, 2, 32),
    shape(&[3, 130], 0, 6, 2, 20),
    shape(&[129], 0, 2, 1, 65),
    shape(&[33, 66], 0, 1, 1, 128),
    shape(&[3, 1, 2, 5, 1, 1, 4, 7, 2, 1], 0, 4, 1, 64),
    shape(&[65], 0, 2, 1, 80),
    shape(&[31, 2], 0, 2, 2, 96),
    shape(&[72], 0, 4, 1, 256),
    shape(&[9], 0, 2, 1, 300),
];

const CACHED: &[Shape] = &[
    shape(&[1], 70, 4, 2, 16),
    shape(&[2, 1, 5], 3, 2, 2, 9),
    shape(&[65], 64, 3, 3, 64),
    shape(&[1, 3], 130, 4, 1, 128),
    shape(&[17], 32, 2, 1, 256),
];

/// Around the tiles of Hopper's kernels, 128 rows of a group's heads and 80 or 128 keys, and through their rings more than once;
/// groups that do not divide a tile, that fill one with few tokens, and that no tile takes.
const TILED: &[Shape] = &[
    shape(&[127, 129, 128], 0, 1, 1, 64),
    shape(&[530], 0, 1, 1, 64),
    shape(&[390], 0, 1, 1, 128),
    shape(&[15, 17, 16], 0, 8, 1, 256),
    shape(&[79, 81, 1, 161], 0, 1, 1, 256),
    shape(&[43, 42, 85], 0, 6, 2, 72),
    shape(&[19, 37], 91, 14, 2, 88),
    shape(&[3], 0, 130, 1, 8),
];

impl Shape {
    fn multiply_adds(&self) -> usize {
        // Two products, and half of the keys are seen.
        let pairs = self.documents.iter().map(|length| length * (length + self.extra_keys));
        pairs.sum::<usize>() * self.heads * self.dim
    }

    fn queries(&self) -> Segments {
        Segments::from_lengths(self.documents.iter().copied())
    }

    fn keys(&self) -> Segments {
        Segments::from_lengths(self.documents.iter().map(|length| length + self.extra_keys))
    }

    fn heads(&self) -> Heads {
        Heads {
            heads: self.heads,
            kv_heads: self.kv_heads,
            dim: self.dim,
            scale: 1.0 / (self.dim as f32).sqrt(),
        }
    }
}

fn forward<B: Traits>(run: &mut Run<'_, B>, dtype: DType, shape: &Shape, precision: Precision, spread: f32) {
    let (queries, keys, heads) = (shape.queries(), shape.keys(), shape.heads());
    let mut random = Random::new(shape.dim as u64);
    let mut values = |tokens: usize, heads: usize| -> Vec<f32> {
        random
            .normal(tokens * heads * shape.dim)
            .into_iter()
            .map(|v| spread * v)
            .collect()
    };
    let mut q = values(queries.tokens(), shape.heads);
    // One row more than there are keys: it must be ignored.
    let (mut k, mut v) = (
        values(keys.tokens() + 1, shape.kv_heads),
        values(keys.tokens() + 1, shape.kv_heads),
    );
    let used = keys.tokens() * shape.kv_heads * shape.dim;
    k[used..].fill(f32::NAN);
    v[used..].fill(f32::NAN);
    let device = run.backend;
    let kv_shape = [keys.tokens() + 1, shape.kv_heads, shape.dim];
    let q_t = run.upload(dtype, [queries.tokens(), shape.heads, shape.dim], &mut q);
    let (k_t, v_t) = (run.upload(dtype, kv_shape, &mut k), run.upload(dtype, kv_shape, &mut v));
    let mut out = device.alloc(dtype, q_t.shape()).unwrap();
    let mut lse = device.alloc(DType::F32, [queries.tokens(), shape.heads]).unwrap();
    let call = AttentionForward {
        q: &q_t,
        k: &k_t,
        v: &v_t,
        query_segments: &queries,
        key_segments: &keys,
        scale: heads.scale,
        precision,
        out: &mut out,
        lse: &mut lse,
    };
    device.attention_forward(call).unwrap();
    let (plain, oracle) = judged!(precision, N, {
        let (out, lse) = attention_forward(
            &narrow::<N>(&q),
            &narrow::<N>(&k),
            &narrow::<N>(&v),
            &queries,
            &keys,
            &heads,
        );
        vec![wide(out), wide(lse)]
    });
    let mut case = run.case(
        format_args!("attention_forward {shape:?} {dtype} {precision:?} ×{spread}"),
        shape.dim + keys.longest(),
    );
    case.compare("out", &out, &plain[0], &oracle[0]);
    case.compare("lse", &lse, &plain[1], &oracle[1]);
}

fn backward<B: Traits>(run: &mut Run<'_, B>, dtype: DType, shape: &Shape, precision: Precision) {
    let (segments, heads) = (shape.queries(), shape.heads());
    let mut random = Random::new(shape.dim as u64);
    let mut values = |heads: usize| random.normal(segments.tokens() * heads * shape.dim);
    let (h, kv) = (shape.heads, shape.kv_heads);
    let (mut q, mut k, mut v, mut dout) = (values(h), values(kv), values(kv), values(h));
    let upload = |values: &mut [f32], heads: usize| run.upload(dtype, [segments.tokens(), heads, shape.dim], values);
    let (q_t, k_t, v_t, dout_t) = (
        upload(&mut q, h),
        upload(&mut k, kv),
        upload(&mut v, kv),
        upload(&mut dout, h),
    );
    // The forward pass's results, rounded to f32 once for everybody.
    let (out, lse) = attention_forward(
        &narrow::<f64>(&q),
        &narrow::<f64>(&k),
        &narrow::<f64>(&v),
        &segments,
        &segments,
        &heads,
    );
    let round = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|v| v as f32).collect() };
    let (mut out, lse) = (round(out), round(lse));
    let out_t = upload(&mut out, h);
    let device = run.backend;
    let lse_t = device.upload_f32([segments.tokens(), h], &lse).unwrap();
    let mut dq = device.alloc(dtype, q_t.shape()).unwrap();
    let mut dk = device.alloc(dtype, k_t.shape()).unwrap();
    let mut dv = device.alloc(dtype, k_t.shape()).unwrap();
    let call = AttentionBackward {
        q: &q_t,
        k: &k_t,
        v: &v_t,
        out: &out_t,
        lse: &lse_t,
        dout: &dout_t,
        segments: &segments,
        scale: heads.scale,
        precision,
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
    };
    device.attention_backward(call).unwrap();
    let (plain, oracle) = judged!(precision, N, {
        let [q, k, v, out, lse, dout] = [&q, &k, &v, &out, &lse, &dout].map(|values| narrow::<N>(values));
        let gradients = attention_backward(&q, &k, &v, &out, &lse, &dout, &segments, &heads);
        vec![wide(gradients.dq), wide(gradients.dk), wide(gradients.dv)]
    });
    let length = shape.dim + segments.longest() * shape.heads / shape.kv_heads;
    // ds = p (do · v − δ): where one key is seen, the two are equal.
    let largest = |values: &[f32]| values.iter().fold(0.0f64, |a, b| a.max(f64::from(b.abs())));
    let cancelling = shape.dim as f64 * largest(&dout) * largest(&out) * largest(&k).max(largest(&q));
    let mut case = run
        .case(
            format_args!("attention_backward {shape:?} {dtype} {precision:?}"),
            length,
        )
        .cancelling(cancelling * f64::from(heads.scale));
    for (i, (name, tensor)) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

#[test]
fn attention_forward_agrees_with_the_oracle() {
    on_every_backend!("attention_forward", [AttentionForward], |run| {
        for dtype in run.activations() {
            for precision in PRECISIONS {
                for shape in SHAPES.iter().chain(CACHED) {
                    forward(run, *dtype, shape, precision, 1.0);
                }
                // Sharp: scores far apart, so that the running maximum moves.
                forward(run, *dtype, &SHAPES[6], precision, 4.0);
            }
        }
    });
}

#[test]
fn attention_forward_over_many_tiles_agrees_with_the_oracle() {
    on_every_backend!("attention_forward, tiles", [AttentionForward], |run| {
        for dtype in run.activations() {
            for shape in TILED {
                if run.affords(shape.multiply_adds()) {
                    forward(run, *dtype, shape, Precision::Bf16, 4.0);
                }
            }
        }
    });
}

#[test]
fn attention_backward_agrees_with_the_oracle() {
    on_every_backend!("attention_backward", [AttentionBackward], |run| {
        for dtype in run.activations() {
            for precision in PRECISIONS {
                SHAPES.iter().for_each(|shape| backward(run, *dtype, shape, precision));
            }
        }
    });
}

#[test]
fn attention_backward_over_many_tiles_agrees_with_the_oracle() {
    on_every_backend!("attention_backward, tiles", [AttentionBackward], |run| {
        for dtype in run.activations() {
            for shape in TILED {
                if run.affords(shape.multiply_adds()) {
                    backward(run, *dtype, shape, Precision::Bf16);
                }
            }
        }
    });
}

#[test]
fn packed_documents_give_what_they_give_alone() {
    on_every_backend!("packed = separate", [AttentionForward, AttentionBackward], |run| {
        for dtype in run.activations() {
            packed(run, *dtype);
        }
        run.case("packed = separate", 0);
    });
}

#[test]
fn what_is_not_finite_in_one_document_does_not_reach_another() {
    on_every_backend!("documents apart", [AttentionForward, AttentionBackward], |run| {
        for dtype in run.activations() {
            for dim in [16, 256] {
                apart(run, *dtype, dim);
            }
        }
        run.case("documents apart", 0);
    });
}

/// The first of two documents, where the other has NaN in all that it has.
fn apart<B: Traits>(run: &Run<'_, B>, dtype: DType, dim: usize) {
    let (device, segments, first) = (run.backend, Segments::from_lengths([37, 30]), 37 * dim);
    let shape = [segments.tokens(), 1, dim];
    let mut values = Random::new(9).normal(segments.tokens() * dim);
    let q = run.upload(dtype, shape, &mut values);
    let mut attend = |other: f32| {
        values[first..].fill(other);
        let x = run.upload(dtype, shape, &mut values);
        let mut out = device.alloc(dtype, shape).unwrap();
        let mut lse = device.alloc(DType::F32, [segments.tokens(), 1]).unwrap();
        let call = AttentionForward {
            q: &q,
            k: &x,
            v: &x,
            query_segments: &segments,
            key_segments: &segments,
            scale: 0.25,
            precision: Precision::Bf16,
            out: &mut out,
            lse: &mut lse,
        };
        device.attention_forward(call).unwrap();
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| device.alloc(dtype, shape).unwrap());
        let call = AttentionBackward {
            q: &x,
            k: &x,
            v: &x,
            out: &out,
            lse: &lse,
            dout: &x,
            segments: &segments,
            scale: 0.25,
            precision: Precision::Bf16,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        device.attention_backward(call).unwrap();
        [&out, &dq, &dk, &dv].map(|tensor| {
            let mut bytes = device.read(tensor).unwrap();
            bytes.truncate(first * dtype.size_bytes());
            bytes
        })
    };
    let (finite, other) = (attend(1.0), attend(f32::NAN));
    for (i, name) in ["out", "dq", "dk", "dv"].into_iter().enumerate() {
        assert!(
            finite[i] == other[i],
            "{name} on {} in {dtype}, heads of {dim}",
            run.name
        );
    }
}

/// Forward and backward over documents together and one by one: the same bits.
fn packed<B: Traits>(run: &Run<'_, B>, dtype: DType) {
    let (device, dim) = (run.backend, 16);
    let packed = Segments::from_lengths([37, 1, 70]);
    let mut values = Random::new(9).normal(packed.tokens() * dim);
    let mut dout = Random::new(10).normal(packed.tokens() * dim);
    let mut attend = |rows: std::ops::Range<usize>, segments: &Segments| {
        let shape = [rows.len(), 1, dim];
        let x = run.upload(dtype, shape, &mut values[rows.start * dim..rows.end * dim]);
        let dout = run.upload(dtype, shape, &mut dout[rows.start * dim..rows.end * dim]);
        let mut out = device.alloc(dtype, shape).unwrap();
        let mut lse = device.alloc(DType::F32, [rows.len(), 1]).unwrap();
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| device.alloc(dtype, shape).unwrap());
        let call = AttentionForward {
            q: &x,
            k: &x,
            v: &x,
            query_segments: segments,
            key_segments: segments,
            scale: 0.25,
            precision: Precision::Bf16,
            out: &mut out,
            lse: &mut lse,
        };
        device.attention_forward(call).unwrap();
        let call = AttentionBackward {
            q: &x,
            k: &x,
            v: &x,
            out: &out,
            lse: &lse,
            dout: &dout,
            segments,
            scale: 0.25,
            precision: Precision::Bf16,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        device.attention_backward(call).unwrap();
        [&out, &lse, &dq, &dk, &dv].map(|tensor| device.read(tensor).unwrap())
    };
    let together = attend(0..packed.tokens(), &packed);
    let mut apart: [Vec<u8>; 5] = Default::default();
    for rows in packed.ranges() {
        let alone = Segments::from_lengths([rows.len()]);
        for (all, part) in apart.iter_mut().zip(attend(rows, &alone)) {
            all.extend(part);
        }
    }
    assert!(together == apart, "on {} in {dtype}", run.name);
}
