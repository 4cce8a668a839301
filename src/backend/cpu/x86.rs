//! Sixteen lanes on x86-64: one AVX-512 register, or two AVX2 registers; and bf16 pairs.
#![allow(unsafe_code)] // Intrinsics need CPU features that `Tier` has detected.
#![allow(clippy::wildcard_imports)] // The file is about these intrinsics.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::lanes::Lanes;

/// Integers 0 to 15 as f32, the table behind 4-bit weights.
const NIBBLES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// One zmm register. Needs AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// Calls intrinsics on lanes. All uses share one argument.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: lanes only exist inside `Tier::run` and `product::run`, which have the features of their tier
        // enabled; for loads and stores the caller's contract covers the pointer.
        unsafe { $call }
    };
}

impl Lanes for Avx512 {
    type Bits = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(intrinsic!(_mm512_set1_ps(x)))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(intrinsic!(_mm512_loadu_ps(p)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        Self(intrinsic!({
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        Self(intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        Self(intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))))
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8) -> __m512i {
        intrinsic!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        intrinsic!(_mm512_storeu_ps(p, self.0));
    }
    #[inline(always)]
    fn nibble(bits: __m512i, shift: u32, offset: f32) -> Self {
        Self(intrinsic!({
            // The permutation reads only the low four bits of each index.
            let index = _mm512_srl_epi32(bits, _mm_cvtsi32_si128(shift as i32));
            let table = _mm512_sub_ps(_mm512_loadu_ps(NIBBLES.as_ptr()), _mm512_set1_ps(offset));
            _mm512_permutexvar_ps(index, table)
        }))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn fma(self, factor: Self, summand: Self) -> Self {
        Self(intrinsic!(_mm512_fmadd_ps(self.0, factor.0, summand.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        Self(intrinsic!(_mm512_scalef_ps(self.0, n.0)))
    }
    #[inline(always)]
    fn select(self, mask: u16, other: Self) -> Self {
        Self(intrinsic!(_mm512_mask_blend_ps(mask, other.0, self.0)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(self.0))
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(self.0))
    }
}

/// Two ymm registers. Needs AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

impl Avx2 {
    #[inline(always)]
    unsafe fn widen_bf16(p: *const bf16) -> __m256 {
        intrinsic!({
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        })
    }

    #[inline(always)]
    fn nibble_half(bits: __m256i, shift: u32, offset: f32) -> __m256 {
        intrinsic!({
            let shifted = _mm256_srl_epi32(bits, _mm_cvtsi32_si128(shift as i32));
            let low = _mm256_and_si256(shifted, _mm256_set1_epi32(15));
            _mm256_sub_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(offset))
        })
    }

    #[inline(always)]
    fn scale_half(x: __m256, n: __m256) -> __m256 {
        intrinsic!({
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent))
        })
    }

    #[inline(always)]
    fn select_half(bits: u16, a: __m256, b: __m256) -> __m256 {
        intrinsic!({
            let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let chosen = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), bit);
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, bit)))
        })
    }
}

/// An intrinsic on both halves.
macro_rules! halves {
    ($intrinsic:ident($a:expr, $b:expr)) => {
        Avx2(intrinsic!($intrinsic($a.0, $b.0)), intrinsic!($intrinsic($a.1, $b.1)))
    };
}

