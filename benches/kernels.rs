//! Time of each CPU op at the shapes of SmolLM2-135M: hidden 576, 9 query and 3 key/value heads of 64,
//! feed-forward 1536, vocabulary 49152.
//!
//! `cargo bench --bench kernels [-- FILTER]`; `ASTRAI_THREADS`, `ASTRAI_TIER` and `ASTRAI_DTYPE` choose the
//! backend. Prints medians of about a third of a second each, and one JSON line at the end. Weights are
//! cycled through copies of at least 200 MB where memory is what limits.
#![allow(missing_docs, clippy::print_stdout)] // A bench prints.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use astrai_rs::backend::{AttentionOp, Backend, Batch, Heads, Linear, RopeOp, Run};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config::DType;
use astrai_rs::spec::{Activation, QkNorm, RopePairing};
use astrai_rs::weights::{Bytes, Encoding, StoredTensor};
use candle_core::{Device, Tensor};

const HEADS: Heads = Heads { num_heads: 9, num_kv_heads: 3, head_dim: 64 };
const HIDDEN: usize = 576;

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mut bench = Bench { backend: backend(), filter, results: Vec::new() };
    println!("{} threads, tier {}", bench.backend.num_threads(), bench.backend.tier());
    linear(&mut bench);
    attention(&mut bench);
    rows(&mut bench);
    let results: serde_json::Map<_, _> = bench.results.into_iter().collect();
    println!("{}", serde_json::Value::Object(results));
}

fn backend() -> Backend {
    let setting = |name| std::env::var(name).ok();
    let threads = setting("ASTRAI_THREADS").map(|n| n.parse().expect("a number of threads"));
    let dtype = setting("ASTRAI_DTYPE").map_or(DType::Auto, |d| DType::parse(&d).expect("a dtype"));
    match setting("ASTRAI_TIER") {
        Some(tier) => Backend::cpu_with_tier(threads, dtype, &tier),
        None => Backend::cpu(threads, dtype),
    }
    .expect("a backend")
}

