//! What the machine code must be like: tables to add to.

use std::collections::BTreeSet;

use crate::Read;

/// Kernels (names without types) whose products must be done by tensor cores, and with which instruction. A kernel that has
/// such instructions without being named here fails too, so that none can lose them unnoticed.
const MATRIX: &[(&str, Tensor)] = &[];

/// Kernels that keep something in local memory, and why that is right.
const LOCAL_MEMORY: &[(&str, &str)] = &[];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)]
pub enum Tensor {
    /// `mma.sync`, on every target.
    Warp,
    /// `wgmma`, on `sm_90a`; nothing elsewhere.
    WarpGroup,
}

/// What is wrong with an entry of this kernel.
pub fn judge(kernel: &str, read: &Read) -> Option<String> {
    let whole = &read.code.whole;
    let declared = MATRIX.iter().find(|(name, _)| *name == kernel).map(|(_, tensor)| *tensor);
    let multiplies = whole.hmma + whole.hgmma > 0;
    match declared {
        None if multiplies => return Some("uses tensor cores, but is no matrix kernel of `expected.rs`".to_owned()),
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
    let named = MATRIX.iter().map(|(name, _)| *name).chain(LOCAL_MEMORY.iter().map(|(name, _)| *name));
    let strange = named.filter(|name| !kernels.contains(name));
    strange.map(|name| format!("`expected.rs` names {name}, which is no kernel")).collect()
}
