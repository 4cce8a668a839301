//! Memory that kernels share: aligned buffers, and outputs that threads write side by side.
#![allow(unsafe_code)] // Buffers that share a map, and writes to disjoint parts of one buffer.

use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

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

/// Memory for weights, cut from large pieces that the system may back with huge pages: these are
/// cleared faster, and reading them misses the address cache less often.
#[derive(Default)]
pub(super) struct Arena {
    /// The piece in use, and how many of its bytes are.
    latest: Mutex<Option<(Arc<Piece>, usize)>>,
}

struct Piece {
    start: NonNull<u8>,
    /// Keeps the memory.
    map: MmapMut,
}

// SAFETY: the pointer goes to the memory of `map`, which may be used from any thread.
unsafe impl Send for Piece {}
// SAFETY: the pointer is only followed by the `Buffer`s, each to its own part.
unsafe impl Sync for Piece {}

impl Piece {
    /// Bytes of a piece, unless a single buffer takes more.
    const LEN: usize = 32 << 20;

    fn new(len: usize) -> Option<Self> {
        let mut map = MmapMut::map_anon(len).ok()?;
        // Advice; a system without huge pages refuses it.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Self { start: NonNull::new(map.as_mut_ptr())?, map })
    }
}

impl Arena {
    /// `len` zero bytes that start on a cache line, or `None` when there is no such memory.
    pub(super) fn zeroed(&self, len: usize) -> Option<Buffer> {
        let taken = len.max(1).checked_next_multiple_of(CACHE_LINE)?;
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |&(ref piece, used): &(Arc<Piece>, usize)| taken <= piece.map.len() - used;
        let (piece, used) = match latest.take().filter(fits) {
            Some(piece) => piece,
            None => (Arc::new(Piece::new(taken.max(Piece::LEN))?), 0),
        };
        // SAFETY: the piece has `taken` bytes from `used` on.
        let start = unsafe { piece.start.add(used) };
        *latest = Some((Arc::clone(&piece), used + taken));
        Some(Buffer { start, len, _piece: piece })
    }
}

/// Bytes of an [`Arena`] that start on a cache line, all zero at first.
pub(super) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    _piece: Arc<Piece>,
}

// SAFETY: a `Buffer` owns its part of the piece, plain bytes, like a `Vec<u8>`.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `zeroed` gave these initialised bytes to this buffer alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
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

/// A vector of `len` numbers that `fill` writes, without clearing it first.
///
/// # Safety
/// `fill` writes every element.
pub(super) unsafe fn written_by(
    len: usize,
    fill: impl FnOnce(Shared<MaybeUninit<f32>>),
) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(Shared::new(&mut values.spare_capacity_mut()[..len]));
    // SAFETY: the capacity is there, and `fill` has written all `len` elements.
    unsafe { values.set_len(len) };
    values
}

/// `len` zeros that take memory when they are first written, also where the allocator has the memory from before: it
/// would write them.
pub(crate) fn untouched_zeros<T: Zero>(len: usize) -> Vec<T> {
    #[cfg(target_os = "linux")]
    if len * size_of::<T>() >= 1 << 20 {
        const PAGE: usize = 1 << 16; // the largest of the machines that we build for
        const HUGE: usize = 2 << 20;
        let mut zeros = Vec::<T>::with_capacity(len);
        let block = zeros.as_mut_ptr().cast::<u8>();
        let (mut start, bytes) = (block.align_offset(PAGE), len * size_of::<T>());
        if (block.addr() + start).is_multiple_of(HUGE) {
            // Where the process has huge pages of its own, the system keeps parts of them unless it refuses.
            start += PAGE;
        }
        let end = start + (bytes - start) / PAGE * PAGE;
        // SAFETY: the pages lie inside of the vector's own memory, which is anonymous and private: the system takes
        // them back and gives zeros for them, unless it is an emulated one that does nothing, which the first and
        // the last byte tell. What is before and behind them is written here, so all of it is zeros.
        unsafe {
            let ends = [block.add(start), block.add(end - 1)];
            ends[0].write_volatile(1);
            ends[1].write_volatile(1);
            if libc::madvise(block.add(start).cast(), end - start, libc::MADV_DONTNEED) == 0
                && ends[0].read_volatile() + ends[1].read_volatile() == 0
            {
                block.write_bytes(0, start);
                block.add(end).write_bytes(0, bytes - end);
                zeros.set_len(len);
                return zeros;
            }
        }
    }
    vec![T::default(); len]
}

/// Numbers whose default is zero.
///
/// # Safety
/// All bits zero is a value of the type, and its default.
pub(crate) unsafe trait Zero: Copy + Default {}
// SAFETY: IEEE 754 has it so.
unsafe impl Zero for f32 {}
// SAFETY: an integer.
unsafe impl Zero for u16 {}
// SAFETY: an integer.
unsafe impl Zero for i16 {}

/// Bytes that memory brings at once.
pub(super) const CACHE_LINE: usize = 64;

/// Asks for the cache line at `at`, a hint: nothing need be there.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(super) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it never faults, and every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
}

/// How far ahead a stream of weights is asked for, in bytes: further than the machine's own prefetcher goes, and past
/// the end of a panel to the next.
pub(super) const PREFETCH_DISTANCE: usize = 1024;

/// Asks for `lines` cache lines from `from` on.
#[inline(always)]
pub(super) fn prefetch_lines(from: *const u8, lines: usize) {
    for line in 0..lines {
        prefetch(from.wrapping_add(line * CACHE_LINE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_where_numbers_were() {
        for len in [1 << 19, (1 << 19) + 12_345, 3 << 20] {
            for _ in 0..3 {
                let mut numbers = untouched_zeros::<u16>(len);
                assert!(numbers.len() == len && numbers.iter().all(|&number| number == 0));
                numbers.fill(7);
            }
        }
    }
}
