//! Rows and columns, and rotary embedding: `rows.cu`.

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::faults::Fault;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::sources::ROWS;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Columns, EmbeddingOps, Op, RopeDirection, RopeOps, RopeTable};
use crate::tensor::Tensor;
use crate::weight::Weight;

pub(super) static FAMILY: Family = Family {
    source: &ROWS,
    kernels: &[&GATHER_ROWS, &COPY_ROWS, &COPY_COLUMNS, &ROPE],
    ops: &[Op::GatherRows, Op::CopyRows, Op::CopyColumns, Op::Rope],
};

const THREADS: u32 = 256;
const A: Element = Element::Type(0);
const INTEGER: Element = Element::Is(DType::I32);
const SINGLE: Element = Element::Is(DType::F32);

static GATHER_ROWS: Kernel = Kernel {
    source: &ROWS,
    stem: "gather_rows",
    types: &[&[DType::F32, DType::BF16, DType::F16], ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("table", In(Element::Type(0))),
        ("ids", In(INTEGER)),
        ("y", Out(Element::Type(1))),
        ("tokens", I64),
        ("vocabulary", I32),
        ("width", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
};

static COPY_ROWS: Kernel = Kernel {
    source: &ROWS,
    stem: "copy_rows",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[("source", In(A)), ("target", Out(A)), ("offset", I64), ("count", I64)],
};

static COPY_COLUMNS: Kernel = Kernel {
    source: &ROWS,
    stem: "copy_columns",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("source", In(A)),
        ("target", Out(A)),
        ("groups", I64),
        ("width", I32),
        ("source_stride", I32),
        ("source_first", I32),
        ("target_stride", I32),
        ("target_first", I32),
    ],
};

static ROPE: Kernel = Kernel {
    source: &ROWS,
    stem: "rope",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("x", Out(A)),
        ("positions", In(INTEGER)),
        ("cos", In(SINGLE)),
        ("sin", In(SINGLE)),
        ("tokens", I64),
        ("heads", I32),
        ("dim", I32),
        ("pairs", I32),
        ("table_rows", I32),
        ("sign", F32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
};

/// A thread an item.
fn each(items: usize) -> Geometry {
    Geometry::cover(items, THREADS as usize)
}

impl<R: Runtime> EmbeddingOps for Gpu<R> {
    fn gather_rows(&self, table: &Weight<Self>, ids: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        let table = contract::gather_rows(table, ids, y)?;
        let (tokens, width) = (y.shape().rows(), y.shape().row());
        let types = [table.dtype(), y.dtype()];
        let geometry = Geometry::cover(tokens, THREADS as usize / 32);
        let arguments = [
            Argument::In(table),
            Argument::In(ids),
            Argument::Out(y),
            Argument::Size(tokens),
            Argument::Size(table.shape().rows()),
            Argument::Size(width),
            Argument::Faults,
            Argument::I32(Fault::Id.code()),
        ];
        self.launch(&GATHER_ROWS, &types, geometry, &arguments)
    }

    fn copy_rows(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, first: usize) -> Result<()> {
        contract::copy_rows(source, target, first)?;
        let rows = target.shape().extents().first().copied().unwrap_or(1);
        let row = target.shape().elements() / rows.max(1);
        let count = source.shape().elements();
        let arguments = [
            Argument::In(source),
            Argument::Out(target),
            Argument::Size(first * row),
            Argument::Size(count),
        ];
        self.launch(&COPY_ROWS, &[source.dtype()], each(count), &arguments)
    }
}

impl<R: Runtime> Gpu<R> {
    /// [`GateOps::copy_columns`](crate::ops::GateOps::copy_columns).
    pub(super) fn move_columns(
        &self,
        source: &Tensor<Self>,
        target: &mut Tensor<Self>,
        columns: Columns,
    ) -> Result<()> {
        let (length, target_length) = contract::copy_columns(source, target, columns)?;
        let rows = source.shape().extents().first().copied().unwrap_or(1);
        let groups = rows * columns.groups;
        let arguments = [
            Argument::In(source),
            Argument::Out(target),
            Argument::Size(groups),
            Argument::Size(columns.width),
            Argument::Size(length / columns.groups),
            Argument::Size(columns.source),
            Argument::Size(target_length / columns.groups),
            Argument::Size(columns.target),
        ];
        self.launch(
            &COPY_COLUMNS,
            &[source.dtype()],
            each(groups * columns.width),
            &arguments,
        )
    }
}

impl<R: Runtime> RopeOps for Gpu<R> {
    fn rope(
        &self,
        x: &mut Tensor<Self>,
        positions: &Tensor<Self>,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()> {
        let sizes = contract::rope(x, positions, table)?;
        let tokens = positions.shape().elements();
        let sign = match direction {
            RopeDirection::Forward => 1.0,
            RopeDirection::Backward => -1.0,
        };
        let dtype = x.dtype();
        let arguments = [
            Argument::Out(x),
            Argument::In(positions),
            Argument::In(&table.cos),
            Argument::In(&table.sin),
            Argument::Size(tokens),
            Argument::Size(sizes.heads),
            Argument::Size(sizes.dim),
            Argument::Size(sizes.pairs),
            Argument::Size(sizes.positions),
            Argument::F32(sign),
            Argument::Faults,
            Argument::I32(Fault::Position.code()),
        ];
        self.launch(&ROPE, &[dtype], each(tokens * sizes.heads * sizes.pairs), &arguments)
    }
}
