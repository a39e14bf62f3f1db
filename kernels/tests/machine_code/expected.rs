//! What the machine code must be like: tables to add to.

use std::collections::BTreeSet;

use crate::Read;

/// A kernel (its name without types) whose products must be done by tensor cores.
pub struct Matrix {
    pub kernel: &'static str,
    pub tensor: Tensor,
    /// How the names of those entries end that multiply so; the others add in f32.
    pub only: &'static str,
    /// What launches add to its shared memory, as the host's tile of that name has it: decides how many blocks fit.
    pub shared_bytes: usize,
}

const fn warp(kernel: &'static str, shared_bytes: usize) -> Matrix {
    Matrix {
        kernel,
        tensor: Tensor::Warp,
        only: "",
        shared_bytes,
    }
}

/// Of a kernel that does float32 exactly and bf16 on tensor cores.
const fn warp_of_bf16(kernel: &'static str, shared_bytes: usize) -> Matrix {
    Matrix {
        only: "_bf16",
        ..warp(kernel, shared_bytes)
    }
}

/// Stages × (rows + columns) × depth × 2 bytes, of the tiles in `gpu/matmul/tensor.rs`.
const LARGE: usize = 3 * (128 + 128) * 64 * 2;
const SMALL: usize = 4 * (32 + 64) * 64 * 2;
/// Of the tile for routed experts in `gpu/moe/tensor.rs`.
const WIDE: usize = 3 * (64 + 128) * 64 * 2;
/// Of the passes over a document in `gpu/delta/direct.rs`, heads of 128.
const SCAN: usize = ((64 + 32) * 33 + 5 * 64 + (128 + 64) * 33) * 4;
/// Of `gpu/delta/carried.rs`, for keys of 64 and 128.
const fn carry(keys: usize) -> usize {
    (keys + 64) * 40 * 2 + 4 * 64 * (keys + 8) * 2
}
const fn pulls(keys: usize) -> usize {
    2 * 64 * (keys + 8) * 2 + 2 * 64 * 72 * 2 + 5 * 64 * 4
}
const fn outputs(keys: usize) -> usize {
    2 * 64 * (keys + 8) * 2 + (64 + keys) * 72 * 2 + 5 * 64 * 4
}

/// Rows that stay and pass × bytes of a row, of the tiles in `gpu/attention_kernels.rs`.
const fn rows(head: usize, count: usize) -> usize {
    count * ((head / 8) | 1) * 16
}

const fn group(kernel: &'static str, only: &'static str, shared_bytes: usize) -> Matrix {
    Matrix {
        kernel,
        tensor: Tensor::Group,
        only,
        shared_bytes,
    }
}

/// Of the tiles in `gpu/matmul/hopper.rs`: tokens a tile, and bytes of a stage's weights and scales.
const fn ring(tokens: usize, weight: usize) -> usize {
    let stage = tokens * 64 * 2 + weight;
    let rest = 2 * 32 * 68 * 4 + 1024;
    let room = (227 * 1024 - rest) / stage;
    let stages = if room < 8 { room } else { 8 };
    stages * stage + rest
}
const ELEMENTS: usize = 128 * 64 * 2;
const CODES: usize = 128 * 64 / 2 + 128 * 4;

