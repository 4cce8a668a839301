//! How attention reads the pages of the cache: number by number, or in pairs of bf16 along the sums, of
//! dimensions for keys and of tokens for values.
#![allow(unsafe_code)] // Keys and values are read through raw pointers.

use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use half::bf16;

use super::attention::TILE;
use super::attention_tile::{PAGES, Tile, prefetch_number};
use super::lanes::{Element, LANES, Lanes};
use super::page::PageElement;
#[cfg(target_arch = "x86_64")]
use super::product::PairProduct;
use super::product::{Exact, Product};
#[cfg(target_arch = "x86_64")]
use super::x86_words::{PairWords, Pairs};
use crate::config::BLOCK_SIZE;

/// Pages whose keys are `[dim][16]`, or have steps in the place of dimensions, and whose values lie as
/// [`Self::value`] says.
pub(super) trait Pages<P: Product> {
    type Number: Copy;
    /// Numbers from a step's keys to the next one's.
    const KEYS: usize;
    /// Rows of values that a step has.
    const ROWS: usize;
    /// Whether numbers are multiples of the tile's scales.
    const SCALED: bool;
    /// Whether they come from memory, or else from a cache.
    const STREAMED: bool = true;

    /// Where the values of a page's step are from dimension `d` on, a multiple of 16.
    fn value(step: usize, d: usize, row: usize) -> usize;

    /// # Safety
    /// `p` points to the keys of a step.
    unsafe fn keys(p: *const Self::Number) -> P::Weights;

    /// 16 dimensions of a step's values. `whole`: the last of its tokens is in the cache.
    ///
    /// # Safety
    /// `p` points to as many values in rows of length `row`.
    unsafe fn values(p: *const Self::Number, row: usize, whole: bool) -> P::Weights;

    /// Writes 16 tokens' keys and values, of which `valid` are in the cache, as `[step][16]` words and as
    /// [`widened_value`] says; what is behind a row stays.
    ///
    /// # Safety
    /// The pointers are those of a page.
    unsafe fn widen(
        page: (*const Self::Number, *const Self::Number),
        dim: usize,
        valid: usize,
        to: (&mut [u32], &mut [u32]),
    );
}

/// Numbers that load as f32.
pub(super) struct Numbers<E>(PhantomData<E>);

impl<L: Lanes, E: PageElement> Pages<Exact<L>> for Numbers<E> {
    type Number = E;
    const KEYS: usize = LANES;
    const ROWS: usize = 1;
    const SCALED: bool = E::SCALED;

    #[inline(always)]
    fn value(step: usize, d: usize, row: usize) -> usize {
        step * row + d
    }
    #[inline(always)]
    unsafe fn keys(p: *const E) -> L {
        // SAFETY: the caller's contract.
        unsafe { E::load(p) }
    }
    #[inline(always)]
    unsafe fn values(p: *const E, _: usize, _: bool) -> L {
        // SAFETY: the caller's contract.
        unsafe { E::load(p) }
    }
    #[inline(always)]
    unsafe fn widen(
        (from_keys, from_values): (*const E, *const E),
        dim: usize,
        _: usize,
        (keys, values): (&mut [u32], &mut [u32]),
    ) {
        // SAFETY: a page holds 16 * dim keys and as many values.
        unsafe {
            for (d, keys) in keys.chunks_exact_mut(LANES).enumerate() {
                E::load::<L>(from_keys.add(d * LANES)).store(keys.as_mut_ptr().cast());
            }
            for token in 0..BLOCK_SIZE {
                for d in (0..dim).step_by(LANES) {
                    let to =
                        &mut values[widened_value::<Exact<L>>(token, d)..][..LANES.min(dim - d)];
                    widen_row::<L, E>(from_values.add(token * dim + d), to);
                }
            }
        }
    }
}

/// Of at most 16 numbers.
///
/// # Safety
/// `from` is valid for reads of `to.len()` numbers.
#[inline(always)]
unsafe fn widen_row<L: Lanes, E: Element>(from: *const E, to: &mut [u32]) {
    // SAFETY: the caller's contract.
    unsafe {
        if to.len() == LANES {
            return E::load::<L>(from).store(to.as_mut_ptr().cast());
        }
        for (i, to) in to.iter_mut().enumerate() {
            *to = from.add(i).read().widen().to_bits();
        }
    }
}

/// bf16 that is paired when it is read. Rows are whole vectors.
#[cfg(target_arch = "x86_64")]
pub(super) struct Halves;

#[cfg(target_arch = "x86_64")]
impl Pages<PairProduct> for Halves {
    type Number = bf16;
    const KEYS: usize = 2 * LANES;
    const ROWS: usize = 2;
    const SCALED: bool = false;

