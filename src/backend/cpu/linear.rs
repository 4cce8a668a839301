//! Projections: rounds and rearranges the activations, then shares the panels among the threads.
#![allow(unsafe_code)] // Threads write disjoint parts of one output; see `gemm` for the pointers.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

#[cfg(target_arch = "x86_64")]
use half::bf16;

use super::gemm::PanelTask;
use super::lanes::{LANES, Lanes, array_of};
use super::memory::{Shared, written_by};
use super::pack::{PANEL, Packed, Segment, block_bytes, block_len, scales};
use super::product::{Dot, Exact, ProductKernel, run};
#[cfg(target_arch = "x86_64")]
use super::product::{IntegerDot, PairProduct};
use super::source::{Reads, Source, Unpacked, Visitor, unpack, unpacked_bytes};
#[cfg(target_arch = "x86_64")]
use super::x86::Avx512;
#[cfg(target_arch = "x86_64")]
use super::x86_words::{Integers, Pairs};
use super::{Arithmetic, Cpu};

/// Activations that a block of rows should take, to stay near with a panel; and groups that it has at least, to
/// share what it takes to unpack one.
const ROW_BLOCK_BYTES: usize = 512 << 10;
const ROW_BLOCK_GROUPS: usize = 16;

/// Groups of rows from which on panels are unpacked before they are multiplied.
const UNPACK_FROM: usize = 3;

/// `x · Wᵀ + bias` for `x`: `[rows, cols]` → `[rows, W.rows]`.
pub(crate) fn linear(cpu: &Cpu, x: &[f32], weight: &Packed) -> Vec<f32> {
    let rows = x.len() / weight.cols.max(1);
    let integers = weight.segments.iter().any(|segment| segment.arithmetic == Arithmetic::Integers);
    let groups = groups(rows, cpu.tier.is_wide(), integers);
    let mut activations: Vec<_> = [Arithmetic::Exact, Arithmetic::Pairs, Arithmetic::Integers]
        .into_iter()
        .filter(|&a| weight.segments.iter().any(|segment| segment.arithmetic == a))
        .map(|arithmetic| Activations::new(cpu, x, weight, arithmetic, &groups))
        .collect();
    // SAFETY: every panel of every segment meets every group, so all outputs are written.
    let out = unsafe {
        written_by(rows * weight.rows, |out| multiply(cpu, weight, &groups, &activations, out))
    };
    let mut spare = cpu.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    spare.extend(activations.drain(..).map(|a| a.words));
    out
}

/// Most rows that are computed together.
const MOST_ROWS: usize = 8;

/// Rows that are computed together: `rows` of them, in `m` slots of which the last may be empty.
struct Group {
    start: usize,
    rows: usize,
    m: usize,
}

/// Cuts `rows` into full groups and a last one of the smallest size that fits. With integers two groups of four are
/// faster than one of six and one of two.
fn groups(rows: usize, wide: bool, integers: bool) -> Vec<Group> {
    let sizes: &[usize] = if wide { &[1, 2, 4, 8] } else { &[1, 2, 4, 6] };
    let full = sizes[sizes.len() - 1];
    let (mut start, mut groups) = (0, Vec::with_capacity(rows.div_ceil(full)));
    while start < rows {
        let left = rows - start;
        let most = if integers && !wide && matches!(left, 7 | 8) { 4 } else { full };
        let rows = left.min(most);
        let m = sizes.iter().copied().find(|&m| m >= rows).unwrap_or(full);
        groups.push(Group { start, rows, m });
        start += rows;
    }
    groups
}

/// Activations in the order that [`PanelTask`] reads: per group `[step][slot]` words, and `[block][slot]` sums of 32.
struct Activations {
    arithmetic: Arithmetic,
    words: Vec<u32>,
    sums: Vec<f32>,
    /// What the words and sums of each slot count in.
    scales: Vec<f32>,
    /// Words per slot.
    steps: usize,
    /// Sums per slot, or 0.
    blocks: usize,
}

