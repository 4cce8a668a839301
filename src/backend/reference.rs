//! The naive version of every op, on plain slices: the specification that the kernels are tested
//! against. Sums are f64, so that the order of addition does not matter.

use half::{bf16, f16};

use super::{AttentionOp, Batch, Heads};
use crate::config::BLOCK_SIZE;
use crate::spec::{Activation, QkNorm, RopePairing};
use crate::weights::{Encoding, StoredTensor};

/// The numbers of `bytes`, which hold exactly `out.len()` of them in whole blocks.
///
/// # Panics
/// When they do not.
pub fn dequantize(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(encoding.bytes_for(out.len()), Some(bytes.len()), "bytes of whole blocks");
    let blocks = bytes.chunks_exact(encoding.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(encoding.block_len())) {
        match encoding {
            Encoding::F32 => {
                out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            }
            Encoding::F16 => out[0] = half_at(block, 0),
            Encoding::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Encoding::Q4_0 => {
                let scale = half_at(block, 0);
                nibbles(&block[2..], out, |q| scale * (f32::from(q) - 8.0));
            }
            Encoding::Q4_1 => {
                let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], out, |q| scale * f32::from(q) + minimum);
            }
            Encoding::Q8_0 => {
                let scale = half_at(block, 0);
                for (out, &q) in out.iter_mut().zip(&block[2..]) {
                    *out = scale * f32::from(q.cast_signed());
                }
            }
        }
    }
}

/// The numbers of a stored tensor.
#[must_use]
pub fn numbers(stored: &StoredTensor) -> Vec<f32> {
    let mut numbers = vec![0.0; stored.shape.iter().product()];
    dequantize(stored.encoding, stored.data.as_slice(), &mut numbers);
    numbers
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low halves of the bytes are the first 16 numbers, high halves the last 16.
fn nibbles(bytes: &[u8], out: &mut [f32], number: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(bytes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = number(byte & 15);
        *high = number(byte >> 4);
    }
}

/// `x · Wᵀ + bias` for `x`: `[rows, cols]` and `weight`: `[out, cols]`.
#[must_use]
pub fn linear(x: &[f32], weight: &[f32], cols: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
    };
    x.chunks_exact(cols)
        .flat_map(|x| weight.chunks_exact(cols).map(move |w| dot(x, w)).enumerate())
        .map(|(out, sum)| (sum + bias.map_or(0.0, |bias| f64::from(bias[out]))) as f32)
        .collect()
}

/// `x / sqrt(mean(x²) + eps) * weight` for each row of `weight.len()` numbers.
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    x.chunks_exact(weight.len())
        .flat_map(|row| {
            let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let scale = 1.0 / (squares / row.len() as f64 + f64::from(eps)).sqrt();
            row.iter().zip(weight).map(move |(&x, &w)| (f64::from(x) * scale * f64::from(w)) as f32)
        })
        .collect()
}

/// `1 / (1 + e^-x)`.
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + f64::from(-x).exp())) as f32
}

/// `activation(x[..width]) * x[width..]` for each row of `2 * width` numbers.
#[must_use]
pub fn gated_activation(x: &[f32], width: usize, activation: Activation) -> Vec<f32> {
    let Activation::Silu = activation;
    x.chunks_exact(2 * width)
        .flat_map(|row| (0..width).map(|i| row[i] * sigmoid(row[i]) * row[width + i]))
        .collect()
}

/// `out *= sigmoid(gate[offset..])`, row by row of `width` and `gate_width` numbers.
pub fn gate_attention(
    (out, width): (&mut [f32], usize),
    (gate, gate_width): (&[f32], usize),
    offset: usize,
) {
    for (out, gate) in out.chunks_exact_mut(width).zip(gate.chunks_exact(gate_width)) {
        for (out, &gate) in out.iter_mut().zip(&gate[offset..]) {
            *out *= sigmoid(gate);
        }
    }
}

/// Plain numbers of a [`super::RopeOp`], and the norm weights that it has.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Cosines, `[max_positions, head_dim / 2]`.
    pub cos: Vec<f32>,
    /// Sines, same shape.
    pub sin: Vec<f32>,
    /// Which lanes rotate together.
    pub pairing: RopePairing,
    /// Where the norms stand.
    pub qk_norm: QkNorm,
    /// Weights of query and key norm, where there are some.
    pub norms: Option<(Vec<f32>, Vec<f32>)>,
    /// Epsilon of both norms.
    pub eps: f32,
}

/// Norms and rotates the queries and keys of `qkv` (`[rows, width]`) in place.
pub fn rope(qkv: &mut [f32], width: usize, heads: Heads, op: &Rope, positions: &[u32]) {
    for (row, &position) in qkv.chunks_exact_mut(width).zip(positions) {
        let rotated = heads.num_heads + heads.num_kv_heads;
        for (index, head) in row.chunks_exact_mut(heads.head_dim).take(rotated).enumerate() {
            let weight =
                op.norms.as_ref().map(|(q, k)| if index < heads.num_heads { q } else { k });
            let norm = |head: &mut [f32]| {
                if let Some(weight) = weight {
                    head.copy_from_slice(&rms_norm(head, weight, op.eps));
                }
            };
            match op.qk_norm {
                QkNorm::None => rotate(head, op, position as usize),
                QkNorm::BeforeRope => {
                    norm(head);
                    rotate(head, op, position as usize);
                }
                QkNorm::AfterRope => {
                    rotate(head, op, position as usize);
                    norm(head);
                }
            }
        }
    }
}

