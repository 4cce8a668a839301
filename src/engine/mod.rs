//! [`Engine`]: one step is schedule → forward → sample → commit → events.
//!
//! It is synchronous and owns everything; [`thread`] gives it a thread of its own. Where a device draws the
//! tokens, the next step is on its way while those of the last one are waited for and handed out: its
//! rows are of tokens that only the device knows yet. A row that turns out to follow a last token is for
//! nothing, and what comes of it is dropped.

pub mod stats;
pub mod thread;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use stats::Stats;

use crate::config::EngineConfig;
use crate::draw::Drawn;
use crate::error::{Error, ErrorKind, Result};
use crate::grammar::{Grammar, MaskWorker};
use crate::sampler::philox::derive_seed;
use crate::sampler::{Sampler, SamplingParams, TokenLogprob, broken_logits, token_logprobs};
use crate::scheduler::{Scheduler, check_prompt};
pub use crate::sequence::{FinishReason, PromptLogprobs, RequestId, SampleMetrics, SequenceId};
use crate::sequence::{Planned, Sequence};
use crate::step::{Chunk, Forward, LogitRows, Logits, Outcome, Step};

/// What a caller wants generated.
#[derive(Debug, Clone)]
pub struct Request {
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// How to go on from there.
    pub params: SamplingParams,
    /// What the output must look like.
    pub grammar: Option<Grammar>,
}

/// What one step brought for one sample.
#[derive(Debug, Clone)]
pub struct Event {
    /// Whose.
    pub id: SequenceId,
    /// New tokens, in order. May be empty in the last event. The token that stopped is included.
    pub token_ids: Vec<u32>,
    /// Per new token the list of [`token_logprobs`], where `logprobs` asks for it.
    pub logprobs: Option<Vec<Vec<TokenLogprob>>>,
    /// With the first token: prompt tokens whose computation the prefix cache saved.
    pub num_cached_tokens: Option<usize>,
    /// With the first token of sample 0, where `prompt_logprobs` asks for it.
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// In the last event of the sample, why it is the last.
    pub finish: Option<Finish>,
}

/// The end of a sample.
#[derive(Debug, Clone)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// When, and what it cost.
    pub metrics: SampleMetrics,
}

/// A model behind [`Forward`], its cache's bookkeeping and all requests.
#[derive(Debug)]
pub struct Engine<F> {
    forward: F,
    config: EngineConfig,
    scheduler: Scheduler,
    sampler: Sampler,
    masks: MaskWorker,
    start: Instant,
    next_id: RequestId,
    events: Vec<Event>,
    /// The planned step, when it is on its way already.
    launched: Option<Launched>,
    /// Set by a failed step: the engine does nothing any more.
    failure: Option<Error>,
    counters: Counters,
    /// When the last sign of life came, in milliseconds since the start.
    heartbeat: Arc<AtomicU64>,
}

/// A step on its way.
#[derive(Debug)]
struct Launched {
    outcome: Outcome,
    /// Whether the grammar thread has states of it.
    is_masked: bool,
}

#[derive(Debug, Default)]
struct Counters {
    steps: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
}

