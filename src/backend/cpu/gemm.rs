//! The inner kernel of a projection: up to 8 rows of `x` times one panel of weights.
//!
//! One code path serves one row and many. Each output adds its products in the order of `k`: within
//! a block into a partial sum, which a quantised block then scales onto the total. So a row's result
//! does not depend on the rows that are computed with it.
#![allow(unsafe_code)] // Weights and activations are read through raw pointers.

use std::hint::black_box;

use half::f16;

use super::lanes::{LANES, Lanes, array_of};
use super::memory::{CACHE_LINE, PREFETCH_DISTANCE, prefetch_lines};
use super::pack::PANEL;
use super::product::Dot;
use super::rows::silu_gate;
use super::source::Source;

/// Weights that are asked for while a panel is multiplied.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    /// The panel itself, [`PREFETCH_DISTANCE`] ahead, and then what starts there.
    Stream(*const u8),
    /// So many cache lines from there on with each block: where there are several passes, they share what is read after
    /// the panel, so that the memory is busy while all of them multiply.
    Spread(*const u8, usize),
}

/// Largest panel that is read while the one before it is multiplied: both stay in the second-level cache.
const SPREAD_BYTES: usize = 160 << 10;

/// Blocks that half of a group's rows meets before the other half does, so that both find them in the first-level cache.
const RUN: usize = 4;

impl Ahead {
    /// What pass number `pass` of `passes` over `blocks` blocks asks for; after the last one as many `bytes` as the panel
    /// has are read from `next` on.
    pub(super) fn of(
        (pass, passes): (usize, usize),
        (next, bytes): (*const u8, usize),
        blocks: usize,
    ) -> Self {
        if passes == 1 || bytes > SPREAD_BYTES {
            return if pass == 0 { Self::Stream(next) } else { Self::Spread(next, 0) };
        }
        let lines = bytes.div_ceil(CACHE_LINE * blocks.max(1) * passes);
        let before = pass * lines * blocks * CACHE_LINE;
        Self::Spread(next.wrapping_add(before), if before < bytes { lines } else { 0 })
    }

    /// Asks for what is due with number `block` of `blocks` in `panel`.
    #[inline(always)]
    fn ask(self, panel: *const u8, (block, blocks): (usize, usize), block_bytes: usize) {
        let (from, lines) = match self {
            Self::Stream(next) => {
                let later = block + PREFETCH_DISTANCE.div_ceil(block_bytes);
                let (start, index) =
                    if later < blocks { (panel, later) } else { (next, later - blocks) };
                (start.wrapping_add(index * block_bytes), block_bytes / CACHE_LINE)
            }
            Self::Spread(from, lines) => (from.wrapping_add(block * lines * CACHE_LINE), lines),
        };
        prefetch_lines(from, lines);
    }
}

