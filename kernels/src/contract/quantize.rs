//! Frozen weights.

use super::{DENSE, Rules, VECTOR};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fp8;
use crate::ops::Device;
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Nf4Weight, Weight};

/// `(O, I)` of a well-formed matrix.
pub(crate) fn weight_shape<D: Device>(
    op: &'static str,
    argument: &'static str,
    weight: &Weight<D>,
) -> Result<(usize, usize)> {
    match weight {
        Weight::Dense(tensor) => {
            let rules = Rules(op);
            rules.dtype(argument, tensor, DENSE)?;
            let [outputs, inputs] = rules.extents(argument, tensor, "[O, I]")?;
            Ok((outputs, inputs))
        }
        Weight::Nf4(weight) => {
            nf4_weight(op, weight)?;
            Ok((weight.outputs, weight.inputs))
        }
    }
}

/// An NF4 weight's tensors have the sizes its extents ask for.
pub(crate) fn nf4_weight<D: Device>(op: &'static str, weight: &Nf4Weight<D>) -> Result<()> {
    let rules = Rules(op);
    let elements = weight.outputs * weight.inputs;
    let blocks = elements.div_ceil(NF4_BLOCK);
    rules.dtype("codes", &weight.codes, &[DType::U8])?;
    rules.shape("codes", &weight.codes, "[ceil(O·I / 2)]", &[elements.div_ceil(2)])?;
    match &weight.scales {
        Nf4Scales::Flat(absmax) => {
            rules.dtype("absmax", absmax, &[DType::F32])?;
            rules.shape("absmax", absmax, "[blocks]", &[blocks])
        }
        Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            ..
        } => {
            rules.dtype("absmax codes", codes, &[DType::U8])?;
            rules.shape("absmax codes", codes, "[blocks]", &[blocks])?;
            rules.dtype("nested_absmax", nested_absmax, &[DType::F32])?;
            let groups = blocks.div_ceil(NF4_NESTED_BLOCK);
            rules.shape("nested_absmax", nested_absmax, "[ceil(blocks / 256)]", &[groups])?;
            rules.dtype("nested_code", nested_code, &[DType::F32])?;
            rules.shape("nested_code", nested_code, "[256]", &[256])
        }
    }
}

/// `(O, I)` of a matrix to quantise.
pub(crate) fn quantize_nf4<D: Device>(source: &Tensor<D>) -> Result<(usize, usize)> {
    let rules = Rules("quantize_nf4");
    rules.dtype("source", source, DENSE)?;
    let [outputs, inputs] = rules.extents("source", source, "[O, I]")?;
    Ok((outputs, inputs))
}

/// `(O, I)` of an FP8 matrix to quantise.
pub(crate) fn quantize_nf4_fp8<D: Device>(
    codes: &Tensor<D>,
    scales: &Tensor<D>,
    block: [usize; 2],
) -> Result<(usize, usize)> {
    let rules = Rules("quantize_nf4_fp8");
    rules.dtype("codes", codes, &[DType::F8E4M3])?;
    let [outputs, inputs] = rules.extents("codes", codes, "[O, I]")?;
    if block.contains(&0) {
        return Err(Error::Value {
            op: "quantize_nf4_fp8",
            argument: "block",
            problem: format!("is {block:?}, but extents of a block are at least 1"),
        });
    }
    rules.dtype("scales", scales, VECTOR)?;
    let grid = fp8::scale_extents([outputs, inputs], block);
    rules.shape("scales", scales, "[ceil(O / block[0]), ceil(I / block[1])]", &grid)?;
    Ok((outputs, inputs))
}

/// `(O, I)` of a weight and of the tensor it is decoded into.
pub(crate) fn dequantize<D: Device>(weight: &Weight<D>, out: &Tensor<D>) -> Result<(usize, usize)> {
    let rules = Rules("dequantize");
    let (outputs, inputs) = weight_shape("dequantize", "weight", weight)?;
    rules.dtype("out", out, VECTOR)?;
    rules.shape("out", out, "[O, I]", &[outputs, inputs])?;
    Ok((outputs, inputs))
}
