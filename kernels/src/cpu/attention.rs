//! Causal attention, one query row at a time.

use super::Cpu;

use super::view::{floats, floats_mut};
use crate::contract::{self, AttentionSizes};
use crate::error::Result;
use crate::ops::{AttentionBackward, AttentionForward, AttentionOps, Precision};

impl AttentionOps for Cpu {
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()> {
        const OP: &str = "attention_forward";
        let AttentionSizes { heads, kv_heads, dim } = contract::attention_forward(&call)?;
        let (precision, scale) = (call.precision, call.scale);
        let q = rounded(floats(OP, "q", call.q)?, precision);
        let k = rounded(floats(OP, "k", call.k)?, precision);
        let v = rounded(floats(OP, "v", call.v)?, precision);
        let out = floats_mut(OP, "out", call.out)?;
        let lse = floats_mut(OP, "lse", call.lse)?;
        let documents: Vec<_> = call.query_segments.ranges().zip(call.key_segments.ranges()).collect();
        self.for_rows2((out, lse), (heads * dim, heads), |first, out, lse| {
            let rows = out.chunks_exact_mut(heads * dim).zip(lse.chunks_exact_mut(heads));
            for (i, (out, lse)) in rows.enumerate() {
                let i = first + i;
                let Some((queries, keys)) = documents.iter().find(|(queries, _)| queries.contains(&i)) else {
                    continue;
                };
                let visible = i - queries.start + 1 + keys.len() - queries.len();
                for head in 0..heads {
                    let at = |j: usize| ((keys.start + j) * kv_heads + head * kv_heads / heads) * dim;
                    let q = &q[(i * heads + head) * dim..][..dim];
                    let mut p: Vec<f32> = (0..visible).map(|j| scale * dot(q, &k[at(j)..][..dim])).collect();
                    let largest = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    p.iter_mut().for_each(|p| *p = (*p - largest).exp());
                    let sum: f32 = p.iter().sum();
                    lse[head] = largest + sum.ln();
                    let out = &mut out[head * dim..][..dim];
                    out.fill(0.0);
                    for (j, p) in rounded(&p, precision).into_iter().enumerate() {
                        for (out, v) in out.iter_mut().zip(&v[at(j)..]) {
                            *out += p / sum * v;
                        }
                    }
                }
            }
        });
        Ok(())
    }

    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()> {
        const OP: &str = "attention_backward";
        let AttentionSizes { heads, kv_heads, dim } = contract::attention_backward(&call)?;
        let precision = call.precision;
        let q = rounded(floats(OP, "q", call.q)?, precision);
        let k = rounded(floats(OP, "k", call.k)?, precision);
        let v = rounded(floats(OP, "v", call.v)?, precision);
        let exact_dout = floats(OP, "dout", call.dout)?;
        let dout = rounded(exact_dout, precision);
        let (out, lse) = (floats(OP, "out", call.out)?, floats(OP, "lse", call.lse)?);
        let dq = floats_mut(OP, "dq", call.dq)?;
        let dk = floats_mut(OP, "dk", call.dk)?;
        let dv = floats_mut(OP, "dv", call.dv)?;
        dq.fill(0.0);
        dk.fill(0.0);
        dv.fill(0.0);
        for document in call.segments.ranges() {
            for head in 0..heads {
                for i in document.clone() {
                    let at_q = (i * heads + head) * dim;
                    let delta = dot(&exact_dout[at_q..][..dim], &out[at_q..][..dim]);
                    for j in document.start..=i {
                        let at_k = (j * kv_heads + head * kv_heads / heads) * dim;
                        let score = call.scale * dot(&q[at_q..][..dim], &k[at_k..][..dim]);
                        let p = (score - lse[i * heads + head]).exp();
                        let ds = p * (dot(&dout[at_q..][..dim], &v[at_k..][..dim]) - delta);
                        let (p, ds) = (enter(p, precision), call.scale * enter(ds, precision));
                        for d in 0..dim {
                            dq[at_q + d] += ds * k[at_k + d];
                            dk[at_k + d] += ds * q[at_q + d];
                            dv[at_k + d] += p * dout[at_q + d];
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// One factor as it enters a product.
fn enter(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => value,
        Precision::Bf16 => half::bf16::from_f32(value).to_f32(),
    }
}

/// A factor matrix as it enters a product.
fn rounded(values: &[f32], precision: Precision) -> Vec<f32> {
    values.iter().map(|value| enter(*value, precision)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
