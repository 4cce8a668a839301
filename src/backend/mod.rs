//! The fused ops, as safe functions over candle tensors.
//!
//! Every op has a naive version in [`mod@reference`], which is its specification. Tensors are packed:
//! `[tokens, …]`, contiguous, activations f32 on the CPU. The arithmetic of a row never depends on
//! the other rows of the batch: each output element has one fixed order of reduction.

mod check;
mod cpu;
mod ops;
pub mod reference;

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{CpuStorage, Device, Layout, Storage, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use crate::cache::block::BlockId;
use crate::config::{BLOCK_SIZE, DType};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::{Activation, QkNorm, RopePairing};
use crate::weights::StoredTensor;
use cpu::{Cpu, Tier};

/// A device with its kernels and threads. Cheap to clone; clones share the thread pool.
#[derive(Debug, Clone)]
pub struct Backend {
    device: Device,
    cpu: Arc<Cpu>,
}

/// A projection packed for the device: rows of one or more stored matrices on top of each other, and
/// an optional bias.
pub struct Linear {
    packed: cpu::Packed,
}

/// Head counts of the merged projection `[tokens, (heads + 2 * kv_heads) * head_dim + extra]`:
/// queries, keys, values, then any further columns (`AstrAI`'s gate).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What [`Backend::rope_and_cache`] does to queries and keys.
#[derive(Debug, Clone)]
pub struct RopeOp {
    /// Cosines, `[max_positions, head_dim / 2]` f32, the attention factor of `YaRN` included.
    pub cos: Tensor,
    /// Sines, same shape.
    pub sin: Tensor,
    /// Which lanes rotate together.
    pub pairing: RopePairing,
    /// Where the per-head norms stand.
    pub qk_norm: QkNorm,
    /// Weights of the query norm, `[head_dim]`, where there is one.
    pub q_norm: Option<Tensor>,
    /// Weights of the key norm, `[head_dim]`, where there is one.
    pub k_norm: Option<Tensor>,
    /// Epsilon of both norms.
    pub eps: f32,
}

/// What [`Backend::paged_attention`] needs to know beside its tensors.
#[derive(Debug, Clone, Copy)]
pub struct AttentionOp {
    /// Factor on the query-key products.
    pub scale: f32,
    /// How many of the latest keys a query sees (itself included); `None` for all.
    pub window: Option<usize>,
}

/// Keys and values of one layer, in pages of [`crate::config::BLOCK_SIZE`] tokens. The order inside a
/// page is the device's own.
#[derive(Debug, Clone)]
pub struct LayerKv {
    /// `[2, num_blocks, kv_heads * BLOCK_SIZE * head_dim]`: keys, then values.
    pub pages: Tensor,
}

/// Where the rows of a batch stand, built once per step.
#[derive(Debug, Default)]
pub struct Batch {
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// The runs of rows that belong to one sequence.
    pub runs: Vec<Run>,
    /// Block tables of all runs, one after the other.
    pub blocks: Vec<BlockId>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone)]
pub struct Run {
    /// Rows of the batch.
    pub rows: std::ops::Range<usize>,
    /// The sequence's part of [`Batch::blocks`].
    pub blocks: std::ops::Range<usize>,
}

impl Backend {
    /// The CPU, with `num_threads` threads (all CPUs that the process may use when `None`).
    pub fn cpu(num_threads: Option<usize>, dtype: DType) -> Result<Self> {
        let cpu = Arc::new(Cpu::new(num_threads, dtype, Tier::detect())?);
        Ok(Self { device: Device::Cpu, cpu })
    }

    /// As [`Self::cpu`] with the instructions of `tier` (see [`Self::tier`]); an error when this CPU
    /// lacks them. For tests and comparisons.
    pub fn cpu_with_tier(num_threads: Option<usize>, dtype: DType, tier: &str) -> Result<Self> {
        let cpu = Arc::new(Cpu::new(num_threads, dtype, Tier::parse(tier)?)?);
        Ok(Self { device: Device::Cpu, cpu })
    }

