//! Rope, the cache and attention over it.

use astrai_rs::backend::{AttentionOp, Backend, Batch, Heads, LayerKv, RopeOp, Run, reference};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config::DType;
use astrai_rs::spec::{QkNorm, RopePairing};
use candle_core::Tensor;

use crate::backend_support::{Random, assert_close, batch_of, gpu, round_heads};
use crate::{DTYPES, activations, bits, dtype_of, grain, residual, values};

fn rope_op(
    random: &mut Random,
    backend: &Backend,
    head_dim: usize,
    case: usize,
    positions: usize,
) -> (RopeOp, reference::Rope) {
    let half = head_dim / 2;
    let angles = random.floats(positions * half);
    let table = |f: fn(f32) -> f32| angles.iter().map(|&x| f(3.0 * x)).collect::<Vec<_>>();
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let qk_norm = [QkNorm::None, QkNorm::BeforeRope, QkNorm::AfterRope][case % 3];
    let norms = (random.floats(head_dim), random.floats(head_dim));
    let plain = reference::Rope {
        cos,
        sin,
        pairing: [RopePairing::HalfSplit, RopePairing::Adjacent][case % 2],
        qk_norm,
        norms: (qk_norm != QkNorm::None).then_some(norms),
        eps: 1e-5,
    };
    let norm = |weight: &Vec<f32>| residual(backend, weight, &[head_dim]);
    let op = RopeOp {
        cos: residual(backend, &plain.cos, &[positions, half]),
        sin: residual(backend, &plain.sin, &[positions, half]),
        pairing: plain.pairing,
        qk_norm,
        q_norm: plain.norms.as_ref().map(|(q, _)| norm(q)),
        k_norm: plain.norms.as_ref().map(|(_, k)| norm(k)),
        eps: plain.eps,
    };
    (op, plain)
}

/// Every size of the kernels, groups within a tile of 16 queries and across, padded and full columns.
const HEADS: [(usize, usize, usize); 12] = [
    (4, 4, 8),
    (3, 1, 16),
    (9, 3, 64),
    (24, 4, 64),
    (10, 2, 80),
    (6, 2, 96),
    (7, 1, 128),
    (40, 2, 32),
    (4, 4, 160),
    (2, 1, 192),
    (16, 1, 200),
    (2, 1, 256),
];

#[test]
fn rope_attention_and_cache_match_the_reference() {
    let mut random = Random::new(7);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        for (case, (num_heads, num_kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            let window = [None, Some(1), Some(17), Some(64)][case % 4];
            check_attention(&mut random, &backend, heads, (case, window, 330));
        }
    }
}

/// Every head size with every size of a group, and windows that meet each of them.
#[test]
fn heads_of_every_size_match_the_reference() {
    let mut random = Random::new(19);
    let backends = [DType::BFloat16, DType::Float16].map(gpu);
    let groups = [1, 2, 3, 4, 5, 6, 7, 8, 16];
    let windows = [None, Some(5), Some(40), Some(300)];
    let odd = [2, 4, 34, 50, 90, 100, 126, 250];
    for (case, head_dim) in (32..=256).step_by(8).chain(odd).enumerate() {
        for turn in 0..2 {
            let group = groups[(case + 5 * turn) % groups.len()];
            let heads = Heads { num_heads: 2 * group, num_kv_heads: 2, head_dim };
            let window = windows[(case / 2 + turn) % windows.len()];
            let backend = &backends[(case + turn) % 2];
            check_attention(&mut random, backend, heads, (case + turn, window, 50));
        }
    }
}

/// Of one row and of many: four splits and a window that begins in the second.
#[test]
fn many_splits_match_the_reference() {
    let mut random = Random::new(20);
    for (case, dtype) in DTYPES.into_iter().enumerate() {
        let backend = gpu(dtype);
        for (heads, window) in [((2, 1, 64), None), ((3, 1, 100), Some(500)), ((2, 2, 96), None)] {
            let (num_heads, num_kv_heads, head_dim) = heads;
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            check_attention(&mut random, &backend, heads, (case, window, 800));
        }
    }
}

/// Two steps: three sequences of 15, 16 and `longest` tokens, then one more token for each.
fn check_attention(
    random: &mut Random,
    backend: &Backend,
    heads: Heads,
    (case, window, longest): (usize, Option<usize>, u32),
) {
    let dtype = dtype_of(backend);
    let (op, plain) = rope_op(random, backend, heads.head_dim, case, longest as usize + 10);
    let num_blocks = longest.div_ceil(16) as usize + 7;
    let queries = heads.num_heads * heads.head_dim;
    let keys = heads.num_kv_heads * heads.head_dim;
    let width = queries + 2 * keys + 8;
    let kv = backend.layer_kv(num_blocks, heads).unwrap();
    let mut cache = reference::Cache::new(num_blocks, heads);
    let attention = AttentionOp { scale: 0.7 / (heads.head_dim as f32).sqrt(), window };
    let end = 34 + longest as usize;
    let tables = batch_of(&[(0..16, 0), (16..33, 0), (33..end, 0)], num_blocks as u32, random);
    for lens in [[(0, 15), (0, 16), (0, longest)], [(15, 1), (16, 1), (longest, 1)]] {
        let mut batch = step_of(&tables, lens);
        backend.place(&mut batch, heads, &[window]).unwrap();
        let rows = batch.positions.len();
        let mut qkv = random.floats(rows * width);
        let given = activations(backend, &mut qkv, &[rows, width]);
        backend.rope_and_cache(&given, heads, &op, &kv, &batch).unwrap();
        reference::rope(&mut qkv, width, heads, &plain, &batch.positions);
        let what = || format!("{dtype:?} {heads:?} window {window:?} {rows} rows");
        let rotated = values(&given);
        for (got, want) in rotated.chunks(width).zip(qkv.chunks(width)) {
            assert_close(&got[..queries], &want[..queries], grain(dtype), || {
                format!("rope {}", what())
            });
        }
        // Attention from the GPU's own queries; the cache has what the reference rounds to.
        for (own, got) in qkv.chunks_mut(width).zip(rotated.chunks(width)) {
            own[..queries].copy_from_slice(&got[..queries]);
        }
        let stored = backend.activation_dtype();
        cache.write((&qkv, width), heads, &batch, round_heads(stored));
        let got = backend.paged_attention(&given, heads, attention, &kv, &batch).unwrap();
        let want = reference::paged_attention((&qkv, width), heads, attention, &cache, &batch);
        assert_close(&values(&got), &want, 2.0 * grain(dtype), || format!("attention {}", what()));
    }
}

