//! What this machine can do at most, measured: the rates that kernels are compared with.
#![allow(unsafe_code, reason = "the arithmetic peak needs the instructions themselves")]

use std::hint::black_box;
use std::time::Instant;

use astrai_rs::backend::Backend;
use candle_core::Tensor;

/// Bytes that are read, or copied: far more than any cache holds.
const BYTES: usize = 1 << 30;
const ROUNDS: usize = 7;

/// Rates in `10^9` per second.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// GB/s: read by all threads on a CPU, read and written by a copy on a GPU.
    pub(crate) memory: f64,
    /// GMAC/s of the instruction that linear layers use; `None` where it is not known.
    pub(crate) arithmetic: Option<f64>,
}

impl Limits {
    /// The best of several rounds.
    pub(crate) fn measure(backend: &Backend) -> Self {
        if backend.device().is_cuda() {
            return Self { memory: copied(backend), arithmetic: None };
        }
        let threads = backend.num_threads();
        Self { memory: read(threads), arithmetic: multiplied(backend.tier(), threads) }
    }

    pub(crate) fn print(&self) {
        let arithmetic =
            self.arithmetic.map_or("not known".into(), |rate| format!("{rate:.0} GMAC/s"));
        println!("limits of this machine: memory {:.1} GB/s, arithmetic {arithmetic}", self.memory);
    }
}

/// Seconds of the fastest round.
fn fastest(mut round: impl FnMut()) -> f64 {
    let times = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        round();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

fn copied(backend: &Backend) -> f64 {
    let numbers: Vec<u32> = (0..BYTES as u32 / 4).collect();
    let from = Tensor::from_vec(numbers, BYTES / 4, backend.device()).expect("memory");
    let wait = || backend.device().synchronize().expect("waits");
    wait();
    let seconds = fastest(|| {
        black_box(from.copy().expect("copies"));
        wait();
    });
    2.0 * BYTES as f64 / seconds * 1e-9
}

fn read(threads: usize) -> f64 {
    let numbers = vec![1u64; BYTES / 8];
    let seconds = fastest(|| {
        std::thread::scope(|scope| {
            for part in numbers.chunks(numbers.len().div_ceil(threads)) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
    });
    BYTES as f64 / seconds * 1e-9
}

fn sum(numbers: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in numbers.chunks_exact(32) {
        for (sum, number) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*number);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

#[cfg(not(target_arch = "x86_64"))]
fn multiplied(_tier: &str, _threads: usize) -> Option<f64> {
    None
}

#[cfg(target_arch = "x86_64")]
fn multiplied(tier: &str, threads: usize) -> Option<f64> {
    const LOOPS: usize = 1 << 24;
    let (macs, products): (usize, unsafe fn(usize)) = match tier {
        "avx512bf16" => (x86::BF16_MACS, x86::bf16),
        "avx512" | "avx512vnni" => (x86::FMA512_MACS, x86::fma512),
        "avx2" | "avxvnni" => (x86::FMA256_MACS, x86::fma256),
        _ => return None,
    };
    let seconds = fastest(|| {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                // SAFETY: this CPU has what its tier needs.
                scope.spawn(move || unsafe { products(LOOPS) });
            }
        });
    });
    Some((macs * LOOPS * threads) as f64 / seconds * 1e-9)
}

/// Loops over independent products, enough of them to hide how long one takes.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm512_cvtne2ps_pbh,
        _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps,
    };
    use std::hint::black_box;

    const CHAINS: usize = 12;
    pub(super) const BF16_MACS: usize = 32 * CHAINS;
    pub(super) const FMA512_MACS: usize = 16 * CHAINS;
    pub(super) const FMA256_MACS: usize = 8 * CHAINS;

    macro_rules! peak {
        ($name:ident, $features:literal, $vector:ty, $zero:expr, $input:expr, $product:expr) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(loops: usize) {
                let (a, b) = (black_box($input), black_box($input));
                let mut sums: [$vector; CHAINS] = [$zero; CHAINS];
                for _ in 0..loops {
                    for sum in &mut sums {
                        *sum = $product(*sum, a, b);
                    }
                }
                black_box(sums);
            }
        };
    }

    peak! {
        bf16, "avx512f,avx512bw,avx512bf16", __m512, _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3)), _mm512_dpbf16_ps
    }
    peak! {
        fma512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(1e-3),
        |sum, a, b| _mm512_fmadd_ps(a, b, sum)
    }
    peak! {
        fma256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(1e-3),
        |sum, a, b| _mm256_fmadd_ps(a, b, sum)
    }
}
