//! One expert's matrix to its place in a stack.

use super::super::kernel::Parameter::{F32, I64, In, Out};
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::{THREADS, kernel};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::stack::{Nf4StackScales, WeightStack};
use crate::tensor::Tensor;
use crate::weight::{Nf4Scales, Weight};

const T: Element = Element::Type(0);
const SINGLE: Element = Element::Is(DType::F32);

pub(super) static STACK_PART: Kernel = kernel(
    "stack_part",
    &[&[DType::F32, DType::BF16, DType::F16, DType::U8]],
    THREADS,
    &[("source", In(T)), ("target", Out(T)), ("first", I64), ("count", I64)],
);

pub(super) static STACK_VALUE: Kernel = kernel(
    "stack_value",
    &[],
    32,
    &[("target", Out(SINGLE)), ("at", I64), ("value", F32)],
);

impl<R: Runtime> Gpu<R> {
    /// [`MoeOps::stack_expert`](crate::ops::MoeOps::stack_expert).
    pub(super) fn place_expert(
        &self,
        weight: &Weight<Self>,
        expert: usize,
        stack: &mut WeightStack<Self>,
    ) -> Result<()> {
        contract::stack_expert(weight, expert, stack)?;
        let (weight, stack) = match (weight, stack) {
            (Weight::Dense(weight), WeightStack::Dense(stack)) => return self.place_part(weight, expert, stack),
            (Weight::Nf4(weight), WeightStack::Nf4(stack)) => (weight, stack),
            // The contract compared the encodings.
            _ => return Ok(()),
        };
        self.place_part(&weight.codes, expert, &mut stack.codes)?;
        match (&weight.scales, &mut stack.scales) {
            (Nf4Scales::Flat(absmax), Nf4StackScales::Flat(stack)) => self.place_part(absmax, expert, stack),
            (
                Nf4Scales::Nested {
                    codes,
                    nested_absmax,
                    nested_code,
                    offset,
                },
                Nf4StackScales::Nested {
                    codes: all_codes,
                    nested_absmax: all_absmax,
                    nested_code: map,
                    offsets,
                },
            ) => {
                self.place_part(codes, expert, all_codes)?;
                self.place_part(nested_absmax, expert, all_absmax)?;
                self.place_part(nested_code, 0, map)?;
                let arguments = [Argument::Out(offsets), Argument::Size(expert), Argument::F32(*offset)];
                self.launch(&STACK_VALUE, &[], Geometry::cover(1, 1), &arguments)
            }
            _ => Ok(()),
        }
    }

    /// Copies a tensor to part `index` of one that is several times as large.
    fn place_part(&self, source: &Tensor<Self>, index: usize, target: &mut Tensor<Self>) -> Result<()> {
        let count = source.shape().elements();
        let arguments = [
            Argument::In(source),
            Argument::Out(target),
            Argument::Size(index * count),
            Argument::Size(count),
        ];
        let geometry = Geometry::cover(source.size_bytes(), THREADS as usize * 16);
        self.launch(&STACK_PART, &[source.dtype()], geometry, &arguments)
    }
}
