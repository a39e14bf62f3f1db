//! The number types the loops run in.

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::bf16;

/// Arithmetic of one precision.
pub trait Real:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The nearest value of this type.
    fn new(value: f64) -> Self;
    /// The value, exactly.
    fn get(self) -> f64;
    /// The value as it enters a matrix product of this precision.
    fn factor(self) -> Self;
    /// `e` to the power of the value.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;

    /// `Σ a_i b_i` of factors, in order.
    fn dot(pairs: impl Iterator<Item = (Self, Self)>) -> Self {
        pairs.fold(Self::new(0.0), |sum, (a, b)| sum + a.factor() * b.factor())
    }

    /// `Σ a_i`, in order.
    fn sum(values: impl Iterator<Item = Self>) -> Self {
        values.fold(Self::new(0.0), |sum, value| sum + value)
    }
}

impl Real for f64 {
    fn new(value: f64) -> Self {
        value
    }
    fn get(self) -> f64 {
        self
    }
    fn factor(self) -> Self {
        self
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn ln(self) -> Self {
        self.ln()
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

/// f32 throughout: a plain loop at [`Precision::F32`](crate::ops::Precision::F32).
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Single(f32);

/// f32 whose products' factors are rounded to bf16: a plain loop at [`Precision::Bf16`](crate::ops::Precision::Bf16).
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Mixed(f32);

macro_rules! single_precision {
    ($name:ident, $factor:expr) => {
        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }
        impl Mul for $name {
            type Output = Self;
            fn mul(self, other: Self) -> Self {
                Self(self.0 * other.0)
            }
        }
        impl Div for $name {
            type Output = Self;
            fn div(self, other: Self) -> Self {
                Self(self.0 / other.0)
            }
        }
        impl Neg for $name {
            type Output = Self;
            fn neg(self) -> Self {
                Self(-self.0)
            }
        }
        impl Real for $name {
            fn new(value: f64) -> Self {
                Self(value as f32)
            }
            fn get(self) -> f64 {
                f64::from(self.0)
            }
            fn factor(self) -> Self {
                Self($factor(self.0))
            }
            fn exp(self) -> Self {
                Self(self.0.exp())
            }
            fn ln(self) -> Self {
                Self(self.0.ln())
            }
            fn sqrt(self) -> Self {
                Self(self.0.sqrt())
            }
        }
    };
}

single_precision!(Single, |value: f32| value);
single_precision!(Mixed, |value: f32| bf16::from_f32(value).to_f32());

/// Values of another precision.
pub fn cast<N: Real>(values: &[f32]) -> Vec<N> {
    values.iter().map(|value| N::new(f64::from(*value))).collect()
}
