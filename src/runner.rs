//! [`Runner`]: a [`Step`] → packed batch → [`Decoder`] → logits rows.

use crate::backend::{Backend, Batch, Heads, Run};
use crate::cache::pool::KvPool;
use crate::checkpoint::Checkpoint;
use crate::config::BLOCK_SIZE;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use crate::step::{Forward, LogitRows, Logits, Step};

/// Bytes of KV cache when the caller names no size.
const DEFAULT_CACHE_BYTES: usize = 2 << 30;

/// How long sequences may be and how many tokens the cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Longest sequence, in tokens.
    pub max_model_len: usize,
    /// Blocks of [`BLOCK_SIZE`] tokens.
    pub num_blocks: usize,
}

/// What the caller asked for; `None` lets the model and a 2 GiB cache decide.
#[derive(Debug, Clone, Copy, Default)]
pub struct CapacityRequest {
    /// Longest sequence, in tokens.
    pub max_model_len: Option<usize>,
    /// Size of the cache, in tokens.
    pub kv_cache_tokens: Option<usize>,
    /// Most sequences at once: the cache need not hold more than these at full length.
    pub max_num_seqs: usize,
}

impl CapacityRequest {
    /// Settles both sizes for a model whose cached token takes `bytes_per_token`.
    ///
    /// Without `max_model_len` sequences may be as long as the model allows and the cache holds.
    pub fn resolve(&self, spec: &ModelSpec, bytes_per_token: usize) -> Result<Capacity> {
        for (name, value) in
            [("max_model_len", self.max_model_len), ("kv_cache_tokens", self.kv_cache_tokens)]
        {
            if value == Some(0) {
                return Err(Error::invalid(format!("{name} must be at least 1; given: 0")));
            }
        }
        if let Some(len) = self.max_model_len.filter(|&len| len > spec.max_positions) {
            return Err(Error::invalid(format!(
                "max_model_len must be at most {} (the positions of this model); given: {len}",
                spec.max_positions
            )));
        }
        let wanted = self.max_model_len.unwrap_or(spec.max_positions);
        let tokens = self.kv_cache_tokens.unwrap_or_else(|| {
            (DEFAULT_CACHE_BYTES / bytes_per_token.max(1))
                .min(self.max_num_seqs.saturating_mul(wanted))
                .max(self.max_model_len.unwrap_or(BLOCK_SIZE))
        });
        let num_blocks = tokens.div_ceil(BLOCK_SIZE);
        let max_model_len = self.max_model_len.unwrap_or(wanted.min(num_blocks * BLOCK_SIZE));
        Ok(Capacity { max_model_len, num_blocks })
    }
}

/// A decoder with its cache.
#[derive(Debug)]
pub struct Runner {
    backend: Backend,
    decoder: Decoder,
    kv: KvPool,
    vocab_size: usize,
}

impl Runner {
    /// Packs the checkpoint's weights and makes the cache that `request` asks for.
    pub fn load(
        checkpoint: Checkpoint,
        backend: Backend,
        request: &CapacityRequest,
    ) -> Result<(Self, Capacity)> {
        let Checkpoint { spec, weights, .. } = checkpoint;
        let heads = Heads {
            num_heads: spec.attention.num_heads,
            num_kv_heads: spec.attention.num_kv_heads,
            head_dim: spec.attention.head_dim,
        };
        let bytes_per_token = spec.num_layers * backend.kv_bytes_per_token(heads);
        let capacity = request.resolve(&spec, bytes_per_token)?;
        let decoder = Decoder::load(&spec, weights, &backend, capacity.max_model_len)?;
        let kv = KvPool::new(&backend, spec.num_layers, capacity.num_blocks, heads)?;
        Ok((Self { backend, decoder, kv, vocab_size: spec.vocab_size }, capacity))
    }
}

impl Forward for Runner {
    fn forward(&mut self, step: &Step<'_>) -> Result<Logits> {
        let (mut ids, mut batch, mut rows) = (Vec::new(), Batch::default(), Vec::new());
        for chunk in &step.chunks {
            let (first, first_block) = (ids.len(), batch.blocks.len());
            ids.extend_from_slice(chunk.tokens);
            batch
                .positions
                .extend((chunk.start..chunk.start + chunk.tokens.len()).map(|p| p as u32));
            batch.blocks.extend_from_slice(chunk.blocks);
            batch
                .runs
                .push(Run { rows: first..ids.len(), blocks: first_block..batch.blocks.len() });
            let end = ids.len() as u32;
            match chunk.logits {
                LogitRows::None => {}
                LogitRows::Last => rows.push(end - 1),
                LogitRows::All => rows.extend(first as u32..end),
            }
        }
        let logits = self.decoder.forward(&self.backend, &ids, &batch, &self.kv, &rows)?;
        let values =
            logits.map_or(Ok(Vec::new()), |logits| logits.flatten_all()?.to_vec1::<f32>())?;
        Ok(Logits { values, vocab_size: self.vocab_size })
    }
}
