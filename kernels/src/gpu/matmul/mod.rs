//! Frozen linear layers with LoRA: `matmul.cu` (bf16, tensor cores), `matmul_hopper.cu` (the same on sm_90a) and `matmul_f32.cu`.
//!
//! The passes are written once; a [`Product`] is carried out by [`tensor`] or [`exact`], as the precision says, or
//! by [`hopper`] where the table in [`choice`] says so. Factors are
//! brought to the precision's dtype first where they are not in it already: the small ones of the adapter always, activations
//! and dense weights only where a caller mixes dtypes. NF4 weights are never decoded to memory, unless their rows are not
//! multiples of 32 elements.

pub(super) mod choice;
mod exact;
pub(super) mod hopper;
mod library;
pub(super) mod tensor;

pub(crate) use self::choice::parts_bytes;
pub use self::library::{PlainForm, PlainProduct};
pub(super) use self::tensor::Tile;
pub(crate) use self::tensor::{NF4_ROW, PART as OUTER_PART};

use std::ops::Deref;
use std::sync::Arc;

use super::family::Family;
use super::{Gpu, Runtime};
use crate::contract::{self, LinearSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, LinearBackward, LinearForward, LoraBackward, MatmulOps, Op, Precision, QuantizeOps, Write};
use crate::tensor::Tensor;
use crate::weight::{Nf4Weight, Weight};

pub(super) static TENSOR_FAMILY: Family = Family {
    source: &super::sources::MATMUL,
    kernels: tensor::KERNELS,
    ops: &[Op::LinearForward, Op::LinearBackward],
};

pub(super) static HOPPER_FAMILY: Family = Family {
    source: &super::sources::MATMUL_HOPPER,
    kernels: hopper::KERNELS,
    ops: &[],
};

pub(super) static EXACT_FAMILY: Family = Family {
    source: &super::sources::MATMUL_F32,
    kernels: exact::KERNELS,
    ops: &[],
};

/// A tensor that was there already, or one made for the occasion.
pub(super) enum Held<'a, R: Runtime> {
    Borrowed(&'a Tensor<Gpu<R>>),
    Made(Tensor<Gpu<R>>),
    Shared(Arc<Tensor<Gpu<R>>>),
}

impl<R: Runtime> Deref for Held<'_, R> {
    type Target = Tensor<Gpu<R>>;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Borrowed(tensor) => tensor,
            Self::Made(tensor) => tensor,
            Self::Shared(tensor) => tensor,
        }
    }
}

/// A frozen factor, ready for a product.
pub(super) enum Right<'a, R: Runtime> {
    Dense(Held<'a, R>),
    Nf4(&'a Nf4Weight<Gpu<R>>),
}

/// How a product reads its right factor, which is row-major.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// `[N, K]`: a row is a column of the result, as `W` in `x · Wᵀ`.
    Rows,
    /// `[K, N]`, as `W` in `dy · W`.
    Columns,
}

/// Both factors of a product's second term.
pub(super) type LowRank<'a, R> = (&'a Tensor<Gpu<R>>, &'a Tensor<Gpu<R>>);

/// `out = left · right + left2 · right2 + bias`; see the kernels' heads.
pub(super) struct Product<'a, R: Runtime> {
    /// `[M, K]` in the precision's dtype.
    pub(super) left: &'a Tensor<Gpu<R>>,
    pub(super) right: &'a Right<'a, R>,
    pub(super) reads: Reads,
    /// `[M, R]`, and `[N, R]` or `[R, N]` as `right`, in the precision's dtype.
    pub(super) second: Option<LowRank<'a, R>>,
    /// f32 or bf16 `[N]`.
    pub(super) bias: Option<&'a Tensor<Gpu<R>>>,
    /// `[M, N]`, and how it is written.
    pub(super) out: Option<(&'a mut Tensor<Gpu<R>>, Write)>,
    /// The result times a factor, in the precision's dtype, to be a factor itself.
    pub(super) copy: Option<(&'a mut Tensor<Gpu<R>>, f32)>,
    /// `M`, `N`, `K`, and `R` of the second term, or 0.
    pub(super) sizes: [usize; 4],
}

/// `gradient += scale · leftᵀ · right`, or the transposed sum.
struct Outer<'a, R: Runtime> {
    /// `[T, M]` in the precision's dtype.
    left: &'a Tensor<Gpu<R>>,
    /// `[T, N]` in the precision's dtype.
    right: &'a Tensor<Gpu<R>>,
    /// f32 `[M, N]`, or `[N, M]` if `transposed`.
    gradient: &'a mut Tensor<Gpu<R>>,
    scale: f32,
    transposed: bool,
    /// `T`, `M`, `N`.
    sizes: [usize; 3],
}

