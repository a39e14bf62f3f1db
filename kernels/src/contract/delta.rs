//! The gated delta rule.

use super::{Rules, VECTOR};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward, Device,
};
use crate::tensor::{Segments, Tensor};

/// `Hk`, `Hv`, `Dk`, `Dv`.
#[derive(Clone, Copy)]
pub(crate) struct DeltaSizes {
    pub(crate) tokens: usize,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
}

pub(crate) fn delta_rule_forward<D: Device>(call: &DeltaForward<'_, D>) -> Result<DeltaSizes> {
    let rules = Rules("delta_rule_forward");
    let sizes = common(rules, call.q, call.k, call.v, call.segments)?;
    let gates = [("decay", call.decay), ("beta", call.beta)];
    per_head(rules, &gates, sizes)?;
    rules.alike("out", call.out, call.q)?;
    rules.shape("out", call.out, "[T, Hv, Dv]", call.v.shape().extents())?;
    solved(rules, call.solved, sizes)?;
    if let Some(state) = &call.state {
        let extents = [call.segments.len(), sizes.value_heads, sizes.key_dim, sizes.value_dim];
        rules.dtype("state", state, &[DType::F32])?;
        rules.shape("state", state, "[documents, Hv, Dk, Dv]", &extents)?;
    }
    Ok(sizes)
}

pub(crate) fn delta_rule_backward<D: Device>(call: &DeltaBackward<'_, D>) -> Result<DeltaSizes> {
    let rules = Rules("delta_rule_backward");
    let sizes = common(rules, call.q, call.k, call.v, call.segments)?;
    let gates = [
        ("decay", call.decay),
        ("beta", call.beta),
        ("ddecay", &*call.ddecay),
        ("dbeta", &*call.dbeta),
    ];
    per_head(rules, &gates, sizes)?;
    solved(rules, call.solved, sizes)?;
    for (argument, tensor) in [("dout", call.dout), ("dv", &*call.dv)] {
        rules.alike(argument, tensor, call.q)?;
        rules.shape(argument, tensor, "[T, Hv, Dv]", call.v.shape().extents())?;
    }
    for (argument, tensor) in [("dq", &*call.dq), ("dk", &*call.dk)] {
        rules.alike(argument, tensor, call.q)?;
        rules.shape(argument, tensor, "[T, Hk, Dk]", call.q.shape().extents())?;
    }
    Ok(sizes)
}

/// `N`.
pub(crate) fn delta_gates_forward<D: Device>(call: &DeltaGatesForward<'_, D>) -> Result<usize> {
    let rules = Rules("delta_gates_forward");
    let outputs = [("decay", &*call.decay), ("beta", &*call.beta)];
    let width = gates(rules, call.a, call.a_log, call.dt_bias, &outputs)?;
    rules.alike("b", call.b, call.a)?;
    rules.shape("b", call.b, "the shape of a", call.a.shape().extents())?;
    Ok(width)
}

/// `N`.
pub(crate) fn delta_gates_backward<D: Device>(call: &DeltaGatesBackward<'_, D>) -> Result<usize> {
    let rules = Rules("delta_gates_backward");
    let wide = [("beta", call.beta), ("ddecay", call.ddecay), ("dbeta", call.dbeta)];
    let width = gates(rules, call.a, call.a_log, call.dt_bias, &wide)?;
    for (argument, tensor) in [("da", &*call.da), ("db", &*call.db)] {
        rules.alike(argument, tensor, call.a)?;
        rules.shape(argument, tensor, "the shape of a", call.a.shape().extents())?;
    }
    Ok(width)
}

fn common<D: Device>(
    rules: Rules,
    q: &Tensor<D>,
    k: &Tensor<D>,
    v: &Tensor<D>,
    segments: &Segments,
) -> Result<DeltaSizes> {
    for (argument, tensor) in [("q", q), ("k", k), ("v", v)] {
        rules.alike(argument, tensor, q)?;
    }
    let [tokens, key_heads, key_dim] = rules.extents("q", q, "[T, Hk, Dk]")?;
    if tokens != segments.tokens() {
        let expected = format!("[T, Hk, Dk] with T = {} as the segments say", segments.tokens());
        return Err(rules.wrong_shape("q", q, expected));
    }
    rules.shape("k", k, "the shape of q", q.shape().extents())?;
    let [_, value_heads, value_dim] = rules.extents("v", v, "[T, Hv, Dv]")?;
    rules.shape("v", v, "[T, Hv, Dv]", &[tokens, value_heads, value_dim])?;
    if key_heads == 0 || value_heads % key_heads != 0 {
        let expected = format!("[T, Hv, Dv] with Hv a multiple of Hk = {key_heads}");
        return Err(rules.wrong_shape("v", v, expected));
    }
    Ok(DeltaSizes {
        tokens,
        key_heads,
        value_heads,
        key_dim,
        value_dim,
    })
}

