//! Paged attention: which rows, heads and spans of the context are computed together, by whom.
//!
//! A task is one key/value head and a block of rows of one sequence; [`super::attention_tile`] has
//! the arithmetic. The context is cut at fixed positions: into tiles of 64 tokens, which update the
//! softmax, and spans of 512 tokens, whose results are merged in order. So a row's result does not
//! depend on how the work is cut; a long context can be shared among the threads span by span.
#![allow(unsafe_code)] // Tasks write disjoint parts of one output.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::attention_pages::Halves;
use super::attention_pages::{Numbers, Pages, Scratch, Widened};
use super::attention_tile::{Block, PAGES, State, Tile};
use super::lanes::{LANES, Lanes};
use super::memory::{CACHE_LINE, Shared, prefetch, written_by};
use super::page::PageElement;
#[cfg(target_arch = "x86_64")]
use super::product::PairProduct;
use super::product::{self, Exact, Product, ProductKernel};
use super::tier::Kernel;
use super::{Arithmetic, Cpu};
use crate::backend::{AttentionOp, Batch, Heads, Run};
use crate::config::BLOCK_SIZE;
use crate::weights::Encoding;

/// Tokens of a tile.
pub(super) const TILE: usize = 4 * BLOCK_SIZE;
/// Tokens of a span.
const SPAN: usize = 8 * TILE;
/// Queries (rows times heads) of a task: enough to pay for widening the keys and values.
const QUERIES: usize = 192;

/// The inputs of one call.
pub(crate) struct Attention<'a, E> {
    /// `[tokens, width]`; queries come first.
    pub(crate) qkv: &'a [f32],
    pub(crate) width: usize,
    pub(crate) heads: Heads,
    pub(crate) op: AttentionOp,
    /// `[2, num_blocks, page]`; a page is as in [`super::page`].
    pub(crate) pages: &'a [E],
    pub(crate) batch: &'a Batch,
}

/// `[tokens, heads * head_dim]`. The runs of the batch cover all rows, in order.
pub(crate) fn attention<E: PageElement>(cpu: &Cpu, input: &Attention<'_, E>) -> Vec<f32> {
    let tasks = input.tasks();
    let spans: usize = tasks.iter().map(|task| task.spans.len()).sum();
    let size = input.batch.positions.len() * input.heads.num_heads * input.heads.head_dim;
    let split = tasks.len() < 4 * cpu.threads() && spans > tasks.len();
    // SAFETY: the tasks cover all rows and heads, and each writes all its outputs.
    unsafe {
        written_by(size, |out| {
            if split {
                by_span(cpu, input, &tasks, out);
            } else {
                // Later rows have more to do, so they go first.
                cpu.pool.run(tasks.len(), &|index| {
                    let task = &tasks[tasks.len() - 1 - index];
                    let mut state = None;
                    let spans = task.spans.clone();
                    input.run(cpu, TaskKernel { input, task, spans, state: &mut state });
                    input.write(task, &state.expect("a task has a span"), out);
                });
            }
        })
    }
}

/// Computes the spans of all tasks side by side, then merges them in order.
fn by_span<E: PageElement>(
    cpu: &Cpu,
    input: &Attention<'_, E>,
    tasks: &[Task<'_>],
    out: Shared<f32>,
) {
    let work: Vec<_> =
        tasks.iter().flat_map(|task| task.spans.clone().map(move |span| (task, span))).collect();
    let mut states: Vec<Option<State>> = work.iter().map(|_| None).collect();
    let shared = Shared::new(&mut states);
    cpu.pool.run(work.len(), &|index| {
        let (task, span) = work[index];
        // SAFETY: each index is visited once.
        let state = &mut unsafe { shared.part(index, 1) }[0];
        input.run(cpu, TaskKernel { input, task, spans: span..span + 1, state });
    });
    let mut states = states.into_iter();
    for task in tasks {
        let mut merged = None;
        for state in states.by_ref().take(task.spans.len()) {
            cpu.tier.run(Merge { into: &mut merged, state });
        }
        input.write(task, &merged.expect("a task has a span"), out);
    }
}

/// Some rows of a run and one key/value head.
struct Task<'a> {
    run: &'a Run,
    kv_head: usize,
    rows: Range<usize>,
    /// Spans that the rows see.
    spans: Range<usize>,
}

