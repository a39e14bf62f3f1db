//! Element types.

use std::fmt;

/// The type of a tensor's elements. All are little-endian in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// IEEE binary16.
    F16,
    /// 8-bit float, 4 exponent bits, 3 mantissa bits, no infinities (OCP E4M3).
    F8E4M3,
    /// Unsigned byte; also two NF4 codes, the first in the high nibble.
    U8,
    /// Signed 32-bit integer.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::F8E4M3 | Self::U8 => 1,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::F8E4M3 => "f8e4m3",
            Self::U8 => "u8",
            Self::I32 => "i32",
        })
    }
}