fn rotate(head: &mut [f32], op: &Rope, position: usize) {
    let half = head.len() / 2;
    for i in 0..half {
        let (a, b) = match op.pairing {
            RopePairing::HalfSplit => (i, i + half),
            RopePairing::Adjacent => (2 * i, 2 * i + 1),
        };
        let (cos, sin) = (op.cos[position * half + i], op.sin[position * half + i]);
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
    }
}

/// What an int8 cache keeps of a head's key: as [`round_value_to_int8`], of whole groups of 32 their Walsh-Hadamard
/// transform.
pub fn round_key_to_int8(head: &mut [f32]) {
    let transform = |group: &mut [f32; 32]| {
        let given = *group;
        for (i, x) in group.iter_mut().enumerate() {
            let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            let sum: f64 = given.iter().enumerate().map(|(j, &x)| sign(j) * f64::from(x)).sum();
            *x = (sum / 32_f64.sqrt()) as f32;
        }
    };
    head.as_chunks_mut().0.iter_mut().for_each(transform);
    round_value_to_int8(head);
    head.as_chunks_mut().0.iter_mut().for_each(transform);
}

/// What an int8 cache keeps of a head's value: of 32 numbers each, multiples of a 127th of the greatest (as an f16),
/// as in GGUF's `Q8_0`. NaN where one is NaN or too large.
pub fn round_value_to_int8(head: &mut [f32]) {
    for group in head.chunks_mut(32) {
        let greatest = group
            .iter()
            .map(|x| x.abs())
            .fold(0.0, |greatest: f32, x| if x > greatest || x.is_nan() { x } else { greatest });
        let scale = f16::from_f32(greatest / 127.0).to_f32();
        for x in group {
            let multiple = if scale == 0.0 { 0.0 } else { (*x / scale).round_ties_even() };
            *x = multiple.clamp(-127.0, 127.0) * scale;
        }
    }
}

/// Keys and values of a whole cache in plain order: `[block * BLOCK_SIZE + slot][kv_head][dim]`.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    /// Keys.
    pub keys: Vec<f32>,
    /// Values.
    pub values: Vec<f32>,
}

impl Cache {
    /// Zeros for `num_blocks` blocks.
    #[must_use]
    pub fn new(num_blocks: usize, heads: Heads) -> Self {
        let zeros = vec![0.0; num_blocks * BLOCK_SIZE * heads.num_kv_heads * heads.head_dim];
        Self { keys: zeros.clone(), values: zeros }
    }

    /// Stores the keys and values of `qkv`, each head's of a token rounded by the functions for keys and for values.
    pub fn write(
        &mut self,
        (qkv, width): (&[f32], usize),
        heads: Heads,
        batch: &Batch,
        (round_key, round_value): (impl Fn(&mut [f32]), impl Fn(&mut [f32])),
    ) {
        let (queries, size) =
            (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        for run in &batch.runs {
            for row in run.rows.clone() {
                let at = slot(batch, run, batch.positions[row] as usize) * size;
                let row = &qkv[row * width + queries..][..2 * size];
                let (keys, values) = row.split_at(size);
                let stored = at..at + size;
                self.keys[stored.clone()].copy_from_slice(keys);
                self.keys[stored.clone()].chunks_mut(heads.head_dim).for_each(&round_key);
                self.values[stored.clone()].copy_from_slice(values);
                self.values[stored].chunks_mut(heads.head_dim).for_each(&round_value);
            }
        }
    }
}

fn slot(batch: &Batch, run: &super::Run, position: usize) -> usize {
    let block = batch.blocks[run.blocks.clone()][position / BLOCK_SIZE].0 as usize;
    block * BLOCK_SIZE + position % BLOCK_SIZE
}

/// Causal attention of the queries in `qkv` over the cache: `[rows, heads * head_dim]`.
#[must_use]
pub fn paged_attention(
    (qkv, width): (&[f32], usize),
    heads: Heads,
    op: AttentionOp,
    cache: &Cache,
    batch: &Batch,
) -> Vec<f32> {
    let dim = heads.head_dim;
    let mut out = Vec::new();
    for run in &batch.runs {
        for row in run.rows.clone() {
            let position = batch.positions[row] as usize;
            let first = op.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads.num_heads {
                let kv_head = head / (heads.num_heads / heads.num_kv_heads);
                let at = |p| (slot(batch, run, p) * heads.num_kv_heads + kv_head) * dim;
                let query = &qkv[row * width + head * dim..][..dim];
                let scores: Vec<f64> = (first..=position)
                    .map(|p| {
                        let key = &cache.keys[at(p)..][..dim];
                        let dot: f64 =
                            query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                        dot * f64::from(op.scale)
                    })
                    .collect();
                let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..dim).map(|d| {
                    let sum: f64 = (first..=position)
                        .zip(&weights)
                        .map(|(p, w)| w * f64::from(cache.values[at(p) + d]))
                        .sum();
                    (sum / total) as f32
                }));
            }
        }
    }
    out
}
