//! The fused ops, as safe functions over candle tensors.
//!
//! Every op has a naive version in [`reference`], which is its specification. Tensors are packed:
//! `[tokens, …]`, contiguous, activations f32 on the CPU. The arithmetic of a row never depends on
//! the other rows of the batch: each output element has one fixed order of reduction.

use candle_core::{Device, Tensor};

use crate::cache::block::BlockId;
use crate::config::DType;
use crate::error::Result;
use crate::spec::{Activation, QkNorm, RopePairing};
use crate::weights::StoredTensor;

/// A device with its kernels and threads. Cheap to clone; clones share the thread pool.
#[derive(Debug, Clone)]
pub struct Backend {
    device: Device,
}

/// A projection packed for the device: rows of one or more stored matrices on top of each other, and
/// an optional bias.
#[derive(Debug)]
pub struct Linear {}

/// Head counts of the merged projection `[tokens, (heads + 2 * kv_heads) * head_dim + extra]`:
/// queries, keys, values, then any further columns (AstrAI's gate).
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
    /// Cosines, `[max_positions, head_dim / 2]` f32, the attention factor of YaRN included.
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
        let _ = (num_threads, dtype);
        todo!()
    }

    /// The candle device of the tensors.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Instruction tier, e.g. `avx512bf16`, `avx2`, `portable`.
    #[must_use]
    pub fn tier(&self) -> &'static str {
        todo!()
    }

    /// Threads that the kernels use.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        todo!()
    }

    /// A stored vector (norm weight, bias) as an f32 tensor of the same shape.
    pub fn vector(&self, stored: &StoredTensor) -> Result<Tensor> {
        let _ = stored;
        todo!()
    }

    /// Packs the rows of `parts` (`[out_i, in]` each, encodings may differ) into one projection.
    /// `bias` is `[sum of out_i]` f32.
    pub fn pack(&self, parts: &[StoredTensor], bias: Option<Tensor>) -> Result<Linear> {
        let _ = (parts, bias);
        todo!()
    }

    /// Empty pages for one layer. Memory is committed when it is first written.
    pub fn layer_kv(&self, num_blocks: usize, heads: Heads) -> Result<LayerKv> {
        let _ = (num_blocks, heads);
        todo!()
    }

    /// Bytes that one cached token of one layer takes.
    #[must_use]
    pub fn kv_bytes_per_token(&self, heads: Heads) -> usize {
        let _ = heads;
        todo!()
    }

    /// Rows `ids` of the stored table: `[ids, hidden]`.
    pub fn embedding(&self, table: &StoredTensor, ids: &[u32]) -> Result<Tensor> {
        let _ = (table, ids);
        todo!()
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension; `x`: `[tokens, hidden]`.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let _ = (x, weight, eps);
        todo!()
    }

    /// Adds `x` to `residual` in place, then norms the sum: both `[tokens, hidden]`.
    pub fn add_rms_norm(
        &self,
        residual: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor> {
        let _ = (residual, x, weight, eps);
        todo!()
    }

    /// `x · Wᵀ + bias`: `[tokens, in]` → `[tokens, out]`.
    pub fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        let _ = (x, weight);
        todo!()
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
        let _ = (qkv, heads, op, kv, batch);
        todo!()
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
        let _ = (qkv, heads, op, kv, batch);
        todo!()
    }

    /// `out *= sigmoid(qkv[:, offset..offset + width])` in place, `out`: `[tokens, width]`.
    pub fn gate_attention(&self, out: &Tensor, qkv: &Tensor, offset: usize) -> Result<()> {
        let _ = (out, qkv, offset);
        todo!()
    }

    /// `activation(x[:, ..width]) * x[:, width..]`: `[tokens, 2 * width]` → `[tokens, width]`.
    pub fn gated_activation(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let _ = (x, activation);
        todo!()
    }

    /// Rows `rows` of `x`: `[rows, hidden]`.
    pub fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let _ = (x, rows);
        todo!()
    }
}
