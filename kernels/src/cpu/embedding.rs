//! Moving whole rows.

use half::slice::HalfFloatSliceExt;

use super::Cpu;
use super::view::{dense_bf16, dense_f16, floats, floats_mut, integers};
use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::EmbeddingOps;
use crate::tensor::Tensor;
use crate::weight::Weight;

impl EmbeddingOps for Cpu {
    fn gather_rows(&self, table: &Weight<Self>, ids: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "gather_rows";
        let table = contract::gather_rows(table, ids, y)?;
        let ids = integers(OP, "ids", ids)?;
        let (vocabulary, width) = (table.shape().rows(), table.shape().row());
        if let Some(outside) = ids
            .iter()
            .find(|id| usize::try_from(**id).map_or(true, |id| id >= vocabulary))
        {
            return Err(Error::Value {
                op: OP,
                argument: "ids",
                problem: format!("has {outside}, but the table has {vocabulary} rows"),
            });
        }
        if width == 0 {
            return Ok(());
        }
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            for (row, id) in y.chunks_exact_mut(width).zip(&ids[first..]) {
                let range = *id as usize * width..(*id as usize + 1) * width;
                match table.dtype() {
                    DType::BF16 => dense_bf16(table)[range].convert_to_f32_slice(row),
                    DType::F16 => dense_f16(table)[range].convert_to_f32_slice(row),
                    _ => row.copy_from_slice(&bytemuck::cast_slice(table.buffer().bytes())[range]),
                }
            }
        });
        Ok(())
    }

    fn copy_rows(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, first: usize) -> Result<()> {
        contract::copy_rows(source, target, first)?;
        let source = floats("copy_rows", "source", source)?;
        let target_rows = target.shape().extents().first().copied().unwrap_or(1);
        let row = target.shape().elements() / target_rows.max(1);
        let target = floats_mut("copy_rows", "target", target)?;
        target[first * row..][..source.len()].copy_from_slice(source);
        Ok(())
    }
}
