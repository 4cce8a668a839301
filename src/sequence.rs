//! One sample of a request: its ids, counters, block table, status and finish reason.

use std::sync::Arc;

use crate::cache::block::BlockTable;
use crate::config::BLOCK_SIZE;
use crate::draw::Draw;
use crate::error::{Error, Result};
use crate::grammar::GrammarState;
use crate::sampler::{Row, SampleState, SamplingParams, TokenLogprob};
use crate::step::{Chunk, ChunkTokens, LogitRows};

/// Names a request for the life of its engine; later requests have larger ids.
pub type RequestId = u64;

/// Names one sample of a request. Ordered by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request.
    pub request: RequestId,
    /// Which of its `n` samples, from 0.
    pub sample: u32,
}

/// Why a sample ended.
#[derive(Debug, Clone)]
pub enum FinishReason {
    /// It drew an end-of-text id.
    EndOfText,
    /// It drew this one of `stop_token_ids`.
    StopToken(u32),
    /// Its grammar allows nothing more. The last token belongs to the text.
    GrammarEnd,
    /// It reached `max_tokens`, `max_model_len` or the size of the cache.
    Length,
    /// The caller ended it.
    Abort,
    /// The engine could not go on with it.
    Error(Error),
}

impl FinishReason {
    /// `stop`, `length`, `abort` or `error`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::EndOfText | Self::StopToken(_) | Self::GrammarEnd => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error(_) => "error",
        }
    }
}

/// When things happened to a sample, in seconds since the engine's start, and what it cost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SampleMetrics {
    /// Submitted.
    pub arrival_time: f64,
    /// First taken into a step.
    pub first_scheduled_time: Option<f64>,
    /// First token sampled.
    pub first_token_time: Option<f64>,
    /// Ended.
    pub finished_time: Option<f64>,
    /// Prompt tokens whose computation the prefix cache saved.
    pub num_cached_tokens: usize,
    /// How often its blocks were taken and it had to be computed again.
    pub num_preemptions: usize,
}

/// Per token of a prompt its list of log-probabilities; `None` for the first token.
pub type PromptLogprobs = Vec<Option<Vec<TokenLogprob>>>;

/// The part of a sequence that a step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Planned {
    /// How many tokens.
    pub len: usize,
    /// Which of their rows need logits.
    pub rows: LogitRows,
    /// Where its token stands among those that the step draws, if it draws one.
    pub place: usize,
}

impl Planned {
    /// How many rows of logits come back.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        match self.rows {
            LogitRows::None | LogitRows::Drawn(_) => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.len,
        }
    }
}

/// One sample of a request.
///
/// ```text
/// tokens   [ prompt ............ | output ....... ]
/// computed [ in the cache ... | planned | later   ]
/// ```
/// Prefill, chunked prefill, decode and recomputation after preemption are one thing: computing the
/// tokens after `num_computed`. When none is left, the last row's logits give the next token.
#[derive(Debug)]
pub struct Sequence {
    id: SequenceId,
    prompt: Arc<[u32]>,
    /// Prompt and output. Empty until first scheduled: a thousand waiting samples share `prompt`.
    tokens: Vec<u32>,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) state: SampleState,
    /// What its output must look like. Away while the grammar thread computes the next mask.
    pub(crate) grammar: Option<GrammarState>,
    pub(crate) num_computed: usize,
    pub(crate) table: Option<BlockTable>,
    pub(crate) planned: Option<Planned>,
    /// Its row in the step after that, which is on its way already: of the token that is drawn now.
    pub(crate) ahead: Option<Planned>,
    /// What is known so far, while prompt log-probabilities are wanted and not yet delivered.
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    pub(crate) metrics: SampleMetrics,
    pub(crate) is_finished: bool,
}

