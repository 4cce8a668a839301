//! AstrAI `config.json` → [`ModelSpec`], in both dialects.
//!
//! **Which files are AstrAI's.** `model_type` is `transformer` (versions to 1.3.3),
//! `autoregressive_lm` or `embedding` (1.3.13), in any case; or `model_type` is absent and the file
//! has `dim` or `n_layers` (1.3.3), or has `hidden_size` but neither `architectures` nor
//! `transformers_version`, which every Hugging Face file has (1.3.13).
//!
//! Both dialects name their tensors alike, have no biases, rotate adjacent lanes, and normalise
//! queries and keys *after* the rotation. An untied model without `lm_head.weight` runs with its
//! embedding there.

use super::fields::Fields;
use super::rules::HEAD;
use super::{RawTensor, layer_count, split_heads};
use crate::error::{Error, Result};
use crate::spec::{
    Activation, AttentionSpec, MlpSpec, ModelSpec, QkNorm, RopePairing, RopeScaling, RopeSpec,
};

const DEFAULT_THETA: f64 = 10_000.0;

/// The names of the keys that both dialects have.
struct Dialect {
    hidden_size: &'static str,
    num_layers: &'static str,
    norm_eps: &'static str,
    intermediate_size: &'static str,
    tied: &'static str,
    max_positions: &'static str,
    num_heads: &'static str,
    num_kv_heads: &'static str,
}

const OLD: Dialect = Dialect {
    hidden_size: "dim",
    num_layers: "n_layers",
    norm_eps: "norm_eps",
    intermediate_size: "dim_ffn",
    tied: "tie_weight",
    max_positions: "max_len",
    num_heads: "n_heads",
    num_kv_heads: "n_kv_heads",
};

const NEW: Dialect = Dialect {
    hidden_size: "hidden_size",
    num_layers: "num_hidden_layers",
    norm_eps: "rms_norm_eps",
    intermediate_size: "intermediate_size",
    tied: "tie_word_embeddings",
    max_positions: "max_position_embeddings",
    num_heads: "num_attention_heads",
    num_kv_heads: "num_key_value_heads",
};

/// Whether the file is AstrAI's; the rule is at the head of this file.
pub(super) fn is_config(config: &Fields) -> Result<bool> {
    if let Some(name) = model_type(config)? {
        return Ok(matches!(name.as_str(), "transformer" | "autoregressive_lm" | "embedding"));
    }
    let hugging_face = config.has("architectures") || config.has("transformers_version");
    Ok(has_old_keys(config) || (config.has("hidden_size") && !hugging_face))
}

pub(super) fn spec(config: &Fields) -> Result<ModelSpec> {
    match model_type(config)?.as_deref() {
        Some("embedding") => Err(Error::unsupported(
            "\"model_type\" \"embedding\" is not supported; supported: transformer, autoregressive_lm",
        )),
        Some("transformer") => old(config),
        None if has_old_keys(config) => old(config),
        _ => new(config),
    }
}

/// The head is the embedding when the configuration ties them, and when the file has no head.
pub(super) fn with_head(mut spec: ModelSpec, tensors: &[RawTensor]) -> ModelSpec {
    spec.tie_embeddings |= !tensors.iter().any(|tensor| tensor.name == HEAD);
    spec
}

fn model_type(config: &Fields) -> Result<Option<String>> {
    Ok(config.opt_text("model_type")?.map(str::to_lowercase))
}

fn has_old_keys(config: &Fields) -> bool {
    config.has(OLD.hidden_size) || config.has(OLD.num_layers)
}

/// 1.3.3 reads `rope_theta` and does not use it: the base is always 10000.
fn old(config: &Fields) -> Result<ModelSpec> {
    decoder(config, &OLD, DEFAULT_THETA, RopeScaling::None)
}

fn new(config: &Fields) -> Result<ModelSpec> {
    only(config, "attn_type", "gqa", "mla")?;
    only(config, "ffn_type", "mlp", "moe")?;
    let theta = config.opt_number("rope_theta")?.unwrap_or(DEFAULT_THETA);
    decoder(config, &NEW, theta, scaling(config)?)
}

/// Only `ntk` has an effect, and it is what a missing `type` means; any other type is ignored.
fn scaling(config: &Fields) -> Result<RopeScaling> {
    let Some(fields) = config.opt_object("rope_scaling")? else { return Ok(RopeScaling::None) };
    if fields.is_empty() {
        return Ok(RopeScaling::None);
    }
    match fields.opt_text("type")? {
        None | Some("ntk") => Ok(RopeScaling::Ntk { factor: fields.number("factor")? }),
        Some(_) => Ok(RopeScaling::None),
    }
}

fn only(config: &Fields, key: &str, supported: &str, known: &str) -> Result<()> {
    match config.opt_text(key)? {
        Some(given) if given == known => Err(Error::unsupported(format!(
            "\"{key}\" {given:?} is not supported; supported: {supported}"
        ))),
        Some(given) if given != supported => Err(Error::checkpoint(format!(
            "\"{key}\" must be {supported:?} or {known:?}; given: {given:?}"
        ))),
        _ => Ok(()),
    }
}

fn decoder(config: &Fields, keys: &Dialect, theta: f64, scaling: RopeScaling) -> Result<ModelSpec> {
    let num_layers = layer_count(config, keys.num_layers)?;
    let num_heads = config.size(keys.num_heads)?;
    let head_dim = split_heads(config, keys.hidden_size, keys.num_heads, num_heads)?;
    let num_kv_heads = config.size(keys.num_kv_heads)?;
    let mut attention = AttentionSpec::plain(num_heads, num_kv_heads, head_dim, num_layers);
    if config.flag("use_qk_norm", false)? {
        attention.qk_norm = QkNorm::AfterRope;
    }
    attention.output_gate = config.flag("use_gated_attention", false)?;
    Ok(ModelSpec {
        vocab_size: config.size("vocab_size")?,
        hidden_size: config.size(keys.hidden_size)?,
        num_layers,
        max_positions: config.size(keys.max_positions)?,
        // torch's `rms_norm` without an epsilon takes that of the number format.
        norm_eps: config.opt_number(keys.norm_eps)?.map_or(f32::EPSILON, |eps| eps as f32),
        rope: RopeSpec { theta, pairing: RopePairing::Adjacent, scaling },
        attention,
        mlp: MlpSpec {
            intermediate_size: config.size(keys.intermediate_size)?,
            activation: Activation::Silu,
            bias: false,
        },
        tie_embeddings: config.flag(keys.tied, false)?,
    })
}
