//! Bringing matrices into panel layout (see [`tile`](super::tile)).

#![allow(unsafe_code)]

use super::level::{Simd, SimdLevel};
use super::math::bf16_bits;
use super::tile::{Element, LANES, PANEL};
use crate::weight::NF4_BLOCK;

/// Packs up to 16 matrix rows as columns `at..at + 16` of a panel of `width` columns: `panel[k, at + r] = rows[r][k]`. Missing
/// rows are zero. Every row has `steps · E::DEPTH` elements.
pub(in crate::cpu) fn transpose_rows<E: Element>(
    simd: Simd,
    rows: &[&[E]],
    steps: usize,
    panel: &mut [E],
    width: usize,
    at: usize,
) {
    let depth = steps * E::DEPTH;
    assert!(rows.len() <= LANES && rows.iter().all(|row| row.len() >= depth));
    assert!(at + LANES <= width && panel.len() >= depth * width);
    // A step of either type is four bytes, so both are transposed as words.
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if matches!(simd.level(), SimdLevel::Avx512 | SimdLevel::Avx512Bf16) && rows.len() == LANES {
        let pointers: [*const u32; LANES] = std::array::from_fn(|row| rows[row].as_ptr().cast());
        while done + LANES <= steps {
            // SAFETY: the level is proven; each row has `steps` words, and the panel `steps · width`, by the assertions.
            unsafe {
                let sources = pointers.map(|row| row.add(done));
                avx512::transpose(&sources, panel.as_mut_ptr().cast::<u32>().add(done * width + at), width);
            }
            done += LANES;
        }
    }
    for step in done..steps {
        let target = &mut panel[(step * width + at) * E::DEPTH..][..LANES * E::DEPTH];
        target.fill(E::zeroed());
        for (row, target) in rows.iter().zip(target.chunks_exact_mut(E::DEPTH)) {
            target.copy_from_slice(&row[step * E::DEPTH..][..E::DEPTH]);
        }
    }
}

/// Packs a step of a panel from matrix rows: `panel[k, c] = rows[k][c]` with `E::DEPTH` rows of `width` elements each.
pub(in crate::cpu) fn interleave_rows<E: Element>(simd: Simd, rows: &[E], width: usize, step: &mut [E]) {
    assert!(rows.len() == width * E::DEPTH && step.len() == rows.len());
    if E::DEPTH == 1 {
        step.copy_from_slice(rows);
        return;
    }
    let (first, second) = rows.split_at(width);
    interleave_pair(simd, first, second, step);
}

/// Packs a step of a bf16 panel from two matrix rows: `panel[k, c] = first[c]`, `panel[k + 1, c] = second[c]`. Columns beyond
/// the rows are zero.
pub(in crate::cpu) fn interleave_pair<E: Element>(simd: Simd, first: &[E], second: &[E], step: &mut [E]) {
    assert!(E::DEPTH == 2 && first.len() == second.len() && step.len() >= 2 * first.len());
    let (filled, padding) = step.split_at_mut(2 * first.len());
    let filled: &mut [[u16; 2]] = bytemuck::cast_slice_mut(filled);
    pairs(simd, bytemuck::cast_slice(first), bytemuck::cast_slice(second), filled);
    padding.fill(E::zeroed());
}

super::level::vectorised! {
    /// bf16 bits of `scale · table`, subnormal products taken as zero.
    fn nf4_values(table: &[f32; 16], scale: f32, values: &mut [u16; 16]) {
        for (value, entry) in values.iter_mut().zip(table) {
            let product = entry * scale;
            let kept = if product.abs() < f32::MIN_POSITIVE { 0.0 } else { product.abs() };
            *value = bf16_bits(kept.copysign(product));
        }
    }

    fn pairs(first: &[u16], second: &[u16], step: &mut [[u16; 2]]) {
        for ((step, first), second) in step.iter_mut().zip(first).zip(second) {
            *step = [*first, *second];
        }
    }
}

