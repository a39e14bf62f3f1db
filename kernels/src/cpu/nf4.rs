//! The arithmetic of 4-bit NormalFloat, in the very order bitsandbytes 0.50 does it on a CPU, so that codes, scales and
//! decoded values have the same bits.

use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK};

/// The sixteen values of NF4 (Dettmers et al. 2023, appendix E), ascending.
pub(super) const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Scales below this are taken as this, so that a block of zeros is not divided by zero. It is a subnormal number.
const SMALLEST_SCALE: f32 = 1e-38;

/// Boundaries between neighbouring codes: the f32 mean of the two.
fn boundaries() -> [f32; 15] {
    std::array::from_fn(|i| (CODE[i] + CODE[i + 1]) / 2.0)
}

/// The code of a value in −1..=1: how many boundaries lie below it.
fn nearest(value: f32, boundaries: &[f32; 15]) -> u8 {
    boundaries.iter().filter(|boundary| **boundary < value).count() as u8
}

/// Codes and scale of one block. A full block is multiplied by the reciprocal of its scale; a shorter last one is divided
/// by it, and its stored scale has a lower bound: so the peer does it.
pub(super) fn quantize_block(values: &[f32], packed: &mut [u8]) -> f32 {
    let boundaries = boundaries();
    let absmax = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let bounded = absmax.max(SMALLEST_SCALE);
    let full = values.len() == NF4_BLOCK;
    let reciprocal = 1.0 / bounded;
    let code = |value: f32| {
        let scaled = if full { value * reciprocal } else { value / bounded };
        nearest(scaled.clamp(-1.0, 1.0), &boundaries)
    };
    for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
        let low = pair.get(1).copied().unwrap_or(0.0);
        *byte = code(pair[0]) << 4 | code(low);
    }
    if full { absmax } else { bounded }
}

/// bitsandbytes' signed dynamic 8-bit map, ascending (Dettmers 2015, arXiv 1511.04561).
pub(super) fn dynamic_map() -> [f32; 256] {
    let mut values = Vec::with_capacity(256);
    for exponent in 0..7 {
        let items = 1usize << exponent;
        let power = 10f64.powi(exponent - 6);
        for i in 0..items {
            let mean = (linspace(i, items) + linspace(i + 1, items)) / 2.0;
            let value = power as f32 * mean;
            values.extend([value, -value]);
        }
    }
    values.extend([0.0, 1.0]);
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Point `i` of `steps` equal steps from 0.1 to 1 as torch computes it: from the nearer end.
fn linspace(i: usize, steps: usize) -> f32 {
    let step = (1.0f32 - 0.1) / steps as f32;
    if i < (steps + 1) / 2 {
        0.1 + step * i as f32
    } else {
        1.0 - step * (steps - i) as f32
    }
}

/// Codes and scale of up to [`NF4_NESTED_BLOCK`] values by the dynamic map.
pub(super) fn quantize_nested_block(values: &[f32], map: &[f32; 256], codes: &mut [u8]) -> f32 {
    debug_assert!(values.len() <= NF4_NESTED_BLOCK);
    let absmax = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    for (code, value) in codes.iter_mut().zip(values) {
        let normed = if absmax > 0.0 { value / absmax } else { 0.0 };
        let index = map.partition_point(|entry| *entry <= normed).saturating_sub(1);
        let closer = index < 255 && (normed - map[index + 1]).abs() < (normed - map[index]).abs();
        *code = (index + usize::from(closer)) as u8;
    }
    absmax
}

/// Mean of the scales.
pub(super) fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    values.iter().sum::<f32>() / values.len() as f32
}
