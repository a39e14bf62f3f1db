//! Products of grouped rows on Hopper's tensor cores: `grouped_hopper.cu`.

use super::super::kernel::Parameter::{I32, In, Map as MapOf, Out};
use super::super::matmul::choice::fits_hopper;
use super::super::matmul::hopper::{OUTPUTS, THREADS, Width, token_map, weight_map};
use super::super::sources::GROUPED_HOPPER;
use super::super::{Argument, Element, Gpu, Kernel, Machine, Runtime};
use super::hopper_fused;
use super::linear::{Experts, Grouped, Reads, extents, slots};
use super::tensor::{expert_arguments, expert_type};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Routing, RowOrder, Write};
use crate::tensor::Tensor;

const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

const fn grouped(stem: &'static str) -> Kernel {
    Kernel {
        source: &GROUPED_HOPPER,
        stem,
        types: &[&[DType::BF16, DType::U8]],
        threads: THREADS,
        parameters: &[
            ("left", MapOf),
            ("left_slots", In(INTEGER)),
            ("weight", MapOf),
            ("absmax", In(SINGLE)),
            ("nested_codes", In(Element::Is(DType::U8))),
            ("nested_map", In(SINGLE)),
            ("nested_offsets", In(SINGLE)),
            ("left2", MapOf),
            ("right2", In(HALF)),
            ("tiles", In(INTEGER)),
            ("offsets", In(INTEGER)),
            ("out", Out(HALF)),
            ("groups", I32),
            ("top", I32),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
            ("accumulate", I32),
        ],
    }
}

static ROWS_NARROW: Kernel = grouped("hopper_grouped_rows_narrow");
static ROWS_MIDDLE: Kernel = grouped("hopper_grouped_rows_middle");
static ROWS_WIDE: Kernel = grouped("hopper_grouped_rows_wide");
static COLUMNS_NARROW: Kernel = grouped("hopper_grouped_columns_narrow");
static COLUMNS_MIDDLE: Kernel = grouped("hopper_grouped_columns_middle");
static COLUMNS_WIDE: Kernel = grouped("hopper_grouped_columns_wide");

pub(super) const KERNELS: &[&Kernel] = &[
    &ROWS_NARROW,
    &ROWS_MIDDLE,
    &ROWS_WIDE,
    &COLUMNS_NARROW,
    &COLUMNS_MIDDLE,
    &COLUMNS_WIDE,
    &hopper_fused::SWIGLU_NARROW,
    &hopper_fused::SWIGLU_MIDDLE,
    &hopper_fused::PAIR_NARROW,
    &hopper_fused::PAIR_MIDDLE,
    &hopper_fused::PAIR_WIDE,
];

/// How wide tiles are by the rows that an expert has on average, at most: the first line that holds.
///
/// A tile of 128 rows decodes a weight once for twice as many rows, but the last tile of each expert is half empty on average: with
/// few rows an expert that is most of them, and weights are then what is waited for. Wide ones are worth it where `1 / (1 + 128 / rows)`
/// of their rate is more than `1 / (1 + 64 / rows)` of the middle ones': from 192 rows on in bf16 (1.0 against 0.80 of the tensor
/// cores' rate, by count), from 119 in NF4 (0.85 against 0.63). A copying warp has no lanes for as many rows that lie apart.
const WIDTHS: &[(usize, Width)] = &[(64, Width::Narrow), (256, Width::Middle), (usize::MAX, Width::Wide)];
const GATHERED: &[(usize, Width)] = &[(64, Width::Narrow), (usize::MAX, Width::Middle)];

/// How wide tiles Hopper's kernels do a product in, if they do it.
pub(super) fn width<R: Runtime>(machine: Machine, grouped: &Grouped<'_, R>) -> Option<Width> {
    let [rows, columns, depth, depth2] = grouped.sizes;
    let is_half = matches!(&grouped.out, Some((out, _)) if out.dtype() == DType::BF16);
    let depth2 = grouped.second.map_or(0, |_| depth2);
    if !is_half || grouped.copy.is_some() {
        return None;
    }
    let sizes = [rows, columns, depth, depth2];
    let kind = (grouped.right, grouped.reads, grouped.order);
    width_within_limits(machine, kind, grouped.routing, sizes)
}

