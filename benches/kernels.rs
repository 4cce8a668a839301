//! Time of each op: on the CPU at the shapes of SmolLM2-135M, on a GPU at those of a 1 B AstrAI model.
//!
//! `cargo bench --bench kernels [-- FILTER]`; `ASTRAI_DEVICE=cuda`, `ASTRAI_THREADS`, `ASTRAI_TIER` and
//! `ASTRAI_DTYPE` choose the backend, `ASTRAI_SUMS=free` one whose sums depend on the batch. Prints medians of
//! about a third of a second each, with rates as fractions of this machine's measured limits, and one JSON
//! line at the end. Weights are cycled through copies of at least 200 MB where memory is what limits.
#![allow(missing_docs, clippy::print_stdout)] // A bench prints.

mod limits;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use astrai_rs::backend::{
    AttentionOp, Backend, Batch, Heads, LayerKv, Linear, PendingDraws, RopeOp, Run,
};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config;
use astrai_rs::draw::Draw;
use astrai_rs::spec::{Activation, QkNorm, RopePairing};
use astrai_rs::weights::{Bytes, Encoding, StoredTensor};
use candle_core::{DType, Device, Tensor};
use limits::Limits;

/// A model's widths, and the work that its ops are timed at.
struct Shape {
    heads: Heads,
    hidden: usize,
    ffn: usize,
    vocab: usize,
    /// Rows of a linear layer.
    rows: &'static [usize],
    /// Sequences, their length, and how many of each one's last tokens are computed.
    attention: &'static [(usize, usize, usize)],
}

/// SmolLM2-135M's.
const CPU_SHAPE: Shape = Shape {
    heads: Heads { num_heads: 9, num_kv_heads: 3, head_dim: 64 },
    hidden: 576,
    ffn: 1536,
    vocab: 49152,
    rows: &[1, 8, 512],
    attention: &[
        (1, 512, 1),
        (1, 4096, 1),
        (32, 512, 1),
        (32, 4096, 1),
        (1, 512, 512),
        (1, 4096, 512),
    ],
};

/// `AstrAI`'s 1 B model's.
const GPU_SHAPE: Shape = Shape {
    heads: Heads { num_heads: 24, num_kv_heads: 4, head_dim: 64 },
    hidden: 1536,
    ffn: 6912,
    vocab: 100_000,
    rows: &[1, 8, 64, 512, 4096],
    attention: &[
        (1, 512, 1),
        (1, 8192, 1),
        (32, 2048, 1),
        (256, 1024, 1),
        (256, 4096, 1),
        (1, 512, 512),
        (1, 4096, 4096),
        (1, 16384, 2048),
    ],
};

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let backend = backend();
    let shape = if backend.device().is_cuda() { GPU_SHAPE } else { CPU_SHAPE };
    println!("{} threads, tier {}", backend.num_threads(), backend.tier());
    let limits = Limits::measure(&backend);
    limits.print();
    let mut bench = Bench { backend, shape, limits, filter, results: Vec::new() };
    linear(&mut bench);
    attention(&mut bench);
    rows(&mut bench);
    draw(&mut bench);
    let limits = serde_json::json!({
        "memory": limits.memory, "arithmetic": limits.arithmetic, "integers": limits.integers
    });
    let results: serde_json::Map<_, _> = bench.results.into_iter().collect();
    println!("{}", serde_json::json!({"limits": limits, "ops": results}));
}

fn backend() -> Backend {
    let setting = |name| std::env::var(name).ok();
    let threads = setting("ASTRAI_THREADS").map(|n| n.parse().expect("a number of threads"));
    let dtype = setting("ASTRAI_DTYPE")
        .map_or(config::DType::Auto, |d| config::DType::parse(&d).expect("a dtype"));
    match (setting("ASTRAI_DEVICE").as_deref(), setting("ASTRAI_TIER")) {
        #[cfg(feature = "cuda")]
        (Some("cuda"), _) if setting("ASTRAI_SUMS").as_deref() == Some("free") => {
            Backend::cuda_with_free_sums(0, dtype)
        }
        (Some("cuda"), _) => Backend::cuda(0, dtype),
        (_, Some(tier)) => Backend::cpu_with_tier(threads, dtype, &tier),
        _ => Backend::cpu(threads, dtype),
    }
    .expect("a backend")
}

/// What an op does, as far as a limit is known for it.
#[derive(Clone, Copy)]
enum Work {
    /// Bytes from memory.
    Memory(usize),
    /// Bytes that caches may hold.
    Bytes(usize),
    /// Multiplications, each with an addition, at most at this rate.
    Macs(usize, Option<f64>),
}

