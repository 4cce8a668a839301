//! The emulated GPU of test builds: counters, and what the launcher checks.

use std::ffi::{CStr, CString, c_char};

#[repr(C)]
struct LaunchBounds {
    threads: u32,
    blocks: u32,
}

unsafe extern "C" {
    fn emulated_count(what: *const c_char) -> u64;
    fn emulated_argument_bytes(kernel: *const c_char) -> usize;
    fn emulated_launch_bounds(kernel: *const c_char) -> LaunchBounds;
    fn emulated_report_of(kernel: *const c_char) -> *const c_char;
}

/// What the device reports of `emulator/broken.cu`'s kernel `name`: `None` when it finds no fault.
#[must_use]
pub fn report_of(name: &CStr) -> Option<String> {
    // SAFETY: a string that ends with zero; one comes back, which stays until the next call.
    let report = unsafe { emulated_report_of(name.as_ptr()).as_ref() };
    // SAFETY: as above.
    report.map(|report| unsafe { CStr::from_ptr(report) }.to_string_lossy().into_owned())
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
