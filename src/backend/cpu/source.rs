//! [`Source`]: how the weights of a panel are read, for each form that they are packed in.
#![allow(unsafe_code)] // Weights are read through raw pointers.

use std::marker::PhantomData;

use half::{bf16, f16};

use super::lanes::{Element, LANES, Lanes, array_of};
use super::memory::{CACHE_LINE, PREFETCH_DISTANCE, prefetch_lines};
use super::pack::PANEL;
use super::product::{Dot, Exact};
#[cfg(target_arch = "x86_64")]
use super::product::{IntegerDot, PairProduct};
#[cfg(target_arch = "x86_64")]
use super::x86_words::{Integers, PairWords, Pairs};
use crate::weights::Encoding;

/// Bytes of [`Dot::Weights`] in memory.
const WEIGHTS_BYTES: usize = 4 * LANES;

/// How the weights of a panel are read (see [`super::pack`] for the layout).
pub(super) trait Source<P: Dot> {
    /// What is loaded once for all steps of a group.
    type Raw: Copy;
    /// f16 vectors in front of each block: none, scales, or scales and minima.
    const SCALES: usize;
    /// Groups per block.
    const GROUPS: usize;
    /// Steps per group, at most 8.
    const STEPS: usize;
    /// Bytes of a group, both tiles.
    const BYTES: usize;
    /// What the numbers are stored plus, where [`Dot::start`] takes it away.
    const OFFSET: i32 = 0;
    /// Whether several rows meet both tiles at once on a wide machine. Sums and totals of eight then take more
    /// registers than there are (not with [`Self::TWO_BLOCKS`]), but an activation is read once.
    const BOTH_TILES: bool = true;
    /// Whether a wide machine computes two blocks at once, of four rows at most: 16 sums, as many as products are under way
    /// at any time, and 8 totals. Blocks have scales then, since sums without them go on from block to block.
    const TWO_BLOCKS: bool = false;

    /// # Safety
    /// `group` points to a whole group; `tile` is 0 or 1.
    unsafe fn raw(group: *const u8, tile: usize) -> Self::Raw;
    /// # Safety
    /// `raw` was made of a group that is still there, and `step` is below `STEPS`.
    unsafe fn weights(raw: Self::Raw, step: usize) -> P::Weights;
    /// The same without [`Self::OFFSET`].
    ///
    /// # Safety
    /// As for `weights`.
    #[inline(always)]
    unsafe fn numbers(raw: Self::Raw, step: usize) -> P::Weights {
        // SAFETY: the caller's contract.
        unsafe { Self::weights(raw, step) }
    }
}

/// Numbers that widen to f32; `SCALES` 1 for `Q8_0`.
pub(super) struct Plain<E, const SCALES: usize, const GROUPS: usize>(PhantomData<E>);

impl<L: Lanes, E: Element, const SCALES: usize, const GROUPS: usize> Source<Exact<L>>
    for Plain<E, SCALES, GROUPS>
{
    type Raw = *const E;
    const SCALES: usize = SCALES;
    const GROUPS: usize = GROUPS;
    const STEPS: usize = 8;
    const BYTES: usize = 8 * PANEL * size_of::<E>();

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> *const E {
        group.cast::<E>().wrapping_add(tile * LANES)
    }
    #[inline(always)]
    unsafe fn weights(raw: *const E, step: usize) -> L {
        // SAFETY: the caller's contract; a group holds 8 steps of two tiles.
        unsafe { E::load(raw.add(step * PANEL)) }
    }
}

/// 4-bit numbers: `Q4_0` with `OFFSET` 8, `Q4_1` with 0.
pub(super) struct Nibbles<const OFFSET: usize>;

impl<L: Lanes, const OFFSET: usize> Source<Exact<L>> for Nibbles<OFFSET> {
    type Raw = L::Bits;
    const SCALES: usize = if OFFSET == 0 { 2 } else { 1 };
    const GROUPS: usize = 4;
    const STEPS: usize = 8;
    const BYTES: usize = PANEL * 4;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> L::Bits {
        // SAFETY: the caller's contract; a tile has 64 bytes.
        unsafe { L::load_bits(group.add(tile * 64)) }
    }
    #[inline(always)]
    unsafe fn weights(raw: L::Bits, step: usize) -> L {
        let shift = 16 * (step % 2) + 4 * (step / 2);
        L::nibble(raw, shift as u32, OFFSET as f32)
    }
}

