//! Broken folders, each with its exact message; `@` stands for the folder's path.

use astrai_rs::checkpoint::load;
use astrai_rs::error::{Error, ErrorKind};
use serde_json::{Value as Json, json};

use crate::writers::*;

use ErrorKind::{Checkpoint, NotFound, Unsupported};

fn check(name: &str, folder: &Folder, kind: ErrorKind, expected: &str) {
    let error = match folder.load().and_then(take_all) {
        Ok(()) => panic!("{name}: loads, expected: {expected}"),
        Err(error) => error,
    };
    expect(name, &error, folder, kind, expected);
}

fn expect(name: &str, error: &Error, folder: &Folder, kind: ErrorKind, expected: &str) {
    assert_eq!(message(error, &folder.0), expected, "{name}");
    assert_eq!(error.kind(), kind, "{name}");
}

/// The configuration with `patch` is refused with this message (behind the file's path).
fn check_config(base: &Json, patch: Json, kind: ErrorKind, expected: &str) {
    let config = patched(base.clone(), patch).to_string();
    let folder = Folder::new()
        .with("config.json", &config)
        .with("model.safetensors", safetensors(&tensors(&llama_spec(), HUGGING_FACE)));
    check(&config, &folder, kind, &format!("@/config.json: {expected}"));
}

#[test]
fn configuration_keys() {
    for (patch, expected) in [
        (json!({"model_type": "-"}), "\"model_type\" is missing"),
        (json!({"model_type": 3}), "\"model_type\" must be a string; given: 3"),
        (json!({"hidden_size": "-"}), "\"hidden_size\" is missing"),
        (json!({"num_hidden_layers": null}), "\"num_hidden_layers\" is missing"),
        (json!({"vocab_size": "-"}), "\"vocab_size\" is missing"),
        (json!({"rms_norm_eps": "-"}), "\"rms_norm_eps\" is missing"),
        (json!({"hidden_size": "64"}), "\"hidden_size\" must be a positive integer; given: \"64\""),
        (json!({"hidden_size": 64.5}), "\"hidden_size\" must be a positive integer; given: 64.5"),
        (json!({"vocab_size": -1}), "\"vocab_size\" must be a positive integer; given: -1"),
        (
            json!({"num_attention_heads": 0}),
            "\"num_attention_heads\" must be a positive integer; given: 0",
        ),
        (
            json!({"intermediate_size": 1u64 << 40}),
            "\"intermediate_size\" must be a positive integer; given: 1099511627776",
        ),
        (
            json!({"num_hidden_layers": 10_001}),
            "\"num_hidden_layers\" must be at most 10000; given: 10001",
        ),
        (json!({"rms_norm_eps": "1e-5"}), "\"rms_norm_eps\" must be a number; given: \"1e-5\""),
        (json!({"rms_norm_eps": 0}), "norm epsilon 0 must be a positive number"),
        (json!({"attention_bias": 1}), "\"attention_bias\" must be true or false; given: 1"),
        (
            json!({"num_key_value_heads": 3}),
            "4 query heads are not a multiple of 3 key/value heads",
        ),
        (json!({"head_dim": 7}), "heads of width 7 cannot be rotated; the width must be even"),
        (
            json!({"head_dim": null, "hidden_size": 33}),
            "\"hidden_size\" 33 is not a multiple of \"num_attention_heads\" 4",
        ),
        (json!({"rope_parameters": 4}), "\"rope_parameters\" must be an object; given: 4"),
        (
            json!({"rope_parameters": {"rope_theta": -1}}),
            "rotary theta -1 must be a positive number",
        ),
        (
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "\"rope_parameters.factor\" is missing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": "2"}}),
            "\"rope_scaling.factor\" must be a number; given: \"2\"",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0}}),
            "rotary scaling factor 0 must be a positive number",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0}}),
            "rotary high_freq_factor above low_freq_factor by 0 must be a positive number",
        ),
    ] {
        check_config(&llama_config(), patch, Checkpoint, expected);
    }
}