impl<E: PageElement> Attention<'_, E> {
    /// In pairs where the cache has bf16 and the machine multiplies pairs of it.
    fn run<K: ProductKernel>(&self, cpu: &Cpu, kernel: K) {
        let paired = E::IS_BF16 && self.heads.head_dim.is_multiple_of(LANES);
        let arithmetic = if paired { cpu.arithmetic(Encoding::BF16) } else { Arithmetic::Exact };
        product::run(cpu.tier, arithmetic, kernel);
    }

    fn group(&self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }

    fn tasks(&self) -> Vec<Task<'_>> {
        let step = (QUERIES / self.group()).max(1);
        let mut tasks = Vec::new();
        for run in &self.batch.runs {
            for start in run.rows.clone().step_by(step) {
                let rows = start..(start + step).min(run.rows.end);
                let (first, last) = self.context(rows.clone());
                let spans = first / SPAN..last / SPAN + 1;
                for kv_head in 0..self.heads.num_kv_heads {
                    tasks.push(Task { run, kv_head, rows: rows.clone(), spans: spans.clone() });
                }
            }
        }
        tasks
    }

    /// First and last position that any of the rows sees.
    fn context(&self, rows: Range<usize>) -> (usize, usize) {
        let seen = rows.map(|row| self.seen(row));
        seen.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap_or((0, 0))
    }

    /// First and last position that the row sees.
    fn seen(&self, row: usize) -> (usize, usize) {
        let position = self.batch.positions[row] as usize;
        let first = self.op.window.map_or(0, |window| (position + 1).saturating_sub(window));
        (first, position)
    }

    fn write(&self, task: &Task<'_>, state: &State, out: Shared<f32>) {
        let dim = self.heads.head_dim;
        for (query, row) in task.rows.clone().enumerate() {
            for head in 0..self.group() {
                let slot = query * self.group() + head;
                let at = (row * self.heads.num_heads + task.kv_head * self.group() + head) * dim;
                // SAFETY: no other task has this row and head.
                let out = unsafe { out.part(at, dim) };
                state.finish(slot, out);
            }
        }
    }

    /// The task's queries, times the scale, in blocks that are computed together.
    #[inline(always)]
    fn blocks<P: Product>(&self, task: &Task<'_>) -> Vec<Block> {
        let sizes: &[usize] = if P::L::WIDE { &[1, 2, 4, 8] } else { &[1, 2, 3, 4, 6] };
        let full = sizes[sizes.len() - 1];
        let (dim, group) = (self.heads.head_dim, self.group());
        let queries = task.rows.len() * group;
        let mut blocks = Vec::new();
        for first in (0..queries).step_by(full) {
            let count = full.min(queries - first);
            let m = sizes.iter().copied().find(|&m| m >= count).unwrap_or(full);
            let mut block = Block::new(first, m, dim / P::STEP * P::PARTS);
            for slot in 0..count {
                let row = task.rows.start + (first + slot) / group;
                let head = task.kv_head * group + (first + slot) % group;
                let query = &self.qkv[row * self.width + head * dim..][..dim];
                block.set::<P>(slot, (query, E::SCALED), self.op.scale, self.seen(row));
            }
            blocks.push(block);
        }
        blocks
    }
}

/// Computes some spans of a task and merges them to one state.
struct TaskKernel<'a, E> {
    input: &'a Attention<'a, E>,
    task: &'a Task<'a>,
    spans: Range<usize>,
    state: &'a mut Option<State>,
}

