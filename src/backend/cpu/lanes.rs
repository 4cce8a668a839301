//! [`Lanes`]: sixteen f32 lanes, the unit that every kernel is written in, and its portable version.
//!
//! Kernels are generic over `Lanes` and `#[inline(always)]`; [`super::tier::Tier::run`] instantiates
//! them inside a function that has the CPU features of the tier enabled. What is not inlined there
//! compiles without these features, to a call per instruction. Closures cannot be forced to be inlined,
//! so lanes are never computed in one; [`array_of`] stands in for `std::array::from_fn`.
#![allow(unsafe_code)] // Loads and stores go through raw pointers: kernels index tiles, not slices.

use half::{bf16, f16};

/// Number of lanes, of rows in a weight tile, and of tokens in a page.
pub(super) const LANES: usize = 16;

/// The array of `$value` for each `$i` below `$n`, which is at least 1.
macro_rules! array_of {
    ($i:ident < $n:expr => $value:expr) => {{
        let mut array = [{
            let $i = 0;
            $value
        }; $n];
        for $i in 1..$n {
            array[$i] = $value;
        }
        array
    }};
}
pub(super) use array_of;

/// Sixteen f32 values.
///
/// # Safety
/// Values may only be made, and functions called, inside [`super::tier::Tier::run`] and [`super::product::run`], where the
/// features are known to be present: `unsafe` methods state what else they need.
pub(crate) trait Lanes: Copy + 'static {
    /// Sixteen 32-bit words.
    type Bits: Copy;

    /// Whether the register file carries two vectors side by side for up to 8 rows, or else one for up
    /// to 6.
    const WIDE: bool;

    fn splat(x: f32) -> Self;
    /// # Safety
    /// `p` is valid for reads of 16 values; so for all loads.
    unsafe fn load(p: *const f32) -> Self;
    /// # Safety
    /// As `load`.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// # Safety
    /// As `load`.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// # Safety
    /// As `load`.
    unsafe fn load_i8(p: *const i8) -> Self;
    /// # Safety
    /// `p` is valid for reads of 64 bytes.
    unsafe fn load_bits(p: *const u8) -> Self::Bits;
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn store(self, p: *mut f32);

    /// Bits `shift..shift + 4` of each word, as a number minus `offset`.
    fn nibble(bits: Self::Bits, shift: u32, offset: f32) -> Self;

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * factor + summand`.
    fn fma(self, factor: Self, summand: Self) -> Self;
    /// The greater lane; `other` when one is NaN.
    fn max(self, other: Self) -> Self;
    /// The lesser lane; `other` when one is NaN.
    fn min(self, other: Self) -> Self;
    /// `self * 2^n` for integral `n` in `-126..=127`, where `self` and the product are normal numbers.
    fn scale_by_power(self, n: Self) -> Self;
    /// Lane `i` of `self` where bit `i` of `mask` is set, of `other` elsewhere.
    fn select(self, mask: u16, other: Self) -> Self;
    /// Sum of all lanes, always in the same order.
    fn sum(self) -> f32;
    /// Greatest lane.
    fn greatest(self) -> f32;
    /// Sixteen words of each of eight rows, `[row][word]` → `[word][row]`.
    #[inline(always)]
    fn interleave(rows: [&[u32; LANES]; 8], words: &mut [u32; 8 * LANES]) {
        for (word, eight) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *eight = array_of!(row < 8 => rows[row][word]);
        }
    }

    /// `e^x` to about 2 ulp, exactly 1 at 0; the argument is held within ±87.
    #[inline(always)]
    fn exp(self) -> Self {
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer.
        // Both return their argument when one of the two is NaN, so NaN stays NaN.
        let x = Self::splat(87.0).min(Self::splat(-87.0).max(self));
        let shifted = x.fma(Self::splat(std::f32::consts::LOG2_E), Self::splat(MAGIC));
        let n = shifted.sub(Self::splat(MAGIC));
        let r = n.fma(Self::splat(-0.693_359_4), x); // ln 2 in two parts
        let r = n.fma(Self::splat(2.121_944_4e-4), r);
        let mut y = Self::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
            y = y.fma(r, Self::splat(c));
        }
        let y = y.fma(r.mul(r), r).add(Self::splat(1.0));
        y.scale_by_power(n)
    }
}

/// Numbers that load as f32 lanes.
pub(crate) trait Element: Copy + 'static {
    /// Whether it is bf16, which also multiplies in pairs.
    const IS_BF16: bool = false;

    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn load<L: Lanes>(p: *const Self) -> L;
    fn widen(self) -> f32;
}

macro_rules! element {
    ($type:ty, $load:ident, $x:ident => $widen:expr $(, $is_bf16:expr)?) => {
        impl Element for $type {
            $(const IS_BF16: bool = $is_bf16;)?

            #[inline(always)]
            unsafe fn load<L: Lanes>(p: *const Self) -> L {
                // SAFETY: the caller's contract.
                unsafe { L::$load(p) }
            }
            #[inline(always)]
            fn widen(self) -> f32 {
                let $x = self;
                $widen
            }
        }
    };
}
element!(f32, load, x => x);
element!(bf16, load_bf16, x => x.to_f32(), true);
element!(f16, load_f16, x => x.to_f32());
element!(i8, load_i8, x => f32::from(x));

/// The version for any CPU; the compiler vectorises it as far as the target allows.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    #[inline(always)]
    fn fold(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut x = self.0;
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                x[i] = f(x[i], x[i + width]);
            }
        }
        x[0]
    }

    #[inline(always)]
    unsafe fn widen<E: Element>(p: *const E) -> Self {
        // SAFETY: the caller's contract: 16 values can be read.
        Self(std::array::from_fn(|i| unsafe { p.add(i).read() }.widen()))
    }
}

impl Lanes for Portable {
    type Bits = [u32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8) -> Self::Bits {
        // SAFETY: the caller's contract.
        std::array::from_fn(|i| u32::from_le_bytes(unsafe { p.cast::<[u8; 4]>().add(i).read() }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's contract: 16 values can be written.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn nibble(bits: Self::Bits, shift: u32, offset: f32) -> Self {
        Self(bits.map(|word| ((word >> shift) & 15) as f32 - offset))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, factor: Self, summand: Self) -> Self {
        // Not `mul_add`: without the instruction that is a slow call.
        self.mul(factor).add(summand)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        self.zip(n, |x, n| x * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn select(self, mask: u16, other: Self) -> Self {
        Self(std::array::from_fn(|i| if mask >> i & 1 == 1 { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.fold(|a, b| a + b)
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        self.fold(|a, b| if a > b { a } else { b })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tier::{Kernel, Tier};
    use super::*;

    struct Interleave;

    impl Kernel for Interleave {
        #[inline(always)]
        fn run<L: Lanes>(self) {
            let rows = array_of!(row < 8 => array_of!(word < LANES => (100 * row + word) as u32));
            let mut words = [0; 8 * LANES];
            L::interleave(array_of!(row < 8 => &rows[row]), &mut words);
            for (i, word) in words.into_iter().enumerate() {
                assert_eq!(word as usize, 100 * (i % 8) + i / 8, "number {i}");
            }
        }
    }

    #[test]
    fn eight_rows_interleave_on_every_tier() {
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_present()) {
            tier.run(Interleave);
        }
    }
}
