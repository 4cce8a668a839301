//! [`Allocator`]: mimalloc, but the system's for blocks as large as the cache of a layer.
//!
//! mimalloc keeps what is freed, and makes zeros of it by writing them: the second engine of a process would
//! commit the memory of its whole cache at once. The system maps blocks of this size, zeros that take
//! memory when they are written, and takes them back when they are freed.
#![allow(unsafe_code)] // `GlobalAlloc` is an unsafe trait.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Bytes from which on every allocator of a system maps a block of its own.
const LARGE: usize = 32 << 20;

/// The global allocator of the Python extension.
#[derive(Debug)]
pub(crate) struct Allocator;

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE
}

// SAFETY: each block is handed on to the allocator that its size chooses, so to the same one each time;
// `realloc`'s default allocates and frees through these methods.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe { if is_large(layout) { System.alloc(layout) } else { MiMalloc.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe {
            if is_large(layout) {
                System.alloc_zeroed(layout)
            } else {
                MiMalloc.alloc_zeroed(layout)
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe {
            if is_large(layout) {
                System.dealloc(block, layout);
            } else {
                MiMalloc.dealloc(block, layout);
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !is_large(layout) && size < LARGE {
            // SAFETY: the caller's contract.
            return unsafe { MiMalloc.realloc(block, layout, size) };
        }
        if is_large(layout) && size >= LARGE {
            // SAFETY: the caller's contract.
            return unsafe { System.realloc(block, layout, size) };
        }
        // SAFETY: the caller's contract: with this alignment `size` does not overflow. The blocks are distinct, and
        // both have as many bytes as are copied.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                block.copy_to_nonoverlapping(moved, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}
