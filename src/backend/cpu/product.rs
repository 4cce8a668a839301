//! How numbers multiply: f32 with f32, pairs of bf16 with pairs of bf16, or, in projections alone, small integers
//! with integers of 16 bits; and kernels that come in all of them.
#![allow(unsafe_code)] // Activations are read through raw pointers.

use std::marker::PhantomData;

use super::Arithmetic;
#[cfg(target_arch = "x86_64")]
use super::lanes::LANES;
use super::lanes::Lanes;
use super::tier::{Kernel, Tier};
#[cfg(target_arch = "x86_64")]
use super::x86::Avx512;
#[cfg(target_arch = "x86_64")]
use super::x86_words::{Integers, Integers256, Integers512, PairWords, Pairs};

/// How the weights of a panel, or keys and values, multiply with activations: 32-bit words, one per step.
pub(super) trait Dot {
    type L: Lanes;
    /// Weights of a tile's 16 rows at one step.
    type Weights: Copy;
    /// An activation, in all lanes.
    type X: Copy;
    /// Sums of a tile's 16 rows.
    type Sum: Copy;
    /// `k` per step.
    const STEP: usize;
    /// Whether activations are multiples of a scale, one for each row.
    const SCALED: bool = false;

    /// # Safety
    /// `p` is valid for a read.
    unsafe fn broadcast(p: *const u32) -> Self::X;
    /// # Safety
    /// `p` is valid for reads of 64 bytes.
    unsafe fn load(p: *const u8) -> Self::Weights;
    /// # Safety
    /// `p` is valid for writes of 64 bytes.
    unsafe fn store(weights: Self::Weights, p: *mut u8);
    fn multiply(weights: Self::Weights, x: Self::X, sum: Self::Sum) -> Self::Sum;
    /// What the sum of a block starts with, for weights that are stored plus `offset` and activations
    /// whose sum is `sum`.
    fn start(sum: f32, offset: i32) -> Self::Sum;
    /// A sum of other blocks, to go on with.
    fn resume(total: Self::L) -> Self::Sum;
    fn numbers(sum: Self::Sum) -> Self::L;
}

/// A [`Dot`] whose sums are f32, of numbers without scales: also for attention.
pub(super) trait Product: Dot<Sum = <Self as Dot>::L> {
    /// Words whose sum stands for a number where rounding to one is too coarse.
    const PARTS: usize;
    /// Takes away from each number what [`Self::pack`] keeps of it.
    fn subtract(x: &mut [[f32; 32]], packed: &[[f32; 32]]);
    /// Turns consecutive numbers into the words of consecutive steps, in place.
    fn pack(x: &mut [[f32; 32]]);
}

/// What [`Dot`] asks about sums that are f32.
macro_rules! f32_sums {
    () => {
        #[inline(always)]
        fn start(_: f32, _: i32) -> Self::L {
            Self::L::splat(0.0)
        }
        #[inline(always)]
        fn resume(total: Self::L) -> Self::L {
            total
        }
        #[inline(always)]
        fn numbers(sum: Self::L) -> Self::L {
            sum
        }
    };
}

/// f32 weights times f32 activations.
pub(super) struct Exact<L>(PhantomData<L>);

impl<L: Lanes> Dot for Exact<L> {
    type L = L;
    type Weights = L;
    type X = L;
    type Sum = L;
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> L {
        // SAFETY: the caller's contract.
        L::splat(f32::from_bits(unsafe { *p }))
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(weights: L, p: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { weights.store(p.cast()) }
    }
    #[inline(always)]
    fn multiply(weights: L, x: L, sum: L) -> L {
        weights.fma(x, sum)
    }
    f32_sums!();
}

impl<L: Lanes> Product for Exact<L> {
    const PARTS: usize = 1;

