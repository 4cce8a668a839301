//! GGUF metadata → [`ModelSpec`], for the architectures `llama` (mistral's files too), `qwen2`, `qwen3`.
//!
//! Keys: the specification's section "LLM"; meanings as llama.cpp reads them (`llama-model.cpp`). The
//! rows of `llama`'s query and key projections are permuted, so adjacent lanes rotate together.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{Metadata, Value};
use crate::checkpoint::fields::{Fields, differ};
use crate::checkpoint::{Checkpoint, RawTensor, layer_count, rules, split_heads};
use crate::error::{Error, Result};
use crate::spec::{
    Activation, AttentionSpec, MlpSpec, ModelSpec, QkNorm, RopePairing, RopeScaling, RopeSpec,
};
use crate::weights::Encoding;

/// What an architecture decides and no key says.
struct Architecture {
    name: &'static str,
    pairing: RopePairing,
    /// `None`: as the file's tensors have it.
    qkv_bias: Option<bool>,
    qk_norm: QkNorm,
}

const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "llama",
        pairing: RopePairing::Adjacent,
        qkv_bias: None,
        qk_norm: QkNorm::None,
    },
    Architecture {
        name: "qwen2",
        pairing: RopePairing::HalfSplit,
        qkv_bias: Some(true),
        qk_norm: QkNorm::None,
    },
    Architecture {
        name: "qwen3",
        pairing: RopePairing::HalfSplit,
        qkv_bias: None,
        qk_norm: QkNorm::BeforeRope,
    },
];

/// What keys that no model needs start with.
const TOKENIZER_KEYS: &str = "tokenizer.";
/// One divisor per rotary frequency; it becomes part of the spec.
const ROPE_FREQS: &str = "rope_freqs.weight";
const EMBEDDING: &str = "token_embd.weight";

pub(super) fn spec(metadata: &Metadata<'_>, tensors: &[RawTensor]) -> Result<ModelSpec> {
    let general = fields(metadata, "");
    let Some(name) = general.opt_text("general.architecture")? else {
        return Err(Error::checkpoint("\"general.architecture\" is missing"));
    };
    let Some(architecture) = ARCHITECTURES.iter().find(|known| known.name == name) else {
        let names: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
        return Err(Error::unsupported(format!(
            "\"general.architecture\" {name:?} is not supported; supported: {}",
            names.join(", ")
        )));
    };
    if general.opt_index("split.count")?.is_some_and(|count| count > 1) {
        return Err(Error::unsupported(
            "a GGUF split over several files is not supported; merge it first",
        ));
    }
    let keys = fields(metadata, &format!("{name}."));
    let spec = decoder(architecture, &keys, tensors)?;
    spec.validate()?;
    Ok(spec)
}

pub(super) fn assemble(
    path: &Path,
    spec: ModelSpec,
    mut tensors: Vec<RawTensor>,
) -> Result<Checkpoint> {
    tensors.retain(|tensor| tensor.name != ROPE_FREQS);
    crate::checkpoint::assemble(path, spec, tensors, &rules::GGUF)
}

fn decoder(architecture: &Architecture, keys: &Fields, tensors: &[RawTensor]) -> Result<ModelSpec> {
    let has = |name: &str| tensors.iter().any(|tensor| tensor.name == name);
    if keys.opt_index("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err(Error::unsupported(format!(
            "{}: mixtures of experts",
            keys.name("expert_count")
        )));
    }
    if !keys.flag("attention.causal", true)? {
        return Err(Error::unsupported(format!("{} false", keys.name("attention.causal"))));
    }
    let max_positions = keys.size("context_length")?;
    let mut attention = attention(keys)?;
    attention.windows = windows(architecture, keys, attention.windows.len())?;
    attention.qk_norm = architecture.qk_norm;
    attention.qkv_bias = architecture.qkv_bias.unwrap_or_else(|| has("blk.0.attn_q.bias"));
    attention.out_bias = has("blk.0.attn_output.bias");
    let scaling = scaling(keys, max_positions, tensors)?;
    Ok(ModelSpec {
        vocab_size: vocab_size(tensors)?,
        hidden_size: keys.size("embedding_length")?,
        num_layers: attention.windows.len(),
        max_positions,
        norm_eps: keys.number("attention.layer_norm_rms_epsilon")? as f32,
        rope: RopeSpec {
            theta: keys.opt_number("rope.freq_base")?.unwrap_or(10_000.0),
            pairing: architecture.pairing,
            scaling,
        },
        attention,
        mlp: MlpSpec {
            intermediate_size: uniform(keys, "feed_forward_length")?,
            activation: Activation::Silu,
            bias: has("blk.0.ffn_gate.bias"),
        },
        tie_embeddings: !has("output.weight"),
    })
}

fn attention(keys: &Fields) -> Result<AttentionSpec> {
    let num_layers = layer_count(keys, "block_count")?;
    let num_heads = uniform(keys, "attention.head_count")?;
    let num_kv_heads = if keys.has("attention.head_count_kv") {
        uniform(keys, "attention.head_count_kv")?
    } else {
        num_heads
    };
    let split = || split_heads(keys, "embedding_length", "attention.head_count", num_heads);
    let head_dim = keys.opt_size("attention.key_length")?.map_or_else(split, Ok)?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(width) = keys.opt_size(key)?.filter(|&width| width != head_dim) {
            return Err(Error::unsupported(format!(
                "{} {width} is not supported beside heads of width {head_dim}",
                keys.name(key)
            )));
        }
    }
    Ok(AttentionSpec::plain(num_heads, num_kv_heads, head_dim, num_layers))
}

