//! GGUF files that are right.

use astrai_rs::checkpoint::gguf::{Metadata, Value, metadata};
use astrai_rs::checkpoint::load;
use astrai_rs::spec::{ModelSpec, QkNorm, RopePairing, RopeScaling};
use astrai_rs::weights::Encoding;

use crate::writers::*;

fn adjacent() -> ModelSpec {
    let mut spec = llama_spec();
    spec.rope.pairing = RopePairing::Adjacent;
    spec
}

fn check(name: &str, file: &Gguf, expected: &ModelSpec) {
    let folder = Folder::new().with("m.gguf", file.bytes());
    let checkpoint =
        load(&folder.0.join("m.gguf")).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(checkpoint.spec, *expected, "{name}");
    take_all(checkpoint).unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn llama() {
    let spec = adjacent();
    check("version 3", &gguf("llama", &spec), &spec);
    check("version 2", &Gguf { version: 2, ..gguf("llama", &spec) }, &spec);
    check("derived head size", &gguf("llama", &spec).without("llama.attention.key_length"), &spec);
    let list = Value::Array(vec![Value::I32(2), Value::I32(2)]);
    check(
        "a list per layer",
        &gguf("llama", &spec).set("llama.attention.head_count_kv", list),
        &spec,
    );
    let mut tied = adjacent();
    tied.tie_embeddings = true;
    check("tied", &gguf("llama", &tied), &tied);
    let mut biased = adjacent();
    biased.attention.qkv_bias = true;
    biased.attention.out_bias = true;
    biased.mlp.bias = true;
    check("biases", &gguf("llama", &biased), &biased);
    let mut window = adjacent();
    window.attention.windows = vec![Some(7); 2];
    check(
        "window",
        &gguf("llama", &window).set("llama.attention.sliding_window", Value::U32(7)),
        &window,
    );
    let mut wide = gguf("llama", &spec).set("general.alignment", Value::U32(256));
    wide.alignment = 256;
    check("alignment", &wide, &spec);
}

#[test]
fn qwen() {
    let mut qwen2 = llama_spec();
    qwen2.attention.qkv_bias = true;
    check("qwen2", &gguf("qwen2", &qwen2), &qwen2);
    let mut qwen3 = llama_spec();
    qwen3.attention.qk_norm = QkNorm::BeforeRope;
    check("qwen3", &gguf("qwen3", &qwen3), &qwen3);
}

#[test]
fn rope_scaling() {
    let text = Value::String;
    let scaled = |scaling: RopeScaling| {
        let mut spec = adjacent();
        spec.rope.scaling = scaling;
        spec
    };
    let with = |kind: &'static str| {
        gguf("llama", &adjacent())
            .set("llama.rope.scaling.type", text(kind))
            .set("llama.rope.scaling.factor", Value::F32(4.0))
    };
    check("none", &with("none"), &adjacent());
    check("linear", &with("linear"), &scaled(RopeScaling::Linear { factor: 4.0 }));
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_positions: 16,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0 + 0.1 * 4f64.ln(),
        truncate: true,
    };
    let file = with("yarn").set("llama.rope.scaling.original_context_length", Value::U32(16));
    check("yarn", &file, &scaled(yarn));
    let mut file = gguf("llama", &adjacent());
    file.tensors.push(f32s("rope_freqs.weight", &[4], 1));
    let factors = vec![1.0, 2.0, 3.0, 4.0];
    check("per frequency", &file, &scaled(RopeScaling::PerFrequency { factors }));
}

#[test]
fn tensors_keep_their_stored_precision() {
    let mut file = gguf("llama", &adjacent());
    let kinds = [("F16", 64), ("BF16", 64), ("Q4_0", 18), ("Q4_1", 20), ("Q8_0", 34)];
    for (index, (kind, row)) in kinds.into_iter().enumerate() {
        let name =
            ["q", "k", "v", "output"].get(index).map(|part| format!("blk.0.attn_{part}.weight"));
        let name = name.unwrap_or_else(|| "token_embd.weight".into());
        let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        tensor.kind = kind;
        tensor.bytes = (0..tensor.shape[0] * row).map(|byte| byte as u8).collect();
    }
    let folder = Folder::new().with("m.gguf", file.bytes());
    let mut weights = folder.load().unwrap().weights;
    let found = weights.iter().map(|(_, tensor)| tensor.encoding).collect::<Vec<_>>();
    for encoding in [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1] {
        assert!(found.contains(&encoding), "{encoding:?}");
    }
    let embed = weights.take("embed.weight", &[12, 32]).unwrap();
    assert_eq!((embed.encoding, embed.row_bytes(2)[0]), (Encoding::Q8_0, 68));
}

#[test]
fn metadata_keeps_every_type() {
    let values = [
        Value::U8(200),
        Value::I8(-3),
        Value::U16(60_000),
        Value::I16(-300),
        Value::U32(1 << 31),
        Value::I32(-70_000),
        Value::F32(0.5),
        Value::Bool(true),
        Value::String("ß\0"),
        Value::Array(vec![Value::String("a"), Value::String("")]),
        Value::Array(vec![Value::Array(vec![Value::I8(1)]), Value::Array(vec![Value::I8(2)])]),
        Value::Array(Vec::new()),
        Value::U64(u64::MAX),
        Value::I64(i64::MIN),
        Value::F64(1e300),
    ];
    let mut file = Gguf { tensors: vec![f32s("x", &[1], 0)], ..gguf("any", &adjacent()) };
    file.tensors[0].kind = "Q4_K";
    file.keys = values
        .iter()
        .enumerate()
        .map(|(index, value)| (index.to_string(), value.clone()))
        .collect();
    let folder = Folder::new().with("m.gguf", file.bytes());
    let check = |read: Metadata<'_>| {
        assert_eq!(read.len(), values.len());
        for (index, value) in values.iter().enumerate() {
            assert_eq!(read[index.to_string().as_str()], *value);
        }
    };
    metadata(&folder.0.join("m.gguf"), check).unwrap();
}

#[test]
fn a_folder_with_one_gguf_is_that_file_even_beside_a_config() {
    let folder = Folder::new()
        .with("config.json", llama_config().to_string())
        .with("m.gguf", gguf("llama", &adjacent()).bytes());
    assert_eq!(folder.load().unwrap().spec, adjacent());
}
