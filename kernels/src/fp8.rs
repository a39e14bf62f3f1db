//! FP8 weights with one scale per block of a matrix, as FP8 releases of large models are laid out (DeepSeek-AI 2024,
//! arXiv 2412.19437): value × scale of its block. Blocks at the right and lower edges may be cut short.

/// The code whose value is not a number; with the sign bit set it is one too.
const NOT_A_NUMBER: u32 = 0x7f;

/// The value of an e4m3 code (OCP 8-bit floating point, 2023): bias 7, no infinities, all ones is not a number.
///
/// Without branches on the code, so that loops over it become vector instructions.
#[inline(always)]
pub fn value(code: u8) -> f32 {
    let magnitude = u32::from(code) & 0x7f;
    // A normal code has the fields of an f32, narrower and with another bias; a subnormal one is a multiple of 2⁻⁹.
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    let subnormal = (magnitude as f32 * (1.0 / 512.0)).to_bits();
    let bits = if magnitude < 8 { subnormal } else { normal };
    let bits = if magnitude == NOT_A_NUMBER { 0x7fc0_0000 } else { bits };
    f32::from_bits(bits | (u32::from(code) & 0x80) << 24)
}

/// Extents of the scales of a `[rows, columns]` matrix.
pub fn scale_extents([rows, columns]: [usize; 2], block: [usize; 2]) -> [usize; 2] {
    [rows.div_ceil(block[0]), columns.div_ceil(block[1])]
}

/// Where the codes of a matrix lie in its grid of scales.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a> {
    /// Row-major scales, [`scale_extents`] of them.
    pub scales: &'a [f32],
    /// Columns of the matrix.
    pub columns: usize,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
}

impl Grid<'_> {
    /// Cuts the elements `start..start + length` (row-major) into runs that share one scale, in order: how many, and the scale.
    pub fn runs(&self, start: usize, length: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let (columns, [high, wide]) = (self.columns.max(1), self.block.map(|extent| extent.max(1)));
        let across = columns.div_ceil(wide);
        let end = start + length;
        let mut place = start;
        std::iter::from_fn(move || {
            if place >= end {
                return None;
            }
            let (row, column) = (place / columns, place % columns);
            let run = (wide - column % wide).min(columns - column).min(end - place);
            place += run;
            let scale = self.scales.get(row / high * across + column / wide);
            // A grid too small for its matrix is a value that no check lets pass, never a wrong scale.
            Some((run, scale.copied().unwrap_or(f32::NAN)))
        })
    }

    /// Values of the codes that begin at element `start` of the matrix. `out` has as many elements as `codes`.
    pub fn decode(&self, start: usize, codes: &[u8], out: &mut [f32]) {
        let mut done = 0;
        for (run, scale) in self.runs(start, codes.len().min(out.len())) {
            for (out, code) in out[done..][..run].iter_mut().zip(&codes[done..]) {
                *out = value(*code) * scale;
            }
            done += run;
        }
    }
}

/// Row-major values of a matrix with rows of `columns` codes; `scales` is row-major too, with [`scale_extents`].
pub fn dequantised(codes: &[u8], columns: usize, scales: &[f32], block: [usize; 2]) -> Vec<f32> {
    let mut values = vec![0.0; codes.len()];
    let grid = Grid { scales, columns, block };
    grid.decode(0, codes, &mut values);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the format's own definition.
    fn defined(code: u8) -> f32 {
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
            _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        }
    }

    #[test]
    fn every_code_has_the_value_that_the_format_defines() {
        for code in 0..=255u8 {
            let (ours, defined) = (value(code), defined(code));
            assert!(
                ours.to_bits() == defined.to_bits() || ours.is_nan() && defined.is_nan(),
                "{code:#x}: {ours}"
            );
        }
        for (code, expected) in [(0x01, 2f32.powi(-9)), (0x38, 1.0), (0xc0, -2.0), (0xfe, -448.0)] {
            assert_eq!(value(code), expected, "{code:#x}");
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }

    #[test]
    fn every_value_is_scaled_by_its_own_block_also_in_ragged_ones() {
        let codes = [0x38u8; 15];
        let scales = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(scale_extents([3, 5], [2, 3]), [2, 2]);
        let whole = dequantised(&codes, 5, &scales, [2, 3]);
        assert_eq!(
            whole,
            [
                1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0
            ]
        );
        let grid = Grid {
            scales: &scales,
            columns: 5,
            block: [2, 3],
        };
        for start in 0..15 {
            let mut part = vec![0.0; 15 - start];
            grid.decode(start, &codes[start..], &mut part);
            assert_eq!(part, whole[start..]);
        }
    }

    #[test]
    fn a_grid_too_small_for_its_matrix_gives_no_number() {
        assert!(dequantised(&[0x38; 4], 2, &[1.0], [1, 2])[2].is_nan());
    }
}
