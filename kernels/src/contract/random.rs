//! Random contents.

use super::{Rules, VECTOR};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, Noise};
use crate::tensor::Tensor;

/// A tensor's dtype is one that the numbers are for.
pub(crate) fn fill_random<D: Device>(tensor: &Tensor<D>, noise: Noise) -> Result<()> {
    let accepted: &[DType] = match noise {
        Noise::Bytes => &[DType::U8],
        Noise::Normal { .. } => VECTOR,
    };
    Rules("fill_random").dtype("tensor", tensor, accepted)
}
