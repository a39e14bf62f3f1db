//! Every op, on every backend, against the float64 oracle.
//!
//! A case is a line of data; a failure prints the op, the backend, the shape and the seed, the worst element, both values and
//! the bound. To run one op's cases: `cargo test --release -p brightrun-kernels --test conformance linear`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod attention;
mod backends;
mod delta;
mod delta_inputs;
mod elementwise;
mod gate;
mod linear;
mod loss;
mod memory;
mod moe;
mod moe_fused;
mod random;
mod rows;
mod weights;
