//! The Python binding `astrai_rs._core`: converts, releases the GIL, converts back.

mod engine;
mod error;
mod grammar;
mod metadata;
mod params;

use pyo3::prelude::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Rust core: token ids, numbers, paths and errors.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::engine::{Engine, Event};
    #[pymodule_export]
    use super::error::{CheckpointError, EngineClosed};
    #[pymodule_export]
    use super::grammar::{Grammar, GrammarCompiler};
    #[pymodule_export]
    use super::metadata::{gguf_metadata, inspect, merge_pairs, system_info};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
