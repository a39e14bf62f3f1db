//! Frozen linear layers, which have no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{LinearBackward, LinearForward, MatmulOps};

impl<R: Runtime> MatmulOps for Gpu<R> {
    fn linear_forward(&self, _: LinearForward<'_, Self>) -> Result<()> {
        self.absent("linear_forward")
    }

    fn linear_backward(&self, _: LinearBackward<'_, Self>) -> Result<()> {
        self.absent("linear_backward")
    }
}
