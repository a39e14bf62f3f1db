//! Block-scaled FP8, as checkpoints hold it; the arithmetic is that of [`brightrun_kernels::fp8`].

pub use brightrun_kernels::fp8::{Grid, dequantised, scale_extents, value};