/// A key that may be one number or a list with one per layer, which must then be equal.
fn uniform(keys: &Fields, key: &str) -> Result<usize> {
    let sizes = keys.sizes(key)?;
    if sizes.iter().any(|&size| size != sizes[0]) {
        let name = keys.name(key);
        return Err(Error::unsupported(format!("{name} that differs between layers")));
    }
    Ok(sizes[0])
}

/// `llama` (mistral) has the window in every layer; which layers of a qwen have it, no key says.
fn windows(
    architecture: &Architecture,
    keys: &Fields,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
    let key = "attention.sliding_window";
    let window = keys.opt_index(key)?.filter(|&window| window > 0);
    if window.is_some() && architecture.name != "llama" {
        return Err(Error::unsupported(format!("{} is not supported", keys.name(key))));
    }
    Ok(vec![window; layers])
}

fn vocab_size(tensors: &[RawTensor]) -> Result<usize> {
    match tensors.iter().find(|tensor| tensor.name == EMBEDDING) {
        Some(embedding) => Ok(embedding.shape[0]),
        None => Err(Error::checkpoint(format!("tensor `{EMBEDDING}` is missing"))),
    }
}

fn scaling(keys: &Fields, max_positions: usize, tensors: &[RawTensor]) -> Result<RopeScaling> {
    let key = "rope.scaling.type";
    // Before there was a type, `scale_linear` was the factor. Zero and one mean no scaling.
    let scales = |factor: &f64| *factor != 0.0 && differ(*factor, 1.0);
    let factor = match keys.opt_number("rope.scaling.factor")?.filter(scales) {
        Some(factor) => Some(factor),
        None => keys.opt_number("rope.scale_linear")?.filter(scales),
    };
    let scaling = match keys.opt_text(key)?.unwrap_or("linear") {
        "none" => RopeScaling::None,
        "linear" => factor.map_or(RopeScaling::None, |factor| RopeScaling::Linear { factor }),
        "yarn" => yarn(keys, factor.unwrap_or(1.0), max_positions)?,
        other => {
            return Err(Error::unsupported(format!(
                "{} {other:?} is not supported; supported: none, linear, yarn",
                keys.name(key)
            )));
        }
    };
    match tensors.iter().find(|tensor| tensor.name == ROPE_FREQS) {
        None => Ok(scaling),
        Some(_) if scaling != RopeScaling::None => {
            Err(Error::unsupported(format!("`{ROPE_FREQS}` together with {}", keys.name(key))))
        }
        Some(freqs) => Ok(RopeScaling::PerFrequency { factors: frequency_factors(freqs)? }),
    }
}

/// ggml multiplies cosine and sine by `attn_factor * (1 + 0.1 ln factor)`.
fn yarn(keys: &Fields, factor: f64, max_positions: usize) -> Result<RopeScaling> {
    for (key, neutral) in
        [("rope.scaling.yarn_ext_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)]
    {
        if let Some(value) = keys.opt_number(key)?.filter(|&value| differ(value, neutral)) {
            return Err(Error::unsupported(format!("{} {value} is not supported", keys.name(key))));
        }
    }
    let attn_factor = match keys.opt_number("rope.scaling.yarn_attn_factor")? {
        Some(attn_factor) => attn_factor,
        None => keys.opt_number("rope.scaling.attn_factor")?.unwrap_or(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_positions: keys
            .opt_size("rope.scaling.original_context_length")?
            .unwrap_or(max_positions),
        beta_fast: keys.opt_number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.opt_number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: attn_factor * (1.0 + 0.1 * factor.ln()),
        truncate: true,
    })
}

fn frequency_factors(tensor: &RawTensor) -> Result<Vec<f32>> {
    if tensor.encoding != Some(Encoding::F32) || tensor.shape.len() != 1 {
        return Err(Error::checkpoint(format!(
            "tensor `{ROPE_FREQS}` must be a list of F32; given: {:?} of {}",
            tensor.shape, tensor.type_name
        )));
    }
    let numbers = tensor.data.as_slice().chunks_exact(4);
    Ok(numbers.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect())
}

/// The keys under `prefix` (all but the tokenizer's for an empty one) in the form that [`Fields`] reads.
fn fields(metadata: &Metadata<'_>, prefix: &str) -> Fields {
    let mut values = Map::new();
    for (key, value) in metadata.iter().filter(|(key, _)| !key.starts_with(TOKENIZER_KEYS)) {
        if let Some(key) = key.strip_prefix(prefix) {
            values.insert(key.to_owned(), json(value));
        }
    }
    Fields::new(values, prefix)
}

fn json(value: &Value<'_>) -> Json {
    match value {
        Value::U8(number) => (*number).into(),
        Value::I8(number) => (*number).into(),
        Value::U16(number) => (*number).into(),
        Value::I16(number) => (*number).into(),
        Value::U32(number) => (*number).into(),
        Value::I32(number) => (*number).into(),
        Value::U64(number) => (*number).into(),
        Value::I64(number) => (*number).into(),
        Value::F32(number) => float((*number).into()),
        Value::F64(number) => float(*number),
        Value::Bool(flag) => (*flag).into(),
        Value::String(text) => (*text).into(),
        Value::Array(values) => values.iter().map(json).collect(),
    }
}

/// JSON has no NaN and no infinity; as text they fail with a message that shows them.
fn float(number: f64) -> Json {
    serde_json::Number::from_f64(number).map_or_else(|| number.to_string().into(), Json::Number)
}
