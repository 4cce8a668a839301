//! Page-locked host memory, through which numbers go to and come from the device while the host goes on.
//!
//! Copies of ordinary memory may wait for all that is queued before them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, PinnedHostSlice, result,
};

use super::failed;
use super::launch::Address;
use crate::error::Result;

/// Words of the smallest buffer.
const LEAST_WORDS: usize = 1024;

/// The buffers that are used again and again.
#[derive(Default)]
pub(super) struct Staging {
    buffers: Mutex<Vec<Buffer>>,
}

/// Page-locked memory.
struct Buffer {
    memory: PinnedHostSlice<u32>,
    /// The end of the copy that used it last.
    copied: CudaEvent,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // After a fault of the device nothing copies any more.
        let _ = self.copied.synchronize();
    }
}

/// Numbers on their way to the host.
pub(super) struct Transfer {
    buffer: Buffer,
    len: usize,
}

impl Staging {
    /// Queues a copy of `numbers` to device memory.
    pub(super) fn copy_in(&self, stream: &CudaStream, numbers: &[u32], to: Address) -> Result<()> {
        let mut buffer = self.take(stream.context(), numbers.len())?;
        let staged = &mut buffer.memory.as_mut_slice().map_err(failed)?[..numbers.len()];
        staged.copy_from_slice(numbers);
        // SAFETY: callers give addresses of tensors with room for the numbers; the buffer is left as it is
        // until `copied`.
        unsafe { result::memcpy_htod_async(to, staged, stream.cu_stream()) }.map_err(failed)?;
        buffer.copied.record(stream).map_err(failed)?;
        self.give_back(buffer);
        Ok(())
    }

    /// Queues a copy of `len` words of device memory to the host.
    pub(super) fn copy_out(
        &self,
        stream: &CudaStream,
        from: Address,
        len: usize,
    ) -> Result<Transfer> {
        let mut buffer = self.take(stream.context(), len)?;
        let staged = &mut buffer.memory.as_mut_slice().map_err(failed)?[..len];
        // SAFETY: as above; nobody reads the buffer before `copied`.
        unsafe { result::memcpy_dtoh_async(staged, from, stream.cu_stream()) }.map_err(failed)?;
        buffer.copied.record(stream).map_err(failed)?;
        Ok(Transfer { buffer, len })
    }

    /// Waits for the end of a copy to the host.
    pub(super) fn finish(&self, transfer: Transfer) -> Result<Vec<u32>> {
        let Transfer { buffer, len } = transfer;
        buffer.copied.synchronize().map_err(failed)?;
        let words = buffer.memory.as_slice().map_err(failed)?[..len].to_vec();
        self.give_back(buffer);
        Ok(words)
    }

    /// A buffer of at least `len` words that no copy uses any more.
    fn take(&self, context: &Arc<CudaContext>, len: usize) -> Result<Buffer> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |buffer: &Buffer| buffer.memory.len() >= len && buffer.copied.is_complete();
        if let Some(found) = buffers.iter().position(is_free) {
            return Ok(buffers.swap_remove(found));
        }
        let len = len.max(LEAST_WORDS).next_power_of_two();
        // SAFETY: plain numbers, each written before it is read.
        let memory = unsafe { context.alloc_pinned_with_flags(len, 0) }.map_err(failed)?;
        Ok(Buffer { memory, copied: context.new_event(None).map_err(failed)? })
    }

    fn give_back(&self, buffer: Buffer) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}
