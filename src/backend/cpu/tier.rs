//! [`Tier`]: which instructions the kernels use, found at run time.
#![allow(unsafe_code)] // Calls of `#[target_feature]` functions, after detection.

use super::lanes::{Lanes, Portable};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::wide::{has_avx2, has_avx512};

/// An instruction tier; later ones are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Any CPU.
    Portable,
    /// NEON, with every 64-bit ARM.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI, which multiplies 16-bit integers and adds at once.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VNNI.
    Avx512Vnni,
    /// AVX-512 with the bf16 dot product.
    Avx512Bf16,
}

/// A kernel that is generic over the lanes it computes with.
pub(super) trait Kernel {
    /// Must be `#[inline(always)]`, as must everything hot that it calls.
    fn run<L: Lanes>(self);
}

impl Tier {
    /// All tiers, slowest first.
    pub(crate) const ALL: [Self; 7] = [
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
    ];

    /// The best tier that this CPU has.
    pub(crate) fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|tier| tier.is_present()).unwrap_or(Self::Portable)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether up to 8 rows are computed together, or else up to 6.
    pub(super) fn is_wide(self) -> bool {
        self >= Self::Avx512
    }

    /// The tier called `name`, if this CPU has it.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        let tier = Self::ALL.into_iter().find(|tier| tier.name() == name);
        tier.filter(|tier| tier.is_present()).ok_or_else(|| {
            let present: Vec<_> =
                Self::ALL.into_iter().filter(|t| t.is_present()).map(Self::name).collect();
            Error::invalid(format!("tier must be one of {}; given: {name:?}", present.join(", ")))
        })
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_present(self) -> bool {
        let (avx2, avx512) = (has_avx2(), has_avx512());
        match self {
            Self::Portable => true,
            Self::Neon => false,
            Self::Avx2 => avx2,
            Self::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
            Self::Avx512 => avx512,
            Self::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
            Self::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn is_present(self) -> bool {
        self == Self::Portable || (self == Self::Neon && cfg!(target_arch = "aarch64"))
    }

    /// Runs `kernel` with the tier's lanes and instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) {
        match self {
            // SAFETY: a `Tier` is only made by `detect` and `parse`, which look for the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 => unsafe { run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::AvxVnni => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "aarch64")]
            Self::Neon => kernel.run::<Neon>(),
            _ => kernel.run::<Portable>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<Avx2>();
}
