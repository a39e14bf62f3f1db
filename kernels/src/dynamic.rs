//! bitsandbytes' dynamic 8-bit maps (Dettmers 2015, arXiv 1511.04561): 256 values between −1 and 1, or 0 and 1, dense where
//! numbers are small. NF4's nested scales use the signed one, 8-bit optimizer states both.
//!
//! ```text
//! value(e, i) = 10^(e − 6) · mean of the i-th of n equal parts of 0.1..1        e = 0..6
//! signed:   n = 2^e, each with both signs;   unsigned: n = 2^(e + 1);           and 0 and 1
//! ```

/// The signed map, ascending.
pub fn signed() -> [f32; 256] {
    map(true)
}

/// The unsigned map, ascending.
pub fn unsigned() -> [f32; 256] {
    map(false)
}

fn map(is_signed: bool) -> [f32; 256] {
    let mut map = [0.0; 256];
    map[0] = 1.0;
    let mut filled = 2; // the second stays 0
    for exponent in 0..7 {
        let power = 10f64.powi(exponent - 6) as f32;
        let steps = if is_signed { 1usize << exponent } else { 2 << exponent };
        for i in 0..steps {
            let mean = (tenth_to_one(i, steps) + tenth_to_one(i + 1, steps)) / 2.0;
            map[filled] = power * mean;
            filled += 1;
            if is_signed {
                map[filled] = -(power * mean);
                filled += 1;
            }
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

/// The code of the value of an ascending map that is nearest to `x`; of two equally near ones the lower.
pub fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|value| *value < x);
    let below = above.saturating_sub(1);
    if above > 255 || x - map[below] <= map[above] - x {
        below as u8
    } else {
        above as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_are_ascending_and_end_where_they_should() {
        for (map, first, smallest) in [(signed(), -0.992_968_74, 5.5e-7), (unsigned(), 0.0, 3.25e-7)] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]), "256 different values");
            assert_eq!((map[0], map[255]), (first, 1.0));
            let found = map.iter().copied().find(|value| *value > 0.0).unwrap_or_default();
            assert!((found - smallest).abs() < 1e-12, "{found}");
        }
    }

    #[test]
    fn every_value_of_a_map_is_its_own_nearest_and_ties_go_down() {
        for map in [signed(), unsigned()] {
            for (code, value) in map.iter().enumerate() {
                assert_eq!(usize::from(nearest(&map, *value)), code);
            }
            assert_eq!(nearest(&map, 2.0), 255);
            assert_eq!(nearest(&map, -2.0), 0);
        }
        let mut even = [0.0; 256];
        even.iter_mut()
            .enumerate()
            .for_each(|(code, value)| *value = code as f32);
        assert_eq!([nearest(&even, 2.5), nearest(&even, 2.75)], [2, 3]);
    }
}
