//! The passes of a grouped layer. A [`Grouped`] product is carried out by `tensor` or `exact`, as the precision says; factors are
//! brought to the precision's dtype first where they are not in it already.

use super::super::matmul::{Held, LowRank, factors};
use super::super::{Gpu, Runtime};
use crate::contract::{self, GroupedSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, GroupedLinearBackward, GroupedLinearForward, Precision, Routing, RowOrder, Write};
use crate::stack::{Nf4Stack, WeightStack};
use crate::tensor::Tensor;

/// The experts' right factors, ready for a product.
pub(super) enum Experts<'a, R: Runtime> {
    /// `[E, N, K]` or `[E, K, N]`.
    Dense(Held<'a, R>),
    Nf4(&'a Nf4Stack<Gpu<R>>),
}

/// How a product reads its right factors, which are row-major.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// `[N, K]`: a row is a column of the result.
    Rows,
    /// `[K, N]`.
    Columns,
}

/// `out_m = left_m · right_e + left2_m · right2_e`; see the head of `grouped.cu`.
pub(super) struct Grouped<'a, R: Runtime> {
    /// In the precision's dtype.
    pub(super) left: &'a Tensor<Gpu<R>>,
    pub(super) order: RowOrder,
    pub(super) right: &'a Experts<'a, R>,
    pub(super) reads: Reads,
    /// `[M, R]` and the adapters' second factors, in the precision's dtype.
    pub(super) second: Option<LowRank<'a, R>>,
    pub(super) out: Option<(&'a mut Tensor<Gpu<R>>, Write)>,
    /// The result times a factor, in the precision's dtype, to be a factor itself.
    pub(super) copy: Option<(&'a mut Tensor<Gpu<R>>, f32)>,
    pub(super) routing: &'a Routing<Gpu<R>>,
    /// `M`, `N`, `K`, and `R` of the second term, or 0.
    pub(super) sizes: [usize; 4],
}

/// `gradient_e += scale · Σ_m left_mᵀ · right_m`, or the transposed sum.
pub(super) struct GroupedOuter<'a, R: Runtime> {
    /// `[M, rows]` in grouped order, in the precision's dtype.
    pub(super) left: &'a Tensor<Gpu<R>>,
    /// `columns` wide, in the precision's dtype.
    pub(super) right: &'a Tensor<Gpu<R>>,
    pub(super) order: RowOrder,
    /// f32 `[E, rows, columns]`, or `[E, columns, rows]` if `transposed`.
    pub(super) gradient: &'a mut Tensor<Gpu<R>>,
    /// Elements from one expert's gradient to the next, and before the part of it that is meant.
    pub(super) place: [usize; 2],
    pub(super) scale: f32,
    pub(super) transposed: bool,
    pub(super) routing: &'a Routing<Gpu<R>>,
    /// Rows and columns.
    pub(super) sizes: [usize; 2],
}

/// The slots by which rows are gathered, if they are.
pub(super) fn slots<R: Runtime>(order: RowOrder, routing: &Routing<Gpu<R>>) -> Option<&Tensor<Gpu<R>>> {
    (order == RowOrder::Token).then_some(&routing.slots)
}

/// `E` and `k` of a routing.
pub(super) fn extents<R: Runtime>(routing: &Routing<Gpu<R>>) -> (usize, usize) {
    let experts = routing.offsets.shape().elements().saturating_sub(1);
    (experts, routing.experts.shape().row())
}

