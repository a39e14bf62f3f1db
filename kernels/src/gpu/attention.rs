//! Attention, which has no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{AttentionBackward, AttentionForward, AttentionOps};

impl<R: Runtime> AttentionOps for Gpu<R> {
    fn attention_forward(&self, _: AttentionForward<'_, Self>) -> Result<()> {
        self.absent("attention_forward")
    }

    fn attention_backward(&self, _: AttentionBackward<'_, Self>) -> Result<()> {
        self.absent("attention_backward")
    }
}
