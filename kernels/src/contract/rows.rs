//! Ops on whole rows: gather, copy, rotary embedding.

use super::{DENSE, Rules};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, RopeTable};
use crate::tensor::Tensor;
use crate::weight::Weight;

/// The table's tensor of a gather; its extents are `[V, C]`, and `y` is `[T, C]`.
pub(crate) fn gather_rows<'a, D: Device>(
    table: &'a Weight<D>,
    ids: &Tensor<D>,
    y: &Tensor<D>,
) -> Result<&'a Tensor<D>> {
    let rules = Rules("gather_rows");
    let Weight::Dense(table) = table else {
        return Err(rules.value("table", "must be dense, but is nf4".to_owned()));
    };
    rules.dtype("table", table, DENSE)?;
    let [_, width] = rules.extents("table", table, "[V, C]")?;
    rules.dtype("ids", ids, &[DType::I32])?;
    let [tokens] = rules.extents("ids", ids, "[T]")?;
    rules.alike("y", y, y)?;
    rules.shape("y", y, "[T, C]", &[tokens, width])?;
    Ok(table)
}

pub(crate) fn copy_rows<D: Device>(source: &Tensor<D>, target: &Tensor<D>, first: usize) -> Result<()> {
    let rules = Rules("copy_rows");
    rules.alike("source", source, target)?;
    rules.alike("target", target, target)?;
    let (source_extents, target_extents) = (source.shape(), target.shape());
    let (Some((rows, row)), Some((target_rows, target_row))) = (
        source_extents.extents().split_first(),
        target_extents.extents().split_first(),
    ) else {
        return Err(rules.wrong_shape("source", source, "one or more rows".to_owned()));
    };
    if row != target_row {
        return Err(rules.wrong_shape("source", source, format!("rows of {target_row:?}")));
    }
    if first.checked_add(*rows).is_none_or(|end| end > *target_rows) {
        return Err(rules.value(
            "first",
            format!("is {first}: {rows} rows from there do not fit into {target_rows}"),
        ));
    }
    Ok(())
}

/// Extents of a rotary embedding.
#[derive(Clone, Copy)]
pub(crate) struct RopeSizes {
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    /// `rotary / 2`.
    pub(crate) pairs: usize,
    /// Positions in the table.
    pub(crate) positions: usize,
}

pub(crate) fn rope<D: Device>(x: &Tensor<D>, positions: &Tensor<D>, table: &RopeTable<D>) -> Result<RopeSizes> {
    let rules = Rules("rope");
    rules.alike("x", x, x)?;
    let [tokens, heads, dim] = rules.extents("x", x, "[T, H, D]")?;
    rules.dtype("positions", positions, &[DType::I32])?;
    rules.shape("positions", positions, "[T]", &[tokens])?;
    rules.dtype("cos", &table.cos, &[DType::F32])?;
    rules.dtype("sin", &table.sin, &[DType::F32])?;
    let [count, pairs] = rules.extents("cos", &table.cos, "[positions, rotary / 2]")?;
    rules.shape("sin", &table.sin, "[positions, rotary / 2]", &[count, pairs])?;
    if 2 * pairs > dim {
        return Err(rules.wrong_shape("cos", &table.cos, format!("[positions, ≤ D / 2] with D = {dim}")));
    }
    Ok(RopeSizes {
        heads,
        dim,
        pairs,
        positions: count,
    })
}
