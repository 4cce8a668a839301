//! Name rules as data: how each format calls the tensors that [`crate::weights`] lists.

use std::collections::BTreeSet;

use super::RawTensor;
use crate::error::{Error, Result};
use crate::weights::{StoredTensor, Weights};

/// One renaming. Names are compared by their parts between dots; `{}` stands for any one part, and
/// the holes of `to` take the parts of `from` in order.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) from: &'static str,
    pub(super) to: &'static str,
}

const fn rule(from: &'static str, to: &'static str) -> Rule {
    Rule { from, to }
}

/// All that one format's tensors may be called.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) rules: &'static [Rule],
    /// Tensors that carry nothing: buffers that old versions of a library saved.
    pub(super) ignored: &'static [&'static str],
}

/// The file's name for the head, which tied models may carry as a copy of the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

/// transformers: `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`.
pub(super) const HUGGING_FACE: Names = Names {
    rules: &[
        rule("model.embed_tokens.weight", "embed.weight"),
        rule("model.norm.weight", "norm.weight"),
        rule("lm_head.weight", HEAD),
        rule("model.layers.{}.input_layernorm.weight", "layers.{}.attn_norm.weight"),
        rule("model.layers.{}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        rule("model.layers.{}.self_attn.q_proj.{}", "layers.{}.attn.q.{}"),
        rule("model.layers.{}.self_attn.k_proj.{}", "layers.{}.attn.k.{}"),
        rule("model.layers.{}.self_attn.v_proj.{}", "layers.{}.attn.v.{}"),
        rule("model.layers.{}.self_attn.o_proj.{}", "layers.{}.attn.o.{}"),
        rule("model.layers.{}.self_attn.q_norm.weight", "layers.{}.attn.q_norm.weight"),
        rule("model.layers.{}.self_attn.k_norm.weight", "layers.{}.attn.k_norm.weight"),
        rule("model.layers.{}.mlp.gate_proj.{}", "layers.{}.mlp.gate.{}"),
        rule("model.layers.{}.mlp.up_proj.{}", "layers.{}.mlp.up.{}"),
        rule("model.layers.{}.mlp.down_proj.{}", "layers.{}.mlp.down.{}"),
    ],
    ignored: &[
        "model.rotary_emb.inv_freq",
        "model.layers.{}.self_attn.rotary_emb.inv_freq",
        "model.layers.{}.self_attn.rotary_emb.cos_cached",
        "model.layers.{}.self_attn.rotary_emb.sin_cached",
    ],
};

/// AstrAI: the names are those of every version (notes in `astrai.rs`).
pub(super) const ASTRAI: Names = Names {
    rules: &[
        rule("embed_tokens.weight", "embed.weight"),
        rule("norm.weight", "norm.weight"),
        rule("lm_head.weight", HEAD),
        rule("layers.{}.input_norm.weight", "layers.{}.attn_norm.weight"),
        rule("layers.{}.post_attention_norm.weight", "layers.{}.mlp_norm.weight"),
        rule("layers.{}.attention.q_proj.weight", "layers.{}.attn.q.weight"),
        rule("layers.{}.attention.k_proj.weight", "layers.{}.attn.k.weight"),
        rule("layers.{}.attention.v_proj.weight", "layers.{}.attn.v.weight"),
        rule("layers.{}.attention.o_proj.weight", "layers.{}.attn.o.weight"),
        rule("layers.{}.attention.q_norm.weight", "layers.{}.attn.q_norm.weight"),
        rule("layers.{}.attention.k_norm.weight", "layers.{}.attn.k_norm.weight"),
        rule("layers.{}.attention.gate.weight", "layers.{}.attn.gate.weight"),
        rule("layers.{}.mlp.gate.weight", "layers.{}.mlp.gate.weight"),
        rule("layers.{}.mlp.up.weight", "layers.{}.mlp.up.weight"),
        rule("layers.{}.mlp.down.weight", "layers.{}.mlp.down.weight"),
    ],
    ignored: &[],
};

/// GGUF: the standard tensor names of the specification
/// (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
pub(super) const GGUF: Names = Names {
    rules: &[
        rule("token_embd.weight", "embed.weight"),
        rule("output_norm.weight", "norm.weight"),
        rule("output.weight", HEAD),
        rule("blk.{}.attn_norm.weight", "layers.{}.attn_norm.weight"),
        rule("blk.{}.ffn_norm.weight", "layers.{}.mlp_norm.weight"),
        rule("blk.{}.attn_q.{}", "layers.{}.attn.q.{}"),
        rule("blk.{}.attn_k.{}", "layers.{}.attn.k.{}"),
        rule("blk.{}.attn_v.{}", "layers.{}.attn.v.{}"),
        rule("blk.{}.attn_output.{}", "layers.{}.attn.o.{}"),
        rule("blk.{}.attn_q_norm.weight", "layers.{}.attn.q_norm.weight"),
        rule("blk.{}.attn_k_norm.weight", "layers.{}.attn.k_norm.weight"),
        rule("blk.{}.ffn_gate.{}", "layers.{}.mlp.gate.{}"),
        rule("blk.{}.ffn_up.{}", "layers.{}.mlp.up.{}"),
        rule("blk.{}.ffn_down.{}", "layers.{}.mlp.down.{}"),
    ],
    ignored: &["blk.{}.attn_rot_embd.weight"],
};

/// Brings a file's tensors under their canonical names; `source` names the file in errors. A name
/// that no rule knows is an error, as is a number format that we do not read.
pub(super) fn canonical(source: &str, tensors: Vec<RawTensor>, names: &Names) -> Result<Weights> {
    let mut weights = Weights::from_source(source);
    let mut unknown = BTreeSet::new();
    for tensor in tensors {
        if names.ignored.iter().any(|pattern| holes(pattern, &tensor.name).is_some()) {
            continue;
        }
        match names.rules.iter().find_map(|rule| rule.apply(&tensor.name)) {
            Some(name) => weights.insert(name, stored(tensor).map_err(|e| e.context(source))?)?,
            None => _ = unknown.insert(tensor.name),
        }
    }
    if unknown.is_empty() {
        return Ok(weights);
    }
    let shown: Vec<_> = unknown.iter().take(10).map(|name| format!("`{name}`")).collect();
    Err(Error::checkpoint(format!(
        "{source}: {} tensor(s) with names that this format does not have: {}",
        unknown.len(),
        shown.join(", ")
    )))
}

fn stored(tensor: RawTensor) -> Result<StoredTensor> {
    let Some(encoding) = tensor.encoding else {
        return Err(Error::unsupported(format!(
            "tensor `{}` is stored as {}, which is not supported",
            tensor.name, tensor.type_name
        )));
    };
    StoredTensor::new(tensor.name, tensor.shape, encoding, tensor.data)
}

impl Rule {
    fn apply(&self, name: &str) -> Option<String> {
        let mut parts = holes(self.from, name)?.into_iter();
        let fill = |part| if part == "{}" { parts.next().unwrap_or_default() } else { part };
        Some(self.to.split('.').map(fill).collect::<Vec<_>>().join("."))
    }
}

/// What stands in the holes of `pattern` when `name` matches it.
fn holes<'a>(pattern: &str, name: &'a str) -> Option<Vec<&'a str>> {
    let mut found = Vec::new();
    let mut parts = name.split('.');
    for expected in pattern.split('.') {
        match parts.next()? {
            "" => return None,
            part if expected == "{}" => found.push(part),
            part if part == expected => {}
            _ => return None,
        }
    }
    parts.next().is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_carry_over_in_order() {
        let rule = rule("a.{}.b.{}", "x.{}.{}");
        assert_eq!(rule.apply("a.7.b.bias").as_deref(), Some("x.7.bias"));
        for other in ["a.7.b", "a.7.b.bias.c", "a..b.bias", "a.7.c.bias", ""] {
            assert_eq!(rule.apply(other), None, "{other}");
        }
    }

    #[test]
    fn every_rule_fills_all_its_holes() {
        for rule in [HUGGING_FACE, ASTRAI, GGUF].iter().flat_map(|names| names.rules) {
            assert_eq!(rule.from.matches("{}").count(), rule.to.matches("{}").count(), "{rule:?}");
        }
    }
}
