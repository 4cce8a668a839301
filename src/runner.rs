//! [`Runner`]: a [`Step`] → packed batch → [`Decoder`] → logits rows.

use candle_core::Tensor;

use crate::backend::{
    Backend, Batch, CacheBudget, DecodeGraphs, DrawnTokens, Heads, PendingDraws, Run, StepSizes,
};
use crate::cache::pool::KvPool;
use crate::checkpoint::Checkpoint;
use crate::config::BLOCK_SIZE;
use crate::decoder::Decoder;
use crate::draw::Draw;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::ModelSpec;
use crate::step::{Chunk, ChunkTokens, Forward, LogitRows, Logits, Outcome, Running, Step};

/// Share of a GPU's memory that an engine takes when the caller names none.
const GPU_MEMORY_UTILIZATION: f64 = 0.9;

/// How long sequences may be and how many tokens the cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Longest sequence, in tokens.
    pub max_model_len: usize,
    /// Blocks of [`BLOCK_SIZE`] tokens.
    pub num_blocks: usize,
}

/// What the caller asked for; `None` lets the model and the device's memory decide.
#[derive(Debug, Clone, Copy, Default)]
pub struct CapacityRequest {
    /// Longest sequence, in tokens.
    pub max_model_len: Option<usize>,
    /// Size of the cache, in tokens.
    pub kv_cache_tokens: Option<usize>,
    /// Most sequences at once: the cache need not hold more than these at full length.
    pub max_num_seqs: usize,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Share of a GPU's memory for weights, cache and activations, of all that it has.
    pub gpu_memory_utilization: Option<f64>,
}

impl CapacityRequest {
    fn largest(&self, spec: &ModelSpec, heads: Heads, bytes_per_token: usize) -> StepSizes {
        let (rows, vocab_size) = (self.max_num_seqs, spec.vocab_size);
        StepSizes {
            sequences: (rows, self.max_model_len.unwrap_or(spec.max_positions)),
            // Logits, and those that are wanted here.
            activations: self.max_num_batched_tokens * spec.activations_per_token()
                + 2 * rows * vocab_size,
            bytes_per_token,
            heads,
            vocab_size,
        }
    }

    /// Whether a model may be asked for this.
    fn check(&self, spec: &ModelSpec) -> Result<()> {
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
        if let Some(share) =
            self.gpu_memory_utilization.filter(|&share| !(share > 0.0 && share <= 1.0))
        {
            return Err(Error::invalid(format!(
                "gpu_memory_utilization must be above 0 and at most 1; given: {share}"
            )));
        }
        Ok(())
    }

    /// Settles both sizes for a model whose cached token takes `bytes_per_token`.
    ///
    /// Without `max_model_len` sequences may be as long as the model allows and the cache holds.
    fn resolve(
        &self,
        spec: &ModelSpec,
        bytes_per_token: usize,
        budget: CacheBudget,
    ) -> Result<Capacity> {
        let wanted = self.max_model_len.unwrap_or(spec.max_positions);
        let tokens = self.kv_cache_tokens.unwrap_or_else(|| {
            (budget.usual / bytes_per_token.max(1))
                .min(self.max_num_seqs.saturating_mul(wanted))
                .max(self.max_model_len.unwrap_or(BLOCK_SIZE))
        });
        if tokens > budget.most / bytes_per_token.max(1) {
            return Err(Error::new(
                ErrorKind::OutOfMemory,
                format!(
                    "a KV cache of {tokens} tokens needs {bytes_per_token} bytes for each, more than \
                     the {} bytes of memory for it; lower kv_cache_tokens or max_model_len",
                    budget.most
                ),
            ));
        }
        let num_blocks = tokens.div_ceil(BLOCK_SIZE);
        let max_model_len = self.max_model_len.unwrap_or(wanted.min(num_blocks * BLOCK_SIZE));
        Ok(Capacity { max_model_len, num_blocks })
    }
}

