//! Everything that depends on the instruction set, and all of this crate's `unsafe` code.
//!
//! Outside this folder the CPU backend is safe Rust. Here there are two reasons for `unsafe`: calling functions compiled for
//! instructions that were found at run time (proof: a [`Simd`] exists only for a level the processor has), and tiles that
//! read and write through pointers whose bounds are checked once for the whole product.

pub(super) mod gates;
mod level;
mod math;
mod pack;
pub(super) mod quantize;
pub(super) mod rows;
mod tile;
mod tile_avx2;
mod tile_avx512;
mod tile_portable;

pub(super) use self::level::Simd;
pub use self::level::SimdLevel;
pub(super) use self::pack::{Nf4Rows, decode_nf4, decode_nf4_pairs, interleave_pair, interleave_rows, transpose_rows};
pub(super) use self::tile::{Block, Blocks, Element, Left, PANEL, Start, multiply};