    /// The tiers that this CPU has, narrowest first.
    #[must_use]
    pub fn cpu_tiers() -> Vec<&'static str> {
        Tier::ALL.into_iter().filter(|tier| tier.is_present()).map(Tier::name).collect()
    }

    /// The candle device of the tensors.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Instruction tier, e.g. `avx512bf16`, `avx2`, `portable`.
    #[must_use]
    pub fn tier(&self) -> &'static str {
        self.cpu.tier().name()
    }

    /// Threads that the kernels use.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.cpu.threads()
    }

    /// A stored vector (norm weight, bias) as an f32 tensor of the same shape.
    pub fn vector(&self, stored: &StoredTensor) -> Result<Tensor> {
        let mut values = vec![0.0; stored.shape.iter().product()];
        reference::dequantize(stored.encoding, stored.data.as_slice(), &mut values);
        Ok(Tensor::from_vec(values, stored.shape.as_slice(), &self.device)?)
    }

    /// Packs the rows of `parts` (`[out_i, in]` each, encodings may differ) into one projection.
    /// `bias` is `[sum of out_i]` f32.
    pub fn pack(&self, parts: &[StoredTensor], bias: Option<Tensor>) -> Result<Linear> {
        let cols = parts.first().map_or(0, StoredTensor::cols);
        for part in parts {
            if part.shape.len() != 2 || part.rows() == 0 || cols == 0 || part.cols() != cols {
                return Err(Error::checkpoint(format!(
                    "tensor `{}` must be a matrix [out, {cols}]; given: {:?}",
                    part.name, part.shape
                )));
            }
        }
        if parts.is_empty() {
            return Err(Error::bug("a projection needs at least one matrix"));
        }
        let rows: usize = parts.iter().map(StoredTensor::rows).sum();
        let bias = match bias {
            Some(bias) => {
                check::shape("bias", &bias, &[rows])?;
                bias.to_vec1()?
            }
            None => Vec::new(),
        };
        Ok(Linear { packed: cpu::pack(&self.cpu, parts, bias)? })
    }

    /// Empty pages for one layer. Memory is committed when it is first written.
    pub fn layer_kv(&self, num_blocks: usize, heads: Heads) -> Result<LayerKv> {
        check::heads(heads)?;
        let page = heads.num_kv_heads * BLOCK_SIZE * heads.head_dim;
        let shape = (2, num_blocks, page);
        let len = page.checked_mul(2 * num_blocks).filter(|&len| len < isize::MAX as usize / 4);
        let len = len.ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfMemory,
                format!("a cache of {num_blocks} blocks is too large"),
            )
        })?;
        // Zeros of a primitive type come from the system untouched, those of `bf16` do not.
        let device = &self.device;
        let pages = match self.kv_dtype() {
            candle_core::DType::F32 => Tensor::from_vec(vec![0f32; len], shape, device),
            candle_core::DType::F16 => {
                Tensor::from_vec(vec![0u16; len].reinterpret_into::<f16>(), shape, device)
            }
            _ => Tensor::from_vec(vec![0u16; len].reinterpret_into::<bf16>(), shape, device),
        };
        Ok(LayerKv { pages: pages? })
    }

    /// Bytes of the device's memory that this process may use, where the system tells.
    #[must_use]
    pub fn memory_bytes(&self) -> Option<usize> {
        cpu::memory_limit()
    }

    /// Bytes that one cached token of one layer takes.
    #[must_use]
    pub fn kv_bytes_per_token(&self, heads: Heads) -> usize {
        2 * heads.num_kv_heads * heads.head_dim * self.kv_dtype().size_in_bytes()
    }

    fn kv_dtype(&self) -> candle_core::DType {
        match self.cpu.dtype() {
            DType::Float32 => candle_core::DType::F32,
            DType::Float16 => candle_core::DType::F16,
            DType::Auto | DType::BFloat16 => candle_core::DType::BF16,
        }
    }

    /// Rows `ids` of the stored table: `[ids, hidden]`.
    pub fn embedding(&self, table: &StoredTensor, ids: &[u32]) -> Result<Tensor> {
        let (rows, cols) = (table.rows(), table.cols());
        let mut values = vec![0.0; ids.len() * cols];
        for (&id, values) in ids.iter().zip(values.chunks_exact_mut(cols.max(1))) {
            if id as usize >= rows {
                return Err(Error::invalid(format!("token ids must be below {rows}; given: {id}")));
            }
            reference::dequantize(table.encoding, table.row_bytes(id as usize), values);
        }
        Ok(Tensor::from_vec(values, (ids.len(), cols), &self.device)?)
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension; `x`: `[tokens, hidden]`.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        check::rows("x", x, Some(weight.elem_count()))?;
        check::shape("weight", weight, &[weight.elem_count()])?;
        Ok(x.apply_op2_no_bwd(weight, &ops::RmsNorm { cpu: &self.cpu, eps })?)
    }

    /// Adds `x` to `residual` in place, then norms the sum: both `[tokens, hidden]`.
    pub fn add_rms_norm(
        &self,
        residual: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor> {
        check::shape("weight", weight, &[weight.elem_count()])?;
        check::rows("residual", residual, Some(weight.elem_count()))?;
        check::shape("x", x, residual.dims())?;
        let op = ops::AddRmsNorm { cpu: &self.cpu, eps, out: RefCell::default() };
        residual.inplace_op3(x, weight, &op)?;
        Ok(Tensor::from_vec(op.out.into_inner(), residual.shape(), &self.device)?)
    }

    /// `x · Wᵀ + bias`: `[tokens, in]` → `[tokens, out]`.
    pub fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        check::rows("x", x, Some(weight.in_features()))?;
        Ok(x.apply_op1_no_bwd(&ops::Linear { cpu: &self.cpu, weight: &weight.packed })?)
    }

    /// Norms and rotates queries and keys of `qkv` in place, and writes keys and values to the pages
    /// that the batch names.
    pub fn rope_and_cache(
        &self,
        qkv: &Tensor,
        heads: Heads,
        op: &RopeOp,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<()> {
        let rows = check::qkv(qkv, heads)?;
        check::batch(batch, rows, check::pages(kv, heads, self.kv_dtype())?)?;
        check::rope(op, heads, &batch.positions)?;
        let tables = [&op.cos, &op.sin].map(Tensor::storage_and_layout);
        let [cos, sin] = [floats(&tables[0].0, tables[0].1)?, floats(&tables[1].0, tables[1].1)?];
        let norms =
            op.q_norm.as_ref().zip(op.k_norm.as_ref()).filter(|_| op.qk_norm != QkNorm::None);
        let norms = norms.map(|(q, k)| [q.storage_and_layout(), k.storage_and_layout()]);
        let norms = match &norms {
            Some([q, k]) => Some([floats(&q.0, q.1)?, floats(&k.0, k.1)?]),
            None => None,
        };
        let RopeOp { pairing, qk_norm, eps, .. } = *op;
        let op = cpu::Rope { heads, cos, sin, pairing, qk_norm, norms, eps };
        let cpu = &self.cpu;
        qkv.inplace_op1(&ops::Rope { cpu, op, positions: &batch.positions })?;
        kv.pages.inplace_op2(qkv, &ops::WritePages { cpu, heads, batch })?;
        Ok(())
    }

    /// Causal attention of the queries in `qkv` over the cached keys and values of their sequence:
    /// `[tokens, heads * head_dim]`.
    pub fn paged_attention(
        &self,
        qkv: &Tensor,
        heads: Heads,
        op: AttentionOp,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<Tensor> {
        let rows = check::qkv(qkv, heads)?;
        check::batch(batch, rows, check::pages(kv, heads, self.kv_dtype())?)?;
        if op.window == Some(0) {
            return Err(Error::bug("an attention window must be at least 1; given: 0"));
        }
        let op = ops::PagedAttention { cpu: &self.cpu, heads, op, batch };
        Ok(qkv.apply_op2_no_bwd(&kv.pages, &op)?)
    }

    /// `out *= sigmoid(qkv[:, offset..offset + width])` in place, `out`: `[tokens, width]`.
    pub fn gate_attention(&self, out: &Tensor, qkv: &Tensor, offset: usize) -> Result<()> {
        let rows = (check::rows("out", out, None)?, check::rows("qkv", qkv, None)?);
        let (width, whole) = (out.dims()[1], qkv.dims()[1]);
        if rows.0 != rows.1 || offset.checked_add(width).is_none_or(|end| end > whole) {
            return Err(Error::bug(format!(
                "`qkv` must be [{}, at least {offset} + {width}]; given: {:?}",
                rows.0,
                qkv.dims()
            )));
        }
        Ok(out.inplace_op2(qkv, &ops::SigmoidGate { cpu: &self.cpu, offset })?)
    }

    /// `activation(x[:, ..width]) * x[:, width..]`: `[tokens, 2 * width]` → `[tokens, width]`.
    pub fn gated_activation(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Activation::Silu = activation;
        check::rows("x", x, None)?;
        if !x.dims()[1].is_multiple_of(2) {
            return Err(Error::bug(format!(
                "`x` must be [tokens, 2 * width]; given: {:?}",
                x.dims()
            )));
        }
        Ok(x.apply_op1_no_bwd(&ops::GatedSilu { cpu: &self.cpu })?)
    }

    /// Rows `rows` of `x`: `[rows, hidden]`.
    pub fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let count = check::rows("x", x, None)?;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            return Err(Error::bug(format!("rows must be below {count}; given: {row}")));
        }
        Ok(x.apply_op1_no_bwd(&ops::GatherRows { rows })?)
    }
}

/// The numbers of a contiguous f32 tensor on the CPU.
fn floats<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    let values: &CpuStorage = match storage {
        Storage::Cpu(values) => values,
        _ => return Err(Error::bug("a tensor is on another device than the backend")),
    };
    Ok(ops::floats(values, layout)?)
}

impl Linear {
    /// Numbers per row of its input.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.packed.cols()
    }

    /// Numbers per row of its output.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.packed.rows()
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear({} -> {})", self.in_features(), self.out_features())
    }
}
