//! Configurations of Hugging Face and AstrAI folders → specs; all tensors find their place.

use std::fs;

use astrai_rs::spec::{AttentionSpec, ModelSpec, QkNorm, RopePairing, RopeScaling};
use astrai_rs::weights::Encoding;
use serde_json::{Value as Json, json};

use crate::writers::*;

/// A folder with `config` and the tensors of `expected` loads as `expected`, and nothing is left over.
fn check(name: &str, config: Json, expected: &ModelSpec, spelling: &[(&str, &str)]) {
    let folder = Folder::new()
        .with("config.json", config.to_string())
        .with("model.safetensors", safetensors(&tensors(expected, spelling)));
    let checkpoint = folder.load().unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(checkpoint.spec, *expected, "{name}");
    take_all(checkpoint).unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// The llama configuration with `patch`, and its spec changed by `change`.
fn check_llama(name: &str, patch: Json, change: impl Fn(&mut ModelSpec)) {
    let mut expected = llama_spec();
    change(&mut expected);
    check(name, patched(llama_config(), patch), &expected, HUGGING_FACE);
}

fn check_rope(name: &str, patch: Json, theta: f64, scaling: RopeScaling) {
    check_llama(name, patch, |spec| {
        spec.rope.theta = theta;
        spec.rope.scaling = scaling.clone();
    });
}

#[test]
fn llama() {
    check_llama("as written", json!({}), |_| {});
    check_llama(
        "defaults",
        json!({"head_dim": null, "hidden_act": "-", "attention_bias": "-"}),
        |_| {},
    );
    check_llama("untied by default", json!({"tie_word_embeddings": "-"}), |_| {});
    check_llama("kv heads as heads", json!({"num_key_value_heads": null}), |spec| {
        spec.attention.num_kv_heads = 4;
    });
    check_llama("biases", json!({"attention_bias": true, "mlp_bias": true}), |spec| {
        spec.attention.qkv_bias = true;
        spec.attention.out_bias = true;
        spec.mlp.bias = true;
    });
    check_llama("tied", json!({"tie_word_embeddings": true}), |spec| spec.tie_embeddings = true);
    check_llama("own head_dim", json!({"head_dim": 6}), |spec| {
        spec.attention = AttentionSpec::plain(4, 2, 6, 2);
    });
}

#[test]
fn rope_scaling_in_both_styles() {
    let old = |theta: Json, scaling: Json| json!({"rope_parameters": "-", "rope_theta": theta, "rope_scaling": scaling});
    check_rope("old style", old(json!(5e5), json!(null)), 5e5, RopeScaling::None);
    check_rope("no base", json!({"rope_parameters": "-"}), 1e4, RopeScaling::None);
    let linear = RopeScaling::Linear { factor: 4.0 };
    check_rope(
        "old linear",
        old(json!(1e6), json!({"type": "linear", "factor": 4})),
        1e6,
        linear.clone(),
    );
    let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}});
    check_rope("new linear", new, 2e4, linear);
    let llama3 = |original_max_positions| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions,
    };
    let fields = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    check_rope("old llama3", old(json!(5e5), fields.clone()), 5e5, llama3(16));
    let fields =
        patched(fields, json!({"original_max_position_embeddings": "-", "rope_theta": 5e5}));
    check_rope(
        "new llama3, no original length",
        json!({"rope_parameters": fields}),
        5e5,
        llama3(64),
    );
}

