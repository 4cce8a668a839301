//! The emulated GPU of test builds: counters, and what the launcher checks.

use std::ffi::{CStr, CString, c_char, c_void};

use super::memory;
use crate::error::{Error, Result};

#[repr(C)]
struct LaunchBounds {
    threads: u32,
    blocks: u32,
}

unsafe extern "C" {
    fn emulated_count(what: *const c_char) -> u64;
    fn emulated_argument_bytes(kernel: *const c_char) -> usize;
    fn emulated_launch_bounds(kernel: *const c_char) -> LaunchBounds;
    fn emulated_report_of(kernel: *const c_char, data: u64, freed: u64) -> *const c_char;
    fn emulated_given(block: u64, stream: *mut c_void);
    fn emulated_taken_back(block: u64, stream: *mut c_void);
}

/// Bytes that the kernels of `emulator/broken.cu` are given.
const BROKEN_BYTES: usize = 64 * size_of::<f32>();

/// What the device reports of `emulator/broken.cu`'s kernel `name`, which is given memory of our pool, some
/// of it freed: `None` when it finds no fault.
///
/// # Errors
/// When there is no such memory.
pub fn report_of(name: &CStr) -> Result<Option<String>> {
    super::driver::load()?;
    let stream = std::ptr::null_mut();
    let mut blocks = [0_u64; 2];
    for block in &mut blocks {
        // SAFETY: valid for a write.
        if unsafe { memory::alloc_async(block, BROKEN_BYTES, stream) } != 0 {
            return Err(Error::bug("no memory for a broken kernel"));
        }
    }
    let [data, freed] = blocks;
    // SAFETY: the blocks are the pool's, freed once each. The name ends with zero; such a string comes back, which
    // stays until the next call.
    unsafe {
        memory::free_async(freed, stream);
        let report = emulated_report_of(name.as_ptr(), data, freed).as_ref();
        let report = report.map(|report| CStr::from_ptr(report).to_string_lossy().into_owned());
        memory::free_async(data, stream);
        Ok(report)
    }
}

/// Tells the device, in the stream's order, that a block of the pool is given out: what was in it is no more.
pub(super) fn given(block: u64, stream: *mut c_void) {
    // SAFETY: the device looks the block up.
    unsafe { emulated_given(block, stream) }
}

/// Tells it that nobody may touch the block from here on.
pub(super) fn taken_back(block: u64, stream: *mut c_void) {
    // SAFETY: as above.
    unsafe { emulated_taken_back(block, stream) }
}

/// How often this thread made something happen: `launches`, `graph launches`, `allocations`; or the
/// `bytes` of device memory that are allocated now.
#[must_use]
pub fn count(what: &CStr) -> u64 {
    // SAFETY: a string that ends with zero.
    unsafe { emulated_count(what.as_ptr()) }
}

/// Bytes of the struct that a kernel takes; 0 when there is no such kernel.
pub(super) fn argument_bytes(kernel: &str) -> usize {
    let kernel = CString::new(kernel).expect("no zero in a name");
    // SAFETY: a string that ends with zero.
    unsafe { emulated_argument_bytes(kernel.as_ptr()) }
}

/// Most threads of a kernel's blocks, and blocks of so many that a multiprocessor has room for.
pub(super) fn launch_bounds(kernel: &str) -> (usize, usize) {
    let kernel = CString::new(kernel).expect("no zero in a name");
    // SAFETY: a string that ends with zero.
    let bounds = unsafe { emulated_launch_bounds(kernel.as_ptr()) };
    (bounds.threads as usize, bounds.blocks as usize)
}
