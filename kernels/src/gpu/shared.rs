//! Frozen 4-bit weights decoded once for several products.
//!
//! A fused product decodes a weight anew for each tile of rows. With many rows it is cheaper to decode it into memory once, above
//! all when two products follow each other on the same weight: a layer that computes its forward pass again before its backward
//! pass. [`Device::sharing`](crate::ops::Device::sharing) is the scope of such work; what was decoded in it is freed when it ends.
//! The products are the same with either weight, element for element, so no bit of any result depends on the choice.
//!
//! | by the roofline, not measured | |
//! |---|---|
//! | decoding one element once | 0.53 bytes read, 2 written: 0.6 ps at 4.3 TB/s |
//! | what a dense product saves | a quarter of its time (shared memory is at three quarters with bf16 weights, full with NF4): 1.2 fs for each row at 400 TFLOP/s |
//! | they are equal | at 470 rows for one product, 240 for two |
//!
//! The thresholds are twice that for linear layers, whose fused product also keeps the weight's memory small, and just that for an
//! expert's mean rows, whose lower tiles decode twice as often.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::{Gpu, Runtime};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// From how many rows on a weight is decoded once in a scope that shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRows {
    /// Rows of a linear layer.
    pub linear: usize,
    /// Mean rows of an expert.
    pub experts: usize,
}

/// By the roofline; see the module's head.
pub const SHARED_ROWS: SharedRows = SharedRows {
    linear: 512,
    experts: 240,
};

/// The scope at hand.
pub(super) struct Shared<R: Runtime> {
    linear: AtomicUsize,
    experts: AtomicUsize,
    scope: Mutex<Option<Scope<R>>>,
}

struct Scope<R: Runtime> {
    thread: ThreadId,
    depth: usize,
    /// By the address of the codes, which live as long as the scope: block and first byte.
    decoded: HashMap<(usize, usize), Arc<Tensor<Gpu<R>>>>,
}

impl<R: Runtime> Shared<R> {
    pub(super) fn new() -> Self {
        Self {
            linear: AtomicUsize::new(SHARED_ROWS.linear),
            experts: AtomicUsize::new(SHARED_ROWS.experts),
            scope: Mutex::new(None),
        }
    }

    pub(super) fn rows(&self) -> SharedRows {
        SharedRows {
            linear: self.linear.load(Ordering::Relaxed),
            experts: self.experts.load(Ordering::Relaxed),
        }
    }

    fn scope(&self) -> MutexGuard<'_, Option<Scope<R>>> {
        self.scope.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this thread may share from here on; another thread's scope is not joined.
    pub(super) fn enter(&self) -> bool {
        let thread = std::thread::current().id();
        match &mut *self.scope() {
            Some(scope) if scope.thread == thread => scope.depth += 1,
            Some(_) => return false,
            free => {
                *free = Some(Scope {
                    thread,
                    depth: 1,
                    decoded: HashMap::new(),
                });
            }
        }
        true
    }

    pub(super) fn leave(&self) {
        let mut scope = self.scope();
        let ended = match &mut *scope {
            Some(open) if open.depth > 1 => {
                open.depth -= 1;
                None
            }
            _ => scope.take(),
        };
        drop(scope);
        drop(ended); // frees tensors, which takes other locks
    }
}

impl<R: Runtime> Gpu<R> {
    /// Changes from how many rows on weights are decoded once; [`SHARED_ROWS`] until then.
    pub fn share_from(&self, rows: SharedRows) {
        self.inner.shared.linear.store(rows.linear, Ordering::Relaxed);
        self.inner.shared.experts.store(rows.experts, Ordering::Relaxed);
    }

    /// The decoded form of a weight with these codes, made by `decode` if the scope at hand has none yet. `None` outside a scope,
    /// and where there is no memory for it: the fused product needs none.
    pub(super) fn shared(
        &self,
        codes: &Tensor<Self>,
        decode: impl FnOnce() -> Result<Tensor<Self>>,
    ) -> Result<Option<Arc<Tensor<Self>>>> {
        let thread = std::thread::current().id();
        let Some(span) = codes.buffer().span() else {
            return Ok(None);
        };
        let key = (Arc::as_ptr(span.memory).addr(), span.first);
        match &*self.inner.shared.scope() {
            Some(scope) if scope.thread == thread => {
                if let Some(known) = scope.decoded.get(&key) {
                    return Ok(Some(Arc::clone(known)));
                }
            }
            _ => return Ok(None),
        }
        let decoded = match decode() {
            Ok(decoded) => Arc::new(decoded),
            Err(Error::OutOfMemory { .. }) => return Ok(None),
            Err(other) => return Err(other),
        };
        if let Some(scope) = &mut *self.inner.shared.scope() {
            scope.decoded.insert(key, Arc::clone(&decoded));
        }
        Ok(Some(decoded))
    }
}
