//! Norm and rotation of queries and keys, and the writing of keys and values to their pages.
#![allow(unsafe_code)] // Threads write disjoint rows, or disjoint lanes of the pages.

use half::{bf16, f16};

use super::Cpu;
use super::lanes::{Element, LANES, Lanes};
use super::memory::Shared;
use super::rows::{for_rows, norm_row};
use super::tier::Kernel;
use crate::backend::{Batch, Heads};
use crate::config::BLOCK_SIZE;
use crate::spec::{QkNorm, RopePairing};

/// Plain slices of a [`crate::backend::RopeOp`].
#[derive(Clone, Copy)]
pub(crate) struct Rope<'a> {
    pub(crate) heads: Heads,
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) pairing: RopePairing,
    pub(crate) qk_norm: QkNorm,
    /// Weights of the query and key norm, where `qk_norm` asks for them.
    pub(crate) norms: Option<[&'a [f32]; 2]>,
    pub(crate) eps: f32,
}

/// Norms and rotates queries and keys of `qkv` (`[rows, width]`) in place.
pub(crate) fn rope(cpu: &Cpu, qkv: &mut [f32], width: usize, rope: Rope<'_>, positions: &[u32]) {
    let qkv = Shared::new(qkv);
    for_rows(cpu, positions.len(), width, &|first, count| {
        // SAFETY: the rows of different tasks are disjoint.
        let rows = unsafe { qkv.part(first * width, count * width) };
        let positions = &positions[first..first + count];
        cpu.tier.run(RopeKernel { rows, width, rope, positions });
    });
}

struct RopeKernel<'a> {
    rows: &'a mut [f32],
    width: usize,
    rope: Rope<'a>,
    positions: &'a [u32],
}

impl Kernel for RopeKernel<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Rope { heads, qk_norm, norms, eps, .. } = self.rope;
        let rotated = heads.num_heads + heads.num_kv_heads;
        let mut normed = vec![0.0; heads.head_dim];
        for (row, &position) in self.rows.chunks_exact_mut(self.width).zip(self.positions) {
            for (index, head) in row.chunks_exact_mut(heads.head_dim).take(rotated).enumerate() {
                let weight = norms.map(|norms| norms[usize::from(index >= heads.num_heads)]);
                if qk_norm != QkNorm::BeforeRope {
                    self.rope.rotate(head, position as usize);
                }
                if let Some(weight) = weight {
                    norm_row::<L>(head, weight, eps, &mut normed);
                    head.copy_from_slice(&normed);
                }
                if qk_norm == QkNorm::BeforeRope {
                    self.rope.rotate(head, position as usize);
                }
            }
        }
    }
}

impl Rope<'_> {
    #[inline(always)]
    fn rotate(&self, head: &mut [f32], position: usize) {
        let half = head.len() / 2;
        let cos = &self.cos[position * half..][..half];
        let sin = &self.sin[position * half..][..half];
        let turn = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        match self.pairing {
            RopePairing::HalfSplit => {
                let (a, b) = head.split_at_mut(half);
                for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    turn(a, b, cos, sin);
                }
            }
            RopePairing::Adjacent => {
                for ((pair, &cos), &sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let [a, b] = pair else { unreachable!("chunks of two") };
                    turn(a, b, cos, sin);
                }
            }
        }
    }
}

/// Numbers that a page can hold.
pub(crate) trait PageElement: Element + Send + Sync {
    fn narrow(x: f32) -> Self;
}

impl PageElement for f32 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl PageElement for bf16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl PageElement for f16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Writes keys and values of `qkv` (`[rows, width]`) to the pages `[2, num_blocks, page]`.
///
/// A task is 16 dimensions of one head, for all rows: tasks stay disjoint whatever the block tables say.
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
    let slices = heads.head_dim.div_ceil(LANES);
    let write = |index: usize| {
        let (head, dims) = (index / slices, index % slices * LANES);
        let count = LANES.min(heads.head_dim - dims);
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
        let page = num_kv_heads * head_dim * BLOCK_SIZE;
        for run in &batch.runs {
            let table = &batch.blocks[run.blocks.clone()];
            for row in run.rows.clone() {
                let position = batch.positions[row] as usize;
                let (block, token) =
                    (table[position / BLOCK_SIZE].0 as usize, position % BLOCK_SIZE);
                let at = block * page + self.head * head_dim * BLOCK_SIZE;
                let key = &qkv[row * width + (num_heads + self.head) * head_dim + self.dims..];
                let value = &key[num_kv_heads * head_dim..];
                // SAFETY: by the caller's contract; `at` bounds each access.
                unsafe {
                    let values = values.part(at + token * head_dim + self.dims, self.count);
                    for (to, &x) in values.iter_mut().zip(value) {
                        *to = E::narrow(x);
                    }
                    for (d, &x) in key[..self.count].iter().enumerate() {
                        keys.at(at + (self.dims + d) * BLOCK_SIZE + token).write(E::narrow(x));
                    }
                }
            }
        }
    }
}