#[cfg(target_arch = "x86_64")]
impl<const OFFSET: usize> Source<PairProduct> for Nibbles<OFFSET> {
    type Raw = Pairs;
    const SCALES: usize = if OFFSET == 0 { 2 } else { 1 };
    const GROUPS: usize = 4;
    const STEPS: usize = 4;
    const BYTES: usize = PANEL * 4;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> Pairs {
        // SAFETY: the caller's contract; a tile has 64 bytes.
        unsafe { Pairs::load(group.add(tile * 64)) }
    }
    #[inline(always)]
    unsafe fn weights(raw: Pairs, step: usize) -> Pairs {
        raw.nibble::<OFFSET>(step)
    }
}

#[cfg(target_arch = "x86_64")]
impl<I: Integers, const OFFSET: usize> Source<IntegerDot<I>> for Nibbles<OFFSET> {
    type Raw = I;
    const SCALES: usize = if OFFSET == 0 { 2 } else { 1 };
    const GROUPS: usize = 4;
    const STEPS: usize = 4;
    const BYTES: usize = PANEL * 4;
    const OFFSET: i32 = OFFSET as i32;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> I {
        // SAFETY: the caller's contract; a tile has 64 bytes.
        unsafe { I::load(group.add(tile * 64)) }
    }
    #[inline(always)]
    unsafe fn weights(raw: I, step: usize) -> I {
        raw.nibble(step)
    }
    #[inline(always)]
    unsafe fn numbers(raw: I, step: usize) -> I {
        raw.nibble(step).minus(I::splat(OFFSET as i32 * 0x1_0001))
    }
}

/// Pairs of bf16.
#[cfg(target_arch = "x86_64")]
pub(super) struct DensePairs;

#[cfg(target_arch = "x86_64")]
impl Source<PairProduct> for DensePairs {
    type Raw = *const u8;
    const SCALES: usize = 0;
    const GROUPS: usize = 1;
    const STEPS: usize = 4;
    const BYTES: usize = PANEL * 16;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> *const u8 {
        group.wrapping_add(tile * 64)
    }
    #[inline(always)]
    unsafe fn weights(raw: *const u8, step: usize) -> Pairs {
        // SAFETY: the caller's contract; a step has 128 bytes.
        unsafe { Pairs::load(raw.add(step * 128)) }
    }
}

/// Pairs of i8 with scales.
#[cfg(target_arch = "x86_64")]
pub(super) struct BytePairs;

#[cfg(target_arch = "x86_64")]
impl<P: Dot<Weights: PairWords>> Source<P> for BytePairs {
    type Raw = *const u8;
    const SCALES: usize = 1;
    const GROUPS: usize = 4;
    const STEPS: usize = 4;
    const BYTES: usize = PANEL * 8;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> *const u8 {
        group.wrapping_add(tile * 32)
    }
    #[inline(always)]
    unsafe fn weights(raw: *const u8, step: usize) -> P::Weights {
        // SAFETY: the caller's contract; a step has 64 bytes.
        unsafe { P::Weights::load_i8(raw.add(step * 64)) }
    }
}

/// What [`unpack`] makes of a source with as many `SCALES`: numbers as they are multiplied, `[group][tile][step][16]`. A
/// tile's steps of a group lie together: every other cache line would be half of the sets of the first-level cache.
pub(super) struct Unpacked<const SCALES: usize>;

impl<P: Dot, const SCALES: usize> Source<P> for Unpacked<SCALES> {
    type Raw = *const u8;
    const SCALES: usize = SCALES;
    const GROUPS: usize = if SCALES == 0 { 1 } else { 4 };
    const STEPS: usize = 8 / P::STEP;
    const BYTES: usize = 8 / P::STEP * 2 * WEIGHTS_BYTES;
    const BOTH_TILES: bool = SCALES > 0;
    const TWO_BLOCKS: bool = SCALES > 0;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> *const u8 {
        group.wrapping_add(tile * <Self as Source<P>>::STEPS * WEIGHTS_BYTES)
    }
    #[inline(always)]
    unsafe fn weights(raw: *const u8, step: usize) -> P::Weights {
        // SAFETY: the caller's contract; a tile has its steps.
        unsafe { P::load(raw.add(step * WEIGHTS_BYTES)) }
    }
}

