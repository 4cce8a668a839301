//! The fused ops, as safe functions over candle tensors.
//!
//! Every op has a naive version in [`mod@reference`], which is its specification. Tensors are packed:
//! `[tokens, …]`, contiguous. On the CPU activations are f32, on a GPU of the compute type; there the
//! residual stream, the logits, norm weights and biases are f32 too. The arithmetic of a row never
//! depends on the other rows of the batch: each output element has one fixed order of reduction.

mod check;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda-emulator")]
pub use cuda::emulator;
mod device;
mod draw;
mod graph;
mod ops;
pub mod reference;

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::cache::block::BlockId;
use crate::config::KvCacheDType;
use crate::error::{Error, Result};
use crate::spec::{Activation, QkNorm, RopePairing};
use crate::weights::StoredTensor;
use cpu::Cpu;
pub use device::{CacheBudget, StepSizes};
pub use draw::{DrawnTokens, PendingDraws};
pub use graph::DecodeGraphs;

/// A device with its kernels and threads. Cheap to clone; clones share the thread pool.
#[derive(Clone)]
pub struct Backend {
    device: Device,
    kind: Kind,
    kv_cache: KvCacheDType,
}

#[derive(Clone)]
enum Kind {
    Cpu(Arc<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Cuda>),
}

/// A projection packed for the device: rows of one or more stored matrices on top of each other, and
/// an optional bias.
pub struct Linear {
    packed: Packed,
}

enum Packed {
    Cpu(cpu::Packed),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Matrix>),
}

/// A matrix of which rows are looked up: the token embedding.
#[derive(Clone)]
pub struct Table {
    rows: TableRows,
}

#[derive(Clone)]
enum TableRows {
    Stored(StoredTensor),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Matrix>),
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
    /// `[2, num_blocks, kv_heads * BLOCK_SIZE * head_dim]`: keys, then values. Some devices round `head_dim` up. Where
    /// they are int8, pairs of bytes, with the scales behind those of each head.
    pub pages: Tensor,
}

/// Where the rows of a batch stand, built once per step.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token of each row; ops that do not look at it leave it to be empty.
    pub ids: Vec<u32>,
    /// Where tokens are drawn on the device and not known yet: these, of which `ids` has the places.
    pub follows: Option<DrawnTokens>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// The runs of rows that belong to one sequence.
    pub runs: Vec<Run>,
    /// Block tables of all runs, one after the other.
    pub blocks: Vec<BlockId>,
    /// The device's own copy.
    pub placement: Placement,
}

/// A [`Batch`] in the memory of a GPU: see [`Backend::place`].
#[derive(Debug, Default)]
pub struct Placement {
    #[cfg(feature = "cuda")]
    cuda: Option<cuda::DeviceBatch>,
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
    /// A stored vector (norm weight, bias) as an f32 tensor of the same shape.
    pub fn vector(&self, stored: &StoredTensor) -> Result<Tensor> {
        self.floats(reference::numbers(stored), &stored.shape)
    }

    /// An f32 tensor of these numbers.
    pub fn floats(&self, numbers: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Tensor::from_vec(numbers, shape, &self.device).map_err(|error| match &self.kind {
            Kind::Cpu(_) => error.into(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.explain(error),
        })
    }

    /// Packs the rows of `parts` (`[out_i, in]` each, encodings may differ) into one projection.
    /// `bias` has a number for each row.
    pub fn pack(&self, parts: &[StoredTensor], bias: Option<Vec<f32>>) -> Result<Linear> {
        let rows = check::parts(parts)?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != rows) {
            return Err(Error::bug(format!("a bias of {} numbers for {rows} rows", bias.len())));
        }
        let packed = match &self.kind {
            Kind::Cpu(cpu) => Packed::Cpu(cpu::pack(cpu, parts, bias.unwrap_or_default())?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => Packed::Cuda(Arc::new(cuda.matrix(parts, bias)?)),
        };
        Ok(Linear { packed })
    }

    /// A stored matrix whose rows are looked up.
    pub fn table(&self, stored: StoredTensor) -> Result<Table> {
        check::parts(std::slice::from_ref(&stored))?;
        let rows = match &self.kind {
            Kind::Cpu(_) => TableRows::Stored(stored),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => TableRows::Cuda(Arc::new(cuda.matrix(&[stored], None)?)),
        };
        Ok(Table { rows })
    }

    /// The projection onto the rows of `table`: a tied language-model head.
    pub fn tied(&self, table: &Table) -> Result<Linear> {
        match &table.rows {
            TableRows::Stored(stored) => self.pack(std::slice::from_ref(stored), None),
            #[cfg(feature = "cuda")]
            TableRows::Cuda(matrix) => Ok(Linear { packed: Packed::Cuda(matrix.clone()) }),
        }
    }

    /// Puts `batch` where the device's kernels look for it, for attention with these heads and windows.
    /// Ops that take a batch need it; it does nothing on the CPU.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::unnecessary_wraps))]
    pub fn place(&self, batch: &mut Batch, heads: Heads, windows: &[Option<usize>]) -> Result<()> {
        match &self.kind {
            Kind::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                batch.placement = Placement { cuda: Some(cuda.place(batch, heads, windows)?) };
                Ok(())
            }
        }
    }