/// Every matrix kernel. One that has tensor-core instructions without being named here fails too, so that none can lose them
/// unnoticed.
pub const MATRIX: &[Matrix] = &[
    warp("product_rows_large", LARGE),
    warp("product_rows_small", SMALL),
    warp("product_columns_large", LARGE),
    warp("product_columns_small", SMALL),
    warp("product_outer", SMALL),
    warp("attention_forward_head64", rows(64, 384)),
    warp("attention_backward_queries_head64", rows(64, 384)),
    warp("attention_backward_keys_head64", rows(64, 256)),
    warp("attention_forward_head80", rows(80, 384)),
    warp("attention_backward_queries_head80", rows(80, 256)),
    warp("attention_backward_keys_head80", rows(80, 256)),
    warp("attention_forward_head96", rows(96, 256)),
    warp("attention_backward_queries_head96", rows(96, 256)),
    warp("attention_backward_keys_head96", rows(96, 256)),
    warp("attention_forward_head128", rows(128, 256)),
    warp("attention_backward_queries_head128", rows(128, 256)),
    warp("attention_backward_keys_head128", rows(128, 256)),
    warp("attention_forward_head256", rows(256, 192)),
    warp("attention_backward_queries_head256", rows(256, 192)),
    warp("attention_backward_keys_head256", rows(256, 192)),
    warp("cross_entropy_logits", LARGE),
    warp("cross_entropy_gradient", LARGE),
    warp_of_bf16("delta_products", (128 * 33 + 5 * 64) * 4),
    warp_of_bf16("delta_solve", (128 * 33 + 2 * 64 * 65 + 5 * 64) * 4),
    warp_of_bf16("delta_forward", SCAN),
    warp_of_bf16("delta_states", SCAN),
    warp_of_bf16("delta_reverse", SCAN),
    warp("delta_factors", 3 * 64 * 72 * 2 + 5 * 64 * 4),
    warp("delta_residuals", 2 * 64 * 72 * 2),
    warp("delta_pulls_keys64", pulls(64)),
    warp("delta_carry_forward_keys64", carry(64)),
    warp("delta_carry_back_keys64", carry(64)),
    warp("delta_outputs_keys64", outputs(64)),
    warp("delta_pulls_keys128", pulls(128)),
    warp("delta_carry_forward_keys128", carry(128)),
    warp("delta_carry_back_keys128", carry(128)),
    warp("delta_outputs_keys128", outputs(128)),
    warp_of_bf16(
        "delta_gradients",
        (128 * 33 + 2 * 64 * 65 + 2 * 64 + 5 * 64 + 4 * 64) * 4,
    ),
    warp("grouped_rows_wide", WIDE),
    warp("grouped_rows_narrow", SMALL),
    warp("grouped_columns_wide", WIDE),
    warp("grouped_columns_narrow", SMALL),
    warp("grouped_outer", SMALL),
    warp("grouped_swiglu_wide", WIDE),
    warp("grouped_pair_wide", WIDE),
    warp("grouped_pair_narrow", SMALL),
    group("hopper_rows_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_rows_narrow", "_u8", ring(64, CODES)),
    group("hopper_rows_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_rows_middle", "_u8", ring(128, CODES)),
    group("hopper_rows_wide", "_bf16", ring(256, ELEMENTS)),
    group("hopper_rows_wide", "_u8", ring(256, CODES)),
    group("hopper_columns_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_columns_narrow", "_u8", ring(64, CODES)),
    group("hopper_columns_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_columns_middle", "_u8", ring(128, CODES)),
    group("hopper_columns_wide", "_bf16", ring(256, ELEMENTS)),
    group("hopper_columns_wide", "_u8", ring(256, CODES)),
    group("hopper_grouped_rows_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_grouped_rows_narrow", "_u8", ring(64, CODES)),
    group("hopper_grouped_rows_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_grouped_rows_middle", "_u8", ring(128, CODES)),
    group("hopper_grouped_rows_wide", "_bf16", ring(256, ELEMENTS)),
    group("hopper_grouped_rows_wide", "_u8", ring(256, CODES)),
    group("hopper_grouped_columns_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_grouped_columns_narrow", "_u8", ring(64, CODES)),
    group("hopper_grouped_columns_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_grouped_columns_middle", "_u8", ring(128, CODES)),
    group("hopper_grouped_columns_wide", "_bf16", ring(256, ELEMENTS)),
    group("hopper_grouped_columns_wide", "_u8", ring(256, CODES)),
    group("hopper_grouped_swiglu_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_grouped_swiglu_narrow", "_u8", ring(64, CODES)),
    group("hopper_grouped_swiglu_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_grouped_swiglu_middle", "_u8", ring(128, CODES)),
    group("hopper_grouped_pair_narrow", "_bf16", ring(64, ELEMENTS)),
    group("hopper_grouped_pair_narrow", "_u8", ring(64, CODES)),
    group("hopper_grouped_pair_middle", "_bf16", ring(128, ELEMENTS)),
    group("hopper_grouped_pair_middle", "_u8", ring(128, CODES)),
    group("hopper_grouped_pair_wide", "_bf16", ring(256, ELEMENTS)),
    group("hopper_grouped_pair_wide", "_u8", ring(256, CODES)),
    group("hopper_logits", "_bf16", ring(256, ELEMENTS)),
    group("hopper_logits", "_u8", ring(256, CODES)),
    group("hopper_head_dx", "_bf16", ring(256, ELEMENTS)),
    group("hopper_head_dx", "_u8", ring(256, CODES)),
];