struct Bench {
    backend: Backend,
    shape: Shape,
    limits: Limits,
    filter: String,
    results: Vec<(String, serde_json::Value)>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Prints the median time of `op`, and its rate by the median and by the best time, which other work
    /// on the machine disturbs least.
    fn run(&mut self, name: &str, work: Work, mut op: impl FnMut()) {
        if !self.wants(name) {
            return;
        }
        let calls = self.calls_per_round(&mut op);
        let (mut times, begin) = (Vec::new(), Instant::now());
        while begin.elapsed() < Duration::from_millis(350) || times.len() < 5 {
            let start = Instant::now();
            (0..calls).for_each(|_| op());
            self.wait();
            times.push(start.elapsed().as_secs_f64() / calls as f64);
        }
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        let (amount, unit, limit) = match work {
            Work::Memory(bytes) => (bytes, "GB/s", Some(self.limits.memory)),
            Work::Bytes(bytes) => (bytes, "GB/s", None),
            Work::Macs(macs, limit) => (macs, "GMAC/s", limit),
        };
        let rate = |time: f64| amount as f64 / time * 1e-9;
        let share = limit.map(|limit| rate(median) / limit);
        println!(
            "{name:<34} {:>10.1} µs {:>9.1} {unit:<6} (best {:.1}){}",
            median * 1e6,
            rate(median),
            rate(best),
            share.map_or(String::new(), |share| format!(", {share:.2} of the limit"))
        );
        let result = serde_json::json!({
            "us": median * 1e6, "rate": rate(median), "unit": unit, "of_limit": share
        });
        self.results.push((name.into(), result));
    }

    /// A GPU's work is queued: many calls for each time that it is waited for.
    fn calls_per_round(&self, op: &mut impl FnMut()) -> usize {
        op();
        self.wait();
        if !self.backend.device().is_cuda() {
            return 1;
        }
        let start = Instant::now();
        (0..10).for_each(|_| op());
        self.wait();
        (10.0 * 10e-3 / start.elapsed().as_secs_f64()).clamp(1.0, 1000.0) as usize
    }

    fn wait(&self) {
        self.backend.device().synchronize().expect("the device's work ends well");
    }

    /// Noise, of the type of activations.
    fn activations(&self, shape: &[usize]) -> Tensor {
        self.tensor(noise(shape.iter().product()), shape, self.backend.activation_dtype())
    }

    /// Noise, f32.
    fn noise(&self, shape: &[usize]) -> Tensor {
        self.tensor(noise(shape.iter().product()), shape, DType::F32)
    }

