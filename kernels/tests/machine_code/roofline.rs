//! The share of the roofline that each matrix kernel can reach, by count of its machine code.

use std::fmt::Write;

use brightrun_kernels::cuda::{Entry, entries};

use crate::cost::Cost;
use crate::expected::{MATRIX, Tensor, launched_bytes};
use crate::occupancy::occupancy;
use crate::shapes::{self, Shape};
use crate::{Read, Readings};

/// What a target does in a cycle, and in a second.
struct Machine {
    /// Multiply-adds of a multiprocessor in bf16, and the share of them that `mma.sync` reaches.
    tensor: f64,
    warp_share: f64,
    /// Cycles that a warp's instruction holds its scheduler's f32 units.
    float: f64,
    flops: f64,
    bytes: f64,
}

const fn machine(target: &str) -> Option<Machine> {
    match target.as_bytes() {
        b"sm_80" => Some(Machine {
            tensor: 1024.0,
            warp_share: 1.0,
            float: 2.0,
            flops: 312e12,
            bytes: 1.9e12,
        }),
        b"sm_90a" => Some(Machine {
            tensor: 2048.0,
            warp_share: 0.62,
            float: 1.0,
            flops: 790e12,
            bytes: 4.3e12,
        }),
        _ => None,
    }
}

/// Cycles of a warp's instruction on sixteen lanes, and on four.
const HALF_RATE: f64 = 2.0;
const SPECIAL: f64 = 8.0;
/// Bytes of shared memory a cycle, and schedulers of a multiprocessor.
const SHARED: f64 = 128.0;
const SCHEDULERS: f64 = 4.0;

/// Kernels whose products are loops within the loop over tiles or chunks: that one is counted, the inner ones so many times. The depth of
/// 256 is four times 64; of 128 four times 32, and of a chunk's 64 twice.
const NESTED: &[(&str, &str, f64)] = &[("attention_", "head256", 4.0), ("delta_", "", 3.0)];

/// Kernels whose left factors are queries, which stay in shared memory, and weights, which never go there.
const KEEPS_ITS_LEFT: &str = "hopper_attention_";

/// Cycles of a multiprocessor for one round of a block's loop.
struct Cycles {
    /// Of the tensor cores at their full rate.
    full: f64,
    tensor: f64,
    issue: f64,
    logic: f64,
    float: f64,
    special: f64,
    shared: f64,
}

impl Cycles {
    fn of(cost: Cost, machine: &Machine, tensor: Tensor, threads: usize) -> Self {
        let (warps, share) = match tensor {
            // One warp group of three copies.
            Tensor::Group => ((threads / 32) as f64 - 4.0, 1.0),
            Tensor::Warp => ((threads / 32) as f64, machine.warp_share),
        };
        let each = warps / SCHEDULERS;
        let full = warps * cost.tensor_flops / 2.0 / machine.tensor;
        Self {
            full,
            tensor: full / share,
            issue: each * cost.issued,
            logic: each * HALF_RATE * cost.logic,
            float: each * (machine.float * cost.float + HALF_RATE * cost.multiply),
            special: each * SPECIAL * cost.special,
            shared: warps * cost.shared_bytes / SHARED,
        }
    }

    /// What the schedulers and their arithmetic need.
    fn instructions(&self) -> f64 {
        self.issue.max(self.logic).max(self.float).max(self.special)
    }

    fn most(&self) -> f64 {
        self.tensor.max(self.instructions()).max(self.shared)
    }

    fn limit(&self) -> &'static str {
        let parts = [
            (self.tensor, "tensor"),
            (self.issue, "issue"),
            (self.logic, "logic"),
            (self.float, "float"),
            (self.special, "special"),
            (self.shared, "shared"),
        ];
        let largest = parts.into_iter().max_by(|left, right| left.0.total_cmp(&right.0));
        largest.map_or("–", |(_, name)| name)
    }

    /// Shares of the tensor cores' full rate: if all overlaps, and if nothing does.
    fn shares(&self) -> [f64; 2] {
        [self.most(), self.tensor + self.instructions() + self.shared].map(|cycles| self.full / cycles.max(1e-9))
    }
}

fn loop_cost(kernel: &str, read: &Read) -> Cost {
    let nested = NESTED
        .iter()
        .find(|(begin, part, _)| kernel.starts_with(begin) && kernel.contains(part));
    let cost = match nested {
        Some((_, _, times)) => read.code.around_cost[0] + read.code.around_cost[1] * *times,
        None => read.code.main_cost,
    };
    let kept = if kernel.starts_with(KEEPS_ITS_LEFT) {
        cost.brought_bytes
    } else {
        0.0
    };
    Cost {
        shared_bytes: cost.shared_bytes - kept,
        ..cost
    }
}

/// The section of the page: a row for each entry of a matrix kernel and target.
pub fn render(readings: &Readings) -> String {
    let mut page = HEAD.to_owned();
    for (target, read) in readings {
        let Some(machine) = machine(target) else { continue };
        let _ = write!(page, "\n{target}:\n\n{COLUMNS}");
        for entry in &entries() {
            let tensor = MATRIX
                .iter()
                .find(|matrix| matrix.kernel == entry.kernel && entry.name.ends_with(matrix.only))
                .map(|matrix| matrix.tensor);
            // Results in f32 have the loop of those in bf16.
            let twin = entry.name.strip_suffix("_f32").map(|stem| format!("{stem}_bf16"));
            let has_twin = twin.is_some_and(|twin| read.contains_key(&twin));
            if let (Some(tensor), Some(found), false) = (tensor, read.get(&entry.name), has_twin) {
                page.push_str(&row(target, &machine, entry, tensor, found));
            }
        }
    }
    page
}

