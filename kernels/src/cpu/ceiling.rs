//! What the machine can do at most, for benches to compare with.

use std::time::Instant;

use super::simd::{Left, PANEL, Start, multiply};
use super::{Cpu, Products};
use crate::ops::Precision;

/// Ceilings of a machine with all of a backend's threads.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Billions of floating-point operations a second: the product kernel on operands that stay in the first-level cache.
    pub gigaflops: f64,
    /// Billions of bytes a second: read and written by copying far more than the caches hold.
    pub gigabytes: f64,
}

/// Measures for about half a second.
pub fn ceiling(cpu: &Cpu, precision: Precision) -> Ceiling {
    let gigaflops = match cpu.products(precision) {
        Products::Single { .. } => products::<f32>(cpu),
        Products::Half => products::<u16>(cpu),
    };
    Ceiling {
        gigaflops,
        gigabytes: copies(cpu),
    }
}

/// Repeats of a measurement; the best counts, since a ceiling is what is sought.
const REPEATS: usize = 5;

fn best(amount: f64, mut work: impl FnMut()) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        work();
        amount / start.elapsed().as_secs_f64() / 1e9
    };
    (0..REPEATS).map(rate).fold(0.0, f64::max)
}

fn products<E: super::matrix::Factor>(cpu: &Cpu) -> f64 {
    const STEPS: usize = 96;
    const ROWS: usize = 24;
    const ROUNDS: usize = 4000;
    let depth = STEPS * E::DEPTH;
    let flops = 2.0 * (ROWS * depth * PANEL * ROUNDS * cpu.threads()) as f64;
    let simd = cpu.inner.simd;
    best(flops, || {
        cpu.for_each(cpu.threads(), |_| {
            let (left, panel) = (vec![E::zeroed(); ROWS * depth], vec![E::zeroed(); depth * PANEL]);
            let mut out = [0.0; ROWS * PANEL];
            let left = Left {
                values: &left,
                stride: depth,
                rows: ROWS,
            };
            for _ in 0..ROUNDS {
                multiply(
                    simd,
                    left,
                    std::hint::black_box(&panel),
                    STEPS,
                    PANEL,
                    &mut out,
                    PANEL,
                    Start::Zero,
                );
            }
            std::hint::black_box(out);
        });
    })
}

fn copies(cpu: &Cpu) -> f64 {
    const COUNT: usize = 64 << 20;
    let source = vec![1.0f32; COUNT / 4];
    let mut target = vec![0.0f32; COUNT / 4];
    best(2.0 * COUNT as f64, || {
        cpu.for_rows(&mut target, 1, |first, target| {
            target.copy_from_slice(&source[first..][..target.len()])
        });
        std::hint::black_box(&mut target);
    })
}
