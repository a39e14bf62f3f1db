//! How much of a multiprocessor an entry can fill.

use crate::resources::{RESERVED_SHARED_BYTES, Resources};

/// What a multiprocessor has, by the tables of the CUDA programming guide ("Technical Specifications per Compute Capability").
struct Multiprocessor {
    warps: usize,
    blocks: usize,
    shared_bytes: usize,
}

const REGISTERS: usize = 65_536;
/// A warp's registers are handed out in units of this many, a thread's in units of 8.
const WARP_REGISTER_UNIT: usize = 256;
const SHARED_UNIT: usize = 128;

fn multiprocessor(target: &str) -> Multiprocessor {
    let (warps, blocks, kib) = match target {
        "sm_80" => (64, 32, 164),
        "sm_86" => (48, 16, 100),
        "sm_89" => (48, 24, 100),
        "sm_90a" => (64, 32, 228),
        other => panic!("no figures of {other}"),
    };
    Multiprocessor {
        warps,
        blocks,
        shared_bytes: kib * 1024,
    }
}

/// Blocks that fit on one multiprocessor, and the share of its warps they are. `dynamic_bytes` is what launches add.
pub fn occupancy(target: &str, resources: &Resources, threads: usize, dynamic_bytes: usize) -> (usize, f64) {
    let has = multiprocessor(target);
    let warps = threads.div_ceil(32);
    let registers = (resources.registers.next_multiple_of(8) * 32).next_multiple_of(WARP_REGISTER_UNIT) * warps;
    let shared = (resources.shared_bytes + dynamic_bytes).next_multiple_of(SHARED_UNIT) + RESERVED_SHARED_BYTES;
    let by_each = [
        has.blocks,
        has.warps / warps,
        REGISTERS / registers.max(1),
        has.shared_bytes / shared,
    ];
    let blocks = by_each.into_iter().min().unwrap_or(0);
    (blocks, (blocks * warps) as f64 / has.warps as f64)
}

#[test]
fn the_scarcest_resource_decides() {
    let entry = |registers, shared_bytes| Resources {
        registers,
        stack_bytes: 0,
        shared_bytes,
        local_bytes: 0,
    };
    // Warps: 64 / 8. Registers: 65,536 / (128 × 256). Shared memory: 164 KiB / (48 + 1). The figures of NVIDIA's calculator.
    assert_eq!(occupancy("sm_80", &entry(32, 0), 256, 0), (8, 1.0));
    assert_eq!(occupancy("sm_80", &entry(128, 0), 256, 0), (2, 0.25));
    assert_eq!(occupancy("sm_80", &entry(32, 0), 256, 48 << 10), (3, 0.375));
    assert_eq!(occupancy("sm_89", &entry(32, 0), 256, 0), (6, 1.0));
    assert_eq!(occupancy("sm_90a", &entry(16, 0), 32, 0), (32, 0.5));
}
