//! The one forward pass: embedding, layers, norm, language-model head.

use candle_core::Tensor;

use crate::backend::{Backend, Batch, Linear, Table};
use crate::cache::pool::KvPool;
use crate::error::Result;
use crate::layers::{Attention, Builder, Mlp, rope_tables};
use crate::spec::ModelSpec;
use crate::weights::Weights;

/// A pre-norm decoder, packed for its device.
#[derive(Debug)]
pub struct Decoder {
    embed: Table,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Linear,
    norm_eps: f32,
}

#[derive(Debug)]
struct Layer {
    attn_norm: Tensor,
    attention: Attention,
    mlp_norm: Tensor,
    mlp: Mlp,
}

impl Decoder {
    /// Takes every tensor of the model from `weights` and fails on leftovers. Positions up to
    /// `max_positions` can be computed.
    pub fn load(
        spec: &ModelSpec,
        mut weights: Weights,
        backend: &Backend,
        max_positions: usize,
    ) -> Result<Self> {
        let rope = rope_tables(&spec.rope, spec.attention.head_dim, max_positions, backend)?;
        let mut builder = Builder { weights: &mut weights, backend };
        let (vocab, hidden) = (spec.vocab_size, spec.hidden_size);
        let embed = backend.table(builder.matrix("embed.weight", vocab, hidden)?)?;
        let layers = (0..spec.num_layers)
            .map(|layer| Layer::load(&mut builder, spec, layer, &rope))
            .collect::<Result<_>>()?;
        let norm = builder.vector("norm.weight", spec.hidden_size)?;
        let lm_head = if spec.tie_embeddings {
            backend.tied(&embed)?
        } else {
            backend.pack(&[builder.matrix("lm_head.weight", vocab, hidden)?], None)?
        };
        weights.finish()?;
        embed.release_file();
        Ok(Self { embed, layers, norm, lm_head, norm_eps: spec.norm_eps })
    }

    /// Computes the tokens of `batch`, writes their keys and values to `kv`, and returns
    /// the logits `[rows, vocab]` of `rows`, or `None` when there are none. `beat` is called once per
    /// layer.
    pub fn forward(
        &self,
        backend: &Backend,
        batch: &Batch,
        kv: &KvPool,
        rows: &[u32],
        beat: &dyn Fn(),
    ) -> Result<Option<Tensor>> {
        let eps = self.norm_eps;
        let mut residual = backend.embedding(&self.embed, batch)?; // [tokens, hidden]
        let mut x = backend.rms_norm(&residual, &self.layers[0].attn_norm, eps)?;
        for (index, layer) in self.layers.iter().enumerate() {
            beat();
            let mut heads = layer.attention.heads(backend, &x, kv.layer(index), batch)?;
            let last = index + 1 == self.layers.len();
            if last && rows.is_empty() {
                return Ok(None);
            }
            if last && rows.len() < batch.ids.len() {
                // Past the last cache write only the rows with logits matter.
                residual = backend.gather_rows(&residual, rows)?;
                heads = backend.gather_rows(&heads, rows)?;
            }
            let attended = layer.attention.project(backend, &heads)?;
            x = backend.add_rms_norm(&residual, &attended, &layer.mlp_norm, eps)?;
            let fed = layer.mlp.forward(backend, &x)?;
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.attn_norm);
            x = backend.add_rms_norm(&residual, &fed, next, eps)?;
        }
        backend.logits(&x, &self.lm_head).map(Some)
    }
}

impl Layer {
    fn load(
        builder: &mut Builder<'_>,
        spec: &ModelSpec,
        layer: usize,
        rope: &(Tensor, Tensor),
    ) -> Result<Self> {
        let norm = |builder: &mut Builder<'_>, name: &str| {
            builder.vector(&format!("layers.{layer}.{name}.weight"), spec.hidden_size)
        };
        Ok(Self {
            attn_norm: norm(builder, "attn_norm")?,
            attention: Attention::load(builder, spec, layer, rope)?,
            mlp_norm: norm(builder, "mlp_norm")?,
            mlp: Mlp::load(builder, spec, layer)?,
        })
    }
}
