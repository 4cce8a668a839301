//! Tokens from logits, and what these say of them.

use candle_core::{DType, Tensor};

use super::launch::{Grid, SampleArgs, ScoreArgs};
use super::{Cuda, address};
use crate::draw::{Draw, Drawn, RowSummary};
use crate::error::Result;

const SAMPLE_THREADS: u32 = 32 * 32;
/// Words of the kernel's `Score`.
const SCORE_WORDS: usize = 6;
/// Its sums count in units of 1 / 2⁴⁰.
const UNIT: f64 = 1.0 / (1_u64 << 40) as f64;
/// A logit was no number.
const NO_TOKEN: u32 = u32::MAX;

impl Cuda {
    /// A token for each row and draw; `None` where a logit is no number.
    pub(in crate::backend) fn draw(
        &self,
        logits: &Tensor,
        draws: &[(u32, Draw)],
    ) -> Result<Vec<Option<Drawn>>> {
        let tokens = self.empty(draws.len(), DType::U32)?;
        let words =
            self.upload(draws.iter().flat_map(|(row, draw)| words_of(*row, draw)).collect())?;
        let args = SampleArgs {
            logits: address(logits)?,
            draws: address(&words)?,
            tokens: address(&tokens)?,
            vocab: logits.dims()[1] as u32,
        };
        self.queue("sample", Grid::each(draws.len(), SAMPLE_THREADS), args)?;
        let mut summaries = self.summaries(logits, draws, &tokens)?.into_iter();
        let drawn = tokens.to_vec1::<u32>()?.into_iter().zip(draws).map(|(token, (_, draw))| {
            let summary = draw.logprobs.and_then(|_| summaries.next());
            let logprobs = || summary.map(|summary| summary.logprobs());
            (token != NO_TOKEN).then(|| Drawn { token, logprobs: logprobs() })
        });
        Ok(drawn.collect())
    }

    /// What the rows say of their tokens, for the draws that ask for it.
    fn summaries(
        &self,
        logits: &Tensor,
        draws: &[(u32, Draw)],
        tokens: &Tensor,
    ) -> Result<Vec<RowSummary>> {
        let vocab = logits.dims()[1];
        let asks = (0..).zip(draws).filter_map(|(place, (row, draw)): (u32, _)| {
            Some([*row, place, draw.logprobs?.min(vocab) as u32])
        });
        let asks: Vec<[u32; 3]> = asks.collect();
        let Some(most) = asks.iter().map(|ask| ask[2]).max() else { return Ok(Vec::new()) };
        let stride = SCORE_WORDS + 2 * most as usize;
        let scores = self.empty((asks.len(), stride), DType::U32)?;
        let words = self.upload(asks.concat())?;
        let args = ScoreArgs {
            logits: address(logits)?,
            asks: address(&words)?,
            tokens: address(tokens)?,
            scores: address(&scores)?,
            vocab: vocab as u32,
            stride: stride as u32,
        };
        self.queue("score", Grid::each(asks.len(), SAMPLE_THREADS), args)?;
        let scores = scores.to_vec2::<u32>()?;
        Ok(scores.iter().zip(asks).map(|(words, ask)| summary_of(words, ask[2] as usize)).collect())
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
