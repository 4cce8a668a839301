//! Opening a device, and its memory.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use super::cpu::{self, Cpu, PageElement, Tier, untouched_zeros};
#[cfg(feature = "cuda")]
use super::cuda::{Cuda, Sums, page_dim};
use super::{Backend, F32, Heads, Kind, LayerKv, check};
use crate::config::{BLOCK_SIZE, DType, DeviceChoice, KvCacheDType};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::ModelSpec;
use crate::weights::{Encoding, PackedWeights};

/// Bytes of KV cache on a CPU when the caller names no size.
const CPU_CACHE_BYTES: usize = 2 << 30;

/// Environment variable that names a tier, for comparisons and to narrow down a fault.
const TIER_VARIABLE: &str = "ASTRAI_CPU_TIER";

/// The largest steps of a model, for which a device keeps memory beside weights and cache.
#[derive(Debug, Clone, Copy)]
pub struct StepSizes {
    /// Most sequences, and their longest, in tokens.
    pub sequences: (usize, usize),
    /// Numbers that a step computes, the logits of its sequences included.
    pub activations: usize,
    /// Bytes of a cached token, in all layers.
    pub bytes_per_token: usize,
    /// Heads of a layer.
    pub heads: Heads,
    /// Ids.
    pub vocab_size: usize,
}

/// Bytes of a device's memory for the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheBudget {
    /// What it takes when the caller names no size.
    pub usual: usize,
    /// What there is.
    pub most: usize,
}

impl Backend {
    /// The device of the caller's choice for a model; `num_threads` is the CPU's.
    pub fn open(
        device: DeviceChoice,
        num_threads: Option<usize>,
        dtype: DType,
        kv_cache: KvCacheDType,
        spec: &ModelSpec,
    ) -> Result<Self> {
        let cpu = || Self::cpu(num_threads, dtype)?.with_kv_cache(kv_cache);
        let gpu = || Self::cuda(0, dtype)?.with_kv_cache(kv_cache);
        match device {
            DeviceChoice::Cuda => gpu(),
            DeviceChoice::Cpu => cpu(),
            // A GPU has no kernels for it.
            DeviceChoice::Auto if kv_cache == KvCacheDType::Int8 => cpu(),
            DeviceChoice::Auto => match gpu() {
                Ok(gpu) if gpu.supports(spec).is_ok() => Ok(gpu),
                _ => cpu(),
            },
        }
    }

    /// The same with another form of the cache.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device has no kernels for it.
    pub fn with_kv_cache(mut self, kv_cache: KvCacheDType) -> Result<Self> {
        if kv_cache == KvCacheDType::Int8 && self.device.is_cuda() {
            return Err(Error::unsupported(
                "kv_cache_dtype \"int8\" on a GPU; use \"auto\", or the device \"cpu\"",
            ));
        }
        self.kv_cache = kv_cache;
        Ok(self)
    }

    /// The CPU, with `num_threads` threads (all CPUs that the process may use when `None`) and the best tier
    /// that it has, or the one that the environment variable `ASTRAI_CPU_TIER` names.
    pub fn cpu(num_threads: Option<usize>, dtype: DType) -> Result<Self> {
        let tier = std::env::var_os(TIER_VARIABLE).filter(|name| !name.is_empty());
        let tier =
            tier.map_or_else(|| Ok(Tier::detect()), |name| Tier::parse(&name.to_string_lossy()));
        let tier = tier.map_err(|error| error.context(TIER_VARIABLE))?;
        Self::cpu_of(num_threads, dtype, tier)
    }

    /// As [`Self::cpu`] with the instructions of `tier` (see [`Self::tier`]); an error when this CPU
    /// lacks them. For tests and comparisons.
    pub fn cpu_with_tier(num_threads: Option<usize>, dtype: DType, tier: &str) -> Result<Self> {
        Self::cpu_of(num_threads, dtype, Tier::parse(tier)?)
    }

