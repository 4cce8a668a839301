//! GGUF files, versions 2 and 3, little-endian.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. `parse` reads the file's
//! structure, `model` turns the metadata of an architecture into a [`crate::spec::ModelSpec`].

mod model;
mod parse;

use std::collections::BTreeMap;
use std::path::Path;

use super::{Checkpoint, mmap};
use crate::error::{Result, ResultExt};

/// One metadata value, in the type that the file gives it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// Type 0.
    U8(u8),
    /// Type 1.
    I8(i8),
    /// Type 2.
    U16(u16),
    /// Type 3.
    I16(i16),
    /// Type 4.
    U32(u32),
    /// Type 5.
    I32(i32),
    /// Type 6.
    F32(f32),
    /// Type 7.
    Bool(bool),
    /// Type 8.
    String(&'a str),
    /// Type 9: values of one type.
    Array(Vec<Value<'a>>),
    /// Type 10.
    U64(u64),
    /// Type 11.
    I64(i64),
    /// Type 12.
    F64(f64),
}

/// All keys and values of a file's header.
pub type Metadata<'a> = BTreeMap<&'a str, Value<'a>>;

/// What `read` makes of the keys and values of a `.gguf` file, among them the tokenizer's. Text lies in the mapped
/// file, which must not be changed meanwhile; no tensor is looked at.
pub fn metadata<T>(path: &Path, read: impl FnOnce(Metadata<'_>) -> T) -> Result<T> {
    let map = mmap::map(path)?;
    parse::metadata((*map).as_ref()).map(read).context(|| path.display())
}

pub(super) fn load(path: &Path) -> Result<Checkpoint> {
    let map = mmap::map(path)?;
    let file = parse::File::parse((*map).as_ref()).context(|| path.display())?;
    let tensors = file.tensors(&map).context(|| path.display())?;
    let spec = model::spec(&file.metadata, &tensors).context(|| path.display())?;
    model::assemble(path, spec, tensors)
}
