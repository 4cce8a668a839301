//! Stream-ordered device memory, behind `cuMemAllocAsync` and `cuMemFreeAsync`.
//!
//! Freed memory stays with its stream until that ends, and is given out again at once: what is freed in stream order may
//! be reused in stream order. So steps allocate nothing from the driver once one of their size has run,
//! and a captured graph finds its memory where it was. Memory that a graph knows never goes back to the driver
//! before its stream does, and must never go to something that outlives a step (see [`super::graph`]): weights
//! and caches are made before the first capture.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys;

/// Blocks are multiples of it: of every kernel's alignment, and of the driver's own. The emulated device's are
/// exact, so that it sees where each tensor ends.
const GRANULE: usize = if cfg!(feature = "cuda-emulator") { 1 } else { 512 };
/// What a block may be too large for what it is given for: this part of that.
const WASTE: usize = if cfg!(feature = "cuda-emulator") { usize::MAX } else { 4 };
const OUT_OF_MEMORY: c_int = 2;

/// Memory of all streams, by the stream's handle.
static POOLS: LazyLock<Mutex<HashMap<usize, Pool>>> = LazyLock::new(Mutex::default);

/// The driver's own `cuStreamDestroy_v2`.
pub(super) static DESTROY_STREAM: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

#[derive(Default)]
struct Pool {
    /// Free blocks by size.
    free: BTreeMap<usize, Vec<u64>>,
    /// Size of each block that the driver gave.
    sizes: HashMap<u64, usize>,
    /// Blocks that graphs know.
    kept: HashSet<u64>,
    /// While a graph is being captured: blocks that it knows.
    capturing: Option<Vec<u64>>,
    /// Bytes of the last request that failed.
    refused: Option<usize>,
}

impl Pool {
    /// Gives a block out.
    #[cfg_attr(not(feature = "cuda-emulator"), allow(unused_variables))]
    fn give(&mut self, block: u64, stream: *mut c_void) -> u64 {
        if let Some(blocks) = &mut self.capturing {
            blocks.push(block);
        }
        #[cfg(feature = "cuda-emulator")]
        super::emulator::given(block, stream);
        block
    }

    /// A free block of `size` bytes or a little more.
    fn take(&mut self, size: usize) -> Option<u64> {
        let (&found, blocks) = self.free.range_mut(size..=size + size / WASTE).next()?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&found);
        }
        block
    }

    /// Gives free blocks back to the driver, but for those that graphs know.
    fn trim(&mut self) {
        for blocks in self.free.values_mut() {
            for block in blocks.extract_if(.., |block| !self.kept.contains(block)) {
                self.sizes.remove(&block);
                // SAFETY: the driver gave the block, and nobody holds it.
                unsafe { sys::cuMemFree_v2(block) };
            }
        }
        self.free.retain(|_, blocks| !blocks.is_empty());
    }
}

/// As `cuMemAllocAsync`.
///
/// # Safety
/// `out` must be valid for a write.
pub(super) unsafe extern "C" fn alloc_async(
    out: *mut u64,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = pools.entry(stream as usize).or_default();
    let size = bytes.max(1).next_multiple_of(GRANULE);
    if let Some(block) = pool.take(size) {
        // SAFETY: the caller's contract.
        unsafe { out.write(pool.give(block, stream)) };
        return 0;
    }
    let mut block = 0;
    // SAFETY: `block` is valid for a write. Free blocks may still be in use by work that was queued
    // before they were freed, and the driver waits for that before it takes them back.
    let mut status = unsafe { sys::cuMemAlloc_v2(&raw mut block, size) } as c_int;
    if status == OUT_OF_MEMORY && !pool.free.is_empty() && pool.capturing.is_none() {
        pool.trim();
        // SAFETY: as above.
        status = unsafe { sys::cuMemAlloc_v2(&raw mut block, size) } as c_int;
    }
    match status {
        0 => {
            pool.sizes.insert(block, size);
            // SAFETY: the caller's contract.
            unsafe { out.write(pool.give(block, stream)) };
        }
        OUT_OF_MEMORY => pool.refused = Some(bytes),
        _ => {}
    }
    status
}

/// As `cuMemFreeAsync`.
///
/// # Safety
/// `block` must come from [`alloc_async`] with the same stream.
pub(super) unsafe extern "C" fn free_async(block: u64, stream: *mut c_void) -> c_int {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = pools.entry(stream as usize).or_default();
    let Some(&size) = pool.sizes.get(&block) else { return 1 }; // CUDA_ERROR_INVALID_VALUE
    #[cfg(feature = "cuda-emulator")]
    super::emulator::taken_back(block, stream);
    pool.free.entry(size).or_default().push(block);
    0
}

/// As `cuStreamDestroy_v2`, once all that was allocated on `stream` has been freed: tensors keep their
/// stream.
///
/// # Safety
/// `stream` must be one of the driver's.
pub(super) unsafe extern "C" fn destroy_stream(stream: *mut c_void) -> c_int {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mut pool) = pools.remove(&(stream as usize)) {
        pool.kept.clear();
        pool.trim();
    }
    // SAFETY: `load` left the driver's function of this type there before anybody could call this.
    let destroy: unsafe extern "C" fn(*mut c_void) -> c_int =
        unsafe { std::mem::transmute(DESTROY_STREAM.load(Ordering::Acquire)) };
    // SAFETY: the caller's contract.
    unsafe { destroy(stream) }
}

/// Says that a graph is being captured on `stream`.
pub(super) fn begin_capture(stream: *mut c_void) {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.entry(stream as usize).or_default().capturing = Some(Vec::new());
}

/// Says that it is no longer, and whether the graph is there.
pub(super) fn end_capture(stream: *mut c_void, is_kept: bool) {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = pools.entry(stream as usize).or_default();
    let blocks = pool.capturing.take().unwrap_or_default();
    if is_kept {
        pool.kept.extend(blocks);
    }
}

/// Gives what nobody holds back to the driver.
pub(super) fn trim(stream: *mut c_void) {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get_mut(&(stream as usize)) {
        pool.trim();
    }
}

/// Bytes of the last request that found no memory, once.
pub(super) fn refused(stream: *mut c_void) -> Option<usize> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.get_mut(&(stream as usize))?.refused.take()
}