impl Activations {
    fn new(
        cpu: &Cpu,
        x: &[f32],
        weight: &Packed,
        arithmetic: Arithmetic,
        groups: &[Group],
    ) -> Self {
        let cols = weight.cols.next_multiple_of(8);
        let steps = if arithmetic == Arithmetic::Exact { cols } else { cols / 2 };
        let summed = weight.segments.iter().any(Segment::reads_sums);
        let blocks = if summed { cols / 32 } else { 0 };
        let slots: usize = groups.iter().map(|group| group.m).sum();
        let mut words =
            cpu.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        words.resize(slots * steps, 0);
        let mut sums = vec![0.0; slots * blocks];
        let mut scales = vec![0.0; slots];
        let (shared_words, shared_sums) = (Shared::new(&mut words), Shared::new(&mut sums));
        let shared_scales = Shared::new(&mut scales);
        cpu.pool.run(groups.len(), &|index| {
            let group = &groups[index];
            // Every group before this one is full, so its slots are its rows.
            // SAFETY: the parts of different groups are disjoint.
            let (words, sums, scales) = unsafe {
                (
                    shared_words.part(group.start * steps, group.m * steps),
                    shared_sums.part(group.start * blocks, group.m * blocks),
                    shared_scales.part(group.start, group.m),
                )
            };
            let x = &x[group.start * weight.cols..][..group.rows * weight.cols];
            let group = PackGroup { x, cols: weight.cols, m: group.m, words, sums, scales };
            run(cpu.tier, arithmetic, group);
        });
        Self { arithmetic, words, sums, scales, steps, blocks }
    }
}

/// Rearranges the rows of one group.
struct PackGroup<'a> {
    x: &'a [f32],
    cols: usize,
    m: usize,
    words: &'a mut [u32],
    sums: &'a mut [f32],
    scales: &'a mut [f32],
}

trait Convert {
    type L: Lanes;
    /// Columns of a word.
    const STEP: usize;
    /// The scale of a row. As [`Self::convert`], it must be inlined into [`ProductKernel`]'s methods.
    #[inline(always)]
    fn scale(_: &[f32]) -> f32 {
        1.0
    }
    /// 32 columns of a row of that scale; the first `32 / STEP` words count.
    fn convert(columns: &[f32; 32], scale: f32, words: &mut [u32; 32]);
    /// Sum of what the words stand for, in units of the row's scale.
    fn sum(words: &[u32; 32]) -> f32;
}

/// The bits of each column.
struct Copy<L>(PhantomData<L>);

impl<L: Lanes> Convert for Copy<L> {
    type L = L;
    const STEP: usize = 1;

    #[inline(always)]
    fn convert(columns: &[f32; 32], _: f32, words: &mut [u32; 32]) {
        *words = columns.map(f32::to_bits);
    }
    #[inline(always)]
    fn sum(words: &[u32; 32]) -> f32 {
        let columns = words.as_ptr().cast::<f32>();
        // SAFETY: two times 16 values.
        unsafe { L::load(columns).add(L::load(columns.add(16))) }.sum()
    }
}

/// Pairs of columns rounded to bf16.
#[cfg(target_arch = "x86_64")]
struct Round;

#[cfg(target_arch = "x86_64")]
impl Convert for Round {
    type L = Avx512;
    const STEP: usize = 2;

    #[inline(always)]
    fn convert(columns: &[f32; 32], _: f32, words: &mut [u32; 32]) {
        // SAFETY: 32 values are rounded to 16 words.
        unsafe { Pairs::round(columns.as_ptr(), words.as_mut_ptr()) };
    }
    #[inline(always)]
    fn sum(words: &[u32; 32]) -> f32 {
        let rounded = words.as_ptr().cast::<bf16>();
        // SAFETY: 16 words are two times 16 bf16.
        unsafe { Avx512::load_bf16(rounded).add(Avx512::load_bf16(rounded.add(16))) }.sum()
    }
}

