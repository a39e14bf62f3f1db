//! Quantising to NF4 and decoding FP8, compiled for every level. All levels give the same bits: nothing is summed.

#![allow(unsafe_code)] // for what `vectorised!` expands to

use super::level::vectorised;
use crate::fp8;
use crate::weight::NF4_BLOCK;

vectorised! {
    /// f32 values of bf16 bits.
    pub(in crate::cpu) fn widen_bf16(bits: &[u16], out: &mut [f32]) {
        for (out, bits) in out.iter_mut().zip(bits) {
            *out = f32::from_bits(u32::from(*bits) << 16);
        }
    }

    /// f32 values of FP8 codes that share one scale.
    pub(in crate::cpu) fn decode_fp8(codes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = fp8::value(*code) * scale;
        }
    }

    /// Codes and scales of whole blocks; `smallest` bounds the divisor from below. A block with an element that is not finite
    /// gets the scale NaN and unspecified codes.
    pub(in crate::cpu) fn quantize_blocks(
        values: &[f32],
        boundaries: &[f32; 15],
        smallest: f32,
        scales: &mut [f32],
        packed: &mut [u8],
    ) {
        let blocks = values.as_chunks::<NF4_BLOCK>().0;
        let packed = packed.as_chunks_mut::<{ NF4_BLOCK / 2 }>().0;
        for ((values, packed), scale) in blocks.iter().zip(packed).zip(scales) {
            // Magnitudes of floats are ordered as their bits are, and whatever is not finite is above all that are.
            let mut largest = 0u32;
            for value in values {
                largest = largest.max(value.to_bits() & 0x7fff_ffff);
            }
            let absmax = f32::from_bits(largest);
            *scale = if absmax.is_finite() { absmax } else { f32::NAN };
            let reciprocal = 1.0 / absmax.max(smallest);
            let mut scaled = [0.0f32; NF4_BLOCK];
            for (scaled, value) in scaled.iter_mut().zip(values) {
                *scaled = value * reciprocal;
            }
            let mut codes = [0u32; NF4_BLOCK];
            for boundary in boundaries {
                for (code, value) in codes.iter_mut().zip(&scaled) {
                    *code += u32::from(*boundary < *value);
                }
            }
            for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = (pair[0] << 4 | pair[1]) as u8;
            }
        }
    }
}
