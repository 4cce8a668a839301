//! The CUDA kernels, on an emulated GPU or, without the feature `cuda-emulator`, on a real one: every op
//! against `backend::reference`, batch invariance bit for bit, and the emulator's own promise that faults
//! do not go by unseen.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // A failure is the test's.

mod backend_support;

#[cfg(feature = "cuda-emulator")]
use astrai_rs::backend::emulator;
use astrai_rs::backend::{AttentionOp, Backend, Batch, Heads, LayerKv, RopeOp, Run, reference};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config::DType;
use astrai_rs::draw::{Draw, Drawn};
use astrai_rs::sampler::{
    Row, SampleState, Sampler, SamplingOptions, SamplingParams, TokenLogprob, token_logprobs,
};
use astrai_rs::spec::{Activation, QkNorm, RopePairing};
use astrai_rs::weights::Encoding;
use backend_support::{Random, assert_close, batch_of, gpu, round_like_cache, stored};
use candle_core::{DType as CandleType, Device, Tensor};

const DTYPES: [DType; 3] = [DType::Float32, DType::BFloat16, DType::Float16];

/// Numbers that the compute type holds, and a tensor of them on the GPU.
fn activations(backend: &Backend, x: &mut [f32], shape: &[usize]) -> Tensor {
    let dtype = backend.activation_dtype();
    for x in x.iter_mut() {
        *x = round_like_cache(*x, dtype);
    }
    floats(backend, x, shape, dtype)
}

fn floats(backend: &Backend, x: &[f32], shape: &[usize], dtype: CandleType) -> Tensor {
    let tensor = Tensor::from_slice(x, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    tensor.to_device(backend.device()).unwrap()
}

fn residual(backend: &Backend, x: &[f32], shape: &[usize]) -> Tensor {
    floats(backend, x, shape, CandleType::F32)
}

fn values(x: &Tensor) -> Vec<f32> {
    let x = x.to_device(&Device::Cpu).unwrap().to_dtype(CandleType::F32).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// Rounding of one result in the compute type, and room for the order of sums.
fn grain(dtype: DType) -> f32 {
    match dtype {
        DType::Float32 => 1e-5,
        DType::Float16 => 1.5e-3,
        _ => 1e-2,
    }
}

#[test]
fn linear_matches_the_reference() {
    let mut random = Random::new(1);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        // The last has blocks enough for small ones, whose warps have two slices each.
        for (cols, out) in
            [(8, 1), (24, 16), (48, 33), (136, 17), (576, 40), (2560, 24), (1096, 260)]
        {
            let weight = stored(&mut random, &[out, cols], Encoding::F32);
            let plain: Vec<f32> = values(&backend.vector(&weight).unwrap())
                .into_iter()
                .map(|x| round_like_cache(x, backend.activation_dtype()))
                .collect();
            let bias = random.floats(out);
            let packed = backend.pack(&[weight], Some(bias.clone())).unwrap();
            for rows in [1, 3, 8, 9, 17, 40, 70] {
                let mut x = random.floats(rows * cols);
                let given = activations(&backend, &mut x, &[rows, cols]);
                let want = reference::linear(&x, &plain, cols, Some(&bias));
                let what = || format!("{dtype:?} {rows}x{cols}x{out}");
                let got = backend.logits(&given, &packed).unwrap();
                assert_close(&values(&got), &want, 2e-5 * (cols as f32).sqrt(), what);
                let got = backend.linear(&given, &packed).unwrap();
                assert_eq!(got.dims(), [rows, out]);
                let tolerance = grain(dtype).max(2e-5 * (cols as f32).sqrt());
                assert_close(&values(&got), &want, tolerance, what);
            }
        }
    }
}

#[test]
fn weights_of_every_encoding_stack() {
    let mut random = Random::new(2);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        let encodings =
            [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1]
                .into_iter()
                .chain([Encoding::Q8_0]);
        let parts: Vec<_> = encodings
            .zip([5, 32, 33, 17, 64, 3])
            .map(|(e, out)| stored(&mut random, &[out, 64], e))
            .collect();
        let plain: Vec<f32> =
            parts.iter().flat_map(|part| values(&backend.vector(part).unwrap())).collect();
        let mut x = random.floats(2 * 64);
        let given = activations(&backend, &mut x, &[2, 64]);
        let packed = backend.pack(&parts, None).unwrap();
        let got = values(&backend.linear(&given, &packed).unwrap());
        assert_close(&got, &reference::linear(&x, &plain, 64, None), 8.0 * grain(dtype), || {
            format!("{dtype:?}")
        });
    }
}

