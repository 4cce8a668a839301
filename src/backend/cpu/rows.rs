//! Ops on single rows: norms, activations, gates.
#![allow(unsafe_code)] // Threads write disjoint rows of one output.

use std::mem::MaybeUninit;

use super::Cpu;
use super::lanes::{LANES, Lanes};
use super::memory::{Shared, written_by};
use super::tier::Kernel;

/// Numbers that are worth a task of their own.
const TASK: usize = 8 << 10;

/// Calls `task(first, count)` for parts of `rows`, on the caller alone when there is little to do.
pub(super) fn for_rows(cpu: &Cpu, rows: usize, cols: usize, task: &(dyn Fn(usize, usize) + Sync)) {
    // As even as can be.
    let step = rows.div_ceil((rows * cols).div_ceil(TASK).max(1)).max(1);
    cpu.pool.run(rows.div_ceil(step), &|index| {
        let first = index * step;
        task(first, step.min(rows - first));
    });
}

/// Rows `x` over the root of their mean square, times `weight`.
pub(crate) fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let cols = weight.len();
    let write = |out: Shared<MaybeUninit<f32>>| {
        for_rows(cpu, x.len() / cols, cols, &|first, count| {
            // SAFETY: the rows of different tasks are disjoint.
            let out = unsafe { out.part(first * cols, count * cols) };
            cpu.tier.run(Norm { x: &x[first * cols..][..count * cols], weight, eps, out });
        });
    };
    // SAFETY: the tasks cover all rows, and a task writes all its numbers.
    unsafe { written_by(x.len(), write) }
}

/// Adds `x` to `residual`, then norms the sum.
pub(crate) fn add_rms_norm(
    cpu: &Cpu,
    residual: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
) -> Vec<f32> {
    let cols = weight.len();
    let residual = Shared::new(residual);
    let write = |out: Shared<MaybeUninit<f32>>| {
        for_rows(cpu, x.len() / cols, cols, &|first, count| {
            let (start, len) = (first * cols, count * cols);
            // SAFETY: the rows of different tasks are disjoint.
            let (sum, out) = unsafe { (residual.part(start, len), out.part(start, len)) };
            cpu.tier.run(Zip { out: sum, a: None, b: &x[start..start + len], f: AddLanes });
            cpu.tier.run(Norm { x: sum, weight, eps, out });
        });
    };
    // SAFETY: as in `rms_norm`.
    unsafe { written_by(x.len(), write) }
}

/// `silu(x[..width]) * x[width..]` for each row of `2 * width`.
pub(crate) fn gated_silu(cpu: &Cpu, x: &[f32], width: usize) -> Vec<f32> {
    let rows = x.len() / (2 * width);
    let mut out = vec![0.0; rows * width];
    let shared = Shared::new(&mut out);
    for_rows(cpu, rows, 2 * width, &|first, count| {
        for row in first..first + count {
            let (gate, up) = x[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: the rows of different tasks are disjoint.
            let out = unsafe { shared.part(row * width, width) };
            cpu.tier.run(Zip { out, a: Some(gate), b: up, f: SiluGate });
        }
    });
    out
}

/// `out *= sigmoid(gate[offset..])` for rows of `width` and `gate_width`.
pub(crate) fn sigmoid_gate(
    cpu: &Cpu,
    (out, width): (&mut [f32], usize),
    (gate, gate_width): (&[f32], usize),
    offset: usize,
) {
    let rows = out.len() / width;
    let out = Shared::new(out);
    for_rows(cpu, rows, width, &|first, count| {
        for row in first..first + count {
            // SAFETY: the rows of different tasks are disjoint.
            let out = unsafe { out.part(row * width, width) };
            let gate = &gate[row * gate_width + offset..][..width];
            cpu.tier.run(Zip { out, a: None, b: gate, f: SigmoidGate });
        }
    });
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            let scale = rms_scale::<L>(x, self.eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                out.write(x * scale * weight);
            }
        }
    }
}

/// What a row, or a head, is multiplied with before its weight: one over the root of its mean square.
#[inline(always)]
pub(super) fn rms_scale<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    let mut squares = [L::splat(0.0); 2];
    let chunks = x.chunks_exact(LANES);
    let mut tail = [0.0; LANES];
    tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    for (i, chunk) in chunks.chain(std::iter::once(&tail[..])).enumerate() {
        // SAFETY: every chunk is 16 values.
        let lanes = unsafe { L::load(chunk.as_ptr()) };
        squares[i % 2] = lanes.fma(lanes, squares[i % 2]);
    }
    1.0 / (squares[0].add(squares[1]).sum() / x.len() as f32 + eps).sqrt()
}

/// A function of two lanes.
trait OfTwo: Copy {
    fn call<L: Lanes>(self, a: L, b: L) -> L;
}

/// `out = f(a, b)`, number by number; without `a`, `out` is that.
struct Zip<'a, F> {
    out: &'a mut [f32],
    a: Option<&'a [f32]>,
    b: &'a [f32],
    f: F,
}

impl<F: OfTwo> Kernel for Zip<'_, F> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (len, out) = (self.out.len(), self.out.as_mut_ptr());
        let a = self.a.map_or(out.cast_const(), <[f32]>::as_ptr);
        let b = self.b.as_ptr();
        assert!(self.b.len() == len && self.a.is_none_or(|a| a.len() == len), "of one length");
        let whole = len / LANES * LANES;
        // SAFETY: 16 values from a multiple of 16 below `whole`, or the rest; `out` is only written where it has been
        // read.
        unsafe {
            for i in (0..whole).step_by(LANES) {
                self.f.call(L::load(a.add(i)), L::load(b.add(i))).store(out.add(i));
            }
            let mut values = [[0.0; LANES]; 2];
            a.add(whole).copy_to_nonoverlapping(values[0].as_mut_ptr(), len - whole);
            b.add(whole).copy_to_nonoverlapping(values[1].as_mut_ptr(), len - whole);
            let result = self.f.call(L::load(values[0].as_ptr()), L::load(values[1].as_ptr()));
            result.store(values[0].as_mut_ptr());
            out.add(whole).copy_from_nonoverlapping(values[0].as_ptr(), len - whole);
        }
    }
}

#[inline(always)]
fn sigmoid<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    one.div(one.add(L::splat(0.0).sub(x).exp()))
}

/// `silu(gate) * up`.
#[inline(always)]
pub(super) fn silu_gate<L: Lanes>(gate: L, up: L) -> L {
    gate.mul(sigmoid(gate)).mul(up)
}

#[derive(Clone, Copy)]
struct AddLanes;
impl OfTwo for AddLanes {
    #[inline(always)]
    fn call<L: Lanes>(self, a: L, b: L) -> L {
        a.add(b)
    }
}

#[derive(Clone, Copy)]
struct SiluGate;
impl OfTwo for SiluGate {
    #[inline(always)]
    fn call<L: Lanes>(self, gate: L, up: L) -> L {
        silu_gate(gate, up)
    }
}

#[derive(Clone, Copy)]
struct SigmoidGate;
impl OfTwo for SigmoidGate {
    #[inline(always)]
    fn call<L: Lanes>(self, out: L, gate: L) -> L {
        out.mul(sigmoid(gate))
    }
}