/// Tiles of `height` rows that `rows` grouped rows have at most, whatever their experts.
pub(super) fn most_tiles(rows: usize, experts: usize, height: usize) -> usize {
    rows.div_ceil(height) + experts.min(rows)
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn experts<'a>(&self, stack: &'a WeightStack<Self>, precision: Precision) -> Result<Experts<'a, R>> {
        Ok(match (stack, precision) {
            (WeightStack::Dense(tensor), Precision::F32) => Experts::Dense(Held::Borrowed(tensor)),
            (WeightStack::Dense(tensor), Precision::Bf16) => Experts::Dense(self.held(tensor, DType::BF16)?),
            (WeightStack::Nf4(nf4), Precision::Bf16) if !nf4.inputs.is_multiple_of(super::tensor::NF4_ROW) => {
                Experts::Dense(Held::Made(self.decode_stack(nf4)?))
            }
            (WeightStack::Nf4(nf4), _) => Experts::Nf4(nf4),
        })
    }

    /// As [`Gpu::experts`], for a layer's product of so many rows.
    fn experts_of_rows<'a>(
        &self,
        stack: &'a WeightStack<Self>,
        precision: Precision,
        rows: usize,
    ) -> Result<Experts<'a, R>> {
        let right = self.experts(stack, precision)?;
        let Experts::Nf4(nf4) = &right else {
            return Ok(right);
        };
        if precision == Precision::F32 || rows / nf4.experts.max(1) < self.inner.shared.rows().experts {
            return Ok(right);
        }
        let decoded = self.shared(&nf4.codes, || self.decode_stack(nf4))?;
        Ok(decoded.map_or(right, |decoded| Experts::Dense(Held::Shared(decoded))))
    }

    /// Two stacks in one form, for a kernel that reads both.
    pub(super) fn pair_of_rows<'a>(
        &self,
        [first, second]: [&'a WeightStack<Self>; 2],
        precision: Precision,
        rows: usize,
    ) -> Result<[Experts<'a, R>; 2]> {
        let pair = [
            self.experts_of_rows(first, precision, rows)?,
            self.experts_of_rows(second, precision, rows)?,
        ];
        match &pair {
            [Experts::Dense(_), Experts::Dense(_)] | [Experts::Nf4(_), Experts::Nf4(_)] => Ok(pair),
            // There was memory to decode one of them only.
            _ => Ok([self.experts(first, precision)?, self.experts(second, precision)?]),
        }
    }

    fn grouped(&self, precision: Precision, grouped: Grouped<'_, R>) -> Result<()> {
        match precision {
            Precision::F32 => self.exact_grouped(grouped),
            Precision::Bf16 => self.tensor_grouped(grouped),
        }
    }

    fn grouped_outer(&self, precision: Precision, outer: GroupedOuter<'_, R>) -> Result<()> {
        match precision {
            Precision::F32 => self.exact_grouped_outer(outer),
            Precision::Bf16 => self.tensor_grouped_outer(outer),
        }
    }

    /// [`MoeOps::grouped_linear_forward`](crate::ops::MoeOps::grouped_linear_forward).
    pub(super) fn forward_through_experts(&self, call: GroupedLinearForward<'_, Self>) -> Result<()> {
        let GroupedSizes {
            routing,
            inputs,
            outputs,
            rank,
        } = contract::grouped_linear_forward(&call)?;
        let (precision, dtype, rows) = (call.precision, factors(call.precision), routing.slots());
        let x = self.held(call.x, dtype)?;
        let mut second = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let a = Experts::Dense(self.held(lora.a, dtype)?);
            let mut scaled = self.alloc(dtype, [rows, rank])?;
            let down = Grouped {
                left: &x,
                order: call.x_order,
                right: &a,
                reads: Reads::Rows,
                second: None,
                out: Some((lora.hidden, Write::Overwrite)),
                copy: Some((&mut scaled, lora.scale)),
                routing: call.routing,
                sizes: [rows, rank, inputs, 0],
            };
            self.grouped(precision, down)?;
            second = Some((scaled, self.held(lora.b, dtype)?));
        }
        let right = self.experts_of_rows(call.weight, precision, rows)?;
        let whole = Grouped {
            left: &x,
            order: call.x_order,
            right: &right,
            reads: Reads::Rows,
            second: second.as_ref().map(|(scaled, b)| (scaled, &**b)),
            out: Some((call.y, Write::Overwrite)),
            copy: None,
            routing: call.routing,
            sizes: [rows, outputs, inputs, rank],
        };
        self.grouped(precision, whole)
    }

    /// [`MoeOps::grouped_linear_backward`](crate::ops::MoeOps::grouped_linear_backward).
    pub(super) fn backward_through_experts(&self, call: GroupedLinearBackward<'_, Self>) -> Result<()> {
        let GroupedSizes {
            routing,
            inputs,
            outputs,
            rank,
        } = contract::grouped_linear_backward(&call)?;
        let (precision, dtype, rows) = (call.precision, factors(call.precision), routing.slots());
        let dy = self.held(call.dy, dtype)?;
        let mut second = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let b = Experts::Dense(self.held(lora.b, dtype)?);
            let mut v = self.alloc(dtype, [rows, rank])?;
            let up = Grouped {
                left: &dy,
                order: call.dy_order,
                right: &b,
                reads: Reads::Columns,
                second: None,
                out: None,
                copy: Some((&mut v, lora.scale)),
                routing: call.routing,
                sizes: [rows, rank, outputs, 0],
            };
            self.grouped(precision, up)?;
            let x = self.held(lora.x, dtype)?;
            let of_a = GroupedOuter {
                left: &v,
                right: &x,
                order: lora.x_order,
                gradient: lora.gradient_a,
                place: [rank * inputs, 0],
                scale: 1.0,
                transposed: false,
                routing: call.routing,
                sizes: [rank, inputs],
            };
            self.grouped_outer(precision, of_a)?;
            let hidden = self.held(lora.hidden, dtype)?;
            let of_b = GroupedOuter {
                left: &hidden,
                right: &dy,
                order: call.dy_order,
                gradient: lora.gradient_b,
                place: [rank * outputs, 0],
                scale: lora.scale,
                transposed: true,
                routing: call.routing,
                sizes: [rank, outputs],
            };
            self.grouped_outer(precision, of_b)?;
            second = Some((v, self.held(lora.a, dtype)?));
        }
        let Some(dx) = call.dx else {
            return Ok(());
        };
        let right = self.experts_of_rows(call.weight, precision, rows)?;
        let whole = Grouped {
            left: &dy,
            order: call.dy_order,
            right: &right,
            reads: Reads::Columns,
            second: second.as_ref().map(|(v, a)| (v, &**a)),
            out: Some(dx),
            copy: None,
            routing: call.routing,
            sizes: [rows, inputs, outputs, rank],
        };
        self.grouped(precision, whole)
    }
}