const QUANTISED: [Encoding; 3] = [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1];

#[test]
fn quantised_linear_matches_the_reference() {
    let mut random = Random::new(11);
    for (dtype, encoding) in DTYPES.into_iter().flat_map(|d| QUANTISED.map(|e| (d, e))) {
        let backend = gpu(dtype);
        for (cols, outs) in [(32, 1), (96, 40), (160, 16), (2560, 24)] {
            let weight = stored(&mut random, &[outs, cols], encoding);
            let plain = reference::numbers(&weight);
            let packed = backend.pack(&[weight], None).unwrap();
            for rows in [1, 9, 17, 40, 70] {
                let mut x = random.floats(rows * cols);
                let given = activations(&backend, &mut x, &[rows, cols]);
                let want = reference::linear(&x, &plain, cols, None);
                // The weights themselves are not rounded: only the order of the sums differs.
                let tolerance = 2e-5 * (cols as f32).sqrt();
                assert_close(
                    &values(&backend.logits(&given, &packed).unwrap()),
                    &want,
                    tolerance,
                    || format!("{dtype:?} {encoding:?} {rows}x{cols}x{outs}"),
                );
            }
        }
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_batch() {
    let mut random = Random::new(3);
    // Enough blocks of 128 to keep all multiprocessors busy, of which the emulated GPU has four.
    let (rows, outs) = if cfg!(feature = "cuda-emulator") { (270, 140) } else { (1700, 1700) };
    for dtype in DTYPES {
        for encoding in [Encoding::F32].into_iter().chain(QUANTISED) {
            check_rows(&mut random, (dtype, encoding), (rows, 352, outs));
        }
        // Half tiles for few rows; slices of more than one step.
        check_rows(&mut random, (dtype, Encoding::F32), (rows, 352, 40));
        check_rows(&mut random, (dtype, Encoding::F32), (rows, 8328, 9));
    }
}

fn check_rows(
    random: &mut Random,
    (dtype, encoding): (DType, Encoding),
    (rows, cols, outs): (usize, usize, usize),
) {
    let backend = gpu(dtype);
    let packed = backend.pack(&[stored(random, &[outs, cols], encoding)], None).unwrap();
    let x = activations(&backend, &mut random.floats(rows * cols), &[rows, cols]);
    // In blocks of 128; some of 64 below; the rest as few rows.
    let whole = bits(&backend.logits(&x, &packed).unwrap());
    for (start, len) in [
        (0, 1),
        (269, 1),
        (5, 2),
        (3, 8),
        (11, 9),
        (100, 17),
        (20, 33),
        (2, 64),
        (7, 65),
        (150, 80),
    ] {
        let part = bits(&backend.logits(&x.narrow(0, start, len).unwrap(), &packed).unwrap());
        let same = part == whole[start * outs..(start + len) * outs];
        assert!(same, "{dtype:?} {encoding:?} rows {start}+{len}");
    }
}

#[test]
fn gates_in_a_linear_layer_are_those_after_it() {
    let mut random = Random::new(14);
    for (dtype, encoding) in
        DTYPES.into_iter().flat_map(|d| [Encoding::F32, Encoding::Q8_0].map(|e| (d, e)))
    {
        let backend = gpu(dtype);
        for (cols, width) in [(32, 4), (160, 24), (1056, 140)] {
            let parts = [(); 2].map(|()| stored(&mut random, &[width, cols], encoding));
            let bias = (width != 24).then(|| random.floats(2 * width));
            let packed = backend.pack(&parts, bias).unwrap();
            for rows in [1, 9, 20, 70] {
                let x = activations(&backend, &mut random.floats(rows * cols), &[rows, cols]);
                let both = backend.linear(&x, &packed).unwrap();
                let want = backend.gated_activation(&both, Activation::Silu).unwrap();
                let got = backend.gated_linear(&x, &packed, Activation::Silu).unwrap();
                assert_eq!(bits(&got), bits(&want), "{dtype:?} {encoding:?} {rows}x{cols}x{width}");
            }
        }
    }
}

#[test]
fn norms_match_the_reference() {
    let mut random = Random::new(4);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        for (rows, cols) in [(1, 8), (7, 33), (3, 576), (2, 2600)] {
            let (x, mut y) = (random.floats(rows * cols), random.floats(rows * cols));
            let weight = random.floats(cols);
            let device_weight = residual(&backend, &weight, &[cols]);
            let sum = residual(&backend, &x, &[rows, cols]);
            let what = || format!("{dtype:?} {rows}x{cols}");
            let got = backend.rms_norm(&sum, &device_weight, 1e-5).unwrap();
            assert_close(
                &values(&got),
                &reference::rms_norm(&x, &weight, 1e-5),
                grain(dtype),
                what,
            );

            let added = activations(&backend, &mut y, &[rows, cols]);
            let got = backend.add_rms_norm(&sum, &added, &device_weight, 1e-5).unwrap();
            let want: Vec<_> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_eq!(values(&sum), want);
            let norm = reference::rms_norm(&want, &weight, 1e-5);
            assert_close(&values(&got), &norm, grain(dtype), what);
        }
    }
}

#[test]
fn activations_and_gates_match_the_reference() {
    let mut random = Random::new(5);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        for (rows, width) in [(1, 6), (3, 16), (4, 1300)] {
            let mut x = random.floats(rows * 2 * width);
            (x[0], x[1]) = (-200.0, 200.0);
            let given = activations(&backend, &mut x, &[rows, 2 * width]);
            let what = || format!("{dtype:?} {rows}x{width}");
            let got = backend.gated_activation(&given, Activation::Silu).unwrap();
            let want = reference::gated_activation(&x, width, Activation::Silu);
            assert_close(&values(&got), &want, grain(dtype), what);

            let mut want = random.floats(rows * width);
            let out = activations(&backend, &mut want, &[rows, width]);
            backend.gate_attention(&out, &given, width / 2).unwrap();
            reference::gate_attention((&mut want, width), (&x, 2 * width), width / 2);
            assert_close(&values(&out), &want, grain(dtype), what);
        }
    }
}

