//! Every op against `backend::reference` over grids of shapes and on every instruction tier, and the
//! promise of batch invariance, bit for bit.

#![allow(clippy::unwrap_used)] // A failure is the test's.

mod backend_support;
#[path = "backend/linear.rs"]
mod linear;

use astrai_rs::backend::{AttentionOp, Backend, Batch, Heads, LayerKv, RopeOp, Run, reference};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config::{BLOCK_SIZE, DType};
use astrai_rs::spec::{Activation, QkNorm, RopePairing};
use astrai_rs::weights::Encoding;
use backend_support::{
    Random, assert_close, backends, batch_of, bits, round_heads, stored, tensor, values,
    with_int8_cache,
};

const ENCODINGS: [Encoding; 6] =
    [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0];

const DTYPES: [DType; 4] = [DType::Auto, DType::Float32, DType::BFloat16, DType::Float16];

#[test]
fn dequantisation_follows_the_ggml_formats() {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let mut q4 = half(0.5).to_vec();
    q4.extend((0..16).map(|i| i | (15 - i) << 4));
    let mut out = [0.0; 32];
    reference::dequantize(Encoding::Q4_0, &q4, &mut out);
    assert_eq!((out[0], out[3], out[15], out[16], out[31]), (-4.0, -2.5, 3.5, 3.5, -4.0));

    q4.splice(2..2, half(-1.0));
    reference::dequantize(Encoding::Q4_1, &q4, &mut out);
    assert_eq!((out[0], out[3], out[15], out[16], out[31]), (-1.0, 0.5, 6.5, 6.5, -1.0));

    let mut q8 = half(0.25).to_vec();
    q8.extend((0..32).map(|i| (i * 8 - 128) as i8 as u8));
    reference::dequantize(Encoding::Q8_0, &q8, &mut out);
    assert_eq!((out[0], out[16], out[31]), (-32.0, 0.0, 30.0));
}

#[test]
fn threads_do_not_change_results() {
    let len = 2100;
    let heads = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 };
    let results: Vec<_> = [1, 2, 3]
        .into_iter()
        .map(|threads| {
            let mut random = Random::new(5);
            let backend = Backend::cpu(Some(threads), DType::Auto).unwrap();
            let weight = stored(&mut random, &[500, 320], Encoding::Q4_1);
            let packed = backend.pack(&[weight], None).unwrap();
            let x = tensor(&random.floats(50 * 320), &[50, 320]);
            let qkv = tensor(&random.floats(len * 320), &[len, 320]);
            let kv = backend.layer_kv(140, heads).unwrap();
            let batch = batch_of(&[(0..len, 0)], 140, &mut random);
            let op = rope_op(&mut random, heads, RopePairing::HalfSplit, QkNorm::None, len);
            backend.rope_and_cache(&qkv, heads, &op, &kv, &batch).unwrap();
            // One long decode row, whose spans are shared among the threads: those of all heads where there is one
            // thread, which has enough in them, and of each head where there are more.
            let last = Batch {
                positions: vec![len as u32 - 1],
                runs: vec![Run { rows: 0..1, blocks: 0..len.div_ceil(16) }],
                blocks: batch.blocks.clone(),
                ..Batch::default()
            };
            let op = AttentionOp { scale: 0.2, window: None };
            let query = qkv.narrow(0, len - 1, 1).unwrap();
            let norm = tensor(&random.floats(320), &[320]);
            [
                bits(&backend.linear(&x, &packed).unwrap()),
                bits(&backend.rms_norm(&x, &norm, 1e-5).unwrap()),
                bits(&backend.paged_attention(&qkv, heads, op, &kv, &batch).unwrap()),
                bits(&backend.paged_attention(&query, heads, op, &kv, &last).unwrap()),
            ]
        })
        .collect();
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
    let all = &results[0][2];
    assert_eq!(all[(len - 1) * 192..], results[0][3], "decode equals prefill");
}

