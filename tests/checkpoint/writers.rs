//! Writers of tiny checkpoints, and the list of tensors that a decoder takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use astrai_rs::checkpoint::{self, Checkpoint, gguf::Value};
use astrai_rs::error::{Error, Result};
use astrai_rs::spec::{
    Activation, AttentionSpec, MlpSpec, ModelSpec, QkNorm, RopePairing, RopeScaling, RopeSpec,
};
use serde_json::{Value as Json, json};

/// A temporary folder that goes away with its owner.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("astrai_rs-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn with(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    pub(crate) fn load(&self) -> Result<Checkpoint> {
        checkpoint::load(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

/// The error's text with the folder's path cut out.
pub(crate) fn message(error: &Error, folder: &Path) -> String {
    error.to_string().replace(folder.to_str().unwrap(), "@")
}

/// Llama-like: 2 layers, 4 heads of 8 over 2 key/value heads, untied.
pub(crate) fn llama_spec() -> ModelSpec {
    ModelSpec {
        vocab_size: 12,
        hidden_size: 32,
        num_layers: 2,
        max_positions: 64,
        norm_eps: 1e-5,
        rope: RopeSpec {
            theta: 10_000.0,
            pairing: RopePairing::HalfSplit,
            scaling: RopeScaling::None,
        },
        attention: AttentionSpec::plain(4, 2, 8, 2),
        mlp: MlpSpec { intermediate_size: 64, activation: Activation::Silu, bias: false },
        tie_embeddings: false,
    }
}

/// The configuration of [`llama_spec`] in the transformers-5 style.
pub(crate) fn llama_config() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false,
    })
}

/// `config` with the entries of `patch`; the value `"-"` removes a key.
pub(crate) fn patched(mut config: Json, patch: Json) -> Json {
    let Json::Object(patch) = patch else { panic!("a patch is an object") };
    let object = config.as_object_mut().unwrap();
    for (key, value) in patch {
        if value == "-" {
            object.remove(&key);
        } else {
            object.insert(key, value);
        }
    }
    config
}

/// Canonical names and shapes of all tensors that a decoder of this spec takes.
pub(crate) fn layout(spec: &ModelSpec) -> Vec<(String, Vec<usize>)> {
    let AttentionSpec { num_heads, num_kv_heads, head_dim, .. } = spec.attention;
    let (hidden, wide) = (spec.hidden_size, spec.mlp.intermediate_size);
    let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
    let mut list = vec![
        ("embed.weight".to_owned(), vec![spec.vocab_size, hidden]),
        ("norm.weight".to_owned(), vec![hidden]),
    ];
    if !spec.tie_embeddings {
        list.push(("lm_head.weight".into(), vec![spec.vocab_size, hidden]));
    }
    for layer in 0..spec.num_layers {
        let mut add = |name: &str, shape: &[usize]| {
            list.push((format!("layers.{layer}.{name}"), shape.to_vec()));
        };
        add("attn_norm.weight", &[hidden]);
        add("mlp_norm.weight", &[hidden]);
        for (name, out, input, bias) in [
            ("attn.q", q, hidden, spec.attention.qkv_bias),
            ("attn.k", kv, hidden, spec.attention.qkv_bias),
            ("attn.v", kv, hidden, spec.attention.qkv_bias),
            ("attn.o", hidden, q, spec.attention.out_bias),
            ("mlp.gate", wide, hidden, spec.mlp.bias),
            ("mlp.up", wide, hidden, spec.mlp.bias),
            ("mlp.down", hidden, wide, spec.mlp.bias),
        ] {
            add(&format!("{name}.weight"), &[out, input]);
            if bias {
                add(&format!("{name}.bias"), &[out]);
            }
        }
        if spec.attention.qk_norm != QkNorm::None {
            add("attn.q_norm.weight", &[head_dim]);
            add("attn.k_norm.weight", &[head_dim]);
        }
        if spec.attention.output_gate {
            add("attn.gate.weight", &[q, hidden]);
        }
    }
    list
}

/// Takes every tensor as a decoder does.
pub(crate) fn take_all(checkpoint: Checkpoint) -> Result<()> {
    let Checkpoint { spec, mut weights } = checkpoint;
    for (name, shape) in layout(&spec) {
        weights.take(&name, &shape)?;
    }
    weights.finish()
}

/// How each format spells the parts of canonical names.
pub(crate) const HUGGING_FACE: &[(&str, &str)] = &[
    ("layers.", "model.layers."),
    ("embed.", "model.embed_tokens."),
    ("attn_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attn.q.", "self_attn.q_proj."),
    ("attn.k.", "self_attn.k_proj."),
    ("attn.v.", "self_attn.v_proj."),
    ("attn.o.", "self_attn.o_proj."),
    ("attn.q_norm", "self_attn.q_norm"),
    ("attn.k_norm", "self_attn.k_norm"),
    ("mlp.gate", "mlp.gate_proj"),
    ("mlp.up", "mlp.up_proj"),
    ("mlp.down", "mlp.down_proj"),
];
pub(crate) const ASTRAI: &[(&str, &str)] = &[
    ("embed.", "embed_tokens."),
    ("attn_norm", "input_norm"),
    ("mlp_norm", "post_attention_norm"),
    ("attn.q.", "attention.q_proj."),
    ("attn.k.", "attention.k_proj."),
    ("attn.v.", "attention.v_proj."),
    ("attn.o.", "attention.o_proj."),
    ("attn.q_norm", "attention.q_norm"),
    ("attn.k_norm", "attention.k_norm"),
    ("attn.gate", "attention.gate"),
];
pub(crate) const GGUF: &[(&str, &str)] = &[
    ("layers.", "blk."),
    ("embed.", "token_embd."),
    ("lm_head.", "output."),
    ("attn.q.", "attn_q."),
    ("attn.k.", "attn_k."),
    ("attn.v.", "attn_v."),
    ("attn.o.", "attn_output."),
    ("attn.q_norm", "attn_q_norm"),
    ("attn.k_norm", "attn_k_norm"),
    ("mlp_norm", "ffn_norm"),
    ("mlp.gate", "ffn_gate"),
    ("mlp.up", "ffn_up"),
    ("mlp.down", "ffn_down"),
];

