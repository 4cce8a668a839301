//! Logits → token, for one row at a time and from nothing but that row's own request.
//!
//! Order: `logit_bias`, `allowed_token_ids`, `min_tokens`, `bad_words`, grammar mask → repetition, frequency,
//! presence penalties → temperature → `min_p` → `top_k` → `top_p` → draw.
#![allow(clippy::inline_always)] // Loops get the CPU's vectors by being inlined; see `wide`.

mod candidates;
mod logprobs;
mod params;
pub mod philox;
mod select;

use std::collections::HashMap;

pub use crate::draw::TokenLogprob;
pub use logprobs::token_logprobs;
pub use params::{GREEDY_BELOW, MAX_SAMPLES, SamplingOptions, SamplingParams};

use crate::draw::{Draw, MAX_DRAWN_LOGPROBS};
use crate::error::{Error, Result};
use crate::wide::widest;
use candidates::{Candidates, DrawOne};

const FORBIDDEN: f32 = f32::NEG_INFINITY;

/// What one token is sampled from.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Raw logits of the whole vocabulary.
    pub logits: &'a [f32],
    /// Prompt and output so far.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub num_prompt: usize,
    /// How to sample.
    pub params: &'a SamplingParams,
    /// The ids that a grammar allows, one bit each, from the lowest bit of the first word on.
    pub mask: Option<&'a [u32]>,
}

impl Row<'_> {
    fn output(&self) -> &[u32] {
        &self.tokens[self.num_prompt..]
    }

    /// How the token is drawn, whatever the logits are; `None` where they are changed first, or wanted
    /// themselves.
    #[must_use]
    pub fn draw(&self, state: &SampleState) -> Option<Draw> {
        let params = self.params;
        let is_short = params.logprobs.is_none_or(|top| top <= MAX_DRAWN_LOGPROBS);
        (self.is_plain() && is_short).then(|| self.draw_of(state))
    }

    fn draw_of(&self, state: &SampleState) -> Draw {
        let params = self.params;
        Draw {
            inverse_temperature: params.inverse_temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            uniform: state.uniform(self.tokens.len()),
            logprobs: params.logprobs,
        }
    }

    /// Whether the token is drawn from the logits as they are.
    fn is_plain(&self) -> bool {
        let params = self.params;
        params.logit_bias.is_empty()
            && params.allowed_token_ids.is_none()
            && params.bad_words.is_empty()
            && self.mask.is_none()
            && !self.is_short()
            && !params.penalises()
    }

    fn is_short(&self) -> bool {
        self.output().len() < self.params.min_tokens
    }
}

/// What the sampler remembers of one sample between its tokens.
#[derive(Debug, Clone)]
pub struct SampleState {
    seed: u64,
    sample: u32,
    /// Tokens that `counts` knows; it lags behind where no penalty asks for it.
    counted: usize,
    counts: HashMap<u32, Count>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    /// Occurrences in the output and in the frequency window.
    frequency: u32,
    in_output: bool,
}

impl SampleState {
    /// The state before the first token of sample number `sample`.
    #[must_use]
    pub fn new(seed: u64, sample: u32) -> Self {
        Self { seed, sample, counted: 0, counts: HashMap::new() }
    }

    /// The number in [0, 1) that draws the token after `len` others.
    pub(crate) fn uniform(&self, len: usize) -> f64 {
        philox::uniform(self.seed, self.sample, len)
    }

    fn count(&mut self, row: &Row<'_>) {
        let window = row.num_prompt.saturating_sub(row.params.frequency_window);
        for (position, &token) in row.tokens.iter().enumerate().skip(self.counted) {
            let count = self.counts.entry(token).or_default();
            count.frequency += u32::from(position >= window);
            count.in_output |= position >= row.num_prompt;
        }
        self.counted = row.tokens.len();
    }
}

/// Samples rows. Holds scratch memory and the ids that end a text, nothing of any request.
#[derive(Debug)]
pub struct Sampler {
    eos_token_ids: Vec<u32>,
    logits: Vec<f32>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler for a model whose texts end with any of `eos_token_ids`.
    #[must_use]
    pub fn new(eos_token_ids: Vec<u32>) -> Self {
        Self { eos_token_ids, logits: Vec::new(), candidates: Candidates::default() }
    }

