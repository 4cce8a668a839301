//! The arithmetic of paged attention: one block of queries against one tile of 64 tokens.
//!
//! Scores: `[query][16 tokens]`, one lane per token, as keys are stored `[dim][16 tokens]`. Softmax is
//! online: a greatest score, a sum and an unnormalised output per query. Outputs: one lane per
//! dimension, as values are stored `[token][dim]`. Sums go over dimensions or tokens step by step, of one
//! number or a pair ([`Product`]). Tokens that a query does not see have weight zero, and a tile of which it sees none
//! changes nothing, bit for bit, as long as values are finite: zero times those of a later token that are not is none.
#![allow(unsafe_code)] // Keys and values are read through raw pointers.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::f16;

use super::activations::{MOST_ROWS, interleave};
use super::attention::TILE;
use super::attention_pages::Pages;
use super::attention_softmax::{Masks, softmax};
use super::lanes::{LANES, Lanes, array_of};
use super::memory::{CACHE_LINE, prefetch};
use super::page::{GROUP, hadamard};
use super::product::Product;
use crate::config::BLOCK_SIZE;

const _: () = assert!(BLOCK_SIZE == LANES, "a page's tokens are the lanes of a score");

pub(super) const PAGES: usize = TILE / BLOCK_SIZE;
/// Row of scores: a tile, and a page that is written when pages are taken two at a time.
pub(super) const SCORES: usize = TILE + BLOCK_SIZE;

/// Queries that are computed together.
pub(super) struct Block {
    /// First slot in the [`State`].
    first: usize,
    /// Slots; the last ones may be empty.
    pub(super) m: usize,
    /// Words `[step][part][slot]`.
    queries: Vec<u32>,
    /// First and last position that each slot sees; an empty slot sees none.
    seen: [(usize, usize); 8],
    /// First and last position that any slot sees.
    bounds: (usize, usize),
}

impl Block {
    /// Of `m` slots, whose queries have `steps` steps.
    pub(super) fn new(first: usize, m: usize, steps: usize) -> Self {
        let none = (usize::MAX, 0);
        Self { first, m, queries: vec![0; m * steps], seen: [none; 8], bounds: none }
    }

    /// Sets the first slots: a query, times `scale`, and the first and last position that it sees, for each.
    /// `transformed`: as the keys are, which are multiples of scales.
    #[inline(always)]
    pub(super) fn set<P: Product>(
        &mut self,
        slots: &[(&[f32], (usize, usize))],
        scale: f32,
        transformed: bool,
    ) {
        for (block, words) in self.queries.chunks_mut(32 / P::STEP * P::PARTS * self.m).enumerate()
        {
            let mut converted = [[0; 32]; MOST_ROWS];
            for ((query, _), converted) in slots.iter().zip(&mut converted) {
                let query = &query[block * 32..];
                let mut numbers = [[0.0; 32]];
                for (number, &q) in numbers[0].iter_mut().zip(query) {
                    *number = q * scale;
                }
                if transformed {
                    hadamard(&mut numbers[0][..query.len().min(32)]);
                }
                for part in 0..P::PARTS {
                    let mut packed = numbers;
                    P::pack(&mut packed);
                    P::subtract(&mut numbers, &packed);
                    for step in 0..32 / P::STEP {
                        converted[step * P::PARTS + part] = packed[0][step].to_bits();
                    }
                }
            }
            interleave::<P::L>(self.m, &converted, words);
        }
        for (slot, &(_, seen)) in slots.iter().enumerate() {
            self.seen[slot] = seen;
            self.bounds = (self.bounds.0.min(seen.0), self.bounds.1.max(seen.1));
        }
    }
}

/// Keys and values of the pages of a tile.
pub(super) type TilePages<E> = [(*const E, *const E); PAGES];

/// Keys and values of 64 positions.
pub(super) struct Tile<E> {
    /// Position of the first token, a multiple of 64.
    pub(super) start: usize,
    /// Tokens that are in the cache, from the first on; what comes behind may be anything.
    pub(super) valid: usize,
    pub(super) pages: TilePages<E>,
    /// Pages that will be read next. The memory is to bring them meanwhile: they are too short, and lie too far apart,
    /// for the machine to see what comes.
    pub(super) ahead: TilePages<E>,
    /// Scales `[dim / 32][16]` of each page's keys and values, where numbers are multiples of them. Numbers
    /// stay integers, exact in every type: scores are scaled, and weights before they meet values.
    pub(super) scales: [(*const f16, *const f16); PAGES],
    /// Distance of two tokens' values in the cache.
    pub(super) row: usize,
}

