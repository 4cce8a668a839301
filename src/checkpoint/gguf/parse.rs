//! The structure of a GGUF file. Nothing in it is trusted: every read is checked against the end of
//! the file, and every count against the bytes that are left, before anything is allocated.
//!
//! ```text
//! "GGUF" · version u32 · tensors u64 · keys u64
//! keys ×    { key string · type u32 · value }           string: length u64 · UTF-8
//! tensors × { name string · n u32 · n × dim u64 (fastest first) · type u32 · offset u64 }
//! padding to general.alignment (32) · data, where each tensor starts at its offset, so aligned
//! ```

use std::collections::BTreeSet;

use super::{Metadata, Value};
use crate::checkpoint::RawTensor;
use crate::checkpoint::mmap::Mapped;
use crate::error::{Error, Result, ResultExt};
use crate::weights::{Bytes, Encoding};

/// Values in all arrays of a file together; the largest vocabularies have about a million.
const MAX_ARRAY_VALUES: usize = 1 << 22;
const MAX_ARRAY_DEPTH: usize = 4;
const MAX_DIMS: u32 = 4;
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// The smallest key (empty key, type, one-byte value) and tensor (empty name, no dimension).
const MIN_KEY_BYTES: usize = 8 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A parsed header.
pub(super) struct File<'a> {
    pub(super) metadata: Metadata<'a>,
    infos: Vec<Info<'a>>,
    alignment: usize,
    data_start: usize,
}

struct Info<'a> {
    name: &'a str,
    /// Slowest first, the reverse of the file's order.
    shape: Vec<usize>,
    ggml_type: u32,
    offset: u64,
}

/// The keys alone, of a file whose tensors may be of any type.
pub(super) fn metadata(bytes: &[u8]) -> Result<Metadata<'_>> {
    header(bytes).map(|(_, _, metadata)| metadata)
}

impl<'a> File<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let (mut reader, tensors, metadata) = header(bytes)?;
        let alignment = alignment(&metadata)?;
        let count = reader.count(tensors, MIN_TENSOR_BYTES, || "tensors".into())?;
        let mut infos = Vec::with_capacity(count);
        let mut names = BTreeSet::new();
        for index in 0..count {
            let info = read_info(&mut reader).context(|| format!("tensor {index} of {count}"))?;
            if !names.insert(info.name) {
                return Err(Error::checkpoint(format!("two tensors are named `{}`", info.name)));
            }
            infos.push(info);
        }
        let data_start = reader.at.next_multiple_of(alignment);
        Ok(Self { metadata, infos, alignment, data_start })
    }

    /// The tensors as ranges of `map`, which is the file that was parsed.
    pub(super) fn tensors(&self, map: &Mapped) -> Result<Vec<RawTensor>> {
        let mut ranges = Vec::new();
        let mut tensors = Vec::new();
        for info in &self.infos {
            let encoding = encoding(info.ggml_type);
            let range = self.range(info, encoding, (**map).as_ref().len())?;
            ranges.push((range.clone(), info.name));
            tensors.push(RawTensor {
                name: info.name.to_owned(),
                shape: info.shape.clone(),
                encoding,
                type_name: type_name(info.ggml_type),
                data: Bytes::new(map.clone(), range)?,
            });
        }
        ranges.retain(|(range, _)| !range.is_empty());
        ranges.sort_by_key(|(range, _)| range.start);
        match ranges.windows(2).find(|pair| pair[1].0.start < pair[0].0.end) {
            Some(pair) => Err(Error::checkpoint(format!(
                "tensors `{}` and `{}` overlap",
                pair[0].1, pair[1].1
            ))),
            None => Ok(tensors),
        }
    }

    /// Where a tensor's bytes lie. Those of a format that we do not read are of unknown length: 0.
    fn range(
        &self,
        info: &Info<'_>,
        encoding: Option<Encoding>,
        end: usize,
    ) -> Result<std::ops::Range<usize>> {
        let name = info.name;
        if !info.offset.is_multiple_of(self.alignment as u64) {
            return Err(Error::checkpoint(format!(
                "tensor `{name}`: offset {} is not a multiple of the alignment {}",
                info.offset, self.alignment
            )));
        }
        let len = info.shape.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim));
        let bytes = match encoding {
            Some(encoding) => len.and_then(|len| encoding.bytes_for(len)).ok_or_else(|| {
                Error::checkpoint(format!(
                    "tensor `{name}`: no size fits shape {:?} ({encoding:?})",
                    info.shape
                ))
            })?,
            None => 0,
        };
        let start = usize::try_from(info.offset)
            .ok()
            .and_then(|offset| self.data_start.checked_add(offset));
        match start.and_then(|start| Some(start..start.checked_add(bytes)?)) {
            Some(range) if range.end <= end => Ok(range),
            _ => Err(Error::checkpoint(format!(
                "tensor `{name}`: {bytes} bytes at offset {} reach beyond the file's {end} bytes (truncated?)",
                info.offset
            ))),
        }
    }
}

/// What stands before the tensors: a reader behind it, the number of tensors, and the keys.
fn header(bytes: &[u8]) -> Result<(Reader<'_>, u64, Metadata<'_>)> {
    if !bytes.starts_with(b"GGUF") {
        return Err(Error::checkpoint("not a GGUF file: it does not start with \"GGUF\""));
    }
    let mut reader = Reader { bytes, at: 4, array_values: 0 };
    let version = reader.u32()?;
    if version.trailing_zeros() >= 16 {
        return Err(Error::unsupported("big-endian GGUF is not supported"));
    }
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported(format!(
            "GGUF version {version} is not supported; supported: 2, 3"
        )));
    }
    let (tensors, keys) = (reader.u64()?, reader.u64()?);
    let metadata = read_metadata(&mut reader, keys)?;
    Ok((reader, tensors, metadata))
}

