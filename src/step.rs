//! What policy hands to tensors: a [`Step`] of packed [`Chunk`]s in, [`Logits`] out.
//!
//! A device that draws tokens by itself may be given a step before the one before it has ended: its
//! chunks then name their tokens ([`ChunkTokens::Drawn`]) instead of having them.

use crate::cache::block::BlockId;
use crate::draw::{Draw, Drawn};
use crate::error::Result;

/// Which rows of a chunk need logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LogitRows {
    /// None: a prefill chunk that does not reach the end of the prompt.
    None,
    /// The last row: the next token is sampled from it.
    Last,
    /// Every row, for prompt log-probabilities.
    All,
    /// None: the device draws the next token from the last row. Only where [`Forward::draws`].
    Drawn(Draw),
}

/// The tokens of a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ChunkTokens<'a> {
    /// These.
    Known(&'a [u32]),
    /// One, which the step before draws: its place among that step's [`LogitRows::Drawn`]. All chunks of
    /// a step or none are of this kind.
    Drawn(usize),
}

impl ChunkTokens<'_> {
    /// How many.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there are no empty chunks")]
    pub fn len(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Drawn(_) => 1,
        }
    }
}

/// A run of consecutive tokens of one sequence: a prefill chunk, or a single decode row.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// The tokens to compute.
    pub tokens: ChunkTokens<'a>,
    /// Position of the first of them; everything before it is in the cache, or the step before puts it there.
    pub start: usize,
    /// Blocks of the sequence, in order; they cover positions `0..start + tokens.len()`.
    pub blocks: &'a [BlockId],
    /// Which rows need logits.
    pub logits: LogitRows,
}

impl Chunk<'_> {
    /// Whether it is one row, from which the next token is sampled.
    #[must_use]
    pub fn decodes(&self) -> bool {
        self.tokens.len() == 1 && matches!(self.logits, LogitRows::Last | LogitRows::Drawn(_))
    }
}

/// The work of one forward pass.
#[derive(Debug, Default)]
pub struct Step<'a> {
    /// Chunks of different sequences, in any mixture of prefill and decode.
    pub chunks: Vec<Chunk<'a>>,
}

/// Raw logits, one row per asked-for token, in the order of the chunks; and what was drawn.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    /// `[rows, vocab_size]`, row-major.
    pub values: Vec<f32>,
    /// Width of a row.
    pub vocab_size: usize,
    /// For each [`LogitRows::Drawn`] the token; `None` where the logits hold NaN or infinity.
    pub drawn: Vec<Option<Drawn>>,
}

impl Logits {
    /// Row `index`.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab_size..(index + 1) * self.vocab_size]
    }
}

/// What a step gives.
#[derive(Debug)]
pub enum Outcome {
    /// It is done.
    Ready(Logits),
    /// It runs on a device.
    Running(Box<dyn Running>),
}

/// A step that runs on a device.
pub trait Running: std::fmt::Debug {
    /// Waits for its end.
    fn wait(self: Box<Self>) -> Result<Logits>;
}

impl Outcome {
    /// The logits, when they are there.
    pub fn wait(self) -> Result<Logits> {
        match self {
            Self::Ready(logits) => Ok(logits),
            Self::Running(step) => step.wait(),
        }
    }
}

/// The one door between policy and tensors. The runner implements it with a model; tests with a fake.
pub trait Forward {
    /// Computes the chunks, writes their keys and values into the cache, and returns the logits, or the
    /// promise of them. Steps are computed in the order of the calls.
    ///
    /// The arithmetic of a row does not depend on the other chunks or on how a prompt is cut.
    /// `beat` is called now and then on the way: it shows that the pass goes on.
    fn forward(&mut self, step: &Step<'_>, beat: &dyn Fn()) -> Result<Outcome>;

    /// Whether it draws tokens, so that their logits need not leave the device, and takes
    /// [`ChunkTokens::Drawn`].
    fn draws(&self) -> bool {
        false
    }
}
