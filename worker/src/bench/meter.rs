//! What a device tells of itself beyond its ops.

use crate::error::Result;

/// A device's own clock and memory.
pub trait Meter {
    /// The device's work that is queued from here on counts, until [`Meter::end`]; once begun, beginning again changes nothing.
    fn begin(&self);

    /// Seconds the device took, by its own clock, from the beginning until what is queued by now is done. `None` where the
    /// device has no such clock.
    ///
    /// # Errors
    /// The device's own.
    fn end(&self) -> Result<Option<f64>>;

    /// Bytes of the device's memory that are in use, by whomever.
    ///
    /// # Errors
    /// The device's own.
    fn device_bytes(&self) -> Result<Option<u64>>;

    /// Bytes that the device can still give.
    ///
    /// # Errors
    /// The device's own.
    fn room(&self) -> Result<Option<u64>>;
}

/// For devices that tell nothing and live in the host's memory.
#[derive(Clone, Copy, Debug)]
pub struct NoMeter;

impl Meter for NoMeter {
    fn begin(&self) {}

    fn end(&self) -> Result<Option<f64>> {
        Ok(None)
    }

    fn device_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn room(&self) -> Result<Option<u64>> {
        Ok(crate::host::available_memory().ok())
    }
}
