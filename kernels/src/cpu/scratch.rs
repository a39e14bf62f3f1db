//! Working memory: from the tensors' pool for what is large, per thread for what is small.

use std::cell::RefCell;
use std::marker::PhantomData;

use bytemuck::Pod;

use super::Cpu;
use super::memory::{Buffer, Line};
use crate::error::Result;

/// Elements from the pool, with unspecified contents; given back when dropped. Counted in the memory statistics.
pub(super) struct Scratch<T> {
    buffer: Buffer,
    element: PhantomData<T>,
}

impl<T: Pod> Scratch<T> {
    pub(super) fn values(&self) -> &[T] {
        bytemuck::cast_slice(self.buffer.bytes())
    }

    pub(super) fn values_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.buffer.bytes_mut())
    }
}

impl Cpu {
    /// Working memory of `count` elements.
    pub(super) fn scratch<T: Pod>(&self, count: usize) -> Result<Scratch<T>> {
        Ok(Scratch {
            buffer: self.inner.memory.take(count * size_of::<T>())?,
            element: PhantomData,
        })
    }
}

thread_local! {
    static LOCAL: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Gives `work` a buffer of this thread's, with unspecified contents. Calls nest; each level has a buffer of its own.
pub(super) fn with_local<T: Pod, R>(count: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    let mut lines = LOCAL.with_borrow_mut(Vec::pop).unwrap_or_default();
    let needed = (count * size_of::<T>()).div_ceil(size_of::<Line>());
    if lines.len() < needed {
        lines.resize(needed, bytemuck::Zeroable::zeroed());
    }
    let result = work(&mut bytemuck::cast_slice_mut(&mut lines)[..count]);
    LOCAL.with_borrow_mut(|free| free.push(lines));
    result
}
