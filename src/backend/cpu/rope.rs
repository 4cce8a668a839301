//! Norm and rotation of queries and keys.
#![allow(unsafe_code)] // Threads write disjoint rows.

use super::Cpu;
use super::lanes::Lanes;
use super::memory::Shared;
use super::rows::{for_rows, rms_scale};
use super::tier::Kernel;
use crate::backend::Heads;
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
        for (row, &position) in self.rows.chunks_exact_mut(self.width).zip(self.positions) {
            for (index, head) in row.chunks_exact_mut(heads.head_dim).take(rotated).enumerate() {
                let weight = norms.map(|norms| norms[usize::from(index >= heads.num_heads)]);
                if qk_norm != QkNorm::BeforeRope {
                    self.rope.rotate(head, position as usize);
                }
                if let Some(weight) = weight {
                    let scale = rms_scale::<L>(head, eps);
                    for (x, weight) in head.iter_mut().zip(weight) {
                        *x = *x * scale * weight;
                    }
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
