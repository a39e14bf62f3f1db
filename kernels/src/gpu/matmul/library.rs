//! Plain products that a library of the device's maker may do instead: where it wins, by a table.
//!
//! A product is plain when its right factor is dense bf16, everything is bf16, and nothing is added or written beside it: no bias, no
//! adapter, no copy. Those are the products of dense weights and of weights that were decoded once (`shared`).
//!
//! Not measured. By the roofline: a large plain product is limited by arithmetic, where this crate's portable tile reads its
//! fragments through shared memory at three quarters of what that gives, and the library's have no such limit on any target. A
//! small one is limited by reading the weight, which both do at the memory's speed, and the library's choice costs the host
//! microseconds more. So: from where arithmetic takes twice as long as reading the operands.

use super::super::{Gpu, Runtime, Span};
use super::{Product, Reads, Right};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Write;

/// The shape of a plain product: `out [M, N] = left [M, K] · right`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlainForm {
    /// `M`.
    pub rows: usize,
    /// `N`.
    pub columns: usize,
    /// `K`.
    pub depth: usize,
    /// Whether the right factor is `[N, K]`, each row a column of the result; otherwise it is `[K, N]`.
    pub reads_rows: bool,
}

/// A plain product of bf16 operands with f32 sums.
pub struct PlainProduct<'a, M> {
    /// Its shape.
    pub form: PlainForm,
    /// Row-major `[M, K]`.
    pub left: Span<'a, M>,
    /// Row-major, as the form says.
    pub right: Span<'a, M>,
    /// Row-major `[M, N]`.
    pub out: Span<'a, M>,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
}

/// FLOPs of a tensor core's device for each byte its memory moves: 330 on an H100, 206 on an H200, 153 on an A100.
const FLOPS_PER_BYTE: usize = 330;

/// The least rows, columns and depth: what a large tile of the library's has.
const LEAST: [usize; 3] = [256, 256, 256];

impl PlainForm {
    /// Whether the library is expected to win.
    fn is_worth_it(self) -> bool {
        let Self {
            rows, columns, depth, ..
        } = self;
        let bytes = 2 * (rows * columns + rows * depth + columns * depth);
        let is_large = [rows, columns, depth]
            .iter()
            .zip(LEAST)
            .all(|(size, least)| *size >= least);
        is_large && rows * columns * depth >= FLOPS_PER_BYTE * bytes
    }
}

impl<R: Runtime> Gpu<R> {
    /// Leaves a product to the runtime's library, if it is plain, worth it, and there is one; `false` if not.
    pub(in crate::gpu) fn left_to_a_library(&self, product: &Product<'_, R>) -> Result<bool> {
        let Some(plain) = plain(product) else {
            return Ok(false);
        };
        if !plain.form.is_worth_it() {
            return Ok(false);
        }
        self.tape().launches("plain product", false)?;
        self.runtime().plain_product(&plain)
    }
}

fn plain<'a, R: Runtime>(product: &'a Product<'_, R>) -> Option<PlainProduct<'a, R::Memory>> {
    let [rows, columns, depth, _] = product.sizes;
    let Right::Dense(right) = product.right else {
        return None;
    };
    let (out, write) = product.out.as_ref()?;
    let is_half = [right, product.left, out]
        .iter()
        .all(|tensor| tensor.dtype() == DType::BF16);
    if !is_half || product.second.is_some() || product.bias.is_some() || product.copy.is_some() {
        return None;
    }
    Some(PlainProduct {
        form: PlainForm {
            rows,
            columns,
            depth,
            reads_rows: product.reads == Reads::Rows,
        },
        left: product.left.buffer().span()?,
        right: right.buffer().span()?,
        out: out.buffer().span()?,
        accumulate: *write == Write::Accumulate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form([rows, columns, depth]: [usize; 3]) -> PlainForm {
        PlainForm {
            rows,
            columns,
            depth,
            reads_rows: true,
        }
    }

    #[test]
    fn a_library_is_asked_for_products_that_arithmetic_limits_and_for_no_others() {
        for sizes in [[4096, 12_288, 2048], [16_384, 2048, 4096], [4096, 4096, 2048]] {
            assert!(form(sizes).is_worth_it(), "{sizes:?}");
        }
        // Few rows; a router's few columns; an adapter's rank.
        for sizes in [
            [64, 12_288, 2048],
            [512, 2048, 2048],
            [16_384, 64, 2048],
            [16_384, 2048, 16],
        ] {
            assert!(!form(sizes).is_worth_it(), "{sizes:?}");
        }
    }
}