/// A decoder with its cache.
#[derive(Debug)]
pub struct Runner {
    decoder: Decoder,
    kv: KvPool,
    graphs: Option<DecodeGraphs>,
    /// What the last step has drawn, or is about to.
    drawn: Option<DrawnTokens>,
    backend: Backend,
    heads: Heads,
    /// Of all layers.
    windows: Vec<Option<usize>>,
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
        backend.supports(&spec)?;
        request.check(&spec)?;
        let heads = Heads {
            num_heads: spec.attention.num_heads,
            num_kv_heads: spec.attention.num_kv_heads,
            head_dim: spec.attention.head_dim,
        };
        let bytes_per_token = spec.num_layers * backend.kv_bytes_per_token(heads);
        let budget = backend.cache_budget(
            request.gpu_memory_utilization.unwrap_or(GPU_MEMORY_UTILIZATION),
            weights.sizes(),
            request.largest(&spec, heads, bytes_per_token),
        )?;
        let capacity = request.resolve(&spec, bytes_per_token, budget)?;
        let max_positions = capacity.max_model_len.min(capacity.num_blocks * BLOCK_SIZE + 1);
        let decoder = Decoder::load(&spec, weights, &backend, max_positions)?;
        let kv = KvPool::new(&backend, spec.num_layers, capacity.num_blocks, heads)?;
        let (windows, vocab_size) = (spec.attention.windows, spec.vocab_size);
        let largest = (request.max_num_seqs, capacity.max_model_len);
        let graphs = backend.decode_graphs(heads, &windows, largest)?;
        let drawn = None;
        Ok((Self { decoder, kv, graphs, drawn, backend, heads, windows, vocab_size }, capacity))
    }
}

/// A step, packed.
#[derive(Default)]
struct Packed {
    batch: Batch,
    /// Whether its ids are places among what the step before draws.
    follows: bool,
    /// Rows of the batch whose logits are computed.
    rows: Vec<u32>,
    /// Which of those logits are wanted here, and from which the device draws.
    wanted: Vec<u32>,
    draws: Vec<(u32, Draw)>,
}

impl Packed {
    fn new(step: &Step<'_>) -> Self {
        let mut packed = Self::default();
        for chunk in &step.chunks {
            packed.push(chunk);
        }
        packed
    }

    fn push(&mut self, chunk: &Chunk<'_>) {
        let batch = &mut self.batch;
        let (first, first_block) = (batch.ids.len(), batch.blocks.len());
        match chunk.tokens {
            ChunkTokens::Known(tokens) => batch.ids.extend_from_slice(tokens),
            ChunkTokens::Drawn(place) => {
                batch.ids.push(place as u32);
                self.follows = true;
            }
        }
        let end = batch.ids.len();
        batch.positions.extend((chunk.start..chunk.start + (end - first)).map(|p| p as u32));
        batch.blocks.extend_from_slice(chunk.blocks);
        batch.runs.push(Run { rows: first..end, blocks: first_block..batch.blocks.len() });
        let row = self.rows.len() as u32;
        match chunk.logits {
            LogitRows::None => return,
            LogitRows::Last | LogitRows::Drawn(_) => self.rows.push(end as u32 - 1),
            LogitRows::All => self.rows.extend(first as u32..end as u32),
        }
        match chunk.logits {
            LogitRows::Drawn(draw) => self.draws.push((row, draw)),
            _ => self.wanted.extend(row..self.rows.len() as u32),
        }
    }
}

/// A step that has nothing to give but what it draws.
#[derive(Debug)]
struct Drawing {
    draws: PendingDraws,
    vocab_size: usize,
}

impl Running for Drawing {
    fn wait(self: Box<Self>) -> Result<Logits> {
        let drawn = self.draws.wait()?;
        Ok(Logits { values: Vec::new(), vocab_size: self.vocab_size, drawn })
    }
}

impl Runner {
    /// Queues the pass over a step: the logits of its rows.
    fn pass(
        &mut self,
        mut batch: Batch,
        rows: &[u32],
        decodes: bool,
        beat: &dyn Fn(),
    ) -> Result<Option<Tensor>> {
        let (backend, decoder, kv) = (&self.backend, &self.decoder, &self.kv);
        if let Some(graphs) = self.graphs.as_mut().filter(|_| decodes) {
            return graphs.run(batch, |batch: &Batch| {
                let rows: Vec<u32> = (0..batch.ids.len() as u32).collect();
                decoder.forward(backend, batch, kv, &rows, beat)
            });
        }
        backend.place(&mut batch, self.heads, &self.windows)?;
        decoder.forward(backend, &batch, kv, rows, beat)
    }
}

