//! Sixteen lanes on 64-bit ARM: four NEON registers, which every such CPU has.
#![allow(unsafe_code)] // Loads and stores go through raw pointers.
#![allow(clippy::wildcard_imports)] // The file is about these intrinsics.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::lanes::Lanes;

/// Four registers of four lanes.
#[derive(Clone, Copy)]
pub(super) struct Neon([float32x4_t; 4]);

/// `$value` for each `$quarter` of the lanes.
macro_rules! quarters {
    ($quarter:ident => $value:expr) => {
        // SAFETY: every CPU of this architecture has NEON; for loads and stores the caller's contract covers the
        // pointer.
        unsafe {
            [
                { const $quarter: usize = 0; $value },
                { const $quarter: usize = 1; $value },
                { const $quarter: usize = 2; $value },
                { const $quarter: usize = 3; $value },
            ]
        }
    };
}

impl Neon {
    /// # Safety
    /// `p` is valid for reads of 8 values.
    #[inline(always)]
    unsafe fn widen_f16(p: *const f16) -> [float32x4_t; 2] {
        let (low, high);
        // SAFETY: conversions of f16 to f32 are part of NEON; they touch no memory.
        unsafe {
            asm!(
                "fcvtl {low:v}.4s, {halves:v}.4h",
                "fcvtl2 {high:v}.4s, {halves:v}.8h",
                halves = in(vreg) vld1q_u16(p.cast()),
                low = out(vreg) low,
                high = out(vreg) high,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        [low, high]
    }
}

impl Lanes for Neon {
    type Bits = [uint32x4_t; 4];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(quarters!(_Q => vdupq_n_f32(x)))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(quarters!(Q => vld1q_f32(p.add(4 * Q))))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        Self(quarters!(Q => {
            let words = vmovl_u16(vld1_u16(p.add(4 * Q).cast()));
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(words))
        }))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller's contract.
        let [[a, b], [c, d]] = unsafe { [Self::widen_f16(p), Self::widen_f16(p.add(8))] };
        Self([a, b, c, d])
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller's contract; NEON is there.
        let halves = unsafe {
            let bytes = vld1q_s8(p);
            [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)]
        };
        Self(quarters!(Q => {
            let half = halves[Q / 2];
            let words =
                if Q.is_multiple_of(2) { vmovl_s16(vget_low_s16(half)) } else { vmovl_high_s16(half) };
            vcvtq_f32_s32(words)
        }))
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8) -> Self::Bits {
        quarters!(Q => vreinterpretq_u32_u8(vld1q_u8(p.add(16 * Q))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        quarters!(Q => vst1q_f32(p.add(4 * Q), self.0[Q]));
    }
    #[inline(always)]
    fn nibble(bits: Self::Bits, shift: u32, offset: f32) -> Self {
        Self(quarters!(Q => {
            let shifted = vshlq_u32(bits[Q], vdupq_n_s32(-shift.cast_signed()));
            let low = vandq_u32(shifted, vdupq_n_u32(15));
            vsubq_f32(vcvtq_f32_u32(low), vdupq_n_f32(offset))
        }))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(quarters!(Q => vaddq_f32(self.0[Q], other.0[Q])))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(quarters!(Q => vsubq_f32(self.0[Q], other.0[Q])))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(quarters!(Q => vmulq_f32(self.0[Q], other.0[Q])))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(quarters!(Q => vdivq_f32(self.0[Q], other.0[Q])))
    }
    #[inline(always)]
    fn fma(self, factor: Self, summand: Self) -> Self {
        Self(quarters!(Q => vfmaq_f32(summand.0[Q], self.0[Q], factor.0[Q])))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(quarters!(Q => {
            vbslq_f32(vcgtq_f32(self.0[Q], other.0[Q]), self.0[Q], other.0[Q])
        }))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(quarters!(Q => {
            vbslq_f32(vcltq_f32(self.0[Q], other.0[Q]), self.0[Q], other.0[Q])
        }))
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        Self(quarters!(Q => {
            let exponent = vshlq_n_s32::<23>(vcvtq_s32_f32(n.0[Q]));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(self.0[Q]), exponent))
        }))
    }
    #[inline(always)]
    fn select(self, mask: u16, other: Self) -> Self {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        Self(quarters!(Q => {
            let chosen = vtstq_u32(vdupq_n_u32(u32::from(mask >> (4 * Q))), vld1q_u32(BITS.as_ptr()));
            vbslq_f32(chosen, self.0[Q], other.0[Q])
        }))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: NEON is there.
        unsafe { vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d))) }
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: NEON is there.
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, b), vmaxq_f32(c, d))) }
    }
}
