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

/// What divides the codes of an ascending map, as a search tree: going from node 1, with `x`, to node `2 n + 1` where
/// `x > tree[n]` and to `2 n` elsewhere leads in eight steps to node `256 + nearest(map, x)`. `tree[0]` is nobody's.
pub fn tree(map: &[f32; 256]) -> [f32; 256] {
    let mut tree = [0.0; 256];
    for (node, divides) in tree.iter_mut().enumerate().skip(1) {
        let level = node.ilog2();
        let in_level = node - (1 << level);
        *divides = last_of(map, ((2 * in_level + 1) << (7 - level)) - 1);
    }
    tree
}

/// The largest number whose nearest code is `code`, which is not the last.
fn last_of(map: &[f32; 256], code: usize) -> f32 {
    let (mut known, mut beyond) = (rank(map[code]), rank(map[code + 1]));
    while known + 1 < beyond {
        let middle = known + (beyond - known) / 2;
        if usize::from(nearest(map, unranked(middle))) <= code {
            known = middle;
        } else {
            beyond = middle;
        }
    }
    unranked(known)
}

/// The place of a number among all of its type, in their order.
fn rank(x: f32) -> i64 {
    let bits = i64::from(x.to_bits());
    if x.is_sign_negative() {
        (1 << 31) - 1 - bits
    } else {
        bits
    }
}

fn unranked(rank: i64) -> f32 {
    let bits = if rank < 0 { (1 << 31) - 1 - rank } else { rank };
    f32::from_bits(bits as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn found_in(tree: &[f32; 256], x: f32) -> usize {
        (0..8).fold(1, |node, _| 2 * node + usize::from(x > tree[node])) - 256
    }

    #[test]
    fn the_tree_finds_the_nearest_code_of_any_number() {
        for map in [signed(), unsigned()] {
            let tree = tree(&map);
            let at_the_borders = tree
                .iter()
                .flat_map(|border| [-1, 0, 1].map(|by| unranked(rank(*border) + by)));
            let anywhere = Random::new(3)
                .normal(50_000)
                .into_iter()
                .flat_map(|x| [x, x * 1e-3, x * 1e-6]);
            let ends = [
                0.0,
                -0.0,
                1.0,
                -1.0,
                2.0,
                -2.0,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                1e-40,
            ];
            for x in at_the_borders.chain(anywhere).chain(ends).chain(map) {
                assert_eq!(found_in(&tree, x), usize::from(nearest(&map, x)), "{x:e}");
            }
        }
    }

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
