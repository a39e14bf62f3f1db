//! One expert's matrix in a stack: reading it, and putting it in its place.

use super::super::Cpu;
use super::super::matrix::{Content, Matrix};
use super::super::view::{dense_bf16, dense_f16, floats, floats_mut};
use crate::dtype::DType;
use crate::error::Result;
use crate::stack::{Nf4StackScales, WeightStack};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

const OP: &str = "reading an expert's weight";

/// The matrix of one expert; the stack's shape has been checked.
pub(super) fn of_expert(stack: &WeightStack<Cpu>, expert: usize, rounded: bool) -> Result<Matrix<'_>> {
    let (_, rows, columns) = stack.extents();
    let size = rows * columns;
    let content = match stack {
        WeightStack::Dense(tensor) => match tensor.dtype() {
            DType::BF16 => Content::Brain(bytemuck::cast_slice(part(dense_bf16(tensor), expert, size))),
            DType::F16 => Content::Half(part(dense_f16(tensor), expert, size)),
            _ => Content::Single(part(floats(OP, "weight", tensor)?, expert, size)),
        },
        WeightStack::Nf4(stack) => Content::Nf4 {
            codes: part(stack.codes.buffer().bytes(), expert, size.div_ceil(2)),
            scales: scales(&stack.scales, expert, size.div_ceil(NF4_BLOCK))?,
        },
    };
    Ok(Matrix {
        content,
        rows,
        columns,
        rounded,
    })
}

/// The flat scales of one expert.
fn scales(scales: &Nf4StackScales<Cpu>, expert: usize, blocks: usize) -> Result<Vec<f32>> {
    Ok(match scales {
        Nf4StackScales::Flat(absmax) => part(floats(OP, "absmax", absmax)?, expert, blocks).to_vec(),
        Nf4StackScales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offsets,
        } => {
            let absmax = floats(OP, "nested_absmax", nested_absmax)?;
            let absmax = part(absmax, expert, blocks.div_ceil(NF4_NESTED_BLOCK));
            let (map, offset) = (
                floats(OP, "nested_code", nested_code)?,
                floats(OP, "offsets", offsets)?[expert],
            );
            let codes = part(codes.buffer().bytes(), expert, blocks).iter().enumerate();
            codes
                .map(|(block, code)| map[usize::from(*code)] * absmax[block / NF4_NESTED_BLOCK] + offset)
                .collect()
        }
    })
}

/// Part `index` of equal parts of `length`.
fn part<T>(values: &[T], index: usize, length: usize) -> &[T] {
    &values[index * length..][..length]
}

/// Copies a matrix to its place; shapes and encodings have been compared.
pub(super) fn place(weight: &Weight<Cpu>, expert: usize, stack: &mut WeightStack<Cpu>) -> Result<()> {
    match (weight, stack) {
        (Weight::Dense(weight), WeightStack::Dense(stack)) => place_bytes(weight, expert, stack),
        (Weight::Nf4(weight), WeightStack::Nf4(stack)) => {
            place_bytes(&weight.codes, expert, &mut stack.codes);
            match (&weight.scales, &mut stack.scales) {
                (Nf4Scales::Flat(own), Nf4StackScales::Flat(all)) => place_bytes(own, expert, all),
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
                        nested_code: all_code,
                        offsets,
                    },
                ) => {
                    place_bytes(codes, expert, all_codes);
                    place_bytes(nested_absmax, expert, all_absmax);
                    place_bytes(nested_code, 0, all_code);
                    floats_mut("stack_expert", "offsets", offsets)?[expert] = *offset;
                }
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}

fn place_bytes(own: &Tensor<Cpu>, index: usize, all: &mut Tensor<Cpu>) {
    let own = own.buffer().bytes();
    all.buffer_mut().bytes_mut()[index * own.len()..][..own.len()].copy_from_slice(own);
}
