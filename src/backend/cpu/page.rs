//! Pages of the cache: what they hold, and the writing of keys and values to them.
//!
//! A page has, for each key/value head, keys `[dim][16 tokens]` or values `[token][dim]`. Where they are int8, scales
//! follow, of 32 numbers of a token each, as in GGUF's `Q8_0`: `[dim / 32][16 tokens]` f16. Keys are transformed
//! first ([`hadamard`]).
#![allow(unsafe_code)] // Threads write disjoint lanes of the pages.

use std::ops::Range;

use half::{bf16, f16};

use super::Cpu;
use super::lanes::{Element, LANES, Lanes};
use super::memory::Shared;
use super::tier::Kernel;
use crate::backend::{Batch, Heads};
use crate::config::BLOCK_SIZE;

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;

/// Spreads what stands out in one of 32 dimensions over all of them, so that it does not make their scale coarse: the
/// Walsh-Hadamard transform. Done to queries and keys it leaves their products as they are (`QuaRot`,
/// arXiv 2404.00456).
#[inline(always)]
pub(super) fn hadamard(x: &mut [f32]) {
    for group in x.as_chunks_mut::<GROUP>().0 {
        for half in [1, 2, 4, 8, 16] {
            for pair in group.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
        for x in group {
            *x *= const { std::f32::consts::FRAC_1_SQRT_2 / 4.0 };
        }
    }
}

/// Numbers that a page can hold.
pub(crate) trait PageElement: Element + Send + Sync {
    /// Whether they are multiples of a scale.
    const SCALED: bool = false;

    /// A scale for these numbers. Where one of them is NaN or above 8.3 million it is NaN or infinite, and all are NaN.
    #[inline(always)]
    fn scale(_: &[f32]) -> f16 {
        f16::ONE
    }
    /// `x` in multiples of the scale.
    fn quantize(x: f32, scale: f32) -> Self;

    /// Numbers that the keys, or the values, of a head take in a page, scales included.
    #[inline(always)]
    fn head_len(head_dim: usize) -> usize {
        let scales = if Self::SCALED { head_dim.div_ceil(GROUP) } else { 0 };
        BLOCK_SIZE * (head_dim + scales * size_of::<f16>() / size_of::<Self>())
    }
}

macro_rules! page_element {
    ($type:ty, $x:ident => $quantize:expr) => {
        impl PageElement for $type {
            #[inline(always)]
            fn quantize($x: f32, _: f32) -> Self {
                $quantize
            }
        }
    };
}
page_element!(f32, x => x);
page_element!(bf16, x => Self::from_f32(x));
page_element!(f16, x => Self::from_f32(x));

impl PageElement for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn scale(x: &[f32]) -> f16 {
        // As bits: NaN has the greatest.
        let greatest = x.iter().fold(0, |greatest: u32, x| greatest.max(x.abs().to_bits()));
        f16::from_f32(f32::from_bits(greatest) / 127.0)
    }
    #[inline(always)]
    fn quantize(x: f32, scale: f32) -> Self {
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer.
        (x / scale + MAGIC - MAGIC).clamp(-127.0, 127.0) as Self
    }
}

/// The bytes of an int8 cache, whose numbers are pairs of them: scales lie among the bytes.
pub(crate) fn bytes(pairs: &[i16]) -> &[i8] {
    // SAFETY: two bytes are an i16, and any bits an i8.
    unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast(), size_of_val(pairs)) }
}

/// As [`bytes`].
pub(crate) fn bytes_mut(pairs: &mut [i16]) -> &mut [i8] {
    // SAFETY: as above; any bits are an i16, too.
    unsafe { std::slice::from_raw_parts_mut(pairs.as_mut_ptr().cast(), size_of_val(pairs)) }
}

/// Writes keys and values of `qkv` (`[rows, width]`) to the pages `[2, num_blocks, page]`.
///
/// A task is some dimensions of one head, for all rows: tasks stay disjoint whatever the block tables say.
pub(crate) fn write_pages<E: PageElement>(
    cpu: &Cpu,
    (qkv, width): (&[f32], usize),
    heads: Heads,
    batch: &Batch,
    pages: &mut [E],
) {
    let half = pages.len() / 2;
    let (keys, values) = pages.split_at_mut(half);
    let (keys, values) = (Shared::new(keys), Shared::new(values));
    let slice = if E::SCALED { GROUP } else { LANES };
    let slices = heads.head_dim.div_ceil(slice);
    let write = |index: usize| {
        let (head, dims) = (index / slices, index % slices * slice);
        let count = slice.min(heads.head_dim - dims);
        // Tasks differ in head or dimensions, and with that in what they write.
        cpu.tier.run(PageLanes { heads, head, dims, count, qkv, width, batch, keys, values });
    };
    let tasks = heads.num_kv_heads * slices;
    if batch.positions.len() * heads.num_kv_heads * heads.head_dim < 1 << 10 {
        (0..tasks).for_each(write);
    } else {
        cpu.pool.run(tasks, &write);
    }
}

