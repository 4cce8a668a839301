//! Functions that need no engine: GGUF metadata for the tokenizer, and what the machine offers.

use std::path::PathBuf;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyList, PyString};

use super::error::CheckpointError;
use crate::backend::Backend;
use crate::checkpoint;
use crate::checkpoint::gguf::{self, Metadata, Value};
use crate::config::DType;

/// Every metadata key of a GGUF file, arrays as lists.
#[pyfunction]
pub(super) fn gguf_metadata(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyDict>> {
    let dict = |metadata: Metadata<'_>| {
        Python::attach(|py| {
            let dict = PyDict::new(py);
            for (key, value) in metadata {
                dict.set_item(key, to_python(py, value)?)?;
            }
            Ok(dict.unbind())
        })
    };
    py.detach(move || gguf::metadata(&path, dict))?
}

fn to_python<'py>(py: Python<'py>, value: Value<'_>) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::U8(x) => x.into_bound_py_any(py),
        Value::I8(x) => x.into_bound_py_any(py),
        Value::U16(x) => x.into_bound_py_any(py),
        Value::I16(x) => x.into_bound_py_any(py),
        Value::U32(x) => x.into_bound_py_any(py),
        Value::I32(x) => x.into_bound_py_any(py),
        Value::F32(x) => x.into_bound_py_any(py),
        Value::Bool(x) => x.into_bound_py_any(py),
        Value::String(x) => x.into_bound_py_any(py),
        Value::U64(x) => x.into_bound_py_any(py),
        Value::I64(x) => x.into_bound_py_any(py),
        Value::F64(x) => x.into_bound_py_any(py),
        Value::Array(values) => {
            let items = PyList::empty(py);
            for value in values {
                items.append(to_python(py, value)?)?;
            }
            Ok(items.into_any())
        }
    }
}

/// The two tokens of each merge, from `"left right"`.
#[pyfunction]
pub(super) fn merge_pairs<'py>(
    py: Python<'py>,
    merges: Vec<Bound<'py, PyAny>>,
) -> PyResult<Vec<(Bound<'py, PyString>, Bound<'py, PyString>)>> {
    let pair = |merge: Bound<'py, PyAny>| {
        let text = merge.extract::<PyBackedStr>().ok();
        let halves = text.as_ref().and_then(|text| text.split_once(' '));
        match halves.filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' ')) {
            Some((a, b)) => Ok((PyString::new(py, a), PyString::new(py, b))),
            None => Err(CheckpointError::new_err(format!(
                "tokenizer.ggml.merges has {}; each must be two tokens with one space between",
                merge.repr()?
            ))),
        }
    };
    merges.into_iter().map(pair).collect()
}

/// What a model is: sizes, and every tensor as `(name, shape, encoding, bytes)`. No weight is read.
#[pyfunction]
pub(super) fn inspect(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let checkpoint = py.detach(move || checkpoint::load(&path))?;
    let (spec, facts) = (&checkpoint.spec, PyDict::new(py));
    facts.set_item("vocab_size", spec.vocab_size)?;
    facts.set_item("hidden_size", spec.hidden_size)?;
    facts.set_item("intermediate_size", spec.mlp.intermediate_size)?;
    facts.set_item("num_layers", spec.num_layers)?;
    facts.set_item("num_heads", spec.attention.num_heads)?;
    facts.set_item("num_kv_heads", spec.attention.num_kv_heads)?;
    facts.set_item("head_dim", spec.attention.head_dim)?;
    facts.set_item("max_positions", spec.max_positions)?;
    facts.set_item("rope_theta", spec.rope.theta)?;
    facts.set_item("tie_embeddings", spec.tie_embeddings)?;
    let tensors = checkpoint.weights.iter().map(|(name, tensor)| {
        let encoding = format!("{:?}", tensor.encoding);
        (name.to_owned(), tensor.shape.clone(), encoding, tensor.data.as_slice().len())
    });
    facts.set_item("tensors", tensors.collect::<Vec<_>>())?;
    Ok(facts)
}

/// `tier` (SIMD level), `num_threads`, `cuda` (built with it) and `version`.
#[pyfunction]
pub(super) fn system_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let backend = Backend::cpu(None, DType::Auto)?;
    let info = PyDict::new(py);
    info.set_item("tier", backend.tier())?;
    info.set_item("num_threads", backend.num_threads())?;
    info.set_item("cuda", cfg!(feature = "cuda"))?;
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    Ok(info)
}
