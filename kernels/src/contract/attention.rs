//! Attention.

use super::Rules;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AttentionBackward, AttentionForward, Device};
use crate::tensor::{Segments, Tensor};

/// `H`, `K`, `D`.
#[derive(Clone, Copy)]
pub(crate) struct AttentionSizes {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
}

pub(crate) fn attention_forward<D: Device>(call: &AttentionForward<'_, D>) -> Result<AttentionSizes> {
    let rules = Rules("attention_forward");
    let sizes = common(rules, call.q, call.k, call.v, call.lse, call.query_segments)?;
    rules.alike("out", call.out, call.q)?;
    rules.shape("out", call.out, "the shape of q", call.q.shape().extents())?;
    let (queries, keys) = (call.query_segments, call.key_segments);
    if queries.len() != keys.len() || queries.ranges().zip(keys.ranges()).any(|(q, k)| k.len() < q.len()) {
        return Err(rules.value(
            "key_segments",
            format!(
                "must be as many documents as query_segments and none shorter: {:?} against {:?}",
                keys.offsets(),
                queries.offsets()
            ),
        ));
    }
    let rows = call.k.shape().extents().first().copied().unwrap_or(0);
    if rows < keys.tokens() {
        let expected = format!("[≥ Tk, K, D] with Tk = {}", keys.tokens());
        return Err(rules.wrong_shape("k", call.k, expected));
    }
    Ok(sizes)
}

pub(crate) fn attention_backward<D: Device>(call: &AttentionBackward<'_, D>) -> Result<AttentionSizes> {
    let rules = Rules("attention_backward");
    let sizes = common(rules, call.q, call.k, call.v, call.lse, call.segments)?;
    for (argument, tensor) in [("out", call.out), ("dout", call.dout), ("dq", &*call.dq)] {
        rules.alike(argument, tensor, call.q)?;
        rules.shape(argument, tensor, "the shape of q", call.q.shape().extents())?;
    }
    let extents = [call.segments.tokens(), sizes.kv_heads, sizes.dim];
    for (argument, tensor) in [("k", call.k), ("v", call.v), ("dk", &*call.dk), ("dv", &*call.dv)] {
        rules.alike(argument, tensor, call.q)?;
        rules.shape(argument, tensor, "[T, K, D]", &extents)?;
    }
    Ok(sizes)
}

fn common<D: Device>(
    rules: Rules,
    q: &Tensor<D>,
    k: &Tensor<D>,
    v: &Tensor<D>,
    lse: &Tensor<D>,
    segments: &Segments,
) -> Result<AttentionSizes> {
    rules.alike("q", q, q)?;
    rules.alike("k", k, q)?;
    rules.alike("v", v, q)?;
    let [tokens, heads, dim] = rules.extents("q", q, "[T, H, D]")?;
    if tokens != segments.tokens() {
        let expected = format!("[T, H, D] with T = {} as the segments say", segments.tokens());
        return Err(rules.wrong_shape("q", q, expected));
    }
    let [_, kv_heads, key_dim] = rules.extents("k", k, "[T, K, D]")?;
    if key_dim != dim || kv_heads == 0 || heads % kv_heads != 0 {
        let expected = format!("[T, K, D] with D = {dim} and K a divisor of H = {heads}");
        return Err(rules.wrong_shape("k", k, expected));
    }
    rules.shape("v", v, "the shape of k", k.shape().extents())?;
    rules.dtype("lse", lse, &[DType::F32])?;
    rules.shape("lse", lse, "[T, H]", &[tokens, heads])?;
    Ok(AttentionSizes { heads, kv_heads, dim })
}
