//! The judge of every backend: each op as the shortest loops that can be checked against its formula.
//!
//! The loops are written once over [`Real`] and used twice. With `f64` they are the oracle. With [`Single`] and [`Mixed`] they
//! are the *plain loop of the same precision*: what an honest, unoptimised kernel would give. A backend may be at most about
//! twice as far from the oracle as that plain loop (see [`testing`](crate::testing)).
//!
//! The backward passes here are proven by finite differences of the forward passes (this module's tests).

mod activation;
mod attention;
mod convolution;
mod delta;
mod gate;
mod loss;
mod matmul;
mod moe;
mod norm;
mod optimizer;
mod real;
mod rope;

pub use self::activation::{swiglu_backward, swiglu_forward};
pub use self::attention::{AttentionGradients, Heads, attention_backward, attention_forward};
pub use self::convolution::{Filter, convolution_backward, convolution_forward};
pub use self::delta::{
    DeltaGradients, DeltaHeads, DeltaInputs, delta_gates_backward, delta_gates_forward, delta_rule_backward,
    delta_rule_forward,
};
pub use self::gate::{
    gated_norm_backward, gated_norm_forward, l2_norm_backward, l2_norm_forward, sigmoid_gate_backward,
    sigmoid_gate_forward,
};
pub use self::loss::linear_cross_entropy;
pub use self::matmul::{Adapter, Layer, LinearGradients, linear_backward, linear_forward};
pub use self::moe::{
    Route, by_token, combine, grouped_linear_backward, grouped_linear_forward, route, route_backward,
    routed_swiglu_backward, routed_swiglu_forward,
};
pub use self::norm::{rms_norm_backward, rms_norm_forward};
pub use self::optimizer::{adamw_step, decode_moment, squared_norm};
pub use self::real::{Mixed, Real, Single, cast};
pub use self::rope::rope;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_moe_delta;
