//! The inner kernel of a projection: up to 8 rows of `x` times one panel of weights.
//!
//! One code path serves one row and many. Each output adds its products in the order of `k`: within
//! a block into a partial sum, which a quantised block then scales onto the total. So a row's result
//! does not depend on the rows that are computed with it.
#![allow(unsafe_code)] // Weights and activations are read through raw pointers.

use std::hint::black_box;
use std::marker::PhantomData;

use half::f16;

use super::lanes::{Element, LANES, Lanes, array_of};
use super::pack::PANEL;
#[cfg(target_arch = "x86_64")]
use super::product::PairProduct;
use super::product::{Exact, Product};
#[cfg(target_arch = "x86_64")]
use super::x86::Pairs;

/// How the weights of a panel are read (see [`super::pack`] for the layout).
pub(super) trait Source<P: Product> {
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
    /// Whether eight rows meet both tiles at once. Sums and totals then take more registers than there
    /// are, but an activation is read once.
    const BOTH_TILES: bool = true;

    /// # Safety
    /// `group` points to a whole group; `tile` is 0 or 1.
    unsafe fn raw(group: *const u8, tile: usize) -> Self::Raw;
    /// # Safety
    /// `raw` was made of a group that is still there, and `step` is below `STEPS`.
    unsafe fn weights(raw: Self::Raw, step: usize) -> P::Weights;
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

/// Bytes of a group of [`DensePairs`]: four pairs of each row.
#[cfg(target_arch = "x86_64")]
const DENSE_GROUP_BYTES: usize = PANEL * 16;

/// Pairs of bf16.
#[cfg(target_arch = "x86_64")]
pub(super) struct DensePairs;

#[cfg(target_arch = "x86_64")]
impl Source<PairProduct> for DensePairs {
    type Raw = *const u8;
    const SCALES: usize = 0;
    const GROUPS: usize = 1;
    const STEPS: usize = 4;
    const BYTES: usize = DENSE_GROUP_BYTES;

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
impl Source<PairProduct> for BytePairs {
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
    unsafe fn weights(raw: *const u8, step: usize) -> Pairs {
        // SAFETY: the caller's contract; a step has 64 bytes.
        unsafe { Pairs::load_i8(raw.add(step * 64)) }
    }
}

/// A panel of another source with its numbers as [`DensePairs`]: for many rows, so that the numbers are
/// unpacked once.
#[cfg(target_arch = "x86_64")]
pub(super) struct Expanded<const SCALES: usize>;

#[cfg(target_arch = "x86_64")]
impl<const SCALES: usize> Source<PairProduct> for Expanded<SCALES> {
    type Raw = *const u8;
    const SCALES: usize = SCALES;
    const GROUPS: usize = 4;
    const STEPS: usize = 4;
    const BYTES: usize = DENSE_GROUP_BYTES;
    const BOTH_TILES: bool = false;

    #[inline(always)]
    unsafe fn raw(group: *const u8, tile: usize) -> *const u8 {
        // SAFETY: the caller's contract.
        unsafe { DensePairs::raw(group, tile) }
    }
    #[inline(always)]
    unsafe fn weights(raw: *const u8, step: usize) -> Pairs {
        // SAFETY: the caller's contract.
        unsafe { DensePairs::weights(raw, step) }
    }
}

#[cfg(target_arch = "x86_64")]
impl<const SCALES: usize> Expanded<SCALES> {
    /// Bytes of a block of 32 `k`.
    pub(super) const BLOCK: usize = SCALES * PANEL * 2 + 4 * DENSE_GROUP_BYTES;