    fn tensor(&self, numbers: Vec<f32>, shape: &[usize], dtype: DType) -> Tensor {
        let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu).and_then(|x| x.to_dtype(dtype));
        tensor.and_then(|x| x.to_device(self.backend.device())).expect("a tensor")
    }

    /// A cache of noise: every page the same.
    fn layer_kv(&self, num_blocks: usize) -> LayerKv {
        let zeros = self.backend.layer_kv(num_blocks, self.shape.heads).expect("pages").pages;
        let page = noise(zeros.dims()[2]).repeat(2 * num_blocks);
        LayerKv { pages: self.tensor(page, zeros.dims(), zeros.dtype()) }
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

fn qkv_width(heads: Heads) -> usize {
    (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
}

fn stored(out: usize, cols: usize, encoding: Encoding) -> StoredTensor {
    let len = encoding.bytes_for(out * cols).expect("whole blocks");
    let data: Vec<u8> = (0..len).map(|i| (i * 37 % 64) as u8).collect();
    let bytes = Bytes::new(Arc::new(data), 0..len).expect("all bytes");
    StoredTensor::new("weight", vec![out, cols], encoding, bytes).expect("a tensor")
}

fn linear(bench: &mut Bench) {
    let Shape { heads, hidden, ffn, vocab, rows, .. } = bench.shape;
    let attended = heads.num_heads * heads.head_dim;
    let shapes = [
        ("qkv", qkv_width(heads), hidden),
        ("o", hidden, attended),
        ("gate_up", 2 * ffn, hidden),
        ("down", hidden, ffn),
        ("lm_head", vocab, hidden),
    ];
    for encoding in [Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
        for (shape, out, cols) in shapes {
            let name = |rows| format!("linear {encoding:?} {shape} {rows}");
            // Only sampled rows reach the last layer.
            let rows = rows.iter().copied().filter(|&rows| shape != "lm_head" || rows < 512);
            let rows: Vec<usize> = rows.filter(|&rows| bench.wants(&name(rows))).collect();
            if rows.is_empty() {
                continue;
            }
            let bytes = encoding.bytes_for(out * cols).expect("whole blocks");
            let stored = stored(out, cols, encoding);
            let pack = |_| bench.backend.pack(std::slice::from_ref(&stored), None).expect("packs");
            let weights: Vec<Linear> = (0..=(200 << 20) / bytes).map(pack).collect();
            for rows in rows {
                let x = bench.activations(&[rows, cols]);
                let work = match rows {
                    1..=8 => Work::Memory(bytes),
                    _ => Work::Macs(rows * out * cols, bench.limits.products(encoding)),
                };
                let (backend, mut next) = (bench.backend.clone(), 0);
                bench.run(&name(rows), work, || {
                    next = (next + 1) % weights.len();
                    black_box(backend.linear(&x, &weights[next]).expect("multiplies"));
                });
            }
        }
    }
}

/// Sequences of `context` tokens, of which the last `rows` are in the batch.
fn batch(bench: &Bench, sequences: usize, context: usize, rows: usize) -> Batch {
    let mut batch = Batch::default();
    for _ in 0..sequences {
        let (row, block) = (batch.positions.len(), batch.blocks.len());
        batch.positions.extend((context - rows) as u32..context as u32);
        batch.blocks.extend((block..block + context.div_ceil(16)).map(|b| BlockId(b as u32)));
        batch.runs.push(Run { rows: row..row + rows, blocks: block..batch.blocks.len() });
    }
    let vocab = bench.shape.vocab as u32;
    batch.ids = (0..batch.positions.len() as u32).map(|i| i * 7919 % vocab).collect();
    bench.backend.place(&mut batch, bench.shape.heads, &[None]).expect("places");
    batch
}

fn attention(bench: &mut Bench) {
    let (backend, heads) = (bench.backend.clone(), bench.shape.heads);
    let op = AttentionOp { scale: 0.125, window: None };
    for &(sequences, context, rows) in bench.shape.attention {
        let name = format!("attention {sequences}x{context} last {rows}");
        if !bench.wants(&name) {
            continue;
        }
        let batch = batch(bench, sequences, context, rows);
        let kv = bench.layer_kv(batch.blocks.len());
        let qkv = bench.activations(&[sequences * rows, qkv_width(heads)]);
        let seen = rows * (context - rows) + rows * (rows + 1) / 2;
        let macs = seen * 2 * heads.num_heads * heads.head_dim;
        let work = match rows {
            1 => Work::Memory(sequences * context * backend.kv_bytes_per_token(heads)),
            _ => Work::Macs(macs, bench.limits.arithmetic),
        };
        bench.run(&name, work, || {
            black_box(backend.paged_attention(&qkv, heads, op, &kv, &batch).expect("attends"));
        });
    }
}

fn rows(bench: &mut Bench) {
    let Shape { heads, hidden, ffn, vocab, .. } = bench.shape;
    let backend = bench.backend.clone();
    let angles = bench.noise(&[4096, heads.head_dim / 2]);
    let op = RopeOp {
        cos: angles.clone(),
        sin: angles,
        pairing: RopePairing::HalfSplit,
        qk_norm: QkNorm::None,
        q_norm: None,
        k_norm: None,
        eps: 1e-5,
    };
    let weight = bench.noise(&[hidden]);
    let table = backend.table(stored(vocab, hidden, Encoding::Q8_0)).expect("a matrix");
    let number = backend.activation_dtype().size_in_bytes();
    for rows in [1, 8, 512] {
        let (x, y) = (bench.noise(&[rows, hidden]), bench.activations(&[rows, hidden]));
        let bytes = rows * hidden * (8 + 2 * number);
        bench.run(&format!("add_rms_norm {rows}"), Work::Bytes(bytes), || {
            black_box(backend.add_rms_norm(&x, &y, &weight, 1e-5).expect("norms"));
        });
        let wide = bench.activations(&[rows, 2 * ffn]);
        let bytes = rows * 3 * ffn * number;
        bench.run(&format!("gated_silu {rows}"), Work::Bytes(bytes), || {
            black_box(backend.gated_activation(&wide, Activation::Silu).expect("activates"));
        });
        let batch = batch(bench, 1, rows, rows);
        let kv = bench.layer_kv(batch.blocks.len());
        let qkv = bench.activations(&[rows, qkv_width(heads)]);
        let bytes = rows * qkv_width(heads) * number;
        bench.run(&format!("rope_and_cache {rows}"), Work::Bytes(bytes), || {
            backend.rope_and_cache(&qkv, heads, &op, &kv, &batch).expect("rotates");
        });
        bench.run(&format!("embedding {rows}"), Work::Bytes(rows * hidden * 4), || {
            black_box(backend.embedding(&table, &batch).expect("looks up"));
        });
    }
}

/// Drawing tokens from logits on the device, where it can.
fn draw(bench: &mut Bench) {
    let backend = bench.backend.clone();
    for rows in if backend.draws() { &[1, 256][..] } else { &[] } {
        let (logits, vocab) = (bench.noise(&[*rows, bench.shape.vocab]), bench.shape.vocab);
        for (name, inverse_temperature, logprobs) in [
            ("argmax", None, None),
            ("argmax, 20 logprobs", None, Some(20)),
            ("top-k top-p", Some(1.25), None),
        ] {
            let draw = Draw {
                inverse_temperature,
                top_k: Some(50),
                top_p: 0.95,
                min_p: 0.0,
                uniform: 0.5,
                logprobs,
            };
            let draws: Vec<_> = (0..*rows as u32).map(|row| (row, draw)).collect();
            bench.run(&format!("draw {name} {rows}"), Work::Bytes(rows * vocab * 4), || {
                black_box(
                    backend.draw(&logits, &draws).and_then(PendingDraws::wait).expect("draws"),
                );
            });
        }
    }
}
