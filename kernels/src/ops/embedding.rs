//! Moving whole rows.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// Rows in and out of tables and caches.
pub trait EmbeddingOps: Device {
    /// `y[t] = table[ids[t]]`: `table` is dense `[V, C]` (f32, bf16 or f16), `ids` i32 `[T]`, `y` activation `[T, C]`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; an id that is negative or not below `V`.
    fn gather_rows(&self, table: &Weight<Self>, ids: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()>;

    /// `target[first + r] = source[r]` for every row of `source`; used for key/value caches. Same dtype and row length.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; rows beyond `target`'s end.
    fn copy_rows(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, first: usize) -> Result<()>;
}
