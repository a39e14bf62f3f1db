//! The op interface: every operation of a training step, written once.
//!
//! One trait per family, one family per file; [`Backend`] is their sum. Each method's doc is its
//! contract. Rules that hold for all of them:
//!
//! - Outputs are written in full. A [`Write::Accumulate`] argument or an `_accumulate` suffix means
//!   the result is added to what is there instead.
//! - Arguments never alias, unless a method says that it works in place.
//! - Activations are f32 or bf16, all of one call alike: [`Device::activation_dtype`] says which the
//!   backend wants. Sums are kept in f32 or wider.
//! - LoRA tensors, their gradients and optimizer states are f32.
//! - Non-finite values pass through; they are never replaced.
//! - A shape or dtype outside the contract is an [`Error`](crate::Error), never undefined behaviour.
//!   Data outside it (an id beyond its table) is one too, at the latest when a tensor is next read: a device's data are not
//!   asked for in every op.
//! - Zero rows are legal everywhere.

mod activation;
mod attention;
mod convolution;
mod delta;
pub(crate) mod delta_parts;
mod device;
mod embedding;
mod gate;
mod loss;
mod matmul;
mod moe;
pub(crate) mod moe_parts;
mod norm;
mod optimizer;
mod quantize;
pub(crate) mod random;
mod recording;
mod rope;

pub use self::activation::ActivationOps;
pub use self::attention::{AttentionBackward, AttentionForward, AttentionOps};
pub use self::convolution::{ConvolutionBackward, ConvolutionForward, ConvolutionOps};
pub use self::delta::{
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward, DeltaOps,
};
pub use self::device::{Device, MemoryStats, Op, Support};
pub use self::embedding::EmbeddingOps;
pub use self::gate::{Columns, GateOps, GatedNormBackward, GatedNormForward, SigmoidGateBackward};
pub use self::loss::{LinearCrossEntropy, LossOps};
pub use self::matmul::{LinearBackward, LinearForward, LoraBackward, LoraForward, MatmulOps, Precision, Write};
pub use self::moe::{
    CombineResidual, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, GroupedLoraForward,
    GroupedPairBackward, GroupedSwigluForward, MoeOps, RouteBackward, RoutedSwigluBackward, Routing, RowOrder,
};
pub use self::norm::{AddNormForward, NormBackward, NormForward, NormOps, NormWeight};
pub use self::optimizer::{AdamW, BlockMoment, MOMENT_BLOCK, MomentsMut, OptimizerOps, Trained};
pub use self::quantize::QuantizeOps;
pub use self::random::{Noise, RandomOps, random_bits};
pub use self::recording::{Recorded, Recording};
pub use self::rope::{RopeDirection, RopeOps, RopeTable};

/// All op families together: what model code asks for.
pub trait Backend:
    MatmulOps
    + NormOps
    + RopeOps
    + AttentionOps
    + ActivationOps
    + EmbeddingOps
    + LossOps
    + OptimizerOps
    + QuantizeOps
    + RandomOps
    + MoeOps
    + DeltaOps
    + ConvolutionOps
    + GateOps
{
}

impl<D> Backend for D where
    D: MatmulOps
        + NormOps
        + RopeOps
        + AttentionOps
        + ActivationOps
        + EmbeddingOps
        + LossOps
        + OptimizerOps
        + QuantizeOps
        + RandomOps
        + MoeOps
        + DeltaOps
        + ConvolutionOps
        + GateOps
{
}
