//! [`ModelSpec`]: the one description of a decoder, as plain data.
//!
//! Every family is a function from its own configuration to a `ModelSpec` (in `checkpoint/`); past
//! that point nothing asks which family a model belongs to.

use crate::error::{Error, Result};

/// All that varies between the decoders that the crate can run.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Rows of the embedding and of the language-model head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Longest sequence that the checkpoint was made for, in tokens.
    pub max_positions: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Attention of every layer.
    pub attention: AttentionSpec,
    /// Feed-forward network of every layer.
    pub mlp: MlpSpec,
    /// The language-model head uses the embedding matrix.
    pub tie_embeddings: bool,
}

/// More layers than any decoder has; a larger count is a corrupt file.
pub const MAX_LAYERS: usize = 10_000;

/// Wider heads than any decoder has; checked before tables are made for them.
const MAX_HEAD_DIM: usize = 4096;

impl ModelSpec {
    /// Numbers that one token of a step takes beside the cache, at most: the residual stream, its norm,
    /// the merged projections and what comes out of them.
    #[must_use]
    pub fn activations_per_token(&self) -> usize {
        let attention = &self.attention;
        let heads = 3 * attention.num_heads + 2 * attention.num_kv_heads;
        4 * self.hidden_size + heads * attention.head_dim + 3 * self.mlp.intermediate_size
    }

    /// Checks what the parts must satisfy together; the forward pass relies on it.
    pub fn validate(&self) -> Result<()> {
        let ensure = |holds: bool, message: &dyn Fn() -> String| {
            if holds { Ok(()) } else { Err(Error::checkpoint(message())) }
        };
        let AttentionSpec { num_heads, num_kv_heads, head_dim, .. } = self.attention;
        ensure((1..=MAX_LAYERS).contains(&self.num_layers), &|| {
            format!("{} layers; 1 to {MAX_LAYERS} are possible", self.num_layers)
        })?;
        ensure(self.attention.windows.len() == self.num_layers, &|| {
            format!("{} windows for {} layers", self.attention.windows.len(), self.num_layers)
        })?;
        ensure(
            num_kv_heads > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads),
            &|| {
                format!(
                    "{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads"
                )
            },
        )?;
        ensure(head_dim > 0 && head_dim.is_multiple_of(2), &|| {
            format!("heads of width {head_dim} cannot be rotated; the width must be even")
        })?;
        ensure(head_dim <= MAX_HEAD_DIM, &|| {
            format!("heads of width {head_dim}; at most {MAX_HEAD_DIM} are possible")
        })?;
        ensure(self.norm_eps.is_finite() && self.norm_eps > 0.0, &|| {
            format!("norm epsilon {} must be a positive number", self.norm_eps)
        })?;
        self.rope.validate(head_dim)
    }
}

/// Attention heads and what surrounds them.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`. Query head `h` reads key/value head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// The query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Where RMSNorm over each query and key head is applied, if at all.
    pub qk_norm: QkNorm,
    /// The attention output is multiplied by `sigmoid(gate(x))` before the output projection (AstrAI).
    pub output_gate: bool,
    /// Per layer: how many of the latest keys a query sees (itself included); `None` for all.
    pub windows: Vec<Option<usize>>,
    /// Factor on the query-key products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionSpec {
    /// Heads of these sizes and nothing else: no bias, norm, gate or window, scale `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn plain(
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        num_layers: usize,
    ) -> Self {
        Self {
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::None,
            output_gate: false,
            windows: vec![None; num_layers],
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        }
    }
}

/// Where the per-head RMSNorm of queries and keys stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// There is none.
    None,
    /// Before the rotation (Qwen 3).
    BeforeRope,
    /// After the rotation (AstrAI).
    AfterRope,
}

/// Feed-forward network: `down(activation(gate(x)) * up(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpSpec {
    /// Width between the projections.
    pub intermediate_size: usize,
    /// Function on the gate.
    pub activation: Activation,
    /// The three projections have a bias.
    pub bias: bool,
}

/// Activation function of the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// Rotary position embedding ("RoFormer", arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Which two lanes of a head rotate together.
    pub pairing: RopePairing,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

impl RopeSpec {
    fn validate(&self, head_dim: usize) -> Result<()> {
        let positive = |what: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(Error::checkpoint(format!("rotary {what} {value} must be a positive number")))
        };
        positive("theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("scaling factor", *factor),
            RopeScaling::Ntk { factor } if head_dim > 2 => positive("scaling factor", *factor),
            RopeScaling::Ntk { .. } => {
                Err(Error::checkpoint("ntk scaling needs heads wider than 2".to_owned()))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                positive("scaling factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive(
                    "high_freq_factor above low_freq_factor by",
                    high_freq_factor - low_freq_factor,
                )
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, .. } => {
                positive("scaling factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", *attention_factor)
            }
            RopeScaling::PerFrequency { factors } if factors.len() == head_dim / 2 => {
                factors.iter().try_for_each(|&factor| positive("frequency divisor", factor.into()))
            }
            RopeScaling::PerFrequency { factors } => Err(Error::checkpoint(format!(
                "{} frequency divisors for heads of width {head_dim}; {} are needed",
                factors.len(),
                head_dim / 2
            ))),
        }
    }
}

/// Which lanes of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// Lanes `i` and `i + dim/2` (Hugging Face's "rotate half").
    HalfSplit,
    /// Lanes `2i` and `2i + 1` (AstrAI, GGUF `llama`).
    Adjacent,
}

/// Stretching of the rotary frequencies; names and formulas follow transformers' `rope_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The plain series.
    None,
    /// All positions divided by `factor`.
    Linear {
        /// Divisor of the positions.
        factor: f64,
    },
    /// `theta * factor^(dim / (dim - 2))` (AstrAI's `ntk`).
    Ntk {
        /// How much longer the context becomes.
        factor: f64,
    },
    /// Per-frequency interpolation of Llama 3.1.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are divided in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// Context of the pre-training, in tokens.
        original_max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// How much longer the context becomes.
        factor: f64,
        /// Context of the pre-training, in tokens.
        original_max_positions: usize,
        /// Rotations below which a frequency is extrapolated (32 by default).
        beta_fast: f64,
        /// Rotations above which a frequency is interpolated (1 by default).
        beta_slow: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Round the correction range to whole dimensions (transformers' `truncate`).
        truncate: bool,
    },
    /// One divisor per frequency, as GGUF's `rope_freqs.weight` stores them.
    PerFrequency {
        /// `head_dim / 2` divisors.
        factors: Vec<f32>,
    },
}