/// One panel times one group of rows.
#[derive(Clone, Copy)]
pub(super) struct PanelTask {
    /// All blocks of the panel.
    pub(super) panel: *const u8,
    pub(super) blocks: usize,
    pub(super) ahead: Ahead,
    /// Activations `[step][row]`.
    pub(super) x: *const u32,
    /// `[block][row]` sums of the activations, read where there are minima or a [`Source::OFFSET`].
    pub(super) sums: *const f32,
    /// What each row's activations and sums count in, for [`Dot::SCALED`].
    pub(super) scales: *const f32,
    /// The panel's bias, or null. As many as `cols`.
    pub(super) bias: *const f32,
    /// Output of the first row and the panel's first column.
    pub(super) out: *mut f32,
    /// Whether the output holds gates, whose activation is multiplied with what would be written; panels are whole then.
    pub(super) gated: bool,
    /// Distance of two output rows.
    pub(super) stride: usize,
    /// Output rows and columns that exist, at most the group's slots and 32.
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl PanelTask {
    /// How many tiles of `m` rows are computed together: both where registers have room for their sums.
    pub(super) const fn tiles_at_once<P: Dot, S: Source<P>>(m: usize) -> usize {
        if m == 1 || P::L::WIDE && S::BOTH_TILES { 2 } else { 1 }
    }

    /// Computes the tiles from `first` on, as many as [`Self::tiles_at_once`] says.
    ///
    /// # Safety
    /// The pointers are valid for what their comments say, with `m` rows of activations.
    #[inline(always)]
    pub(super) unsafe fn run<P: Dot, S: Source<P>>(self, m: usize, first: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            match (P::L::WIDE, Self::tiles_at_once::<P, S>(m), m) {
                (.., 1) => self.tiles::<P, S, 1, 2, 1>(first),
                (true, 2, 2) => self.tiles::<P, S, 2, 2, 1>(first),
                (true, 2, 4) => self.tiles::<P, S, 4, 2, 1>(first),
                (true, 2, 8) if S::TWO_BLOCKS => self.tiles::<P, S, 4, 2, 2>(first),
                (true, 2, 8) => self.tiles::<P, S, 8, 2, 1>(first),
                (_, _, 2) => self.tiles::<P, S, 2, 1, 1>(first),
                (_, _, 4) => self.tiles::<P, S, 4, 1, 1>(first),
                (true, _, 8) => self.tiles::<P, S, 8, 1, 1>(first),
                (false, _, 6) => self.tiles::<P, S, 6, 1, 1>(first),
                _ => unreachable!("no groups of {m} rows"),
            }
        }
    }

