//! Memory that kernels share: aligned buffers, and outputs that threads write side by side.
#![allow(unsafe_code)] // Allocation by hand, and writes to disjoint parts of one buffer.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of memory that the machine has, where the system tells.
pub(super) fn physical_memory() -> Option<usize> {
    #[cfg(unix)]
    {
        // SAFETY: `sysconf` only returns a number.
        let (pages, size) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        usize::try_from(pages).ok()?.checked_mul(usize::try_from(size).ok()?)
    }
    #[cfg(not(unix))]
    None
}

/// Bytes that start on a cache line, all zero at first.
pub(super) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a `Buffer` owns plain bytes, like a `Vec<u8>`.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes, or `None` when there is no such size.
    pub(super) fn zeroed(len: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len.max(1), 64).ok()?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Some(Self { start, layout })
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `zeroed` allocated and initialised that many bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `zeroed` allocated it with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// A slice whose disjoint parts are written by several threads.
#[derive(Clone, Copy)]
pub(super) struct Shared<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: the methods are unsafe and demand that threads touch disjoint parts.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// The elements `start..start + len`.
    ///
    /// # Panics
    /// When they do not lie within the slice.
    ///
    /// # Safety
    /// The slice that `self` was made of is still borrowed, and no other reference to these elements
    /// is alive at the same time.
    pub(super) unsafe fn part<'a>(&self, start: usize, len: usize) -> &'a mut [T]
    where
        T: 'a,
    {
        assert!(start <= self.len && len <= self.len - start, "a part outside of its slice");
        // SAFETY: within the slice as just checked; not aliased by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Pointer to element `index`.
    ///
    /// # Panics
    /// When there is none.
    pub(super) fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "an element outside of its slice");
        self.start.wrapping_add(index)
    }
}

/// A vector of `len` floats that `fill` writes, without clearing it first.
///
/// # Safety
/// `fill` writes every element.
pub(super) unsafe fn written_by(len: usize, fill: impl FnOnce(Shared<f32>)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(Shared { start: values.as_mut_ptr(), len });
    // SAFETY: the capacity is there, and `fill` has written all `len` elements.
    unsafe { values.set_len(len) };
    values
}
