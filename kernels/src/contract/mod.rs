//! The shape and dtype rules of every op, checked once for all backends.
//!
//! Each function takes an op's arguments, answers the extents in the contract's letters, or says what is wrong. A backend
//! calls it first and may rely on the result: after it, slices have the lengths the letters say.

mod attention;
mod convolution;
mod delta;
mod elementwise;
mod gate;
mod loss;
mod matmul;
mod moe;
mod moe_fused;
mod norm;
mod quantize;
mod random;
mod rows;

pub(crate) use self::attention::{AttentionSizes, attention_backward, attention_forward};
pub(crate) use self::convolution::{ConvolutionSizes, convolution_backward, convolution_forward};
pub(crate) use self::delta::{
    DeltaSizes, delta_gates_backward, delta_gates_forward, delta_inputs_backward, delta_inputs_forward,
    delta_rule_backward, delta_rule_forward,
};
pub(crate) use self::elementwise::{adamw_8bit_step, adamw_step, same_shape, squared_norm, zero_many};
pub(crate) use self::gate::{
    GateSizes, copy_columns, gated_norm_backward, gated_norm_forward, l2_norm_backward, l2_norm_forward,
    sigmoid_gate_backward, sigmoid_gate_forward,
};
pub(crate) use self::loss::linear_cross_entropy;
pub(crate) use self::matmul::{LinearSizes, linear_backward, linear_forward};
pub(crate) use self::moe::{
    GroupedSizes, RoutingSizes, combine, grouped_linear_backward, grouped_linear_forward, route, route_backward,
    routed_swiglu_backward, routed_swiglu_forward, stack_expert,
};
pub(crate) use self::moe_fused::{combine_residual, grouped_pair_backward, grouped_swiglu_forward};
pub(crate) use self::norm::{NormSizes, add_rms_norm_forward, rms_norm_backward, rms_norm_forward};
pub(crate) use self::quantize::{dequantize, quantize_nf4, quantize_nf4_fp8, weight_shape};
pub(crate) use self::random::fill_random;
pub(crate) use self::rows::{copy_rows, gather_rows, rope};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Device;
use crate::tensor::Tensor;

/// What activations may be.
const ACTIVATION: &[DType] = &[DType::F32, DType::BF16];
/// What a norm's weight or a bias may be.
const VECTOR: &[DType] = &[DType::F32, DType::BF16];
/// What a dense frozen matrix may be.
const DENSE: &[DType] = &[DType::F32, DType::BF16, DType::F16];

/// One op, for messages.
#[derive(Clone, Copy)]
struct Rules(&'static str);

impl Rules {
    /// `tensor` has exactly these extents; `letters` names them.
    fn shape<D: Device>(
        self,
        argument: &'static str,
        tensor: &Tensor<D>,
        letters: &str,
        extents: &[usize],
    ) -> Result<()> {
        if tensor.shape().extents() == extents {
            return Ok(());
        }
        Err(self.wrong_shape(argument, tensor, format!("{letters} = {extents:?}")))
    }

    /// `tensor` has this rank; its extents.
    fn extents<D: Device, const RANK: usize>(
        self,
        argument: &'static str,
        tensor: &Tensor<D>,
        letters: &str,
    ) -> Result<[usize; RANK]> {
        let shape = tensor.shape();
        <[usize; RANK]>::try_from(shape.extents()).map_err(|_| self.wrong_shape(argument, tensor, letters.to_owned()))
    }

    fn wrong_shape<D: Device>(self, argument: &'static str, tensor: &Tensor<D>, expected: String) -> Error {
        Error::Shape {
            op: self.0,
            argument,
            expected,
            got: tensor.shape(),
        }
    }

    /// `tensor` has one of these dtypes.
    fn dtype<D: Device>(self, argument: &'static str, tensor: &Tensor<D>, accepted: &'static [DType]) -> Result<()> {
        if accepted.contains(&tensor.dtype()) {
            return Ok(());
        }
        Err(Error::DType {
            op: self.0,
            argument,
            expected: names(accepted),
            got: tensor.dtype(),
        })
    }

    /// `tensor` is an activation of the same dtype as `first`, which is one too.
    fn alike<D: Device>(self, argument: &'static str, tensor: &Tensor<D>, first: &Tensor<D>) -> Result<()> {
        self.dtype(argument, tensor, ACTIVATION)?;
        if tensor.dtype() == first.dtype() {
            return Ok(());
        }
        Err(Error::DType {
            op: self.0,
            argument,
            expected: "of the same dtype as the other activations",
            got: tensor.dtype(),
        })
    }

    fn value(self, argument: &'static str, problem: String) -> Error {
        Error::Value {
            op: self.0,
            argument,
            problem,
        }
    }
}

/// The bytes of a piece of a tensor.
pub(crate) fn piece<D: Device>(
    op: &'static str,
    tensor: &Tensor<D>,
    first: usize,
    length: usize,
) -> Result<std::ops::Range<usize>> {
    let size = tensor.size_bytes();
    match first.checked_add(length).filter(|end| *end <= size) {
        Some(end) => Ok(first..end),
        None => Err(Error::Value {
            op,
            argument: "bytes",
            problem: format!("are {length} from byte {first} on, but {tensor:?} has {size}"),
        }),
    }
}

/// How a message lists the accepted dtypes.
fn names(accepted: &[DType]) -> &'static str {
    match accepted {
        [DType::F32] => "f32",
        [DType::I32] => "i32",
        [DType::U8] => "u8",
        [DType::F8E4M3] => "f8e4m3",
        [DType::F32, DType::BF16] => "f32 or bf16",
        _ => "f32, bf16 or f16",
    }
}