fn step_of(tables: &Batch, lens: [(u32, u32); 3]) -> Batch {
    let mut batch = Batch { blocks: tables.blocks.clone(), ..Batch::default() };
    for ((start, len), run) in lens.into_iter().zip(&tables.runs) {
        let row = batch.positions.len();
        batch.positions.extend(start..start + len);
        batch.runs.push(Run { rows: row..row + len as usize, blocks: run.blocks.clone() });
    }
    batch
}

#[test]
fn a_row_of_attention_does_not_depend_on_its_batch() {
    let mut random = Random::new(8);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        for ((num_heads, num_kv_heads, head_dim), window) in [
            ((3, 1, 64), None),
            ((4, 2, 16), Some(300)),
            ((1, 1, 32), Some(33)),
            ((3, 1, 88), None),
            ((2, 1, 128), Some(150)),
        ] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            check_cuts(&mut random, &backend, heads, window);
        }
    }
}

/// One prefill of 600 tokens; the same rows again in random chunks beside another sequence.
fn check_cuts(random: &mut Random, backend: &Backend, heads: Heads, window: Option<usize>) {
    // Enough tiles for the kernel of long prompts, also on a GPU of many multiprocessors.
    let len = if cfg!(feature = "cuda-emulator") { 600 } else { 6000 };
    let blocks = len as u32 / 16 + 3;
    let width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    let size = heads.num_heads * heads.head_dim;
    let (op, _) = rope_op(random, backend, heads.head_dim, 0, len);
    let attention = AttentionOp { scale: 0.3, window };
    let mut qkv = random.floats(len * width);
    let mut whole = batch_of(&[(0..len, 0)], blocks, random);
    let run = |kv: &LayerKv, x: &Tensor, batch: &mut Batch| {
        backend.place(batch, heads, &[window]).unwrap();
        backend.rope_and_cache(x, heads, &op, kv, batch).unwrap();
        bits(&backend.paged_attention(x, heads, attention, kv, batch).unwrap())
    };
    let given = activations(backend, &mut qkv, &[len, width]);
    let want = run(&backend.layer_kv(blocks as usize + 2, heads).unwrap(), &given, &mut whole);

    let kv = backend.layer_kv(blocks as usize + 2, heads).unwrap();
    let mut start = 0;
    while start < len {
        let chunk = [1, 7, 64, 200][random.below(4)].min(len - start);
        let other = random.below(20) + 1;
        // The other sequence has the last two blocks, and rows in front.
        let others = [blocks, blocks + 1].map(BlockId);
        let mut batch = Batch { blocks: others.to_vec(), ..Batch::default() };
        batch.blocks.extend(&whole.blocks);
        batch.positions.extend(0..other as u32);
        batch.positions.extend(start as u32..(start + chunk) as u32);
        batch.runs.push(Run { rows: 0..other, blocks: 0..2 });
        batch.runs.push(Run { rows: other..other + chunk, blocks: 2..batch.blocks.len() });
        let mut part = random.floats(other * width);
        part.extend(&qkv[start * width..(start + chunk) * width]);
        let part = activations(backend, &mut part, &[other + chunk, width]);
        let got = run(&kv, &part, &mut batch);
        let differs =
            got[other * size..].iter().zip(&want[start * size..]).position(|(a, b)| a != b);
        assert_eq!(
            differs, None,
            "{heads:?} window {window:?} rows {start}+{chunk} behind {other}"
        );
        start += chunk;
    }
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn a_captured_step_attends_for_many_heads_of_a_group() {
    let mut random = Random::new(16);
    let backend = gpu(DType::BFloat16);
    let heads = Heads { num_heads: 64, num_kv_heads: 1, head_dim: 16 };
    let kv = backend.layer_kv(40, heads).unwrap();
    let runs: [_; 8] = std::array::from_fn(|row| (row..row + 1, 30));
    let step = || batch_of(&runs, 40, &mut Random::new(17));
    let mut batch = step();
    let width = (heads.num_heads + 2) * heads.head_dim;
    let qkv = activations(&backend, &mut random.floats(8 * width), &[8, width]);
    let (rope, _) = rope_op(&mut random, &backend, heads.head_dim, 0, 64);
    let op = AttentionOp { scale: 0.3, window: None };
    backend.place(&mut batch, heads, &[None]).unwrap();
    backend.rope_and_cache(&qkv, heads, &rope, &kv, &batch).unwrap();
    let want = bits(&backend.paged_attention(&qkv, heads, op, &kv, &batch).unwrap());
    let mut graphs = backend.decode_graphs(heads, &[None], (8, 64)).unwrap().unwrap();
    for _ in 0..3 {
        let attend = |batch: &_| backend.paged_attention(&qkv, heads, op, &kv, batch).map(Some);
        let got = graphs.run(step(), attend).unwrap().unwrap();
        assert_eq!(bits(&got), want);
    }
}
