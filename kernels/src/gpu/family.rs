//! The op families: which source has their kernels, and which ops they carry out.

use super::kernel::Kernel;
use super::sources::Source;
use super::{
    attention_hopper, attention_hopper_backward, attention_kernels, convolution, delta, delta_inputs, elementwise,
    gate, loss_hopper, loss_kernels, matmul, moe, norm, optimizer, quantize, random, rows,
};
use crate::ops::{Op, Support};

/// The reason why an op is not supported.
pub(super) const NO_KERNEL: &str = "it has no kernel yet";

/// The kernels of one source and the ops made of them.
pub(crate) struct Family {
    pub(crate) source: &'static Source,
    pub(crate) kernels: &'static [&'static Kernel],
    pub(crate) ops: &'static [Op],
}

/// Every family with kernels. Adding one here makes its ops supported, its source compiled and its signatures checked.
pub(crate) static FAMILIES: &[&Family] = &[
    &elementwise::FAMILY,
    &norm::FAMILY,
    &rows::FAMILY,
    &optimizer::FAMILY,
    &quantize::FAMILY,
    &random::FAMILY,
    &gate::FAMILY,
    &convolution::FAMILY,
    &delta::FAMILY,
    &delta::CARRY_FAMILY,
    &delta_inputs::FAMILY,
    &moe::FAMILY,
    &moe::TENSOR_FAMILY,
    &moe::HOPPER_FAMILY,
    &moe::EXACT_FAMILY,
    &quantize::DECODE_FAMILY,
    &attention_kernels::FAMILY,
    &attention_kernels::TENSOR_FAMILY,
    &attention_hopper::FAMILY,
    &attention_hopper_backward::FAMILY,
    &matmul::TENSOR_FAMILY,
    &matmul::HOPPER_FAMILY,
    &matmul::EXACT_FAMILY,
    &loss_kernels::FAMILY,
    &loss_hopper::FAMILY,
    #[cfg(test)]
    &crate::emu::defects::FAMILY,
    #[cfg(test)]
    &crate::emu::hopper_defects::FAMILY,
];

pub(super) fn supports(op: Op) -> Support {
    if FAMILIES.iter().any(|family| family.ops.contains(&op)) {
        return Support::Full;
    }
    Support::Absent(NO_KERNEL.to_owned())
}