#[test]
fn norms_match_the_reference() {
    let mut random = Random::new(6);
    for backend in backends(2, DType::Auto) {
        for cols in [1, 16, 33, 80, 576] {
            for rows in [1, 7, 90] {
                let (x, y) = (random.floats(rows * cols), random.floats(rows * cols));
                let weight = random.floats(cols);
                let (tx, tw) = (tensor(&x, &[rows, cols]), tensor(&weight, &[cols]));
                let got = backend.rms_norm(&tx, &tw, 1e-5).unwrap();
                let want = reference::rms_norm(&x, &weight, 1e-5);
                assert_close(&values(&got), &want, 1e-5, || format!("{rows}x{cols}"));

                let sum: Vec<_> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
                let residual = tensor(&x, &[rows, cols]);
                let got =
                    backend.add_rms_norm(&residual, &tensor(&y, &[rows, cols]), &tw, 1e-5).unwrap();
                assert_eq!(values(&residual), sum);
                let summed = backend.rms_norm(&tensor(&sum, &[rows, cols]), &tw, 1e-5).unwrap();
                assert_eq!(bits(&got), bits(&summed), "the fused norm is the norm of the sum");
                let alone =
                    backend.rms_norm(&residual.narrow(0, rows - 1, 1).unwrap(), &tw, 1e-5).unwrap();
                assert_eq!(bits(&alone), bits(&got)[(rows - 1) * cols..], "a row alone");
            }
        }
    }
}

#[test]
fn activations_and_gates_match_the_reference() {
    let mut random = Random::new(7);
    for backend in backends(2, DType::Auto) {
        for (rows, width) in [(1, 5), (3, 16), (40, 300)] {
            let mut x = random.floats(rows * 2 * width);
            x[0] = -200.0;
            x[1] = 200.0;
            let tx = tensor(&x, &[rows, 2 * width]);
            let got = backend.gated_activation(&tx, Activation::Silu).unwrap();
            let want = reference::gated_activation(&x, width, Activation::Silu);
            assert_close(&values(&got), &want, 1e-5, || format!("silu {rows}x{width}"));

            let offset = width / 2;
            let mut want = random.floats(rows * width);
            let out = tensor(&want, &[rows, width]);
            backend.gate_attention(&out, &tx, offset).unwrap();
            reference::gate_attention((&mut want, width), (&x, 2 * width), offset);
            assert_close(&values(&out), &want, 1e-5, || format!("gate {rows}x{width}"));
        }
    }
}

#[test]
fn embedding_and_gather_pick_rows() {
    let mut random = Random::new(8);
    let backend = Backend::cpu(Some(2), DType::Auto).unwrap();
    for encoding in ENCODINGS {
        let stored = stored(&mut random, &[9, 64], encoding);
        let all = backend.vector(&stored).unwrap();
        let table = backend.table(stored).unwrap();
        let lookup = |ids: &[u32]| {
            backend.embedding(&table, &Batch { ids: ids.to_vec(), ..Batch::default() })
        };
        let got = lookup(&[8, 0, 8]).unwrap();
        assert_eq!(bits(&got), bits(&backend.gather_rows(&all, &[8, 0, 8]).unwrap()));
        assert_eq!(values(&got)[..64], values(&all)[8 * 64..]);
        let error = lookup(&[9]).unwrap_err().to_string();
        assert!(error.contains("below 9") && error.contains("given: 9"), "{error}");
    }
}

fn rope_op(
    random: &mut Random,
    heads: Heads,
    pairing: RopePairing,
    qk_norm: QkNorm,
    positions: usize,
) -> RopeOp {
    let half = heads.head_dim / 2;
    let norm = (qk_norm != QkNorm::None)
        .then(|| tensor(&random.floats(heads.head_dim), &[heads.head_dim]));
    let angles = random.floats(positions * half);
    let table = |f: fn(f32) -> f32| {
        tensor(&angles.iter().map(|&x| f(3.0 * x)).collect::<Vec<_>>(), &[positions, half])
    };
    RopeOp {
        cos: table(f32::cos),
        sin: table(f32::sin),
        pairing,
        qk_norm,
        q_norm: norm.clone(),
        k_norm: norm,
        eps: 1e-5,
    }
}

fn plain_rope(op: &RopeOp) -> reference::Rope {
    reference::Rope {
        cos: values(&op.cos),
        sin: values(&op.sin),
        pairing: op.pairing,
        qk_norm: op.qk_norm,
        norms: op.q_norm.as_ref().zip(op.k_norm.as_ref()).map(|(q, k)| (values(q), values(k))),
        eps: op.eps,
    }
}

