//! The CPU's ops as candle custom ops: storage in, kernel, storage out. Shapes have been checked by the
//! methods of [`super::Backend`].

use std::cell::RefCell;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Shape, Storage,
    Tensor,
};
use half::{bf16, f16};

use super::cpu::{self, Attention, Cpu, Packed};
use super::{AttentionOp, Batch, Heads, LayerKv, RopeOp};
use crate::error::{Error, Result};
use crate::spec::QkNorm;

type CandleResult<T> = candle_core::Result<T>;

/// The numbers of a contiguous f32 tensor.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> CandleResult<&'a [f32]> {
    let (start, end) = contiguous(layout)?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> CandleResult<&'a mut [f32]> {
    let (start, end) = contiguous(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => Err(Error::bug("an activation is not f32").into()),
    }
}

fn contiguous(layout: &Layout) -> CandleResult<(usize, usize)> {
    let offsets = layout.contiguous_offsets();
    offsets.ok_or_else(|| Error::bug("a tensor that was checked is not contiguous").into())
}

/// Length of the last dimension.
fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

pub(super) struct Linear<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) weight: &'a Packed,
    /// Whether the first half of the outputs gates the second.
    pub(super) gated: bool,
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let out = cpu::linear(self.cpu, floats(x, layout)?, self.weight, self.gated);
        let width = if self.gated { self.weight.rows() / 2 } else { self.weight.rows() };
        Ok((CpuStorage::F32(out), (layout.dims()[0], width).into()))
    }
}

pub(super) struct RmsNorm<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) eps: f32,
}

impl CustomOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (x, weight) = (floats(x, layout)?, floats(weight, weight_layout)?);
        let out = cpu::rms_norm(self.cpu, x, weight, self.eps);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// Adds in place; the norm of the sum is left in `out`.
pub(super) struct AddRmsNorm<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) eps: f32,
    pub(super) out: RefCell<Vec<f32>>,
}

impl InplaceOp3 for AddRmsNorm<'_> {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        residual: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> CandleResult<()> {
        let (residual, x) = (floats_mut(residual, layout)?, floats(x, x_layout)?);
        let weight = floats(weight, weight_layout)?;
        *self.out.borrow_mut() = cpu::add_rms_norm(self.cpu, residual, x, weight, self.eps);
        Ok(())
    }
}

pub(super) struct GatedSilu<'a> {
    pub(super) cpu: &'a Cpu,
}

impl CustomOp1 for GatedSilu<'_> {
    fn name(&self) -> &'static str {
        "gated_silu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let width = width(layout) / 2;
        let out = cpu::gated_silu(self.cpu, floats(x, layout)?, width);
        Ok((CpuStorage::F32(out), (layout.dims()[0], width).into()))
    }
}

/// Takes the numbers of a tensor, which has none then.
#[derive(Default)]
pub(super) struct TakeFloats(pub(super) RefCell<Vec<f32>>);

impl InplaceOp1 for TakeFloats {
    fn name(&self) -> &'static str {
        "take_floats"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        let (start, end) = contiguous(layout)?;
        self.0.replace(match x {
            CpuStorage::F32(values) if values.len() == end - start => std::mem::take(values),
            _ => floats(x, layout)?.to_vec(),
        });
        Ok(())
    }
}

pub(super) struct GatherRows<'a> {
    pub(super) rows: &'a [u32],
}

impl CustomOp1 for GatherRows<'_> {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (x, width) = (floats(x, layout)?, width(layout));
        let mut out = Vec::with_capacity(self.rows.len() * width);
        for &row in self.rows {
            out.extend_from_slice(&x[row as usize * width..][..width]);
        }
        Ok((CpuStorage::F32(out), (self.rows.len(), width).into()))
    }
}

pub(super) struct SigmoidGate<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) offset: usize,
}

impl InplaceOp2 for SigmoidGate<'_> {
    fn name(&self) -> &'static str {
        "sigmoid_gate"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
    ) -> CandleResult<()> {
        let out = (floats_mut(out, layout)?, width(layout));
        let gate = (floats(gate, gate_layout)?, width(gate_layout));
        cpu::sigmoid_gate(self.cpu, out, gate, self.offset);
        Ok(())
    }
}