impl Forward for Runner {
    fn forward(&mut self, step: &Step<'_>, beat: &dyn Fn()) -> Result<Outcome> {
        let vocab_size = self.vocab_size;
        let Packed { mut batch, rows, follows, wanted, draws } = Packed::new(step);
        let drawn = self.drawn.take();
        if follows {
            let drawn = drawn.ok_or_else(|| Error::bug("the step before has drawn nothing"))?;
            batch.follows = Some(drawn);
        }
        let decodes = step.chunks.iter().all(Chunk::decodes);
        let logits = self.pass(batch, &rows, decodes, beat)?;
        let Some(logits) = logits else {
            return Ok(Outcome::Ready(Logits { vocab_size, ..Logits::default() }));
        };
        if draws.is_empty() {
            let values = self.backend.take_floats(logits)?;
            return Ok(Outcome::Ready(Logits { values, vocab_size, drawn: Vec::new() }));
        }
        let draws = self.backend.draw(&logits, &draws)?;
        self.drawn = Some(draws.tokens()?);
        if wanted.is_empty() {
            return Ok(Outcome::Running(Box::new(Drawing { draws, vocab_size })));
        }
        let values = self.backend.take_floats(self.backend.gather_rows(&logits, &wanted)?)?;
        Ok(Outcome::Ready(Logits { values, vocab_size, drawn: draws.wait()? }))
    }

    fn draws(&self) -> bool {
        self.backend.draws()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, AttentionSpec, MlpSpec, RopePairing, RopeScaling, RopeSpec};

    const BUDGET: CacheBudget = CacheBudget { usual: 2 << 30, most: 16 << 30 };

    fn resolve(request: CapacityRequest, bytes_per_token: usize) -> Result<(usize, usize)> {
        let rope = RopeSpec {
            theta: 10_000.0,
            pairing: RopePairing::HalfSplit,
            scaling: RopeScaling::None,
        };
        let spec = ModelSpec {
            vocab_size: 8,
            hidden_size: 8,
            num_layers: 1,
            max_positions: 4096,
            norm_eps: 1e-5,
            rope,
            attention: AttentionSpec::plain(2, 1, 4, 1),
            mlp: MlpSpec { intermediate_size: 8, activation: Activation::Silu, bias: false },
            tie_embeddings: true,
        };
        request.check(&spec)?;
        let capacity = request.resolve(&spec, bytes_per_token, BUDGET)?;
        Ok((capacity.max_model_len, capacity.num_blocks))
    }

    fn request(max_model_len: Option<usize>, kv_cache_tokens: Option<usize>) -> CapacityRequest {
        CapacityRequest { max_model_len, kv_cache_tokens, max_num_seqs: 2, ..Default::default() }
    }

    #[test]
    fn sizes_follow_the_model_the_cache_and_the_caller() {
        let check = |given, bytes, expect| assert_eq!(resolve(given, bytes).expect("fits"), expect);
        check(request(None, None), 1024, (4096, 512)); // two sequences of full length
        check(request(None, None), 1 << 20, (2048, 128)); // what 2 GiB hold
        check(request(Some(4000), None), 1 << 20, (4000, 250)); // at least one of the length asked for
        check(request(None, Some(100)), 1024, (112, 7)); // whole blocks
        check(request(Some(64), Some(1000)), 1024, (64, 63));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let check = |given, expect: &str| {
            let error = resolve(given, 1 << 20).expect_err(expect).to_string();
            assert!(error.starts_with(expect), "{error}");
        };
        check(request(Some(0), None), "max_model_len must be at least 1; given: 0");
        check(request(None, Some(0)), "kv_cache_tokens must be at least 1; given: 0");
        check(request(Some(4097), None), "max_model_len must be at most 4096 (the positions");
        for tokens in [20_000, usize::MAX] {
            let expect =
                format!("a KV cache of {tokens} tokens needs 1048576 bytes for each, more");
            check(request(None, Some(tokens)), &expect);
        }
    }
}
