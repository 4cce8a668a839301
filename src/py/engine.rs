//! `Engine` and `Event`: the engine thread's handle and its events, as Python sees them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::grammar::Grammar;
use super::params::{EngineOptions, sampling_options};
use crate::engine::thread::EngineHandle;
use crate::engine::{self, Request};
use crate::error::{Error, Result};
use crate::sampler::{SamplingParams, TokenLogprob};
use crate::sequence::{FinishReason, SampleMetrics};

/// `(id, logprob, rank)`.
type Entry = (u32, f32, u32);

/// A loaded model and the thread that runs it. Every method may be called from any thread.
#[pyclass(frozen, module = "astrai_rs._core")]
#[derive(Debug)]
pub(super) struct Engine {
    handle: EngineHandle,
    device: &'static str,
    dtype: &'static str,
    kv_cache_dtype: &'static str,
    num_threads: usize,
}

#[pymethods]
impl Engine {
    /// Load the model; `eos_token_ids` is called meanwhile.
    #[new]
    #[pyo3(signature = (path, eos_token_ids, **options))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        eos_token_ids: &Bound<'_, PyAny>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let options = EngineOptions::read(options)?;
        let eos_token_ids = eos_token_ids.clone().unbind();
        py.detach(|| {
            let (dtype, kv_cache_dtype) = (options.dtype.name(), options.kv_cache.name());
            let (opened, device) = mpsc::channel();
            let (ids, given_ids) = mpsc::channel();
            let meanwhile = || {
                let given = Python::attach(|py| eos_token_ids.call0(py)?.extract(py))?;
                // A thread that failed hears of nothing; `start` reports its error.
                let _ = ids.send(given);
                Ok(())
            };
            #[expect(clippy::redundant_closure_for_method_calls, reason = "of every lifetime")]
            let signals = || Python::attach(|py| py.check_signals());
            let load = move || options.load(&path, &opened, &given_ids);
            let handle = EngineHandle::start(load, meanwhile, signals)?;
            let died = |_| Error::bug("the engine thread has opened no device");
            let (device, num_threads) = device.recv().map_err(died)?;
            Ok(Self { handle, device, dtype, kv_cache_dtype, num_threads })
        })
    }

    /// Queue a request and return its id.
    #[pyo3(signature = (prompt_token_ids, *, grammar = None, **params))]
    fn submit(
        &self,
        py: Python<'_>,
        prompt_token_ids: Vec<i64>,
        grammar: Option<&Bound<'_, Grammar>>,
        params: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<u64> {
        let options = sampling_options(params)?;
        let grammar = grammar.map(|grammar| grammar.get().0.clone());
        Ok(py.detach(|| {
            let vocab_size = self.handle.config().vocab_size;
            let prompt = token_ids(prompt_token_ids, vocab_size)?;
            let params = SamplingParams::new(&options, vocab_size)?;
            self.handle.submit(Request { prompt, params, grammar })
        })?)
    }

    /// Stop a request, or one sample of it. Unknown and finished ids are ignored.
    #[pyo3(signature = (request_id, sample = None))]
    fn abort(&self, py: Python<'_>, request_id: u64, sample: Option<u32>) {
        py.detach(|| self.handle.abort(request_id, sample));
    }

    /// Wait up to `timeout` seconds for events.
    fn poll(&self, py: Python<'_>, timeout: f64) -> PyResult<Vec<Event>> {
        let timeout = Duration::try_from_secs_f64(timeout)
            .map_err(|_| Error::invalid(format!("timeout must be at least 0; given: {timeout}")))?;
        let events = py.detach(|| self.handle.poll(timeout))?;
        Ok(events.into_iter().map(Event).collect())
    }

    /// Gauges and counters by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.handle.stats());
        let dict = PyDict::new(py);
        dict.set_item("num_requests_running", stats.num_requests_running)?;
        dict.set_item("num_requests_waiting", stats.num_requests_waiting)?;
        dict.set_item("kv_blocks_used", stats.kv_blocks_used)?;
        dict.set_item("kv_blocks_total", stats.kv_blocks_total)?;
        dict.set_item("kv_blocks_cached", stats.kv_blocks_cached)?;
        dict.set_item("prefix_cache_queries", stats.prefix_cache_queries)?;
        dict.set_item("prefix_cache_hits", stats.prefix_cache_hits)?;
        dict.set_item("preemptions", stats.preemptions)?;
        dict.set_item("prompt_tokens_total", stats.prompt_tokens_total)?;
        dict.set_item("generation_tokens_total", stats.generation_tokens_total)?;
        dict.set_item("uptime_s", stats.uptime_s)?;
        dict.set_item("steps", stats.steps)?;
        dict.set_item("heartbeat_s", stats.heartbeat_s)?;
        Ok(dict)
    }

    /// Forget every cached beginning of a prompt.
    fn clear_prefix_cache(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.handle.clear_prefix_cache())?)
    }

    /// Stop the engine thread; live requests get an error event. Idempotent.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.handle.close());
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.handle.config().vocab_size
    }

    #[getter]
    fn max_model_len(&self) -> usize {
        self.handle.config().max_model_len
    }

    #[getter]
    fn max_num_seqs(&self) -> usize {
        self.handle.config().max_num_seqs
    }

    #[getter]
    fn kv_cache_tokens(&self) -> usize {
        self.handle.config().num_blocks * crate::config::BLOCK_SIZE
    }

    #[getter]
    fn device(&self) -> &'static str {
        self.device
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype
    }

    #[getter]
    fn kv_cache_dtype(&self) -> &'static str {
        self.kv_cache_dtype
    }

    #[getter]
    fn num_threads(&self) -> usize {
        self.num_threads
    }
}