/// Greatest of the integers that activations become.
#[cfg(target_arch = "x86_64")]
const LARGEST: f32 = 32767.0;

/// Rows of a smaller scale become zeros: their factor would overflow, and nothing that matters is so small.
#[cfg(target_arch = "x86_64")]
const LEAST: f32 = 1e-35;

/// Pairs of columns rounded to integers of 16 bits.
#[cfg(target_arch = "x86_64")]
struct RoundToIntegers<I>(PhantomData<I>);

#[cfg(target_arch = "x86_64")]
impl<I: Integers> Convert for RoundToIntegers<I> {
    type L = I::L;
    const STEP: usize = 2;

    #[inline(always)]
    fn scale(row: &[f32]) -> f32 {
        // NaN where a column is NaN or infinite: integers would hide it.
        let (mut size, mut poison) = ([I::L::splat(0.0); 2], I::L::splat(0.0));
        // Quantised weights have whole blocks of columns.
        for chunk in row.chunks_exact(LANES) {
            // SAFETY: 16 values.
            let x = unsafe { I::L::load(chunk.as_ptr()) };
            size = [size[0].max(x), size[1].min(x)];
            poison = poison.add(x.sub(x));
        }
        let size = size[0].max(I::L::splat(0.0).sub(size[1])).greatest();
        size / LARGEST + poison.sum()
    }

    #[inline(always)]
    fn convert(columns: &[f32; 32], scale: f32, words: &mut [u32; 32]) {
        I::round(columns, if scale > LEAST { 1.0 / scale } else { 0.0 }, words);
    }
    #[inline(always)]
    fn sum(words: &[u32; 32]) -> f32 {
        // SAFETY: 16 words.
        let pairs = unsafe { I::load(words.as_ptr().cast()) };
        pairs.dot(I::splat(0x1_0001), I::splat(0)).sum() as f32
    }
}

impl PackGroup<'_> {
    #[inline(always)]
    fn each<C: Convert>(self) {
        let (m, cols) = (self.m, self.cols);
        let rows: [&[f32]; MOST_ROWS] =
            std::array::from_fn(|slot| self.x.get(slot * cols..(slot + 1) * cols).unwrap_or(&[]));
        for (scale, row) in self.scales.iter_mut().zip(rows) {
            *scale = C::scale(row);
        }
        let mut converted = [[0; 32]; MOST_ROWS];
        for (block, words) in self.words.chunks_mut(32 / C::STEP * m).enumerate() {
            for (slot, &scale) in self.scales.iter().enumerate() {
                let rest = rows[slot].get(block * 32..).unwrap_or(&[]);
                if let Some(columns) = rest.first_chunk() {
                    C::convert(columns, scale, &mut converted[slot]);
                } else {
                    let mut columns = [0.0; 32];
                    columns[..rest.len()].copy_from_slice(rest);
                    C::convert(&columns, scale, &mut converted[slot]);
                }
                if !self.sums.is_empty() {
                    self.sums[block * m + slot] = C::sum(&converted[slot]);
                }
            }
            match m {
                8 => interleave_eight::<C::L>(&converted, words),
                6 => interleave::<6>(&converted, words),
                4 => interleave::<4>(&converted, words),
                2 => interleave::<2>(&converted, words),
                _ => interleave::<1>(&converted, words),
            }
        }
    }
}

/// `[slot][step]` to `[step][slot]`, as many steps as `words` has room for.
#[inline(always)]
fn interleave<const M: usize>(converted: &[[u32; 32]; MOST_ROWS], words: &mut [u32]) {
    for (step, words) in words.as_chunks_mut::<M>().0.iter_mut().enumerate() {
        *words = array_of!(slot < M => converted[slot][step]);
    }
}

