//! Projections: rounds and rearranges the activations, then shares the panels among the threads.
#![allow(unsafe_code)] // Threads write disjoint parts of one output; see `gemm` for the pointers.

use std::cell::Cell;
use std::mem::MaybeUninit;

use super::activations::{Activations, Group, groups};
use super::gemm::{Ahead, PanelTask};
use super::lanes::Lanes;
use super::memory::{CACHE_LINE, Shared, written_by};
use super::pack::{PANEL, Packed, Segment, block_bytes, block_len, scales};
use super::product::{Dot, Exact, ProductKernel, run};
#[cfg(target_arch = "x86_64")]
use super::product::{IntegerDot, PairProduct};
use super::source::{Reads, Source, Unpacked, Visitor, unpack, unpacked_bytes};
#[cfg(target_arch = "x86_64")]
use super::x86_words::Integers;
use super::{Arithmetic, Cpu};

/// Activations that a block of rows should take, to stay near with a panel; and groups that it has at least, to
/// share what it takes to unpack one.
const ROW_BLOCK_BYTES: usize = 512 << 10;
const ROW_BLOCK_GROUPS: usize = 16;

/// Groups of rows from which on panels are unpacked before they are multiplied.
const UNPACK_FROM: usize = 3;

/// A cache line: so aligned, no vector of weights straddles two.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "it is room")] [u64; CACHE_LINE / 8]);

thread_local! {
    /// A panel as it is multiplied. Each thread keeps its own, which is near it.
    static UNPACKED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// `x · Wᵀ + bias` for `x`: `[rows, cols]` → `[rows, W.rows]`. Where `gated`, `silu(gate) * up` of the two halves of each
/// of these rows, `[rows, W.rows / 2]`; they must be [apart](Packed::has_halves).
pub(crate) fn linear(cpu: &Cpu, x: &[f32], weight: &Packed, gated: bool) -> Vec<f32> {
    assert!(!gated || weight.has_halves(), "the halves share a panel");
    let parts = if gated { 2 } else { 1 };
    let rows = x.len() / weight.cols.max(1);
    let integers = weight.segments.iter().any(|segment| segment.arithmetic == Arithmetic::Integers);
    let groups = groups(rows, cpu.tier.is_wide(), integers);
    let activations: Vec<_> = [Arithmetic::Exact, Arithmetic::Pairs, Arithmetic::Integers]
        .into_iter()
        .filter(|&a| weight.segments.iter().any(|segment| segment.arithmetic == a))
        .map(|arithmetic| Activations::new(cpu, x, weight, arithmetic, &groups))
        .collect();
    let write = |out| multiply(cpu, (weight, parts), &groups, &activations, out);
    // SAFETY: every panel of every segment meets every group, so all outputs are written.
    let out = unsafe { written_by(rows * weight.rows / parts, write) };
    cpu.put_back(activations.into_iter().map(|activations| activations.words));
    out
}

/// Shares the work: a task is a panel of each part times a block of rows.
fn multiply(
    cpu: &Cpu,
    (weight, parts): (&Packed, usize),
    groups: &[Group],
    x: &[Activations],
    out: Shared<MaybeUninit<f32>>,
) {
    let row_bytes = weight.cols.max(1)
        * if x.iter().any(|x| x.arithmetic == Arithmetic::Exact) { 4 } else { 2 };
    let block = (ROW_BLOCK_BYTES / (row_bytes * 8)).max(ROW_BLOCK_GROUPS);
    // As even as can be.
    let block = groups.len().div_ceil(groups.len().div_ceil(block).max(1)).max(1);
    let row_blocks: Vec<_> = groups.chunks(block).collect();
    let (panels, width) = (weight.panels() / parts, weight.rows / parts);
    cpu.reads(weight, panels);
    cpu.pool.run(panels * row_blocks.len(), &|index| {
        let (panel, groups) = (index / row_blocks.len(), row_blocks[index % row_blocks.len()]);
        // Gates first: what is multiplied with their activation reads them from the output, where they are near.
        for part in 0..parts {
            let next = if part + 1 < parts {
                (part + 1) * panels + panel
            } else if panel + 1 < panels {
                panel + 1
            } else {
                parts * panels
            };
            let (segment, panel) =
                weight.panel(part * panels + panel).expect("a panel of the weight");
            let x = x
                .iter()
                .find(|x| x.arithmetic == segment.arithmetic)
                .expect("`linear` makes the activations of every segment");
            let next = weight.panel_start(next);
            let product = PanelProduct { weight, segment, panel, next, groups, x, out, width };
            run(cpu.tier, segment.arithmetic, product);
        }
    });
}

/// A panel of a segment times a block of rows.
struct PanelProduct<'a> {
    weight: &'a Packed,
    segment: &'a Segment,
    panel: usize,
    /// Where the weights probably start that the thread reads next.
    next: *const u8,
    groups: &'a [Group],
    x: &'a Activations,
    out: Shared<MaybeUninit<f32>>,
    /// Columns of the output; those of `weight` from there on multiply the activation of the first.
    width: usize,
}