const HEADS: [Heads; 8] = [
    Heads { num_heads: 3, num_kv_heads: 1, head_dim: 16 },
    Heads { num_heads: 4, num_kv_heads: 4, head_dim: 8 },
    Heads { num_heads: 4, num_kv_heads: 2, head_dim: 12 },
    Heads { num_heads: 9, num_kv_heads: 3, head_dim: 64 },
    Heads { num_heads: 10, num_kv_heads: 2, head_dim: 80 },
    Heads { num_heads: 7, num_kv_heads: 1, head_dim: 128 },
    Heads { num_heads: 24, num_kv_heads: 1, head_dim: 32 },
    Heads { num_heads: 2, num_kv_heads: 1, head_dim: 256 },
];

#[test]
fn rope_attention_and_cache_match_the_reference() {
    let mut random = Random::new(9);
    for dtype in [DType::Auto, DType::Float32, DType::Float16] {
        let int8 = if dtype == DType::Auto { with_int8_cache(backends(2, dtype)) } else { vec![] };
        for backend in backends(2, dtype).into_iter().chain(int8) {
            for (case, heads) in HEADS.into_iter().enumerate() {
                let pairing = [RopePairing::HalfSplit, RopePairing::Adjacent][case % 2];
                let qk_norm = [QkNorm::None, QkNorm::BeforeRope, QkNorm::AfterRope][case % 3];
                let window = [None, Some(1), Some(17), Some(64)][case % 4];
                let op = rope_op(&mut random, heads, pairing, qk_norm, 96);
                check_attention(&mut random, &backend, heads, &op, window);
            }
        }
    }
}

/// Two steps: three sequences of 15, 16 and 70 tokens, then one more token for each.
fn check_attention(
    random: &mut Random,
    backend: &Backend,
    heads: Heads,
    op: &RopeOp,
    window: Option<usize>,
) {
    let num_blocks = 12;
    let width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim + 4;
    let kv = backend.layer_kv(num_blocks, heads).unwrap();
    let mut cache = reference::Cache::new(num_blocks, heads);
    let attention = AttentionOp { scale: 0.7 / (heads.head_dim as f32).sqrt(), window };
    let tables = batch_of(&[(0..16, 0), (16..33, 0), (33..104, 0)], 12, random);
    for lens in [[(0, 15), (0, 16), (0, 70)], [(15, 1), (16, 1), (70, 1)]] {
        let mut batch = Batch { blocks: tables.blocks.clone(), ..Batch::default() };
        for ((start, len), run) in lens.into_iter().zip(&tables.runs) {
            let row = batch.positions.len();
            batch.positions.extend(start..start + len);
            let rows = row..row + len as usize;
            batch.runs.push(Run { rows, blocks: run.blocks.clone() });
        }
        let rows = batch.positions.len();
        let mut qkv = random.floats(rows * width);
        let given = tensor(&qkv, &[rows, width]);
        backend.rope_and_cache(&given, heads, op, &kv, &batch).unwrap();
        reference::rope(&mut qkv, width, heads, &plain_rope(op), &batch.positions);
        let what = || format!("{} {heads:?} window {window:?}", backend.tier());
        assert_close(&values(&given), &qkv, 1e-5, || format!("rope {}", what()));

        // From the same numbers on, so that a rounding of the cache falls the same way.
        let qkv = values(&given);
        let dtype = kv.pages.dtype();
        cache.write((&qkv, width), heads, &batch, round_heads(dtype));
        let got = backend.paged_attention(&given, heads, attention, &kv, &batch).unwrap();
        let want = reference::paged_attention((&qkv, width), heads, attention, &cache, &batch);
        let tolerance = match (dtype, backend.tier()) {
            // Weights are rounded to bf16 where pairs of it are multiplied: by 2⁻⁹ at most, of values within 1.5.
            (candle_core::DType::BF16, "avx512bf16") => 3e-3,
            // Where a number lies between two steps, sums in another order may round it to either.
            (candle_core::DType::I16, _) => 1e-3,
            _ => 2e-5,
        };
        assert_close(&values(&got), &want, tolerance, || format!("attention {}", what()));
    }
}

