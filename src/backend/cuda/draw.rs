//! Tokens from logits, and what these say of them.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::launch::{FollowArgs, Grid, SampleArgs, ScoreArgs};
use super::staging::Transfer;
use super::{Cuda, DeviceBatch, address};
use crate::backend::{Batch, DrawnTokens};
use crate::draw::{Draw, Drawn, RowSummary};
use crate::error::{Error, Result};

const SAMPLE_THREADS: u32 = 32 * 32;
const FOLLOW_THREADS: usize = 256;
/// Words of the kernel's `Score`.
const SCORE_WORDS: usize = 6;
/// Its sums count in units of 1 / 2⁴⁰.
const UNIT: f64 = 1.0 / (1_u64 << 40) as f64;
/// A logit was no number.
const NO_TOKEN: u32 = u32::MAX;

/// Tokens on their way.
pub struct PendingDraws {
    cuda: Arc<Cuda>,
    /// Their ids, then the scores of those draws that ask for log-probabilities.
    results: Tensor,
    copied: Transfer,
    /// For each draw, how many of the likeliest tokens it asks for.
    asks: Vec<Option<usize>>,
    /// Words of a score.
    stride: usize,
}

impl PendingDraws {
    /// The tokens, before they are known here.
    pub fn tokens(&self) -> Result<DrawnTokens> {
        Ok(DrawnTokens { ids: self.results.narrow(0, 0, self.asks.len())? })
    }

    /// Waits for the tokens; `None` where a row of the logits holds NaN or infinity.
    pub fn wait(self) -> Result<Vec<Option<Drawn>>> {
        let words = self.cuda.staging.finish(self.copied)?;
        let (tokens, scores) = words.split_at(self.asks.len().next_multiple_of(2));
        let mut scores = scores.chunks_exact(self.stride);
        let drawn = tokens.iter().zip(self.asks).map(|(&token, ask)| {
            let score = ask.and_then(|top| Some((scores.next()?, top)));
            // Of no token there is no score.
            let logprobs = || score.map(|(words, top)| summary_of(words, top).logprobs());
            (token != NO_TOKEN).then(|| Drawn { token, logprobs: logprobs() })
        });
        Ok(drawn.collect())
    }
}

impl std::fmt::Debug for PendingDraws {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PendingDraws({})", self.asks.len())
    }
}

impl Cuda {
    /// Queues the draw of a token for each row and draw.
    pub(in crate::backend) fn draw(
        self: &Arc<Self>,
        logits: &Tensor,
        draws: &[(u32, Draw)],
    ) -> Result<PendingDraws> {
        let vocab = logits.dims()[1];
        let asks: Vec<_> =
            draws.iter().map(|(_, draw)| draw.logprobs.map(|top| top.min(vocab))).collect();
        let scored: Vec<[u32; 3]> = (0..)
            .zip(draws.iter().zip(&asks))
            .filter_map(|(place, ((row, _), ask))| Some([*row, place, (*ask)? as u32]))
            .collect();
        let stride = SCORE_WORDS + 2 * asks.iter().flatten().max().copied().unwrap_or(0);
        let mut words: Vec<u32> =
            draws.iter().flat_map(|(row, draw)| words_of(*row, draw)).collect();
        let first_ask = words.len();
        words.extend(scored.as_flattened());
        let words = self.upload(&words)?;
        // A score begins with a number of two words.
        let first_score = draws.len().next_multiple_of(2);
        let results = self.empty(first_score + scored.len() * stride, DType::U32)?;

        let at = |tensor, word: usize| Ok::<_, Error>(address(tensor)? + 4 * word as u64);
        let (logits, tokens) = (address(logits)?, at(&results, 0)?);
        let args = SampleArgs { logits, draws: at(&words, 0)?, tokens, vocab: vocab as u32 };
        self.queue("sample", Grid::each(draws.len(), SAMPLE_THREADS), args)?;
        let args = ScoreArgs {
            logits,
            asks: at(&words, first_ask)?,
            tokens,
            scores: at(&results, first_score)?,
            vocab: vocab as u32,
            stride: stride as u32,
        };
        self.queue("score", Grid::each(scored.len(), SAMPLE_THREADS), args)?;
        let copied = self.staging.copy_out(&self.stream, tokens, results.elem_count())?;
        Ok(PendingDraws { cuda: self.clone(), results, copied, asks, stride })
    }

    /// Puts the tokens that `batch` follows where its ids are looked for.
    pub(super) fn follow(&self, batch: &Batch, placed: &DeviceBatch) -> Result<()> {
        let Some(DrawnTokens { ids: tokens }) = &batch.follows else { return Ok(()) };
        let len = batch.ids.len();
        if let Some(place) = batch.ids.iter().find(|&&place| place as usize >= tokens.elem_count())
        {
            return Err(Error::bug(format!("there is no draw {place} to follow")));
        }
        let args = FollowArgs { ids: placed.ids()?, tokens: address(tokens)?, rows: len as u32 };
        self.queue("follow", Grid::each(len.div_ceil(FOLLOW_THREADS), FOLLOW_THREADS as u32), args)
    }
}

/// The kernel's `Draw`.
fn words_of(row: u32, draw: &Draw) -> [u32; 8] {
    let halves = |number: f64| [number.to_bits() as u32, (number.to_bits() >> 32) as u32];
    let ([top_p, top_p_high], [uniform, uniform_high]) = (halves(draw.top_p), halves(draw.uniform));
    let scale = draw.inverse_temperature.unwrap_or(0.0).to_bits();
    let top_k = draw.top_k.unwrap_or(0) as u32;
    [row, top_k, scale, draw.min_p.to_bits(), top_p, top_p_high, uniform, uniform_high]
}

/// From the kernel's `Score` and the `top` likeliest after it.
fn summary_of(words: &[u32], top: usize) -> RowSummary {
    let (score, likeliest) = words.split_at(SCORE_WORDS);
    let pairs = likeliest.chunks_exact(2).take(top);
    let mut top: Vec<_> = pairs.map(|pair| (pair[0], f32::from_bits(pair[1]))).collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    RowSummary {
        token: score[5],
        logit: f32::from_bits(score[3]),
        above: score[4],
        max: f32::from_bits(score[2]),
        sum_exp: (u64::from(score[0]) | u64::from(score[1]) << 32) as f64 * UNIT,
        top,
    }
}
