//! [`widest`]: plain loops, compiled for the widest vectors that the CPU has.
#![allow(unsafe_code)] // Calls of `#[target_feature]` functions, after detection.

/// A computation over plain numbers whose loops vectorise.
pub(crate) trait Loops {
    type Output;

    /// Must be `#[inline(always)]`, as must the loops that gain by it: what is not inlined keeps to the vectors that every
    /// CPU has. The operations and their order are the same for all, so is every result.
    fn run(self) -> Self::Output;
}

/// Whether the CPU has AVX2, and FMA and F16C, which come with it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether it has the same and AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Runs `loops` with AVX-512 or AVX2 where they are there.
#[cfg(target_arch = "x86_64")]
pub(crate) fn widest<L: Loops>(loops: L) -> L::Output {
    if has_avx512() {
        // SAFETY: the features are there.
        unsafe { run_avx512(loops) }
    } else if has_avx2() {
        // SAFETY: as above.
        unsafe { run_avx2(loops) }
    } else {
        loops.run()
    }
}

/// Runs `loops`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn widest<L: Loops>(loops: L) -> L::Output {
    loops.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn run_avx512<L: Loops>(loops: L) -> L::Output {
    loops.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2<L: Loops>(loops: L) -> L::Output {
    loops.run()
}