#[test]
fn windows() {
    let qwen2 = patched(llama_config(), json!({"model_type": "qwen2"}));
    let mistral = patched(llama_config(), json!({"model_type": "mistral"}));
    for (base, patch, expected) in [
        (
            &mistral,
            json!({"sliding_window": 0}),
            "\"sliding_window\" must be a positive integer; given: 0",
        ),
        (&mistral, json!({"num_key_value_heads": "-"}), "\"num_key_value_heads\" is missing"),
        (
            &qwen2,
            json!({"layer_types": ["full_attention"]}),
            "\"layer_types\" has 1 entries for 2 layers",
        ),
        (
            &qwen2,
            json!({"layer_types": ["sliding_attention", "full_attention"]}),
            "\"layer_types\" has \"sliding_attention\", but no \"sliding_window\" is in use",
        ),
        (
            &qwen2,
            json!({"layer_types": "full_attention"}),
            "\"layer_types\" must be a list of strings; given: \"full_attention\"",
        ),
        (
            &qwen2,
            json!({"max_window_layers": -1}),
            "\"max_window_layers\" must be a non-negative integer; given: -1",
        ),
    ] {
        check_config(base, patch, Checkpoint, expected);
    }
}

#[test]
fn unsupported_configurations() {
    let qwen2 = patched(llama_config(), json!({"model_type": "qwen2"}));
    let ropes = "is not supported; supported: default, linear, llama3, yarn";
    for (base, patch, expected) in [
        (
            &llama_config(),
            json!({"model_type": "gemma"}),
            "\"model_type\" \"gemma\" is not supported; supported: llama, mistral, qwen2, qwen3, and AstrAI's".into(),
        ),
        (
            &llama_config(),
            json!({"hidden_act": "gelu"}),
            "\"hidden_act\" \"gelu\" is not supported; supported: silu".into(),
        ),
        (
            &llama_config(),
            json!({"quantization_config": {"quant_method": "awq"}}),
            "\"quantization_config\" (quant_method \"awq\") is not supported; use a GGUF file".into(),
        ),
        (
            &llama_config(),
            json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
            format!("\"rope_parameters.rope_type\" \"dynamic\" {ropes}"),
        ),
        (
            &llama_config(),
            json!({"rope_scaling": {"type": "longrope"}}),
            format!("\"rope_scaling.type\" \"longrope\" {ropes}"),
        ),
        (
            &llama_config(),
            json!({"rope_parameters": {"rope_type": "proportional"}}),
            format!("\"rope_parameters.rope_type\" \"proportional\" {ropes}"),
        ),
        (
            &llama_config(),
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "\"rope_parameters.full_attention\": rotary settings per layer type".into(),
        ),
        (
            &llama_config(),
            json!({"partial_rotary_factor": 0.5}),
            "\"partial_rotary_factor\" 0.5 is not supported; heads are rotated in full".into(),
        ),
        (
            &qwen2,
            json!({"layer_types": ["full_attention", "chunked_attention"]}),
            "\"layer_types\" \"chunked_attention\" is not supported; supported: full_attention, sliding_attention"
                .into(),
        ),
    ] {
        check_config(base, patch, Unsupported, &expected);
    }
}

#[test]
fn astrai_configurations() {
    let new = json!({"model_type": "autoregressive_lm", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12,
        "intermediate_size": 64, "max_position_embeddings": 64});
    let old = json!({"dim": 32, "n_layers": 2, "n_heads": 5, "n_kv_heads": 5});
    for (base, patch, kind, expected) in [
        (
            &new,
            json!({"attn_type": "mla"}),
            Unsupported,
            "\"attn_type\" \"mla\" is not supported; supported: gqa",
        ),
        (
            &new,
            json!({"ffn_type": "moe"}),
            Unsupported,
            "\"ffn_type\" \"moe\" is not supported; supported: mlp",
        ),
        (
            &new,
            json!({"attn_type": "x"}),
            Checkpoint,
            "\"attn_type\" must be \"gqa\" or \"mla\"; given: \"x\"",
        ),
        (
            &new,
            json!({"model_type": "embedding"}),
            Unsupported,
            "\"model_type\" \"embedding\" is not supported; supported: transformer, autoregressive_lm",
        ),
        (
            &new,
            json!({"rope_scaling": {"type": "ntk"}}),
            Checkpoint,
            "\"rope_scaling.factor\" is missing",
        ),
        (
            &new,
            json!({"num_attention_heads": 16, "rope_scaling": {"factor": 2}}),
            Checkpoint,
            "ntk scaling needs heads wider than 2",
        ),
        (&new, json!({"intermediate_size": "-"}), Checkpoint, "\"intermediate_size\" is missing"),
        (&old, json!({}), Checkpoint, "\"dim\" 32 is not a multiple of \"n_heads\" 5"),
        (&old, json!({"n_layers": "-"}), Checkpoint, "\"n_layers\" is missing"),
        (
            &old,
            json!({"use_qk_norm": "yes", "n_heads": 4, "n_kv_heads": 4}),
            Checkpoint,
            "\"use_qk_norm\" must be true or false; given: \"yes\"",
        ),
    ] {
        check_config(base, patch, kind, expected);
    }
}