impl Lanes for Avx2 {
    type Bits = [__m256i; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        let half = intrinsic!(_mm256_set1_ps(x));
        Self(half, half)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        intrinsic!(Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        intrinsic!(Self(Self::widen_bf16(p), Self::widen_bf16(p.add(8))))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        intrinsic!(Self(
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
        ))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        intrinsic!(Self(
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
        ))
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8) -> [__m256i; 2] {
        intrinsic!([_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())])
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        intrinsic!({
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        });
    }
    #[inline(always)]
    fn nibble(bits: [__m256i; 2], shift: u32, offset: f32) -> Self {
        let [a, b] = bits;
        Self(Self::nibble_half(a, shift, offset), Self::nibble_half(b, shift, offset))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        halves!(_mm256_add_ps(self, other))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        halves!(_mm256_sub_ps(self, other))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        halves!(_mm256_mul_ps(self, other))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        halves!(_mm256_div_ps(self, other))
    }
    #[inline(always)]
    fn fma(self, factor: Self, summand: Self) -> Self {
        intrinsic!(Self(
            _mm256_fmadd_ps(self.0, factor.0, summand.0),
            _mm256_fmadd_ps(self.1, factor.1, summand.1),
        ))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        halves!(_mm256_max_ps(self, other))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        halves!(_mm256_min_ps(self, other))
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        Self(Self::scale_half(self.0, n.0), Self::scale_half(self.1, n.1))
    }
    #[inline(always)]
    fn select(self, mask: u16, other: Self) -> Self {
        Self(
            Self::select_half(mask & 255, self.0, other.0),
            Self::select_half(mask >> 8, self.1, other.1),
        )
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsic!({
            let x = _mm256_add_ps(self.0, self.1);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ps(x, _mm_shuffle_ps::<1>(x, x)))
        })
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        intrinsic!({
            let x = _mm256_max_ps(self.0, self.1);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ps(x, _mm_shuffle_ps::<1>(x, x)))
        })
    }
}

/// Sixteen rows' pairs of 16-bit numbers, in whatever registers they take.
pub(super) trait PairWords: Copy {
    /// # Safety
    /// `p` is valid for reads of 64 bytes.
    unsafe fn load(p: *const u8) -> Self;
    /// Sixteen pairs of i8, exact.
    ///
    /// # Safety
    /// `p` is valid for reads of 32 bytes.
    unsafe fn load_i8(p: *const u8) -> Self;
    /// # Safety
    /// `p` is valid for writes of 64 bytes.
    unsafe fn store(self, p: *mut u8);
}

/// Sixteen rows' pairs of 16-bit integers, or sixteen 32-bit ones, in two registers. Needs AVX2.
#[derive(Clone, Copy)]
pub(super) struct Integers(__m256i, __m256i);

impl PairWords for Integers {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        intrinsic!(Self(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        intrinsic!(Self(
            _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(16).cast())),
        ))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        intrinsic!({
            _mm256_storeu_si256(p.cast(), self.0);
            _mm256_storeu_si256(p.add(32).cast(), self.1);
        });
    }
}

impl Integers {
    /// Bits `4 * step..4 * step + 4` of each 16-bit word.
    #[inline(always)]
    pub(super) fn nibble(self, step: usize) -> Self {
        intrinsic!({
            let (count, low) = (_mm_cvtsi32_si128(4 * step as i32), _mm256_set1_epi16(15));
            Self(
                _mm256_and_si256(_mm256_srl_epi16(self.0, count), low),
                _mm256_and_si256(_mm256_srl_epi16(self.1, count), low),
            )
        })
    }

    /// The same 32 bits sixteen times.
    #[inline(always)]
    pub(super) fn splat(word: i32) -> Self {
        let half = intrinsic!(_mm256_set1_epi32(word));
        Self(half, half)
    }

    /// `sum + self · other`, pair by pair.
    #[inline(always)]
    pub(super) fn dot(self, other: Self, sum: Self) -> Self {
        intrinsic!(Self(
            _mm256_add_epi32(sum.0, _mm256_madd_epi16(self.0, other.0)),
            _mm256_add_epi32(sum.1, _mm256_madd_epi16(self.1, other.1)),
        ))
    }

    /// The 32-bit integers as numbers.
    #[inline(always)]
    pub(super) fn numbers(self) -> Avx2 {
        intrinsic!(Avx2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)))
    }

    /// Numbers rounded to 32-bit integers.
    #[inline(always)]
    pub(super) fn from_numbers(numbers: Avx2) -> Self {
        intrinsic!(Self(_mm256_cvtps_epi32(numbers.0), _mm256_cvtps_epi32(numbers.1)))
    }

    /// Numbers times `factor`, rounded to integers within ±32767: sixteen pairs, and their sum.
    #[inline(always)]
    pub(super) fn round(numbers: &[f32; 32], factor: f32) -> ([u32; 16], i32) {
        let (mut words, ones) = ([0; 16], Self::splat(0x1_0001));
        let sum = intrinsic!({
            let factor = _mm256_set1_ps(factor);
            macro_rules! pairs {
                ($at:literal) => {{
                    let low = _mm256_mul_ps(_mm256_loadu_ps(numbers.as_ptr().add($at)), factor);
                    let high =
                        _mm256_mul_ps(_mm256_loadu_ps(numbers.as_ptr().add($at + 8)), factor);
                    // Both halves of a register are packed by themselves.
                    let packed =
                        _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
                }};
            }
            let pairs = Self(pairs!(0), pairs!(16));
            pairs.store(words.as_mut_ptr().cast());
            let Self(a, b) = pairs.dot(ones, Self::splat(0));
            let sum = _mm256_add_epi32(a, b);
            let sum =
                _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
        });
        (words, sum)
    }
}