/// Bytes of a block of `numbers` for each row, as [`unpack`] writes it.
pub(super) const fn unpacked_bytes<P: Dot>(scales: usize, numbers: usize) -> usize {
    scales * PANEL * 2 + numbers / P::STEP * 2 * WEIGHTS_BYTES
}

/// Unpacks a panel of `blocks` blocks, for many rows: so that it is done once.
///
/// # Safety
/// `panel` points to the whole panel, `to` to room for as many blocks.
#[inline(always)]
pub(super) unsafe fn unpack<P: Dot, S: Source<P>>(panel: *const u8, blocks: usize, to: *mut u8) {
    const { assert!(S::STEPS == 8 / P::STEP, "the groups are those of `Unpacked`") };
    let (head, bytes) = (S::SCALES * PANEL * 2, S::STEPS * 2 * WEIGHTS_BYTES);
    for block in 0..blocks {
        // SAFETY: the caller's contract.
        unsafe {
            let from = panel.add(block * (head + S::GROUPS * S::BYTES));
            let to = to.add(block * (head + S::GROUPS * bytes));
            let lines = (head + S::GROUPS * S::BYTES) / CACHE_LINE;
            prefetch_lines(from.wrapping_add(PREFETCH_DISTANCE), lines);
            from.copy_to_nonoverlapping(to, head);
            for group in 0..S::GROUPS {
                let raw = array_of!(t < 2 => S::raw(from.add(head + group * S::BYTES), t));
                let to = to.add(head + group * bytes);
                macro_rules! steps {
                    ($($step:literal)*) => {$(
                        if $step < S::STEPS {
                            let to = to.add($step * WEIGHTS_BYTES);
                            P::store(S::numbers(raw[0], $step), to);
                            P::store(S::numbers(raw[1], $step), to.add(S::STEPS * WEIGHTS_BYTES));
                        }
                    )*};
                }
                steps!(0 1 2 3 4 5 6 7);
            }
        }
    }
}

/// A [`Dot`] that reads panels of every encoding it is used with.
pub(super) trait Reads: Dot + Sized {
    /// Visits the source of an encoding.
    fn visit<V: Visitor<Self>>(encoding: Encoding, visitor: V);
}

/// What is done with a source. Must be inlined, as all that is hot.
pub(super) trait Visitor<P: Dot> {
    fn visit<S: Source<P>>(self);
}

impl<L: Lanes> Reads for Exact<L> {
    #[inline(always)]
    fn visit<V: Visitor<Self>>(encoding: Encoding, visitor: V) {
        match encoding {
            Encoding::F32 => visitor.visit::<Plain<f32, 0, 1>>(),
            Encoding::F16 => visitor.visit::<Plain<f16, 0, 1>>(),
            Encoding::BF16 => visitor.visit::<Plain<bf16, 0, 1>>(),
            Encoding::Q4_0 => visitor.visit::<Nibbles<8>>(),
            Encoding::Q4_1 => visitor.visit::<Nibbles<0>>(),
            Encoding::Q8_0 => visitor.visit::<Plain<i8, 1, 4>>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Reads for PairProduct {
    #[inline(always)]
    fn visit<V: Visitor<Self>>(encoding: Encoding, visitor: V) {
        match encoding {
            Encoding::BF16 => visitor.visit::<DensePairs>(),
            Encoding::Q4_0 => visitor.visit::<Nibbles<8>>(),
            Encoding::Q4_1 => visitor.visit::<Nibbles<0>>(),
            Encoding::Q8_0 => visitor.visit::<BytePairs>(),
            Encoding::F32 | Encoding::F16 => {
                unreachable!("`Cpu::arithmetic` computes f32 and f16 weights exactly")
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl<I: Integers> Reads for IntegerDot<I> {
    #[inline(always)]
    fn visit<V: Visitor<Self>>(encoding: Encoding, visitor: V) {
        match encoding {
            Encoding::Q4_0 => visitor.visit::<Nibbles<8>>(),
            Encoding::Q4_1 => visitor.visit::<Nibbles<0>>(),
            Encoding::Q8_0 => visitor.visit::<BytePairs>(),
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => {
                unreachable!("only quantised numbers are integers")
            }
        }
    }
}