impl<F: Forward> Engine<F> {
    /// An engine without requests.
    pub fn new(forward: F, config: EngineConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            forward,
            scheduler: Scheduler::new(&config),
            sampler: Sampler::new(config.eos_token_ids.clone()),
            masks: MaskWorker::default(),
            config,
            start: Instant::now(),
            next_id: 0,
            events: Vec::new(),
            launched: None,
            failure: None,
            counters: Counters::default(),
            heartbeat: Arc::default(),
        })
    }

    /// Queues a request; an error when it can never run or the engine has failed.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        check_prompt(&request.prompt, &self.config)?;
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let id = self.next_id;
        let now = self.now();
        self.queue(id, request, now);
        Ok(id)
    }

    /// Queues a checked request under an id of the caller's.
    fn queue(&mut self, id: RequestId, request: Request, arrival: f64) {
        self.next_id = self.next_id.max(id + 1);
        let seed = request.params.seed.unwrap_or_else(|| derive_seed(self.config.seed, id));
        let prompt: Arc<[u32]> = request.prompt.into();
        let (params, grammar) = (Arc::new(request.params), request.grammar);
        let sequence = |sample| {
            let id = SequenceId { request: id, sample };
            let mut sequence = Sequence::new(id, prompt.clone(), params.clone(), seed, arrival);
            sequence.grammar = grammar.as_ref().map(Grammar::start);
            sequence
        };
        self.scheduler.submit((0..params.num_samples()).map(sequence).collect());
    }

    /// Ends one sample of a request, or all. What is unknown or over already is left alone.
    pub fn abort(&mut self, request: RequestId, sample: Option<u32>) {
        let now = self.now();
        for mut sequence in self.scheduler.remove(request, sample) {
            self.events.push(last_event(&mut sequence, FinishReason::Abort, now));
        }
    }

    /// Whether a step would do something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.scheduler.is_idle() && self.failure.is_none()
    }

    /// Computes one step and returns all events since the last call.
    ///
    /// An error or a panic of the forward pass ends every live request with it, and the engine.
    pub fn step(&mut self) -> Vec<Event> {
        if self.has_work() {
            let result = catch_unwind(AssertUnwindSafe(|| self.try_step()));
            let result = result.unwrap_or_else(|panic| Err(panic_error(panic.as_ref())));
            self.counters.steps += 1;
            if let Err(error) = result {
                self.fail(error);
            }
        }
        self.take_events()
    }

    /// All events since the last call of this or of [`Self::step`].
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Ends every live request, and the engine, with `error`.
    pub fn fail(&mut self, error: Error) {
        let now = self.now();
        // A panic may have come between a sample's last event and its departure.
        for sequence in self.scheduler.live().filter(|sequence| !sequence.is_finished) {
            let reason = FinishReason::Error(error.clone());
            self.events.push(Event::end(sequence, reason, now));
        }
        // After a panic nothing in the old one can be relied on.
        self.scheduler = Scheduler::new(&self.config);
        self.launched = None;
        self.failure.get_or_insert(error);
    }

    /// Why the engine does nothing any more.
    #[must_use]
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// Forgets every cached prefix. Live requests go on undisturbed.
    pub fn clear_prefix_cache(&mut self) {
        self.scheduler.clear_prefix_cache();
    }

    /// Gauges and counters of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let cache = self.scheduler.cache_stats();
        let now = self.now();
        Stats {
            num_requests_running: self.scheduler.running().len(),
            num_requests_waiting: self.scheduler.num_waiting(),
            kv_blocks_used: cache.used,
            kv_blocks_total: cache.total,
            kv_blocks_cached: cache.cached,
            prefix_cache_queries: cache.queries,
            prefix_cache_hits: cache.hits,
            preemptions: self.scheduler.preemptions(),
            prompt_tokens_total: self.counters.prompt_tokens,
            generation_tokens_total: self.counters.generation_tokens,
            uptime_s: now,
            steps: self.counters.steps,
            heartbeat_s: now,
        }
    }

    /// Checks the bookkeeping of cache and scheduler. For tests: it is slow.
    pub fn check(&self) -> Result<()> {
        self.scheduler.check()
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn try_step(&mut self) -> Result<()> {
        // All whom a launched step was for may have gone.
        let launched = match self.launched.take().filter(|_| self.scheduler.is_planned()) {
            Some(launched) => launched,
            None => self.launch()?,
        };
        if self.forward.draws() && self.scheduler.plan_ahead() {
            let outcome = self.compute(Sequence::chunk_ahead)?;
            self.launched = Some(Launched { outcome, is_masked: false });
        }
        let logits = launched.outcome.wait()?;
        if launched.is_masked {
            self.finish_masks()?;
        }
        self.scheduler.advance();
        self.sample(&logits)?;
        self.scheduler.sweep();
        Ok(())
    }

    /// Plans a step and starts it.
    fn launch(&mut self) -> Result<Launched> {
        let now = self.now();
        if self.scheduler.schedule(now) == 0 {
            // Better an error than a loop for ever.
            return Err(Error::bug("the scheduler found nothing to compute for waiting requests"));
        }
        let is_masked = self.begin_masks()?;
        if self.forward.draws() {
            let mut draws = 0;
            for sequence in self.scheduler.running_mut() {
                draws += usize::from(sequence.plan_draw(draws)?);
            }
        }
        Ok(Launched { outcome: self.compute(Sequence::chunk)?, is_masked })
    }

    /// Starts the step of these chunks.
    fn compute(&mut self, chunk: fn(&Sequence) -> Option<Chunk<'_>>) -> Result<Outcome> {
        let chunks = self.scheduler.running().iter().filter_map(chunk).collect();
        let beat = || self.heartbeat.store(self.start.elapsed().as_millis() as u64, Relaxed);
        self.forward.forward(&Step { chunks }, &beat)
    }

    /// Sends the grammars of all samples that get a token in this step to the grammar thread.
    fn begin_masks(&mut self) -> Result<bool> {
        let running = self.scheduler.running_mut().iter_mut().enumerate();
        let states: Vec<_> = running
            .filter(|(_, sequence)| sequence.samples_next())
            .filter_map(|(index, sequence)| Some((index, sequence.grammar.take()?)))
            .collect();
        if states.is_empty() {
            return Ok(false);
        }
        self.masks.begin(states)?;
        Ok(true)
    }

    /// Gives them back.
    fn finish_masks(&mut self) -> Result<()> {
        let running = self.scheduler.running_mut();
        for (index, state) in self.masks.finish()? {
            running[index].grammar = Some(state);
        }
        Ok(())
    }

    /// Takes each sequence's rows of the logits, in the order of the chunks.
    fn sample(&mut self, logits: &Logits) -> Result<()> {
        let (now, limit) = (self.now(), self.scheduler.max_len());
        let wanted: usize =
            self.scheduler.running().iter().filter_map(|s| s.planned).map(|p| p.num_rows()).sum();
        let (given, vocab_size) = (logits.values.len(), self.config.vocab_size);
        if given != wanted * vocab_size || logits.vocab_size != vocab_size {
            return Err(Error::bug(format!(
                "the model gave {given} logits in rows of {}; expected {wanted} rows of {vocab_size}",
                logits.vocab_size
            )));
        }
        let (mut first, mut poisoned) = (0, false);
        for sequence in self.scheduler.running_mut() {
            let Some(planned) = sequence.planned.take() else { continue };
            sequence.planned = sequence.ahead.take();
            let rows = Rows { logits, first, planned };
            first += planned.num_rows();
            let next = if let LogitRows::Drawn(_) = planned.rows {
                let drawn = logits.drawn.get(planned.place);
                let drawn = drawn.ok_or_else(|| Error::bug("the device drew too few tokens"));
                drawn.and_then(|drawn| drawn.clone().ok_or_else(broken_logits)).map(Some)
            } else {
                rows.next(sequence, &mut self.sampler)
            };
            let event = match next {
                Ok(None) => continue,
                Ok(Some(drawn)) => {
                    self.counters.generation_tokens += 1;
                    if sequence.num_output() == 0 {
                        self.counters.prompt_tokens += sequence.num_prompt() as u64;
                    }
                    Event::next(drawn, sequence, &self.config.eos_token_ids, limit, now)
                }
                Err(error) => {
                    poisoned |= error.kind() == ErrorKind::Bug;
                    last_event(sequence, FinishReason::Error(error), now)
                }
            };
            self.events.push(event);
        }
        if poisoned {
            // The rows of other requests are their own, but later ones must not find these blocks.
            self.scheduler.clear_prefix_cache();
        }
        Ok(())
    }
}

