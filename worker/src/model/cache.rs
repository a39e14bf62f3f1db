//! Keys and values of the positions decoded so far.

use brightrun_kernels::{Backend, DType, Error, Tensor};

use crate::error::Result;

/// One layer's key/value cache for one document.
pub struct KeyValueCache<B: Backend> {
    /// Activation `[capacity, K·D]`; `None` only inside [`KeyValueCache::with_heads`] and after an error there.
    tensors: Option<(Tensor<B>, Tensor<B>)>,
    capacity: usize,
    width: usize,
    length: usize,
}

impl<B: Backend> KeyValueCache<B> {
    /// An empty cache for up to `capacity` positions of `width` values.
    ///
    /// # Errors
    /// The backend's own.
    pub fn new(device: &B, dtype: DType, capacity: usize, width: usize) -> Result<Self> {
        let tensors = (
            device.zeros(dtype, [capacity, width])?,
            device.zeros(dtype, [capacity, width])?,
        );
        Ok(Self {
            tensors: Some(tensors),
            capacity,
            width,
            length: 0,
        })
    }

    /// Positions it holds.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Adds the keys and values of the next positions, `[T, K, D]`.
    ///
    /// # Errors
    /// When they do not fit; the backend's own.
    pub fn append(&mut self, device: &B, k: Tensor<B>, v: Tensor<B>) -> Result<()> {
        let rows = k.shape().elements() / self.width;
        let (keys, values) = self.tensors.as_mut().ok_or_else(lost)?;
        device.copy_rows(&k.reshaped([rows, self.width])?, keys, self.length)?;
        device.copy_rows(&v.reshaped([rows, self.width])?, values, self.length)?;
        self.length += rows;
        Ok(())
    }

    /// Lends the cache as `[capacity, K, D]` tensors.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn with_heads<T>(
        &mut self,
        head_dim: usize,
        work: impl FnOnce(&Tensor<B>, &Tensor<B>) -> Result<T>,
    ) -> Result<T> {
        let (keys, values) = self.tensors.take().ok_or_else(lost)?;
        let heads = [self.capacity, self.width / head_dim, head_dim];
        let (keys, values) = (keys.reshaped(heads)?, values.reshaped(heads)?);
        let result = work(&keys, &values)?;
        let rows = [self.capacity, self.width];
        self.tensors = Some((keys.reshaped(rows)?, values.reshaped(rows)?));
        Ok(result)
    }
}

fn lost() -> Error {
    Error::Value {
        op: "key_value_cache",
        argument: "cache",
        problem: "was lost in an earlier error".to_owned(),
    }
}