impl Drop for Engine {
    /// Other threads go on while the last step ends.
    fn drop(&mut self) {
        Python::attach(|py| py.detach(|| self.handle.close()));
    }
}

fn token_ids(given: Vec<i64>, vocab_size: usize) -> Result<Vec<u32>> {
    let id = |id: i64| match u32::try_from(id) {
        Ok(id) if (id as usize) < vocab_size => Ok(id),
        _ => Err(Error::invalid(format!(
            "prompt token ids must be between 0 and {}; given: {id}",
            vocab_size - 1
        ))),
    };
    given.into_iter().map(id).collect()
}

/// What one step produced for one sample of one request.
#[pyclass(frozen, module = "astrai_rs._core")]
#[derive(Debug)]
pub(super) struct Event(engine::Event);

#[pymethods]
impl Event {
    #[getter]
    fn request_id(&self) -> u64 {
        self.0.id.request
    }

    #[getter]
    fn sample(&self) -> u32 {
        self.0.id.sample
    }

    #[getter]
    fn token_ids(&self) -> &[u32] {
        &self.0.token_ids
    }

    #[getter]
    fn logprobs(&self) -> Option<Vec<Vec<Entry>>> {
        self.0.logprobs.as_ref().map(|tokens| tokens.iter().map(|token| entries(token)).collect())
    }

    #[getter]
    fn num_cached_tokens(&self) -> Option<usize> {
        self.0.num_cached_tokens
    }

    #[getter]
    fn prompt_logprobs(&self) -> Option<Vec<Option<Vec<Entry>>>> {
        let tokens = self.0.prompt_logprobs.as_ref()?;
        Some(tokens.iter().map(|token| token.as_deref().map(entries)).collect())
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.0.finish.as_ref().map(|finish| finish.reason.name())
    }

    #[getter]
    fn stop_reason(&self) -> Option<u32> {
        match self.0.finish.as_ref()?.reason {
            FinishReason::StopToken(token) => Some(token),
            _ => None,
        }
    }

    #[getter]
    fn ends_with_stop_token(&self) -> bool {
        let reason = self.0.finish.as_ref().map(|finish| &finish.reason);
        matches!(reason, Some(FinishReason::EndOfText | FinishReason::StopToken(_)))
    }

    #[getter]
    fn error(&self) -> Option<(&'static str, String)> {
        match &self.0.finish.as_ref()?.reason {
            FinishReason::Error(error) => Some((error.kind().name(), error.to_string())),
            _ => None,
        }
    }

    #[getter]
    fn metrics(&self, py: Python<'_>) -> PyResult<Option<BTreeMap<&'static str, Py<PyAny>>>> {
        self.0.finish.as_ref().map(|finish| metrics(py, &finish.metrics)).transpose()
    }
}

fn entries(token: &[TokenLogprob]) -> Vec<Entry> {
    token.iter().map(|entry| (entry.id, entry.logprob, entry.rank)).collect()
}

fn metrics(py: Python<'_>, metrics: &SampleMetrics) -> PyResult<BTreeMap<&'static str, Py<PyAny>>> {
    Ok(BTreeMap::from([
        ("arrival_time", metrics.arrival_time.into_py_any(py)?),
        ("first_scheduled_time", metrics.first_scheduled_time.into_py_any(py)?),
        ("first_token_time", metrics.first_token_time.into_py_any(py)?),
        ("finished_time", metrics.finished_time.into_py_any(py)?),
        ("num_cached_tokens", metrics.num_cached_tokens.into_py_any(py)?),
        ("num_preemptions", metrics.num_preemptions.into_py_any(py)?),
    ]))
}