impl Sequence {
    /// A waiting sample. Sample 0 alone computes the prompt's log-probabilities.
    #[must_use]
    pub fn new(
        id: SequenceId,
        prompt: Arc<[u32]>,
        params: Arc<SamplingParams>,
        seed: u64,
        arrival_time: f64,
    ) -> Self {
        let wants_prompt = params.prompt_logprobs.is_some() && id.sample == 0;
        Self {
            id,
            prompt,
            tokens: Vec::new(),
            params,
            state: SampleState::new(seed, id.sample),
            grammar: None,
            num_computed: 0,
            table: None,
            planned: None,
            ahead: None,
            prompt_logprobs: wants_prompt.then(Vec::new),
            metrics: SampleMetrics { arrival_time, ..SampleMetrics::default() },
            is_finished: false,
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Prompt and output.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        if self.tokens.is_empty() { &self.prompt } else { &self.tokens }
    }

    /// Length of the prompt.
    #[must_use]
    pub fn num_prompt(&self) -> usize {
        self.prompt.len()
    }

    /// Tokens sampled so far.
    #[must_use]
    pub fn num_output(&self) -> usize {
        self.tokens().len() - self.num_prompt()
    }

    /// Tokens that are not in the cache.
    #[must_use]
    pub fn num_pending(&self) -> usize {
        self.tokens().len() - self.num_computed
    }

    /// Whether its next token starts a new block.
    pub(crate) fn grows_next(&self) -> bool {
        let held = self.table.as_ref().map_or(0, |table| table.blocks().len());
        self.tokens().len() + 1 > held * BLOCK_SIZE
    }

    /// Whether the planned tokens are the last pending ones, so that the next token can be sampled.
    pub(crate) fn samples_next(&self) -> bool {
        self.planned.is_some_and(|planned| {
            planned.rows != LogitRows::None && planned.len == self.num_pending()
        })
    }

    /// Lets the device draw the next token, as number `place` of its step, where its logits are needed
    /// for nothing else. Says whether it does.
    pub(crate) fn plan_draw(&mut self, place: usize) -> Result<bool> {
        let Some(planned @ Planned { rows: LogitRows::Last, .. }) = self.planned else {
            return Ok(false);
        };
        if self.grammar.is_some() {
            return Ok(false);
        }
        let (row, state) = self.row(&[])?;
        let draw = row.draw(state);
        if let Some(draw) = draw {
            self.planned = Some(Planned { rows: LogitRows::Drawn(draw), place, ..planned });
        }
        Ok(draw.is_some())
    }

    /// Plans the row after the token that is being drawn, as number `place` of its step. `limit` is the
    /// longest sequence. Says whether there is one: not after a last token.
    pub(crate) fn plan_ahead(&mut self, place: usize, limit: usize) -> bool {
        let (output, len) = (self.num_output() + 1, self.tokens().len() + 1);
        let is_last = output >= self.params.max_tokens || len >= limit;
        self.ahead = match self.planned {
            Some(Planned { rows: LogitRows::Drawn(draw), .. }) if !is_last => {
                let rows = LogitRows::Drawn(Draw { uniform: self.state.uniform(len), ..draw });
                Some(Planned { len: 1, rows, place })
            }
            _ => None,
        };
        self.ahead.is_some()
    }

    /// The planned tokens, with the blocks that cover them and all before.
    #[must_use]
    pub fn chunk(&self) -> Option<Chunk<'_>> {
        let planned = self.planned?;
        let end = self.num_computed + planned.len;
        let tokens = ChunkTokens::Known(&self.tokens()[self.num_computed..end]);
        self.chunk_of(tokens, self.num_computed, planned.rows)
    }

    /// As [`Self::chunk`], of the step after that.
    #[must_use]
    pub fn chunk_ahead(&self) -> Option<Chunk<'_>> {
        let (planned, ahead) = (self.planned?, self.ahead?);
        let start = self.num_computed + planned.len;
        self.chunk_of(ChunkTokens::Drawn(planned.place), start, ahead.rows)
    }

    fn chunk_of<'a>(
        &'a self,
        tokens: ChunkTokens<'a>,
        start: usize,
        logits: LogitRows,
    ) -> Option<Chunk<'a>> {
        let blocks = (start + tokens.len()).div_ceil(BLOCK_SIZE);
        Some(Chunk { tokens, start, blocks: &self.table.as_ref()?.blocks()[..blocks], logits })
    }

    /// What its next token is sampled from.
    pub(crate) fn row<'a>(
        &'a mut self,
        logits: &'a [f32],
    ) -> Result<(Row<'a>, &'a mut SampleState)> {
        let tokens = if self.tokens.is_empty() { &self.prompt } else { &self.tokens[..] };
        let mask = self.grammar.as_ref().map(GrammarState::mask).transpose()?;
        let row = Row { logits, tokens, num_prompt: self.prompt.len(), params: &self.params, mask };
        Ok((row, &mut self.state))
    }

    /// Takes the table of a running sequence whose blocks go to an older one. It starts over.
    pub(crate) fn preempt(&mut self) -> Option<BlockTable> {
        self.num_computed = 0;
        (self.planned, self.ahead) = (None, None);
        self.metrics.num_preemptions += 1;
        // The rows come again with the recomputation.
        if let Some(rows) = &mut self.prompt_logprobs {
            rows.clear();
        }
        self.table.take()
    }

    /// Notes that the blocks of `table` are this sequence's from now on.
    pub(crate) fn start(&mut self, table: BlockTable, now: f64) {
        self.num_computed = table.named_tokens();
        self.table = Some(table);
        if self.metrics.first_scheduled_time.is_none() {
            self.metrics.first_scheduled_time = Some(now);
            self.metrics.num_cached_tokens = self.num_computed;
        }
    }

    /// Appends a sampled token; says whether it was the last. `limit` is the longest sequence.
    pub(crate) fn push(&mut self, token: u32, eos: &[u32], limit: usize) -> Option<FinishReason> {
        let is_complete =
            match self.grammar.as_mut().map(|grammar| grammar.advance(token)).transpose() {
                Ok(is_complete) => is_complete == Some(true),
                Err(error) => return Some(FinishReason::Error(error)),
            };
        if self.tokens.is_empty() {
            self.tokens.extend_from_slice(&self.prompt);
        }
        self.tokens.push(token);
        // Nothing can follow the end of a grammar, not even where `ignore_eos` would go on.
        if eos.contains(&token) && (is_complete || !self.params.ignore_eos) {
            Some(FinishReason::EndOfText)
        } else if self.params.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else if is_complete {
            Some(FinishReason::GrammarEnd)
        } else if self.num_output() >= self.params.max_tokens || self.tokens.len() >= limit {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
