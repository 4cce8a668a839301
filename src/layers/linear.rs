//! [`Builder`]: takes tensors by canonical name and packs them for the device.

use candle_core::Tensor;

use crate::backend::reference::numbers;
use crate::backend::{Backend, Linear};
use crate::error::Result;
use crate::weights::{StoredTensor, Weights};

/// What building a layer needs: where the weights come from and where they go.
#[derive(Debug)]
pub struct Builder<'a> {
    /// Tensors not yet taken.
    pub weights: &'a mut Weights,
    /// Device that packs them.
    pub backend: &'a Backend,
}

/// One matrix of a merged projection.
#[derive(Debug)]
pub(super) struct Part {
    /// Canonical name without `.weight` / `.bias`.
    pub(super) name: String,
    /// Rows.
    pub(super) out: usize,
    /// There is a `.bias` of `out` numbers.
    pub(super) bias: bool,
}

impl Builder<'_> {
    /// The stored matrix `name`, `[rows, cols]`, unpacked.
    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<StoredTensor> {
        self.weights.take(name, &[rows, cols])
    }

    /// The vector `name` of `len` numbers, in f32.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let stored = self.weights.take(name, &[len])?;
        self.backend.vector(&stored)
    }

    /// The matrices of `parts` on top of each other, as one projection of `in_features` columns.
    pub(super) fn projection(&mut self, parts: &[Part], in_features: usize) -> Result<Linear> {
        let mut stored = Vec::with_capacity(parts.len());
        for part in parts {
            stored.push(self.matrix(&format!("{}.weight", part.name), part.out, in_features)?);
        }
        let bias = self.bias(parts)?;
        self.backend.pack(&stored, bias)
    }

    /// The biases of `parts` end to end (zeros for a part without one), or `None` when no part has one.
    fn bias(&mut self, parts: &[Part]) -> Result<Option<Vec<f32>>> {
        if !parts.iter().any(|part| part.bias) {
            return Ok(None);
        }
        let mut biases = Vec::with_capacity(parts.iter().map(|part| part.out).sum());
        for part in parts {
            if part.bias {
                let stored = self.weights.take(&format!("{}.bias", part.name), &[part.out])?;
                biases.extend(numbers(&stored));
            } else {
                biases.resize(biases.len() + part.out, 0.0);
            }
        }
        Ok(Some(biases))
    }
}
