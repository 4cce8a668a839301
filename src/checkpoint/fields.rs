//! [`Fields`]: a configuration's keys, read with errors that name key, value and what is allowed.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Larger sizes are corrupt; the bound keeps products of sizes within 64 bits.
const MAX_SIZE: u64 = i32::MAX as u64;

/// A JSON object (or GGUF metadata in that form). A key that is `null` counts as absent, as it
/// does in transformers and AstrAI.
#[derive(Debug)]
pub(super) struct Fields {
    values: Map<String, Value>,
    prefix: String,
}

impl Fields {
    /// `prefix` stands before each key in messages: `rope_parameters.` or `llama.`.
    pub(super) fn new(values: Map<String, Value>, prefix: impl Into<String>) -> Self {
        Self { values, prefix: prefix.into() }
    }

    /// Reads a file's bytes, which must be one JSON object.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(values)) => Ok(Self::new(values, "")),
            Ok(other) => {
                Err(Error::checkpoint(format!("not a JSON object; given: {}", shown(&other))))
            }
            Err(error) => Err(Error::checkpoint(format!("not valid JSON: {error}"))),
        }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the key is there with the value `null`.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(Value::is_null)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The key as messages show it.
    pub(super) fn name(&self, key: &str) -> String {
        format!("\"{}{key}\"", self.prefix)
    }

    /// A count, width or length: an integer from 1.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.required(key, self.opt_size(key)?)
    }

    pub(super) fn opt_size(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a positive integer", as_size)
    }

    /// An integer from 0.
    pub(super) fn opt_index(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a non-negative integer", |value| {
            value.as_u64().filter(|&size| size <= MAX_SIZE).map(|size| size as usize)
        })
    }

    /// One size, or a list with one per layer (GGUF).
    pub(super) fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let sizes = self.read(key, "a positive integer", |value| match value {
            Value::Array(items) if !items.is_empty() => items.iter().map(as_size).collect(),
            one => as_size(one).map(|size| vec![size]),
        })?;
        self.required(key, sizes)
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.required(key, self.opt_number(key)?)
    }

    pub(super) fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub(super) fn opt_text(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn opt_texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.read(key, "a list of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    pub(super) fn opt_object(&self, key: &str) -> Result<Option<Self>> {
        let prefix = format!("{}{key}.", self.prefix);
        self.read(key, "an object", |value| {
            Some(Self::new(value.as_object()?.clone(), prefix.clone()))
        })
    }

    /// All keys with their values, which must be strings: a shard index.
    pub(super) fn texts(&self) -> Result<Vec<(&str, &str)>> {
        self.values.keys().map(|key| Ok((key.as_str(), self.text(key)?))).collect()
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.required(key, self.opt_text(key)?)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::checkpoint(format!("{} is missing", self.name(key))))
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::checkpoint(format!(
                "{} must be {what}; given: {}",
                self.name(key),
                shown(value)
            ))),
        }
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|size| (1..=MAX_SIZE).contains(size)).map(|size| size as usize)
}

/// Whether two configured numbers are not the same.
pub(super) fn differ(a: f64, b: f64) -> bool {
    (a - b).abs() > f64::EPSILON
}

/// The value for a message, not longer than a line.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 {
        return text;
    }
    text.chars().take(77).chain("...".chars()).collect()
}
