//! The texts of `kernels/cu/`, part of the binary: what NVRTC and the emulation compile.

/// One translation unit: a family of kernels.
#[derive(Debug)]
pub struct Source {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// The only target it is compiled for, where it needs one's own instructions; every source with one has a twin without.
    pub only: Option<&'static str>,
}

impl Source {
    /// Whether it is compiled for a target, written as compilers read it.
    pub fn is_for(&self, target: &str) -> bool {
        self.only.is_none_or(|only| only == target)
    }
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

macro_rules! source {
    ($name:literal) => {
        source!($name, None)
    };
    ($name:literal, $only:expr) => {
        Source {
            name: $name,
            text: include_str!(concat!("../../cu/", $name, ".cu")),
            only: $only,
        }
    };
}

/// The target whose own instructions `hopper.cuh` wraps.
const HOPPER: Option<&str> = Some("sm_90a");

pub(crate) static ELEMENTWISE: Source = source!("elementwise");
pub(crate) static NORM: Source = source!("norm");
pub(crate) static ROWS: Source = source!("rows");
pub(crate) static RANDOM: Source = source!("random");
pub(crate) static OPTIMIZER: Source = source!("optimizer");
pub(crate) static NF4: Source = source!("nf4");
pub(crate) static CONVOLUTION: Source = source!("convolution");
pub(crate) static GATE: Source = source!("gate");
pub(crate) static GATED_DELTA: Source = source!("gated_delta");
pub(crate) static DELTA_CARRY: Source = source!("delta_carry");
pub(crate) static DELTA_INPUTS: Source = source!("delta_inputs");
pub(crate) static MOE: Source = source!("moe");
pub(crate) static GROUPED: Source = source!("grouped");
pub(crate) static GROUPED_F32: Source = source!("grouped_f32");
pub(crate) static QUANTIZE: Source = source!("quantize");
pub(crate) static ATTENTION: Source = source!("attention");
pub(crate) static ATTENTION_TENSOR: Source = source!("attention_tensor");
pub(crate) static ATTENTION_HOPPER: Source = source!("attention_hopper", HOPPER);
pub(crate) static ATTENTION_HOPPER_BACKWARD: Source = source!("attention_hopper_backward", HOPPER);
pub(crate) static MATMUL: Source = source!("matmul");
pub(crate) static MATMUL_HOPPER: Source = source!("matmul_hopper", HOPPER);
pub(crate) static GROUPED_HOPPER: Source = source!("grouped_hopper", HOPPER);
pub(crate) static MATMUL_F32: Source = source!("matmul_f32");
pub(crate) static CROSS_ENTROPY: Source = source!("cross_entropy");
pub(crate) static CROSS_ENTROPY_HOPPER: Source = source!("cross_entropy_hopper", HOPPER);

/// What the sources include, by name.
pub const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("../../cu/common.cuh")),
    ("nf4.cuh", include_str!("../../cu/nf4.cuh")),
    ("factor.cuh", include_str!("../../cu/factor.cuh")),
    ("attention.cuh", include_str!("../../cu/attention.cuh")),
    ("documents.cuh", include_str!("../../cu/documents.cuh")),
    ("product.cuh", include_str!("../../cu/product.cuh")),
    ("delta.cuh", include_str!("../../cu/delta.cuh")),
    ("grouped.cuh", include_str!("../../cu/grouped.cuh")),
    ("cross_entropy.cuh", include_str!("../../cu/cross_entropy.cuh")),
    ("tile.cuh", include_str!("../../cu/tile.cuh")),
    ("hopper.cuh", include_str!("../../cu/hopper.cuh")),
    ("attention_hopper.cuh", include_str!("../../cu/attention_hopper.cuh")),
    ("hopper_tile.cuh", include_str!("../../cu/hopper_tile.cuh")),
];

/// The names of a source's entries.
pub fn entries(source: &Source) -> Vec<String> {
    let kernels = super::FAMILIES.iter().flat_map(|family| family.kernels);
    kernels
        .filter(|kernel| kernel.source == source)
        .flat_map(|kernel| kernel.instances().into_iter().map(|types| kernel.entry(&types)))
        .collect()
}

/// Every source.
pub fn all() -> impl Iterator<Item = &'static Source> {
    super::FAMILIES.iter().map(|family| family.source)
}
