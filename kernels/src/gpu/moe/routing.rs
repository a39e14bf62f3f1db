//! Choosing experts, and grouping the rows by them.

use super::super::faults::Fault;
use super::super::kernel::Parameter::{I32, I64, In, Out};
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::{THREADS, kernel};
use crate::contract::{self, RoutingSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, RouteBackward, Routing};
use crate::tensor::Tensor;

const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);
/// Slots that a warp groups.
const TILE: usize = 1024;
const WARP: u32 = 32;

pub(super) static ROUTE: Kernel = kernel(
    "route",
    &[],
    THREADS,
    &[
        ("logits", In(SINGLE)),
        ("chosen", Out(INTEGER)),
        ("weights", Out(SINGLE)),
        ("tokens", I64),
        ("experts", I32),
        ("top", I32),
        ("renormalise", I32),
    ],
);

pub(super) static ROUTE_BACKWARD: Kernel = kernel(
    "route_backward",
    &[],
    THREADS,
    &[
        ("logits", In(SINGLE)),
        ("chosen", In(INTEGER)),
        ("dweights", In(SINGLE)),
        ("dlogits", Out(SINGLE)),
        ("tokens", I64),
        ("experts", I32),
        ("top", I32),
        ("renormalise", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
);

pub(super) static GROUP_COUNT: Kernel = kernel(
    "group_count",
    &[],
    WARP,
    &[
        ("chosen", In(INTEGER)),
        ("counts", Out(INTEGER)),
        ("slots", I32),
        ("experts", I32),
    ],
);

pub(super) static GROUP_OFFSETS: Kernel = kernel(
    "group_offsets",
    &[],
    THREADS,
    &[
        ("counts", Out(INTEGER)),
        ("offsets", Out(INTEGER)),
        ("tiles", I32),
        ("experts", I32),
    ],
);

pub(super) static GROUP_PLACE: Kernel = kernel(
    "group_place",
    &[],
    WARP,
    &[
        ("chosen", In(INTEGER)),
        ("first_rows", In(INTEGER)),
        ("slots_of", Out(INTEGER)),
        ("rows_of", Out(INTEGER)),
        ("slots", I32),
        ("experts", I32),
    ],
);

/// A warp a token.
fn warps(tokens: usize) -> Geometry {
    Geometry::cover(tokens, (THREADS / WARP) as usize)
}

impl<R: Runtime> Gpu<R> {
    /// [`MoeOps::route`](crate::ops::MoeOps::route).
    pub(super) fn choose_experts(
        &self,
        logits: &Tensor<Self>,
        renormalise: bool,
        routing: &mut Routing<Self>,
    ) -> Result<()> {
        let sizes = contract::route(logits, routing)?;
        let arguments = [
            Argument::In(logits),
            Argument::Out(&mut routing.experts),
            Argument::Out(&mut routing.weights),
            Argument::Size(sizes.tokens),
            Argument::Size(sizes.experts),
            Argument::Size(sizes.top),
            Argument::Flag(renormalise),
        ];
        self.launch(&ROUTE, &[], warps(sizes.tokens), &arguments)?;
        self.group_rows(sizes, routing)
    }

    /// A stable counting sort of the slots by expert.
    fn group_rows(&self, sizes: RoutingSizes, routing: &mut Routing<Self>) -> Result<()> {
        let (slots, experts) = (sizes.slots(), sizes.experts);
        let tiles = slots.div_ceil(TILE);
        let histogram = experts * size_of::<i32>();
        let each = Geometry::cover(tiles, 1).with_shared(histogram);
        let mut counts = self.alloc(DType::I32, [tiles, experts])?;
        let arguments = [
            Argument::In(&routing.experts),
            Argument::Out(&mut counts),
            Argument::Size(slots),
            Argument::Size(experts),
        ];
        self.launch(&GROUP_COUNT, &[], each, &arguments)?;
        let arguments = [
            Argument::Out(&mut counts),
            Argument::Out(&mut routing.offsets),
            Argument::Size(tiles),
            Argument::Size(experts),
        ];
        let one = Geometry::cover(1, 1).with_shared(histogram);
        self.launch(&GROUP_OFFSETS, &[], one, &arguments)?;
        let arguments = [
            Argument::In(&routing.experts),
            Argument::In(&counts),
            Argument::Out(&mut routing.slots),
            Argument::Out(&mut routing.rows),
            Argument::Size(slots),
            Argument::Size(experts),
        ];
        self.launch(&GROUP_PLACE, &[], each, &arguments)
    }

    /// [`MoeOps::route_backward`](crate::ops::MoeOps::route_backward).
    pub(super) fn through_choice(&self, call: RouteBackward<'_, Self>) -> Result<()> {
        let sizes = contract::route_backward(&call)?;
        let arguments = [
            Argument::In(call.logits),
            Argument::In(&call.routing.experts),
            Argument::In(call.dweights),
            Argument::Out(call.dlogits),
            Argument::Size(sizes.tokens),
            Argument::Size(sizes.experts),
            Argument::Size(sizes.top),
            Argument::Flag(call.renormalise),
            Argument::Faults,
            Argument::I32(Fault::Routing.code()),
        ];
        self.launch(&ROUTE_BACKWARD, &[], warps(sizes.tokens), &arguments)
    }
}
