//! One expert's matrix in a stack: a view that decodes rows, and putting a matrix in its place.

use half::bf16;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::super::Cpu;
use super::super::nf4;
use super::super::view::{dense_bf16, dense_f16, floats, floats_mut};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Precision;
use crate::stack::{Nf4StackScales, WeightStack};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

/// A frozen matrix `[O, I]` in its encoding.
pub(super) struct Matrix<'a> {
    elements: Elements<'a>,
    inputs: usize,
}

enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    Nf4 { codes: &'a [u8], scales: Vec<f32> },
}

impl<'a> Matrix<'a> {
    /// The matrix of one expert.
    pub(super) fn of(stack: &'a WeightStack<Cpu>, expert: usize) -> Result<Self> {
        const OP: &str = "grouped_linear";
        let (_, outputs, inputs) = stack.extents();
        let size = outputs * inputs;
        let range = expert * size..(expert + 1) * size;
        let elements = match stack {
            WeightStack::Dense(tensor) => match tensor.dtype() {
                DType::BF16 => Elements::Bf16(&dense_bf16(tensor)[range]),
                DType::F16 => Elements::F16(&dense_f16(tensor)[range]),
                _ => Elements::F32(&floats(OP, "weight", tensor)?[range]),
            },
            WeightStack::Nf4(stack) => Elements::Nf4 {
                codes: part(stack.codes.buffer().bytes(), expert, size.div_ceil(2)),
                scales: scales(&stack.scales, expert, size.div_ceil(NF4_BLOCK))?,
            },
        };
        Ok(Self { elements, inputs })
    }

    /// Rows `first..` as they enter a product, as many as fit into `out`.
    pub(super) fn decode(&self, first: usize, out: &mut [f32], precision: Precision) {
        let start = first * self.inputs;
        let range = start..start + out.len();
        match &self.elements {
            Elements::F32(values) => out.copy_from_slice(&values[range]),
            Elements::F16(values) => values[range].convert_to_f32_slice(out),
            Elements::Bf16(values) => return values[range].convert_to_f32_slice(out),
            Elements::Nf4 { codes, scales } => return decode_nf4(codes, scales, start, out),
        }
        if precision == Precision::Bf16 {
            out.iter_mut()
                .for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
    }
}

/// Elements `start..` of an NF4 matrix: bf16 values.
fn decode_nf4(codes: &[u8], scales: &[f32], start: usize, out: &mut [f32]) {
    for (i, value) in out.iter_mut().enumerate() {
        let element = start + i;
        let code = codes[element / 2] >> (4 * (1 - element % 2)) & 15;
        *value = bf16::from_f32(nf4::CODE[usize::from(code)] * scales[element / NF4_BLOCK]).to_f32();
    }
}

/// The flat scales of one expert.
fn scales(scales: &Nf4StackScales<Cpu>, expert: usize, blocks: usize) -> Result<Vec<f32>> {
    const OP: &str = "grouped_linear";
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