#[test]
fn embedding_and_gather_pick_rows() {
    let mut random = Random::new(6);
    for (dtype, case) in DTYPES.into_iter().flat_map(|dtype| (0..4).map(move |case| (dtype, case)))
    {
        let backend = gpu(dtype);
        let encoding = [Encoding::BF16, Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1][case];
        let matrix = stored(&mut random, &[40, 64], encoding);
        let all = values(&backend.vector(&matrix).unwrap());
        let table = backend.table(matrix).unwrap();
        let lookup = |ids: &[u32]| {
            let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 8 };
            let mut batch = batch_of(&[(0..ids.len(), 0)], 1, &mut Random::new(0));
            batch.ids = ids.to_vec();
            backend.place(&mut batch, heads, &[]).unwrap();
            backend.embedding(&table, &batch)
        };
        let rows = lookup(&[39, 0, 8]).unwrap();
        let want: Vec<_> =
            [39, 0, 8].into_iter().flat_map(|id| all[id * 64..][..64].to_vec()).collect();
        assert_close(&values(&rows), &want, 1e-3, || format!("{dtype:?}"));
        let got = backend.gather_rows(&rows, &[1, 1, 0]).unwrap();
        assert_eq!(
            values(&got),
            [&values(&rows)[64..128], &values(&rows)[64..128], &values(&rows)[..64]].concat()
        );
        let error = lookup(&[40]).unwrap_err().to_string();
        assert!(error.contains("below 40") && error.contains("given: 40"), "{error}");
        let tied = backend.tied(&table).unwrap();
        assert_eq!((tied.in_features(), tied.out_features()), (64, 40));
    }
}

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
            check_attention(&mut random, &backend, dtype, heads, (case, window));
        }
    }
}

