//! Cutting an op into tasks for the threads.
//!
//! A task owns whole rows of the output, so no two tasks write the same place. How many rows a task has never changes a
//! result: rows do not depend on each other.

use rayon::prelude::*;

use super::Cpu;
use crate::error::{Error, Result};

/// Elements below which a task is not worth another thread.
const TASK_ELEMENTS: usize = 16 * 1024;

/// A pool of `count` threads; none for one thread, whose work the caller does itself.
pub(super) fn start(count: usize) -> Result<Option<rayon::ThreadPool>> {
    if count <= 1 {
        return Ok(None);
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|index| format!("brightrun-cpu-{index}"))
        .build()
        .map(Some)
        .map_err(|error| Error::Device {
            op: "starting threads",
            message: error.to_string(),
        })
}

/// Rows of `width` elements that make a task of a worthwhile size.
pub(super) fn rows_per_task(width: usize) -> usize {
    (TASK_ELEMENTS / width.max(1)).max(1)
}

impl Cpu {
    /// Runs `task(index)` for every index below `count`, in parallel.
    pub(super) fn for_each(&self, count: usize, task: impl Fn(usize) + Sync) {
        match &self.inner.threads {
            Some(threads) if count > 1 => {
                threads.install(|| (0..count).into_par_iter().with_max_len(1).for_each(&task))
            }
            _ => (0..count).for_each(task),
        }
    }

    /// Gives each item to `task`, in parallel.
    pub(super) fn for_each_item<T: Send>(&self, items: Vec<T>, task: impl Fn(T) + Sync) {
        match &self.inner.threads {
            Some(threads) if items.len() > 1 => {
                threads.install(|| items.into_par_iter().with_max_len(1).for_each(&task));
            }
            _ => items.into_iter().for_each(task),
        }
    }

    /// Gives each element of `items` with its index to `task`, in parallel.
    pub(super) fn for_items<T: Send>(&self, items: &mut [T], task: impl Fn(usize, &mut T) + Sync) {
        self.for_each_item(items.iter_mut().enumerate().collect(), |(index, item)| {
            task(index, item)
        });
    }

    /// Gives `task` groups of whole rows of `data` with the index of their first row, in parallel.
    pub(super) fn for_rows<T: Send>(&self, data: &mut [T], width: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        if data.is_empty() {
            return;
        }
        let rows = rows_per_task(width);
        let task = |(index, chunk): (usize, &mut [T])| task(index * rows, chunk);
        match &self.inner.threads {
            Some(threads) if data.len() > rows * width => {
                threads.install(|| data.par_chunks_mut(rows * width).enumerate().for_each(task));
            }
            _ => data.chunks_mut(rows * width).enumerate().for_each(task),
        }
    }

    /// As [`Cpu::for_rows`] for two outputs with the same number of rows, of `widths` elements.
    pub(super) fn for_rows2<T: Send, U: Send>(
        &self,
        data: (&mut [T], &mut [U]),
        widths: (usize, usize),
        task: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        if data.0.is_empty() || data.1.is_empty() {
            return;
        }
        let rows = rows_per_task(widths.0);
        let (first, second) = (rows * widths.0, rows * widths.1);
        let task = |(index, (a, b)): (usize, (&mut [T], &mut [U]))| task(index * rows, a, b);
        match &self.inner.threads {
            Some(threads) if data.0.len() > first => threads.install(|| {
                let pairs = data.0.par_chunks_mut(first).zip(data.1.par_chunks_mut(second));
                pairs.enumerate().for_each(task);
            }),
            _ => {
                let pairs = data.0.chunks_mut(first).zip(data.1.chunks_mut(second));
                pairs.enumerate().for_each(task);
            }
        }
    }
}
