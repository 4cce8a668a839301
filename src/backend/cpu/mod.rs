//! The CPU's kernels: packed weights, SIMD tiers chosen at run time, a thread pool. `ACCOUNT.md` tells what was
//! tried, kept and dropped.
#![allow(clippy::inline_always)] // A kernel only gets its CPU features by being inlined; see `tier`.

mod activations;
mod attention;
mod attention_pages;
mod attention_softmax;
mod attention_tile;
mod gemm;
mod lanes;
mod linear;
mod memory;
mod memory_limit;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod page;
mod pool;
mod product;
mod rope;
mod rows;
mod source;
mod tier;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_words;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub(crate) use attention::{Attention, attention};
pub(crate) use linear::linear;
pub(crate) use memory::untouched_zeros;
pub(crate) use memory_limit::memory_limit;
pub(crate) use pack::{Packed, pack};
pub(crate) use page::{PageElement, bytes, bytes_mut, write_pages};
pub(crate) use rope::{Rope, rope};
pub(crate) use rows::{add_rms_norm, gated_silu, rms_norm, sigmoid_gate};
pub(crate) use tier::Tier;

use crate::config::DType;
use crate::error::{Error, Result};
use crate::weights::{Encoding, PackedWeights};

/// How a projection multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    /// f32 activations and sums; weights as stored.
    Exact,
    /// Activations rounded to bf16, exact products, f32 sums; weights as stored.
    Pairs,
    /// Activations rounded to 16-bit integers with a scale for each row, exact sums over 32; weights
    /// as stored. Measured closer to f32 than bf16 (`ACCOUNT.md`).
    Integers,
}

/// More threads than a machine has CPUs; a mistyped number must not take all its memory.
const MOST_THREADS: usize = 1024;

/// What all ops of a backend share.
pub(crate) struct Cpu {
    pool: pool::Pool,
    tier: Tier,
    dtype: DType,
    /// Where packed weights lie.
    weights: memory::Arena,
    /// And where they are kept for the next load.
    kept: OnceLock<Arc<Mutex<dyn PackedWeights>>>,
    /// What was read last learns here what follows.
    latest: Mutex<Arc<pool::Place>>,
    /// See [`Self::spare`].
    scratch: Mutex<Vec<Vec<u32>>>,
}

impl Cpu {
    /// `threads` threads, or all that the process may use.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::InvalidArgument`] for none and for more than [`MOST_THREADS`].
    pub(crate) fn new(threads: Option<usize>, dtype: DType, tier: Tier) -> Result<Self> {
        let threads = match threads {
            Some(0) => return Err(Error::invalid("num_threads must be at least 1; given: 0")),
            Some(threads) if threads > MOST_THREADS => {
                let allowed = format!("num_threads must be at most {MOST_THREADS}");
                return Err(Error::invalid(format!("{allowed}; given: {threads}")));
            }
            Some(threads) => threads,
            None => std::thread::available_parallelism()?.get(),
        };
        let pool = pool::Pool::new(threads)
            .map_err(|error| Error::from(error).context(format!("starting {threads} threads")))?;
        let (weights, kept, latest, scratch) = Default::default();
        Ok(Self { pool, tier, dtype, weights, kept, latest, scratch })
    }

    fn spares(&self) -> MutexGuard<'_, Vec<Vec<u32>>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `len` words with any content, for rearranged activations: the smallest spare one, or a new one
    /// in the place of the largest.
    fn spare(&self, len: usize) -> Vec<u32> {
        let mut spares = self.spares();
        spares.sort_by_key(Vec::len);
        let fits = spares.partition_point(|spare| spare.len() < len);
        if fits < spares.len() {
            return spares.remove(fits);
        }
        spares.pop();
        drop(spares);
        vec![0; len]
    }

    /// Takes buffers back.
    fn put_back(&self, buffers: impl IntoIterator<Item = Vec<u32>>) {
        self.spares().extend(buffers);
    }

    /// Tells that the first `panels` of `weight` are read now, by shares, so that what followed them the last time is
    /// prefetched next. Of several segments only the first counts.
    fn reads(&self, weight: &Packed, panels: usize) {
        let first = weight.segments.first();
        let (panels, stride) = first.map_or((0, 0), |s| (s.panels().min(panels), s.stride));
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *latest, Arc::clone(&weight.followed_by));
        before.set((weight.panel_start(0), panels, stride));
        self.pool.prefetch_next(&weight.followed_by);
    }

    /// Has packed weights kept, if they are not yet.
    pub(crate) fn keep_packed(&self, kept: Arc<Mutex<dyn PackedWeights>>) {
        let _ = self.kept.set(kept);
    }

    /// What `see` makes of where packed weights are kept, if they are.
    fn kept<T>(&self, see: impl FnOnce(&mut dyn PackedWeights) -> T) -> Option<T> {
        let mut kept = self.kept.get()?.lock().unwrap_or_else(PoisonError::into_inner);
        Some(see(&mut *kept))
    }

    /// All that packed weights depend on, beside the weights.
    pub(crate) fn layout(&self) -> String {
        let arithmetic = Encoding::ALL.map(|encoding| self.arithmetic(encoding));
        let version = env!("CARGO_PKG_VERSION");
        format!("{version} {} {} {arithmetic:?}", pack::LAYOUT, self.dtype.name())
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    fn arithmetic(&self, encoding: Encoding) -> Arithmetic {
        let is_rounded = matches!(self.dtype, DType::Auto | DType::BFloat16);
        match (self.tier, encoding) {
            _ if !is_rounded => Arithmetic::Exact,
            (_, Encoding::F32 | Encoding::F16) => Arithmetic::Exact,
            (Tier::Avx512Bf16, _) => Arithmetic::Pairs,
            // Without VNNI a wide machine multiplies as many f32 as pairs of integers.
            (Tier::Portable | Tier::Neon | Tier::Avx512, _) | (_, Encoding::BF16) => {
                Arithmetic::Exact
            }
            (_, Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q8_0) => Arithmetic::Integers,
        }
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cpu({}, {} threads, {})", self.tier.name(), self.threads(), self.dtype.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_spare_that_fits_is_used_again() {
        let cpu = Cpu::new(Some(1), DType::Auto, Tier::Portable).expect("a thread");
        cpu.put_back([vec![1; 30], vec![2; 10], vec![3; 20]]);
        assert_eq!(cpu.spare(11), [3; 20]);
        assert_eq!(cpu.spare(10), [2; 10]);
        // None is large enough, so the one that is left goes.
        assert_eq!(cpu.spare(31).len(), 31);
        assert!(cpu.spares().is_empty());
    }
}