    /// The next token of `row`: a function of the row and of the state's seed, whatever else the
    /// sampler has seen.
    pub fn sample(&mut self, row: &Row<'_>, state: &mut SampleState) -> Result<u32> {
        let mut changed = std::mem::take(&mut self.logits);
        let is_changed = change(row, &self.eos_token_ids, state, &mut changed);
        let logits = if is_changed { &changed } else { row.logits };
        let token = self.draw(logits, &row.draw_of(state));
        self.logits = changed;
        token
    }

    /// The token that `draw` takes from `logits`: what a device that draws must give too.
    pub fn draw(&mut self, logits: &[f32], draw: &Draw) -> Result<u32> {
        widest(DrawOne { candidates: &mut self.candidates, logits, draw })
    }
}

/// The largest logit of a row that something can be drawn from.
#[inline(always)]
fn row_max(logits: &[f32]) -> Result<f32> {
    match select::max(logits) {
        Some(max) if max.is_finite() => Ok(max),
        Some(FORBIDDEN) => Err(Error::invalid(
            "no token is left to sample: structured_outputs, allowed_token_ids, min_tokens and \
             bad_words together forbid every id",
        )),
        _ => Err(broken_logits()),
    }
}

/// What a row that is no row of numbers ends its request with.
pub(crate) fn broken_logits() -> Error {
    Error::bug("the model's logits hold NaN or infinity")
}

/// Writes the logits after biases, masks and penalties to `changed`; false where there are none.
fn change(row: &Row<'_>, eos: &[u32], state: &mut SampleState, changed: &mut Vec<f32>) -> bool {
    let params = row.params;
    if row.is_plain() {
        return false;
    }
    changed.clear();
    if let Some(allowed) = &params.allowed_token_ids {
        changed.resize(row.logits.len(), FORBIDDEN);
        for &id in allowed {
            changed[id as usize] = row.logits[id as usize];
        }
    } else {
        changed.extend_from_slice(row.logits);
    }
    for &(id, bias) in &params.logit_bias {
        changed[id as usize] += bias;
    }
    forbid(row, eos, changed);
    if let Some(mask) = row.mask {
        keep(mask, changed);
        if !eos.iter().any(|&id| is_set(mask, id)) {
            // The output is not complete: nothing may end it.
            for &id in &params.stop_token_ids {
                changed[id as usize] = FORBIDDEN;
            }
        }
    }
    if params.penalises() {
        state.count(row);
        penalise(params, &state.counts, changed);
    }
    true
}

/// Masks the ids that `min_tokens` and `bad_words` rule out at this point of the output.
fn forbid(row: &Row<'_>, eos: &[u32], changed: &mut [f32]) {
    if row.is_short() {
        for &id in eos.iter().chain(&row.params.stop_token_ids) {
            // A tokenizer may name ids that the model cannot produce.
            if let Some(logit) = changed.get_mut(id as usize) {
                *logit = FORBIDDEN;
            }
        }
    }
    for word in &row.params.bad_words {
        if let Some((&last, start)) = word.split_last()
            && row.output().ends_with(start)
        {
            changed[last as usize] = FORBIDDEN;
        }
    }
}

fn is_set(mask: &[u32], id: u32) -> bool {
    mask.get(id as usize / 32).is_some_and(|bits| bits >> (id % 32) & 1 == 1)
}

/// Forbids every id whose bit in `mask` is not set.
fn keep(mask: &[u32], logits: &mut [f32]) {
    for (index, ids) in logits.chunks_mut(32).enumerate() {
        match mask.get(index).copied().unwrap_or(0) {
            u32::MAX => {}
            0 => ids.fill(FORBIDDEN),
            bits => {
                for (bit, logit) in ids.iter_mut().enumerate() {
                    if bits >> bit & 1 == 0 {
                        *logit = FORBIDDEN;
                    }
                }
            }
        }
    }
}

fn penalise(params: &SamplingParams, counts: &HashMap<u32, Count>, logits: &mut [f32]) {
    for (&id, count) in counts {
        let logit = &mut logits[id as usize];
        if *logit == FORBIDDEN {
            continue;
        }
        let mut penalised = if *logit > 0.0 {
            *logit / params.repetition_penalty
        } else {
            *logit * params.repetition_penalty
        };
        penalised -= params.frequency_penalty * count.frequency as f32;
        if count.in_output {
            penalised -= params.presence_penalty;
        }
        // A penalty alone neither forbids a token nor makes it infinitely likely.
        *logit = penalised.clamp(f32::MIN, f32::MAX);
    }
}
