//! Cross-entropy, which has no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{LinearCrossEntropy, LossOps};

impl<R: Runtime> LossOps for Gpu<R> {
    fn linear_cross_entropy(&self, _: LinearCrossEntropy<'_, Self>) -> Result<()> {
        self.absent("linear_cross_entropy")
    }
}