    /// The tiles from `first` on. A group has `H` times `M` rows, of which `M` at a time have their totals in registers.
    #[inline(always)]
    unsafe fn tiles<P: Dot, S: Source<P>, const M: usize, const T: usize, const H: usize>(
        self,
        first: usize,
    ) {
        const {
            assert!(
                !S::TWO_BLOCKS || S::SCALES > 0,
                "sums without scales go on from block to block"
            );
        };
        let mut totals = [[[P::L::splat(0.0); T]; M]; H];
        let run = if H == 1 { self.blocks } else { RUN };
        for start in (0..self.blocks).step_by(run.max(1)) {
            let end = self.blocks.min(start + run);
            for (h, totals) in totals.iter_mut().enumerate() {
                let half = self.rows_from(h * M);
                let mut total = *totals;
                let mut block = start;
                // SAFETY: the caller's contract.
                unsafe {
                    if S::TWO_BLOCKS && P::L::WIDE {
                        while block + 2 <= end {
                            half.add_blocks::<P, S, M, T, H, 2>(block, first, &mut total);
                            block += 2;
                        }
                    }
                    while block < end {
                        half.add_blocks::<P, S, M, T, H, 1>(block, first, &mut total);
                        block += 1;
                    }
                }
                *totals = total;
            }
        }
        for (h, total) in totals.iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { self.rows_from(h * M).write_totals::<P, M, T>(first, total) }
        }
    }

    /// The rows from `row` on. Only the first rows ask for weights.
    #[inline(always)]
    fn rows_from(self, row: usize) -> Self {
        Self {
            ahead: if row == 0 { self.ahead } else { Ahead::Spread(self.panel, 0) },
            x: self.x.wrapping_add(row),
            sums: self.sums.wrapping_add(row),
            scales: self.scales.wrapping_add(row),
            out: self.out.wrapping_add(row * self.stride),
            rows: self.rows.saturating_sub(row),
            ..self
        }
    }

    /// Writes the totals of `M` rows.
    ///
    /// # Safety
    /// As for [`Self::write`]; there is a scale for each row where they are [`Dot::SCALED`].
    #[inline(always)]
    unsafe fn write_totals<P: Dot, const M: usize, const T: usize>(
        self,
        first: usize,
        total: &[[P::L; T]; M],
    ) {
        let scaled = |r: usize, total: P::L| {
            // SAFETY: there is a scale for each row.
            if P::SCALED { total.mul(P::L::splat(unsafe { *self.scales.add(r) })) } else { total }
        };
        if self.rows >= M && self.cols == PANEL {
            // Written out: an index that is no constant would keep the totals in memory, and store them after each block.
            macro_rules! rows {
                ($($r:literal)*) => {$(
                    if $r < M {
                        for t in 0..T {
                            // SAFETY: all rows and columns exist.
                            unsafe { self.write_lanes(scaled($r, total[$r % M][t]), $r, (first + t) * LANES) }
                        }
                    }
                )*};
            }
            rows!(0 1 2 3 4 5 6 7);
            return;
        }
        let mut numbers = [[[0.0; LANES]; T]; M];
        for (r, total) in total.iter().enumerate() {
            for (t, &total) in total.iter().enumerate() {
                // SAFETY: 16 values.
                unsafe { scaled(r, total).store(numbers[r][t].as_mut_ptr()) }
            }
        }
        // SAFETY: the caller's contract.
        unsafe { self.write::<P::L, M, T>(first, &numbers) }
    }

    /// Adds `B` blocks from number `block` on, whose sums do not wait for each other.
    ///
    /// # Safety
    /// The blocks exist; for the rest as for [`Self::run`].
    #[inline(always)]
    unsafe fn add_blocks<
        P: Dot,
        S: Source<P>,
        const M: usize,
        const T: usize,
        const H: usize,
        const B: usize,
    >(
        self,
        block: usize,
        first: usize,
        total: &mut [[P::L; T]; M],
    ) {
        let block_bytes = S::SCALES * PANEL * 2 + S::GROUPS * S::BYTES;
        for b in 0..B {
            self.ahead.ask(self.panel, (block + b, self.blocks), block_bytes);
        }
        // SAFETY: the panel holds `blocks` blocks, and `x` the steps of each.
        unsafe {
            let starts = array_of!(b < B => self.panel.add((block + b) * block_bytes));
            let sums = array_of!(b < B => self.sums.wrapping_add((block + b) * H * M));
            let steps = S::GROUPS * S::STEPS * H * M;
            let x = array_of!(b < B => self.x.wrapping_add((block + b) * steps));
            let mut part = array_of!(b < B => array_of!(r < M => if S::SCALES == 0 {
                array_of!(t < T => P::resume(total[r][t]))
            } else {
                let sum = if S::OFFSET != 0 { *sums[b].add(r) } else { 0.0 };
                [P::start(sum, S::OFFSET); T]
            }));
            for group in 0..S::GROUPS {
                let at = S::SCALES * PANEL * 2 + group * S::BYTES;
                let groups = array_of!(b < B => starts[b].add(at));
                let x = array_of!(b < B => x[b].wrapping_add(group * S::STEPS * H * M));
                multiply_groups::<P, S, M, T, H, B>(groups, first, x, &mut part);
            }
            for b in 0..B {
                if S::SCALES == 0 {
                    *total = array_of!(r < M => array_of!(t < T => P::numbers(part[b][r][t])));
                } else {
                    scale_block::<P, S, M, T>(starts[b].cast(), first, sums[b], &part[b], total);
                }
            }
        }
    }

    /// What exists of the tiles.
    ///
    /// # Safety
    /// `out` and `bias` are valid for `rows` and `cols`.
    #[inline(always)]
    unsafe fn write<L: Lanes, const M: usize, const T: usize>(
        self,
        first: usize,
        numbers: &[[[f32; LANES]; T]; M],
    ) {
        debug_assert!(!self.gated || self.cols == PANEL, "gated panels are whole");
        for (r, tiles) in numbers.iter().take(self.rows).enumerate() {
            for (t, numbers) in tiles.iter().enumerate() {
                let col = (first + t) * LANES;
                let cols = self.cols.saturating_sub(col).min(LANES);
                // SAFETY: `r` is below `rows` and `col + cols` at most `self.cols`.
                unsafe {
                    if cols == LANES {
                        self.write_lanes(L::load(numbers.as_ptr()), r, col);
                        continue;
                    }
                    for (i, &number) in numbers[..cols].iter().enumerate() {
                        let bias = if self.bias.is_null() { 0.0 } else { *self.bias.add(col + i) };
                        *self.out.add(r * self.stride + col + i) = number + bias;
                    }
                }
            }
        }
    }

    /// Sixteen numbers of row `r` from column `col` on.
    ///
    /// # Safety
    /// They exist.
    #[inline(always)]
    unsafe fn write_lanes<L: Lanes>(self, mut lanes: L, r: usize, col: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let out = self.out.add(r * self.stride + col);
            if !self.bias.is_null() {
                lanes = lanes.add(L::load(self.bias.add(col)));
            }
            if self.gated {
                lanes = silu_gate(L::load(out), lanes);
            }
            lanes.store(out);
        }
    }
}