    #[inline(always)]
    fn value(step: usize, d: usize, row: usize) -> usize {
        2 * step * row + d
    }
    #[inline(always)]
    unsafe fn keys(p: *const bf16) -> Pairs {
        // SAFETY: the caller's contract.
        unsafe { Pairs::interleave(p, p.add(LANES)) }
    }
    #[inline(always)]
    unsafe fn values(p: *const bf16, row: usize, whole: bool) -> Pairs {
        let second = if whole { p.wrapping_add(row) } else { std::ptr::null() };
        // SAFETY: the caller's contract.
        unsafe { Pairs::interleave(p, second) }
    }
    #[inline(always)]
    unsafe fn widen(
        (from_keys, from_values): (*const bf16, *const bf16),
        dim: usize,
        valid: usize,
        (keys, values): (&mut [u32], &mut [u32]),
    ) {
        // SAFETY: a page holds 16 * dim keys and as many values.
        unsafe {
            for (step, keys) in keys.chunks_exact_mut(LANES).enumerate() {
                Self::keys(from_keys.add(step * Self::KEYS)).store(keys.as_mut_ptr().cast());
            }
            for step in 0..BLOCK_SIZE / 2 {
                for d in (0..dim).step_by(LANES) {
                    let from = from_values.add(Self::value(step, d, dim));
                    let pairs = Self::values(from, dim, 2 * step + 1 < valid);
                    let to = &mut values[widened_value::<PairProduct>(step, d)..][..LANES];
                    pairs.store(to.as_mut_ptr().cast());
                }
            }
        }
    }
}

/// Values lie `[dim / 16][step of the tile][16]`: what is added up is one stream.
fn widened_value<P: Product>(step: usize, d: usize) -> usize {
    d / LANES * (TILE / P::STEP * LANES) + step * LANES
}

/// Words of a [`Scratch`], of numbers `E`.
pub(super) struct Widened<E>(PhantomData<E>);

impl<P: Product, E: PageElement> Pages<P> for Widened<E> {
    type Number = u32;
    const KEYS: usize = LANES;
    const ROWS: usize = 1;
    const SCALED: bool = E::SCALED;
    const STREAMED: bool = false;

    #[inline(always)]
    fn value(step: usize, d: usize, _: usize) -> usize {
        widened_value::<P>(step, d)
    }
    #[inline(always)]
    unsafe fn keys(p: *const u32) -> P::Weights {
        // SAFETY: the caller's contract.
        unsafe { P::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn values(p: *const u32, _: usize, _: bool) -> P::Weights {
        // SAFETY: the caller's contract.
        unsafe { P::load(p.cast()) }
    }
    unsafe fn widen(_: (*const u32, *const u32), _: usize, _: usize, _: (&mut [u32], &mut [u32])) {
        unreachable!("they are wide")
    }
}

/// Room for the words of a tile.
pub(super) struct Scratch(Vec<u32>);

impl Scratch {
    /// For keys of `dim` and values of `padded` numbers; `padded` is 0 where nothing is widened.
    pub(super) fn new(dim: usize, padded: usize) -> Self {
        Self(vec![0; PAGES * BLOCK_SIZE * if padded == 0 { 0 } else { dim + padded }])
    }

    /// Widens the pages, values as [`widened_value`] says; what pads a row is zero.
    #[inline(always)]
    pub(super) fn widen<P: Product, D: Pages<P>>(&mut self, tile: &Tile<D::Number>) -> Tile<u32> {
        let dim = tile.row;
        let (keys_len, steps) = (BLOCK_SIZE * dim / P::STEP, BLOCK_SIZE / P::STEP);
        let (keys, values) = self.0.split_at_mut(PAGES * keys_len);
        for (i, &page) in tile.pages.iter().enumerate() {
            for at in (0..BLOCK_SIZE * dim).step_by(LANES) {
                prefetch_number::<P, D>(tile.ahead[i].0, at);
                prefetch_number::<P, D>(tile.ahead[i].1, at);
            }
            let keys = &mut keys[i * keys_len..][..keys_len];
            let values = &mut values[widened_value::<P>(i * steps, 0)..];
            let valid = tile.valid.saturating_sub(i * BLOCK_SIZE);
            // SAFETY: the tile's pages are whole.
            unsafe { D::widen(page, dim, valid, (keys, values)) }
        }
        let (keys, values) = (&*keys, &*values);
        let pages = std::array::from_fn(|i| {
            let values = &values[widened_value::<P>(i * steps, 0)..];
            (keys[i * keys_len..].as_ptr(), values.as_ptr())
        });
        let Tile { start, valid, scales, row, .. } = *tile;
        Tile { start, valid, pages, ahead: pages, scales, row }
    }
}
