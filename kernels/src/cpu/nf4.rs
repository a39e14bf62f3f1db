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
/// by it, and its stored scale has a lower bound: so the peer does it. The scale is NaN when an element is not finite.
pub(super) fn quantize_block(values: &[f32], packed: &mut [u8]) -> f32 {
    let boundaries = boundaries();
    if values.iter().any(|value| !value.is_finite()) {
        return f32::NAN;
    }
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
pub(crate) fn dynamic_map() -> [f32; 256] {
    let mut map = [0.0; 256];
    map[0] = 1.0;
    let mut filled = 2; // the second stays 0
    for exponent in 0..7 {
        let power = 10f64.powi(exponent - 6) as f32;
        let steps = 1usize << exponent;
        for i in 0..steps {
            let mean = (tenth_to_one(i, steps) + tenth_to_one(i + 1, steps)) / 2.0;
            map[filled] = power * mean;
            map[filled + 1] = -(power * mean);
            filled += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// Point `i` of `steps` equal steps from 0.1 to 1 as torch's `linspace` computes it: from the nearer end, fused.
fn tenth_to_one(i: usize, steps: usize) -> f32 {
    let step = (1.0f32 - 0.1) / steps as f32;
    if i < steps.div_ceil(2) {
        step.mul_add(i as f32, 0.1)
    } else {
        (-step).mul_add((steps - i) as f32, 1.0)
    }
}

/// Bins of the lookup by which values in −1..=1 find their code.
const BINS: usize = 1 << 16;

/// The code of each bin: that of the map entry nearest to the bin's own value. The peer looks codes up in this table, so
/// near zero, where the map is finer than a bin, its codes are not the nearest ones.
pub(super) fn nested_lookup(map: &[f32; 256]) -> Vec<u8> {
    let mut code = 0;
    let last = (BINS - 1) as f32;
    (0..BINS)
        .map(|bin| {
            let value = -1.0 + 2.0 * bin as f32 / last;
            while code < 255 && 0.5 * (map[code] + map[code + 1]) < value {
                code += 1;
            }
            code as u8
        })
        .collect()
}

/// Codes and scale of up to [`NF4_NESTED_BLOCK`] values.
pub(super) fn quantize_nested_block(values: &[f32], lookup: &[u8], codes: &mut [u8]) -> f32 {
    debug_assert!(values.len() <= NF4_NESTED_BLOCK && lookup.len() == BINS);
    let absmax = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    if absmax == 0.0 {
        codes.fill(0);
        return absmax;
    }
    // Infinite for a subnormal scale; 0 · ∞ is NaN, which the conversion below makes bin 0, as in the peer.
    let reciprocal = 1.0 / absmax;
    for (code, value) in codes.iter_mut().zip(values) {
        let scaled = (value * reciprocal).clamp(-1.0, 1.0);
        let bin = (scaled + 1.0) * 0.5 * (BINS - 1) as f32 + 0.5;
        *code = lookup[usize::from(bin as u16)];
    }
    absmax
}

/// Mean of the scales, added in the order of torch's single-threaded f32 `mean` on x86: it decides the last bits of the
/// offset, and through it those of every nested code.
pub(super) fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    if values.is_empty() {
        return 0.0;
    }
    let sum = if values.len() < LANES {
        cascade::<1>(values)[0]
    } else {
        let (vectors, tail) = values.split_at(values.len() / LANES * LANES);
        let tail: f32 = tail.iter().fold(0.0, |sum, value| sum + value);
        cascade::<LANES>(vectors).iter().fold(tail, |sum, value| sum + value)
    };
    sum / values.len() as f32
}

/// Levels of a cascade.
const LEVELS: usize = 4;

/// Logarithm of the number of additions after which a level of a cascade of so many steps is added to the next.
pub(crate) fn cascade_power(steps: usize) -> usize {
    (ceil_log2(steps) / LEVELS).max(4)
}

/// Sum of vectors of `LANES` elements, lane by lane: four interleaved rows, each a cascade of four levels where a level is
/// added to the next after `2^power` additions.
fn cascade<const LANES: usize>(values: &[f32]) -> [f32; LANES] {
    const ROWS: usize = 4;
    let vectors: Vec<&[f32]> = values.chunks_exact(LANES).collect();
    let steps = vectors.len() / ROWS;
    let power = cascade_power(steps);
    let mut levels = [[[0.0f32; LANES]; ROWS]; LEVELS];
    for step in 0..steps {
        for (row, sum) in levels[0].iter_mut().enumerate() {
            add(sum, vectors[step * ROWS + row]);
        }
        let done = step + 1;
        let carries = if done % (1 << power) == 0 {
            (done.trailing_zeros() as usize / power).min(LEVELS - 1)
        } else {
            0
        };
        for level in 0..carries {
            let below = std::mem::replace(&mut levels[level], [[0.0; LANES]; ROWS]);
            for (sum, below) in levels[level + 1].iter_mut().zip(&below) {
                add(sum, below);
            }
        }
    }
    let [mut rows, above @ ..] = levels;
    for level in &above {
        for (sum, above) in rows.iter_mut().zip(level) {
            add(sum, above);
        }
    }
    let [mut sum, rest @ ..] = rows;
    for vector in &vectors[steps * ROWS..] {
        add(&mut sum, vector);
    }
    for row in &rest {
        add(&mut sum, row);
    }
    sum
}

fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}

fn ceil_log2(value: usize) -> usize {
    if value <= 2 {
        1
    } else {
        (usize::BITS - (value - 1).leading_zeros()) as usize
    }
}