#[test]
fn a_row_of_attention_does_not_depend_on_its_batch() {
    let mut random = Random::new(10);
    let (all, int8) = (backends(2, DType::Auto), with_int8_cache(backends(2, DType::Auto)));
    for backend in all.into_iter().chain(int8) {
        for (heads, window) in [
            (Heads { num_heads: 3, num_kv_heads: 1, head_dim: 64 }, None),
            (Heads { num_heads: 4, num_kv_heads: 2, head_dim: 12 }, Some(600)),
            (Heads { num_heads: 2, num_kv_heads: 1, head_dim: 80 }, None),
            (Heads { num_heads: 10, num_kv_heads: 2, head_dim: 32 }, None),
            (Heads { num_heads: 18, num_kv_heads: 2, head_dim: 16 }, None),
            (Heads { num_heads: 1, num_kv_heads: 1, head_dim: 32 }, Some(33)),
        ] {
            check_cuts(&mut random, &backend, heads, window);
        }
    }
}

/// One prefill of 1100 tokens; the same rows again in random chunks beside other sequences.
fn check_cuts(random: &mut Random, backend: &Backend, heads: Heads, window: Option<usize>) {
    let len = 1100;
    let width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    let size = heads.num_heads * heads.head_dim;
    let op = rope_op(random, heads, RopePairing::HalfSplit, QkNorm::None, len);
    let attention = AttentionOp { scale: 0.3, window };
    let qkv = random.floats(len * width);
    let whole = batch_of(&[(0..len, 0)], 80, random);
    let kv = backend.layer_kv(160, heads).unwrap();
    let rotated = tensor(&qkv, &[len, width]);
    backend.rope_and_cache(&rotated, heads, &op, &kv, &whole).unwrap();
    let want = bits(&backend.paged_attention(&rotated, heads, attention, &kv, &whole).unwrap());

    let kv = backend.layer_kv(160, heads).unwrap();
    let mut start = 0;
    while start < len {
        let chunk = [1, 7, 64, 200, 333][random.below(5)].min(len - start);
        // One other sequence of some rows, or many of one, in blocks from 80 on.
        let others = [vec![random.below(20) + 1], vec![1; 9]][random.below(2)].clone();
        let mut batch = Batch::default();
        for (index, &rows) in (0..).zip(&others) {
            let (row, block) = (batch.positions.len(), batch.blocks.len());
            batch.positions.extend(0..rows as u32);
            batch.blocks.extend([80 + 2 * index, 81 + 2 * index].map(BlockId));
            batch.runs.push(Run { rows: row..row + rows, blocks: block..block + 2 });
        }
        let (other, block) = (batch.positions.len(), batch.blocks.len());
        batch.positions.extend(start as u32..(start + chunk) as u32);
        batch.blocks.extend(&whole.blocks);
        let blocks = block..batch.blocks.len();
        batch.runs.push(Run { rows: other..other + chunk, blocks });
        let mut part = random.floats(other * width);
        part.extend(&qkv[start * width..(start + chunk) * width]);
        let part = tensor(&part, &[other + chunk, width]);
        backend.rope_and_cache(&part, heads, &op, &kv, &batch).unwrap();
        let got = backend.paged_attention(&part, heads, attention, &kv, &batch).unwrap();
        assert_eq!(
            bits(&got)[other * size..],
            want[start * size..(start + chunk) * size],
            "{} {heads:?} rows {start}+{chunk} behind {other}",
            backend.tier()
        );
        for run in &batch.runs[..others.len()] {
            let (rows, count) = (run.rows.clone(), run.rows.len());
            let alone = Batch {
                positions: batch.positions[rows.clone()].to_vec(),
                runs: vec![Run { rows: 0..count, blocks: 0..2 }],
                blocks: batch.blocks[run.blocks.clone()].to_vec(),
                ..Batch::default()
            };
            let part = part.narrow(0, rows.start, count).unwrap();
            let want = backend.paged_attention(&part, heads, attention, &kv, &alone).unwrap();
            let (want, rows) = (bits(&want), rows.start * size..rows.end * size);
            assert_eq!(bits(&got)[rows], want, "{} {heads:?} {others:?}", backend.tier());
        }
        start += chunk;
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_says_so() {
    let mut random = Random::new(11);
    let backend = Backend::cpu(Some(1), DType::Auto).unwrap();
    let heads = HEADS[0];
    let width = 80;
    let qkv = tensor(&random.floats(2 * width), &[2, width]);
    let kv = backend.layer_kv(2, heads).unwrap();
    let op = rope_op(&mut random, heads, RopePairing::HalfSplit, QkNorm::None, 40);
    let good = || batch_of(&[(0..2, 0)], 2, &mut Random::new(1));
    let fails = |batch: &Batch, part: &str| {
        let error = backend.rope_and_cache(&qkv, heads, &op, &kv, batch).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        let op = AttentionOp { scale: 1.0, window: None };
        let attention = backend.paged_attention(&qkv, heads, op, &kv, batch);
        assert!(attention.is_err() || part.contains("rope"), "attention accepts {batch:?}");
    };
    backend.rope_and_cache(&qkv, heads, &op, &kv, &good()).unwrap();
    let mut batch = good();
    batch.blocks[0] = BlockId(2);
    fails(&batch, "outside of the 2 pages");
    let mut batch = good();
    batch.positions[1] = 16;
    fails(&batch, "outside of the 1 blocks");
    let mut batch = good();
    batch.runs[0].rows = 0..3;
    fails(&batch, "within 2 rows");
    let mut batch = good();
    batch.runs[0].rows = 0..1;
    fails(&batch, "end at row 1 of 2");
    let mut batch = good();
    batch.runs[0].blocks = 0..9;
    fails(&batch, "blocks 0..9");
    let mut batch = good();
    batch.blocks = (0..2).map(BlockId).cycle().take(9).collect();
    batch.runs[0].blocks = 0..9;
    batch.positions[1] = 40;
    fails(&batch, "beyond the 40 of the rope table");

    let packed = backend.pack(&[stored(&mut random, &[4, 32], Encoding::F32)], None).unwrap();
    let error = backend.linear(&qkv, &packed).unwrap_err().to_string();
    assert!(error.contains("[tokens, 32]") && error.contains("[2, 80]"), "{error}");
    let strided = qkv.t().unwrap();
    let norm = tensor(&[1.0, 1.0], &[2]);
    let error = backend.rms_norm(&strided, &norm, 1e-5).unwrap_err().to_string();
    assert!(error.contains("strided"), "{error}");
    let error = Backend::cpu(Some(0), DType::Auto).unwrap_err().to_string();
    assert!(error.contains("num_threads"), "{error}");
    let error = Backend::cpu_with_tier(None, DType::Auto, "sse9").unwrap_err().to_string();
    assert!(error.contains("sse9") && error.contains("portable"), "{error}");
}

#[test]
fn empty_batches_give_empty_results() {
    let backend = Backend::cpu(Some(2), DType::Auto).unwrap();
    let mut random = Random::new(12);
    let packed = backend.pack(&[stored(&mut random, &[40, 32], Encoding::Q4_0)], None).unwrap();
    let none = tensor(&[], &[0, 32]);
    assert_eq!(backend.linear(&none, &packed).unwrap().dims(), [0, 40]);
    let weight = tensor(&random.floats(32), &[32]);
    assert_eq!(backend.rms_norm(&none, &weight, 1e-5).unwrap().dims(), [0, 32]);
    assert_eq!(backend.gather_rows(&none, &[]).unwrap().dims(), [0, 32]);
}

#[test]
fn pages_are_committed_when_written() {
    let heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 128 };
    for dtype in DTYPES {
        let backend = Backend::cpu(Some(1), dtype).unwrap();
        let bytes = backend.kv_bytes_per_token(heads);
        let blocks = (8 << 30) / (bytes * BLOCK_SIZE);
        // 8 GiB four times over would not fit, were it touched.
        let kv: Vec<LayerKv> = (0..4).map(|_| backend.layer_kv(blocks, heads).unwrap()).collect();
        assert_eq!(kv[0].pages.dims(), [2, blocks, 8 * 16 * 128]);
    }
}
