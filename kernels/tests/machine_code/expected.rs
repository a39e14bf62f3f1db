//! What the machine code must be like: tables to add to.

use std::collections::BTreeSet;

use crate::Read;

/// A kernel (its name without types) whose products must be done by tensor cores.
pub struct Matrix {
    pub kernel: &'static str,
    pub tensor: Tensor,
    /// What launches add to its shared memory, as the host's tile of that name has it: decides how many blocks fit.
    pub shared_bytes: usize,
}

const fn warp(kernel: &'static str, shared_bytes: usize) -> Matrix {
    Matrix {
        kernel,
        tensor: Tensor::Warp,
        shared_bytes,
    }
}

/// Stages × (rows + columns) × depth × 2 bytes, of the tiles in `gpu/matmul/tensor.rs`.
const LARGE: usize = 3 * (128 + 128) * 64 * 2;
const SMALL: usize = 4 * (32 + 64) * 64 * 2;

/// Every matrix kernel. One that has tensor-core instructions without being named here fails too, so that none can lose them
/// unnoticed.
pub const MATRIX: &[Matrix] = &[
    warp("product_rows_large", LARGE),
    warp("product_rows_small", SMALL),
    warp("product_columns_large", LARGE),
    warp("product_columns_small", SMALL),
    warp("product_outer", SMALL),
];

/// Kernels that keep something in local memory, and why that is right.
const LOCAL_MEMORY: &[(&str, &str)] = &[];

/// Which instruction multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// `mma.sync`, on every target.
    Warp,
}

/// The line of the table for a kernel.
pub fn matrix(kernel: &str) -> Option<&'static Matrix> {
    MATRIX.iter().find(|matrix| matrix.kernel == kernel)
}

/// What is wrong with an entry of this kernel.
pub fn judge(kernel: &str, read: &Read) -> Option<String> {
    let whole = &read.code.whole;
    match matrix(kernel).map(|matrix| matrix.tensor) {
        None if whole.hmma + whole.hgmma > 0 => {
            return Some("uses tensor cores, but is no matrix kernel of `expected.rs`".to_owned());
        }
        Some(Tensor::Warp) if whole.hmma == 0 => return Some("has lost its HMMA".to_owned()),
        _ => {}
    }
    let frame = read.resources.stack_bytes + read.resources.local_bytes;
    let explained = LOCAL_MEMORY.iter().any(|(name, _)| *name == kernel);
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
        .chain(LOCAL_MEMORY.iter().map(|(name, _)| *name));
    let strange = named.filter(|name| !kernels.contains(name));
    strange
        .map(|name| format!("`expected.rs` names {name}, which is no kernel"))
        .collect()
}