fn read_metadata<'a>(reader: &mut Reader<'a>, count: u64) -> Result<Metadata<'a>> {
    let count = reader.count(count, MIN_KEY_BYTES, || "keys".into())?;
    let mut metadata = Metadata::new();
    for index in 0..count {
        let key = reader.string().context(|| format!("key {index} of {count}"))?;
        let value = reader
            .u32()
            .and_then(|kind| reader.value(kind, 0))
            .context(|| format!("key \"{key}\""))?;
        if metadata.insert(key, value).is_some() {
            return Err(Error::checkpoint(format!("key \"{key}\" is there twice")));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &Metadata<'_>) -> Result<usize> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(value)) if value.is_power_of_two() => Ok(value as usize),
        Some(other) => Err(Error::checkpoint(format!(
            "\"{ALIGNMENT_KEY}\" must be a u32 power of two; given: {other:?}"
        ))),
    }
}

fn read_info<'a>(reader: &mut Reader<'a>) -> Result<Info<'a>> {
    let name = reader.string()?;
    let dims = reader.u32()?;
    if !(1..=MAX_DIMS).contains(&dims) {
        return Err(Error::checkpoint(format!(
            "`{name}` has {dims} dimensions; 1 to {MAX_DIMS} are possible"
        )));
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        let dim = reader.u64()?;
        shape.push(
            usize::try_from(dim)
                .ok()
                .filter(|&dim| dim > 0)
                .ok_or_else(|| Error::checkpoint(format!("`{name}` has a dimension of {dim}")))?,
        );
    }
    shape.reverse();
    Ok(Info { name, shape, ggml_type: reader.u32()?, offset: reader.u64()? })
}

fn encoding(ggml_type: u32) -> Option<Encoding> {
    match ggml_type {
        0 => Some(Encoding::F32),
        1 => Some(Encoding::F16),
        2 => Some(Encoding::Q4_0),
        3 => Some(Encoding::Q4_1),
        8 => Some(Encoding::Q8_0),
        30 => Some(Encoding::BF16),
        _ => None,
    }
}

/// The name of `enum ggml_type`, for messages; gaps are types that ggml has removed.
fn type_name(ggml_type: u32) -> String {
    const NAMES: [&str; 40] = [
        "F32",
        "F16",
        "Q4_0",
        "Q4_1",
        "Q4_2",
        "Q4_3",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q8_1",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "Q8_K",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ3_XXS",
        "IQ1_S",
        "IQ4_NL",
        "IQ3_S",
        "IQ2_S",
        "IQ4_XS",
        "I8",
        "I16",
        "I32",
        "I64",
        "F64",
        "IQ1_M",
        "BF16",
        "Q4_0_4_4",
        "Q4_0_4_8",
        "Q4_0_8_8",
        "TQ1_0",
        "TQ2_0",
        "IQ4_NL_4_4",
        "IQ4_NL_4_8",
        "IQ4_NL_8_8",
        "MXFP4",
    ];
    match NAMES.get(ggml_type as usize) {
        Some(name) => format!("{name} (ggml type {ggml_type})"),
        None => format!("the unknown ggml type {ggml_type}"),
    }
}

/// A position in the file. Every read moves it and fails at the end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    array_values: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(Error::checkpoint(format!(
                "truncated: {len} bytes are needed at byte {}, the file has {}",
                self.at,
                self.bytes.len()
            )));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("`take` gives as many bytes as it is asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// `count` as a number of things that take at least `each` bytes of what is left.
    fn count(&self, count: u64, each: usize, what: impl Fn() -> String) -> Result<usize> {
        let left = self.bytes.len() - self.at;
        usize::try_from(count).ok().filter(|&count| count <= left / each).ok_or_else(|| {
            Error::checkpoint(format!(
                "{count} {} do not fit in the {left} bytes left (truncated?)",
                what()
            ))
        })
    }

    fn string(&mut self) -> Result<&'a str> {
        let len = self.u64()?;
        let len = self.count(len, 1, || "bytes of a string".into())?;
        std::str::from_utf8(self.take(len)?).map_err(|_| Error::checkpoint("a string is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value<'a>> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array()? {
                [byte @ (0 | 1)] => Value::Bool(byte == 1),
                [byte] => {
                    return Err(Error::checkpoint(format!("a bool must be 0 or 1; given: {byte}")));
                }
            },
            8 => Value::String(self.string()?),
            9 => self.values(depth)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            _ => {
                return Err(Error::checkpoint(format!(
                    "value type {kind} is unknown; 0 to 12 are possible"
                )));
            }
        })
    }

    fn values(&mut self, depth: usize) -> Result<Value<'a>> {
        if depth == MAX_ARRAY_DEPTH {
            return Err(Error::checkpoint(format!("arrays nest deeper than {MAX_ARRAY_DEPTH}")));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        let count = self.count(count, min_bytes(kind), || "array values".into())?;
        self.array_values += count;
        if self.array_values > MAX_ARRAY_VALUES {
            return Err(Error::checkpoint(format!("more than {MAX_ARRAY_VALUES} array values")));
        }
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(self.value(kind, depth + 1)?);
        }
        Ok(Value::Array(values))
    }
}

/// The fewest bytes that a value of type `kind` takes.
fn min_bytes(kind: u32) -> usize {
    match kind {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_names_follow_ggml() {
        for (ggml_type, name) in
            [(12, "Q4_K"), (20, "IQ4_NL"), (28, "F64"), (30, "BF16"), (39, "MXFP4")]
        {
            assert_eq!(type_name(ggml_type), format!("{name} (ggml type {ggml_type})"));
        }
        assert_eq!(type_name(99), "the unknown ggml type 99");
    }
}
