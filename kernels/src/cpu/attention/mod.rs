//! Causal attention in blocks of 64 queries by 64 keys.
//!
//! A task is one head of one document (forward: a stretch of its queries). It brings its rows into the element type of the
//! products and into panels once, and then works through pairs of blocks that fit the first-level cache. Results go to a
//! region of their own and from there to their places, so tasks share nothing.

mod backward;
mod blocks;
mod forward;

use super::{Cpu, Products};
use crate::contract;
use crate::error::Result;
use crate::ops::{AttentionBackward, AttentionForward, AttentionOps};

/// Queries, and keys, of a block.
const BLOCK: usize = 64;

/// Scores of a pair of blocks.
const SCORES: usize = BLOCK * BLOCK;

impl AttentionOps for Cpu {
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()> {
        let sizes = contract::attention_forward(&call)?;
        match self.products(call.precision) {
            Products::Single { rounded } => self.attend::<f32>(call, sizes, rounded),
            Products::Half => self.attend::<u16>(call, sizes, true),
        }
    }

    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()> {
        let sizes = contract::attention_backward(&call)?;
        match self.products(call.precision) {
            Products::Single { rounded } => self.attend_backward::<f32>(call, sizes, rounded),
            Products::Half => self.attend_backward::<u16>(call, sizes, true),
        }
    }
}

/// Cuts a buffer into consecutive parts of the given lengths.
fn cut<T>(mut buffer: &mut [T], lengths: impl IntoIterator<Item = usize>) -> Vec<&mut [T]> {
    let mut parts = Vec::new();
    for length in lengths {
        let (part, rest) = buffer.split_at_mut(length);
        parts.push(part);
        buffer = rest;
    }
    parts
}
