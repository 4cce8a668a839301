//! Hugging Face `config.json` → [`ModelSpec`]: one short function per family.
//!
//! Source: transformers, `models/{llama,mistral,qwen2,qwen3}/configuration_*.py` and `modeling_*.py`.
//! A key that shapes the model must be there; where the library has a neutral default (no bias, no
//! window, untied) a missing key means that default, as it does there.

use super::fields::Fields;
use super::{layer_count, rope, split_heads};
use crate::error::{Error, Result};
use crate::spec::{Activation, AttentionSpec, MlpSpec, ModelSpec, QkNorm};

type Family = fn(&Fields) -> Result<ModelSpec>;

const FAMILIES: [(&str, Family); 4] =
    [("llama", llama), ("mistral", mistral), ("qwen2", qwen2), ("qwen3", qwen3)];

/// The window of mistral and qwen configurations that do not name one.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn spec(config: &Fields) -> Result<ModelSpec> {
    let Some(model_type) = config.opt_text("model_type")? else {
        return Err(Error::checkpoint("\"model_type\" is missing"));
    };
    let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        let names: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
        return Err(Error::unsupported(format!(
            "\"model_type\" {model_type:?} is not supported; supported: {}, and AstrAI's",
            names.join(", ")
        )));
    };
    if let Some(quantization) = config.opt_object("quantization_config")? {
        let method = quantization.opt_text("quant_method")?.unwrap_or("unnamed");
        return Err(Error::unsupported(format!(
            "\"quantization_config\" (quant_method {method:?}) is not supported; use a GGUF file"
        )));
    }
    family(config)
}

fn llama(config: &Fields) -> Result<ModelSpec> {
    let kv_heads = match config.opt_size("num_key_value_heads")? {
        Some(kv_heads) => kv_heads,
        None => config.size("num_attention_heads")?,
    };
    let mut spec = decoder(config, kv_heads, None)?;
    spec.attention.qkv_bias = config.flag("attention_bias", false)?;
    spec.attention.out_bias = spec.attention.qkv_bias;
    spec.mlp.bias = config.flag("mlp_bias", false)?;
    Ok(spec)
}

fn mistral(config: &Fields) -> Result<ModelSpec> {
    let mut spec = decoder(config, config.size("num_key_value_heads")?, None)?;
    let window = sliding_window(config)?;
    spec.attention.windows = match layer_types(config, spec.num_layers, window)? {
        Some(windows) => windows,
        None => vec![window; spec.num_layers],
    };
    Ok(spec)
}

fn qwen2(config: &Fields) -> Result<ModelSpec> {
    let mut spec = decoder(config, config.size("num_key_value_heads")?, None)?;
    spec.attention.qkv_bias = true;
    spec.attention.windows = qwen_windows(config, spec.num_layers)?;
    Ok(spec)
}

fn qwen3(config: &Fields) -> Result<ModelSpec> {
    let mut spec = decoder(config, config.size("num_key_value_heads")?, Some(128))?;
    spec.attention.qkv_bias = config.flag("attention_bias", false)?;
    spec.attention.out_bias = spec.attention.qkv_bias;
    spec.attention.qk_norm = QkNorm::BeforeRope;
    spec.attention.windows = qwen_windows(config, spec.num_layers)?;
    Ok(spec)
}

/// What the families share. `default_head_dim` stands in for a missing `head_dim` where the library
/// does not derive it from the other sizes.
fn decoder(
    config: &Fields,
    num_kv_heads: usize,
    default_head_dim: Option<usize>,
) -> Result<ModelSpec> {
    let hidden_size = config.size("hidden_size")?;
    let num_heads = config.size("num_attention_heads")?;
    let num_layers = layer_count(config, "num_hidden_layers")?;
    let max_positions = config.size("max_position_embeddings")?;
    let head_dim = match config.opt_size("head_dim")?.or(default_head_dim) {
        Some(head_dim) => head_dim,
        None => split_heads(config, "hidden_size", "num_attention_heads", num_heads)?,
    };
    Ok(ModelSpec {
        vocab_size: config.size("vocab_size")?,
        hidden_size,
        num_layers,
        max_positions,
        norm_eps: config.number("rms_norm_eps")? as f32,
        rope: rope::spec(config, max_positions)?,
        attention: AttentionSpec::plain(num_heads, num_kv_heads, head_dim, num_layers),
        mlp: MlpSpec {
            intermediate_size: config.size("intermediate_size")?,
            activation: activation(config)?,
            bias: false,
        },
        tie_embeddings: config.flag("tie_word_embeddings", false)?,
    })
}

fn activation(config: &Fields) -> Result<Activation> {
    match config.opt_text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(Error::unsupported(format!(
            "\"hidden_act\" {other:?} is not supported; supported: silu"
        ))),
    }
}

/// A missing key means the library's default, `null` means none.
fn sliding_window(config: &Fields) -> Result<Option<usize>> {
    if config.is_null("sliding_window") {
        return Ok(None);
    }
    Ok(Some(config.opt_size("sliding_window")?.unwrap_or(DEFAULT_WINDOW)))
}

/// `layer_types` where the configuration has it; else the layers from `max_window_layers` on have
/// the window, if `use_sliding_window` turns it on.
fn qwen_windows(config: &Fields, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let used = config.flag("use_sliding_window", false)?;
    let window = if used { sliding_window(config)? } else { None };
    if let Some(windows) = layer_types(config, num_layers, window)? {
        return Ok(windows);
    }
    let first = config.opt_index("max_window_layers")?.unwrap_or(28);
    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

fn layer_types(
    config: &Fields,
    num_layers: usize,
    window: Option<usize>,
) -> Result<Option<Vec<Option<usize>>>> {
    let Some(types) = config.opt_texts("layer_types")? else { return Ok(None) };
    if types.len() != num_layers {
        return Err(Error::checkpoint(format!(
            "\"layer_types\" has {} entries for {num_layers} layers",
            types.len()
        )));
    }
    let layer_window = |name: &str| match (name, window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => Err(Error::checkpoint(
            "\"layer_types\" has \"sliding_attention\", but no \"sliding_window\" is in use",
        )),
        (other, _) => Err(Error::unsupported(format!(
            "\"layer_types\" {other:?} is not supported; supported: full_attention, sliding_attention"
        ))),
    };
    types.into_iter().map(layer_window).collect::<Result<_>>().map(Some)
}
