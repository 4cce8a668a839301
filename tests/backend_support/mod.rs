//! Random inputs, stored tensors and comparisons for the tests of ops.

#![allow(dead_code)] // Each test takes what it needs.

use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

use astrai_rs::backend::{Backend, Batch, Run, reference};
use astrai_rs::cache::block::BlockId;
use astrai_rs::config::{BLOCK_SIZE, DType, KvCacheDType};
use astrai_rs::weights::{Bytes, Encoding, StoredTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

/// A small generator of the same numbers every time (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Uniform in -1.5..1.5.
    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() % (1 << 20)) as f32 * 3.0 / (1 << 20) as f32 - 1.5).collect()
    }
}

/// One backend per tier that this machine has.
pub(crate) fn backends(threads: usize, dtype: DType) -> Vec<Backend> {
    Backend::cpu_tiers()
        .into_iter()
        .map(|tier| Backend::cpu_with_tier(Some(threads), dtype, tier).unwrap())
        .collect()
}

/// The same with an int8 cache.
pub(crate) fn with_int8_cache(backends: Vec<Backend>) -> Vec<Backend> {
    let int8 = |backend: Backend| backend.with_kv_cache(KvCacheDType::Int8).unwrap();
    backends.into_iter().map(int8).collect()
}

pub(crate) fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

pub(crate) fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// A random tensor whose numbers lie around 1.
pub(crate) fn stored(random: &mut Random, shape: &[usize], encoding: Encoding) -> StoredTensor {
    let len: usize = shape.iter().product();
    let mut data = Vec::new();
    match encoding {
        Encoding::F32 => random.floats(len).iter().for_each(|x| data.extend(x.to_le_bytes())),
        Encoding::F16 => {
            random.floats(len).iter().for_each(|&x| data.extend(f16::from_f32(x).to_le_bytes()));
        }
        Encoding::BF16 => {
            random.floats(len).iter().for_each(|&x| data.extend(bf16::from_f32(x).to_le_bytes()));
        }
        Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q8_0 => {
            let unit = if encoding == Encoding::Q8_0 { 1.0 / 127.0 } else { 1.0 / 8.0 };
            for _ in 0..len / 32 {
                let scale = random.floats(2);
                data.extend(f16::from_f32(scale[0] * unit).to_le_bytes());
                if encoding == Encoding::Q4_1 {
                    data.extend(f16::from_f32(scale[1]).to_le_bytes());
                }
                let bytes = if encoding == Encoding::Q8_0 { 32 } else { 16 };
                data.extend((0..bytes).map(|_| random.next() as u8));
            }
        }
    }
    let len = data.len();
    let bytes = Bytes::new(Arc::new(data), 0..len).unwrap();
    StoredTensor::new("weight", shape.to_vec(), encoding, bytes).unwrap()
}

/// Runs of `rows` that start at a position, over random different blocks of `num_blocks`.
pub(crate) fn batch_of(
    runs: &[(Range<usize>, u32)],
    num_blocks: u32,
    random: &mut Random,
) -> Batch {
    let mut free: Vec<_> = (0..num_blocks).collect();
    let mut batch = Batch::default();
    for (rows, start) in runs {
        let first = batch.blocks.len();
        let end = *start as usize + rows.len();
        for _ in 0..end.div_ceil(BLOCK_SIZE) {
            batch.blocks.push(BlockId(free.swap_remove(random.below(free.len()))));
        }
        batch.positions.extend(*start..end as u32);
        batch.runs.push(Run { rows: rows.clone(), blocks: first..batch.blocks.len() });
    }
    batch
}

pub(crate) fn round_like_cache(x: f32, dtype: candle_core::DType) -> f32 {
    match dtype {
        candle_core::DType::BF16 => bf16::from_f32(x).to_f32(),
        candle_core::DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Makes of a head's key, and of its value, what pages of this type keep.
pub(crate) fn round_heads(dtype: candle_core::DType) -> (impl Fn(&mut [f32]), impl Fn(&mut [f32])) {
    let int8 = dtype == candle_core::DType::I16;
    let round = move |head: &mut [f32]| {
        for x in head {
            *x = round_like_cache(*x, dtype);
        }
    };
    (
        move |head: &mut [f32]| if int8 { reference::round_key_to_int8(head) } else { round(head) },
        move |head: &mut [f32]| {
            if int8 { reference::round_value_to_int8(head) } else { round(head) }
        },
    )
}

/// `|got - want| <= tolerance * (1 + |want|)` for all numbers.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: impl Fn() -> String) {
    assert_eq!(got.len(), want.len(), "{}", what());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * (1.0 + want.abs()),
            "{}: number {i} is {got}, expected {want} within {tolerance}",
            what()
        );
    }
}

/// The GPU: each time a new one when it is emulated, and one for all of a process when it is not, since
/// it takes a while to open.
#[cfg(feature = "cuda")]
pub(crate) fn gpu(dtype: DType) -> Backend {
    static OPEN: Mutex<Vec<(DType, Backend)>> = Mutex::new(Vec::new());
    let open = || Backend::cuda(0, dtype).expect("a GPU");
    if cfg!(feature = "cuda-emulator") {
        return open();
    }
    let mut backends = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, backend)) = backends.iter().find(|(known, _)| *known == dtype) {
        return backend.clone();
    }
    backends.push((dtype, open()));
    backends[backends.len() - 1].1.clone()
}
