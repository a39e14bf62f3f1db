//! Random contents: the same bits on every backend, and those of the formula.

use brightrun_kernels::ops::{Device, Noise, RandomOps, random_bits};
use brightrun_kernels::{DType, Error};
use half::bf16;

use crate::on_every_backend;

const KEY: u64 = 0xfedc_ba98_7654_3210;
const MEAN: f32 = -0.75;
const DEVIATION: f32 = 0.3;

/// Nothing, one element, a pack and its neighbours, a block of threads and its neighbours, several.
const COUNTS: [usize; 10] = [0, 1, 7, 8, 9, 2047, 2048, 2049, 4096, 300_001];

/// The bytes that a tensor of so many elements must have, by the formulas of the contract.
fn expected(dtype: DType, count: usize) -> Vec<u8> {
    let normal = |i: u64| {
        let bits = random_bits(KEY, i);
        let sum: u64 = [0, 16, 32, 48].iter().map(|shift| bits >> shift & 0xffff).sum();
        MEAN + Noise::step(DEVIATION) * (sum as i64 - 131_070) as f32
    };
    let counters = 0..count as u64;
    match dtype {
        DType::U8 => counters
            .map(|i| random_bits(KEY, i / 8).to_le_bytes()[i as usize % 8])
            .collect(),
        DType::BF16 => counters.flat_map(|i| bf16::from_f32(normal(i)).to_le_bytes()).collect(),
        _ => counters.flat_map(|i| normal(i).to_le_bytes()).collect(),
    }
}

fn noise(dtype: DType) -> Noise {
    match dtype {
        DType::U8 => Noise::Bytes,
        _ => Noise::Normal {
            mean: MEAN,
            deviation: DEVIATION,
        },
    }
}

#[test]
fn random_contents_have_the_bits_of_their_formula_on_every_backend() {
    on_every_backend!("fill_random", [FillRandom], |run| {
        let device = run.backend;
        for (dtype, count) in [DType::U8, DType::F32, DType::BF16]
            .into_iter()
            .flat_map(|dtype| COUNTS.map(|count| (dtype, count)))
        {
            let mut tensor = device.zeros(dtype, [count]).unwrap();
            device.fill_random(&mut tensor, KEY, noise(dtype)).unwrap();
            assert!(
                device.read(&tensor).unwrap() == expected(dtype, count),
                "{count} elements of {dtype} on {}",
                run.name
            );
            run.case("fill_random", 0);
        }
        let mut other = device.zeros(DType::U8, [64]).unwrap();
        device.fill_random(&mut other, KEY + 1, Noise::Bytes).unwrap();
        assert_ne!(device.read(&other).unwrap(), expected(DType::U8, 64));
    });
}

#[test]
fn a_dtype_that_the_numbers_are_not_for_is_refused() {
    on_every_backend!("fill_random, refused", [FillRandom], |run| {
        for (dtype, noise) in [
            (DType::U8, noise(DType::F32)),
            (DType::F32, Noise::Bytes),
            (DType::I32, Noise::Bytes),
        ] {
            let mut tensor = run.backend.zeros(dtype, [8]).unwrap();
            let refused = run.backend.fill_random(&mut tensor, KEY, noise);
            assert!(matches!(refused, Err(Error::DType { .. })), "{refused:?}");
        }
        run.case("fill_random, refused", 0);
    });
}
