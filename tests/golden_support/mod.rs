//! Golden folders, and steps over all of their sequences at once.

#![allow(dead_code)] // Each test takes what it needs.

use std::path::PathBuf;

use astrai_rs::backend::Backend;
use astrai_rs::cache::block::BlockId;
use astrai_rs::checkpoint;
use astrai_rs::config::BLOCK_SIZE;
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::step::{Chunk, ChunkTokens, Forward, LogitRows, Logits, Step};
use safetensors::SafeTensors;

const BLOCKS_PER_SEQUENCE: usize = 8;

pub(crate) fn fixture(name: &str) -> PathBuf {
    // Not from where it was built: `make check-gpu` runs what was built elsewhere.
    PathBuf::from("tests/fixtures/golden").join(name)
}

pub(crate) struct Golden {
    input_ids: Vec<Vec<u32>>,
    logits: Vec<f32>,
    prompt_ids: Vec<Vec<u32>>,
    greedy_ids: Vec<Vec<u32>>,
    greedy_logprobs: Vec<f32>,
}

impl Golden {
    pub(crate) fn read(name: &str) -> Self {
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

pub(crate) fn runner(name: &str, backend: Backend) -> Runner {
    let checkpoint = checkpoint::load(&fixture(name)).expect("loads");
    let request =
        CapacityRequest { kv_cache_tokens: Some(512), max_num_seqs: 16, ..Default::default() };
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
        tokens: ChunkTokens::Known(&ids[start..]),
        start,
        blocks: &table[..ids.len().div_ceil(BLOCK_SIZE)],
        logits: rows,
    });
    let outcome = runner.forward(&Step { chunks: chunks.collect() }, &|| ()).expect("forward");
    outcome.wait().expect("forward")
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("not empty") as u32
}

fn logprob(row: &[f32], id: u32) -> f32 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    (f64::from(row[id as usize]) - max - sum.ln()) as f32
}

/// Of all rows of all inputs.
pub(crate) fn logits(golden: &Golden, runner: &mut Runner) -> Vec<f32> {
    let starts = vec![0; golden.input_ids.len()];
    step(runner, &golden.input_ids, &starts, LogitRows::All).values
}

/// Greatest difference of the logits, in parts of the greatest logit.
pub(crate) fn logit_error(golden: &Golden, runner: &mut Runner) -> f32 {
    let logits = logits(golden, runner);
    assert_eq!(logits.len(), golden.logits.len());
    let scale = golden.logits.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let pairs = logits.iter().zip(&golden.logits);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale
}

/// In f32: logits, greedy ids and their logprobs are those of the reference.
pub(crate) fn check(name: &str, backend: Backend) {
    let golden = Golden::read(name);
    let mut runner = runner(name, backend);
    let error = logit_error(&golden, &mut runner);
    assert!(error <= 1e-4, "{name}: |Δlogit| of {error:e}");

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

/// A test for each golden folder, which `$check` takes by name.
#[macro_export]
macro_rules! goldens {
    ($check:expr) => {
        goldens! { @tests $check;
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
    };
    (@tests $check:expr; $($test:ident: $name:literal;)*) => {
        $(#[test] fn $test() { $check($name); })*
    };
}
