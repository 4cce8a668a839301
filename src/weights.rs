//! [`Weights`]: canonical name → stored tensor, in the precision of the file.
//!
//! `checkpoint/` fills it under canonical names; layers take from it by name and shape, so a missing
//! tensor or a wrong shape is an error that names it, and [`Weights::finish`] fails on leftovers.
//!
//! Canonical names (all matrices `[out, in]`):
//!
//! ```text
//! embed.weight [vocab, hidden]            norm.weight [hidden]       lm_head.weight [vocab, hidden] (absent when tied)
//! layers.{i}.attn_norm.weight [hidden]    layers.{i}.mlp_norm.weight [hidden]
//! layers.{i}.attn.{q,k,v,o}.weight        layers.{i}.attn.{q,k,v,o}.bias (where the spec says so)
//! layers.{i}.attn.{q,k}_norm.weight [head_dim]                       layers.{i}.attn.gate.weight [heads * head_dim, hidden]
//! layers.{i}.mlp.{gate,up,down}.weight    layers.{i}.mlp.{gate,up,down}.bias
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// GGML: 32 weights, f16 scale `d`, 4-bit `q`: `d * (q - 8)`. 18 bytes.
    Q4_0,
    /// GGML: 32 weights, f16 scale `d` and minimum `m`, 4-bit `q`: `d * q + m`. 20 bytes.
    Q4_1,
    /// GGML: 32 weights, f16 scale `d`, 8-bit signed `q`: `d * q`. 34 bytes.
    Q8_0,
}

impl Encoding {
    /// Each of them.
    pub const ALL: [Self; 6] =
        [Self::F32, Self::F16, Self::BF16, Self::Q4_0, Self::Q4_1, Self::Q8_0];

    /// Numbers in one block; a row holds whole blocks.
    #[must_use]
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => 32,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of `len` numbers, or `None` when `len` is not whole blocks or overflows.
    #[must_use]
    pub fn bytes_for(self, len: usize) -> Option<usize> {
        if !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// What [`Bytes`] are a range of.
pub trait Source: AsRef<[u8]> + Send + Sync {
    /// What of `range` only mirrors a file need not stay in memory: it is read again where it is needed.
    fn release(&self, _range: &Range<usize>) {}
}

impl Source for Vec<u8> {}

/// Shared bytes: a range of a memory-mapped file or of an owned buffer.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Source>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`; an error when the range is outside of it.
    pub fn new(owner: Arc<dyn Source>, range: Range<usize>) -> Result<Self> {
        let len = (*owner).as_ref().len();
        if range.start > range.end || range.end > len {
            return Err(Error::checkpoint(format!(
                "bytes {range:?} lie outside of the {len} present"
            )));
        }
        Ok(Self { owner, range })
    }

    /// The bytes themselves.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// Lets the system take back memory that the bytes can be read into again.
    pub fn release(&self) {
        self.owner.release(&self.range);
    }

    /// As [`release`](Self::release), of all that the bytes are a range of.
    pub fn release_owner(&self) {
        self.owner.release(&(0..(*self.owner).as_ref().len()));
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

/// Keeps what a device makes of weights from one load to the next.
pub trait PackedWeights: Send {
    /// The `len` bytes that are kept as `name`, from a cache line on.
    fn find(&self, name: &str, len: usize) -> Option<Bytes>;

    /// Keeps bytes for the next load; where that fails, nothing is kept.
    fn keep(&mut self, name: &str, bytes: &[u8]);
}

/// One tensor as its file stores it: row-major, little-endian.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Name in the checkpoint, for messages.
    pub name: String,
    /// Dimensions, slowest first; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub encoding: Encoding,
    /// The numbers; exactly `encoding.bytes_for(product of shape)` bytes.
    pub data: Bytes,
}

impl StoredTensor {
    /// Checks that `data` holds exactly the numbers that `shape` asks for.
    pub fn new(
        name: impl Into<String>,
        shape: Vec<usize>,
        encoding: Encoding,
        data: Bytes,
    ) -> Result<Self> {
        let name = name.into();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(encoding.block_len()) {
            return Err(Error::checkpoint(format!(
                "tensor `{name}` of shape {shape:?} is {encoding:?}, whose rows must be a multiple of {}",
                encoding.block_len()
            )));
        }
        let expected = shape
            .iter()
            .try_fold(1usize, |len, &dim| len.checked_mul(dim))
            .and_then(|len| encoding.bytes_for(len));
        let given = data.as_slice().len();
        if expected != Some(given) {
            return Err(Error::checkpoint(format!(
                "tensor `{name}` of shape {shape:?} ({encoding:?}) has {given} bytes, expected {}",
                expected.map_or("a size that fits in memory".into(), |bytes| bytes.to_string())
            )));
        }
        Ok(Self { name, shape, encoding, data })
    }

    /// Rows of a matrix: the product of all dimensions but the last.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Length of a row: the last dimension.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The stored bytes of row `row`.
    ///
    /// # Panics
    /// When `row` is not below [`Self::rows`].
    #[must_use]
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        let bytes = self.cols() / self.encoding.block_len() * self.encoding.block_bytes();
        &self.data.as_slice()[row * bytes..(row + 1) * bytes]
    }
}

/// Tensors by canonical name, each taken once.
#[derive(Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, StoredTensor>,
    source: Option<String>,
}

impl Weights {
    /// No tensors yet; errors will name `source`, the file or folder that they come from.
    pub fn from_source(source: impl Into<String>) -> Self {
        Self { tensors: BTreeMap::new(), source: Some(source.into()) }
    }

    /// The tensors that were not taken yet, by canonical name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// How the numbers of each tensor that was not taken yet are stored, and how many there are.
    pub fn sizes(&self) -> impl Iterator<Item = (Encoding, usize)> + '_ {
        self.tensors.values().map(|tensor| (tensor.encoding, tensor.rows() * tensor.cols()))
    }

    fn error(&self, message: impl Into<String>) -> Error {
        let error = Error::checkpoint(message);
        match &self.source {
            Some(source) => error.context(source),
            None => error,
        }
    }

    /// Adds `tensor` under the canonical `name`; a second tensor of that name is an error.
    pub fn insert(&mut self, name: impl Into<String>, tensor: StoredTensor) -> Result<()> {
        let name = name.into();
        match self.tensors.insert(name.clone(), tensor) {
            None => Ok(()),
            Some(first) => Err(self.error(format!(
                "two tensors stand for `{name}`: `{}` and `{}`",
                first.name, self.tensors[&name].name
            ))),
        }
    }

    /// Whether a tensor of that canonical name is there (and not yet taken).
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes the tensor out; an error names it when it is missing or has another shape.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<StoredTensor> {
        let Some(tensor) = self.tensors.remove(name) else {
            return Err(self.error(format!("tensor `{name}` of shape {shape:?} is missing")));
        };
        if tensor.shape != shape {
            return Err(self.error(format!(
                "tensor `{}` has shape {:?}, expected {shape:?}",
                tensor.name, tensor.shape
            )));
        }
        Ok(tensor)
    }

    /// Ends the loading; an error names the tensors that no layer asked for (the first ten).
    pub fn finish(self) -> Result<()> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        let names: Vec<_> =
            self.tensors.values().take(10).map(|tensor| format!("`{}`", tensor.name)).collect();
        Err(self.error(format!(
            "{} tensor(s) that this model has no place for: {}",
            self.tensors.len(),
            names.join(", ")
        )))
    }
}