/// Sixteen rows' pairs of bf16, and the dot product that adds both products of a pair to f32 lanes.
/// Needs AVX-512 BF16 beside what [`Avx512`] needs.
#[derive(Clone, Copy)]
pub(super) struct Pairs(__m512i);

impl PairWords for Pairs {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        Self(intrinsic!(_mm512_loadu_si512(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        Self(intrinsic!({
            let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
            let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(16).cast())));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        intrinsic!(_mm512_storeu_si512(p.cast(), self.0));
    }
}

impl Pairs {
    /// Pairs of the numbers at `first` and at `second`; zeros stand in for a null `second`.
    ///
    /// # Safety
    /// `first`, and `second` unless null, are valid for reads of 16 numbers.
    #[inline(always)]
    pub(super) unsafe fn interleave(first: *const bf16, second: *const bf16) -> Self {
        Self(intrinsic!({
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.cast()));
            if second.is_null() {
                low
            } else {
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.cast()));
                _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
            }
        }))
    }

    /// Bits `4 * step..4 * step + 4` of each 16-bit word, as numbers minus `OFFSET` (0 or 8).
    #[inline(always)]
    pub(super) fn nibble<const OFFSET: usize>(self, step: usize) -> Self {
        Self(intrinsic!({
            let index = _mm512_srl_epi16(self.0, _mm_cvtsi32_si128(4 * step as i32));
            // The permutation reads only the low five bits of each index, of which the fifth
            // belongs to the next number: the table stands twice.
            let table = _mm512_loadu_si512(NIBBLE_PAIRS[OFFSET / 8].as_ptr().cast());
            _mm512_permutexvar_epi16(index, table)
        }))
    }

    /// The same pair for all rows, from its 32 bits.
    ///
    /// # Safety
    /// `p` is valid for a read.
    #[inline(always)]
    pub(super) unsafe fn broadcast(p: *const u32) -> Self {
        Self(intrinsic!(_mm512_set1_epi32(p.read().cast_signed())))
    }

    /// `sum + self · other`, pair by pair.
    #[inline(always)]
    pub(super) fn dot(self, other: Self, sum: Avx512) -> Avx512 {
        Avx512(intrinsic!(_mm512_dpbf16_ps(
            sum.0,
            std::mem::transmute::<__m512i, __m512bh>(self.0),
            std::mem::transmute::<__m512i, __m512bh>(other.0),
        )))
    }

    /// Rounds 32 consecutive f32 to 16 consecutive pairs.
    ///
    /// # Safety
    /// `from` is valid for reads of 32 f32, `to` for writes of 16 u32.
    #[inline(always)]
    pub(super) unsafe fn round(from: *const f32, to: *mut u32) {
        intrinsic!({
            let pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from.add(16)), _mm512_loadu_ps(from));
            let bits = std::mem::transmute::<__m512bh, __m512i>(pairs);
            _mm512_storeu_si512(to.cast(), bits);
        });
    }
}

/// `q` and `q - 8` of a 4-bit `q` as bf16, each table twice.
static NIBBLE_PAIRS: [[bf16; 32]; 2] = {
    let mut tables = [[bf16::ZERO; 32]; 2];
    let mut i = 0;
    while i < 32 {
        tables[0][i] = bf16::from_f32_const((i % 16) as f32);
        tables[1][i] = bf16::from_f32_const((i % 16) as f32 - 8.0);
        i += 1;
    }
    tables
};
