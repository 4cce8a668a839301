//! Broken GGUF files: none panics, each is refused with its exact message (behind the file's path).

use std::fs;

use astrai_rs::checkpoint::gguf::{Value, metadata};
use astrai_rs::checkpoint::load;
use astrai_rs::error::ErrorKind::{self, Checkpoint, Unsupported};

use crate::writers::*;

fn good() -> Gguf {
    gguf("llama", &llama_spec())
}

fn check(bytes: &[u8], kind: ErrorKind, expected: &str) {
    let folder = Folder::new().with("m.gguf", bytes);
    let error = match load(&folder.0.join("m.gguf")).and_then(take_all) {
        Ok(()) => panic!("loads, expected: {expected}"),
        Err(error) => error,
    };
    assert_eq!(message(&error, &folder.0), format!("@/m.gguf: {expected}"));
    assert_eq!(error.kind(), kind, "{expected}");
}

#[test]
fn metadata_keys() {
    let text = Value::String;
    let set = |key: &str, value: Value<'static>| good().set(key, value);
    let heads = Value::Array(vec![Value::U32(2), Value::U32(4)]);
    for (file, kind, expected) in [
        (good().without("general.architecture"), Checkpoint, "\"general.architecture\" is missing"),
        (
            set("general.architecture", text("gpt2")),
            Unsupported,
            "\"general.architecture\" \"gpt2\" is not supported; supported: llama, qwen2, qwen3",
        ),
        (
            set("general.architecture", Value::U8(1)),
            Checkpoint,
            "\"general.architecture\" must be a string; given: 1",
        ),
        (good().without("llama.block_count"), Checkpoint, "\"llama.block_count\" is missing"),
        (
            set("llama.block_count", Value::U64(u64::MAX)),
            Checkpoint,
            "\"llama.block_count\" must be a positive integer; given: 18446744073709551615",
        ),
        (
            set("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)),
            Checkpoint,
            "\"llama.attention.layer_norm_rms_epsilon\" must be a number; given: \"NaN\"",
        ),
        (
            set("llama.expert_count", Value::U32(8)),
            Unsupported,
            "\"llama.expert_count\": mixtures of experts",
        ),
        (
            set("llama.attention.causal", Value::Bool(false)),
            Unsupported,
            "\"llama.attention.causal\" false",
        ),
        (
            set("llama.attention.head_count_kv", heads),
            Unsupported,
            "\"llama.attention.head_count_kv\" that differs between layers",
        ),
        (
            set("llama.rope.dimension_count", Value::U32(4)),
            Unsupported,
            "\"llama.rope.dimension_count\" 4 is not supported beside heads of width 8",
        ),
        (
            set("llama.rope.scaling.type", text("longrope")),
            Unsupported,
            "\"llama.rope.scaling.type\" \"longrope\" is not supported; supported: none, linear, yarn",
        ),
        (
            set("split.count", Value::U16(2)),
            Unsupported,
            "a GGUF split over several files is not supported; merge it first",
        ),
        (
            set("general.alignment", Value::U32(24)),
            Checkpoint,
            "\"general.alignment\" must be a u32 power of two; given: U32(24)",
        ),
        (
            gguf("qwen2", &llama_spec()).set("qwen2.attention.sliding_window", Value::U32(4)),
            Unsupported,
            "\"qwen2.attention.sliding_window\" is not supported",
        ),
    ] {
        check(&file.bytes(), kind, expected);
    }
}

#[test]
fn tensors() {
    let change = |change: &dyn Fn(&mut Gguf)| {
        let mut file = good();
        change(&mut file);
        file.bytes()
    };
    let norm = |file: &Gguf| {
        file.tensors.iter().position(|tensor| tensor.name == "output_norm.weight").unwrap()
    };
    let kind = |kind: &'static str| {
        change(&|file| {
            let at = norm(file);
            file.tensors[at].kind = kind;
        })
    };
    let shift = |by: i64| change(&|file| file.shift = Some((norm(file), by)));
    let last = good().bytes().len();
    for (bytes, kind, expected) in [
        (
            kind("Q4_K"),
            Unsupported,
            "tensor `output_norm.weight` is stored as Q4_K (ggml type 12), which is not supported".to_owned(),
        ),
        (
            kind("?"),
            Unsupported,
            "tensor `output_norm.weight` is stored as the unknown ggml type 77, which is not supported".into(),
        ),
        (shift(1), Checkpoint, "tensor `output_norm.weight`: offset 1537 is not a multiple of the alignment 32".into()),
        (shift(-32), Checkpoint, "tensors `token_embd.weight` and `output_norm.weight` overlap".into()),
        (
            shift(1 << 40),
            Checkpoint,
            format!(
                "tensor `output_norm.weight`: 128 bytes at offset 1099511629312 reach beyond the file's {last} bytes \
                 (truncated?)"
            ),
        ),
        (
            change(&|file| { let at = norm(file); file.tensors.remove(at); }),
            Checkpoint,
            "tensor `norm.weight` of shape [32] is missing".into(),
        ),
        (
            change(&|file| file.tensors.retain(|tensor| tensor.name != "token_embd.weight")),
            Checkpoint,
            "tensor `token_embd.weight` is missing".into(),
        ),
        (
            change(&|file| file.tensors.push(f32s("blk.0.attn_qkv.weight", &[8], 0))),
            Checkpoint,
            "1 tensor(s) with names that this format does not have: `blk.0.attn_qkv.weight`".into(),
        ),
        (
            change(&|file| file.tensors.push(f32s("output.weight", &[8], 0))),
            Checkpoint,
            "two tensors are named `output.weight`".into(),
        ),
        (
            change(&|file| { let at = norm(file); file.tensors[at].shape = vec![1 << 33, 1 << 33]; }),
            Checkpoint,
            "tensor `output_norm.weight`: no size fits shape [8589934592, 8589934592] (F32)".into(),
        ),
        (
            change(&|file| { let at = norm(file); file.tensors[at].shape = vec![0]; }),
            Checkpoint,
            "tensor 1 of 21: `output_norm.weight` has a dimension of 0".into(),
        ),
        (
            change(&|file| { let at = norm(file); file.tensors[at].shape = vec![2; 5]; }),
            Checkpoint,
            "tensor 1 of 21: `output_norm.weight` has 5 dimensions; 1 to 4 are possible".into(),
        ),
        (
            change(&|file| file.tensors.push(f32s("rope_freqs.weight", &[3], 1))),
            Checkpoint,
            "3 frequency divisors for heads of width 8; 4 are needed".into(),
        ),
        (
            change(&|file| {
                let at = norm(file);
                file.tensors[at].kind = "Q8_0";
                file.tensors[at].shape = vec![8, 4];
            }),
            Checkpoint,
            "tensor `output_norm.weight` of shape [8, 4] is Q8_0, whose rows must be a multiple of 32".into(),
        ),
        (
            change(&|file| {
                file.tensors.push(f32s("rope_freqs.weight", &[4], 1));
                file.keys.push(("llama.rope.scaling.factor".into(), Value::F32(2.0)));
            }),
            Unsupported,
            "`rope_freqs.weight` together with \"llama.rope.scaling.type\"".into(),
        ),
    ] {
        check(&bytes, kind, &expected);
    }
}

