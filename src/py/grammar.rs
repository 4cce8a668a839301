//! `GrammarCompiler` and `Grammar`, as Python sees them.

use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::grammar::{self, GrammarSource};

/// The vocabulary of a model as grammars need it. Threads may share it.
#[pyclass(frozen, module = "astrai_rs._core")]
#[derive(Debug)]
pub(super) struct GrammarCompiler(grammar::GrammarCompiler);

#[pymethods]
impl GrammarCompiler {
    #[new]
    #[pyo3(signature = (tokens, *, special_ids, eos_token_ids, vocab_size))]
    fn new(
        py: Python<'_>,
        tokens: Vec<Vec<u8>>,
        special_ids: Vec<u32>,
        eos_token_ids: Vec<u32>,
        vocab_size: usize,
    ) -> PyResult<Self> {
        let make =
            move || grammar::GrammarCompiler::new(tokens, special_ids, eos_token_ids, vocab_size);
        Ok(Self(py.detach(make)?))
    }

    /// Compile a grammar; `kind` is `json`, `regex` or `lark`.
    #[pyo3(signature = (kind, source, *, any_whitespace = false))]
    fn compile(
        &self,
        py: Python<'_>,
        kind: &str,
        source: &str,
        any_whitespace: bool,
    ) -> PyResult<Grammar> {
        let source = grammar_source(kind, source, any_whitespace)?;
        Ok(Grammar(py.detach(|| self.0.compile(source))?))
    }
}

fn grammar_source<'a>(
    kind: &str,
    source: &'a str,
    any_whitespace: bool,
) -> Result<GrammarSource<'a>> {
    match kind {
        "json" => Ok(GrammarSource::JsonSchema { schema: source, any_whitespace }),
        "regex" => Ok(GrammarSource::Regex(source)),
        "lark" => Ok(GrammarSource::Lark(source)),
        _ => Err(Error::invalid(format!("kind must be one of json, regex, lark; given: {kind:?}"))),
    }
}

/// A compiled grammar. Any number of requests may use it.
#[pyclass(frozen, module = "astrai_rs._core")]
#[derive(Debug)]
pub(super) struct Grammar(pub(super) grammar::Grammar);