impl ProductKernel for PanelProduct<'_> {
    #[inline(always)]
    fn exact<L: Lanes>(self) {
        self.multiply::<Exact<L>>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn pairs(self) {
        self.multiply::<PairProduct>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn integers<I: Integers>(self) {
        self.multiply::<IntegerDot<I>>();
    }
}

/// Multiplies the panel as it is packed.
struct AsPacked<'a>(PanelProduct<'a>);

impl<P: Dot> Visitor<P> for AsPacked<'_> {
    #[inline(always)]
    fn visit<S: Source<P>>(self) {
        // SAFETY: the panel holds all blocks by `Segment::stride`; `multiply` has gates written first.
        unsafe { self.0.passes::<P, S>(self.0.bytes()) }
    }
}

/// Unpacks a panel.
struct Unpack {
    panel: *const u8,
    blocks: usize,
    to: *mut u8,
}

impl<P: Dot> Visitor<P> for Unpack {
    #[inline(always)]
    fn visit<S: Source<P>>(self) {
        // SAFETY: `PanelProduct::multiply` hands a whole panel and room for its blocks.
        unsafe { unpack::<P, S>(self.panel, self.blocks, self.to) }
    }
}

impl PanelProduct<'_> {
    /// Unpacks the panel first where enough groups of rows share it; the sums are the same.
    #[inline(always)]
    fn multiply<P: Reads>(self) {
        let encoding = self.segment.encoding;
        let bytes = unpacked_bytes::<P>(scales(encoding), block_len(encoding));
        let as_multiplied = bytes == block_bytes(encoding);
        if self.groups.len() < UNPACK_FROM || as_multiplied {
            return P::visit(encoding, AsPacked(self));
        }
        let blocks = self.blocks();
        let mut unpacked = UNPACKED.take();
        unpacked.resize((blocks * bytes).div_ceil(CACHE_LINE).max(unpacked.len()), Line::default());
        let to: *mut u8 = unpacked.as_mut_ptr().cast();
        P::visit(encoding, Unpack { panel: self.bytes(), blocks, to });
        // SAFETY: all blocks have just been unpacked; `multiply` has gates written first.
        unsafe {
            match scales(encoding) {
                // Pairs are packed as they are multiplied, and integers have scales.
                0 if P::STEP == 1 => self.passes::<P, Unpacked<0>>(to),
                0 | 1 => self.passes::<P, Unpacked<1>>(to),
                _ => self.passes::<P, Unpacked<2>>(to),
            }
        }
        UNPACKED.set(unpacked);
    }

    fn bytes(&self) -> *const u8 {
        self.segment.panel(self.panel).as_ptr()
    }

    /// Blocks of a panel.
    fn blocks(&self) -> usize {
        self.weight.cols.div_ceil(block_len(self.segment.encoding))
    }

    /// All rows pass, a group at a time.
    ///
    /// # Safety
    /// `bytes` points to the blocks of the panel, as `S` reads them. From column `width` on, the same task has written
    /// the gates of these rows and columns.
    #[inline(always)]
    unsafe fn passes<P: Dot, S: Source<P>>(&self, bytes: *const u8) {
        let Self { weight, segment, x, width, .. } = *self;
        let blocks = self.blocks();
        let steps = block_len(segment.encoding) / P::STEP;
        assert_eq!(steps, S::GROUPS * S::STEPS, "the source reads whole blocks");
        assert_eq!(steps * blocks, x.steps, "the activations have the steps of the panel");
        let col = segment.start + self.panel * PANEL;
        let cols = (segment.rows - self.panel * PANEL).min(PANEL);
        // Tile by tile: the weights of one stay in the first-level cache while all rows pass.
        let is_left = |group: &&Group| PanelTask::tiles_at_once::<P, S>(group.m) == 1;
        let second = self.groups.iter().filter(is_left).map(|group| (1, group));
        let passes = self.groups.len() + second.clone().count();
        let tiles = self.groups.iter().map(|group| (0, group)).chain(second);
        for (pass, (first, group)) in tiles.enumerate() {
            let sums = if S::SCALES == 2 || S::OFFSET != 0 {
                x.sums[group.start * x.blocks..][..group.m * x.blocks].as_ptr()
            } else {
                std::ptr::null()
            };
            let task = PanelTask {
                panel: bytes,
                blocks,
                ahead: Ahead::of((pass, passes), (self.next, segment.stride), blocks),
                x: x.words[group.start * x.steps..][..group.m * x.steps].as_ptr(),
                sums,
                scales: x.scales[group.start..][..group.m].as_ptr(),
                bias: weight.bias.get(col..col + cols).map_or(std::ptr::null(), <[f32]>::as_ptr),
                out: self.out.at(group.start * width + col % width).cast(),
                gated: col >= width,
                stride: width,
                rows: group.rows,
                cols,
            };
            // SAFETY: the caller's contract for the panel, and for gates that are read; the activations hold all steps as
            // asserted, and the sums and scales of all slots; the output has `group.rows` rows from `group.start` on and
            // `cols` columns from `col` on, and no other task has them.
            unsafe { task.run::<P, S>(group.m, first) }
        }
    }
}
