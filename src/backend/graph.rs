//! Steps that a device repeats as one piece.

#[cfg(feature = "cuda")]
pub use super::cuda::DecodeGraphs;

use super::{Backend, Heads, Kind};
use crate::error::Result;

impl Backend {
    /// Graphs for steps in which every sequence decodes one token, of up to `rows` sequences of up to
    /// `positions` tokens; `None` on a device without.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::unnecessary_wraps))]
    pub fn decode_graphs(
        &self,
        heads: Heads,
        windows: &[Option<usize>],
        (rows, positions): (usize, usize),
    ) -> Result<Option<DecodeGraphs>> {
        match &self.kind {
            Kind::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                DecodeGraphs::new(cuda, heads, windows, (rows, positions)).map(Some)
            }
        }
    }
}

/// There are none without CUDA.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub enum DecodeGraphs {}

#[cfg(not(feature = "cuda"))]
impl DecodeGraphs {
    /// The logits of `batch`, for which `forward` would be called.
    pub fn run<F>(
        &mut self,
        _batch: super::Batch,
        _forward: F,
    ) -> Result<Option<candle_core::Tensor>> {
        match *self {}
    }
}
