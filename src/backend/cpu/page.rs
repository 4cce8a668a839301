//! Pages of the cache: what they hold, and the writing of keys and values to them.
//!
//! A page has, for each key/value head, keys `[dim][16 tokens]` or values `[token][dim]`. Where they are int8, scales
//! follow, of 32 numbers of a token each, as in GGUF's `Q8_0`: `[dim / 32][16 tokens]` f16. Keys are [`spread`] before.
#![allow(unsafe_code)] // Threads write disjoint lanes of the pages.

use half::{bf16, f16};

use super::Cpu;
use super::lanes::{Element, LANES};
use super::memory::Shared;
use crate::backend::{Batch, Heads};
use crate::config::BLOCK_SIZE;

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;

/// Spreads what stands out in one of 32 dimensions over all of them, so that it does not make their scale coarse: the
/// Walsh-Hadamard transform. Done to queries and keys it leaves their products as they are (`QuaRot`,
/// arXiv 2404.00456).
pub(super) fn spread(x: &mut [f32]) {
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

    /// A scale for these numbers.
    #[inline(always)]
    fn scale(_: &[f32]) -> f16 {
        f16::ONE
    }
    /// `x` in multiples of the scale.
    fn narrow(x: f32, scale: f32) -> Self;

    /// Numbers that the keys, or the values, of a head take in a page, scales included.
    #[inline(always)]
    fn head_len(head_dim: usize) -> usize {
        let scales = if Self::SCALED { head_dim.div_ceil(GROUP) } else { 0 };
        BLOCK_SIZE * (head_dim + scales * size_of::<f16>() / size_of::<Self>())
    }
}

macro_rules! page_element {
    ($type:ty, $x:ident => $narrow:expr) => {
        impl PageElement for $type {
            #[inline(always)]
            fn narrow($x: f32, _: f32) -> Self {
                $narrow
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
        f16::from_f32(x.iter().fold(0.0, |greatest: f32, x| greatest.max(x.abs())) / 127.0)
    }
    #[inline(always)]
    fn narrow(x: f32, scale: f32) -> Self {
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
        let lanes = PageLanes { heads, head, dims, count };
        // SAFETY: tasks differ in head or dimensions, and with that in what they write.
        unsafe { lanes.write((qkv, width), batch, (keys, values)) }
    };
    let tasks = heads.num_kv_heads * slices;
    if batch.positions.len() * heads.num_kv_heads * heads.head_dim < 8 << 10 {
        (0..tasks).for_each(write);
    } else {
        cpu.pool.run(tasks, &write);
    }
}

/// `count` dimensions from `dims` on of key/value head `head`.
struct PageLanes {
    heads: Heads,
    head: usize,
    dims: usize,
    count: usize,
}

impl PageLanes {
    /// # Safety
    /// No one else touches these dimensions of this head.
    unsafe fn write<E: PageElement>(
        &self,
        (qkv, width): (&[f32], usize),
        batch: &Batch,
        (keys, values): (Shared<E>, Shared<E>),
    ) {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let head_len = E::head_len(head_dim);
        for run in &batch.runs {
            let table = &batch.blocks[run.blocks.clone()];
            for row in run.rows.clone() {
                let position = batch.positions[row] as usize;
                let (block, token) =
                    (table[position / BLOCK_SIZE].0 as usize, position % BLOCK_SIZE);
                let at = (block * num_kv_heads + self.head) * head_len;
                let key = &qkv[row * width + (num_heads + self.head) * head_dim + self.dims..];
                let (mut key, value) = (&key[..self.count], &key[num_kv_heads * head_dim..]);
                let mut even = [0.0; GROUP];
                if E::SCALED {
                    let even = &mut even[..self.count];
                    even.copy_from_slice(key);
                    spread(even);
                    key = even;
                }
                let (key_at, value_at) =
                    (at + self.dims * BLOCK_SIZE + token, at + token * head_dim + self.dims);
                let scale_at = at + head_dim * BLOCK_SIZE + self.scale(token);
                // SAFETY: by the caller's contract: the numbers, and their scales, are within the head's part.
                unsafe {
                    write_numbers(key, keys, (key_at, BLOCK_SIZE), scale_at);
                    write_numbers(&value[..self.count], values, (value_at, 1), scale_at);
                }
            }
        }
    }

    /// Where the token's scale stands among those of the head, in bytes.
    fn scale(&self, token: usize) -> usize {
        (self.dims / GROUP * BLOCK_SIZE + token) * size_of::<f16>()
    }
}

/// Writes `x` from `at` on, `stride` apart, and its scale, where it has one, to `scale_at`.
///
/// # Safety
/// All that is within `to`, and nobody else touches it.
#[inline(always)]
unsafe fn write_numbers<E: PageElement>(
    x: &[f32],
    to: Shared<E>,
    (at, stride): (usize, usize),
    scale_at: usize,
) {
    let scale = E::scale(x);
    // SAFETY: the caller's contract.
    unsafe {
        for (i, &x) in x.iter().enumerate() {
            to.at(at + i * stride).write(E::narrow(x, scale.to_f32()));
        }
        if E::SCALED {
            to.at(scale_at).cast::<f16>().write_unaligned(scale);
        }
    }
}