/// As [`super::Backend::rope_and_cache`].
pub(super) fn rope_and_cache(
    cpu: &Cpu,
    qkv: &Tensor,
    heads: Heads,
    op: &RopeOp,
    kv: &LayerKv,
    batch: &Batch,
) -> Result<()> {
    let tables = [&op.cos, &op.sin].map(Tensor::storage_and_layout);
    let [cos, sin] = [numbers(&tables[0].0, tables[0].1)?, numbers(&tables[1].0, tables[1].1)?];
    let norms = op.q_norm.as_ref().zip(op.k_norm.as_ref()).filter(|_| op.qk_norm != QkNorm::None);
    let norms = norms.map(|(q, k)| [q.storage_and_layout(), k.storage_and_layout()]);
    let norms = match &norms {
        Some([q, k]) => Some([numbers(&q.0, q.1)?, numbers(&k.0, k.1)?]),
        None => None,
    };
    let RopeOp { pairing, qk_norm, eps, .. } = *op;
    let op = cpu::Rope { heads, cos, sin, pairing, qk_norm, norms, eps };
    qkv.inplace_op1(&Rope { cpu, op, positions: &batch.positions })?;
    kv.pages.inplace_op2(qkv, &WritePages { cpu, heads, batch })?;
    Ok(())
}

/// The numbers of a contiguous f32 tensor on the CPU.
fn numbers<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(values) => Ok(floats(values, layout)?),
        _ => Err(Error::bug("a tensor is on another device than the backend")),
    }
}

struct Rope<'a> {
    cpu: &'a Cpu,
    op: cpu::Rope<'a>,
    positions: &'a [u32],
}

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, qkv: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        let qkv = floats_mut(qkv, layout)?;
        cpu::rope(self.cpu, qkv, width(layout), self.op, self.positions);
        Ok(())
    }
}

struct WritePages<'a> {
    cpu: &'a Cpu,
    heads: Heads,
    batch: &'a Batch,
}

impl InplaceOp2 for WritePages<'_> {
    fn name(&self) -> &'static str {
        "write_pages"
    }

    fn cpu_fwd(
        &self,
        pages: &mut CpuStorage,
        layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
    ) -> CandleResult<()> {
        let qkv = (floats(qkv, qkv_layout)?, width(qkv_layout));
        let (start, end) = contiguous(layout)?;
        let Self { cpu, heads, batch } = *self;
        match pages {
            CpuStorage::F32(pages) => {
                cpu::write_pages(cpu, qkv, heads, batch, &mut pages[start..end]);
            }
            CpuStorage::BF16(pages) => {
                cpu::write_pages(cpu, qkv, heads, batch, &mut pages[start..end]);
            }
            CpuStorage::F16(pages) => {
                cpu::write_pages(cpu, qkv, heads, batch, &mut pages[start..end]);
            }
            CpuStorage::I16(pages) => {
                cpu::write_pages(cpu, qkv, heads, batch, cpu::bytes_mut(&mut pages[start..end]));
            }
            _ => return Err(Error::bug("pages are bf16, f16, f32 or int8").into()),
        }
        Ok(())
    }
}

pub(super) struct PagedAttention<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) heads: Heads,
    pub(super) op: AttentionOp,
    pub(super) batch: &'a Batch,
}

impl CustomOp2 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        pages: &CpuStorage,
        pages_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let Self { cpu, heads, op, batch } = *self;
        let (qkv, width) = (floats(qkv, layout)?, width(layout));
        let (start, end) = contiguous(pages_layout)?;
        let out = match pages {
            CpuStorage::F32(pages) => {
                let pages: &[f32] = &pages[start..end];
                cpu::attention(cpu, &Attention { qkv, width, heads, op, pages, batch })
            }
            CpuStorage::BF16(pages) => {
                let pages: &[bf16] = &pages[start..end];
                cpu::attention(cpu, &Attention { qkv, width, heads, op, pages, batch })
            }
            CpuStorage::F16(pages) => {
                let pages: &[f16] = &pages[start..end];
                cpu::attention(cpu, &Attention { qkv, width, heads, op, pages, batch })
            }
            CpuStorage::I16(pages) => {
                let pages = cpu::bytes(&pages[start..end]);
                cpu::attention(cpu, &Attention { qkv, width, heads, op, pages, batch })
            }
            _ => return Err(Error::bug("pages are bf16, f16, f32 or int8").into()),
        };
        Ok((CpuStorage::F32(out), (layout.dims()[0], heads.num_heads * heads.head_dim).into()))
    }
}