/// Decodes elements `first..first + out.len()` of a flattened NF4 matrix to bf16 bits. `table` has the sixteen values of
/// NF4, `scales` one scale a block; a value is the product of the two, rounded, subnormal products taken as zero.
pub(in crate::cpu) fn decode_nf4(
    simd: Simd,
    table: &[f32; 16],
    codes: &[u8],
    scales: &[f32],
    first: usize,
    out: &mut [u16],
) {
    let (mut first, mut out) = (first, out);
    while !out.is_empty() {
        let (block, within) = (first / NF4_BLOCK, first % NF4_BLOCK);
        let whole = if within == 0 { out.len() / NF4_BLOCK } else { 0 };
        let count = match whole {
            0 => (NF4_BLOCK - within).min(out.len()),
            whole => whole * NF4_BLOCK,
        };
        let (part, rest) = out.split_at_mut(count);
        if whole == 0 || !decode_blocks(simd, table, &codes[first / 2..], &scales[block..block + whole], part) {
            for (i, part) in part.chunks_mut(NF4_BLOCK).enumerate() {
                let mut values = [0; 16];
                nf4_values(simd, table, scales[block + i], &mut values);
                look_up_nf4(codes, first + i * NF4_BLOCK, &values, part);
            }
        }
        (first, out) = (first + count, rest);
    }
}

/// Decodes whole blocks, if there are instructions that do it at once.
fn decode_blocks(simd: Simd, table: &[f32; 16], codes: &[u8], scales: &[f32], out: &mut [u16]) -> bool {
    assert!(out.len() == scales.len() * NF4_BLOCK && codes.len() >= out.len() / 2);
    #[cfg(target_arch = "x86_64")]
    {
        let decode = match simd.level() {
            SimdLevel::Avx512Bf16 => avx512::native::decode_blocks,
            SimdLevel::Avx512 => avx512::plain::decode_blocks,
            _ => return false,
        };
        // SAFETY: the level is proven; by the assertion there are half a byte of codes and one output for every element.
        unsafe { decode(table, codes.as_ptr(), scales, out.as_mut_ptr()) };
        return true;
    }
    #[allow(unreachable_code)]
    {
        let _ = (simd, table);
        false
    }
}

/// An NF4 matrix whose rows are whole blocks.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Nf4Rows<'a> {
    /// Two codes a byte, the high nibble first.
    pub(in crate::cpu) codes: &'a [u8],
    /// One scale a block.
    pub(in crate::cpu) scales: &'a [f32],
    /// Elements of a row.
    pub(in crate::cpu) columns: usize,
}

/// Decodes pairs of rows, from `row` on, to whole steps of a full bf16 panel: `panel[k, c] = matrix[row + k, column + c]` for
/// [`PANEL`] columns, which are one block; the same values as [`decode_nf4`] and [`interleave_pair`] make of them. `false`, with nothing
/// done, where there are no instructions for it or the panel's columns are not a block.
pub(in crate::cpu) fn decode_nf4_pairs(
    simd: Simd,
    table: &[f32; 16],
    matrix: Nf4Rows<'_>,
    row: usize,
    column: usize,
    panel: &mut [u16],
) -> bool {
    const { assert!(PANEL == NF4_BLOCK) };
    let Nf4Rows { codes, scales, columns } = matrix;
    let rows = row + panel.len() / PANEL;
    if !column.is_multiple_of(PANEL) || !columns.is_multiple_of(PANEL) {
        return false;
    }
    assert!(panel.len().is_multiple_of(2 * PANEL) && column + PANEL <= columns);
    assert!(codes.len() >= rows * columns / 2 && scales.len() >= rows * columns / NF4_BLOCK);
    #[cfg(target_arch = "x86_64")]
    {
        let decode = match simd.level() {
            SimdLevel::Avx512Bf16 => avx512::native::decode_pairs,
            SimdLevel::Avx512 => avx512::plain::decode_pairs,
            _ => return false,
        };
        for (pair, step) in panel.chunks_exact_mut(2 * PANEL).enumerate() {
            let first = (row + 2 * pair) * columns + column;
            let second = first + columns;
            // SAFETY: the level is proven; both blocks lie inside codes and scales, and the step has room for two, by the assertions.
            unsafe {
                decode(
                    table,
                    [codes.as_ptr().add(first / 2), codes.as_ptr().add(second / 2)],
                    [scales[first / NF4_BLOCK], scales[second / NF4_BLOCK]],
                    step.as_mut_ptr(),
                );
            }
        }
        return true;
    }
    #[allow(unreachable_code)]
    {
        let _ = (simd, table);
        false
    }
}

