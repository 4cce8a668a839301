//! Keyword arguments of `submit` → [`SamplingOptions`].

use std::collections::BTreeMap;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::sampler::SamplingOptions;

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
        "n" => o.n = read(name, value)?,
        "presence_penalty" => o.presence_penalty = read(name, value)?,
        "frequency_penalty" => o.frequency_penalty = read(name, value)?,
        "repetition_penalty" => o.repetition_penalty = read(name, value)?,
        "temperature" => o.temperature = read(name, value)?,
        "top_p" => o.top_p = read(name, value)?,
        "top_k" => o.top_k = read(name, value)?,
        "min_p" => o.min_p = read(name, value)?,
        "seed" => o.seed = read(name, value)?,
        "stop_token_ids" => o.stop_token_ids = read(name, value)?,
        "ignore_eos" => o.ignore_eos = read(name, value)?,
        "max_tokens" => o.max_tokens = read(name, value)?,
        "min_tokens" => o.min_tokens = read(name, value)?,
        "logprobs" => o.logprobs = read(name, value)?,
        "prompt_logprobs" => o.prompt_logprobs = read(name, value)?,
        "logit_bias" => {
            let biases: Option<BTreeMap<i64, f64>> = read(name, value)?;
            o.logit_bias = biases.into_iter().flatten().collect();
        }
        "allowed_token_ids" => o.allowed_token_ids = read(name, value)?,
        "bad_words" => o.bad_words = read(name, value)?,
        "frequency_window" => o.frequency_window = read(name, value)?,
        _ => return Err(PyTypeError::new_err(format!("submit has no argument {name:?}"))),
    }
    Ok(())
}

fn read<'py, T>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py>,
{
    value.extract().map_err(|error| {
        let error: PyErr = error.into();
        PyValueError::new_err(format!("{name}: {error}"))
    })
}
