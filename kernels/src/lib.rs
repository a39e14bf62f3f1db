//! The op interface of QLoRA training, and the backends that carry it out.
//!
//! # What this crate is
//!
//! A set of traits ([`ops`]) that name every operation a LoRA training step of a Qwen model needs,
//! each with its formula, shapes, dtypes, accumulation type and aliasing rules, and backends that
//! implement them. Model code (in the `worker` crate) is written once, generic over
//! [`Backend`], and never learns which one runs.
//!
//! | module | what |
//! |---|---|
//! | [`ops`] | the contract of every op, one family per file |
//! | [`tensor`] | owned, contiguous, row-major tensors in a backend's memory |
//! | [`weight`] | frozen weights as data: f32, bf16, NF4 |
//! | [`stack`] | the same for all experts of a layer |
//! | [`dynamic`] | bitsandbytes' 8-bit maps, which nested scales and 8-bit optimizer states use |
//! | [`fp8`] | block-scaled FP8 codes, as checkpoints hold them |
//! | [`cpu`] | the default backend: SIMD with run-time detection, threads, bf16 and NF4 used directly |
//! | [`gpu`] | the GPU backend: every op as launches of the CUDA kernels in `kernels/cu` |
//! | [`cuda`] | that backend on an NVIDIA device, through the CUDA driver |
//! | [`emu`] | the same kernels on a CPU, each thread a fiber |
//! | [`counting`] | no arithmetic, exact accounts: plans of memory and time |
//! | [`oracle`] | float64, naive loops: the judge of every backend |
//! | [`testing`] | what the conformance suites share |
//!
//! # Conventions
//!
//! *Packed tokens, no padding.* Activations are `[T, C]`; several documents lie one after another
//! and [`tensor::Segments`] says where each begins. Documents never see each other.
//!
//! *Shape letters:* `T` tokens, `C` model width, `H` query heads, `K` key/value heads, `D` head
//! dimension, `F` feed-forward width, `V` vocabulary, `R` LoRA rank, `N` rows.
//!
//! *No autograd.* Backward ops are explicit. Gradients exist for activations and LoRA tensors only.
//!
//! *Determinism.* Every op gives the same bits for the same input on one backend, whatever the
//! number of threads: each sum has a fixed order.
//!
//! *Absent on purpose:* a general tensor library, views with strides, broadcasting, an autograd tape.

mod contract;
pub mod counting;
pub mod cpu;
pub mod cuda;
pub mod dtype;
pub mod dynamic;
pub mod emu;
pub mod error;
pub mod fp8;
pub mod gpu;
pub mod ops;
pub mod oracle;
pub mod stack;
pub mod tensor;
pub mod testing;
pub mod weight;

pub use dtype::DType;
pub use error::{Error, Result};
pub use ops::{Backend, Op, Support};
pub use stack::{Nf4Stack, Nf4StackScales, WeightStack};
pub use tensor::{Segments, Shape, Tensor};
pub use weight::{Nf4Scales, Nf4Weight, Weight};