/// Writes `count` dimensions from `dims` on of key/value head `head`, which nobody else touches.
struct PageLanes<'a, E> {
    heads: Heads,
    head: usize,
    dims: usize,
    count: usize,
    qkv: &'a [f32],
    width: usize,
    batch: &'a Batch,
    keys: Shared<E>,
    values: Shared<E>,
}

impl<E: PageElement> Kernel for PageLanes<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for run in &self.batch.runs {
            let table = &self.batch.blocks[run.blocks.clone()];
            let mut row = run.rows.start;
            while row < run.rows.end {
                let position = self.batch.positions[row] as usize;
                let (block, token) = (position / BLOCK_SIZE, position % BLOCK_SIZE);
                let following = self.batch.positions[row..run.rows.end.min(row + BLOCK_SIZE)]
                    .iter()
                    .zip(position..);
                let following = following.take_while(|&(&at, next)| at as usize == next).count();
                let tokens = token..BLOCK_SIZE.min(token + following);
                let next = row + tokens.len();
                self.page(table[block].0 as usize, tokens, row);
                row = next;
            }
        }
    }
}

impl<E: PageElement> PageLanes<'_, E> {
    /// The tokens of one page, whose rows start at `row`.
    #[inline(always)]
    fn page(&self, block: usize, tokens: Range<usize>, row: usize) {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let at = (block * num_kv_heads + self.head) * E::head_len(head_dim);
        let zero = E::quantize(0.0, 1.0);
        let mut keys = [[zero; GROUP]; BLOCK_SIZE];
        for (row, token) in (row..).zip(tokens.clone()) {
            let key = &self.qkv[row * self.width + (num_heads + self.head) * head_dim..];
            let value = &key[num_kv_heads * head_dim + self.dims..][..self.count];
            let mut key_numbers = [0.0; GROUP];
            let key_numbers = &mut key_numbers[..self.count];
            key_numbers.copy_from_slice(&key[self.dims..][..self.count]);
            if E::SCALED {
                hadamard(key_numbers);
            }
            let scale_at = at + head_dim * BLOCK_SIZE + self.scale(token);
            // SAFETY: only this task has these dimensions of this head; `at` and the length of a head bound them.
            unsafe {
                let scale = write_scale(value, self.values, scale_at);
                let values = self.values.part(at + token * head_dim + self.dims, self.count);
                quantize(value, scale, values);
                let scale = write_scale(key_numbers, self.keys, scale_at);
                quantize(key_numbers, scale, &mut keys[token][..self.count]);
            }
        }
        for d in 0..self.count {
            let first = at + (self.dims + d) * BLOCK_SIZE + tokens.start;
            // SAFETY: as above.
            let to = unsafe { self.keys.part(first, tokens.len()) };
            for (to, keys) in to.iter_mut().zip(&keys[tokens.clone()]) {
                *to = keys[d];
            }
        }
    }

    /// Where the token's scale stands among those of the head, in bytes.
    fn scale(&self, token: usize) -> usize {
        (self.dims / GROUP * BLOCK_SIZE + token) * size_of::<f16>()
    }
}

#[inline(always)]
fn quantize<E: PageElement>(from: &[f32], scale: f32, to: &mut [E]) {
    for (to, &x) in to.iter_mut().zip(from) {
        *to = E::quantize(x, scale);
    }
}

/// Writes the scale of `x`, where numbers have one, to `at`, and returns it.
///
/// # Safety
/// It is within `to`, and nobody else touches it.
#[inline(always)]
unsafe fn write_scale<E: PageElement>(x: &[f32], to: Shared<E>, at: usize) -> f32 {
    if !E::SCALED {
        return 1.0;
    }
    let scale = E::scale(x);
    // SAFETY: the caller's contract.
    unsafe { to.at(at).cast::<f16>().write_unaligned(scale) };
    scale.to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_out_is_spread_and_products_stay() {
        let mut key = [0.25; GROUP];
        key[7] = 40.0;
        let mut query: [f32; GROUP] = std::array::from_fn(|i| 0.1 * i as f32 - 1.0);
        let product = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let before = product(&query, &key);
        hadamard(&mut key);
        hadamard(&mut query);
        assert!((product(&query, &key) - before).abs() < 1e-3);
        assert!(key.iter().all(|x| x.abs() < 9.0), "{key:?}");
    }

    #[test]
    fn scales_of_int8_take_all_numbers_in() {
        assert_eq!(i8::scale(&[0.0; 3]), f16::ZERO);
        assert_eq!((i8::quantize(0.0, 0.0), i8::quantize(-0.0, 0.0)), (0, 0));
        assert_eq!(i8::scale(&[1.0, -254.0, 3.0]), f16::from_f32(2.0));
        assert_eq!([-254.0, 253.0, 3.0].map(|x| i8::quantize(x, 2.0)), [-127, 126, 2]);
        for broken in [f32::NAN, -f32::NAN, f32::INFINITY, 1e9] {
            let scale = i8::scale(&[1.0, broken, 2.0]).to_f32();
            assert!((f32::from(i8::quantize(1.0, scale)) * scale).is_nan(), "{broken} is hidden");
        }
    }
}
