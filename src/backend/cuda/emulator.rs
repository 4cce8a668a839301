//! The emulated GPU of test builds: counters, and what the launcher checks.

use std::ffi::{CStr, CString, c_char};

unsafe extern "C" {
    fn emulated_count(what: *const c_char) -> u64;
    fn emulated_argument_bytes(kernel: *const c_char) -> usize;
}

/// How often something happened in this process: `launches`, `graph launches`, `allocations`; or the
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