    fn cpu_of(num_threads: Option<usize>, dtype: DType, tier: Tier) -> Result<Self> {
        let cpu = Arc::new(Cpu::new(num_threads, dtype, tier)?);
        Ok(Self { device: Device::Cpu, kind: Kind::Cpu(cpu), kv_cache: KvCacheDType::Auto })
    }

    /// GPU `ordinal`. [`DType::Auto`] is bf16 there.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] without a driver or such a GPU, [`ErrorKind::Unsupported`] in a build
    /// without the feature `cuda`.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::missing_const_for_fn))]
    pub fn cuda(ordinal: usize, dtype: DType) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            Self::cuda_of(ordinal, dtype, Sums::Fixed)
        }
        #[cfg(not(feature = "cuda"))]
        Err(Error::unsupported("device \"cuda\": this build has no CUDA; use \"cpu\" or \"auto\""))
    }

    /// As [`Self::cuda`], with linear layers whose sums depend on the batch: for a bench of what it costs that they
    /// do not.
    #[cfg(feature = "cuda")]
    pub fn cuda_with_free_sums(ordinal: usize, dtype: DType) -> Result<Self> {
        Self::cuda_of(ordinal, dtype, Sums::Free)
    }

    #[cfg(feature = "cuda")]
    fn cuda_of(ordinal: usize, dtype: DType, sums: Sums) -> Result<Self> {
        let cuda = Cuda::open(ordinal, float_type(dtype), sums)?;
        let (device, kind) = (cuda.device(), Kind::Cuda(Arc::new(cuda)));
        Ok(Self { device, kind, kv_cache: KvCacheDType::Auto })
    }

    /// Whether the device has kernels for a model of these sizes.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], which names the size.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::unnecessary_wraps))]
    pub fn supports(&self, spec: &ModelSpec) -> Result<()> {
        match &self.kind {
            Kind::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.supports(spec),
        }
    }

    /// The tiers that this CPU has, slowest first.
    #[must_use]
    pub fn cpu_tiers() -> Vec<&'static str> {
        Tier::ALL.into_iter().filter(|tier| tier.is_present()).map(Tier::name).collect()
    }

    /// All that packed weights depend on, beside the weights; `None` where they are not kept: on a GPU.
    #[must_use]
    pub fn packed_layout(&self) -> Option<String> {
        match &self.kind {
            Kind::Cpu(cpu) => Some(cpu.layout()),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => None,
        }
    }

    /// Has [`Self::pack`] look for weights in `kept` first, and keep them there. Once for a backend.
    #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
    pub fn keep_packed(&self, kept: Arc<Mutex<dyn PackedWeights>>) {
        if let Kind::Cpu(cpu) = &self.kind {
            cpu.keep_packed(kept);
        }
    }

    /// The candle device of the tensors.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// `cpu` or `cuda`.
    #[must_use]
    pub fn device_name(&self) -> &'static str {
        if self.device.is_cuda() { "cuda" } else { "cpu" }
    }

    /// Prompt tokens that a step with decode rows should compute at most for each waiting prompt, so that for one it does
    /// not take a few times as long as without.
    #[must_use]
    pub fn prefill_beside_decode(&self) -> usize {
        if self.device.is_cuda() { 256 } else { 32 }
    }

    /// Instruction tier, e.g. `avx512bf16`, `avx2`, `portable`; `cuda` for a GPU.
    #[must_use]
    pub fn tier(&self) -> &'static str {
        match &self.kind {
            Kind::Cpu(cpu) => cpu.tier().name(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => "cuda",
        }
    }

    /// Threads that the kernels use; 1 for a GPU.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        match &self.kind {
            Kind::Cpu(cpu) => cpu.threads(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => 1,
        }
    }

    /// Type of activations.
    #[must_use]
    pub fn activation_dtype(&self) -> candle_core::DType {
        match &self.kind {
            Kind::Cpu(_) => F32,
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.dtype(),
        }
    }

    /// Empty pages for one layer. On the CPU memory is committed when it is first written.
    pub fn layer_kv(&self, num_blocks: usize, heads: Heads) -> Result<LayerKv> {
        check::heads(heads)?;
        let page = self.page_len(heads);
        let shape = (2, num_blocks, page);
        let len = page.checked_mul(2 * num_blocks).filter(|&len| len < isize::MAX as usize / 4);
        let len = len.ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfMemory,
                format!("a cache of {num_blocks} blocks is too large"),
            )
        })?;
        #[cfg(feature = "cuda")]
        if let Kind::Cuda(cuda) = &self.kind {
            return Ok(LayerKv { pages: cuda.zeros(shape)? });
        }
        let device = &self.device;
        let pages = match self.kv_dtype() {
            candle_core::DType::I16 => Tensor::from_vec(untouched_zeros::<i16>(len), shape, device),
            F32 => Tensor::from_vec(untouched_zeros::<f32>(len), shape, device),
            candle_core::DType::F16 => Tensor::from_vec(
                untouched_zeros::<u16>(len).reinterpret_into::<f16>(),
                shape,
                device,
            ),
            _ => Tensor::from_vec(
                untouched_zeros::<u16>(len).reinterpret_into::<bf16>(),
                shape,
                device,
            ),
        };
        Ok(LayerKv { pages: pages? })
    }

    /// Memory for the cache beside `weights` (encodings and counts of numbers) and what steps need.
    /// On the CPU 2 GiB, or half of a smaller memory, are usual; on a GPU all that is
    /// left of `utilization` of its memory.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] when weights and steps alone do not fit a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::needless_pass_by_value))]
    pub fn cache_budget(
        &self,
        utilization: f64,
        weights: impl Iterator<Item = (Encoding, usize)>,
        steps: StepSizes,
    ) -> Result<CacheBudget> {
        match &self.kind {
            Kind::Cpu(_) => {
                let memory = cpu::memory_limit().unwrap_or(isize::MAX as usize);
                Ok(CacheBudget { usual: CPU_CACHE_BYTES.min(memory / 2), most: memory })
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                let weights = weights.map(|(encoding, len)| cuda.weight_bytes(encoding, len)).sum();
                let left = cuda.memory_left(utilization, weights, steps)?;
                Ok(CacheBudget { usual: left, most: left })
            }
        }
    }

    /// Bytes that one cached token of one layer takes.
    #[must_use]
    pub fn kv_bytes_per_token(&self, heads: Heads) -> usize {
        2 * self.page_len(heads) / BLOCK_SIZE * self.kv_dtype().size_in_bytes()
    }

    /// Numbers of a page of keys, or of values.
    pub(super) fn page_len(&self, heads: Heads) -> usize {
        let head = match (&self.kind, self.kv_cache) {
            (Kind::Cpu(_), KvCacheDType::Auto) => BLOCK_SIZE * heads.head_dim,
            (Kind::Cpu(_), KvCacheDType::Int8) => i8::head_len(heads.head_dim) / size_of::<i16>(),
            #[cfg(feature = "cuda")]
            (Kind::Cuda(_), _) => BLOCK_SIZE * page_dim(heads),
        };
        heads.num_kv_heads * head
    }

    pub(super) fn kv_dtype(&self) -> candle_core::DType {
        match (&self.kind, self.kv_cache) {
            (Kind::Cpu(cpu), KvCacheDType::Auto) => float_type(cpu.dtype()),
            // Pairs of bytes: f16 scales lie among them.
            (Kind::Cpu(_), KvCacheDType::Int8) => candle_core::DType::I16,
            #[cfg(feature = "cuda")]
            (Kind::Cuda(cuda), _) => cuda.dtype(),
        }
    }
}

/// The float type that a precision is stored in.
fn float_type(dtype: DType) -> candle_core::DType {
    match dtype {
        DType::Float32 => F32,
        DType::Float16 => candle_core::DType::F16,
        DType::Auto | DType::BFloat16 => candle_core::DType::BF16,
    }
}