/// A file with one key: its name, then the raw bytes of its type and value.
fn one_key(rest: &[u8]) -> Vec<u8> {
    let mut bytes =
        [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    put_string(&mut bytes, "k");
    [bytes, rest.to_vec()].concat()
}

fn array(kind: u32, count: u64) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes()].concat()
}

#[test]
fn structure() {
    let patch = |at: usize, bytes: &[u8]| {
        let mut file = good().bytes();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let left = good().bytes().len() - 24;
    let nested = [9u32.to_le_bytes().to_vec(), array(9, 1)[4..].repeat(5)].concat();
    let mut twice = good();
    twice.keys.push(twice.keys[0].clone());
    for (bytes, kind, expected) in [
        (Vec::new(), Checkpoint, "not a GGUF file: it does not start with \"GGUF\"".to_owned()),
        (patch(0, b"GGML"), Checkpoint, "not a GGUF file: it does not start with \"GGUF\"".into()),
        (patch(4, &1u32.to_le_bytes()), Unsupported, "GGUF version 1 is not supported; supported: 2, 3".into()),
        (patch(4, &3u32.to_be_bytes()), Unsupported, "big-endian GGUF is not supported".into()),
        (
            patch(16, &u64::MAX.to_le_bytes()),
            Checkpoint,
            format!("18446744073709551615 keys do not fit in the {left} bytes left (truncated?)"),
        ),
        (twice.bytes(), Checkpoint, "key \"general.architecture\" is there twice".into()),
        (
            one_key(&[4, 0, 0, 0, 1]),
            Checkpoint,
            "key \"k\": truncated: 4 bytes are needed at byte 37, the file has 38".into(),
        ),
        (one_key(&[13, 0, 0, 0]), Checkpoint, "key \"k\": value type 13 is unknown; 0 to 12 are possible".into()),
        (one_key(&[7, 0, 0, 0, 2]), Checkpoint, "key \"k\": a bool must be 0 or 1; given: 2".into()),
        (
            one_key(&[&[8, 0, 0, 0, 2][..], &[0; 7], &[0xc3, 0x28]].concat()),
            Checkpoint,
            "key \"k\": a string is not UTF-8".into(),
        ),
        (
            one_key(&[&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()),
            Checkpoint,
            "key \"k\": 18446744073709551615 bytes of a string do not fit in the 0 bytes left (truncated?)".into(),
        ),
        (
            one_key(&array(8, 1 << 60)),
            Checkpoint,
            "key \"k\": 1152921504606846976 array values do not fit in the 0 bytes left (truncated?)".into(),
        ),
        (
            one_key(&[array(0, 1 << 23), vec![0; 1 << 23]].concat()),
            Checkpoint,
            "key \"k\": more than 4194304 array values".into(),
        ),
        (one_key(&nested), Checkpoint, "key \"k\": arrays nest deeper than 4".into()),
    ] {
        check(&bytes, kind, &expected);
    }
}

#[test]
fn truncation_anywhere_is_an_error() {
    let bytes = good().set("llama.x", Value::Array(vec![Value::String("abc"); 3])).bytes();
    let folder = Folder::new();
    let path = folder.0.join("m.gguf");
    // The last tensor may lack its padding, but not a byte of its own.
    for len in (0..bytes.len() - 32).step_by(7) {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = load(&path).expect_err("a truncated file");
        assert_eq!(error.kind(), Checkpoint, "{len}: {error}");
    }
}

#[test]
fn no_flipped_byte_of_the_header_panics() {
    let bytes = good().bytes();
    let folder = Folder::new();
    let path = folder.0.join("m.gguf");
    for at in 0..1600 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut broken = bytes.clone();
            broken[at] = value;
            fs::write(&path, broken).unwrap();
            _ = load(&path).and_then(take_all);
            _ = metadata(&path, |_| ());
        }
    }
}