fn row(target: &str, machine: &Machine, entry: &Entry, tensor: Tensor, read: &Read) -> String {
    let threads = entry.threads as usize;
    let cycles = Cycles::of(loop_cost(entry.kernel, read), machine, tensor, threads);
    let (blocks, _) = occupancy(
        target,
        &read.resources,
        threads,
        launched_bytes(&entry.name, entry.kernel),
    );
    let [most, least] = cycles.shares();
    let shape = shapes::of(entry.kernel, &entry.name);
    format!(
        "| `{}` | {} | {blocks} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {} | {most:.2}, {least:.2} | {} | not measured |\n",
        entry.name,
        shapes::tile(entry.kernel),
        cycles.tensor,
        cycles.issue,
        cycles.logic,
        cycles.float,
        cycles.shared,
        cycles.limit(),
        predicted(machine, shape, [most, least]),
    )
}

/// Shape, FLOP, bytes, and the share of the roofline with the time it means, from and to.
fn predicted(machine: &Machine, shape: Option<Shape>, shares: [f64; 2]) -> String {
    let Some(Shape { text, flops, bytes }) = shape else {
        return "– | – | – | –".to_owned();
    };
    let memory = bytes / machine.bytes;
    let roof = memory.max(flops / machine.flops);
    let [fast, slow] = shares.map(|share| memory.max(flops / machine.flops / share.max(1e-9)));
    format!(
        "{text} | {:.3} | {:.1} | {:.2} to {:.2} ({:.3} to {:.3} ms)",
        flops / 1e12,
        bytes / 1e6,
        roof / slow,
        roof / fast,
        1e3 * fast,
        1e3 * slow
    )
}

const COLUMNS: &str = "\
| entry | tile, stages | blocks | tensor | issue | logic | float | shared | limit | share | shape | TFLOP | MB | of the roofline | measured |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

const HEAD: &str = "
## Matrix kernels and the roofline

Predicted from the machine code, not measured. For one round of the loop that multiplies, the cycles that a block keeps each part of its
multiprocessor busy:

| column | what |
|---|---|
| tensor | multiply-adds over 1024 a cycle on sm_80 and 2048 on sm_90a (their data sheets' dense bf16 rates over multiprocessors and clock), where `mma.sync` reaches 62 % of that and wgmma all |
| issue | instructions of the multiplying warps of a scheduler, one a cycle |
| logic, float | integers, logic and conversions on 16 lanes, two cycles each; f32 on 16 lanes (sm_80) or 32 (sm_90a), integer products on 16: the throughputs of the CUDA programming guide |
| shared | bytes through shared memory over 128 a cycle, free of conflicts: elements, matrices, copies to it, and what wgmma reads and TMA brought for it, which in attention is not the left factor: that stays |
| limit, share | the largest of these (`special`: exponentials, on 4 lanes); the share of the tensor cores' full rate if all overlaps, and if nothing does. Several blocks on a multiprocessor come near the first, a single one is between |
| TFLOP, MB | of a launch at this shape, by formula: products done by this kernel; every operand and result once, NF4 at 4.13 bits |
| of the roofline | the time that the roofline allows (the longer of FLOP at 312 or 790 TFLOP/s and bytes at 1.9 or 4.3 TB/s: A100 by its data sheet, H200 as measured with copies and 8192³ products of others) over the predicted one, which has FLOP at that share; and the predicted time |

The loop is the innermost one with products; for attention at heads of 256 and for the delta rule it is the one around, over tiles or
chunks, with its inner products counted as often as their depth is cut. Left out are prologues and epilogues, the last wave of blocks, rows
that fill no tile, and waiting: for memory behind too few stages, and for chunks of the delta rule that follow each other.
";

#[test]
fn the_busiest_part_decides_and_nothing_overlaps_at_worst() {
    let cost = Cost {
        issued: 300.0,
        logic: 100.0,
        tensor_flops: 128.0 * 4096.0,
        shared_bytes: 128.0 * 200.0,
        ..Cost::default()
    };
    let ampere = machine("sm_80").unwrap();
    let cycles = Cycles::of(cost, &ampere, Tensor::Warp, 128);
    // 128 tensor instructions of four warps are 1 048 576 multiply-adds.
    assert_eq!(
        (cycles.tensor, cycles.issue, cycles.logic, cycles.shared),
        (1024.0, 300.0, 200.0, 800.0)
    );
    assert_eq!(cycles.limit(), "tensor");
    let [most, least] = cycles.shares();
    assert!((most - 1.0).abs() < 1e-9 && (least - 1024.0 / 2124.0).abs() < 1e-9);
    // Two of three groups multiply.
    let hopper = Cycles::of(cost, &machine("sm_90a").unwrap(), Tensor::Group, 384);
    assert_eq!((hopper.full, hopper.tensor, hopper.issue), (1024.0, 1024.0, 600.0));
}