#[test]
fn configuration_files() {
    for (text, expected) in [
        ("{", "not valid JSON: EOF while parsing an object at line 1 column 1"),
        ("[1]", "not a JSON object; given: [1]"),
        ("", "not valid JSON: EOF while parsing a value at line 1 column 0"),
        ("{}", "\"model_type\" is missing"),
    ] {
        let folder = Folder::new().with("config.json", text);
        check(text, &folder, Checkpoint, &format!("@/config.json: {expected}"));
    }
}

#[test]
fn paths() {
    let looked = "not a model; looked for config.json with model.safetensors (or model.safetensors.index.json), \
                  and for one .gguf file";
    check("empty folder", &Folder::new(), Checkpoint, &format!("@: {looked}"));
    let two = Folder::new().with("b.gguf", "").with("a.gguf", "");
    check("two files", &two, Checkpoint, "@: 2 .gguf files; name one of them: a.gguf, b.gguf");
    let no_config = Folder::new().with("model.safetensors", "");
    check("no config", &no_config, NotFound, "@/config.json: no such file or folder");
    let config = llama_config().to_string();
    let no_weights = Folder::new().with("config.json", &config);
    let neither = "@: neither model.safetensors nor model.safetensors.index.json is there";
    check("no weights", &no_weights, Checkpoint, neither);
    let pickled = Folder::new().with("config.json", &config).with("pytorch_model.bin", "");
    let hint = " (pytorch_model.bin is not read: save the model as safetensors)";
    check("pickled weights", &pickled, Checkpoint, &format!("{neither}{hint}"));
    let folder = Folder::new().with("model.safetensors", "").with("notes.txt", "GGU");
    for (name, kind, expected) in [
        ("nothing", NotFound, "@/nothing: no such file or folder"),
        ("notes.txt", Checkpoint, "@/notes.txt: not a GGUF file: it does not start with \"GGUF\""),
        (
            "model.safetensors",
            Checkpoint,
            "@/model.safetensors: give the folder that holds it and config.json",
        ),
    ] {
        let error = load(&folder.0.join(name)).unwrap_err();
        expect(name, &error, &folder, kind, expected);
    }
}

/// The llama folder with its tensors changed is refused with this message.
fn check_tensors(name: &str, kind: ErrorKind, expected: &str, change: impl Fn(&mut Vec<Tensor>)) {
    let mut list = tensors(&llama_spec(), HUGGING_FACE);
    change(&mut list);
    let folder = Folder::new()
        .with("config.json", llama_config().to_string())
        .with("model.safetensors", safetensors(&list));
    check(name, &folder, kind, expected);
}