/// Two steps: three sequences of 15, 16 and 330 tokens, then one more token for each.
fn check_attention(
    random: &mut Random,
    backend: &Backend,
    dtype: DType,
    heads: Heads,
    (case, window): (usize, Option<usize>),
) {
    let (op, plain) = rope_op(random, backend, heads.head_dim, case, 340);
    let num_blocks = 28;
    let queries = heads.num_heads * heads.head_dim;
    let keys = heads.num_kv_heads * heads.head_dim;
    let width = queries + 2 * keys + 8;
    let kv = backend.layer_kv(num_blocks, heads).unwrap();
    let mut cache = reference::Cache::new(num_blocks, heads);
    let attention = AttentionOp { scale: 0.7 / (heads.head_dim as f32).sqrt(), window };
    let tables = batch_of(&[(0..16, 0), (16..33, 0), (33..364, 0)], num_blocks as u32, random);
    for lens in [[(0, 15), (0, 16), (0, 330)], [(15, 1), (16, 1), (330, 1)]] {
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
        cache.write((&qkv, width), heads, &batch, |x| round_like_cache(x, stored));
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
        for ((num_heads, num_kv_heads, head_dim), window) in
            [((3, 1, 64), None), ((4, 2, 16), Some(300)), ((1, 1, 32), Some(33))]
        {
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
fn steps_of_a_size_that_has_run_take_no_memory_from_the_driver() {
    let mut random = Random::new(9);
    let backend = gpu(DType::BFloat16);
    let packed = backend.pack(&[stored(&mut random, &[64, 64], Encoding::BF16)], None).unwrap();
    let x = activations(&backend, &mut random.floats(4 * 64), &[4, 64]);
    let step = || drop(backend.linear(&backend.linear(&x, &packed).unwrap(), &packed).unwrap());
    step();
    let before = emulator::count(c"allocations");
    (0..5).for_each(|_| step());
    assert_eq!(emulator::count(c"allocations"), before);
}

fn tokens_of(backend: &Backend, logits: &Tensor, draws: &[(u32, Draw)]) -> Vec<Option<u32>> {
    let drawn = backend.draw(logits, draws).unwrap().wait().unwrap().into_iter();
    drawn.map(|drawn| Some(drawn?.token)).collect()
}

/// Tokens of the device and of the sampler, for random rows and these options.
fn check_draws(random: &mut Random, backend: &Backend, vocab: usize, options: &SamplingOptions) {
    let params = SamplingParams::new(options, vocab).unwrap();
    let rows = 12;
    let mut logits: Vec<f32> = random.floats(rows * vocab).iter().map(|x| 12.0 * x).collect();
    for x in &mut logits[..6 * vocab] {
        *x = (2.0 * *x).round() / 2.0; // with many ties
    }
    let device = residual(backend, &logits, &[rows, vocab]);
    let (mut draws, mut want) = (Vec::new(), Vec::new());
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let mut state = SampleState::new(row as u64, 0);
        let tokens = [1, 2, 3];
        let row_of = Row { logits, tokens: &tokens, num_prompt: 2, params: &params, mask: None };
        draws.push((row as u32, row_of.draw(&state).expect("plain")));
        want.push(Some(Sampler::new(Vec::new()).sample(&row_of, &mut state).unwrap()));
    }
    let got = tokens_of(backend, &device, &draws);
    assert_eq!(got, want, "{vocab} ids, {options:?}");
    // In another batch the same.
    let some: Vec<_> = draws.iter().copied().step_by(5).rev().collect();
    let expect: Vec<_> = want.iter().copied().step_by(5).rev().collect();
    assert_eq!(tokens_of(backend, &device, &some), expect);
}

#[test]
fn draws_are_the_samplers() {
    let mut random = Random::new(12);
    let backend = gpu(DType::BFloat16);
    for vocab in [3, 40, 1000, 3000] {
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (1.0, 0, 1.0, 0.0),
            (4.0, 5, 1.0, 0.0),
            (1.5, 0, 0.7, 0.0),
            (2.0, 0, 1.0, 0.05),
            (3.0, 50, 0.9, 0.01),
            (9.0, 1, 0.5, 0.0),
            (0.3, 0, 1e-3, 1.0),
            (100.0, 2000, 0.999, 0.0),
        ] {
            let options =
                SamplingOptions { temperature, top_k, top_p, min_p, ..SamplingOptions::default() };
            check_draws(&mut random, &backend, vocab, &options);
        }
    }
}

#[test]
fn logprobs_are_the_samplers() {
    let mut random = Random::new(13);
    let backend = gpu(DType::BFloat16);
    for vocab in [3, 40, 1000, 3000] {
        let mut logits: Vec<f32> = random.floats(6 * vocab).iter().map(|x| 12.0 * x).collect();
        for x in &mut logits[..3 * vocab] {
            *x = (*x / 4.0).round(); // with many ties
        }
        let device = residual(&backend, &logits, &[6, vocab]);
        for tops in [[Some(0), None, Some(5)], [Some(1), Some(64), Some(vocab.min(20))]] {
            let draw = |row: usize| Draw {
                inverse_temperature: Some(0.1),
                top_k: None,
                top_p: 1.0,
                min_p: 0.0,
                uniform: row as f64 / 6.0,
                logprobs: tops[row % 3],
            };
            let draws: Vec<_> = (0..6).map(|row| (row as u32, draw(row))).collect();
            let drawn = backend.draw(&device, &draws).unwrap().wait().unwrap();
            let drawn = drawn.into_iter().map(Option::unwrap);
            for (row, Drawn { token, logprobs }) in drawn.enumerate() {
                let logits = &logits[row * vocab..][..vocab];
                let want = tops[row % 3].map(|top| token_logprobs(logits, token, top).unwrap());
                let ids = |list: &[TokenLogprob]| {
                    list.iter().map(|entry| (entry.id, entry.rank)).collect::<Vec<_>>()
                };
                assert_eq!(logprobs.as_deref().map(ids), want.as_deref().map(ids));
                for (got, want) in logprobs.iter().flatten().zip(want.iter().flatten()) {
                    assert!((got.logprob - want.logprob).abs() < 2e-6, "{got:?} {want:?}");
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_no_row_of_numbers_gives_no_token() {
    let backend = gpu(DType::Float32);
    let draw = Draw {
        inverse_temperature: None,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        uniform: 0.5,
        logprobs: Some(1),
    };
    for (bad, want) in
        [(f32::NAN, None), (f32::INFINITY, None), (f32::NEG_INFINITY, None), (2.0, Some(1))]
    {
        let logits = residual(&backend, &[0.0, 1.0, -1.0, 1.0, 1.0, bad], &[2, 3]);
        let draws = [(0, draw), (1, draw)];
        let second = want.map(|_| 2);
        assert_eq!(tokens_of(&backend, &logits, &draws), [Some(1), second], "{bad}");
    }
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn faults_are_reported() {
    assert_eq!(emulator::report_of(c"broken_nowhere"), None);
    for (kernel, expect) in [
        (c"broken_read_past_the_end", "past the end of an allocation of 256 bytes"),
        (c"broken_write_before_the_start", "before an allocation of 256 bytes"),
        (c"broken_use_after_free", "freed memory"),
        (c"broken_barrier_of_some", "a barrier is not reached by all threads"),
        (c"broken_shuffle_of_some", "the lanes of a warp do not all reach"),
        (c"broken_different_operations", "lanes of a warp do different things"),
        (c"broken_race_of_write_and_read", "shared memory race"),
        (c"broken_race_of_two_writes", "shared memory race"),
        (c"broken_race_with_an_atomic", "shared memory race"),
        (c"broken_shared_memory_not_written", "read before it is written"),
        (c"broken_shared_memory_past_the_end", "index 64 of an array of 64"),
        (c"broken_copy_not_awaited", "copies to shared memory that nobody has waited for"),
        (c"broken_copy_into_what_others_read", "shared memory race"),
        (c"broken_unaligned_load", "no multiple of 16"),
        (c"broken_unaligned_store", "no multiple of its alignment"),
        (
            c"broken_prefetch_past_the_end",
            "prefetch: access to past the end of an allocation of 256 bytes",
        ),
        (c"broken_no_wait", "a thread ends without await_previous"),
        (c"broken_early_write", "accessed before await_previous"),
        (c"broken_early_read", "accessed before await_previous"),
    ] {
        let report = emulator::report_of(kernel).unwrap_or_default();
        assert!(report.contains(expect), "{kernel:?}: {report:?}");
    }
}

#[test]
fn what_the_gpu_cannot_do_is_an_error_that_says_so() {
    let mut random = Random::new(10);
    let backend = gpu(DType::BFloat16);
    let packed = backend.pack(&[stored(&mut random, &[4, 36], Encoding::F32)], None).unwrap();
    let x = activations(&backend, &mut random.floats(36), &[1, 36]);
    let error = backend.linear(&x, &packed).unwrap_err().to_string();
    assert!(error.contains("multiple of 8 inputs; given: 36"), "{error}");
    let error = Backend::cuda(99, DType::Auto).unwrap_err().to_string();
    assert!(error.contains("GPU 99 cannot be used"), "{error}");
}
