//! How fast a card could be: each op takes the longer of its arithmetic and its traffic.
//!
//! The work of every op is what the counted model did, not a formula of its own. Two sets of shares of the data sheet's numbers
//! bound what to expect. They are experience with good and with careful kernels of others, not measurements of this program:
//!
//! | | share of TFLOP/s | share of bandwidth | 4-bit weights |
//! |---|---|---|---|
//! | low | 0.35 | 0.60 | decoded to bf16 in memory, then read again |
//! | high | 0.65 | 0.85 | decoded where they are multiplied |

use brightrun_kernels::counting::Work;

use super::gpu::Gpu;

/// What share of a card's numbers ops reach.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shares {
    compute: f64,
    bandwidth: f64,
    decodes_into_memory: bool,
    /// Seconds a kernel takes at least, launch included.
    launch_seconds: f64,
}

const LOW: Shares = Shares {
    compute: 0.35,
    bandwidth: 0.60,
    decodes_into_memory: true,
    launch_seconds: 10e-6,
};

const HIGH: Shares = Shares {
    compute: 0.65,
    bandwidth: 0.85,
    decodes_into_memory: false,
    launch_seconds: 3e-6,
};

/// Seconds of this work on a card: the slowest and the fastest to expect.
pub fn seconds(work: &[Work], gpu: &Gpu) -> (f64, f64) {
    (at(work, gpu, LOW), at(work, gpu, HIGH))
}

fn at(work: &[Work], gpu: &Gpu, shares: Shares) -> f64 {
    let flops_per_second = gpu.bf16_tflops * 1e12 * shares.compute;
    let bytes_per_second = gpu.bandwidth_gb_s * 1e9 * shares.bandwidth;
    let seconds = |work: &Work| {
        let arithmetic = work.flops as f64 / flops_per_second;
        let time = match shares.decodes_into_memory {
            // One pass writes the decoded weights, then the product reads them.
            true => {
                let decoded = work.decoded_bytes as f64;
                decoded / bytes_per_second + arithmetic.max((work.bytes as f64 + decoded) / bytes_per_second)
            }
            false => arithmetic.max(work.bytes as f64 / bytes_per_second),
        };
        match work.flops + work.bytes {
            0 => 0.0,
            _ => time.max(shares.launch_seconds),
        }
    };
    work.iter().map(seconds).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use brightrun_kernels::Op;

    use super::*;

    #[test]
    fn an_op_takes_the_longer_of_its_arithmetic_and_its_traffic() {
        let gpu = Gpu::named("H200").unwrap();
        let work = |flops, bytes, decoded_bytes| Work {
            op: Op::LinearForward,
            flops,
            bytes,
            decoded_bytes,
        };
        let (_, arithmetic) = seconds(&[work(1 << 40, 1, 0)], gpu);
        assert!((arithmetic - (1u64 << 40) as f64 / (0.65 * 989e12)).abs() < 1e-12);
        let (_, traffic) = seconds(&[work(1, 1 << 40, 0)], gpu);
        assert!((traffic - (1u64 << 40) as f64 / (0.85 * 4800e9)).abs() < 1e-9);
        let (low, high) = seconds(&[work(1, 1 << 30, 1 << 32)], gpu);
        assert!(low > 8.0 * high, "decoding into memory costs: {low} against {high}");
    }
}