/// The same of a product, or two beside each other, whose result is in bf16; `sizes` as those of a [`Grouped`].
pub(super) fn width_within_limits<R: Runtime>(
    machine: Machine,
    (right, reads, order): (&Experts<'_, R>, Reads, RowOrder),
    routing: &Routing<Gpu<R>>,
    [rows, columns, depth, depth2]: [usize; 4],
) -> Option<Width> {
    let row = if reads == Reads::Rows { depth } else { columns };
    let fits = fits_hopper([rows, columns], [depth, depth2], expert_type(right), row);
    if !machine.is_hopper() || !fits {
        return None;
    }
    let (experts, _) = extents(routing);
    look_up(rows.div_ceil(experts.max(1)), order)
}

fn look_up(each: usize, order: RowOrder) -> Option<Width> {
    let widths = match order {
        RowOrder::Token => GATHERED,
        RowOrder::Grouped => WIDTHS,
    };
    widths.iter().find(|(most, _)| each <= *most).map(|(_, width)| *width)
}

/// Elements or codes.
pub(super) fn frozen<'a, R: Runtime>(experts: &'a Experts<'_, R>) -> &'a Tensor<Gpu<R>> {
    match experts {
        Experts::Dense(tensor) => tensor,
        Experts::Nf4(stack) => &stack.codes,
    }
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn hopper_grouped(&self, grouped: Grouped<'_, R>, width: Width) -> Result<()> {
        let [rows, columns, depth, depth2] = grouped.sizes;
        let kernel = match (grouped.reads, width) {
            (Reads::Rows, Width::Narrow) => &ROWS_NARROW,
            (Reads::Rows, Width::Middle) => &ROWS_MIDDLE,
            (Reads::Rows, Width::Wide) => &ROWS_WIDE,
            (Reads::Columns, Width::Narrow) => &COLUMNS_NARROW,
            (Reads::Columns, Width::Middle) => &COLUMNS_MIDDLE,
            (Reads::Columns, Width::Wide) => &COLUMNS_WIDE,
        };
        let tiles = self.grouped_tiles(grouped.routing, rows, width.tokens())?;
        let (experts, top) = extents(grouped.routing);
        let weight = expert_type(grouped.right);
        let accumulate = matches!(grouped.out, Some((_, Write::Accumulate)));
        let [_, absmax, nested, map, offsets] = expert_arguments(grouped.right);
        let left_slots = slots(grouped.order, grouped.routing);
        // Rows that lie apart are boxes of their own.
        let box_rows = if left_slots.is_some() { 1 } else { width.tokens() };
        let is_straight = grouped.reads == Reads::Rows;
        let second = grouped.second.map_or(grouped.left, |(left, _)| left);
        let groups = tiles.shape().rows();
        let arguments = [
            Argument::Map(token_map(grouped.left, box_rows)),
            Argument::Optional(left_slots),
            Argument::Map(weight_map(
                frozen(grouped.right),
                is_straight,
                experts,
                [columns, depth],
            )),
            absmax,
            nested,
            map,
            offsets,
            Argument::Map(token_map(second, width.tokens())),
            Argument::Optional(grouped.second.map(|(_, right)| right)),
            Argument::In(&tiles),
            Argument::In(&grouped.routing.offsets),
            Argument::OptionalOut(grouped.out.map(|(out, _)| out)),
            Argument::Size(groups),
            Argument::Size(top),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(grouped.second.map_or(0, |_| depth2)),
            Argument::Flag(accumulate),
        ];
        let geometry = self.persistent(groups * columns.div_ceil(OUTPUTS));
        self.launch(
            kernel,
            &[weight],
            geometry.with_shared(width.shared_bytes(weight)),
            &arguments,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_wide_as_experts_fill_them_and_wide_ones_are_not_gathered() {
        for (each, grouped, gathered) in [
            (20, Width::Narrow, Width::Narrow),
            (80, Width::Middle, Width::Middle),
            (320, Width::Wide, Width::Middle),
        ] {
            assert_eq!(look_up(each, RowOrder::Grouped), Some(grouped));
            assert_eq!(look_up(each, RowOrder::Token), Some(gathered));
        }
    }
}
