//! Bringing matrices into panel layout (see [`tile`](super::tile)).

#![allow(unsafe_code)]

use super::level::{Simd, SimdLevel};
use super::tile::{Element, LANES};

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
    pairs(
        simd,
        bytemuck::cast_slice(first),
        bytemuck::cast_slice(second),
        bytemuck::cast_slice_mut(step),
    );
}

super::level::vectorised! {
    fn pairs(first: &[u16], second: &[u16], step: &mut [u32]) {
        for ((step, first), second) in step.iter_mut().zip(first).zip(second) {
            *step = u32::from(*first) | u32::from(*second) << 16;
        }
    }
}

/// Looks up NF4 codes `first..first + out.len()` of a flattened matrix, all of one block, in the block's table.
pub(in crate::cpu) fn look_up_nf4(simd: Simd, codes: &[u8], first: usize, values: &[u16; 16], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if matches!(simd.level(), SimdLevel::Avx512 | SimdLevel::Avx512Bf16)
        && first.is_multiple_of(2)
        && out.len().is_multiple_of(32)
    {
        let bytes = &codes[first / 2..][..out.len() / 2];
        for (bytes, out) in bytes.chunks_exact(16).zip(out.chunks_exact_mut(32)) {
            // SAFETY: the level is proven; sixteen bytes are read and thirty-two values written.
            unsafe { avx512::look_up(bytes.as_ptr(), values, out.as_mut_ptr()) };
        }
        return;
    }
    let _ = simd;
    for (i, out) in out.iter_mut().enumerate() {
        let element = first + i;
        let code = codes[element / 2] >> (4 * (1 - element % 2)) & 15;
        *out = values[usize::from(code)];
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm256_and_si256, _mm256_cvtepu8_epi16, _mm256_loadu_si256, _mm256_or_si256,
        _mm256_set1_epi16, _mm256_slli_epi16, _mm256_srli_epi16, _mm512_castsi256_si512, _mm512_cvtepu8_epi16,
        _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use super::LANES;

    /// Transposes 16 rows of 16 words; column `k` goes to `target + k · stride`.
    ///
    /// # Safety
    /// The processor has AVX-512 F; every source can be read for 16 words; target can be written for 16 words at each of 16
    /// strides.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(sources: &[*const u32; LANES], target: *mut u32, stride: usize) {
        // SAFETY: the caller vouches for the sources.
        let rows = sources.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
        // Words of neighbouring rows, then pairs of words, side by side in every 128-bit lane.
        let mut quads = rows;
        for group in 0..4 {
            let [a, b, c, d]: [_; 4] = std::array::from_fn(|i| rows[group * 4 + i]);
            let (low1, low2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (high1, high2) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            quads[group * 4] = _mm512_unpacklo_epi64(low1, low2);
            quads[group * 4 + 1] = _mm512_unpackhi_epi64(low1, low2);
            quads[group * 4 + 2] = _mm512_unpacklo_epi64(high1, high2);
            quads[group * 4 + 3] = _mm512_unpackhi_epi64(high1, high2);
        }
        // Lane `l` of `quads[4g + c]` holds column `4l + c` of rows `4g..4g + 4`; gather the lanes of the four groups.
        for column in 0..4 {
            let [a, b, c, d]: [_; 4] = std::array::from_fn(|group| quads[group * 4 + column]);
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

    /// Looks up 32 codes, the high nibble of each byte first.
    ///
    /// # Safety
    /// The processor has AVX-512 BW; 16 bytes can be read and 32 values written.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    pub(super) unsafe fn look_up(codes: *const u8, values: &[u16; 16], out: *mut u16) {
        // SAFETY: the caller vouches for both pointers; `values` is 32 bytes.
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.cast()));
            // In each 16-bit lane: the high nibble in the low byte, the low nibble in the high byte.
            let nibbles = _mm256_or_si256(
                _mm256_srli_epi16::<4>(bytes),
                _mm256_slli_epi16::<8>(_mm256_and_si256(bytes, _mm256_set1_epi16(15))),
            );
            let indices = _mm512_cvtepu8_epi16(nibbles);
            let table = _mm512_castsi256_si512(_mm256_loadu_si256(values.as_ptr().cast()));
            _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(indices, table));
        }
    }
}
