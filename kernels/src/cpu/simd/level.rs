//! Which instructions there are.

#![allow(unsafe_code)]

use std::fmt;

use crate::error::{Error, Result};

/// Instruction sets the CPU backend has code for, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SimdLevel {
    /// What every x86-64 and every other target has.
    Portable,
    /// AVX2, FMA and F16C: 256-bit vectors.
    Avx2,
    /// AVX-512 F, BW, DQ and VL: 512-bit vectors.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
}

impl SimdLevel {
    /// All levels, ascending.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The environment variable that caps the level.
    pub const VARIABLE: &'static str = "BRIGHTRUN_CPU_SIMD";

    /// The highest level of this machine.
    pub fn detect() -> Self {
        let supported = Self::ALL.into_iter().rev().find(|level| level.is_supported());
        supported.unwrap_or(Self::Portable)
    }

    /// Whether this machine has the level.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = || has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = || avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => avx512(),
                Self::Avx512Bf16 => avx512() && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The detected level, capped by [`SimdLevel::VARIABLE`] if that is set.
    ///
    /// # Errors
    /// [`Error::Value`] when the variable names no level.
    pub fn from_environment() -> Result<Self> {
        let detected = Self::detect();
        let Some(name) = std::env::var_os(Self::VARIABLE) else {
            return Ok(detected);
        };
        let name = name.to_string_lossy();
        match Self::ALL.into_iter().find(|level| level.to_string() == name) {
            Some(cap) => Ok(cap.min(detected)),
            None => Err(Error::Value {
                op: "choosing CPU instructions",
                argument: Self::VARIABLE,
                problem: format!("is {name:?}; the choices are portable, avx2, avx512, avx512bf16"),
            }),
        }
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        })
    }
}

/// Proof that this machine has a level: the only constructor checks it.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Simd(SimdLevel);

impl Simd {
    /// The proof, if the machine has the level.
    pub(in crate::cpu) fn new(level: SimdLevel) -> Option<Self> {
        level.is_supported().then_some(Self(level))
    }

    /// The level.
    pub(in crate::cpu) fn level(self) -> SimdLevel {
        self.0
    }
}

/// Defines a function once and compiles it for every level; the first argument chooses.
///
/// The body is ordinary safe Rust that the compiler turns into vector instructions. In it, `F` is a type whose
/// `F::fused(a, b, c)` is `a · b + c`, with one rounding where the level has such an instruction.
macro_rules! vectorised {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(simd: $crate::cpu::simd::level::Simd, $($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_type_parameters)]
            fn body<F: $crate::cpu::simd::math::Fused>($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $type),*) $(-> $result)? {
                body::<$crate::cpu::simd::math::OneRounding>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $type),*) $(-> $result)? {
                body::<$crate::cpu::simd::math::OneRounding>($($arg),*)
            }

            match simd.level() {
                // SAFETY: a `Simd` of this level proves that the processor has these features.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::SimdLevel::Avx512 | $crate::cpu::simd::SimdLevel::Avx512Bf16 => unsafe {
                    avx512($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::SimdLevel::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<$crate::cpu::simd::math::TwoRoundings>($($arg),*),
            }
        }
    )*};
}

pub(super) use vectorised;
