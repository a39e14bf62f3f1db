//! The causal convolution, which has no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{ConvolutionBackward, ConvolutionForward, ConvolutionOps};

impl<R: Runtime> ConvolutionOps for Gpu<R> {
    fn convolution_forward(&self, _: ConvolutionForward<'_, Self>) -> Result<()> {
        self.absent("convolution_forward")
    }

    fn convolution_backward(&self, _: ConvolutionBackward<'_, Self>) -> Result<()> {
        self.absent("convolution_backward")
    }
}
