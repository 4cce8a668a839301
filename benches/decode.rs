//! Whole-model bench: prefill and decode of a model of SmolLM2-135M's shape, through the runner.
//!
//! `cargo bench --bench decode` measures random `Q4_1` weights; `-- FILE` measures a checkpoint, and
//! `-- FILE WORD` only what has the word in its name.
//! Prints tokens per second (median of 5; of 33 where a step is one token each). Steps of one sequence take turns with
//! readings of memory, 200 and 25 of them: the rate at which weights and cache are read is given as a fraction of what
//! the memory gives, that of a prompt's projections as one of what the arithmetic allows. Ends with one JSON line.

#![allow(clippy::print_stdout, reason = "a bench reports to the terminal")]

mod limits;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use astrai_rs::backend::{Backend, Heads};
use astrai_rs::cache::block::BlockId;
use astrai_rs::checkpoint::{self, Checkpoint};
use astrai_rs::config::{BLOCK_SIZE, DType};
use astrai_rs::runner::{CapacityRequest, Runner};
use astrai_rs::spec::{
    Activation, AttentionSpec, MlpSpec, ModelSpec, QkNorm, RopePairing, RopeScaling, RopeSpec,
};
use astrai_rs::step::{Chunk, ChunkTokens, Forward, LogitRows, Outcome, Step};
use astrai_rs::weights::{Bytes, Encoding, StoredTensor, Weights};
use limits::{Limits, Reading};

/// Most sequences of a step.
const MAX_SEQS: usize = 64;
/// Tokens that the cache holds.
const CACHE_TOKENS: usize = MAX_SEQS * 160;

fn smollm2_spec() -> ModelSpec {
    let num_layers = 30;
    ModelSpec {
        vocab_size: 49_152,
        hidden_size: 576,
        num_layers,
        max_positions: 8448,
        norm_eps: 1e-5,
        rope: RopeSpec {
            theta: 100_000.0,
            pairing: RopePairing::Adjacent,
            scaling: RopeScaling::None,
        },
        attention: AttentionSpec {
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::None,
            output_gate: false,
            windows: vec![None; num_layers],
            scale: 0.125,
        },
        mlp: MlpSpec { intermediate_size: 1536, activation: Activation::Silu, bias: false },
        tie_embeddings: true,
    }
}

/// Pseudo-random bits with small f16 scales, so that activations stay finite.
fn random_tensor(name: &str, shape: &[usize], encoding: Encoding) -> StoredTensor {
    let len: usize = shape.iter().product();
    let mut data = vec![0u8; encoding.bytes_for(len).expect("whole blocks")];
    let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ name.len() as u64;
    for byte in &mut data {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    match encoding {
        Encoding::F32 => {
            data.chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&1f32.to_le_bytes()));
        }
        _ => data.chunks_exact_mut(encoding.block_bytes()).for_each(|block| block[1] = 0x10),
    }
    if encoding == Encoding::Q4_1 {
        data.chunks_exact_mut(20).for_each(|block| block[3] = 0x90);
    }
    let range = 0..data.len();
    let bytes = Bytes::new(Arc::new(data), range).expect("whole buffer");
    StoredTensor::new(name, shape.to_vec(), encoding, bytes).expect("exact size")
}

fn random_checkpoint() -> Checkpoint {
    let spec = smollm2_spec();
    let mut weights = Weights::default();
    let mut add = |name: String, shape: &[usize], encoding| {
        let tensor = random_tensor(&name, shape, encoding);
        weights.insert(name, tensor).expect("new name");
    };
    let (hidden, inner) = (spec.hidden_size, spec.mlp.intermediate_size);
    add("embed.weight".into(), &[spec.vocab_size, hidden], Encoding::Q8_0);
    add("norm.weight".into(), &[hidden], Encoding::F32);
    for layer in 0..spec.num_layers {
        for name in ["attn_norm", "mlp_norm"] {
            add(format!("layers.{layer}.{name}.weight"), &[hidden], Encoding::F32);
        }
        let matrices = [
            ("attn.q", hidden, hidden),
            ("attn.k", 192, hidden),
            ("attn.v", 192, hidden),
            ("attn.o", hidden, hidden),
            ("mlp.gate", inner, hidden),
            ("mlp.up", inner, hidden),
            ("mlp.down", hidden, inner),
        ];
        for (name, rows, cols) in matrices {
            add(format!("layers.{layer}.{name}.weight"), &[rows, cols], Encoding::Q4_1);
        }
    }
    Checkpoint { spec, weights }
}

