//! Grouped-query attention (arXiv 2305.13245) over the paged cache.

use candle_core::Tensor;

use super::linear::{Builder, Part};
use crate::backend::{AttentionOp, Backend, Batch, Heads, LayerKv, Linear, RopeOp};
use crate::error::Result;
use crate::spec::{ModelSpec, QkNorm};

/// The attention block of one layer.
#[derive(Debug)]
pub struct Attention {
    /// Queries, keys, values and, where the model has one, the output gate, in one projection.
    qkv: Linear,
    out: Linear,
    rope: RopeOp,
    heads: Heads,
    op: AttentionOp,
    output_gate: bool,
}

impl Attention {
    /// Takes the weights `layers.{layer}.attn.*`; `rope` holds the cosines and sines `(cos, sin)`.
    pub fn load(
        builder: &mut Builder<'_>,
        spec: &ModelSpec,
        layer: usize,
        (cos, sin): &(Tensor, Tensor),
    ) -> Result<Self> {
        let attention = &spec.attention;
        let heads = Heads {
            num_heads: attention.num_heads,
            num_kv_heads: attention.num_kv_heads,
            head_dim: attention.head_dim,
        };
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let part =
            |name: &str, out, bias| Part { name: format!("layers.{layer}.attn.{name}"), out, bias };
        let bias = attention.qkv_bias;
        let mut parts = vec![part("q", q, bias), part("k", kv, bias), part("v", kv, bias)];
        if attention.output_gate {
            parts.push(part("gate", q, false));
        }
        let mut norm = |name: &str| {
            let name = format!("layers.{layer}.attn.{name}_norm.weight");
            let present = attention.qk_norm != QkNorm::None;
            present.then(|| builder.vector(&name, heads.head_dim)).transpose()
        };
        let rope = RopeOp {
            cos: cos.clone(),
            sin: sin.clone(),
            pairing: spec.rope.pairing,
            qk_norm: attention.qk_norm,
            q_norm: norm("q")?,
            k_norm: norm("k")?,
            eps: spec.norm_eps,
        };
        Ok(Self {
            qkv: builder.projection(&parts, spec.hidden_size)?,
            out: builder.projection(&[part("o", spec.hidden_size, attention.out_bias)], q)?,
            rope,
            heads,
            op: AttentionOp { scale: attention.scale, window: attention.windows[layer] },
            output_gate: attention.output_gate,
        })
    }

    /// Normed input `[tokens, hidden]` → heads' outputs `[tokens, heads * head_dim]`; writes the cache.
    pub fn heads(
        &self,
        backend: &Backend,
        x: &Tensor,
        kv: &LayerKv,
        batch: &Batch,
    ) -> Result<Tensor> {
        let qkv = backend.linear(x, &self.qkv)?;
        backend.rope_and_cache(&qkv, self.heads, &self.rope, kv, batch)?;
        let out = backend.paged_attention(&qkv, self.heads, self.op, kv, batch)?;
        if self.output_gate {
            let gate = (self.heads.num_heads + 2 * self.heads.num_kv_heads) * self.heads.head_dim;
            backend.gate_attention(&out, &qkv, gate)?;
        }
        Ok(out)
    }

    /// Output projection: `[tokens, heads * head_dim]` → `[tokens, hidden]`.
    pub fn project(&self, backend: &Backend, heads: &Tensor) -> Result<Tensor> {
        backend.linear(heads, &self.out)
    }
}
