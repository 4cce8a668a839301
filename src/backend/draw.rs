//! Tokens that a device draws by itself.

use candle_core::Tensor;

#[cfg(feature = "cuda")]
pub use super::cuda::PendingDraws;
use super::{Backend, F32, Kind, check};
use crate::draw::Draw;
use crate::error::{Error, Result};

/// Tokens in the memory of a device that has drawn them, or is about to.
#[derive(Debug, Clone)]
pub struct DrawnTokens {
    /// `[draws]` u32.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no device draws"))]
    pub(super) ids: Tensor,
}

impl Backend {
    /// Whether [`Self::draw`] is there: on a GPU, from which logits are slow to come.
    #[must_use]
    pub fn draws(&self) -> bool {
        !matches!(self.kind, Kind::Cpu(_))
    }

    /// Has a token drawn for each row of `logits` `[rows, vocab]` and draw, as [`crate::sampler`] has it.
    pub fn draw(&self, logits: &Tensor, draws: &[(u32, Draw)]) -> Result<PendingDraws> {
        let rows = check::rows("logits", logits, None, F32)?;
        if let Some((row, _)) = draws.iter().find(|&&(row, _)| row as usize >= rows) {
            return Err(Error::bug(format!("rows must be below {rows}; given: {row}")));
        }
        match &self.kind {
            Kind::Cpu(_) => Err(Error::bug("on the CPU the sampler draws")),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.draw(logits, draws),
        }
    }
}

/// There are none without CUDA.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub enum PendingDraws {}

#[cfg(not(feature = "cuda"))]
impl PendingDraws {
    /// The tokens, before they are known here.
    pub fn tokens(&self) -> Result<DrawnTokens> {
        match *self {}
    }

    /// Waits for the tokens.
    pub fn wait(self) -> Result<Vec<Option<crate::draw::Drawn>>> {
        match self {}
    }
}
