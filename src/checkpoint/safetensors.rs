//! Weights of a folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! Format: <https://huggingface.co/docs/safetensors>. The crate `safetensors` parses the header and
//! checks that the tensors cover the data without gap or overlap; the numbers stay where they lie.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, SafeTensorError};

use super::fields::Fields;
use super::{RawTensor, mmap};
use crate::error::{Error, Result, ResultExt};
use crate::weights::{Bytes, Encoding};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Every tensor of the folder. The single file wins over an index, as in transformers.
pub(super) fn read(folder: &Path) -> Result<Vec<RawTensor>> {
    if folder.join(SINGLE).exists() {
        return read_file(&folder.join(SINGLE));
    }
    if folder.join(INDEX).exists() {
        return read_shards(folder).context(|| folder.join(INDEX).display().to_string());
    }
    let others = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    let hint = match others.iter().find(|name| folder.join(name).exists()) {
        Some(name) => format!(" ({name} is not read: save the model as safetensors)"),
        None => String::new(),
    };
    Err(Error::checkpoint(format!(
        "{}: neither {SINGLE} nor {INDEX} is there{hint}",
        folder.display()
    )))
}

fn read_shards(folder: &Path) -> Result<Vec<RawTensor>> {
    let index = Fields::parse((*mmap::map(&folder.join(INDEX))?).as_ref())?;
    let Some(map) = index.opt_object("weight_map")? else {
        return Err(Error::checkpoint("\"weight_map\" is missing"));
    };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in map.texts()? {
        shards.entry(shard).or_default().insert(tensor);
    }
    let mut tensors = Vec::new();
    for (shard, listed) in shards {
        let found = read_shard(folder, shard)?;
        check_listing(shard, &listed, &found)?;
        tensors.extend(found);
    }
    Ok(tensors)
}

fn read_shard(folder: &Path, shard: &str) -> Result<Vec<RawTensor>> {
    if shard.is_empty() || shard == ".." || shard.contains(['/', '\\']) {
        return Err(Error::checkpoint(format!(
            "shard {shard:?} must be the name of a file beside the index"
        )));
    }
    if !folder.join(shard).exists() {
        return Err(Error::checkpoint(format!("shard `{shard}` is missing")));
    }
    read_file(&folder.join(shard))
}

fn check_listing(shard: &str, listed: &BTreeSet<&str>, found: &[RawTensor]) -> Result<()> {
    let found: BTreeSet<&str> = found.iter().map(|tensor| tensor.name.as_str()).collect();
    if let Some(absent) = listed.difference(&found).next() {
        return Err(Error::checkpoint(format!("tensor `{absent}` is not in its shard `{shard}`")));
    }
    if let Some(extra) = found.difference(listed).next() {
        return Err(Error::checkpoint(format!(
            "tensor `{extra}` of shard `{shard}` is not listed there"
        )));
    }
    Ok(())
}

fn read_file(path: &Path) -> Result<Vec<RawTensor>> {
    let map = mmap::map(path)?;
    let bytes = (*map).as_ref();
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::checkpoint(explain(&error)).context(path.display()))?;
    let start = size_of::<u64>() + header;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        tensors.push(RawTensor {
            name,
            shape: info.shape.clone(),
            encoding: encoding(info.dtype),
            type_name: info.dtype.to_string(),
            data: Bytes::new(map.clone(), start + from..start + to).context(|| path.display())?,
        });
    }
    Ok(tensors)
}

fn encoding(dtype: Dtype) -> Option<Encoding> {
    match dtype {
        Dtype::F32 => Some(Encoding::F32),
        Dtype::F16 => Some(Encoding::F16),
        Dtype::BF16 => Some(Encoding::BF16),
        _ => None,
    }
}

fn explain(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "not a safetensors file: shorter than 8 bytes".into(),
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            "not a safetensors file, or truncated: its header would reach beyond its end".into()
        }
        SafeTensorError::InvalidHeader(_) => "the safetensors header is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(error) => {
            format!("the safetensors header is not valid: {error}")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            "truncated or overlong: the tensors do not end where the file ends".into()
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor `{name}` overlaps another, leaves a gap or ends before it starts")
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's shape does not fit its bytes".into(),
        other => format!("the safetensors header is not valid: {other}"),
    }
}
