//! Uploads: through two page-locked buffers and a stream of their own, so that the CPU fills one while the device reads the
//! other, and both while kernels run.
//!
//! Loading a checkpoint is one long row of uploads between quantisations. Copying from ordinary memory would make the driver
//! stage the bytes itself, at half the speed and with the queue stopped.

use std::sync::Arc;

use cudarc::driver::result::DriverError;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, PinnedHostSlice};

use super::launch;

/// Bytes of one buffer: at the 50 GB/s of PCIe 5 a third of a millisecond, against some microseconds a copy costs to queue.
const CHUNK_BYTES: usize = 16 << 20;
/// Up to here the driver's own way is faster: it puts the bytes into the queue itself.
const DIRECT_BYTES: usize = 64 << 10;

/// The copy stream and its buffers.
pub(super) struct Staging {
    copies: Arc<CudaStream>,
    /// The next buffer to fill is the first.
    buffers: Vec<Buffer>,
}

struct Buffer {
    memory: PinnedHostSlice<u8>,
    /// Recorded after the last copy out of the buffer.
    sent: CudaEvent,
}

impl Staging {
    /// Without buffers, which the first large upload makes.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        Ok(Self {
            copies: context.new_stream()?,
            buffers: Vec::new(),
        })
    }

    /// Overwrites a block from byte `first` on, after what `compute` has queued and before what it will queue. `bytes` may be
    /// reused when this returns. The caller has compared sizes.
    pub(super) fn upload(
        &mut self,
        compute: &Arc<CudaStream>,
        block: &CudaSlice<u8>,
        first: usize,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        if bytes.len() <= DIRECT_BYTES {
            return launch::upload(compute, block, first, bytes);
        }
        if self.buffers.is_empty() {
            self.buffers = vec![self.buffer()?, self.buffer()?];
        }
        self.copies.join(compute)?;
        for (index, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
            self.send(chunk, block, first + index * CHUNK_BYTES)?;
        }
        compute.join(&self.copies)
    }

    fn buffer(&self) -> Result<Buffer, DriverError> {
        let context = self.copies.context();
        Ok(Buffer {
            memory: launch::pinned(context, CHUNK_BYTES)?,
            sent: context.new_event(None)?,
        })
    }

    fn send(&mut self, chunk: &[u8], block: &CudaSlice<u8>, offset: usize) -> Result<(), DriverError> {
        self.buffers.rotate_left(1);
        let Some(buffer) = self.buffers.first_mut() else {
            return Ok(());
        };
        buffer.sent.synchronize()?; // an event that was never recorded does not wait
        let room = &mut buffer.memory.as_mut_slice()?[..chunk.len()];
        room.copy_from_slice(chunk);
        // Returns at once, since the memory is page-locked; nobody writes it until `sent` has happened.
        launch::upload(&self.copies, block, offset, room)?;
        buffer.sent.record(&self.copies)
    }
}

impl Drop for Staging {
    /// Buffers may not go while the device reads them. A failure here was or will be told by the compute stream.
    fn drop(&mut self) {
        let _ = self.copies.synchronize();
    }
}
