//! Keyword arguments → [`EngineOptions`] and [`SamplingOptions`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};

use crate::backend::Backend;
use crate::checkpoint::{self, ModelFiles, PackedCache};
use crate::config::{DType, DeviceChoice, EngineConfig, KvCacheDType};
use crate::error::{Error, ErrorKind, Result};
use crate::runner::{CapacityRequest, Runner};
use crate::sampler::SamplingOptions;

/// The keyword arguments of `Engine`, checked as far as that is possible without the model.
#[derive(Debug)]
pub(super) struct EngineOptions {
    device: DeviceChoice,
    pub(super) dtype: DType,
    capacity: CapacityRequest,
    enable_prefix_caching: bool,
    num_threads: Option<usize>,
    packed_cache: Option<PathBuf>,
    pub(super) kv_cache: KvCacheDType,
    seed: Option<u64>,
}

/// Name of a device, and threads that its kernels use.
pub(super) type OpenedDevice = (&'static str, usize);

impl EngineOptions {
    pub(super) fn read(fields: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut options = Self {
            device: DeviceChoice::Auto,
            dtype: DType::Auto,
            capacity: CapacityRequest {
                max_num_seqs: 256,
                max_num_batched_tokens: 2048,
                ..CapacityRequest::default()
            },
            enable_prefix_caching: true,
            num_threads: None,
            packed_cache: None,
            kv_cache: KvCacheDType::Auto,
            seed: None,
        };
        for (name, value) in fields.into_iter().flatten() {
            options.set(&name.extract::<String>()?, &value)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        match name {
            "device" => self.device = DeviceChoice::parse(&read::<String>(name, value)?)?,
            "dtype" => self.dtype = DType::parse(&read::<String>(name, value)?)?,
            "max_model_len" => self.capacity.max_model_len = optional(name, value, count)?,
            "max_num_seqs" => self.capacity.max_num_seqs = count(name, value)?,
            "max_num_batched_tokens" => {
                self.capacity.max_num_batched_tokens = count(name, value)?;
            }
            "gpu_memory_utilization" => {
                self.capacity.gpu_memory_utilization = optional(name, value, float)?;
            }
            "kv_cache_dtype" => {
                self.kv_cache = KvCacheDType::parse(&read::<String>(name, value)?)?;
            }
            "kv_cache_tokens" => self.capacity.kv_cache_tokens = optional(name, value, count)?,
            "enable_prefix_caching" => self.enable_prefix_caching = read(name, value)?,
            "num_threads" => self.num_threads = optional(name, value, count)?,
            "packed_cache" => self.packed_cache = optional(name, value, folder)?,
            "seed" => self.seed = optional(name, value, seed)?.flatten(),
            _ => return Err(PyTypeError::new_err(format!("Engine has no argument {name:?}"))),
        }
        Ok(())
    }

    /// Has the backend keep what it packs, where that is wanted.
    fn keep_packed(
        &self,
        files: Option<&ModelFiles>,
        backend: &Backend,
    ) -> Result<Option<Arc<Mutex<PackedCache>>>> {
        let (Some(folder), Some(files), Some(layout)) =
            (&self.packed_cache, files, backend.packed_layout())
        else {
            return Ok(None);
        };
        let kept = PackedCache::open(folder, files, &layout, backend.num_threads())
            .map_err(|error| error.context("packed_cache"))?;
        let kept = Arc::new(Mutex::new(kept));
        backend.keep_packed(kept.clone());
        Ok(Some(kept))
    }

    /// Loads the model for the engine thread, tells `opened` of the device, then waits for `eos_token_ids`.
    pub(super) fn load(
        self,
        path: &Path,
        opened: &Sender<OpenedDevice>,
        eos_token_ids: &Receiver<Vec<u32>>,
    ) -> Result<(Runner, EngineConfig)> {
        let files = self.packed_cache.as_ref().map(|_| ModelFiles::of(path)).transpose()?;
        let checkpoint = checkpoint::load(path)?;
        let (device, threads, dtype) = (self.device, self.num_threads, self.dtype);
        let backend = Backend::open(device, threads, dtype, self.kv_cache, &checkpoint.spec)?;
        // One that has given up hears of nothing.
        let _ = opened.send((backend.device_name(), backend.num_threads()));
        let vocab_size = checkpoint.spec.vocab_size;
        let prefill_beside_decode = backend.prefill_beside_decode();
        let kept = self.keep_packed(files.as_ref(), &backend)?;
        let (runner, capacity) = Runner::load(checkpoint, backend, &self.capacity)?;
        if let Some(kept) = kept {
            kept.lock().unwrap_or_else(PoisonError::into_inner).finish();
        }
        let given_up = |_| Error::new(ErrorKind::Shutdown, "nobody waits for the model");
        let config = EngineConfig {
            max_model_len: capacity.max_model_len,
            max_num_seqs: self.capacity.max_num_seqs,
            max_num_batched_tokens: self.capacity.max_num_batched_tokens,
            prefill_beside_decode,
            num_blocks: capacity.num_blocks,
            enable_prefix_caching: self.enable_prefix_caching,
            seed: self.seed.unwrap_or_else(random_seed),
            eos_token_ids: eos_token_ids.recv().map_err(given_up)?,
            vocab_size,
        };
        Ok((runner, config))
    }
}

fn folder(name: &str, value: &Bound<'_, PyAny>) -> PyResult<PathBuf> {
    read(name, value)
}

fn float(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    read(name, value)
}

/// A seed that differs from engine to engine: the standard library keys its hasher from the system.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Reads every given field; an unknown name or a value of another type is an error that names it.
pub(super) fn sampling_options(fields: Option<&Bound<'_, PyDict>>) -> PyResult<SamplingOptions> {
    let mut options = SamplingOptions::default();
    for (name, value) in fields.into_iter().flatten() {
        let name: String = name.extract()?;
        set(&mut options, &name, &value)?;
    }
    Ok(options)
}

fn set(o: &mut SamplingOptions, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
    match name {
        "n" => o.n = integer(name, value)?,
        "presence_penalty" => o.presence_penalty = read(name, value)?,
        "frequency_penalty" => o.frequency_penalty = read(name, value)?,
        "repetition_penalty" => o.repetition_penalty = read(name, value)?,
        "temperature" => o.temperature = read(name, value)?,
        "top_p" => o.top_p = read(name, value)?,
        "top_k" => o.top_k = integer(name, value)?,
        "min_p" => o.min_p = read(name, value)?,
        "seed" => o.seed = optional(name, value, seed)?.flatten(),
        "stop_token_ids" => o.stop_token_ids = read(name, value)?,
        "ignore_eos" => o.ignore_eos = read(name, value)?,
        "max_tokens" => o.max_tokens = integer(name, value)?,
        "min_tokens" => o.min_tokens = integer(name, value)?,
        "logprobs" => o.logprobs = optional(name, value, integer)?,
        "prompt_logprobs" => o.prompt_logprobs = optional(name, value, integer)?,
        "logit_bias" => {
            let biases: Option<BTreeMap<i64, f64>> = read(name, value)?;
            o.logit_bias = biases.into_iter().flatten().collect();
        }
        "allowed_token_ids" => o.allowed_token_ids = read(name, value)?,
        "bad_words" => o.bad_words = read(name, value)?,
        "frequency_window" => o.frequency_window = integer(name, value)?,
        _ => return Err(PyTypeError::new_err(format!("submit has no argument {name:?}"))),
    }
    Ok(())
}

/// `None` for Python's None, else what `convert` makes of it.
fn optional<T>(
    name: &str,
    value: &Bound<'_, PyAny>,
    convert: impl FnOnce(&str, &Bound<'_, PyAny>) -> PyResult<T>,
) -> PyResult<Option<T>> {
    if value.is_none() { Ok(None) } else { convert(name, value).map(Some) }
}

/// Python's integer for a value that stands for one; a bool is none.
fn index<'py>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let index = value.call_method0("__index__").ok().filter(|_| !value.is_instance_of::<PyBool>());
    let Some(index) = index else {
        let message = format!("{name} must be an integer; given: {}", value.repr()?);
        return Err(PyTypeError::new_err(message));
    };
    Ok(index)
}

/// An integer; what does not fit becomes the nearest that does, which the core then judges.
fn integer(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    let value = index(name, value)?;
    Ok(match value.extract() {
        Ok(value) => value,
        Err(_) if value.lt(0)? => i64::MIN,
        Err(_) => i64::MAX,
    })
}

/// A positive number of things.
fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let value = index(name, value)?;
    if value.lt(1)? {
        return Err(PyValueError::new_err(format!("{name} must be at least 1; given: {value}")));
    }
    value.extract::<isize>().map(isize::unsigned_abs).map_err(|_| {
        PyValueError::new_err(format!("{name} must be at most {}; given: {value}", isize::MAX))
    })
}

/// 64 bits; -1 asks for a random one, as in vLLM.
fn seed(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if integer(name, value)? == -1 {
        return Ok(None);
    }
    value.extract().map(Some).map_err(|_: PyErr| {
        PyValueError::new_err(format!(
            "{name} must be between 0 and {}, or -1 for a random one; given: {value}",
            u64::MAX
        ))
    })
}

fn read<'py, T>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py>,
{
    let named = |error: PyErr| {
        let message = format!("{name}: {}; given: {value:?}", error.value(value.py()));
        if error.is_instance_of::<PyTypeError>(value.py()) {
            PyTypeError::new_err(message)
        } else {
            PyValueError::new_err(message)
        }
    };
    value.extract::<T>().map_err(Into::into).map_err(named)
}
