//! The gated delta rule, which has no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaOps};

impl<R: Runtime> DeltaOps for Gpu<R> {
    fn delta_rule_forward(&self, _: DeltaForward<'_, Self>) -> Result<()> {
        self.absent("delta_rule_forward")
    }

    fn delta_rule_backward(&self, _: DeltaBackward<'_, Self>) -> Result<()> {
        self.absent("delta_rule_backward")
    }

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        self.open_delta_gates(call)
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        self.close_delta_gates(call)
    }
}
