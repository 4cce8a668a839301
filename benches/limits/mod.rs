//! What this machine can do at most, measured: the rates that kernels are compared with.
#![allow(unsafe_code, reason = "the arithmetic peak needs the instructions themselves")]

use std::hint::black_box;
use std::time::Instant;

use astrai_rs::backend::Backend;
use astrai_rs::weights::Encoding;
use candle_core::Tensor;

/// The wheel's, which the library brings itself where it is built for Python.
#[cfg(not(feature = "python"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    /// The same for quantised weights where they meet integers of 16 bits.
    pub(crate) integers: Option<f64>,
}

impl Limits {
    /// The best of several rounds.
    pub(crate) fn measure(backend: &Backend) -> Self {
        if backend.device().is_cuda() {
            return Self { memory: copied(backend), arithmetic: None, integers: None };
        }
        let (tier, threads) = (backend.tier(), backend.num_threads());
        let [arithmetic, integers] = multiplied(tier, threads);
        Self { memory: read(threads), arithmetic, integers }
    }

    /// GMAC/s of the instruction that meets such weights.
    pub(crate) fn products(&self, encoding: Encoding) -> Option<f64> {
        match encoding {
            Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q8_0 => self.integers.or(self.arithmetic),
            _ => self.arithmetic,
        }
    }

    pub(crate) fn print(&self) {
        let known = |rate: f64| format!("{rate:.0} GMAC/s");
        let arithmetic = self.arithmetic.map_or("not known".into(), known);
        let integers =
            self.integers.map_or(String::new(), |rate| format!(", of integers {}", known(rate)));
        println!(
            "limits of this machine: memory {:.1} GB/s, arithmetic {arithmetic}{integers}",
            self.memory
        );
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

/// What all threads read, each a part.
pub(crate) struct Reading {
    numbers: Vec<u64>,
    threads: usize,
}

impl Reading {
    pub(crate) fn new(threads: usize) -> Self {
        Self { numbers: vec![1; BYTES / 8], threads }
    }

    /// GB/s, once.
    pub(crate) fn rate(&self) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in self.numbers.chunks(self.numbers.len().div_ceil(self.threads)) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        BYTES as f64 / start.elapsed().as_secs_f64() * 1e-9
    }
}

fn read(threads: usize) -> f64 {
    let reading = Reading::new(threads);
    (0..ROUNDS).map(|_| reading.rate()).fold(0.0, f64::max)
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

/// Of the numbers that a tier multiplies, and of integers where it has them.
#[cfg(not(target_arch = "x86_64"))]
fn multiplied(_tier: &str, _threads: usize) -> [Option<f64>; 2] {
    [None; 2]
}

/// Of the numbers that a tier multiplies, and of integers where it has them.
#[cfg(target_arch = "x86_64")]
fn multiplied(tier: &str, threads: usize) -> [Option<f64>; 2] {
    const LOOPS: usize = 1 << 24;
    type Loop = (usize, unsafe fn(usize));
    let loops: [Option<Loop>; 2] = match tier {
        "avx512bf16" => [Some((32, x86::bf16)), None],
        "avx512vnni" => [Some((16, x86::fma512)), Some((32, x86::dot512))],
        "avx512" => [Some((16, x86::fma512)), None],
        "avxvnni" => [Some((8, x86::fma256)), Some((16, x86::dot256))],
        "avx2" => [Some((8, x86::fma256)), Some((16, x86::multiply_add))],
        _ => [None; 2],
    };
    loops.map(|known| {
        let (macs, products) = known?;
        let seconds = fastest(|| {
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    // SAFETY: this CPU has what its tier needs.
                    scope.spawn(move || unsafe { products(LOOPS) });
                }
            });
        });
        Some((macs * x86::CHAINS * LOOPS * threads) as f64 / seconds * 1e-9)
    })
}

/// Loops over independent products, enough of them to hide how long one takes.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m256, __m256i, __m512, __m512i, _mm256_dpwssd_avx_epi32, _mm256_fmadd_ps,
        _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
        _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_dpwssd_epi32, _mm512_fmadd_ps,
        _mm512_set1_epi16, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    /// Products of one round of a loop.
    pub(super) const CHAINS: usize = 12;

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
    peak! {
        dot512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_set1_epi16(3),
        |sum, a, b| _mm512_dpwssd_epi32(sum, a, b)
    }
    peak! {
        dot256, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_set1_epi16(3),
        |sum, a, b| _mm256_dpwssd_avx_epi32(sum, a, b)
    }
    peak! {
        multiply_add, "avx2", __m256i, _mm256_setzero_si256(), _mm256_set1_epi16(3),
        |mut sum: __m256i, a: __m256i, b: __m256i| {
            // As assembly: the product is the same every time, and the compiler would see that.
            // SAFETY: AVX2, on registers.
            unsafe {
                asm!(
                    "vpmaddwd {product}, {a}, {b}",
                    "vpaddd {sum}, {sum}, {product}",
                    product = out(ymm_reg) _, sum = inout(ymm_reg) sum, a = in(ymm_reg) a,
                    b = in(ymm_reg) b, options(nomem, nostack, preserves_flags)
                );
            }
            sum
        }
    }
}