impl<E: PageElement> ProductKernel for TaskKernel<'_, E> {
    #[inline(always)]
    fn exact<L: Lanes>(self) {
        self.each::<Exact<L>, Numbers<E>, Widened<E>>();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn pairs(self) {
        self.each::<PairProduct, Halves, Widened<E>>();
    }
}

impl<E: PageElement> TaskKernel<'_, E> {
    /// `D` reads the pages of the cache, `W` what was widened.
    #[inline(always)]
    fn each<P: Product, D: Pages<P>, W: Pages<P, Number = u32>>(self) {
        let dim = self.input.heads.head_dim;
        let vectors = if P::L::WIDE { 2 * LANES } else { LANES };
        let padded = dim.next_multiple_of(vectors);
        let blocks = self.input.blocks::<P>(self.task);
        let slots = blocks.iter().map(|block| block.m).sum();
        let (first, last) = self.input.context(self.task.rows.clone());
        // Widening pays when several blocks share it, and pads the rows of values.
        let direct = blocks.len() == 1 && padded == dim;
        let mut scratch = Scratch::new(dim, if direct { 0 } else { padded });
        for span in self.spans.clone() {
            let mut state = State::new(slots, padded);
            let tiles =
                (span * SPAN).max(first) / TILE..((span + 1) * SPAN - 1).min(last) / TILE + 1;
            for tile in tiles {
                self.prefetch((tile + 1) * TILE, last.min(self.spans.end * SPAN - 1));
                let tile = self.tile::<D::Number>(tile * TILE, last);
                if direct {
                    for block in &blocks {
                        state.update::<P, D>(block, &tile);
                    }
                } else {
                    let tile = scratch.widen::<P, D>(&tile, padded);
                    for block in &blocks {
                        state.update::<P, W>(block, &tile);
                    }
                }
            }
            Merge { into: self.state, state: Some(state) }.run::<P::L>();
        }
    }

    /// Has the memory bring what [`Self::tile`] will want. Pages are too short, and lie too far apart, for
    /// the machine to see what comes next.
    #[inline(always)]
    fn prefetch(&self, start: usize, last: usize) {
        if start > last {
            return;
        }
        let head = E::head_len(self.input.heads.head_dim) * size_of::<E>();
        for (keys, values) in self.tile::<u8>(start, last).pages {
            for at in (0..head).step_by(CACHE_LINE) {
                prefetch(keys.wrapping_add(at));
                prefetch(values.wrapping_add(at));
            }
        }
    }

    /// Keys and values of this head in the pages from position `start` on, up to that of `last`.
    #[inline(always)]
    fn tile<N>(&self, start: usize, last: usize) -> Tile<N> {
        let Heads { num_kv_heads, head_dim, .. } = self.input.heads;
        let (numbers, head) = (BLOCK_SIZE * head_dim, E::head_len(head_dim));
        let half = self.input.pages.len() / 2;
        let table = &self.input.batch.blocks[self.task.run.blocks.clone()];
        let pages: [_; PAGES] = std::array::from_fn(|i| {
            // A page behind the context is never used; any other stands in for it.
            let index = (start / BLOCK_SIZE + i).min(last / BLOCK_SIZE);
            let at = (table[index].0 as usize * num_kv_heads + self.task.kv_head) * head;
            (&self.input.pages[at..at + head], &self.input.pages[half + at..][..head])
        });
        let scales = pages.map(|(keys, values)| {
            (keys[numbers..].as_ptr().cast(), values[numbers..].as_ptr().cast())
        });
        let valid = (last + 1 - start).min(TILE);
        let pages = pages.map(|(keys, values)| (keys.as_ptr().cast(), values.as_ptr().cast()));
        Tile { start, valid, pages, scales, row: head_dim }
    }
}

/// Adds the next span to what came before it.
struct Merge<'a> {
    into: &'a mut Option<State>,
    state: Option<State>,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let state = self.state.expect("every span was computed");
        match self.into {
            None => *self.into = Some(state),
            Some(into) => into.merge::<L>(&state),
        }
    }
}