struct Bench {
    backend: Backend,
    filter: String,
    results: Vec<(String, serde_json::Value)>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Prints the median time of `op`, and `amount` per second in units of `10^9` by the median and by
    /// the best time, which other work on the machine disturbs least.
    fn run(&mut self, name: &str, amount: f64, unit: &str, mut op: impl FnMut()) {
        if !self.wants(name) {
            return;
        }
        let (mut times, begin) = (Vec::new(), Instant::now());
        while begin.elapsed() < Duration::from_millis(350) || times.len() < 5 {
            let start = Instant::now();
            op();
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        let rate = |time: f64| amount / time * 1e-9;
        println!(
            "{name:<34} {:>10.1} µs {:>8.1} {unit} (best {:.1})",
            median * 1e6,
            rate(median),
            rate(best)
        );
        self.results.push((name.into(), (median * 1e6).into()));
    }
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::from_vec(noise(shape.iter().product()), shape, &Device::Cpu).expect("a tensor")
}

fn stored(out: usize, cols: usize, encoding: Encoding) -> StoredTensor {
    let len = encoding.bytes_for(out * cols).expect("whole blocks");
    let data: Vec<u8> = (0..len).map(|i| (i * 37 % 64) as u8).collect();
    let bytes = Bytes::new(Arc::new(data), 0..len).expect("all bytes");
    StoredTensor::new("weight", vec![out, cols], encoding, bytes).expect("a tensor")
}

fn linear(bench: &mut Bench) {
    let shapes = [
        ("qkv", 960, HIDDEN),
        ("o", HIDDEN, HIDDEN),
        ("gate_up", 3072, HIDDEN),
        ("down", HIDDEN, 1536),
        ("lm_head", 49152, HIDDEN),
    ];
    for encoding in [Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
        for (shape, out, cols) in shapes {
            for rows in [1, 8, 512] {
                let name = format!("linear {encoding:?} {shape} {rows}");
                if !bench.wants(&name) || (shape == "lm_head" && rows == 512) {
                    continue;
                }
                let bytes = encoding.bytes_for(out * cols).expect("whole blocks");
                let copies = if rows == 512 { 1 } else { (200 << 20) / bytes + 1 };
                let weights: Vec<Linear> = (0..copies)
                    .map(|_| {
                        bench.backend.pack(&[stored(out, cols, encoding)], None).expect("packs")
                    })
                    .collect();
                let x = tensor(&[rows, cols]);
                let backend = bench.backend.clone();
                let mut next = 0;
                let op = || {
                    next = (next + 1) % weights.len();
                    black_box(backend.linear(&x, &weights[next]).expect("multiplies"));
                };
                if rows == 1 {
                    bench.run(&name, bytes as f64, "GB/s", op);
                } else {
                    bench.run(&name, (rows * out * cols) as f64, "GMAC/s", op);
                }
            }
        }
    }
}

/// Sequences of `context` tokens, of which the last `rows` are in the batch.
fn batch(sequences: usize, context: usize, rows: usize) -> Batch {
    let mut batch = Batch::default();
    for _ in 0..sequences {
        let (row, block) = (batch.positions.len(), batch.blocks.len());
        batch.positions.extend((context - rows) as u32..context as u32);
        batch.blocks.extend((block..block + context.div_ceil(16)).map(|b| BlockId(b as u32)));
        batch.runs.push(Run { rows: row..row + rows, blocks: block..batch.blocks.len() });
    }
    batch
}

fn attention(bench: &mut Bench) {
    let backend = bench.backend.clone();
    let op = AttentionOp { scale: 0.125, window: None };
    for (sequences, context, rows) in
        [(1, 512, 1), (1, 4096, 1), (32, 512, 1), (32, 4096, 1), (1, 512, 512), (1, 4096, 512)]
    {
        let name = format!("attention {sequences}x{context} last {rows}");
        if !bench.wants(&name) {
            continue;
        }
        let batch = batch(sequences, context, rows);
        let kv = backend.layer_kv(batch.blocks.len(), HEADS).expect("pages");
        let qkv = tensor(&[sequences * rows, 960]);
        let run = || {
            black_box(backend.paged_attention(&qkv, HEADS, op, &kv, &batch).expect("attends"));
        };
        if rows == 1 {
            let bytes = sequences * context * backend.kv_bytes_per_token(HEADS);
            bench.run(&name, bytes as f64, "GB/s", run);
        } else {
            let seen = rows * (context - rows) + rows * (rows + 1) / 2;
            bench.run(&name, (seen * 2 * 64 * 9) as f64, "GMAC/s", run);
        }
    }
}

fn rows(bench: &mut Bench) {
    let backend = bench.backend.clone();
    let table = tensor(&[4096, 32]);
    let op = RopeOp {
        cos: table.clone(),
        sin: table,
        pairing: RopePairing::HalfSplit,
        qk_norm: QkNorm::None,
        q_norm: None,
        k_norm: None,
        eps: 1e-5,
    };
    let weight = tensor(&[HIDDEN]);
    for rows in [1, 8, 512] {
        let (x, y) = (tensor(&[rows, HIDDEN]), tensor(&[rows, HIDDEN]));
        let bytes = (rows * HIDDEN * 4) as f64;
        bench.run(&format!("add_rms_norm {rows}"), 4.0 * bytes, "GB/s", || {
            black_box(backend.add_rms_norm(&x, &y, &weight, 1e-5).expect("norms"));
        });
        let wide = tensor(&[rows, 3072]);
        bench.run(&format!("gated_silu {rows}"), (rows * 3072 * 6) as f64, "GB/s", || {
            black_box(backend.gated_activation(&wide, Activation::Silu).expect("activates"));
        });
        let batch = batch(1, rows, rows);
        let kv = backend.layer_kv(batch.blocks.len(), HEADS).expect("pages");
        let qkv = tensor(&[rows, 960]);
        bench.run(&format!("rope_and_cache {rows}"), (rows * 960 * 4) as f64, "GB/s", || {
            backend.rope_and_cache(&qkv, HEADS, &op, &kv, &batch).expect("rotates");
        });
        let vocabulary = stored(49152, HIDDEN, Encoding::Q8_0);
        let table = backend.table(vocabulary).expect("a matrix");
        let ids = (0..rows as u32).map(|i| i * 7919 % 49152).collect();
        let batch = Batch { ids, ..Batch::default() };
        bench.run(&format!("embedding {rows}"), bytes, "GB/s", || {
            black_box(backend.embedding(&table, &batch).expect("looks up"));
        });
    }
}
