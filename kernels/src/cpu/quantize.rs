//! Quantising to NF4, and decoding frozen weights.

use half::slice::HalfFloatSliceExt;

use super::matrix::Matrix;
use super::simd::{self, Simd};
use super::view::{dense_bf16, dense_f16, floats, floats_mut, widened};
use super::{Cpu, nf4};
use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fp8;
use crate::ops::{Device, QuantizeOps};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Nf4Weight, Weight};

/// Blocks that are widened and quantised together: their values stay in the first-level cache.
const BLOCKS_AT_ONCE: usize = 32;

impl QuantizeOps for Cpu {
    fn quantize_nf4(&self, source: &Tensor<Self>, nested: bool) -> Result<Nf4Weight<Self>> {
        let extents = contract::quantize_nf4(source)?;
        self.quantized("quantize_nf4", extents, nested, |start, values| {
            widen(self.inner.simd, source, start, values);
        })
    }

    fn quantize_nf4_fp8(
        &self,
        codes: &Tensor<Self>,
        scales: &Tensor<Self>,
        block: [usize; 2],
        nested: bool,
    ) -> Result<Nf4Weight<Self>> {
        const OP: &str = "quantize_nf4_fp8";
        let extents = contract::quantize_nf4_fp8(codes, scales, block)?;
        let scales = widened(OP, "scales", scales)?;
        let grid = fp8::Grid {
            scales: &scales,
            columns: extents.1,
            block,
        };
        let codes = codes.buffer().bytes();
        self.quantized(OP, extents, nested, |start, values| {
            let mut done = 0;
            for (run, scale) in grid.runs(start, values.len()) {
                let codes = &codes[start + done..][..run];
                simd::quantize::decode_fp8(self.inner.simd, codes, scale, &mut values[done..][..run]);
                done += run;
            }
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
    /// Quantises the `[outputs, inputs]` values that `fill(first, values)` gives, any stretch of them at a time.
    fn quantized(
        &self,
        op: &'static str,
        (outputs, inputs): (usize, usize),
        nested: bool,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Nf4Weight<Self>> {
        let elements = outputs * inputs;
        let mut codes = self.alloc(DType::U8, [elements.div_ceil(2)])?;
        let mut absmax = self.alloc(DType::F32, [elements.div_ceil(NF4_BLOCK)])?;
        let boundaries = nf4::boundaries();
        let outputs_of_blocks = (floats_mut(op, "absmax", &mut absmax)?, codes.buffer_mut().bytes_mut());
        self.for_rows2(outputs_of_blocks, (1, NF4_BLOCK / 2), |first, scales, codes| {
            let mut values = [0.0; NF4_BLOCK * BLOCKS_AT_ONCE];
            let parts = scales.chunks_mut(BLOCKS_AT_ONCE);
            for (i, (scales, codes)) in parts.zip(codes.chunks_mut(BLOCKS_AT_ONCE * NF4_BLOCK / 2)).enumerate() {
                let start = (first + i * BLOCKS_AT_ONCE) * NF4_BLOCK;
                let values = &mut values[..(scales.len() * NF4_BLOCK).min(elements - start)];
                fill(start, values);
                let (whole, rest) = values.as_chunks::<NF4_BLOCK>();
                simd::quantize::quantize_blocks(
                    self.inner.simd,
                    whole.as_flattened(),
                    &boundaries,
                    nf4::SMALLEST_SCALE,
                    scales,
                    codes,
                );
                if let (false, Some(scale)) = (rest.is_empty(), scales.get_mut(whole.len())) {
                    *scale = nf4::quantize_short_block(rest, &mut codes[whole.len() * NF4_BLOCK / 2..]);
                }
            }
        });
        let scales = floats(op, "absmax", &absmax)?;
        if let Some(block) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(Error::Value {
                op,
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

    /// Quantises the scales themselves.
    fn nested(&self, absmax: &Tensor<Self>) -> Result<Nf4Scales<Self>> {
        let absmax = floats("quantize_nf4", "absmax", absmax)?;
        let offset = nf4::mean(absmax);
        let nf4::NestedTables { map, lookup } = &*nf4::NESTED;
        let mut codes = self.alloc(DType::U8, [absmax.len()])?;
        let mut nested_absmax = Vec::new();
        let mut shifted = [0.0; NF4_NESTED_BLOCK];
        let groups = codes.buffer_mut().bytes_mut().chunks_mut(NF4_NESTED_BLOCK);
        for (values, codes) in absmax.chunks(NF4_NESTED_BLOCK).zip(groups) {
            let shifted = &mut shifted[..values.len()];
            for (shifted, value) in shifted.iter_mut().zip(values) {
                *shifted = value - offset;
            }
            nested_absmax.push(nf4::quantize_nested_block(shifted, lookup, codes));
        }
        Ok(Nf4Scales::Nested {
            codes,
            nested_absmax: self.upload_f32([nested_absmax.len()], &nested_absmax)?,
            nested_code: self.upload_f32([256], map)?,
            offset,
        })
    }
}

/// Elements `start..` of a dense tensor as f32.
fn widen(simd: Simd, tensor: &Tensor<Cpu>, start: usize, out: &mut [f32]) {
    let range = start..start + out.len();
    match tensor.dtype() {
        DType::BF16 => simd::quantize::widen_bf16(simd, bytemuck::cast_slice(&dense_bf16(tensor)[range]), out),
        DType::F16 => dense_f16(tensor)[range].convert_to_f32_slice(out),
        _ => out.copy_from_slice(&bytemuck::cast_slice(tensor.buffer().bytes())[range]),
    }
}
