//! [`EngineConfig`]: the validated settings of an engine.

use crate::error::{Error, Result};

/// Tokens in one cache block.
pub const BLOCK_SIZE: usize = 16;

/// Precision of weights, arithmetic and cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DType {
    /// The fastest form that keeps quality: dense f32 weights become bf16, others stay as stored;
    /// products of bf16 grade where the CPU has them, else f32; bf16 cache. So two kinds of CPU may
    /// give different tokens.
    #[default]
    Auto,
    /// Weights as stored, exact f32 arithmetic everywhere, f32 cache.
    Float32,
    /// Dense weights become bf16; otherwise as `Auto`.
    BFloat16,
    /// Dense weights and the cache become f16; products in f32.
    Float16,
}

impl DType {
    /// Parses `auto`, `float32`, `bfloat16` or `float16`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::BFloat16),
            "float16" => Ok(Self::Float16),
            other => Err(Error::invalid(format!(
                "dtype must be one of auto, float32, bfloat16, float16; given: {other:?}"
            ))),
        }
    }

    /// The name that [`Self::parse`] reads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// How keys and values are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDType {
    /// As [`DType`] says.
    #[default]
    Auto,
    /// Integers of 8 bits, with a scale for 32 of them, as in GGUF's `Q8_0`: 0.53 of bf16 where the size of a head is a
    /// multiple of 32. On the CPU.
    Int8,
}

impl KvCacheDType {
    /// The name that [`Self::parse`] reads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Int8 => "int8",
        }
    }

    /// Parses `auto` or `int8`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "int8" => Ok(Self::Int8),
            other => Err(Error::invalid(format!(
                "kv_cache_dtype must be one of auto, int8; given: {other:?}"
            ))),
        }
    }
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU if it can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first GPU, or an error.
    Cuda,
}

impl DeviceChoice {
    /// Parses `auto`, `cpu` or `cuda`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => Err(Error::invalid(format!(
                "device must be one of auto, cpu, cuda; given: {other:?}"
            ))),
        }
    }
}

/// Limits that the scheduler and the cache work within.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Longest sequence (prompt and output), in tokens.
    pub max_model_len: usize,
    /// Most sequences that run at once.
    pub max_num_seqs: usize,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Most prompt tokens in a step that has decode rows, times the sequences that have a prompt to compute, eight at most;
    /// the oldest take them first. As many as there are decode rows in any case. Running requests shall not wait long
    /// for the prompts of others, nor many prompts for them.
    pub prefill_beside_decode: usize,
    /// Cache blocks of [`BLOCK_SIZE`] tokens.
    pub num_blocks: usize,
    /// Whether blocks stay findable after their request has ended.
    pub enable_prefix_caching: bool,
    /// Base of the per-request seeds of requests that bring none.
    pub seed: u64,
    /// Ids that end a sequence unless a request says `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Ids of the model, for checks of prompts and parameters.
    pub vocab_size: usize,
}

impl EngineConfig {
    /// Checks that every limit is positive. Sequences may be longer than the cache: they end where it does.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("prefill_beside_decode", self.prefill_beside_decode),
            ("kv_cache_tokens", self.num_blocks * BLOCK_SIZE),
            ("vocab_size", self.vocab_size),
        ] {
            if value == 0 {
                return Err(Error::invalid(format!("{name} must be at least 1; given: 0")));
            }
        }
        Ok(())
    }
}