/// Looks up NF4 codes `first..first + out.len()` of a flattened matrix, all of one block, in the block's table.
fn look_up_nf4(codes: &[u8], first: usize, values: &[u16; 16], out: &mut [u16]) {
    for (i, out) in out.iter_mut().enumerate() {
        let element = first + i;
        let code = codes[element / 2] >> (4 * (1 - element % 2)) & 15;
        *out = values[usize::from(code)];
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m256bh, __m256i, __m512, __m512i, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_HINT_T0, _mm_loadl_epi64, _mm_loadu_si128,
        _mm_prefetch, _mm512_abs_ps, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi256_si512,
        _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu8_epi32, _mm512_cvtepu8_epi64, _mm512_cvtneps_pbh,
        _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_and_epi32, _mm512_mask_or_epi32,
        _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_slli_epi64, _mm512_srli_epi32,
        _mm512_srli_epi64, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    use super::LANES;

    /// Transposes 16 rows of 16 words; column `k` goes to `target + k · stride`.
    ///
    /// # Safety
    /// The processor has AVX-512 F; every source can be read for 16 words; target can be written for 16 words at each of 16
    /// strides.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(sources: &[*const u32; LANES], target: *mut u32, stride: usize) {
        // Loops over indices and not `map`: a closure would be compiled without the instructions and called for every vector.
        let mut rows = [_mm512_setzero_si512(); LANES];
        for i in 0..LANES {
            // SAFETY: the caller vouches for the sources.
            rows[i] = unsafe { _mm512_loadu_si512(sources[i].cast()) };
        }
        // Words of neighbouring rows, then pairs of words, side by side in every 128-bit lane.
        let mut quads = rows;
        for group in 0..4 {
            let [a, b, c, d] = [
                rows[group * 4],
                rows[group * 4 + 1],
                rows[group * 4 + 2],
                rows[group * 4 + 3],
            ];
            let (low1, low2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (high1, high2) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            quads[group * 4] = _mm512_unpacklo_epi64(low1, low2);
            quads[group * 4 + 1] = _mm512_unpackhi_epi64(low1, low2);
            quads[group * 4 + 2] = _mm512_unpacklo_epi64(high1, high2);
            quads[group * 4 + 3] = _mm512_unpackhi_epi64(high1, high2);
        }
        // Lane `l` of `quads[4g + c]` holds column `4l + c` of rows `4g..4g + 4`; gather the lanes of the four groups.
        for column in 0..4 {
            let [a, b, c, d] = [quads[column], quads[4 + column], quads[8 + column], quads[12 + column]];
            let (even1, even2) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
            let (odd1, odd2) = (_mm512_shuffle_i32x4::<0xDD>(a, b), _mm512_shuffle_i32x4::<0xDD>(c, d));
            let lanes = [
                _mm512_shuffle_i32x4::<0x88>(even1, even2),
                _mm512_shuffle_i32x4::<0x88>(odd1, odd2),
                _mm512_shuffle_i32x4::<0xDD>(even1, even2),
                _mm512_shuffle_i32x4::<0xDD>(odd1, odd2),
            ];
            for (lane, values) in lanes.into_iter().enumerate() {
                // SAFETY: the caller vouches for the target.
                unsafe { _mm512_storeu_si512(target.add((lane * 4 + column) * stride).cast(), values) };
            }
        }
    }

    /// The decoders, for processors with and without an instruction that rounds to bf16.
    macro_rules! decoders {
        ($name:ident, $features:literal, $rounded:path) => {
            pub(super) mod $name {
                use super::*;

                /// Decodes blocks of 64 elements, each with its scale.
                ///
                /// # Safety
                /// The processor has these instructions; 32 bytes of codes can be read and 64 values written for each scale.
                #[target_feature(enable = $features)]
                pub(in super::super) unsafe fn decode_blocks(
                    table: &[f32; 16],
                    codes: *const u8,
                    scales: &[f32],
                    out: *mut u16,
                ) {
                    // SAFETY: `table` has sixteen values.
                    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
                    for (block, scale) in scales.iter().enumerate() {
                        let values = $rounded(_mm512_mul_ps(table, _mm512_set1_ps(*scale)));
                        let values = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(values), values);
                        // A panel takes 512 elements of a row and the next one goes on there: too short for the processor to see.
                        if block % 2 == 0 {
                            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(32 * block + 256).cast());
                        }
                        for half in [2 * block, 2 * block + 1] {
                            // SAFETY: half a block is 16 bytes of codes and 32 values; the caller vouches for both.
                            unsafe { look_up(codes.add(16 * half), values, out.add(32 * half)) };
                        }
                    }
                }

                /// Decodes one block of each of two rows, element beside element.
                ///
                /// # Safety
                /// The processor has these instructions; 32 bytes of each row's codes can be read and 128 values written.
                #[target_feature(enable = $features)]
                pub(in super::super) unsafe fn decode_pairs(
                    table: &[f32; 16],
                    codes: [*const u8; 2],
                    scales: [f32; 2],
                    out: *mut u16,
                ) {
                    // SAFETY: `table` has sixteen values.
                    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
                    let first = $rounded(_mm512_mul_ps(table, _mm512_set1_ps(scales[0])));
                    let second = $rounded(_mm512_mul_ps(table, _mm512_set1_ps(scales[1])));
                    let values = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
                    // A cache line has the codes of this panel and the next; the line after it is wanted soon.
                    _mm_prefetch::<_MM_HINT_T0>(codes[0].wrapping_add(64).cast());
                    _mm_prefetch::<_MM_HINT_T0>(codes[1].wrapping_add(64).cast());
                    for quarter in 0..4 {
                        // SAFETY: a fourth of a block is 8 bytes of codes in each row, and 32 values of both; the caller vouches for them.
                        unsafe {
                            let [first, second] = [codes[0].add(8 * quarter), codes[1].add(8 * quarter)];
                            look_up_pairs(first, second, values, out.add(32 * quarter));
                        }
                    }
                }
            }
        };
    }
    decoders!(plain, "avx512f,avx512bw,avx2", rounded);
    decoders!(native, "avx512f,avx512bw,avx2,avx512bf16", rounded_natively);

    /// As [`rounded`], by the instruction, which takes subnormal values as zero.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn rounded_natively(values: __m512) -> __m256i {
        // SAFETY: both types are 256 bits without invalid values.
        unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values)) }
    }

    /// bf16 bits as [`bf16_bits`](super::bf16_bits) makes them, subnormal values taken as zero.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    #[inline]
    fn rounded(values: __m512) -> __m256i {
        let bits = _mm512_castps_si512(values);
        let tiny = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(values), _mm512_set1_ps(f32::MIN_POSITIVE));
        let bits = _mm512_mask_and_epi32(bits, tiny, bits, _mm512_set1_epi32(i32::MIN));
        let upper = _mm512_srli_epi32::<16>(bits);
        let even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF));
        let nearest = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        let result = _mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40));
        _mm512_cvtepi32_epi16(result)
    }

    /// Looks up 32 codes, the high nibble of each byte first. The sixteen values are there twice: the instruction looks at five
    /// bits of an index, and the fifth may be anything.
    ///
    /// # Safety
    /// The processor has AVX-512 BW; 16 bytes can be read and 32 values written.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    #[inline]
    unsafe fn look_up(codes: *const u8, values: __m512i, out: *mut u16) {
        // SAFETY: the caller vouches for both pointers.
        unsafe {
            // In each 32-bit lane, a byte: its high nibble goes to the lower index, the byte itself to the upper one.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
            let indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
            _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(indices, values));
        }
    }

    /// Looks up 16 codes of each of two rows, the first row's in the lower half of `values` and the second's in the upper, and
    /// stores them as pairs.
    ///
    /// # Safety
    /// The processor has AVX-512 BW; 8 bytes can be read at each of `first` and `second`, and 32 values written.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    #[inline]
    unsafe fn look_up_pairs(first: *const u8, second: *const u8, values: __m512i, out: *mut u16) {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            // In each 64-bit lane, a byte of either row: bits 0–7 and 16–23. Shifted right by 4 they are the indices of both high
            // nibbles, in the lane's upper half those of both low ones; the fifth bit names the row.
            let [first, second] = [first, second].map(|row| _mm512_cvtepu8_epi64(_mm_loadl_epi64(row.cast())));
            let both = _mm512_or_si512(first, _mm512_slli_epi64::<16>(second));
            let nibbles = _mm512_or_si512(_mm512_srli_epi64::<4>(both), _mm512_slli_epi64::<32>(both));
            let indices = _mm512_or_si512(
                _mm512_and_si512(nibbles, _mm512_set1_epi32(0x000F_000F)),
                _mm512_set1_epi32(0x0010_0000),
            );
            _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(indices, values));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// A table like NF4's, and scales among which are a tiny one, zero, infinity and NaN.
    fn inputs() -> ([f32; 16], Vec<u8>, Vec<f32>) {
        let mut random = Random::new(5);
        let codes = (0..32 * 8).map(|_| random.bits() as u8).collect();
        let table = std::array::from_fn(|i| (i as f32 - 7.0) / 8.3);
        let scales = vec![1.0, 0.013, 1.2e-38, 0.0, f32::INFINITY, f32::NAN, 3e38, 77.7];
        (table, codes, scales)
    }

    #[test]
    fn every_level_decodes_nf4_to_the_same_bits_from_any_element_on() {
        let (table, codes, scales) = inputs();
        let portable = Simd::new(SimdLevel::Portable).into_iter();
        for (first, count) in [(0, 512), (64, 128), (3, 500), (64, 70), (130, 1)] {
            let mut expected = vec![0; count];
            for simd in portable.clone() {
                decode_nf4(simd, &table, &codes, &scales, first, &mut expected);
            }
            for simd in SimdLevel::ALL.into_iter().filter_map(Simd::new) {
                let mut decoded = vec![0; count];
                decode_nf4(simd, &table, &codes, &scales, first, &mut decoded);
                assert_eq!(decoded, expected, "{first}, {count}, {}", simd.level());
            }
        }
    }

    #[test]
    fn pairs_of_rows_are_decoded_to_the_steps_that_two_decoded_rows_make() {
        let (table, _, scales) = inputs();
        let (rows, columns) = (9, 3 * PANEL);
        let mut random = Random::new(6);
        let codes: Vec<u8> = (0..rows * columns / 2).map(|_| random.bits() as u8).collect();
        let scales: Vec<f32> = scales.iter().cycle().take(rows * 3).copied().collect();
        let matrix = Nf4Rows {
            codes: &codes,
            scales: &scales,
            columns,
        };
        for simd in SimdLevel::ALL.into_iter().filter_map(Simd::new) {
            for (row, column, pairs) in [(0, 0, 4), (1, 64, 4), (3, 128, 1), (2, 64, 0)] {
                let mut panel = vec![0xABCD; pairs * 2 * PANEL];
                let has_instructions = matches!(simd.level(), SimdLevel::Avx512 | SimdLevel::Avx512Bf16);
                assert_eq!(
                    decode_nf4_pairs(simd, &table, matrix, row, column, &mut panel),
                    has_instructions
                );
                let mut expected = vec![0; panel.len()];
                for (pair, step) in expected.chunks_exact_mut(2 * PANEL).enumerate() {
                    let [first, second] = [0, 1].map(|i| {
                        let mut out = [0u16; PANEL];
                        let from = (row + 2 * pair + i) * columns + column;
                        decode_nf4(simd, &table, &codes, &scales, from, &mut out);
                        out
                    });
                    interleave_pair::<u16>(simd, &first, &second, step);
                }
                assert!(
                    !has_instructions || panel == expected,
                    "{row} {column} {}",
                    simd.level()
                );
            }
            let mut panel = [0; 2 * PANEL];
            assert!(
                !decode_nf4_pairs(simd, &table, matrix, 0, 32, &mut panel),
                "half of one block and half of the next"
            );
        }
    }
}
