//! [`Activations`]: what projections multiply weights with, rounded and in the order that the kernel reads.
#![allow(unsafe_code)] // Threads write disjoint parts of one buffer.

use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use half::bf16;

use super::lanes::{LANES, Lanes, array_of};
use super::memory::Shared;
use super::pack::{Packed, Segment};
use super::product::{ProductKernel, run};
#[cfg(target_arch = "x86_64")]
use super::x86::Avx512;
#[cfg(target_arch = "x86_64")]
use super::x86_words::{Integers, Pairs};
use super::{Arithmetic, Cpu};

/// Most rows, or queries, that are computed together.
pub(super) const MOST_ROWS: usize = 8;

/// Rows that are computed together: `rows` of them, in `m` slots of which the last may be empty.
pub(super) struct Group {
    pub(super) start: usize,
    pub(super) rows: usize,
    pub(super) m: usize,
}

/// Cuts `rows` into full groups and a last one of the smallest size that fits. With integers two groups of four are
/// faster than one of six and one of two.
pub(super) fn groups(rows: usize, wide: bool, integers: bool) -> Vec<Group> {
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

/// Activations in the order that [`super::gemm::PanelTask`] reads: per group `[step][slot]` words, and `[block][slot]`
/// sums of 32.
pub(super) struct Activations {
    pub(super) arithmetic: Arithmetic,
    pub(super) words: Vec<u32>,
    pub(super) sums: Vec<f32>,
    /// What the words and sums of each slot count in.
    pub(super) scales: Vec<f32>,
    /// Words per slot.
    pub(super) steps: usize,
    /// Sums per slot, or 0.
    pub(super) blocks: usize,
}

impl Activations {
    pub(super) fn new(
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
        let mut words = cpu.spare(slots * steps);
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
struct Unrounded<L>(PhantomData<L>);

impl<L: Lanes> Convert for Unrounded<L> {
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
            interleave::<C::L>(m, &converted, words);
        }
    }
}

/// `[slot][step]` of `m` slots to `[step][slot]`, as many steps as `words` has room for.
#[inline(always)]
pub(super) fn interleave<L: Lanes>(
    m: usize,
    converted: &[[u32; 32]; MOST_ROWS],
    words: &mut [u32],
) {
    match m {
        8 => interleave_eight::<L>(converted, words),
        6 => interleave_some::<6>(converted, words),
        4 => interleave_some::<4>(converted, words),
        3 => interleave_some::<3>(converted, words),
        2 => interleave_some::<2>(converted, words),
        1 => interleave_some::<1>(converted, words),
        _ => unreachable!("no groups of {m} rows"),
    }
}

#[inline(always)]
fn interleave_some<const M: usize>(converted: &[[u32; 32]; MOST_ROWS], words: &mut [u32]) {
    for (step, words) in words.as_chunks_mut::<M>().0.iter_mut().enumerate() {
        *words = array_of!(slot < M => converted[slot][step]);
    }
}

/// For eight slots, sixteen steps at once.
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
        self.each::<Unrounded<L>>();
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
