//! One expert's matrix in a stack: reading it, and putting it in its place.

use half::f16;

use super::super::Cpu;
use super::super::matrix::{Content, Matrix};
use super::super::view::{dense_bf16, dense_f16, floats, floats_mut};

use crate::dtype::DType;
use crate::error::Result;
use crate::stack::{Nf4StackScales, WeightStack};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

const OP: &str = "reading an expert's weight";

/// A stack whose tensors have been looked at once: any of its experts' matrices is then a view away.
#[derive(Clone, Copy)]
pub(super) struct Experts<'a> {
    content: Stacked<'a>,
    rows: usize,
    columns: usize,
    rounded: bool,
}

/// Elements of all experts, in their encoding.
#[derive(Clone, Copy)]
enum Stacked<'a> {
    Single(&'a [f32]),
    Brain(&'a [u16]),
    Half(&'a [f16]),
    Nf4 { codes: &'a [u8], scales: Scales<'a> },
}

#[derive(Clone, Copy)]
enum Scales<'a> {
    Flat(&'a [f32]),
    Nested {
        codes: &'a [u8],
        absmax: &'a [f32],
        map: &'a [f32],
        offsets: &'a [f32],
    },
}

impl<'a> Experts<'a> {
    /// The stack's shape has been checked.
    pub(super) fn of(stack: &'a WeightStack<Cpu>, rounded: bool) -> Result<Self> {
        let (_, rows, columns) = stack.extents();
        let content = match stack {
            WeightStack::Dense(tensor) => match tensor.dtype() {
                DType::BF16 => Stacked::Brain(bytemuck::cast_slice(dense_bf16(tensor))),
                DType::F16 => Stacked::Half(dense_f16(tensor)),
                _ => Stacked::Single(floats(OP, "weight", tensor)?),
            },
            WeightStack::Nf4(stack) => Stacked::Nf4 {
                codes: stack.codes.buffer().bytes(),
                scales: match &stack.scales {
                    Nf4StackScales::Flat(absmax) => Scales::Flat(floats(OP, "absmax", absmax)?),
                    Nf4StackScales::Nested {
                        codes,
                        nested_absmax,
                        nested_code,
                        offsets,
                    } => Scales::Nested {
                        codes: codes.buffer().bytes(),
                        absmax: floats(OP, "nested_absmax", nested_absmax)?,
                        map: floats(OP, "nested_code", nested_code)?,
                        offsets: floats(OP, "offsets", offsets)?,
                    },
                },
            },
        };
        Ok(Self {
            content,
            rows,
            columns,
            rounded,
        })
    }

    /// The matrix of one expert. Its scales are worked out here, so they are in the caches of the core that is about to use them.
    pub(super) fn matrix(&self, expert: usize) -> Matrix<'a> {
        let size = self.rows * self.columns;
        let content = match self.content {
            Stacked::Single(values) => Content::Single(part(values, expert, size)),
            Stacked::Brain(bits) => Content::Brain(part(bits, expert, size)),
            Stacked::Half(values) => Content::Half(part(values, expert, size)),
            Stacked::Nf4 { codes, scales } => Content::Nf4 {
                codes: part(codes, expert, size.div_ceil(2)),
                scales: scales.flat(expert, size.div_ceil(NF4_BLOCK)),
            },
        };
        Matrix {
            content,
            rows: self.rows,
            columns: self.columns,
            rounded: self.rounded,
        }
    }
}

impl Scales<'_> {
    /// One scale for each block of an expert.
    fn flat(&self, expert: usize, blocks: usize) -> Vec<f32> {
        match self {
            Self::Flat(absmax) => part(absmax, expert, blocks).to_vec(),
            Self::Nested {
                codes,
                absmax,
                map,
                offsets,
            } => {
                let absmax = part(absmax, expert, blocks.div_ceil(NF4_NESTED_BLOCK));
                let offset = offsets[expert];
                let codes = part(codes, expert, blocks).chunks(NF4_NESTED_BLOCK).zip(absmax);
                codes
                    .flat_map(|(codes, absmax)| codes.iter().map(move |code| map[usize::from(*code)] * absmax + offset))
                    .collect()
            }
        }
    }
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