/// Sizes of the delta rule whose inputs the projections hold.
pub(crate) fn delta_inputs_forward<D: Device>(call: &DeltaInputsForward<'_, D>) -> Result<DeltaSizes> {
    let rules = Rules("delta_inputs_forward");
    let sizes = common(rules, call.q, call.k, call.v, call.segments)?;
    projected(rules, [("fused", call.fused), ("ba", call.ba)], call.q, sizes)?;
    rules.alike("z", call.z, call.q)?;
    rules.shape("z", call.z, "the shape of v", call.v.shape().extents())?;
    frozen(rules, call.taps, call.a_log, call.dt_bias, sizes)?;
    per_head(rules, &[("decay", &*call.decay), ("beta", &*call.beta)], sizes)?;
    Ok(sizes)
}

/// The same.
pub(crate) fn delta_inputs_backward<D: Device>(call: &DeltaInputsBackward<'_, D>) -> Result<DeltaSizes> {
    let rules = Rules("delta_inputs_backward");
    let sizes = common(rules, call.dq, call.dk, call.dv, call.segments)?;
    projected(rules, [("fused", call.fused), ("ba", call.ba)], call.dq, sizes)?;
    projected(rules, [("dfused", call.dfused), ("dba", call.dba)], call.dq, sizes)?;
    rules.alike("dz", call.dz, call.dq)?;
    rules.shape("dz", call.dz, "the shape of dv", call.dv.shape().extents())?;
    frozen(rules, call.taps, call.a_log, call.dt_bias, sizes)?;
    let wide = [("beta", call.beta), ("ddecay", call.ddecay), ("dbeta", call.dbeta)];
    per_head(rules, &wide, sizes)?;
    Ok(sizes)
}

/// The outputs of both projections, or their gradients, in the dtype of `like`.
fn projected<D: Device>(
    rules: Rules,
    [fused, ba]: [(&'static str, &Tensor<D>); 2],
    like: &Tensor<D>,
    sizes: DeltaSizes,
) -> Result<()> {
    let group = sizes.value_heads / sizes.key_heads * sizes.value_dim;
    let columns = sizes.key_heads * (2 * sizes.key_dim + 2 * group);
    for ((argument, tensor), expected, columns) in [
        (fused, "[T, Hk·(2·Dk + 2·G·Dv)]", columns),
        (ba, "[T, 2·Hv]", 2 * sizes.value_heads),
    ] {
        rules.alike(argument, tensor, like)?;
        rules.shape(argument, tensor, expected, &[sizes.tokens, columns])?;
    }
    Ok(())
}

/// The convolution's taps and the gates' constants.
fn frozen<D: Device>(
    rules: Rules,
    taps: [&Tensor<D>; 3],
    a_log: &Tensor<D>,
    dt_bias: &Tensor<D>,
    sizes: DeltaSizes,
) -> Result<()> {
    let (keys, values) = (sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim);
    let mut width = None;
    for (argument, tensor, channels) in [
        ("taps of q", taps[0], keys),
        ("taps of k", taps[1], keys),
        ("taps of v", taps[2], values),
    ] {
        rules.dtype(argument, tensor, VECTOR)?;
        let [_, own] = rules.extents(argument, tensor, "[C, K]")?;
        rules.shape(argument, tensor, "[C, K]", &[channels, *width.get_or_insert(own)])?;
    }
    for (argument, tensor) in [("a_log", a_log), ("dt_bias", dt_bias)] {
        rules.dtype(argument, tensor, VECTOR)?;
        rules.shape(argument, tensor, "[Hv]", &[sizes.value_heads])?;
    }
    Ok(())
}

fn per_head<D: Device>(rules: Rules, tensors: &[(&'static str, &Tensor<D>)], sizes: DeltaSizes) -> Result<()> {
    for (argument, tensor) in tensors {
        rules.dtype(argument, tensor, &[DType::F32])?;
        rules.shape(argument, tensor, "[T, Hv]", &[sizes.tokens, sizes.value_heads])?;
    }
    Ok(())
}

fn solved<D: Device>(rules: Rules, solved: &Tensor<D>, sizes: DeltaSizes) -> Result<()> {
    rules.dtype("solved", solved, &[DType::F32])?;
    let extents = [sizes.tokens, sizes.value_heads, DELTA_CHUNK];
    rules.shape("solved", solved, "[T, Hv, 64]", &extents)
}

/// The width of the gates, whose f32 tensors `wide` are shaped as `a`.
fn gates<D: Device>(
    rules: Rules,
    a: &Tensor<D>,
    a_log: &Tensor<D>,
    dt_bias: &Tensor<D>,
    wide: &[(&'static str, &Tensor<D>)],
) -> Result<usize> {
    rules.alike("a", a, a)?;
    let [_, width] = rules.extents("a", a, "[T, N]")?;
    for (argument, tensor) in [("a_log", a_log), ("dt_bias", dt_bias)] {
        rules.dtype(argument, tensor, VECTOR)?;
        rules.shape(argument, tensor, "[N]", &[width])?;
    }
    for (argument, tensor) in wide {
        rules.dtype(argument, tensor, &[DType::F32])?;
        rules.shape(argument, tensor, "the shape of a", a.shape().extents())?;
    }
    Ok(width)
}
