//! Typed views of tensors. Asking for the wrong type is an error that names the op and the argument.

use half::{bf16, f16};

use super::Cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

impl Cpu {
    /// Converts between f32 and bf16, or copies equal dtypes.
    pub(super) fn convert(&self, source: &Tensor<Self>, target: &mut Tensor<Self>) -> Result<()> {
        match (source.dtype(), target.dtype()) {
            (from, to) if from == to => {
                target.buffer_mut().bytes_mut().copy_from_slice(source.buffer().bytes());
                Ok(())
            }
            (DType::F32, DType::BF16) => {
                let source = floats("copy", "source", source)?;
                let target: &mut [bf16] = bytemuck::cast_slice_mut(target.buffer_mut().bytes_mut());
                self.for_rows(target, 1, |first, chunk| {
                    for (out, value) in chunk.iter_mut().zip(&source[first..]) {
                        *out = bf16::from_f32(*value);
                    }
                });
                Ok(())
            }
            (DType::BF16, DType::F32) => {
                let source: &[bf16] = bytemuck::cast_slice(source.buffer().bytes());
                let target = floats_mut("copy", "target", target)?;
                self.for_rows(target, 1, |first, chunk| {
                    for (out, value) in chunk.iter_mut().zip(&source[first..]) {
                        *out = value.to_f32();
                    }
                });
                Ok(())
            }
            (got, _) => Err(Error::DType {
                op: "copy",
                argument: "source",
                expected: "the target's dtype, or a pair of f32 and bf16",
                got,
            }),
        }
    }
}

fn wrong(op: &'static str, argument: &'static str, expected: &'static str, tensor: &Tensor<Cpu>) -> Error {
    Error::DType {
        op,
        argument,
        expected,
        got: tensor.dtype(),
    }
}

/// An f32 tensor's elements.
pub(super) fn floats<'a>(op: &'static str, argument: &'static str, tensor: &'a Tensor<Cpu>) -> Result<&'a [f32]> {
    match tensor.dtype() {
        DType::F32 => Ok(bytemuck::cast_slice(tensor.buffer().bytes())),
        _ => Err(wrong(op, argument, "f32 on the cpu backend", tensor)),
    }
}

/// An f32 tensor's elements, to be written.
pub(super) fn floats_mut<'a>(
    op: &'static str,
    argument: &'static str,
    tensor: &'a mut Tensor<Cpu>,
) -> Result<&'a mut [f32]> {
    match tensor.dtype() {
        DType::F32 => Ok(bytemuck::cast_slice_mut(tensor.buffer_mut().bytes_mut())),
        _ => Err(wrong(op, argument, "f32 on the cpu backend", tensor)),
    }
}

/// An i32 tensor's elements.
pub(super) fn integers<'a>(op: &'static str, argument: &'static str, tensor: &'a Tensor<Cpu>) -> Result<&'a [i32]> {
    match tensor.dtype() {
        DType::I32 => Ok(bytemuck::cast_slice(tensor.buffer().bytes())),
        _ => Err(wrong(op, argument, "i32", tensor)),
    }
}

/// An i32 tensor's elements, to be written.
pub(super) fn integers_mut<'a>(
    op: &'static str,
    argument: &'static str,
    tensor: &'a mut Tensor<Cpu>,
) -> Result<&'a mut [i32]> {
    match tensor.dtype() {
        DType::I32 => Ok(bytemuck::cast_slice_mut(tensor.buffer_mut().bytes_mut())),
        _ => Err(wrong(op, argument, "i32", tensor)),
    }
}

/// A short vector (a norm's weight, a bias) widened to f32.
pub(super) fn widened(op: &'static str, argument: &'static str, tensor: &Tensor<Cpu>) -> Result<Vec<f32>> {
    match tensor.dtype() {
        DType::F32 => Ok(floats(op, argument, tensor)?.to_vec()),
        DType::BF16 => Ok(dense_bf16(tensor).iter().map(|value| value.to_f32()).collect()),
        _ => Err(wrong(op, argument, "f32 or bf16", tensor)),
    }
}

/// The elements of a tensor known to be bf16.
pub(super) fn dense_bf16(tensor: &Tensor<Cpu>) -> &[bf16] {
    bytemuck::cast_slice(tensor.buffer().bytes())
}

/// The elements of a tensor known to be f16.
pub(super) fn dense_f16(tensor: &Tensor<Cpu>) -> &[f16] {
    bytemuck::cast_slice(tensor.buffer().bytes())
}