/// Greatest score, sum of weights and weighted sum of values, per slot.
pub(super) struct State {
    greatest: Vec<f32>,
    /// `[slot][16]`: added up at the end.
    sums: Vec<f32>,
    /// `[slot][padded]`.
    outputs: Vec<f32>,
    padded: usize,
}

impl State {
    pub(super) fn new(slots: usize, padded: usize) -> Self {
        Self {
            greatest: vec![f32::NEG_INFINITY; slots],
            sums: vec![0.0; slots * LANES],
            outputs: vec![0.0; slots * padded],
            padded,
        }
    }

    pub(super) fn slots(&self) -> usize {
        self.greatest.len()
    }

    /// Takes the tile in for all queries of the block.
    #[inline(always)]
    pub(super) fn update<P: Product, D: Pages<P>>(
        &mut self,
        block: &Block,
        tile: &Tile<D::Number>,
    ) {
        let (first, last) = block.bounds;
        let start = first.saturating_sub(tile.start);
        if last < tile.start || start >= TILE {
            return;
        }
        let tokens = (start, (last + 1 - tile.start).min(TILE));
        match (P::L::WIDE, block.m) {
            (true, 1) => self.update_block::<P, D, 1, 2>(block, tile, tokens),
            (true, 2) => self.update_block::<P, D, 2, 2>(block, tile, tokens),
            (true, 3) => self.update_block::<P, D, 3, 2>(block, tile, tokens),
            (true, 4) => self.update_block::<P, D, 4, 2>(block, tile, tokens),
            (true, 8) => self.update_block::<P, D, 8, 2>(block, tile, tokens),
            (false, 1) => self.update_block::<P, D, 1, 1>(block, tile, tokens),
            (false, 2) => self.update_block::<P, D, 2, 1>(block, tile, tokens),
            (false, 3) => self.update_block::<P, D, 3, 1>(block, tile, tokens),
            (false, 4) => self.update_block::<P, D, 4, 1>(block, tile, tokens),
            (false, 6) => self.update_block::<P, D, 6, 1>(block, tile, tokens),
            (_, m) => unreachable!("no blocks of {m} queries"),
        }
    }

    #[inline(always)]
    fn update_block<P: Product, D: Pages<P>, const M: usize, const T: usize>(
        &mut self,
        block: &Block,
        tile: &Tile<D::Number>,
        (start, end): (usize, usize),
    ) {
        for &(keys, values) in tile.ahead.iter().filter(|_| D::SCALED) {
            // As many bytes of scales stand behind the numbers as a head has dimensions.
            for at in (0..tile.row).step_by(CACHE_LINE) {
                prefetch_number::<P, D>(keys, BLOCK_SIZE * tile.row + at);
                prefetch_number::<P, D>(values, BLOCK_SIZE * tile.row + at);
            }
        }
        let mut scores = [[0.0; SCORES]; M];
        let pages = (start / BLOCK_SIZE, end.div_ceil(BLOCK_SIZE));
        for page in (pages.0..pages.1).step_by(T) {
            let keys = array_of!(t < T => tile.pages[(page + t).min(pages.1 - 1)].0);
            let ahead = array_of!(t < T => tile.ahead[(page + t).min(pages.1 - 1)].0);
            let scales = array_of!(t < T => tile.scales[(page + t).min(pages.1 - 1)].0);
            let at = page * BLOCK_SIZE;
            score_pages::<P, D, M, T>(&block.queries, (keys, ahead, scales), at, &mut scores);
        }
        let slots = block.first..block.first + M;
        let decay = softmax::<P::L, M>(
            &mut scores,
            &std::array::from_fn(|slot| Masks { seen: block.seen[slot], start: tile.start, pages }),
            &mut self.greatest[slots.clone()],
            &mut self.sums[slots.start * LANES..slots.end * LANES],
        );
        let (padded, tokens) = (self.padded, (start, end));
        let outputs = &mut self.outputs[block.first * padded..][..M * padded];
        if !D::SCALED {
            let weights = (&mut scores, &decay);
            return weigh_dims::<P, D, M, T>(tile, tokens, 0..padded, weights, outputs);
        }
        for (group, first) in (0..padded).step_by(GROUP).enumerate() {
            let mut weights = scores;
            for page in pages.0..pages.1 {
                // SAFETY: a page has scales of each group.
                let scale = unsafe { P::L::load_f16(tile.scales[page].1.add(group * LANES)) };
                scale_page(&mut weights, page, scale);
            }
            let dims = first..(first + GROUP).min(padded);
            weigh_dims::<P, D, M, T>(tile, tokens, dims, (&mut weights, &decay), outputs);
        }
    }