/// Kernels that may keep something in local memory, at most so many bytes of a thread, and why that is right: none.
const LOCAL_MEMORY: &[(&str, usize, &str)] = &[];

/// Which instruction multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// `mma.sync`, on every target.
    Warp,
    /// `wgmma`, with copies by TMA, on sm_90a.
    Group,
}

/// The line of the table for an entry of a kernel.
fn matrix(entry: &str, kernel: &str) -> Option<&'static Matrix> {
    let mut lines = MATRIX.iter().filter(|matrix| matrix.kernel == kernel);
    lines.find(|matrix| entry.ends_with(matrix.only))
}

/// Dynamic shared memory that launches of an entry have; those of an exact instance have what its kernel's tensor-core one has.
pub fn launched_bytes(entry: &str, kernel: &str) -> usize {
    let line = matrix(entry, kernel).or_else(|| MATRIX.iter().find(|matrix| matrix.kernel == kernel));
    line.map_or(0, |matrix| matrix.shared_bytes)
}

/// What a block may have on every target (8.6, 8.9 and 12.0 have the least), and on Hopper.
const LEAST_SHARED_BYTES: usize = 99 << 10;
const HOPPER_SHARED_BYTES: usize = 227 << 10;

/// What is wrong with an entry of this kernel.
pub fn judge(entry: &str, kernel: &str, read: &Read) -> Option<String> {
    let whole = &read.code.whole;
    match matrix(entry, kernel).map(|matrix| matrix.tensor) {
        None if whole.hmma + whole.hgmma > 0 => {
            return Some("uses tensor cores, but is no matrix kernel of `expected.rs`".to_owned());
        }
        Some(Tensor::Warp) if whole.hmma == 0 => return Some("has lost its HMMA".to_owned()),
        Some(Tensor::Group) if whole.hgmma == 0 => return Some("has lost its HGMMA".to_owned()),
        Some(Tensor::Group) if whole.copies == 0 => return Some("has lost its copies by TMA".to_owned()),
        _ => {}
    }
    if let Some(matrix) = matrix(entry, kernel) {
        // Its own arrays, in the units that launches' memory is aligned to, and what launches add.
        let shared = read.resources.shared_bytes.next_multiple_of(1024) + matrix.shared_bytes;
        let most = match matrix.tensor {
            Tensor::Warp => LEAST_SHARED_BYTES,
            Tensor::Group => HOPPER_SHARED_BYTES,
        };
        if shared > most {
            return Some(format!("takes {shared} bytes of shared memory of {most}"));
        }
    }
    let frame = read.resources.stack_bytes + read.resources.local_bytes;
    let explained = LOCAL_MEMORY
        .iter()
        .any(|(name, most, _)| *name == kernel && frame <= *most);
    if (whole.local > 0 || frame > 0) && !explained {
        return Some(format!(
            "{} accesses of local memory and a frame of {frame} bytes: it spills, or indexes an array at run time",
            whole.local
        ));
    }
    None
}

/// Names in the tables that no kernel has.
pub fn strangers(kernels: &BTreeSet<&str>) -> Vec<String> {
    let named = MATRIX
        .iter()
        .map(|matrix| matrix.kernel)
        .chain(LOCAL_MEMORY.iter().map(|(name, ..)| *name));
    let strange = named.filter(|name| !kernels.contains(name));
    strange
        .map(|name| format!("`expected.rs` names {name}, which is no kernel"))
        .collect()
}