    #[inline(always)]
    fn subtract(_: &mut [[f32; 32]], _: &[[f32; 32]]) {}
    #[inline(always)]
    fn pack(_: &mut [[f32; 32]]) {}
}

/// Pairs of bf16 times pairs of bf16, summed in f32.
#[cfg(target_arch = "x86_64")]
pub(super) struct PairProduct;

#[cfg(target_arch = "x86_64")]
impl Dot for PairProduct {
    type L = Avx512;
    type Weights = Pairs;
    type X = Pairs;
    type Sum = Avx512;
    const STEP: usize = 2;

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> Pairs {
        // SAFETY: the caller's contract.
        unsafe { Pairs::broadcast(p) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Pairs {
        // SAFETY: the caller's contract.
        unsafe { Pairs::load(p) }
    }
    #[inline(always)]
    unsafe fn store(weights: Pairs, p: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { weights.store(p) }
    }
    #[inline(always)]
    fn multiply(weights: Pairs, x: Pairs, sum: Avx512) -> Avx512 {
        weights.dot(x, sum)
    }
    f32_sums!();
}

#[cfg(target_arch = "x86_64")]
impl Product for PairProduct {
    const PARTS: usize = 2;

    #[inline(always)]
    fn subtract(x: &mut [[f32; 32]], packed: &[[f32; 32]]) {
        let kept = packed.as_ptr().cast::<half::bf16>();
        for (i, x) in x.as_flattened_mut().chunks_exact_mut(LANES).enumerate() {
            // SAFETY: `packed` has a bf16 for each number in its first half.
            unsafe {
                let rest = Avx512::load(x.as_ptr()).sub(Avx512::load_bf16(kept.add(i * LANES)));
                rest.store(x.as_mut_ptr());
            }
        }
    }
    #[inline(always)]
    fn pack(x: &mut [[f32; 32]]) {
        let to = x.as_mut_ptr().cast::<u32>();
        for i in 0..x.len() {
            // SAFETY: reads 32 numbers, and writes 16 words where numbers have been read.
            unsafe { Pairs::round(x.as_ptr().add(i).cast(), to.add(16 * i)) }
        }
    }
}

/// Small integers times activations of 16 bits, summed exactly over a block.
#[cfg(target_arch = "x86_64")]
pub(super) struct IntegerDot<I>(PhantomData<I>);

#[cfg(target_arch = "x86_64")]
impl<I: Integers> Dot for IntegerDot<I> {
    type L = I::L;
    type Weights = I;
    type X = I;
    type Sum = I;
    const STEP: usize = 2;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> I {
        // SAFETY: the caller's contract.
        I::splat(unsafe { p.read() }.cast_signed())
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> I {
        // SAFETY: the caller's contract.
        unsafe { I::load(p) }
    }
    #[inline(always)]
    unsafe fn store(weights: I, p: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { weights.store(p) }
    }
    #[inline(always)]
    fn multiply(weights: I, x: I, sum: I) -> I {
        weights.dot(x, sum)
    }
    #[inline(always)]
    fn start(sum: f32, offset: i32) -> I {
        if offset == 0 {
            return I::splat(0);
        }
        // Of 32 integers within ±32767 an f32 holds eight times the sum exactly.
        I::from_numbers(I::L::splat(sum * -(offset as f32)))
    }
    #[inline(always)]
    fn resume(_: I::L) -> I {
        unreachable!("integers have scales, so each block has sums of its own")
    }
    #[inline(always)]
    fn numbers(sum: I) -> I::L {
        sum.numbers()
    }
}

/// A kernel that comes in all arithmetics that it is run with.
pub(super) trait ProductKernel: Sized {
    fn exact<L: Lanes>(self);
    #[cfg(target_arch = "x86_64")]
    fn pairs(self);
    #[cfg(target_arch = "x86_64")]
    fn integers<I: Integers>(self) {
        unreachable!("only projections have integers");
    }
}

/// Runs `kernel` with the instructions of the tier.
pub(super) fn run<K: ProductKernel>(tier: Tier, arithmetic: Arithmetic, kernel: K) {
    struct ExactKernel<K>(K);
    impl<K: ProductKernel> Kernel for ExactKernel<K> {
        #[inline(always)]
        fn run<L: Lanes>(self) {
            self.0.exact::<L>();
        }
    }
    match arithmetic {
        Arithmetic::Exact => tier.run(ExactKernel(kernel)),
        // SAFETY: `Cpu::arithmetic` chooses pairs only in the tier that has the instruction.
        #[cfg(target_arch = "x86_64")]
        Arithmetic::Pairs => unsafe { run_pairs(kernel) },
        // SAFETY: as above; a tier has its instructions.
        #[cfg(target_arch = "x86_64")]
        Arithmetic::Integers => unsafe {
            match tier {
                Tier::AvxVnni => run_avx_vnni(kernel),
                Tier::Avx512Vnni => run_avx512_vnni(kernel),
                Tier::Avx2 => run_avx2(kernel),
                _ => unreachable!("`Cpu::arithmetic` chooses integers only in these tiers"),
            }
        },
        #[cfg(not(target_arch = "x86_64"))]
        Arithmetic::Pairs | Arithmetic::Integers => {
            unreachable!("`Cpu::arithmetic` never chooses them here")
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn run_pairs<K: ProductKernel>(kernel: K) {
    kernel.pairs();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: ProductKernel>(kernel: K) {
    kernel.integers::<Integers256<false>>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn run_avx_vnni<K: ProductKernel>(kernel: K) {
    kernel.integers::<Integers256<true>>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn run_avx512_vnni<K: ProductKernel>(kernel: K) {
    kernel.integers::<Integers512>();
}
