//! The CUDA kernels, on an emulated GPU or, without the feature `cuda-emulator`, on a real one: every op
//! against `backend::reference`, and batch invariance bit for bit.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // A failure is the test's.

#[path = "cuda/attention.rs"]
mod attention;
mod backend_support;
#[path = "cuda/draws.rs"]
mod draws;
#[path = "cuda/linear.rs"]
mod linear;

#[cfg(feature = "cuda-emulator")]
use astrai_rs::backend::emulator;
use astrai_rs::backend::{Backend, Heads, reference};
use astrai_rs::config::DType;
use astrai_rs::spec::Activation;
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

fn dtype_of(backend: &Backend) -> DType {
    match backend.activation_dtype() {
        CandleType::F32 => DType::Float32,
        CandleType::F16 => DType::Float16,
        _ => DType::BFloat16,
    }
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

#[cfg(feature = "cuda-emulator")]
#[test]
fn a_step_may_take_new_memory_while_it_is_captured() {
    let mut random = Random::new(15);
    let backend = gpu(DType::BFloat16);
    let table = backend.table(stored(&mut random, &[40, 4096], Encoding::BF16)).unwrap();
    let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let mut graphs = backend.decode_graphs(heads, &[None], (1, 64)).unwrap().unwrap();
    let launches = emulator::count(c"graph launches");
    let mut calls = 0;
    for _ in 0..2 {
        let mut batch = batch_of(&[(0..1, 0)], 4, &mut random);
        batch.ids = vec![3];
        let forward = |batch: &_| {
            calls += 1;
            let _more = (calls > 1).then(|| backend.embedding(&table, batch)).transpose()?;
            backend.embedding(&table, batch).map(Some)
        };
        graphs.run(batch, forward).unwrap();
    }
    // One to compute, one to capture, and then the graph.
    assert_eq!((calls, emulator::count(c"graph launches") - launches), (2, 1));
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn a_step_that_finds_no_memory_for_its_graph_has_run() {
    let mut random = Random::new(18);
    let backend = gpu(DType::BFloat16);
    let table = backend.table(stored(&mut random, &[40, 64], Encoding::BF16)).unwrap();
    let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let mut graphs = backend.decode_graphs(heads, &[None], (1, 64)).unwrap().unwrap();
    let launches = emulator::count(c"graph launches");
    let mut calls = 0;
    for _ in 0..3 {
        let mut batch = batch_of(&[(0..1, 0)], 4, &mut random);
        batch.ids = vec![3];
        let forward = |batch: &_| {
            calls += 1;
            let _too_much = (calls == 2).then(|| backend.layer_kv(1 << 24, heads)).transpose()?;
            backend.embedding(&table, batch).map(Some)
        };
        graphs.run(batch, forward).unwrap();
    }
    // A step and a capture that fails, both again, and the graph.
    assert_eq!((calls, emulator::count(c"graph launches") - launches), (4, 1));
}

#[test]
fn what_the_gpu_cannot_do_is_an_error_that_says_so() {
    let mut random = Random::new(10);
    let backend = gpu(DType::BFloat16);
    let packed = backend.pack(&[stored(&mut random, &[4, 36], Encoding::F32)], None).unwrap();
    let x = activations(&backend, &mut random.floats(36), &[1, 36]);
    let error = backend.linear(&x, &packed).unwrap_err().to_string();
    assert!(
        error.contains("multiple of 8 inputs, but in float32; given: a layer of 36"),
        "{error}"
    );
    let error = Backend::cuda(99, DType::Auto).unwrap_err().to_string();
    assert!(error.contains("GPU 99 cannot be used"), "{error}");
}