/// What factors are kept in.
pub(super) fn factors(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

impl<R: Runtime> Gpu<R> {
    /// A tensor in another dtype, or itself.
    pub(super) fn held<'a>(&self, tensor: &'a Tensor<Self>, dtype: DType) -> Result<Held<'a, R>> {
        if tensor.dtype() == dtype {
            return Ok(Held::Borrowed(tensor));
        }
        let mut made = self.alloc(dtype, tensor.shape())?;
        self.convert("linear", tensor, &mut made)?;
        Ok(Held::Made(made))
    }

    /// A frozen weight as the precision's products read it.
    pub(super) fn right<'a>(&self, weight: &'a Weight<Self>, precision: Precision) -> Result<Right<'a, R>> {
        match (weight, precision) {
            (Weight::Dense(tensor), Precision::F32) => Ok(Right::Dense(Held::Borrowed(tensor))),
            (Weight::Dense(tensor), Precision::Bf16) => Ok(Right::Dense(self.held(tensor, DType::BF16)?)),
            (Weight::Nf4(nf4), Precision::Bf16) if nf4.inputs % tensor::NF4_ROW != 0 => {
                let mut decoded = self.alloc(DType::BF16, [nf4.outputs, nf4.inputs])?;
                self.dequantize(weight, &mut decoded)?;
                Ok(Right::Dense(Held::Made(decoded)))
            }
            (Weight::Nf4(nf4), _) => Ok(Right::Nf4(nf4)),
        }
    }

    /// As [`Gpu::right`], for a layer's product of so many rows.
    fn right_of_rows<'a>(&self, weight: &'a Weight<Self>, precision: Precision, rows: usize) -> Result<Right<'a, R>> {
        let right = self.right(weight, precision)?;
        let Right::Nf4(nf4) = &right else {
            return Ok(right);
        };
        if precision == Precision::F32 || rows < self.inner.shared.rows().linear {
            return Ok(right);
        }
        let decoded = self.shared(&nf4.codes, || {
            let mut decoded = self.alloc(DType::BF16, [nf4.outputs, nf4.inputs])?;
            self.dequantize(weight, &mut decoded)?;
            Ok(decoded)
        })?;
        Ok(decoded.map_or(right, |decoded| Right::Dense(Held::Shared(decoded))))
    }

    pub(super) fn product(&self, precision: Precision, product: Product<'_, R>) -> Result<()> {
        match precision {
            Precision::F32 => self.exact_product(product),
            Precision::Bf16 if self.left_to_a_library(&product)? => Ok(()),
            Precision::Bf16 => self.tensor_product(product),
        }
    }

    fn outer(&self, precision: Precision, outer: Outer<'_, R>) -> Result<()> {
        match precision {
            Precision::F32 => self.exact_outer(outer),
            Precision::Bf16 => self.tensor_outer(outer),
        }
    }

    /// `dA += vᵀ · x` and `dB += s · dyᵀ · u`; the second as its transpose, so that both have few rows and many columns.
    fn adapter_gradients(
        &self,
        precision: Precision,
        lora: LoraBackward<'_, Self>,
        dy: &Tensor<Self>,
        v: &Tensor<Self>,
        sizes: LinearSizes,
    ) -> Result<()> {
        let x = self.held(lora.x, factors(precision))?;
        let down = Outer {
            left: v,
            right: &x,
            gradient: lora.gradient_a,
            scale: 1.0,
            transposed: false,
            sizes: [sizes.tokens, sizes.rank, sizes.inputs],
        };
        self.outer(precision, down)?;
        let hidden = self.held(lora.hidden, factors(precision))?;
        let up = Outer {
            left: &hidden,
            right: dy,
            gradient: lora.gradient_b,
            scale: lora.scale,
            transposed: true,
            sizes: [sizes.tokens, sizes.rank, sizes.outputs],
        };
        self.outer(precision, up)
    }
}

impl<R: Runtime> MatmulOps for Gpu<R> {
    fn linear_forward(&self, call: LinearForward<'_, Self>) -> Result<()> {
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = contract::linear_forward(&call)?;
        let (precision, dtype) = (call.precision, factors(call.precision));
        let x = self.held(call.x, dtype)?;
        let mut low_rank = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let a = Right::Dense(self.held(lora.a, dtype)?);
            let mut scaled = self.alloc(dtype, [tokens, rank])?;
            let down = Product {
                left: &x,
                right: &a,
                reads: Reads::Rows,
                second: None,
                bias: None,
                out: Some((lora.hidden, Write::Overwrite)),
                copy: Some((&mut scaled, lora.scale)),
                sizes: [tokens, rank, inputs, 0],
            };
            self.product(precision, down)?;
            drop(a);
            low_rank = Some((scaled, self.held(lora.b, dtype)?));
        }
        let right = self.right_of_rows(call.weight, precision, tokens)?;
        let whole = Product {
            left: &x,
            right: &right,
            reads: Reads::Rows,
            second: low_rank.as_ref().map(|(scaled, b)| (scaled, &**b)),
            bias: call.bias,
            out: Some((call.y, Write::Overwrite)),
            copy: None,
            sizes: [tokens, outputs, inputs, rank],
        };
        self.product(precision, whole)
    }

    fn linear_backward(&self, call: LinearBackward<'_, Self>) -> Result<()> {
        let sizes = contract::linear_backward(&call)?;
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = sizes;
        let (precision, dtype) = (call.precision, factors(call.precision));
        let dy = self.held(call.dy, dtype)?;
        let mut low_rank = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let b = Right::Dense(self.held(lora.b, dtype)?);
            let mut v = self.alloc(dtype, [tokens, rank])?;
            let up = Product {
                left: &dy,
                right: &b,
                reads: Reads::Columns,
                second: None,
                bias: None,
                out: None,
                copy: Some((&mut v, lora.scale)),
                sizes: [tokens, rank, outputs, 0],
            };
            self.product(precision, up)?;
            let a = self.held(lora.a, dtype)?;
            self.adapter_gradients(precision, lora, &dy, &v, sizes)?;
            low_rank = Some((v, a));
        }
        let Some(dx) = call.dx else {
            return Ok(());
        };
        let right = self.right_of_rows(call.weight, precision, tokens)?;
        let whole = Product {
            left: &dy,
            right: &right,
            reads: Reads::Columns,
            second: low_rank.as_ref().map(|(v, a)| (v, &**a)),
            bias: None,
            out: Some(dx),
            copy: None,
            sizes: [tokens, inputs, outputs, rank],
        };
        self.product(precision, whole)
    }
}