/// The same for eight slots, sixteen steps at once.
#[inline(always)]
fn interleave_eight<L: Lanes>(converted: &[[u32; 32]; MOST_ROWS], words: &mut [u32]) {
    for (part, words) in words.chunks_mut(8 * LANES).enumerate() {
        let rows = array_of!(slot < 8 => &converted[slot].as_chunks().0[part]);
        if let Some(words) = words.as_mut_array() {
            L::interleave(rows, words);
        } else {
            let mut whole = [0; 8 * LANES];
            L::interleave(rows, &mut whole);
            words.copy_from_slice(&whole[..words.len()]);
        }
    }
}

impl ProductKernel for PackGroup<'_> {
    #[inline(always)]
    fn exact<L: Lanes>(self) {
        self.each::<Copy<L>>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn pairs(self) {
        self.each::<Round>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn integers<I: Integers>(self) {
        self.each::<RoundToIntegers<I>>();
    }
}

/// Shares the work: a task is some consecutive panels times a block of rows.
fn multiply(cpu: &Cpu, weight: &Packed, groups: &[Group], x: &[Activations], out: Shared<f32>) {
    let row_bytes = weight.cols.max(1)
        * if x.iter().any(|x| x.arithmetic == Arithmetic::Exact) { 4 } else { 2 };
    let block = (ROW_BLOCK_BYTES / (row_bytes * 8)).max(ROW_BLOCK_GROUPS);
    // As even as can be.
    let block = groups.len().div_ceil(groups.len().div_ceil(block).max(1)).max(1);
    let row_blocks: Vec<_> = groups.chunks(block).collect();
    let panels: usize = weight.segments.iter().map(Segment::panels).sum();
    let tasks = (cpu.pool.threads() * 8).div_ceil(row_blocks.len().max(1));
    // A panel of many rows takes long enough to be a task, so that no thread waits long for the last one.
    let most = if block < UNPACK_FROM { usize::MAX } else { 1 };
    let chunk = panels.div_ceil(tasks).clamp(1, most);
    let chunks = panels.div_ceil(chunk);
    // Weights are packed in the order of the layers.
    if let Some(last) = weight.segments.last() {
        cpu.pool.prefetch_next(last.data.next());
    }
    cpu.pool.run(chunks * row_blocks.len(), &|index| {
        let groups = row_blocks[index % row_blocks.len()];
        let start = index / row_blocks.len() * chunk;
        let mut offset = 0;
        for segment in &weight.segments {
            let end = offset + segment.panels();
            let range = start.max(offset)..(start + chunk).min(end);
            if !range.is_empty() {
                let range = range.start - offset..range.end - offset;
                let x = x
                    .iter()
                    .find(|x| x.arithmetic == segment.arithmetic)
                    .expect("`linear` makes the activations of every segment");
                run(
                    cpu.tier,
                    segment.arithmetic,
                    Panels { weight, segment, range, groups, x, out, scratch: &cpu.scratch },
                );
            }
            offset = end;
        }
    });
}

/// Consecutive panels of one segment times a block of rows.
struct Panels<'a> {
    weight: &'a Packed,
    segment: &'a Segment,
    range: Range<usize>,
    groups: &'a [Group],
    x: &'a Activations,
    out: Shared<f32>,
    scratch: &'a Mutex<Vec<Vec<u32>>>,
}

impl ProductKernel for Panels<'_> {
    #[inline(always)]
    fn exact<L: Lanes>(self) {
        self.each::<Exact<L>>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn pairs(self) {
        self.each::<PairProduct>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn integers<I: Integers>(self) {
        self.each::<IntegerDot<I>>();
    }
}

/// Multiplies all panels as they are packed.
struct AsPacked<'a>(Panels<'a>);