/// The rows of one chunk.
struct Rows<'a> {
    logits: &'a Logits,
    first: usize,
    planned: Planned,
}

impl Rows<'_> {
    /// The next token of `sequence`, if its last row is there.
    fn next(&self, sequence: &mut Sequence, sampler: &mut Sampler) -> Result<Option<Drawn>> {
        if self.planned.rows == LogitRows::All {
            self.collect_prompt_logprobs(sequence)?;
        }
        if self.planned.num_rows() == 0 || sequence.num_pending() > 0 {
            return Ok(None);
        }
        let logits = self.logits.row(self.first + self.planned.num_rows() - 1);
        let (row, state) = sequence.row(logits)?;
        let token = sampler.sample(&row, state)?;
        let top = sequence.params.logprobs;
        let logprobs = top.map(|top| token_logprobs(logits, token, top)).transpose()?;
        Ok(Some(Drawn { token, logprobs }))
    }

    /// The row of each prompt token tells of the token after it.
    fn collect_prompt_logprobs(&self, sequence: &mut Sequence) -> Result<()> {
        let (Some(mut known), Some(top)) =
            (sequence.prompt_logprobs.take(), sequence.params.prompt_logprobs)
        else {
            return Ok(());
        };
        if known.is_empty() {
            known.push(None);
        }
        let end = sequence.num_computed;
        for (position, row) in (end - self.planned.len..end).zip(self.first..) {
            if let Some(&next) = sequence.tokens().get(position + 1) {
                known.push(Some(token_logprobs(self.logits.row(row), next, top)?));
            }
        }
        sequence.prompt_logprobs = Some(known);
        Ok(())
    }
}

impl Event {
    /// Gives `sequence` its next token.
    fn next(drawn: Drawn, sequence: &mut Sequence, eos: &[u32], limit: usize, now: f64) -> Self {
        let is_first = sequence.num_output() == 0;
        sequence.metrics.first_token_time.get_or_insert(now);
        let reason = sequence.push(drawn.token, eos, limit);
        let mut event = match reason {
            // It was not taken: no token goes with the error.
            Some(reason @ FinishReason::Error(_)) => return last_event(sequence, reason, now),
            Some(reason) => last_event(sequence, reason, now),
            None => Self::new(sequence.id()),
        };
        event.token_ids.push(drawn.token);
        event.logprobs = drawn.logprobs.map(|list| vec![list]);
        event.num_cached_tokens = is_first.then_some(sequence.metrics.num_cached_tokens);
        event.prompt_logprobs = sequence.prompt_logprobs.take();
        event
    }

    fn new(id: SequenceId) -> Self {
        Self {
            id,
            token_ids: Vec::new(),
            logprobs: None,
            num_cached_tokens: None,
            prompt_logprobs: None,
            finish: None,
        }
    }

    fn end(sequence: &Sequence, reason: FinishReason, now: f64) -> Self {
        let metrics = SampleMetrics { finished_time: Some(now), ..sequence.metrics };
        Self { finish: Some(Finish { reason, metrics }), ..Self::new(sequence.id()) }
    }
}

/// Marks the sequence as finished and says so.
fn last_event(sequence: &mut Sequence, reason: FinishReason, now: f64) -> Event {
    sequence.is_finished = true;
    Event::end(sequence, reason, now)
}

fn panic_error(panic: &(dyn std::any::Any + Send)) -> Error {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Error::bug(format!("the engine panicked: {message}"))
}