fn spelled(name: &str, spelling: &[(&str, &str)]) -> String {
    let name =
        if name == "norm.weight" && spelling == HUGGING_FACE { "model.norm.weight" } else { name };
    let name = if name == "norm.weight" && spelling == GGUF { "output_norm.weight" } else { name };
    spelling.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replacen(ours, theirs, 1))
}

/// A tensor to write: name, type name, shape, bytes.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// F32 counts, so that no two places hold the same number.
pub(crate) fn f32s(name: &str, shape: &[usize], first: usize) -> Tensor {
    let len: usize = shape.iter().product();
    let bytes = (first..first + len).flat_map(|number| (number as f32).to_le_bytes()).collect();
    Tensor { name: name.into(), kind: "F32", shape: shape.to_vec(), bytes }
}

/// All tensors of `spec` under a format's names.
pub(crate) fn tensors(spec: &ModelSpec, spelling: &[(&str, &str)]) -> Vec<Tensor> {
    let list = layout(spec).into_iter().enumerate();
    list.map(|(index, (name, shape))| f32s(&spelled(&name, spelling), &shape, index)).collect()
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        header.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": offsets}),
        );
        data.extend(&tensor.bytes);
    }
    raw_safetensors(&Json::Object(header).to_string(), &data)
}

pub(crate) fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A GGUF file in parts, so that a test can break any of them.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) keys: Vec<(String, Value<'static>)>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) alignment: usize,
    /// Moves a tensor's offset, for broken files.
    pub(crate) shift: Option<(usize, i64)>,
}

impl Gguf {
    pub(crate) fn set(mut self, key: &str, value: Value<'static>) -> Self {
        self = self.without(key);
        self.keys.push((key.into(), value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(name, _)| name != key);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_string(&mut out, key);
            out.extend(type_of(value).to_le_bytes());
            put_value(&mut out, value);
        }
        let mut data = Vec::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            put_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
            out.extend(ggml_type(tensor.kind).to_le_bytes());
            let shift = self.shift.filter(|(shifted, _)| *shifted == index).map_or(0, |(_, by)| by);
            out.extend((data.len() as i64 + shift).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        [out, data].concat()
    }
}

fn ggml_type(kind: &str) -> u32 {
    let kinds =
        [("F32", 0), ("F16", 1), ("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 8), ("Q4_K", 12), ("BF16", 30)];
    kinds.iter().find(|(name, _)| *name == kind).map_or(77, |(_, number)| *number)
}

pub(crate) fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn type_of(value: &Value<'_>) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value<'_>) {
    match value {
        Value::U8(number) => out.extend(number.to_le_bytes()),
        Value::I8(number) => out.extend(number.to_le_bytes()),
        Value::U16(number) => out.extend(number.to_le_bytes()),
        Value::I16(number) => out.extend(number.to_le_bytes()),
        Value::U32(number) => out.extend(number.to_le_bytes()),
        Value::I32(number) => out.extend(number.to_le_bytes()),
        Value::F32(number) => out.extend(number.to_le_bytes()),
        Value::Bool(flag) => out.push((*flag).into()),
        Value::String(text) => put_string(out, text),
        Value::Array(values) => {
            out.extend(values.first().map_or(4, type_of).to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            for value in values {
                put_value(out, value);
            }
        }
        Value::U64(number) => out.extend(number.to_le_bytes()),
        Value::I64(number) => out.extend(number.to_le_bytes()),
        Value::F64(number) => out.extend(number.to_le_bytes()),
    }
}

/// [`llama_spec`] as a GGUF file of `architecture`.
pub(crate) fn gguf(architecture: &'static str, spec: &ModelSpec) -> Gguf {
    let number = |value: usize| Value::U32(value as u32);
    let key = |name: &str| format!("{architecture}.{name}");
    let keys = vec![
        ("general.architecture".into(), Value::String(architecture)),
        (key("block_count"), number(spec.num_layers)),
        (key("context_length"), number(spec.max_positions)),
        (key("embedding_length"), number(spec.hidden_size)),
        (key("feed_forward_length"), number(spec.mlp.intermediate_size)),
        (key("attention.head_count"), number(spec.attention.num_heads)),
        (key("attention.head_count_kv"), number(spec.attention.num_kv_heads)),
        (key("attention.key_length"), number(spec.attention.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(spec.norm_eps)),
        (key("rope.freq_base"), Value::F32(spec.rope.theta as f32)),
    ];
    Gguf { version: 3, keys, tensors: tensors(spec, GGUF), alignment: 32, shift: None }
}