#[test]
fn tensors_of_a_folder() {
    let find = |list: &mut Vec<Tensor>, name: &str| {
        list.iter().position(|tensor| tensor.name == name).unwrap()
    };
    let norm = "@: tensor `norm.weight` of shape [32] is missing";
    check_tensors("missing", Checkpoint, norm, |list| {
        let at = find(list, "model.norm.weight");
        list.remove(at);
    });
    let head = "@: tensor `lm_head.weight` is missing, and the configuration does not tie it to the embedding";
    check_tensors("no head", Checkpoint, head, |list| {
        let at = find(list, "lm_head.weight");
        list.remove(at);
    });
    let extra = "@: 1 tensor(s) with names that this format does not have: `model.extra`";
    check_tensors("unknown", Checkpoint, extra, |list| list.push(f32s("model.extra", &[1], 0)));
    let bias =
        "@: 1 tensor(s) that this model has no place for: `model.layers.1.self_attn.q_proj.bias`";
    check_tensors("bias", Checkpoint, bias, |list| {
        list.push(f32s("model.layers.1.self_attn.q_proj.bias", &[32], 0));
    });
    let layer =
        "@: 1 tensor(s) that this model has no place for: `model.layers.2.input_layernorm.weight`";
    check_tensors("layer beyond the last", Checkpoint, layer, |list| {
        list.push(f32s("model.layers.2.input_layernorm.weight", &[32], 0));
    });
    let shape = "@: tensor `model.norm.weight` has shape [16], expected [32]";
    check_tensors("shape", Checkpoint, shape, |list| {
        let at = find(list, "model.norm.weight");
        list[at] = f32s("model.norm.weight", &[16], 0);
    });
    let kind = "@: tensor `model.norm.weight` is stored as I32, which is not supported";
    check_tensors("number format", Unsupported, kind, |list| {
        let at = find(list, "model.norm.weight");
        list[at].kind = "I32";
    });
}

#[test]
fn safetensors_files() {
    let good = safetensors(&tensors(&llama_spec(), HUGGING_FACE));
    let one = |shape: &str, offsets: &str| {
        let header =
            format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        raw_safetensors(&header, &[0; 8])
    };
    for (bytes, expected) in [
        (Vec::new(), "not a safetensors file: shorter than 8 bytes"),
        (
            good[..100].to_vec(),
            "not a safetensors file, or truncated: its header would reach beyond its end",
        ),
        (
            vec![255; 16],
            "not a safetensors file, or truncated: its header would reach beyond its end",
        ),
        (
            good[..good.len() - 1].to_vec(),
            "truncated or overlong: the tensors do not end where the file ends",
        ),
        (
            [good, vec![0]].concat(),
            "truncated or overlong: the tensors do not end where the file ends",
        ),
        (
            raw_safetensors("{", b""),
            "the safetensors header is not valid: EOF while parsing an object at line 1 column 1",
        ),
        ([&4u64.to_le_bytes()[..], &[255; 4]].concat(), "the safetensors header is not UTF-8"),
        (one("[3]", "[0,8]"), "a tensor's shape does not fit its bytes"),
        (one("[2]", "[8,0]"), "tensor `x` overlaps another, leaves a gap or ends before it starts"),
    ] {
        let folder = Folder::new()
            .with("config.json", llama_config().to_string())
            .with("model.safetensors", bytes);
        check(expected, &folder, Checkpoint, &format!("@/model.safetensors: {expected}"));
    }
}

#[test]
fn shards() {
    let list = tensors(&llama_spec(), HUGGING_FACE);
    let names = |file: &str| list.iter().map(|tensor| (tensor.name.clone(), file.into())).collect();
    let all: serde_json::Map<String, Json> = names("a.safetensors");
    let with = |name: &str, file: &str| patched(Json::Object(all.clone()), json!({name: file}));
    let cases = [
        (json!({}), "\"weight_map\" is missing"),
        (json!({"weight_map": 1}), "\"weight_map\" must be an object; given: 1"),
        (json!({"weight_map": {"x": 1}}), "\"weight_map.x\" must be a string; given: 1"),
        (json!({"weight_map": with("x", "b.safetensors")}), "shard `b.safetensors` is missing"),
        (
            json!({"weight_map": with("x", "../b")}),
            "shard \"../b\" must be the name of a file beside the index",
        ),
        (
            json!({"weight_map": with("x", "a.safetensors")}),
            "tensor `x` is not in its shard `a.safetensors`",
        ),
        (
            json!({"weight_map": with("model.norm.weight", "-")}),
            "tensor `model.norm.weight` of shard `a.safetensors` is not listed there",
        ),
    ];
    for (index, expected) in cases {
        let folder = Folder::new()
            .with("config.json", llama_config().to_string())
            .with("a.safetensors", safetensors(&list))
            .with("model.safetensors.index.json", index.to_string());
        check(
            expected,
            &folder,
            Checkpoint,
            &format!("@/model.safetensors.index.json: {expected}"),
        );
    }
}