    /// Expands a panel of `blocks` blocks.
    ///
    /// # Safety
    /// `panel` points to the whole panel, `to` to room for as many blocks.
    #[inline(always)]
    pub(super) unsafe fn expand<S: Source<PairProduct>>(
        panel: *const u8,
        blocks: usize,
        to: *mut u8,
    ) {
        let head = SCALES * PANEL * 2;
        for block in 0..blocks {
            // SAFETY: the caller's contract.
            unsafe {
                let from = panel.add(block * (head + S::GROUPS * S::BYTES));
                let to = to.add(block * Self::BLOCK);
                from.copy_to_nonoverlapping(to, head);
                for group in 0..S::GROUPS {
                    let raw = array_of!(t < 2 => S::raw(from.add(head + group * S::BYTES), t));
                    let to = to.add(head + group * DENSE_GROUP_BYTES);
                    macro_rules! steps {
                        ($($step:literal)*) => {$(
                            S::weights(raw[0], $step).store(to.add($step * 128));
                            S::weights(raw[1], $step).store(to.add($step * 128 + 64));
                        )*};
                    }
                    steps!(0 1 2 3);
                }
            }
        }
    }
}

/// One panel times one group of rows.
#[derive(Clone, Copy)]
pub(super) struct PanelTask {
    /// All blocks of the panel.
    pub(super) panel: *const u8,
    pub(super) blocks: usize,
    /// Activations `[step][row]`.
    pub(super) x: *const u32,
    /// Sums of the activations of each block, `[block][row]`; read where there are minima.
    pub(super) sums: *const f32,
    /// The panel's bias, or null. As many as `cols`.
    pub(super) bias: *const f32,
    /// Output of the first row and the panel's first column.
    pub(super) out: *mut f32,
    /// Distance of two output rows.
    pub(super) stride: usize,
    /// Output rows and columns that exist, at most `M` and 32.
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl PanelTask {
    /// # Safety
    /// The pointers are valid for what their comments say, with `m` rows of activations.
    #[inline(always)]
    pub(super) unsafe fn run<P: Product, S: Source<P>>(self, m: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            match (P::L::WIDE, m) {
                (true, 1) => self.tiles::<P, S, 1, 2>(0),
                (true, 2) => self.tiles::<P, S, 2, 2>(0),
                (true, 4) => self.tiles::<P, S, 4, 2>(0),
                (true, 8) if !S::BOTH_TILES => self.both::<P, S, 8>(),
                (true, _) => self.tiles::<P, S, 8, 2>(0),
                (false, 1) => self.both::<P, S, 1>(),
                (false, 2) => self.both::<P, S, 2>(),
                (false, _) => self.both::<P, S, 4>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn both<P: Product, S: Source<P>, const M: usize>(self) {
        for tile in 0..2 {
            // SAFETY: the caller's contract.
            unsafe { self.tiles::<P, S, M, 1>(tile) }
        }
    }

    /// The tiles from `first` on.
    #[inline(always)]
    unsafe fn tiles<P: Product, S: Source<P>, const M: usize, const T: usize>(self, first: usize) {
        let block_bytes = S::SCALES * PANEL * 2 + S::GROUPS * S::BYTES;
        let mut total = [[P::L::splat(0.0); T]; M];
        let mut x = self.x;
        for block in 0..self.blocks {
            // SAFETY: the panel holds `blocks` blocks, and `x` the steps of each.
            unsafe {
                let scales = self.panel.add(block * block_bytes);
                let groups = scales.add(S::SCALES * PANEL * 2);
                let mut part = if S::SCALES == 0 { total } else { [[P::L::splat(0.0); T]; M] };
                for group in 0..S::GROUPS {
                    let group = groups.add(group * S::BYTES);
                    x = multiply_group::<P, S, M, T>(group, first, x, &mut part);
                }
                if S::SCALES == 0 {
                    total = part;
                } else {
                    let sums = self.sums.wrapping_add(block * M);
                    scale_block::<P, S, M, T>(scales.cast(), first, sums, &part, &mut total);
                }
            }
        }
        // SAFETY: the caller's contract.
        unsafe { self.write(first, &total) }
    }

    /// # Safety
    /// `out` and `bias` are valid for `rows` and `cols`.
    #[inline(always)]
    unsafe fn write<L: Lanes, const M: usize, const T: usize>(
        self,
        first: usize,
        total: &[[L; T]; M],
    ) {
        for (r, tiles) in total.iter().enumerate() {
            if r >= self.rows {
                break;
            }
            for (t, &lanes) in tiles.iter().enumerate() {
                let col = (first + t) * LANES;
                let cols = self.cols.saturating_sub(col).min(LANES);
                // SAFETY: `r` is below `rows` and `col + cols` at most `self.cols`.
                unsafe {
                    let bias = if self.bias.is_null() {
                        self.bias
                    } else {
                        self.bias.add(col.min(self.cols))
                    };
                    write_lanes(
                        lanes,
                        bias,
                        self.out.add(r * self.stride + col.min(self.cols)),
                        cols,
                    );
                }
            }
        }
    }
}

/// Adds the products of one group to `part`; returns the activations behind it.
///
/// # Safety
/// `group` points to a whole group, `x` to the activations of all its steps.
#[inline(always)]
unsafe fn multiply_group<P: Product, S: Source<P>, const M: usize, const T: usize>(
    group: *const u8,
    first: usize,
    x: *const u32,
    part: &mut [[P::L; T]; M],
) -> *const u32 {
    // SAFETY: the caller hands a whole group, and the activations of all its steps.
    unsafe {
        let raw = array_of!(t < T => S::raw(group, first + t));
        if P::L::WIDE {
            // Written out, so that each step's shift is a constant.
            macro_rules! steps {
                ($($step:literal)*) => {$(
                    if $step < S::STEPS {
                        multiply_step::<P, S, M, T>(raw, $step, x, part);
                    }
                )*};
            }
            steps!(0 1 2 3 4 5 6 7);
        } else {
            // A loop that the compiler cannot unroll: it would load for later steps in advance, and
            // with 16 registers that pushes sums out to memory, at a third of the speed.
            for step in 0..black_box(S::STEPS) {
                multiply_step::<P, S, M, T>(raw, step, x, part);
            }
        }
    }
    x.wrapping_add(S::STEPS * M)
}

/// # Safety
/// As for [`multiply_group`]; `step` is below `STEPS`.
#[inline(always)]
unsafe fn multiply_step<P: Product, S: Source<P>, const M: usize, const T: usize>(
    raw: [S::Raw; T],
    step: usize,
    x: *const u32,
    part: &mut [[P::L; T]; M],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let weights = array_of!(t < T => S::weights(raw[t], step));
        for (r, part) in part.iter_mut().enumerate() {
            let x = P::broadcast(x.add(step * M + r));
            for (part, &weights) in part.iter_mut().zip(&weights) {
                *part = P::multiply(weights, x, *part);
            }
        }
    }
}

/// `total += scale * part (+ minimum * sum of x)`.
#[inline(always)]
unsafe fn scale_block<P: Product, S: Source<P>, const M: usize, const T: usize>(
    scales: *const f16,
    first: usize,
    sums: *const f32,
    part: &[[P::L; T]; M],
    total: &mut [[P::L; T]; M],
) {
    // SAFETY: the caller hands `SCALES` times 32 numbers and, for minima, `M` sums.
    unsafe {
        for t in 0..T {
            let scale = P::L::load_f16(scales.add((first + t) * LANES));
            for (total, part) in total.iter_mut().zip(part) {
                total[t] = scale.fma(part[t], total[t]);
            }
            if S::SCALES == 2 {
                let minimum = P::L::load_f16(scales.add(PANEL + (first + t) * LANES));
                for (r, total) in total.iter_mut().enumerate() {
                    total[t] = minimum.fma(P::L::splat(*sums.add(r)), total[t]);
                }
            }
        }
    }
}

/// Writes the first `cols` lanes, plus the bias unless that is null.
#[inline(always)]
unsafe fn write_lanes<L: Lanes>(lanes: L, bias: *const f32, out: *mut f32, cols: usize) {
    // SAFETY: the caller hands pointers to `cols` values.
    unsafe {
        if cols == LANES {
            let lanes = if bias.is_null() { lanes } else { lanes.add(L::load(bias)) };
            lanes.store(out);
            return;
        }
        let mut values = [0.0; LANES];
        lanes.store(values.as_mut_ptr());
        for (i, &value) in values[..cols].iter().enumerate() {
            let bias = if bias.is_null() { 0.0 } else { *bias.add(i) };
            *out.add(i) = value + bias;
        }
    }
}