    /// Adds the state of the next span.
    #[inline(always)]
    pub(super) fn merge<L: Lanes>(&mut self, next: &Self) {
        for slot in 0..self.greatest.len() {
            let (a, b) = (self.greatest[slot], next.greatest[slot]);
            if b == f32::NEG_INFINITY {
                continue;
            }
            let greatest = if a > b { a } else { b };
            self.greatest[slot] = greatest;
            let (keep, take) = (L::splat(a - greatest).exp(), L::splat(b - greatest).exp());
            let (sums, outputs) =
                (slot * LANES..(slot + 1) * LANES, slot * self.padded..(slot + 1) * self.padded);
            if a == f32::NEG_INFINITY {
                self.sums[sums.clone()].copy_from_slice(&next.sums[sums]);
                self.outputs[outputs.clone()].copy_from_slice(&next.outputs[outputs]);
            } else {
                blend(&mut self.sums[sums.clone()], &next.sums[sums], keep, take);
                blend(&mut self.outputs[outputs.clone()], &next.outputs[outputs], keep, take);
            }
        }
    }

    /// Writes the normalised output of a slot.
    #[inline(always)]
    pub(super) fn finish(&self, slot: usize, out: &mut [MaybeUninit<f32>]) {
        let total: f32 = self.sums[slot * LANES..][..LANES].iter().sum();
        let scale = 1.0 / total;
        for (out, x) in out.iter_mut().zip(&self.outputs[slot * self.padded..]) {
            out.write(x * scale);
        }
    }
}

/// `to = to * keep + from * take`, for whole vectors.
#[inline(always)]
fn blend<L: Lanes>(to: &mut [f32], from: &[f32], keep: L, take: L) {
    for (to, from) in to.chunks_exact_mut(LANES).zip(from.chunks_exact(LANES)) {
        // SAFETY: chunks are 16 values.
        unsafe {
            let (a, b) = (L::load(to.as_ptr()), L::load(from.as_ptr()));
            a.mul(keep).add(b.mul(take)).store(to.as_mut_ptr());
        }
    }
}

/// Writes the products of all queries with the keys of `T` pages to `scores[..][at..]`, which are zero before.
#[inline(always)]
fn score_pages<P: Product, D: Pages<P>, const M: usize, const T: usize>(
    queries: &[u32],
    (keys, ahead, scales): ([*const D::Number; T], [*const D::Number; T], [*const f16; T]),
    at: usize,
    scores: &mut [[f32; SCORES]; M],
) {
    let steps = if D::SCALED { GROUP / P::STEP } else { queries.len() };
    for (group, queries) in queries.chunks(steps * P::PARTS * M).enumerate() {
        let mut sums = [[P::L::splat(0.0); T]; M];
        for (step, queries) in queries.chunks_exact(M * P::PARTS).enumerate() {
            let step = group * steps + step;
            for page in ahead {
                prefetch_number::<P, D>(page, step * D::KEYS);
            }
            // SAFETY: a page holds the keys of each step that a query has.
            unsafe {
                let keys = array_of!(t < T => D::keys(keys[t].add(step * D::KEYS)));
                for queries in queries.chunks_exact(M) {
                    for (sums, query) in sums.iter_mut().zip(queries) {
                        add_products::<P, T>(sums, keys, P::broadcast(query));
                    }
                }
            }
        }
        let mut scale = [P::L::splat(1.0); T];
        if D::SCALED {
            // SAFETY: a page has scales of each group.
            scale = unsafe { array_of!(t < T => P::L::load_f16(scales[t].add(group * LANES))) };
        }
        for (sums, scores) in sums.iter().zip(scores.iter_mut()) {
            for (t, scores) in scores[at..].chunks_exact_mut(LANES).take(T).enumerate() {
                // SAFETY: a chunk is 16 values.
                unsafe {
                    let mut score = sums[t];
                    if D::SCALED {
                        score = score.fma(scale[t], P::L::load(scores.as_ptr()));
                    }
                    score.store(scores.as_mut_ptr());
                }
            }
        }
    }
}

