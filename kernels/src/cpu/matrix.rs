//! A matrix in any encoding, readable by rows in the element type of a product.

use half::f16;

use super::Cpu;
use super::simd::{self, Element, Simd};
use super::view::{dense_bf16, dense_f16, floats};
use crate::dtype::DType;
use crate::error::Result;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

/// A row-major matrix of `columns` columns.
pub(super) struct Matrix<'a> {
    pub(super) content: Content<'a>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Values are rounded to bf16 as they are read, even where they stay f32.
    pub(super) rounded: bool,
}

/// Elements in their encoding.
pub(super) enum Content<'a> {
    Single(&'a [f32]),
    /// bf16 bits.
    Brain(&'a [u16]),
    Half(&'a [f16]),
    Nf4 {
        codes: &'a [u8],
        scales: Vec<f32>,
    },
}

/// Element types a product can be made of.
pub(super) trait Factor: Element {
    /// `factor · values`, rounded to bf16 if asked.
    fn fill(simd: Simd, values: &[f32], factor: f32, rounded: bool, out: &mut [Self]);
    /// Values of bf16 bits.
    fn fill_brain(simd: Simd, bits: &[u16], out: &mut [Self]);
    /// Room for bf16 bits in the elements themselves, where that is the same.
    fn brain_room(out: &mut [Self]) -> Option<&mut [u16]>;
    /// The bits as elements, where that is the same.
    fn borrow_brain(bits: &[u16]) -> Option<&[Self]>;
    /// Replaces a row of f32 values by its elements, which begin where the row does and may take less room; in between
    /// `column`'s value becomes `value`. What follows an odd number of bf16 elements is zero.
    fn settle(simd: Simd, row: &mut [f32], factor: f32, rounded: bool, column: usize, value: f32);
}

impl Factor for f32 {
    fn fill(simd: Simd, values: &[f32], factor: f32, rounded: bool, out: &mut [Self]) {
        if rounded {
            simd::rows::round(simd, values, factor, out);
        } else {
            out.copy_from_slice(values);
            if factor != 1.0 {
                simd::rows::scale(simd, out, factor);
            }
        }
    }

    fn fill_brain(simd: Simd, bits: &[u16], out: &mut [Self]) {
        simd::rows::widen(simd, bits, out);
    }

    fn brain_room(_out: &mut [Self]) -> Option<&mut [u16]> {
        None
    }

    fn borrow_brain(_bits: &[u16]) -> Option<&[Self]> {
        None
    }

    fn settle(simd: Simd, row: &mut [f32], factor: f32, rounded: bool, column: usize, value: f32) {
        simd::rows::scale(simd, row, factor);
        row[column] = value;
        if rounded {
            simd::rows::round_in_place(simd, row);
        }
    }
}

impl Factor for u16 {
    fn fill(simd: Simd, values: &[f32], factor: f32, _rounded: bool, out: &mut [Self]) {
        simd::rows::narrow(simd, values, factor, out);
    }

    fn fill_brain(_simd: Simd, bits: &[u16], out: &mut [Self]) {
        out.copy_from_slice(bits);
    }

    fn brain_room(out: &mut [Self]) -> Option<&mut [u16]> {
        Some(out)
    }

    fn borrow_brain(bits: &[u16]) -> Option<&[Self]> {
        Some(bits)
    }

    fn settle(simd: Simd, row: &mut [f32], factor: f32, _rounded: bool, column: usize, value: f32) {
        let count = row.len();
        let row: &mut [u16] = bytemuck::cast_slice_mut(row);
        simd::rows::narrow_in_place(simd, row, factor);
        simd::rows::narrow(simd, &[value], 1.0, &mut row[column..=column]);
        if count % 2 == 1 {
            row[count] = 0;
        }
    }
}

impl<'a> Matrix<'a> {
    /// A matrix of f32 values.
    pub(super) fn of_values(values: &'a [f32], columns: usize, rounded: bool) -> Self {
        let rows = values.len() / columns.max(1);
        Self {
            content: Content::Single(values),
            rows,
            columns,
            rounded,
        }
    }

    /// A frozen weight, `[O, I]`; its shape has been checked.
    pub(super) fn of_weight(weight: &'a Weight<Cpu>, rounded: bool) -> Result<Self> {
        let (rows, columns) = weight.extents();
        let content = match weight {
            Weight::Dense(tensor) => match tensor.dtype() {
                DType::BF16 => Content::Brain(bytemuck::cast_slice(dense_bf16(tensor))),
                DType::F16 => Content::Half(dense_f16(tensor)),
                _ => Content::Single(floats("reading a weight", "weight", tensor)?),
            },
            Weight::Nf4(weight) => Content::Nf4 {
                codes: weight.codes.buffer().bytes(),
                scales: flat_scales(&weight.scales)?,
            },
        };
        Ok(Self {
            content,
            rows,
            columns,
            rounded,
        })
    }

    /// Elements `range` of a row, if they lie in memory as they are wanted.
    pub(super) fn borrow<E: Factor>(&self, row: usize, range: std::ops::Range<usize>) -> Option<&'a [E]> {
        match &self.content {
            Content::Brain(bits) => E::borrow_brain(&bits[row * self.columns..][range]),
            _ => None,
        }
    }

    /// Elements `range` of a row: where they lie, or else read into `room`.
    pub(super) fn borrow_or_read<'r, E: Factor>(
        &self,
        simd: Simd,
        row: usize,
        range: std::ops::Range<usize>,
        room: &'r mut [E],
    ) -> &'r [E]
    where
        'a: 'r,
    {
        if let Some(elements) = self.borrow(row, range.clone()) {
            return elements;
        }
        self.read(simd, row, range, room);
        room
    }

    /// Reads pairs of rows from `row` on straight into the steps of a full panel of bf16 pairs, where there is a way that is faster than
    /// reading row by row; whether there was.
    pub(super) fn read_pairs<E: Factor>(&self, simd: Simd, row: usize, column: usize, panel: &mut [E]) -> bool {
        match (&self.content, E::brain_room(panel)) {
            (Content::Nf4 { codes, scales }, Some(panel)) => {
                let matrix = simd::Nf4Rows {
                    codes,
                    scales,
                    columns: self.columns,
                };
                simd::decode_nf4_pairs(simd, &super::nf4::CODE, matrix, row, column, panel)
            }
            _ => false,
        }
    }

    /// Reads elements `range` of a row.
    pub(super) fn read<E: Factor>(&self, simd: Simd, row: usize, range: std::ops::Range<usize>, out: &mut [E]) {
        let first = row * self.columns + range.start;
        let count = range.len();
        match &self.content {
            Content::Single(values) => E::fill(simd, &values[first..][..count], 1.0, self.rounded, out),
            Content::Brain(bits) => E::fill_brain(simd, &bits[first..][..count], out),
            Content::Half(values) => {
                const PART: usize = 256;
                let mut wide = [0.0; PART];
                for (values, out) in values[first..][..count].chunks(PART).zip(out.chunks_mut(PART)) {
                    let wide = &mut wide[..values.len()];
                    half::slice::HalfFloatSliceExt::convert_to_f32_slice(values, wide);
                    E::fill(simd, wide, 1.0, self.rounded, out);
                }
            }
            Content::Nf4 { codes, scales } => {
                let out = &mut out[..count];
                if let Some(bits) = E::brain_room(out) {
                    return simd::decode_nf4(simd, &super::nf4::CODE, codes, scales, first, bits);
                }
                let mut bits = [0; 2 * NF4_BLOCK];
                for (part, out) in out.chunks_mut(bits.len()).enumerate() {
                    let bits = &mut bits[..out.len()];
                    let first = first + part * 2 * NF4_BLOCK;
                    simd::decode_nf4(simd, &super::nf4::CODE, codes, scales, first, bits);
                    E::fill_brain(simd, bits, out);
                }
            }
        }
    }
}

/// The flat scales of an NF4 weight.
fn flat_scales(scales: &Nf4Scales<Cpu>) -> Result<Vec<f32>> {
    const OP: &str = "reading a weight";
    Ok(match scales {
        Nf4Scales::Flat(absmax) => floats(OP, "absmax", absmax)?.to_vec(),
        Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offset,
        } => {
            let (absmax, map) = (
                floats(OP, "nested_absmax", nested_absmax)?,
                floats(OP, "nested_code", nested_code)?,
            );
            let codes = codes.buffer().bytes().iter().enumerate();
            codes
                .map(|(block, code)| map[usize::from(*code)] * absmax[block / NF4_NESTED_BLOCK] + offset)
                .collect()
        }
    })
}
