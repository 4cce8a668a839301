//! Sixteen lanes on x86-64: one AVX-512 register, or two AVX2 registers.
#![allow(unsafe_code)] // Intrinsics need CPU features that `Tier` has detected.
#![allow(clippy::wildcard_imports)] // The file is about these intrinsics.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::lanes::{LANES, Lanes, array_of};

/// Integers 0 to 15 as f32, the table behind 4-bit weights.
const NIBBLES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// One zmm register. Needs AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512(pub(super) __m512);

/// Calls intrinsics on lanes. All uses share one argument.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: lanes only exist inside `Tier::run` and `product::run`, which have the features of their tier
        // enabled; for loads and stores the caller's contract covers the pointer.
        unsafe { $call }
    };
}
pub(super) use intrinsic;

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
    #[inline(always)]
    fn interleave(rows: [&[u32; LANES]; 8], words: &mut [u32; 8 * LANES]) {
        intrinsic!({
            let rows = array_of!(i < 8 => _mm512_loadu_si512(rows[i].as_ptr().cast()));
            // Each 128 bits, which hold four words of a row, become two words of two rows, then one of four.
            let twos = array_of!(i < 4 => {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
            });
            // By the halves of the words, the halves of the rows, and the words.
            let fours = array_of!(half < 2 => array_of!(i < 2 => {
                let (a, b) = (twos[2 * i][half], twos[2 * i + 1][half]);
                [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
            }));
            for (half, [low, high]) in fours.into_iter().enumerate() {
                // Words 4j + 2 half and the next, for each 128 bits j.
                let even = [
                    _mm512_shuffle_i32x4::<0x44>(low[0], high[0]),
                    _mm512_shuffle_i32x4::<0xee>(low[0], high[0]),
                ];
                let odd = [
                    _mm512_shuffle_i32x4::<0x44>(low[1], high[1]),
                    _mm512_shuffle_i32x4::<0xee>(low[1], high[1]),
                ];
                for i in 0..2 {
                    // Words 8i + 2 half and the next, then those four further on.
                    let to = words.as_mut_ptr().add(8 * (8 * i + 2 * half));
                    let a = _mm512_shuffle_i32x4::<0x88>(even[i], odd[i]);
                    let b = _mm512_shuffle_i32x4::<0xdd>(even[i], odd[i]);
                    _mm512_storeu_si512(to.cast(), a);
                    _mm512_storeu_si512(to.add(32).cast(), b);
                }
            }
        });
    }
}

/// Two ymm registers. Needs AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(pub(super) __m256, pub(super) __m256);

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
