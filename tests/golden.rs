//! Whole models against reference logits (transformers 5.23, AstrAI 1.3.3 / 1.3.13, fp32).

use std::path::PathBuf;

use astrai_rs::backend::Backend;
use astrai_rs::cache::block::BlockId;
use astrai_rs::checkpoint;
use astrai_rs::config::{BLOCK_SIZE, DType};
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::step::{Chunk, Forward, LogitRows, Logits, Step};
use safetensors::SafeTensors;

const BLOCKS_PER_SEQUENCE: usize = 8;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

struct Golden {
    input_ids: Vec<Vec<u32>>,
    logits: Vec<f32>,
    prompt_ids: Vec<Vec<u32>>,
    greedy_ids: Vec<Vec<u32>>,
    greedy_logprobs: Vec<f32>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(fixture(name).join("golden.safetensors")).expect("fixture");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let ids = |key: &str| -> Vec<Vec<u32>> {
            let view = file.tensor(key).expect(key);
            let id = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("8 bytes")) as u32;
            let all: Vec<u32> = view.data().chunks_exact(8).map(id).collect();
            all.chunks(view.shape()[1]).map(<[u32]>::to_vec).collect()
        };
        let floats = |key: &str| -> Vec<f32> {
            let float = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("4 bytes"));
            file.tensor(key).expect(key).data().chunks_exact(4).map(float).collect()
        };
        Self {
            input_ids: ids("input_ids"),
            logits: floats("logits"),
            prompt_ids: ids("prompt_ids"),
            greedy_ids: ids("greedy_ids"),
            greedy_logprobs: floats("greedy_logprobs"),
        }
    }
}

fn runner(name: &str) -> Runner {
    let checkpoint = checkpoint::load(&fixture(name)).expect("loads");
    let backend = Backend::cpu(Some(2), DType::Float32).expect("cpu");
    let request =
        CapacityRequest { kv_cache_tokens: Some(512), max_num_seqs: 8, ..Default::default() };
    Runner::load(checkpoint, backend, &request).expect("packs").0
}

/// Blocks of sequence `row`, deliberately out of order.
fn blocks(row: usize) -> Vec<BlockId> {
    let first = row * BLOCKS_PER_SEQUENCE;
    (first..first + BLOCKS_PER_SEQUENCE).rev().map(|id| BlockId(id as u32)).collect()
}

/// One step over `[start..]` of every sequence.
fn step(runner: &mut Runner, sequences: &[Vec<u32>], starts: &[usize], rows: LogitRows) -> Logits {
    let tables: Vec<_> = (0..sequences.len()).map(blocks).collect();
    let chunks = sequences.iter().zip(starts).zip(&tables).map(|((ids, &start), table)| Chunk {
        tokens: &ids[start..],
        start,
        blocks: &table[..ids.len().div_ceil(BLOCK_SIZE)],
        logits: rows,
    });
    runner.forward(&Step { chunks: chunks.collect() }, &|| ()).expect("forward")
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("not empty") as u32
}

fn logprob(row: &[f32], id: u32) -> f32 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    (f64::from(row[id as usize]) - max - sum.ln()) as f32
}

fn check(name: &str) {
    let golden = Golden::read(name);
    let mut runner = runner(name);

    let logits =
        step(&mut runner, &golden.input_ids, &vec![0; golden.input_ids.len()], LogitRows::All);
    assert_eq!(logits.values.len(), golden.logits.len());
    let scale = golden.logits.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst =
        logits.values.iter().zip(&golden.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-4 * scale, "{name}: max |Δlogit| {worst:e} on a scale of {scale}");

    let mut sequences = golden.prompt_ids.clone();
    let mut starts = vec![0; sequences.len()];
    let (count, width) = (sequences.len(), golden.greedy_ids[0].len());
    for token in 0..width {
        let logits = step(&mut runner, &sequences, &starts, LogitRows::Last);
        for row in 0..count {
            let id = argmax(logits.row(row));
            assert_eq!(id, golden.greedy_ids[row][token], "{name}: row {row}, token {token}");
            let expected = golden.greedy_logprobs[row * width + token];
            let given = logprob(logits.row(row), id);
            assert!(
                (given - expected).abs() <= 1e-4,
                "{name}: logprob {given}, expected {expected}"
            );
            starts[row] = sequences[row].len();
            sequences[row].push(id);
        }
    }
}

macro_rules! goldens {
    ($($test:ident: $name:literal;)*) => { $(#[test] fn $test() { check($name); })* };
}

goldens! {
    llama: "llama";
    llama2_mha: "llama2-mha";
    llama_mqa_bias: "llama-mqa-bias";
    llama3_rope: "llama3-rope";
    llama_linear_rope: "llama-linear-rope";
    llama_yarn: "llama-yarn";
    mistral_swa: "mistral-swa";
    mistral_full: "mistral-full";
    qwen2: "qwen2";
    qwen2_swa: "qwen2-swa";
    qwen3: "qwen3";
    astrai: "astrai";
    astrai_tied: "astrai-tied";
    astrai_qknorm_gated: "astrai-qknorm-gated";
    astrai_24q4kv: "astrai-24q4kv";
    astrai_lm: "astrai-lm";
    astrai_lm_qknorm_gated_ntk: "astrai-lm-qknorm-gated-ntk";
    astrai_lm_linear: "astrai-lm-linear";
}