/// Adds the products of a group of each of `B` blocks to `part`.
///
/// # Safety
/// `groups` point to whole groups, `x` to the activations of all their steps.
#[inline(always)]
unsafe fn multiply_groups<
    P: Dot,
    S: Source<P>,
    const M: usize,
    const T: usize,
    const H: usize,
    const B: usize,
>(
    groups: [*const u8; B],
    first: usize,
    x: [*const u32; B],
    part: &mut [[[P::Sum; T]; M]; B],
) {
    // SAFETY: the caller hands whole groups, and the activations of all their steps.
    unsafe {
        let raw = array_of!(b < B => array_of!(t < T => S::raw(groups[b], first + t)));
        if P::L::WIDE || M == 1 {
            // Written out, so that each step's shift is a constant.
            macro_rules! steps {
                ($($step:literal)*) => {$(
                    if $step < S::STEPS {
                        for b in 0..B {
                            multiply_step::<P, S, M, T, H>(raw[b], $step, x[b], &mut part[b]);
                        }
                    }
                )*};
            }
            steps!(0 1 2 3 4 5 6 7);
        } else {
            // A loop that the compiler cannot unroll: it would load for later steps in advance, and
            // with 16 registers that pushes sums out to memory, at a third of the speed.
            for step in 0..black_box(S::STEPS) {
                for b in 0..B {
                    multiply_step::<P, S, M, T, H>(raw[b], step, x[b], &mut part[b]);
                }
            }
        }
    }
}

/// # Safety
/// As for [`multiply_groups`]; `step` is below `STEPS`.
#[inline(always)]
unsafe fn multiply_step<P: Dot, S: Source<P>, const M: usize, const T: usize, const H: usize>(
    raw: [S::Raw; T],
    step: usize,
    x: *const u32,
    part: &mut [[P::Sum; T]; M],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let weights = array_of!(t < T => S::weights(raw[t], step));
        for (r, part) in part.iter_mut().enumerate() {
            let x = P::broadcast(x.add(step * H * M + r));
            for (part, &weights) in part.iter_mut().zip(&weights) {
                *part = P::multiply(weights, x, *part);
            }
        }
    }
}

/// `total += scale * part (+ minimum * sum of x)`.
#[inline(always)]
unsafe fn scale_block<P: Dot, S: Source<P>, const M: usize, const T: usize>(
    scales: *const f16,
    first: usize,
    sums: *const f32,
    part: &[[P::Sum; T]; M],
    total: &mut [[P::L; T]; M],
) {
    // SAFETY: the caller hands `SCALES` times 32 numbers, and sums of `M` rows of activations where they are read.
    unsafe {
        for t in 0..T {
            let scale = P::L::load_f16(scales.add((first + t) * LANES));
            for (total, part) in total.iter_mut().zip(part) {
                total[t] = scale.fma(P::numbers(part[t]), total[t]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_ask_for_the_next_panel_once() {
        for (blocks, bytes) in [(18, 18 * 576), (72, 72 * 512), (1, 64), (0, 0)] {
            for passes in [2, 3, 8, 64] {
                let mut asked = 0;
                for pass in 0..passes {
                    let next = std::ptr::without_provenance(1 << 20);
                    let Ahead::Spread(from, lines) =
                        Ahead::of((pass, passes), (next, bytes), blocks)
                    else {
                        panic!("several passes share the panel");
                    };
                    assert!(lines == 0 || from.addr() == (1 << 20) + asked);
                    asked += lines * blocks * CACHE_LINE;
                }
                assert!(asked >= bytes, "{asked} of {bytes} in {passes} passes");
            }
        }
    }
}
