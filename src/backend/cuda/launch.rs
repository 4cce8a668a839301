//! Kernels by name, and the structs that they take: twins of those in `kernels/*.cu`, field by field.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DriverError,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use crate::error::{Error, ErrorKind, Result};

/// Address in device memory; 0 is null.
pub(super) type Address = u64;

/// Dynamic shared memory that a launch may ask for without further ado.
pub(super) const SHARED_BYTES: u32 = 48 << 10;

/// Share of a multiprocessor's memory that kernels would have as shared memory, in percent, where they start
/// early: the same for all, or a block could not start beside those of the kernel before. But those of [`STAGED`]
/// take what they need: their blocks do nothing before their turn.
const SHARED_PERCENT: i32 = 50;

/// Kernels, by the start of their names, whose blocks stage much in shared memory.
const STAGED: [&str; 2] = ["gemm_", "prefill_"];

/// What the build script made of `kernels/*.cu`, and the kernels in it. `{}` stands for each type.
const MODULES: [(&[u8], &[&str]); 7] = [
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin")),
        &["embedding", "gather_rows", "rms_norm_{}", "gate_attention_{}", "gated_activation_{}"],
    ),
    (include_bytes!(concat!(env!("OUT_DIR"), "/rope.fatbin")), &["rope_and_cache_{}"]),
    (include_bytes!(concat!(env!("OUT_DIR"), "/sample.fatbin")), &["sample", "score", "follow"]),
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/linear.fatbin")),
        &[
            "linear_f32",
            "linear_{half}_{format}_1",
            "linear_{half}_{format}_2",
            "linear_{half}_{format}_4",
            "linear_{half}_{format}_8",
        ],
    ),
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/gemm.fatbin")),
        &["gemm_{half}_{format}_64", "gemm_{half}_{format}_128"],
    ),
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
        &[
            "attention_f32",
            "attention_{half}_1",
            "attention_{half}_2",
            "attention_{half}_3",
            "attention_{half}_4",
            "attention_{half}_6",
            "attention_{half}_8",
            "merge_{half}",
        ],
    ),
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/prefill.fatbin")),
        &["prefill_{half}_1", "prefill_{half}_2", "prefill_{half}_3", "prefill_{half}_4"],
    ),
];

/// A struct that a kernel takes by value.
///
/// # Safety
/// It is `repr(C)` and has the fields of the kernel's own, in order.
pub(super) unsafe trait Arguments: Copy {}

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub(super) struct $name { $(pub(super) $field: $type),* }

        // SAFETY: twin of the struct of this name in kernels/; the emulator compares their sizes.
        unsafe impl Arguments for $name {}
    )*};
}

arguments! {
    /// `embedding`.
    EmbeddingArgs { table: Address, ids: Address, out: Address, cols: u32, encoding: u32 }
    /// `rms_norm_*`.
    RmsNormArgs { residual: Address, x: Address, weight: Address, out: Address, cols: u32, eps: f32 }
    /// `gate_attention_*`.
    GateArgs { out: Address, gate: Address, width: u32, gate_width: u32, offset: u32 }
    /// `gated_activation_*`.
    GatedActivationArgs { x: Address, out: Address, width: u32 }
    /// `gather_rows`.
    GatherArgs { x: Address, rows: Address, out: Address, words: u32 }
    /// `sample`.
    SampleArgs { logits: Address, draws: Address, tokens: Address, vocab: u32 }
    /// `follow`.
    FollowArgs { ids: Address, tokens: Address, rows: u32 }
    /// `score`.
    ScoreArgs {
        logits: Address, asks: Address, tokens: Address, scores: Address, vocab: u32, stride: u32,
    }
    /// `linear_*` and `gemm_*`.
    LinearArgs {
        weight: Address, x: Address, bias: Address, out: Address,
        rows: u32, cols: u32, outs: u32, slice: u32, out_is_f32: u32,
        block_outs: u32, lower: u32, slots: u32,
    }
    /// `rope_and_cache_*`.
    RopeArgs {
        qkv: Address, cos: Address, sin: Address, q_norm: Address, k_norm: Address,
        positions: Address, slots: Address, keys: Address, values: Address,
        heads: u32, kv_heads: u32, dim: u32, width: u32, page_dim: u32,
        adjacent: u32, qk_norm: u32, eps: f32,
    }
    /// `attention_*`, `merge_*` and `prefill_*`.
    AttentionArgs {
        qkv: Address, keys: Address, values: Address, out: Address, partial: Address,
        positions: Address, blocks: Address, items: Address, num_items: Address,
        heads: u32, kv_heads: u32, dim: u32, width: u32, page_dim: u32, window: u32, scale: f32,
    }
}

