//! Attention, forward and backward.

use brightrun_kernels::ops::{AttentionBackward, AttentionForward, AttentionOps, Device, Precision};
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
];

const CACHED: &[Shape] = &[
    shape(&[1], 70, 4, 2, 16),
    shape(&[2, 1, 5], 3, 2, 2, 9),
    shape(&[65], 64, 3, 3, 64),
];

impl Shape {
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

fn forward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, precision: Precision, spread: f32) {
    let (queries, keys, heads) = (shape.queries(), shape.keys(), shape.heads());
    let mut random = Random::new(shape.dim as u64);
    let mut values = |tokens: usize, heads: usize| -> Vec<f32> {
        random
            .normal(tokens * heads * shape.dim)
            .into_iter()
            .map(|v| spread * v)
            .collect()
    };
    let q = values(queries.tokens(), shape.heads);
    // One row more than there are keys: it must be ignored.
    let (mut k, mut v) = (
        values(keys.tokens() + 1, shape.kv_heads),
        values(keys.tokens() + 1, shape.kv_heads),
    );
    let used = keys.tokens() * shape.kv_heads * shape.dim;
    k[used..].fill(f32::NAN);
    v[used..].fill(f32::NAN);
    let device = run.backend;
    let q_t = device
        .upload_f32([queries.tokens(), shape.heads, shape.dim], &q)
        .unwrap();
    let kv = |values: &[f32]| {
        device
            .upload_f32([keys.tokens() + 1, shape.kv_heads, shape.dim], values)
            .unwrap()
    };
    let (k_t, v_t) = (kv(&k), kv(&v));
    let mut out = device.alloc(DType::F32, q_t.shape()).unwrap();
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
        format_args!("attention_forward {shape:?} {precision:?} ×{spread}"),
        shape.dim + keys.longest(),
    );
    case.compare("out", &out, &plain[0], &oracle[0]);
    case.compare("lse", &lse, &plain[1], &oracle[1]);
}

fn backward<B: Traits>(run: &mut Run<'_, B>, shape: &Shape, precision: Precision) {
    let (segments, heads) = (shape.queries(), shape.heads());
    let mut random = Random::new(shape.dim as u64);
    let mut values = |heads: usize| random.normal(segments.tokens() * heads * shape.dim);
    let (q, k, v, dout) = (
        values(shape.heads),
        values(shape.kv_heads),
        values(shape.kv_heads),
        values(shape.heads),
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
    let (out, lse) = (round(out), round(lse));
    let device = run.backend;
    let upload = |values: &[f32], heads: usize| {
        device
            .upload_f32([segments.tokens(), heads, shape.dim], values)
            .unwrap()
    };
    let (h, kv) = (shape.heads, shape.kv_heads);
    let (q_t, k_t, v_t, out_t, dout_t) = (
        upload(&q, h),
        upload(&k, kv),
        upload(&v, kv),
        upload(&out, h),
        upload(&dout, h),
    );
    let lse_t = device.upload_f32([segments.tokens(), h], &lse).unwrap();
    let mut dq = device.alloc(DType::F32, q_t.shape()).unwrap();
    let mut dk = device.alloc(DType::F32, k_t.shape()).unwrap();
    let mut dv = device.alloc(DType::F32, k_t.shape()).unwrap();
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
        .case(format_args!("attention_backward {shape:?} {precision:?}"), length)
        .cancelling(cancelling * f64::from(heads.scale));
    for (i, (name, tensor)) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

#[test]
fn attention_forward_agrees_with_the_oracle() {
    on_every_backend!("attention_forward", [AttentionForward], |run| {
        for precision in PRECISIONS {
            for shape in SHAPES.iter().chain(CACHED) {
                forward(run, shape, precision, 1.0);
            }
            // Sharp: scores far apart, so that the running maximum moves.
            forward(run, &SHAPES[6], precision, 4.0);
        }
    });
}

#[test]
fn attention_backward_agrees_with_the_oracle() {
    on_every_backend!("attention_backward", [AttentionBackward], |run| {
        for precision in PRECISIONS {
            SHAPES.iter().for_each(|shape| backward(run, shape, precision));
        }
    });
}

#[test]
fn packed_documents_give_what_they_give_alone() {
    on_every_backend!("packed = separate", [AttentionForward, AttentionBackward], |run| {
        let device = run.backend;
        let (lengths, dim) = ([37, 1, 70], 16);
        let values = Random::new(9).normal(108 * dim);
        let attend = |values: &[f32], segments: &Segments| {
            let x = device.upload_f32([segments.tokens(), 1, dim], values).unwrap();
            let mut out = device.alloc(DType::F32, x.shape()).unwrap();
            let mut lse = device.alloc(DType::F32, [segments.tokens(), 1]).unwrap();
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
            device.read_f32(&out).unwrap()
        };
        let packed = Segments::from_lengths(lengths);
        let together = attend(&values, &packed);
        let apart: Vec<f32> = packed
            .ranges()
            .flat_map(|rows| {
                let segments = Segments::from_lengths([rows.len()]);
                attend(&values[rows.start * dim..rows.end * dim], &segments)
            })
            .collect();
        assert!(
            together.iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits()),
            "on {}",
            run.name
        );
        run.case("packed = separate", 0);
    });
}
