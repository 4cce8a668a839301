//! Paged attention: which rows, heads and spans of the context are computed together, by whom.
//!
//! A task is one key/value head, or all, and a block of rows of one sequence; [`super::attention_tile`] has
//! the arithmetic. The context is cut at fixed positions: into tiles of 64 tokens, which update the
//! softmax, and spans of 512 tokens, whose results are merged in order. So a row's result does not
//! depend on how the work is cut; a long context can be shared among the threads span by span.
#![allow(unsafe_code)] // Tasks write disjoint parts of one output.

use std::cmp::Reverse;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activations::MOST_ROWS;
#[cfg(target_arch = "x86_64")]
use super::attention_pages::Halves;
use super::attention_pages::{Numbers, Pages, Scratch, Widened};
use super::attention_tile::{Block, PAGES, State, Tile, TilePages};
use super::lanes::{LANES, Lanes};
use super::memory::{Shared, written_by};
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
    let mut tasks = input.tasks(cpu.threads());
    let spans: usize = tasks.iter().map(|task| task.spans().len()).sum();
    let weights = || tasks.iter().map(Task::weight);
    let heaviest = weights().max().unwrap_or(0);
    let uneven = tasks.len() < 4 * cpu.threads() || heaviest * cpu.threads() > weights().sum();
    let split = uneven && spans > tasks.len();
    let size = input.batch.positions.len() * input.heads.num_heads * input.heads.head_dim;
    // SAFETY: the tasks cover all rows and heads, and each writes all its outputs.
    unsafe {
        written_by(size, |out| {
            if split {
                by_span(cpu, input, &tasks, out);
            } else {
                // What takes longest goes first in the share of each thread; of equal tasks the later rows, which see more.
                tasks.reverse();
                tasks.sort_by_key(|task| Reverse(task.weight()));
                let threads = cpu.threads();
                let dealt =
                    (0..threads).flat_map(|first| tasks.iter().skip(first).step_by(threads));
                let work: Vec<_> = dealt.map(|task| (task, task.spans())).collect();
                cpu.pool.run(work.len(), &|index| {
                    let mut state = None;
                    input.run(cpu, TaskKernel::new(input, &work, index, &mut state));
                    input.write(cpu, work[index].0, state, out);
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
    out: Shared<MaybeUninit<f32>>,
) {
    let spans = |task: &Task<'_>| task.spans().map(|span| span..span + 1);
    let work: Vec<_> =
        tasks.iter().flat_map(|task| spans(task).map(move |span| (task, span))).collect();
    let mut states: Vec<Option<State>> = work.iter().map(|_| None).collect();
    let shared = Shared::new(&mut states);
    cpu.pool.run(work.len(), &|index| {
        // SAFETY: each index is visited once.
        let state = &mut unsafe { shared.part(index, 1) }[0];
        input.run(cpu, TaskKernel::new(input, &work, index, state));
    });
    let mut states = states.into_iter();
    for task in tasks {
        let mut merged = None;
        for state in states.by_ref().take(task.spans().len()) {
            cpu.tier.run(Merge { into: &mut merged, state });
        }
        input.write(cpu, task, merged, out);
    }
}

/// Some rows of a run and some key/value heads.
struct Task<'a> {
    run: &'a Run,
    kv_heads: Range<usize>,
    rows: Range<usize>,
    /// First and last position that any of the rows sees.
    context: (usize, usize),
}

impl Task<'_> {
    /// Spans that the rows see.
    fn spans(&self) -> Range<usize> {
        spans(self.context)
    }

    /// About how long it takes.
    fn weight(&self) -> usize {
        self.rows.len() * self.kv_heads.len() * self.spans().len()
    }
}

/// Spans of the positions from `first` to `last`.
fn spans((first, last): (usize, usize)) -> Range<usize> {
    first / SPAN..last / SPAN + 1
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

    fn tasks(&self, threads: usize) -> Vec<Task<'_>> {
        let step = (QUERIES / self.group()).max(1);
        let mut tasks = Vec::new();
        // Heads lie side by side in a page, so one task reads all for a single row, where such rows have spans for all
        // threads.
        let single = self.batch.runs.iter().filter(|run| run.rows.len() == 1);
        let single = single.map(|run| spans(self.context(run.rows.clone())).len());
        let together = single.sum::<usize>() >= 4 * threads;
        for run in &self.batch.runs {
            let heads = if together && run.rows.len() == 1 { self.heads.num_kv_heads } else { 1 };
            for start in run.rows.clone().step_by(step) {
                let rows = start..(start + step).min(run.rows.end);
                let context = self.context(rows.clone());
                for kv_head in (0..self.heads.num_kv_heads).step_by(heads) {
                    let (kv_heads, rows) = (kv_head..kv_head + heads, rows.clone());
                    tasks.push(Task { run, kv_heads, rows, context });
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

    /// Writes what the state has for the task.
    fn write(
        &self,
        cpu: &Cpu,
        task: &Task<'_>,
        state: Option<State>,
        out: Shared<MaybeUninit<f32>>,
    ) {
        let state = state.expect("a task has a span");
        cpu.tier.run(Write { heads: self.heads, task, state, out });
    }

    /// The task's queries of a head, times the scale, in blocks that are computed together; their slots come after
    /// `before` others.
    #[inline(always)]
    fn blocks<P: Product>(&self, task: &Task<'_>, kv_head: usize, before: usize) -> Vec<Block> {
        let full = if P::L::WIDE { 8 } else { 6 };
        let (dim, group) = (self.heads.head_dim, self.group());
        let queries = task.rows.len() * group;
        let mut blocks = Vec::new();
        for first in (0..queries).step_by(full) {
            let count = full.min(queries - first);
            let m = if count > 4 { full } else { count };
            let mut slots: [(&[f32], _); MOST_ROWS] = [(&[], (0, 0)); MOST_ROWS];
            for (slot, query) in (first..first + count).enumerate() {
                let (row, head) =
                    (task.rows.start + query / group, kv_head * group + query % group);
                let query = &self.qkv[row * self.width + head * dim..][..dim];
                slots[slot] = (query, self.seen(row));
            }
            let mut block = Block::new(before + first, m, dim / P::STEP * P::PARTS);
            block.set::<P>(&slots[..count], self.op.scale, E::SCALED);
            blocks.push(block);
        }
        blocks
    }
}

/// A task and some of its spans.
type Work<'a> = (&'a Task<'a>, Range<usize>);

/// Where the first tile of the work from position `start` on starts.
#[inline(always)]
fn first_tile((task, spans): &Work<'_>, start: usize) -> Option<usize> {
    let (first, last) = task.context;
    let start = start.max(first).max(spans.start * SPAN) / TILE * TILE;
    (start <= last && start < spans.end * SPAN).then_some(start)
}

/// Computes some spans of a task and merges them to one state.
struct TaskKernel<'a, E> {
    input: &'a Attention<'a, E>,
    work: &'a Work<'a>,
    /// What this thread will probably do next.
    next: Option<&'a Work<'a>>,
    state: &'a mut Option<State>,
}

impl<'a, E: PageElement> TaskKernel<'a, E> {
    fn new(
        input: &'a Attention<'a, E>,
        work: &'a [Work<'a>],
        index: usize,
        state: &'a mut Option<State>,
    ) -> Self {
        Self { input, work: &work[index], next: work.get(index + 1), state }
    }
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
        let (task, spans) = self.work;
        let mut slots = 0;
        let mut heads = Vec::with_capacity(task.kv_heads.len());
        for kv_head in task.kv_heads.clone() {
            let blocks = self.input.blocks::<P>(task, kv_head, slots);
            slots += blocks.iter().map(|block| block.m).sum::<usize>();
            heads.push((kv_head, blocks));
        }
        // Widening pays when several blocks share it, and pads the rows of values.
        let direct = heads[0].1.len() == 1 && padded == dim;
        let mut scratch = Scratch::new(dim, if direct { 0 } else { padded });
        for span in spans.clone() {
            let mut state = State::new(slots, padded);
            let mut next = first_tile(self.work, span * SPAN);
            while let Some(start) = next.filter(|&start| start < (span + 1) * SPAN) {
                next = first_tile(self.work, start + TILE);
                for (kv_head, blocks) in &heads {
                    let mut tile = self.input.tile(task, *kv_head, start);
                    tile.ahead = self.ahead(*kv_head, next).unwrap_or(tile.pages);
                    if direct {
                        for block in blocks {
                            state.update::<P, D>(block, &tile);
                        }
                    } else {
                        let tile = scratch.widen::<P, D>(&tile);
                        for block in blocks {
                            state.update::<P, W>(block, &tile);
                        }
                    }
                }
            }
            Merge { into: self.state, state: Some(state) }.run::<P::L>();
        }
    }

    /// What is read after a head's tile: the `next` tile, or the first one of the next work.
    #[inline(always)]
    fn ahead<N>(&self, kv_head: usize, next: Option<usize>) -> Option<TilePages<N>> {
        let task = self.work.0;
        if let Some(start) = next {
            return Some(self.input.tile(task, kv_head, start).pages);
        }
        let (index, task) = (kv_head - task.kv_heads.start, self.next?.0);
        let kv_head = (task.kv_heads.start + index).min(task.kv_heads.end - 1);
        let start = first_tile(self.next?, 0)?;
        Some(self.input.tile(task, kv_head, start).pages)
    }
}

impl<E: PageElement> Attention<'_, E> {
    /// Keys and values of a head in the tile at `start`.
    #[inline(always)]
    fn tile<N>(&self, task: &Task<'_>, kv_head: usize, start: usize) -> Tile<N> {
        let (_, last) = task.context;
        let Heads { num_kv_heads, head_dim, .. } = self.heads;
        let (numbers, head) = (BLOCK_SIZE * head_dim, E::head_len(head_dim));
        let half = self.pages.len() / 2;
        let table = &self.batch.blocks[task.run.blocks.clone()];
        let pages: [_; PAGES] = std::array::from_fn(|i| {
            // A page behind the context is never used; any other stands in for it.
            let index = (start / BLOCK_SIZE + i).min(last / BLOCK_SIZE);
            let at = (table[index].0 as usize * num_kv_heads + kv_head) * head;
            (&self.pages[at..at + head], &self.pages[half + at..][..head])
        });
        let scales = pages.map(|(keys, values)| {
            (keys[numbers..].as_ptr().cast(), values[numbers..].as_ptr().cast())
        });
        let valid = (last + 1 - start).min(TILE);
        let pages = pages.map(|(keys, values)| (keys.as_ptr().cast(), values.as_ptr().cast()));
        Tile { start, valid, pages, ahead: pages, scales, row: head_dim }
    }
}

/// Writes the outputs of a task.
struct Write<'a> {
    heads: Heads,
    task: &'a Task<'a>,
    state: State,
    /// `[tokens, heads * head_dim]`.
    out: Shared<MaybeUninit<f32>>,
}

impl Kernel for Write<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { heads: Heads { num_heads, num_kv_heads, head_dim }, task, state, out } = self;
        let group = num_heads / num_kv_heads;
        // All heads have as many slots.
        let slots = state.slots() / task.kv_heads.len();
        for (index, kv_head) in task.kv_heads.clone().enumerate() {
            let mut slot = index * slots;
            for row in task.rows.clone() {
                for head in kv_head * group..(kv_head + 1) * group {
                    // SAFETY: no other task has this row and head.
                    let out = unsafe { out.part((row * num_heads + head) * head_dim, head_dim) };
                    state.finish(slot, out);
                    slot += 1;
                }
            }
        }
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
