//! FP8 weights with one scale per block of a matrix, as FP8 releases of large models are laid out (DeepSeek-AI 2024,
//! arXiv 2412.19437): value × scale of its block. Blocks at the right and lower edges may be cut short.

use std::sync::LazyLock;

/// Values of all e4m3 codes (OCP 8-bit floating point, 2023): bias 7, no infinities, all ones is not a number.
static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| value(code as u8)));

fn value(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// Extents of the scales of a `[rows, columns]` matrix.
pub fn scale_extents([rows, columns]: [usize; 2], block: [usize; 2]) -> [usize; 2] {
    [rows.div_ceil(block[0]), columns.div_ceil(block[1])]
}

/// Row-major values of a matrix with rows of `columns` codes; `scales` is row-major too, with [`scale_extents`].
pub fn dequantised(codes: &[u8], columns: usize, scales: &[f32], block: [usize; 2]) -> Vec<f32> {
    let blocks = columns.div_ceil(block[1]);
    let mut values = Vec::with_capacity(codes.len());
    for (row, codes) in codes.chunks_exact(columns.max(1)).enumerate() {
        let scales = scales.iter().skip(row / block[0] * blocks);
        for (codes, scale) in codes.chunks(block[1]).zip(scales) {
            values.extend(codes.iter().map(|code| VALUES[usize::from(*code)] * scale));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_the_format_says() {
        for (code, expected) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0xc0, -2.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(value(code), expected, "{code:#x}");
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }

    #[test]
    fn every_value_is_scaled_by_its_own_block_also_in_ragged_ones() {
        let codes = [0x38u8; 15];
        let scales = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(scale_extents([3, 5], [2, 3]), [2, 2]);
        assert_eq!(
            dequantised(&codes, 5, &scales, [2, 3]),
            [
                1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0
            ]
        );
    }
}