/// Blocks, threads of a block and bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (u32, u32),
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

impl Grid {
    /// A block of `threads` for each of `count`.
    pub(super) fn each(count: usize, threads: u32) -> Self {
        Self { blocks: (count as u32, 1), threads, shared_bytes: 0 }
    }

    /// Blocks of `threads` that share `parts` of each of `rows`, `share` of them a block.
    pub(super) fn shares(rows: usize, parts: usize, share: usize, threads: u32) -> Self {
        let blocks = (rows as u32, parts.div_ceil(share) as u32);
        Self { blocks, threads, shared_bytes: 0 }
    }
}

/// All kernels, loaded.
pub(super) struct Kernels {
    functions: HashMap<String, CudaFunction>,
    /// Whether blocks may start before the kernel that was queued before has ended: they wait themselves
    /// (`await_previous` in `kernels/common.cuh`).
    start_early: bool,
}

impl Kernels {
    /// Loads them into `context`; a function may take up to `shared_bytes` of dynamic shared memory.
    pub(super) fn load(context: &Arc<CudaContext>, shared_bytes: u32) -> Result<Self> {
        let (major, _) = context.compute_capability().map_err(unloadable)?;
        let start_early = major >= 9;
        let mut functions = HashMap::new();
        for (code, names) in MODULES {
            let module =
                context.load_module(Ptx::from_binary(code.to_vec())).map_err(unloadable)?;
            for name in names.iter().flat_map(|name| instances(name)) {
                let function =
                    function(&module, &name, shared_bytes, start_early).map_err(|error| {
                        Error::new(ErrorKind::Device, format!("kernel {name}: {error}"))
                    })?;
                functions.insert(name, function);
            }
        }
        Ok(Self { functions, start_early })
    }

    /// Queues kernel `name`.
    ///
    /// # Safety
    /// The addresses in `args` must be of device memory that holds what the kernel's own struct says
    /// until the stream has done the work, and the grid must be what the kernel expects.
    pub(super) unsafe fn launch<A: Arguments>(
        &self,
        stream: &CudaStream,
        name: &str,
        grid: Grid,
        args: A,
    ) -> Result<()> {
        #[cfg(feature = "cuda-emulator")]
        assert_eq!(super::emulator::argument_bytes(name), size_of::<A>(), "{name}");
        let function = self.functions.get(name);
        let function = function.ok_or_else(|| Error::bug(format!("there is no kernel {name}")))?;
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: self.start_early.into(),
        };
        let mut parameters = [(&raw const args).cast_mut().cast::<c_void>()];
        let launched = stream.context().bind_to_thread().and_then(|()| {
            let (function, parameters) = (function.cu_function(), parameters.as_mut_ptr());
            // SAFETY: the caller's contract; the driver copies what it is given before it returns.
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters, null_mut()) }
                .result()
        });
        launched.map_err(|error| {
            Error::new(ErrorKind::Device, format!("kernel {name} was not launched: {error}"))
        })
    }
}

fn unloadable(error: DriverError) -> Error {
    let message = format!(
        "the GPU cannot run the kernels ({error}); needed: compute capability 8.0 (Ampere) or newer"
    );
    Error::new(ErrorKind::Device, message)
}

/// The names that a pattern of [`MODULES`] stands for.
fn instances(pattern: &str) -> Vec<String> {
    let marks: [(&str, &[&str]); 3] = [
        ("{half}", &["f16", "bf16"]),
        ("{}", &["f32", "f16", "bf16"]),
        ("{format}", &["dense", "q8_0", "q4_0", "q4_1"]),
    ];
    let mut names = vec![pattern.to_string()];
    for (mark, values) in marks {
        if pattern.contains(mark) {
            let filled = |name: &String| {
                values.iter().map(|value| name.replace(mark, value)).collect::<Vec<_>>()
            };
            names = names.iter().flat_map(filled).collect();
        }
    }
    names
}

fn function(
    module: &Arc<CudaModule>,
    name: &str,
    shared_bytes: u32,
    start_early: bool,
) -> std::result::Result<CudaFunction, DriverError> {
    let function = module.load_function(name)?;
    let is_staged = STAGED.iter().any(|start| name.starts_with(start));
    if start_early && !is_staged {
        let share = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        function.set_attribute(share, SHARED_PERCENT)?;
    }
    if shared_bytes > SHARED_BYTES && (is_staged || name.starts_with("linear_")) {
        let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(limit, shared_bytes as i32)?;
    }
    Ok(function)
}
