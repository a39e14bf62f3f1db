//! Quantising to NF4, and decoding frozen weights.

use half::slice::HalfFloatSliceExt;

use super::matrix::Matrix;
use super::view::{dense_bf16, dense_f16, floats, floats_mut};
use super::{Cpu, nf4};
use crate::{contract, dynamic};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Device, QuantizeOps};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Nf4Weight, Weight};

impl QuantizeOps for Cpu {
    fn quantize_nf4(&self, source: &Tensor<Self>, nested: bool) -> Result<Nf4Weight<Self>> {
        const OP: &str = "quantize_nf4";
        let (outputs, inputs) = contract::quantize_nf4(source)?;
        let elements = outputs * inputs;
        let blocks = elements.div_ceil(NF4_BLOCK);
        let mut codes = self.alloc(DType::U8, [elements.div_ceil(2)])?;
        let mut absmax = self.alloc(DType::F32, [blocks])?;
        {
            let scales = floats_mut(OP, "absmax", &mut absmax)?;
            let outputs = (scales, codes.buffer_mut().bytes_mut());
            let widths = (1, NF4_BLOCK / 2);
            self.for_rows2(outputs, widths, |first, scales, codes| {
                let mut values = [0.0; NF4_BLOCK];
                for (i, (scale, codes)) in scales.iter_mut().zip(codes.chunks_mut(NF4_BLOCK / 2)).enumerate() {
                    let start = (first + i) * NF4_BLOCK;
                    let values = &mut values[..NF4_BLOCK.min(elements - start)];
                    widen(source, start, values);
                    *scale = nf4::quantize_block(values, codes);
                }
            });
        }
        let scales = floats(OP, "absmax", &absmax)?;
        if let Some(block) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(Error::Value {
                op: OP,
                argument: "source",
                problem: format!(
                    "has an element that is not finite, from element {} on",
                    block * NF4_BLOCK
                ),
            });
        }
        let scales = if nested {
            self.nested(&absmax)?
        } else {
            Nf4Scales::Flat(absmax)
        };
        Ok(Nf4Weight {
            codes,
            scales,
            outputs,
            inputs,
        })
    }

    fn dequantize(&self, weight: &Weight<Self>, out: &mut Tensor<Self>) -> Result<()> {
        let (rows, columns) = contract::dequantize(weight, out)?;
        let matrix = Matrix::of_weight(weight, false)?;
        let simd = self.inner.simd;
        if rows * columns == 0 {
            return Ok(());
        }
        match out.dtype() {
            DType::BF16 => {
                let out: &mut [u16] = bytemuck::cast_slice_mut(out.buffer_mut().bytes_mut());
                self.for_rows(out, columns, |first, out| {
                    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                        matrix.read(simd, first + row, 0..columns, out);
                    }
                });
            }
            _ => self.for_rows(floats_mut("dequantize", "out", out)?, columns, |first, out| {
                for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                    matrix.read(simd, first + row, 0..columns, out);
                }
            }),
        }
        Ok(())
    }
}

impl Cpu {
    /// Quantises the scales themselves.
    fn nested(&self, absmax: &Tensor<Self>) -> Result<Nf4Scales<Self>> {
        let absmax = floats("quantize_nf4", "absmax", absmax)?;
        let offset = nf4::mean(absmax);
        let map = dynamic::signed();
        let lookup = nf4::nested_lookup(&map);
        let mut codes = self.alloc(DType::U8, [absmax.len()])?;
        let mut nested_absmax = Vec::new();
        let mut shifted = [0.0; NF4_NESTED_BLOCK];
        let groups = codes.buffer_mut().bytes_mut().chunks_mut(NF4_NESTED_BLOCK);
        for (values, codes) in absmax.chunks(NF4_NESTED_BLOCK).zip(groups) {
            let shifted = &mut shifted[..values.len()];
            for (shifted, value) in shifted.iter_mut().zip(values) {
                *shifted = value - offset;
            }
            nested_absmax.push(nf4::quantize_nested_block(shifted, &lookup, codes));
        }
        Ok(Nf4Scales::Nested {
            codes,
            nested_absmax: self.upload_f32([nested_absmax.len()], &nested_absmax)?,
            nested_code: self.upload_f32([256], &map)?,
            offset,
        })
    }
}

/// Elements `start..` of a dense tensor as f32.
fn widen(tensor: &Tensor<Cpu>, start: usize, out: &mut [f32]) {
    let range = start..start + out.len();
    match tensor.dtype() {
        DType::BF16 => dense_bf16(tensor)[range].convert_to_f32_slice(out),
        DType::F16 => dense_f16(tensor)[range].convert_to_f32_slice(out),
        _ => out.copy_from_slice(&bytemuck::cast_slice(tensor.buffer().bytes())[range]),
    }
}
