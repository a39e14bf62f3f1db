//! Tasks that own unequal parts of an op's outputs: the rows of an expert, a head of a document.

use rayon::prelude::*;

use super::Cpu;

impl Cpu {
    /// Gives every part to `task`, in parallel. Parts are small enough and many enough that whichever thread is free takes
    /// the next; a result depends on its part only.
    pub(super) fn for_parts<P: Send>(&self, parts: Vec<P>, task: impl Fn(P) + Sync) {
        match &self.inner.threads {
            Some(threads) if parts.len() > 1 => {
                threads.install(|| parts.into_par_iter().with_max_len(1).for_each(&task));
            }
            _ => parts.into_iter().for_each(task),
        }
    }

    /// What `task` makes of every index below `count`, in order.
    pub(super) fn map<R: Send>(&self, count: usize, task: impl Fn(usize) -> R + Sync) -> Vec<R> {
        match &self.inner.threads {
            Some(threads) if count > 1 => {
                threads.install(|| (0..count).into_par_iter().with_max_len(1).map(&task).collect())
            }
            _ => (0..count).map(task).collect(),
        }
    }
}

/// Cuts `length` elements off the front of `rest`.
pub(super) fn take<'a, T>(rest: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (front, back) = std::mem::take(rest).split_at_mut(length);
    *rest = back;
    front
}