impl<P: Dot> Visitor<P> for AsPacked<'_> {
    #[inline(always)]
    fn visit<S: Source<P>>(self) {
        for panel in self.0.range.clone() {
            // SAFETY: the panel holds all blocks by `Segment::stride`.
            unsafe { self.0.panel::<P, S>(panel, self.0.segment.panel(panel).as_ptr()) }
        }
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
        // SAFETY: `Panels::each` hands a whole panel and room for it.
        unsafe { unpack::<P, S>(self.panel, self.blocks, self.to) }
    }
}

impl Panels<'_> {
    /// Unpacks each panel first where enough groups of rows share it; the sums are the same.
    #[inline(always)]
    fn each<P: Reads>(self) {
        let encoding = self.segment.encoding;
        let bytes = unpacked_bytes::<P>(scales(encoding), block_len(encoding));
        let as_multiplied = bytes == block_bytes(encoding);
        if self.groups.len() < UNPACK_FROM || as_multiplied {
            return P::visit(encoding, AsPacked(self));
        }
        let blocks = self.blocks();
        let spare = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unpacked = spare().pop().unwrap_or_default();
        unpacked.resize(blocks * bytes / size_of::<u32>(), 0);
        let to: *mut u8 = unpacked.as_mut_ptr().cast();
        for panel in self.range.clone() {
            P::visit(encoding, Unpack { panel: self.segment.panel(panel).as_ptr(), blocks, to });
            // SAFETY: all blocks have just been unpacked.
            unsafe {
                match scales(encoding) {
                    // Pairs are packed as they are multiplied, and integers have scales.
                    0 if P::STEP == 1 => self.panel::<P, Unpacked<0>>(panel, to),
                    0 | 1 => self.panel::<P, Unpacked<1>>(panel, to),
                    _ => self.panel::<P, Unpacked<2>>(panel, to),
                }
            }
        }
        spare().push(unpacked);
    }

    /// Blocks of a panel.
    fn blocks(&self) -> usize {
        self.weight.cols.div_ceil(block_len(self.segment.encoding))
    }

    /// # Safety
    /// `bytes` points to the blocks of panel number `panel`, as `S` reads them.
    #[inline(always)]
    unsafe fn panel<P: Dot, S: Source<P>>(&self, panel: usize, bytes: *const u8) {
        let Self { weight, segment, x, .. } = self;
        let blocks = self.blocks();
        let steps = block_len(segment.encoding) / P::STEP;
        assert_eq!(steps, S::GROUPS * S::STEPS, "the source reads whole blocks");
        assert_eq!(steps * blocks, x.steps, "the activations have the steps of the panel");
        let col = segment.start + panel * PANEL;
        let cols = (segment.rows - panel * PANEL).min(PANEL);
        // Tile by tile: the weights of one stay in the first-level cache while all rows pass.
        for (first, group) in (0..2).flat_map(|first| self.groups.iter().map(move |g| (first, g))) {
            if first > 0 && PanelTask::tiles_at_once::<P, S>(group.m) > 1 {
                continue;
            }
            let sums = if S::SCALES == 2 || S::OFFSET != 0 {
                x.sums[group.start * x.blocks..][..group.m * x.blocks].as_ptr()
            } else {
                std::ptr::null()
            };
            let task = PanelTask {
                panel: bytes,
                blocks,
                x: x.words[group.start * x.steps..][..group.m * x.steps].as_ptr(),
                sums,
                scales: x.scales[group.start..][..group.m].as_ptr(),
                bias: weight.bias.get(col..col + cols).map_or(std::ptr::null(), <[f32]>::as_ptr),
                out: self.out.at(group.start * weight.rows + col),
                stride: weight.rows,
                rows: group.rows,
                cols,
            };
            // SAFETY: the caller's contract for the panel; the activations hold all steps as
            // asserted, and the sums and scales of all slots; the output has `group.rows`
            // rows from `group.start` on and `cols` columns from `col` on, and no other task has
            // them.
            unsafe { task.run::<P, S>(group.m, first) }
        }
    }
}