    /// Rows of `table` for the tokens of `batch`: the residual stream, `[tokens, hidden]` f32.
    pub fn embedding(&self, table: &Table, batch: &Batch) -> Result<Tensor> {
        let (rows, ids) = (table.rows(), &batch.ids);
        if batch.follows.is_none()
            && let Some(id) = ids.iter().find(|&&id| id as usize >= rows)
        {
            return Err(Error::invalid(format!("token ids must be below {rows}; given: {id}")));
        }
        match (&self.kind, &table.rows) {
            (Kind::Cpu(_), TableRows::Stored(_)) if batch.follows.is_some() => {
                Err(Error::bug("on the CPU the sampler draws"))
            }
            (Kind::Cpu(_), TableRows::Stored(stored)) => {
                let mut values = vec![0.0; ids.len() * stored.cols()];
                for (&id, values) in ids.iter().zip(values.chunks_exact_mut(stored.cols().max(1))) {
                    reference::dequantize(stored.encoding, stored.row_bytes(id as usize), values);
                }
                Ok(Tensor::from_vec(values, (ids.len(), stored.cols()), &self.device)?)
            }
            #[cfg(feature = "cuda")]
            (Kind::Cuda(cuda), TableRows::Cuda(matrix)) => cuda.embedding(matrix, batch),
            #[cfg(feature = "cuda")]
            _ => Err(other_device("table")),
        }
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension; `x`: `[tokens, hidden]` of the
    /// residual stream.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        check::rows("x", x, Some(weight.elem_count()), F32)?;
        check::shape("weight", weight, &[weight.elem_count()], F32)?;
        match &self.kind {
            Kind::Cpu(cpu) => Ok(x.apply_op2_no_bwd(weight, &ops::RmsNorm { cpu, eps })?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.add_rms_norm(x, None, weight, eps),
        }
    }

    /// Adds `x` to `residual` in place, then norms the sum: both `[tokens, hidden]`.
    pub fn add_rms_norm(
        &self,
        residual: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor> {
        check::shape("weight", weight, &[weight.elem_count()], F32)?;
        check::rows("residual", residual, Some(weight.elem_count()), F32)?;
        check::shape("x", x, residual.dims(), self.activation_dtype())?;
        match &self.kind {
            Kind::Cpu(cpu) => {
                let op = ops::AddRmsNorm { cpu, eps, out: RefCell::default() };
                residual.inplace_op3(x, weight, &op)?;
                Ok(Tensor::from_vec(op.out.into_inner(), residual.shape(), &self.device)?)
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.add_rms_norm(residual, Some(x), weight, eps),
        }
    }

    /// `x · Wᵀ + bias`: `[tokens, in]` → `[tokens, out]`.
    pub fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.linear_as(x, weight, self.activation_dtype())
    }

    /// As [`Self::linear`], f32 on every device.
    pub fn logits(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        self.linear_as(x, weight, F32)
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn linear_as(&self, x: &Tensor, weight: &Linear, out: candle_core::DType) -> Result<Tensor> {
        check::rows("x", x, Some(weight.in_features()), self.activation_dtype())?;
        match (&self.kind, &weight.packed) {
            (Kind::Cpu(cpu), Packed::Cpu(weight)) => {
                Ok(x.apply_op1_no_bwd(&ops::Linear { cpu, weight, gated: false })?)
            }
            #[cfg(feature = "cuda")]
            (Kind::Cuda(cuda), Packed::Cuda(matrix)) => cuda.linear(x, matrix, out),
            #[cfg(feature = "cuda")]
            _ => Err(other_device("projection")),
        }
    }

    /// Norms and rotates queries and keys of `qkv`, and writes keys and values to the pages that the
    /// batch names. The queries of `qkv` change in place; what becomes of its keys is the device's own.
    pub fn rope_and_cache(
        &self,
        qkv: &Tensor,
        heads: Heads,
        op: &RopeOp,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<()> {
        let rows = check::qkv(qkv, heads, self.activation_dtype())?;
        check::batch(batch, rows, check::pages(kv, self.page_len(heads), self.kv_dtype())?)?;
        check::rope(op, heads, &batch.positions)?;
        match &self.kind {
            Kind::Cpu(cpu) => ops::rope_and_cache(cpu, qkv, heads, op, kv, batch),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.rope_and_cache(qkv, heads, op, kv, batch),
        }
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
        let rows = check::qkv(qkv, heads, self.activation_dtype())?;
        check::batch(batch, rows, check::pages(kv, self.page_len(heads), self.kv_dtype())?)?;
        if op.window == Some(0) {
            return Err(Error::bug("an attention window must be at least 1; given: 0"));
        }
        match &self.kind {
            Kind::Cpu(cpu) => {
                let op = ops::PagedAttention { cpu, heads, op, batch };
                Ok(qkv.apply_op2_no_bwd(&kv.pages, &op)?)
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.paged_attention(qkv, heads, op, kv, batch),
        }
    }

    /// `out *= sigmoid(qkv[:, offset..offset + width])` in place, `out`: `[tokens, width]`.
    pub fn gate_attention(&self, out: &Tensor, qkv: &Tensor, offset: usize) -> Result<()> {
        let dtype = self.activation_dtype();
        let rows = (check::rows("out", out, None, dtype)?, check::rows("qkv", qkv, None, dtype)?);
        let (width, whole) = (out.dims()[1], qkv.dims()[1]);
        if rows.0 != rows.1 || offset.checked_add(width).is_none_or(|end| end > whole) {
            return Err(Error::bug(format!(
                "`qkv` must be [{}, at least {offset} + {width}]; given: {:?}",
                rows.0,
                qkv.dims()
            )));
        }
        match &self.kind {
            Kind::Cpu(cpu) => Ok(out.inplace_op2(qkv, &ops::SigmoidGate { cpu, offset })?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.gate_attention(out, qkv, offset),
        }
    }

    /// `activation(x[:, ..width]) * x[:, width..]`: `[tokens, 2 * width]` → `[tokens, width]`.
    pub fn gated_activation(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Activation::Silu = activation;
        check::rows("x", x, None, self.activation_dtype())?;
        if !x.dims()[1].is_multiple_of(2) {
            return Err(Error::bug(format!(
                "`x` must be [tokens, 2 * width]; given: {:?}",
                x.dims()
            )));
        }
        match &self.kind {
            Kind::Cpu(cpu) => Ok(x.apply_op1_no_bwd(&ops::GatedSilu { cpu })?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.gated_activation(x),
        }
    }

    /// [`Self::gated_activation`] of [`Self::linear`], in one where the device can.
    pub fn gated_linear(
        &self,
        x: &Tensor,
        weight: &Linear,
        activation: Activation,
    ) -> Result<Tensor> {
        let Activation::Silu = activation;
        check::rows("x", x, Some(weight.in_features()), self.activation_dtype())?;
        match (&self.kind, &weight.packed) {
            (Kind::Cpu(cpu), Packed::Cpu(weight)) if weight.has_halves() => {
                return Ok(x.apply_op1_no_bwd(&ops::Linear { cpu, weight, gated: true })?);
            }
            #[cfg(feature = "cuda")]
            (Kind::Cuda(cuda), Packed::Cuda(matrix)) => {
                if let Some(out) = cuda.gated_linear(x, matrix)? {
                    return Ok(out);
                }
            }
            _ => {}
        }
        self.gated_activation(&self.linear(x, weight)?, activation)
    }

    /// Rows `rows` of `x`: `[rows, hidden]`.
    pub fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let count = check::rows("x", x, None, x.dtype())?;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            return Err(Error::bug(format!("rows must be below {count}; given: {row}")));
        }
        match &self.kind {
            Kind::Cpu(_) => Ok(x.apply_op1_no_bwd(&ops::GatherRows { rows })?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.gather_rows(x, rows),
        }
    }

    /// The numbers of `x`, f32, row by row. On a CPU they are taken, not copied: clones of `x` have none afterwards.
    pub(crate) fn take_floats(&self, x: Tensor) -> Result<Vec<f32>> {
        check::rows("x", &x, None, F32)?;
        match &self.kind {
            Kind::Cpu(_) => {
                let floats = ops::TakeFloats::default();
                x.inplace_op1(&floats)?;
                drop(x);
                Ok(floats.0.into_inner())
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => Ok(x.flatten_all()?.to_vec1()?),
        }
    }
}

const F32: candle_core::DType = candle_core::DType::F32;

#[cfg(feature = "cuda")]
fn other_device(what: &str) -> Error {
    Error::bug(format!("the {what} was made for another device"))
}

impl Table {
    /// Rows that can be looked up.
    #[must_use]
    pub fn rows(&self) -> usize {
        match &self.rows {
            TableRows::Stored(stored) => stored.rows(),
            #[cfg(feature = "cuda")]
            TableRows::Cuda(matrix) => matrix.outs(),
        }
    }

    /// Lets the system take back what of the table's file is in memory; rows that are looked up come back.
    pub fn release_file(&self) {
        match &self.rows {
            TableRows::Stored(stored) => stored.data.release_owner(),
            #[cfg(feature = "cuda")]
            TableRows::Cuda(_) => (),
        }
    }
}

impl Linear {
    /// Numbers per row of its input.
    #[must_use]
    pub fn in_features(&self) -> usize {
        match &self.packed {
            Packed::Cpu(packed) => packed.cols(),
            #[cfg(feature = "cuda")]
            Packed::Cuda(matrix) => matrix.cols(),
        }
    }

    /// Numbers per row of its output.
    #[must_use]
    pub fn out_features(&self) -> usize {
        match &self.packed {
            Packed::Cpu(packed) => packed.rows(),
            #[cfg(feature = "cuda")]
            Packed::Cuda(matrix) => matrix.outs(),
        }
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear({} -> {})", self.in_features(), self.out_features())
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} rows)", self.rows())
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Backend({})", self.tier())
    }
}
