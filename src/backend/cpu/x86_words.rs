//! Sixteen rows' pairs of 16-bit numbers on x86-64, and their dot products: bf16 ([`Pairs`]) and [`Integers`].
#![allow(unsafe_code)] // Intrinsics need CPU features that `Tier` has detected.
#![allow(clippy::wildcard_imports)] // The file is about these intrinsics.

use std::arch::x86_64::*;

use half::bf16;

use super::lanes::Lanes;
use super::x86::{Avx2, Avx512, intrinsic};

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
            // Their upper halves have all bits that are set: faster than rounding.
            let order = _mm512_loadu_si512(ODD.as_ptr().cast());
            let (low, high) = (_mm512_castps_si512(low), _mm512_castps_si512(high));
            _mm512_permutex2var_epi16(low, order, high)
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
            let first = _mm256_loadu_si256(first.cast());
            if second.is_null() {
                _mm512_cvtepu16_epi32(first)
            } else {
                let order = _mm512_loadu_si512(IN_TURNS.as_ptr().cast());
                let second = _mm512_castsi256_si512(_mm256_loadu_si256(second.cast()));
                _mm512_permutex2var_epi16(_mm512_castsi256_si512(first), order, second)
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

/// Of two registers of 16-bit numbers: each one's odd ones.
static ODD: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = 2 * i as u16 + 1;
        i += 1;
    }
    order
};

/// Of two registers of 16-bit numbers: the first sixteen of each, in turns.
static IN_TURNS: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 32) as u16;
        i += 1;
    }
    order
};

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

/// Pairs of 16-bit integers, or else sixteen 32-bit ones. Sums are the same in all registers.
pub(super) trait Integers: PairWords {
    type L: Lanes;

    /// Bits `4 * step..4 * step + 4` of each 16-bit word.
    fn nibble(self, step: usize) -> Self;
    /// The same 32 bits sixteen times.
    fn splat(word: i32) -> Self;
    /// `self - other`, each of the 16-bit integers.
    fn minus(self, other: Self) -> Self;
    /// `sum + self · other`, pair by pair.
    fn dot(self, other: Self, sum: Self) -> Self;
    /// The 32-bit integers as numbers.
    fn numbers(self) -> Self::L;
    /// Numbers rounded to 32-bit integers.
    fn from_numbers(numbers: Self::L) -> Self;
    /// Sum of the 32-bit integers.
    fn sum(self) -> i32;
    /// Numbers times `factor`, rounded to integers within ±32767: sixteen pairs, the first of the words.
    fn round(numbers: &[f32; 32], factor: f32, words: &mut [u32; 32]);
}

/// Two ymm registers. Needs AVX2, and AVX-VNNI, which multiplies and adds at once, where `VNNI` says so.
#[derive(Clone, Copy)]
pub(super) struct Integers256<const VNNI: bool>(__m256i, __m256i);

impl<const VNNI: bool> PairWords for Integers256<VNNI> {
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

impl<const VNNI: bool> Integers256<VNNI> {
    #[inline(always)]
    fn dot_half(a: __m256i, b: __m256i, sum: __m256i) -> __m256i {
        intrinsic!(if VNNI {
            _mm256_dpwssd_avx_epi32(sum, a, b)
        } else {
            _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
        })
    }
}

impl<const VNNI: bool> Integers for Integers256<VNNI> {
    type L = Avx2;

    #[inline(always)]
    fn nibble(self, step: usize) -> Self {
        intrinsic!({
            let (count, low) = (_mm_cvtsi32_si128(4 * step as i32), _mm256_set1_epi16(15));
            Self(
                _mm256_and_si256(_mm256_srl_epi16(self.0, count), low),
                _mm256_and_si256(_mm256_srl_epi16(self.1, count), low),
            )
        })
    }
    #[inline(always)]
    fn splat(word: i32) -> Self {
        let half = intrinsic!(_mm256_set1_epi32(word));
        Self(half, half)
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_sub_epi16(self.0, other.0), _mm256_sub_epi16(self.1, other.1)))
    }
    #[inline(always)]
    fn dot(self, other: Self, sum: Self) -> Self {
        Self(Self::dot_half(self.0, other.0, sum.0), Self::dot_half(self.1, other.1, sum.1))
    }
    #[inline(always)]
    fn numbers(self) -> Avx2 {
        intrinsic!(Avx2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)))
    }
    #[inline(always)]
    fn from_numbers(numbers: Avx2) -> Self {
        intrinsic!(Self(_mm256_cvtps_epi32(numbers.0), _mm256_cvtps_epi32(numbers.1)))
    }
    #[inline(always)]
    fn sum(self) -> i32 {
        intrinsic!({
            let sum = _mm256_add_epi32(self.0, self.1);
            let sum =
                _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
        })
    }
    #[inline(always)]
    fn round(numbers: &[f32; 32], factor: f32, words: &mut [u32; 32]) {
        intrinsic!({
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
            Self(pairs!(0), pairs!(16)).store(words.as_mut_ptr().cast());
        });
    }
}

/// One zmm register. Needs AVX-512 VNNI beside what [`Avx512`] needs.
#[derive(Clone, Copy)]
pub(super) struct Integers512(__m512i);

impl PairWords for Integers512 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        Self(intrinsic!(_mm512_loadu_si512(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        Self(intrinsic!(_mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast()))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        intrinsic!(_mm512_storeu_si512(p.cast(), self.0));
    }
}

impl Integers for Integers512 {
    type L = Avx512;

    #[inline(always)]
    fn nibble(self, step: usize) -> Self {
        Self(intrinsic!({
            let shifted = _mm512_srl_epi16(self.0, _mm_cvtsi32_si128(4 * step as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi16(15))
        }))
    }
    #[inline(always)]
    fn splat(word: i32) -> Self {
        Self(intrinsic!(_mm512_set1_epi32(word)))
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_sub_epi16(self.0, other.0)))
    }
    #[inline(always)]
    fn dot(self, other: Self, sum: Self) -> Self {
        Self(intrinsic!(_mm512_dpwssd_epi32(sum.0, self.0, other.0)))
    }
    #[inline(always)]
    fn numbers(self) -> Avx512 {
        Avx512(intrinsic!(_mm512_cvtepi32_ps(self.0)))
    }
    #[inline(always)]
    fn from_numbers(numbers: Avx512) -> Self {
        Self(intrinsic!(_mm512_cvtps_epi32(numbers.0)))
    }
    #[inline(always)]
    fn sum(self) -> i32 {
        intrinsic!(_mm512_reduce_add_epi32(self.0))
    }
    #[inline(always)]
    fn round(numbers: &[f32; 32], factor: f32, words: &mut [u32; 32]) {
        intrinsic!({
            let factor = _mm512_set1_ps(factor);
            let low = _mm512_mul_ps(_mm512_loadu_ps(numbers.as_ptr()), factor);
            let high = _mm512_mul_ps(_mm512_loadu_ps(numbers.as_ptr().add(16)), factor);
            let pairs = Self(_mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low))),
                _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high)),
            ));
            pairs.store(words.as_mut_ptr().cast());
        });
    }
}