/// Writes a token to every block of the cache, which touches all its memory: what was never written is one page of
/// zeros, which a step would read from the nearest cache.
fn touch(runner: &mut Runner) {
    let tables: Vec<_> =
        (0..CACHE_TOKENS / BLOCK_SIZE).map(|block| [BlockId(block as u32)]).collect();
    for tables in tables.chunks(MAX_SEQS) {
        let chunks = tables.iter().map(|blocks| Chunk {
            tokens: ChunkTokens::Known(&[100]),
            start: 0,
            blocks,
            logits: LogitRows::Last,
        });
        let step = Step { chunks: chunks.collect() };
        runner.forward(&step, &|| ()).and_then(Outcome::wait).expect("forward");
    }
}

/// Seconds that one step over `count` sequences takes, tokens `start..start + len` each.
fn seconds(runner: &mut Runner, count: usize, start: usize, len: usize) -> f64 {
    let tokens: Vec<u32> = (0..len as u32).map(|id| id * 7 + 100).collect();
    let blocks = (start + len).div_ceil(BLOCK_SIZE);
    let tables: Vec<Vec<BlockId>> = (0..count)
        .map(|row| (0..blocks).map(|block| BlockId((row * blocks + block) as u32)).collect())
        .collect();
    let chunks = tables.iter().map(|table| Chunk {
        tokens: ChunkTokens::Known(&tokens),
        start,
        blocks: table,
        logits: LogitRows::Last,
    });
    let step = Step { chunks: chunks.collect() };
    let begin = Instant::now();
    runner.forward(&step, &|| ()).and_then(Outcome::wait).expect("forward");
    begin.elapsed().as_secs_f64()
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Median tokens per second of `count` sequences × `len` tokens.
fn rate(runner: &mut Runner, count: usize, start: usize, len: usize) -> f64 {
    let repeats = if len == 1 { 33 } else { 5 };
    let times = (0..repeats).map(|_| seconds(runner, count, start, len));
    (count * len) as f64 / median(times.collect())
}

/// Tokens per second of one sequence, and GB/s that the memory gave meanwhile: medians of steps and of readings, which
/// take turns.
fn rate_and_memory(runner: &mut Runner, start: usize, reading: &Reading) -> (f64, f64) {
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..25 {
        memory.push(reading.rate());
        times.extend((0..8).map(|_| seconds(runner, 1, start, 1)));
    }
    (1.0 / median(times), median(memory))
}

/// Sequences, tokens that each has in the cache, and tokens of each in the step that is measured.
type Case = (String, usize, usize, usize);

fn cases() -> Vec<Case> {
    let prefill = |len| (format!("prefill {len}"), 1, 0, len);
    let decode =
        |(count, start)| (format!("decode batch {count}, context {start}"), count, start, 1);
    let batches = [1, 2, 4, 8, 16, 32, 64].map(|count| (count, 128));
    let contexts = [(1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8000), (8, 1024)];
    let decodes = batches.into_iter().chain(contexts).map(decode);
    [512, 2048, 4096].map(prefill).into_iter().chain(decodes).collect()
}

/// A loaded model, and what its steps are compared with.
struct Model {
    runner: Runner,
    limits: Limits,
    reading: Reading,
    /// Bytes that a decode step reads: all weights, and each token of the cache.
    weight_bytes: usize,
    token_bytes: usize,
    /// Products that a prompt's token takes, and with what.
    macs: f64,
    encoding: Encoding,
}

impl Model {
    fn load(checkpoint: Checkpoint, backend: Backend) -> Self {
        let spec = &checkpoint.spec;
        let heads = Heads {
            num_heads: spec.attention.num_heads,
            num_kv_heads: spec.attention.num_kv_heads,
            head_dim: spec.attention.head_dim,
        };
        let token_bytes = spec.num_layers * backend.kv_bytes_per_token(heads);
        let weight_bytes = read_in_a_step(&checkpoint);
        let (macs, encoding) = multiplied_per_token(&checkpoint);
        let (limits, reading) = (Limits::measure(&backend), Reading::new(backend.num_threads()));
        let request = CapacityRequest {
            kv_cache_tokens: Some(CACHE_TOKENS),
            max_num_seqs: MAX_SEQS,
            ..Default::default()
        };
        let (mut runner, _) = Runner::load(checkpoint, backend, &request).expect("fits");
        touch(&mut runner);
        Self { runner, limits, reading, weight_bytes, token_bytes, macs, encoding }
    }

    /// Tokens per second; of one sequence, too, which fraction that is of what the memory, or the arithmetic, allows, and
    /// this limit in `10^9` per second.
    fn measure(&mut self, &(_, count, start, len): &Case) -> (f64, Option<(f64, f64)>) {
        if (count, len) == (1, 1) {
            let (rate, memory) = rate_and_memory(&mut self.runner, start, &self.reading);
            let bytes = self.weight_bytes + start * self.token_bytes;
            return (rate, Some((rate * bytes as f64 * 1e-9 / memory, memory)));
        }
        let rate = rate(&mut self.runner, count, start, len);
        let limit = self.limits.products(self.encoding).filter(|_| len > 1);
        (rate, limit.map(|limit| (rate * self.macs * 1e-9 / limit, limit)))
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let (file, word) = (arguments.next(), arguments.next().unwrap_or_default());
    let checkpoint = match &file {
        Some(path) => checkpoint::load(Path::new(path)).expect("a checkpoint"),
        None => random_checkpoint(),
    };
    let name = file.as_deref().unwrap_or("random Q4_1 of SmolLM2-135M's shape");
    let max_positions = checkpoint.spec.max_positions;
    let backend = Backend::cpu(None, DType::Auto).expect("cpu");
    let (tier, threads) = (backend.tier(), backend.num_threads());
    let mut model = Model::load(checkpoint, backend);
    model.limits.print();
    println!("{name}: {tier}, {threads} threads");
    let (mut rates, mut shares) = (serde_json::Map::new(), serde_json::Map::new());
    for case in cases().into_iter().filter(|case| case.0.contains(&word)) {
        let (label, _, start, len) = &case;
        if start + len > max_positions {
            println!("{label:32} left out: the model has {max_positions} positions");
            continue;
        }
        let (rate, share) = model.measure(&case);
        let unit = if *len > 1 { "GMAC/s, in projections" } else { "GB/s" };
        let note = share.map(|(share, limit)| format!("  {share:.2} of {limit:.1} {unit}"));
        let note = note.unwrap_or_default();
        println!("{label:32} {rate:9.1} tok/s{note}");
        rates.insert(label.clone(), rate.into());
        shares.extend(share.map(|(share, _)| (label.clone(), share.into())));
    }
    let limits = serde_json::json!({
        "memory_gb_s": model.limits.memory, "arithmetic_gmac_s": model.limits.products(model.encoding)
    });
    println!(
        "{}",
        serde_json::json!({
            "model": name, "tier": tier, "threads": threads, "limits": limits, "tokens_per_s": rates, "shares": shares
        })
    );
}

/// Bytes of the weights that a decode step reads: of an embedding of its own only a row.
fn read_in_a_step(checkpoint: &Checkpoint) -> usize {
    let tied = checkpoint.spec.tie_embeddings;
    let read = checkpoint.weights.iter().filter(|(name, _)| tied || *name != "embed.weight");
    let bytes = read.map(|(_, tensor)| {
        tensor.encoding.bytes_for(tensor.rows() * tensor.cols()).expect("whole blocks")
    });
    bytes.sum()
}

/// Products that the layers' projections take for a token, and how most of their weights are stored.
fn multiplied_per_token(checkpoint: &Checkpoint) -> (f64, Encoding) {
    let layers = || {
        let layers = checkpoint.weights.iter().filter(|(name, _)| name.starts_with("layers."));
        layers.map(|(_, tensor)| tensor).filter(|tensor| tensor.shape.len() == 2)
    };
    let macs = |tensor: &StoredTensor| tensor.rows() * tensor.cols();
    let stored_as =
        |encoding| layers().filter(|tensor| tensor.encoding == encoding).map(macs).sum();
    let most = Encoding::ALL.into_iter().max_by_key(|&encoding| -> usize { stored_as(encoding) });
    (layers().map(macs).sum::<usize>() as f64, most.unwrap_or(Encoding::F32))
}
