//! Rotary position embedding.

use super::Cpu;
use super::simd::rows::rotate;
use super::view::{floats, floats_mut, integers};
use crate::contract;
use crate::error::{Error, Result};
use crate::ops::{RopeDirection, RopeOps, RopeTable};
use crate::tensor::Tensor;

impl RopeOps for Cpu {
    fn rope(
        &self,
        x: &mut Tensor<Self>,
        positions: &Tensor<Self>,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()> {
        const OP: &str = "rope";
        let sizes = contract::rope(x, positions, table)?;
        let positions = integers(OP, "positions", positions)?;
        let inside = |position: &&i32| usize::try_from(**position).is_ok_and(|p| p < sizes.positions);
        if let Some(outside) = positions.iter().find(|position| !inside(position)) {
            return Err(Error::Value {
                op: OP,
                argument: "positions",
                problem: format!("has {outside}, but the table ends at {}", sizes.positions),
            });
        }
        let (cos, sin) = (floats(OP, "cos", &table.cos)?, floats(OP, "sin", &table.sin)?);
        let sign = match direction {
            RopeDirection::Forward => 1.0,
            RopeDirection::Backward => -1.0,
        };
        let (pairs, width) = (sizes.pairs, sizes.heads * sizes.dim);
        let simd = self.inner.simd;
        if pairs == 0 {
            return Ok(());
        }
        self.for_rows(floats_mut(OP, "x", x)?, width, |first, x| {
            for (row, position) in x.chunks_exact_mut(width).zip(&positions[first..]) {
                let at = *position as usize * pairs;
                let (cos, sin) = (&cos[at..at + pairs], &sin[at..at + pairs]);
                for head in row.chunks_exact_mut(sizes.dim) {
                    let (low, high) = head.split_at_mut(pairs);
                    rotate(simd, low, high, cos, sin, sign);
                }
            }
        });
        Ok(())
    }
}
