//! Checkpoints: the only code that reads files. A path becomes a [`ModelSpec`] and [`Weights`] under
//! canonical names; past this module nothing knows which format or family a model came from.
//!
//! Reading order: this file (what is it?), `fields` (configuration keys), `rules` (tensor names),
//! then one file per format: `hf` (with `rope`), `astrai`, [`gguf`]; `safetensors` and `mmap` below. `packed` keeps what
//! a device makes of the weights.

mod astrai;
mod fields;
pub mod gguf;
mod hf;
mod mmap;
mod packed;
mod rope;
mod rules;
mod safetensors;

use std::fs;
use std::path::{Path, PathBuf};

use self::fields::Fields;
pub use self::packed::{ModelFiles, PackedCache};
use self::rules::{HEAD, Names};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::spec::{MAX_LAYERS, ModelSpec};
use crate::weights::{Bytes, Encoding, Weights};

/// A model as its files describe it. Loading maps files and reads headers; no weight is copied.
#[derive(Debug)]
pub struct Checkpoint {
    /// What to compute.
    pub spec: ModelSpec,
    /// With which numbers.
    pub weights: Weights,
}

/// A tensor under its file's name, before the name rules and the check of its number format.
#[derive(Debug)]
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    /// `None`: a number format that we do not read; `type_name` says which.
    encoding: Option<Encoding>,
    type_name: String,
    data: Bytes,
}

const CONFIG: &str = "config.json";

/// Loads a `.gguf` file, a folder with `config.json` and safetensors (Hugging Face or AstrAI; the
/// rule that tells them apart is in `astrai.rs`), or a folder whose weights are exactly one `.gguf`.
///
/// The files stay mapped while the weights live and must not be changed meanwhile.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let shown = path.display();
    let kind = fs::metadata(path).map_err(|error| io_error(path, error))?;
    if kind.is_dir() {
        return load_folder(path);
    }
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        return Err(Error::checkpoint(format!(
            "{shown}: give the folder that holds it and {CONFIG}"
        )));
    }
    gguf::load(path)
}

fn load_folder(folder: &Path) -> Result<Checkpoint> {
    let has = |name: &str| folder.join(name).exists();
    let config = has(CONFIG);
    if has(safetensors::SINGLE) || has(safetensors::INDEX) {
        return load_config(folder);
    }
    match gguf_files(folder)?.as_slice() {
        [file] => gguf::load(file),
        [] if config => load_config(folder),
        [] => Err(Error::checkpoint(format!(
            "{}: not a model; looked for {CONFIG} with {} (or {}), and for one .gguf file",
            folder.display(),
            safetensors::SINGLE,
            safetensors::INDEX
        ))),
        several => {
            let names: Vec<_> =
                several.iter().filter_map(|file| file.file_name()?.to_str()).collect();
            Err(Error::checkpoint(format!(
                "{}: {} .gguf files; name one of them: {}",
                folder.display(),
                several.len(),
                names.join(", ")
            )))
        }
    }
}

fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).context(|| folder.display())? {
        let path = entry.context(|| folder.display())?.path();
        if path.extension().is_some_and(|extension| extension == "gguf") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn load_config(folder: &Path) -> Result<Checkpoint> {
    let path = folder.join(CONFIG);
    let shown = path.display();
    let config = Fields::parse((*mmap::map(&path)?).as_ref()).context(|| &shown)?;
    let is_astrai = astrai::is_config(&config).context(|| &shown)?;
    let spec = if is_astrai { astrai::spec(&config) } else { hf::spec(&config) };
    let spec = spec.and_then(|spec| spec.validate().map(|()| spec)).context(|| &shown)?;
    let tensors = safetensors::read(folder)?;
    if is_astrai {
        return assemble(folder, astrai::with_head(spec, &tensors), tensors, &rules::ASTRAI);
    }
    assemble(folder, spec, tensors, &rules::HUGGING_FACE)
}

/// Names the tensors. A tied model's own copy of the head is dropped; an untied one must have it.
fn assemble(
    path: &Path,
    spec: ModelSpec,
    mut tensors: Vec<RawTensor>,
    names: &Names,
) -> Result<Checkpoint> {
    if spec.tie_embeddings {
        tensors.retain(|tensor| tensor.name != HEAD);
    }
    let weights = rules::canonical(&path.display().to_string(), tensors, names)?;
    if !spec.tie_embeddings && !weights.contains(HEAD) {
        return Err(Error::checkpoint(format!(
            "{}: tensor `{HEAD}` is missing, and the configuration does not tie it to the embedding",
            path.display()
        )));
    }
    Ok(Checkpoint { spec, weights })
}

fn io_error(path: &Path, error: std::io::Error) -> Error {
    let shown = path.display();
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::new(ErrorKind::NotFound, format!("{shown}: no such file or folder"));
    }
    Error::from(error).context(shown)
}

/// A number of layers, bounded before anything is allocated per layer.
fn layer_count(fields: &Fields, key: &str) -> Result<usize> {
    let layers = fields.size(key)?;
    if layers > MAX_LAYERS {
        let name = fields.name(key);
        return Err(Error::checkpoint(format!(
            "{name} must be at most {MAX_LAYERS}; given: {layers}"
        )));
    }
    Ok(layers)
}

/// The width of a head where it is the model's width over the number of heads.
fn split_heads(fields: &Fields, width_key: &str, heads_key: &str, heads: usize) -> Result<usize> {
    let width = fields.size(width_key)?;
    if !width.is_multiple_of(heads) {
        return Err(Error::checkpoint(format!(
            "{} {width} is not a multiple of {} {heads}",
            fields.name(width_key),
            fields.name(heads_key)
        )));
    }
    Ok(width / heads)
}