/// Multiplies the weights of a page's tokens.
#[inline(always)]
fn scale_page<L: Lanes, const M: usize>(weights: &mut [[f32; SCORES]; M], page: usize, scale: L) {
    for weights in weights {
        let weights = &mut weights[page * LANES..][..LANES];
        // SAFETY: 16 values.
        unsafe { L::load(weights.as_ptr()).mul(scale).store(weights.as_mut_ptr()) };
    }
}

/// [`weigh_values`] of the dimensions `dims`, a multiple of `T` vectors.
#[inline(always)]
fn weigh_dims<P: Product, D: Pages<P>, const M: usize, const T: usize>(
    tile: &Tile<D::Number>,
    tokens: (usize, usize),
    dims: Range<usize>,
    (weights, decay): (&mut [[f32; SCORES]; M], &[f32; M]),
    outputs: &mut [f32],
) {
    for weights in weights.iter_mut() {
        P::pack(weights.as_chunks_mut::<32>().0);
    }
    for d in dims.step_by(T * LANES) {
        weigh_values::<P, D, M, T>(tile, tokens, d, (weights, decay), outputs);
    }
}

/// `outputs[..][d..] = outputs * decay + weights · values` for `T` vectors of dimensions. Weights are
/// packed; those of tokens before `start` and from `end` on are zero.
#[inline(always)]
fn weigh_values<P: Product, D: Pages<P>, const M: usize, const T: usize>(
    tile: &Tile<D::Number>,
    (start, end): (usize, usize),
    d: usize,
    (weights, decay): (&[[f32; SCORES]; M], &[f32; M]),
    outputs: &mut [f32],
) {
    let padded = outputs.len() / M;
    let mut sums = [[P::L::splat(0.0); T]; M];
    for (m, sums) in sums.iter_mut().enumerate() {
        let before = &outputs[m * padded + d..][..T * LANES];
        for (t, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `before` is `T` times 16 values.
            *sum = unsafe { P::L::load(before.as_ptr().add(t * LANES)) }.mul(P::L::splat(decay[m]));
        }
    }
    let steps = BLOCK_SIZE / P::STEP;
    for page in start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE) {
        let first = page * steps;
        for step in first.max(start / P::STEP)..(first + steps).min(end.div_ceil(P::STEP)) {
            let values = tile.pages[page].1;
            for t in 0..T {
                let at = D::value(step - first, d + t * LANES, tile.row);
                for row in 0..D::ROWS {
                    prefetch_number::<P, D>(tile.ahead[page].1, at + row * tile.row);
                }
            }
            let whole = (step + 1) * P::STEP <= tile.valid;
            // SAFETY: a page has the values of each of its steps where `D::value` says,
            // whole pairs of vectors; a row of weights has a word for each step of the tile.
            unsafe {
                let lanes = array_of!(t < T => {
                    let at = D::value(step - first, d + t * LANES, tile.row);
                    D::values(values.add(at), tile.row, whole)
                });
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weight = P::broadcast(weights.as_ptr().cast::<u32>().add(step));
                    add_products::<P, T>(sums, lanes, weight);
                }
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        let after = &mut outputs[m * padded + d..][..T * LANES];
        for (t, sum) in sums.iter().enumerate() {
            // SAFETY: `after` is `T` times 16 values.
            unsafe { sum.store(after.as_mut_ptr().add(t * LANES)) }
        }
    }
}

/// Asks for the cache line that starts with number `index` of a page, if one does and the page is not near anyway.
#[inline(always)]
pub(super) fn prefetch_number<P: Product, D: Pages<P>>(page: *const D::Number, index: usize) {
    if D::STREAMED && (index * size_of::<D::Number>()).is_multiple_of(CACHE_LINE) {
        prefetch(page.wrapping_add(index).cast());
    }
}

#[inline(always)]
fn add_products<P: Product, const T: usize>(
    sums: &mut [P::L; T],
    lanes: [P::Weights; T],
    factor: P::X,
) {
    for (sum, lanes) in sums.iter_mut().zip(lanes) {
        *sum = P::multiply(lanes, factor, *sum);
    }
}