#[test]
fn yarn() {
    let yarn = |attention_factor, beta_fast, beta_slow, truncate| RopeScaling::Yarn {
        factor: 4.0,
        original_max_positions: 16,
        beta_fast,
        beta_slow,
        attention_factor,
        truncate,
    };
    let fields =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    let check_yarn = |name: &str, patch: Json, scaling: RopeScaling| {
        let fields = patched(fields.clone(), patch);
        check_rope(name, json!({"rope_parameters": fields}), 1e4, scaling);
    };
    let ln = 4f64.ln();
    check_yarn("defaults", json!({}), yarn(0.1 * ln + 1.0, 32.0, 1.0, true));
    check_yarn("zero is absent", json!({"beta_fast": 0}), yarn(0.1 * ln + 1.0, 32.0, 1.0, true));
    let all = json!({"attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "truncate": false});
    check_yarn("all given", all, yarn(1.25, 16.0, 2.0, false));
    let mscale = (0.1 * 0.7 * ln + 1.0) / (0.1 * 0.5 * ln + 1.0);
    let given = json!({"mscale": 0.7, "mscale_all_dim": 0.5});
    check_yarn("mscale", given, yarn(mscale, 32.0, 1.0, true));
}

#[test]
fn mistral_windows() {
    for (name, patch, windows) in [
        ("given", json!({"sliding_window": 12}), [Some(12), Some(12)]),
        ("null is none", json!({"sliding_window": null}), [None, None]),
        ("the library's default", json!({}), [Some(4096), Some(4096)]),
        (
            "layer types",
            json!({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
            [Some(9), None],
        ),
    ] {
        let config = patched(patched(llama_config(), json!({"model_type": "mistral"})), patch);
        let mut expected = llama_spec();
        expected.attention.windows = windows.to_vec();
        check(name, config, &expected, HUGGING_FACE);
    }
}

#[test]
fn qwen2_windows() {
    let sliding = json!({"use_sliding_window": true, "sliding_window": 12, "max_window_layers": 1});
    let types = json!(["sliding_attention", "full_attention"]);
    for (name, patch, windows) in [
        ("off", json!({"sliding_window": 12, "max_window_layers": 0}), [None, None]),
        ("from a layer on", sliding.clone(), [None, Some(12)]),
        ("from layer 28", json!({"use_sliding_window": true, "sliding_window": 12}), [None, None]),
        ("layer types", patched(sliding, json!({"layer_types": types})), [Some(12), None]),
        ("all full", json!({"layer_types": ["full_attention", "full_attention"]}), [None, None]),
    ] {
        let config = patched(patched(llama_config(), json!({"model_type": "qwen2"})), patch);
        let mut expected = llama_spec();
        expected.attention.qkv_bias = true;
        expected.attention.windows = windows.to_vec();
        check(name, config, &expected, HUGGING_FACE);
    }
}

#[test]
fn qwen3() {
    for (patch, head_dim, bias) in [
        (json!({}), 8, false),
        (json!({"head_dim": "-"}), 128, false),
        (json!({"attention_bias": true}), 8, true),
    ] {
        let config = patched(patched(llama_config(), json!({"model_type": "qwen3"})), patch);
        let mut expected = llama_spec();
        expected.attention = AttentionSpec::plain(4, 2, head_dim, 2);
        expected.attention.qk_norm = QkNorm::BeforeRope;
        expected.attention.qkv_bias = bias;
        expected.attention.out_bias = bias;
        check("qwen3", config, &expected, HUGGING_FACE);
    }
}

fn old_astrai() -> Json {
    json!({
        "model_type": "transformer", "vocab_size": 12, "dim": 32, "n_layers": 2, "norm_eps": 1e-5,
        "dim_ffn": 64, "tie_weight": false, "max_len": 64, "n_heads": 4, "n_kv_heads": 2,
        "use_qk_norm": false, "use_gated_attention": false,
    })
}

fn new_astrai() -> Json {
    json!({
        "model_type": "autoregressive_lm", "vocab_size": 12, "hidden_size": 32,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "intermediate_size": 64,
        "tie_word_embeddings": false, "max_position_embeddings": 64, "rope_theta": 50000.0,
        "rope_scaling": null, "attn_type": "gqa", "num_attention_heads": 4,
        "num_key_value_heads": 2, "use_qk_norm": null, "ffn_type": "mlp", "kv_lora_rank": null,
    })
}

fn check_astrai(name: &str, config: Json, change: impl Fn(&mut ModelSpec)) {
    let mut expected = llama_spec();
    expected.rope.pairing = RopePairing::Adjacent;
    change(&mut expected);
    check(name, config, &expected, ASTRAI);
}

#[test]
fn astrai_to_1_3_3() {
    let all = json!({"use_qk_norm": true, "use_gated_attention": true, "tie_weight": true});
    check_astrai("plain", old_astrai(), |_| {});
    check_astrai("no model_type", patched(old_astrai(), json!({"model_type": "-"})), |_| {});
    check_astrai("upper case", patched(old_astrai(), json!({"model_type": "Transformer"})), |_| {});
    check_astrai("base is ignored", patched(old_astrai(), json!({"rope_theta": 5e5})), |_| {});
    check_astrai("no epsilon", patched(old_astrai(), json!({"norm_eps": null})), |spec| {
        spec.norm_eps = 1.192_092_9e-7;
    });
    check_astrai("norm, gate, tied", patched(old_astrai(), all), |spec| {
        spec.attention.qk_norm = QkNorm::AfterRope;
        spec.attention.output_gate = true;
        spec.tie_embeddings = true;
    });
}

#[test]
fn astrai_1_3_13() {
    let scaling = |fields: Json| patched(new_astrai(), json!({"rope_scaling": fields}));
    let plain = |spec: &mut ModelSpec| spec.rope.theta = 5e4;
    let ntk = |spec: &mut ModelSpec| {
        spec.rope.theta = 5e4;
        spec.rope.scaling = RopeScaling::Ntk { factor: 4.0 };
    };
    check_astrai("plain", new_astrai(), plain);
    check_astrai("no model_type", patched(new_astrai(), json!({"model_type": null})), plain);
    check_astrai("no base", patched(new_astrai(), json!({"rope_theta": null})), |_| {});
    check_astrai("linear does nothing", scaling(json!({"type": "linear", "factor": 4.0})), plain);
    check_astrai("ntk", scaling(json!({"type": "ntk", "factor": 4.0})), ntk);
    check_astrai("no type is ntk", scaling(json!({"rope_type": "llama3", "factor": 4.0})), ntk);
}

#[test]
fn astrai_without_a_head_uses_the_embedding() {
    let mut tied = llama_spec();
    tied.tie_embeddings = true;
    tied.rope.pairing = RopePairing::Adjacent;
    check("untied, no head in the file", old_astrai(), &tied, ASTRAI);
}

#[test]
fn a_tied_model_ignores_its_copy_of_the_head_and_old_buffers() {
    let mut list = tensors(&llama_spec(), HUGGING_FACE);
    let mut buffer = f32s("model.layers.0.self_attn.rotary_emb.inv_freq", &[4], 0);
    buffer.kind = "I32";
    list.push(buffer);
    let config = patched(llama_config(), json!({"tie_word_embeddings": true}));
    let folder = Folder::new()
        .with("config.json", config.to_string())
        .with("model.safetensors", safetensors(&list));
    take_all(folder.load().unwrap()).unwrap();
}

#[test]
fn shards_and_half_precision_are_read_where_they_lie() {
    let mut list = tensors(&llama_spec(), HUGGING_FACE);
    let norm = list.iter_mut().find(|tensor| tensor.name == "model.norm.weight").unwrap();
    norm.kind = "BF16";
    norm.bytes = (0..64).collect();
    let (first, second) = list.split_at(7);
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", first), ("b.safetensors", second)] {
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), Json::from(file))));
    }
    let folder = Folder::new()
        .with("config.json", llama_config().to_string())
        .with(
            "model.safetensors.index.json",
            json!({"metadata": {}, "weight_map": map}).to_string(),
        )
        .with("a.safetensors", safetensors(first))
        .with("b.safetensors", safetensors(second));
    let mut checkpoint = folder.load().unwrap();
    let norm = checkpoint.weights.take("norm.weight", &[32]).unwrap();
    assert_eq!((norm.encoding, norm.name.as_str()), (Encoding::BF16, "model.norm.weight"));
    assert_eq!(norm.data.as_slice(), (0..64).collect::<Vec<u8>>());
    let head = checkpoint.weights.take("lm_head.weight", &[12, 32]).unwrap();
    assert_eq!(head.row_bytes(1)[..4], 34f32.to_le_bytes());
}

#[test]
fn the_single_file_wins_over_an_index() {
    let folder = Folder::new()
        .with("config.json", llama_config().to_string())
        .with("model.safetensors", safetensors(&tensors(&llama_spec(), HUGGING_FACE)))
        .with("model.safetensors.index.json", "{}");
    take_all(folder.load().unwrap()).unwrap();
}

#[test]
fn weights_outlive_their_file_name() {
    let folder = Folder::new()
        .with("config.json", llama_config().to_string())
        .with("model.safetensors", safetensors(&tensors(&llama_spec(), HUGGING_FACE)));
    let checkpoint = folder.load().unwrap();
    fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    take_all(checkpoint).unwrap();
}
