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

/// Repeats of a measurement; the best counts, since a ceiling is what is sought and others may use the
/// machine.
const REPEATS: usize = 40;

/// Processor time of this process's threads that wait or have waited, where the system tells: what a thread that runs
/// without a pause has used shows late.
pub fn processor_seconds() -> Option<f64> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    Some(nanoseconds.sum::<f64>() / 1e9)
}

/// Seconds that `work` keeps the threads busy, each its share, and wall seconds. Where other programs use the machine too, the
/// first says what the work costs and the second how long it waited.
pub fn timed(cpu: &Cpu, work: impl FnOnce()) -> (f64, f64) {
    let (start, busy) = (Instant::now(), processor_seconds());
    work();
    let wall = start.elapsed().as_secs_f64();
    let busy = processor_seconds()
        .zip(busy)
        .map(|(end, start)| (end - start) / cpu.threads() as f64);
    // A single thread's time is not yet in the books; it does not wait for others, either.
    (busy.filter(|_| cpu.threads() > 1).unwrap_or(wall), wall)
}

fn best(cpu: &Cpu, amount: f64, mut work: impl FnMut()) -> f64 {
    let rate = |_| amount / timed(cpu, &mut work).0 / 1e9;
    (0..REPEATS)
        .map(rate)
        .filter(|rate| rate.is_finite())
        .fold(0.0, f64::max)
}

fn products<E: super::matrix::Factor>(cpu: &Cpu) -> f64 {
    const STEPS: usize = 96;
    const ROWS: usize = 24;
    const ROUNDS: usize = 500;
    let depth = STEPS * E::DEPTH;
    let flops = 2.0 * (ROWS * depth * PANEL * ROUNDS * cpu.threads()) as f64;
    let simd = cpu.inner.simd;
    best(cpu, flops, || {
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
    best(cpu, 2.0 * COUNT as f64, || {
        cpu.for_rows(&mut target, 1, |first, target| {
            target.copy_from_slice(&source[first..][..target.len()])
        });
        std::hint::black_box(&mut target);
    })
}
