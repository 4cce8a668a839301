//! Waiting and running sequences → the work of the next step.
//!
//! First come, first served. Each step has a budget of tokens: sequences with one token to compute
//! (decode rows) go first, then prefill chunks of running sequences, then admissions. A sequence is
//! admitted when blocks for all its tokens are there, so a prefill never runs out of them midway.
//! A decode row may; then the newest running sequence gives its blocks up and waits again, at its
//! old place in the queue. The oldest sequence is never the victim of another, so it always gets
//! on, and since every sequence becomes the oldest, all finish.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;

use crate::cache::{Allocation, CacheStats, KvCache};
use crate::config::{BLOCK_SIZE, EngineConfig};
use crate::error::{Error, Result};
use crate::sequence::{Planned, RequestId, Sequence, SequenceId};
use crate::step::LogitRows;

/// Most floats that the logits of one step should hold: 64 MiB.
const MAX_LOGITS: usize = 16 << 20;

/// Most prompts for which a step beside decode rows computes tokens, however many wait: it bounds the time between two
/// tokens of running requests.
const MAX_PROMPTS: usize = 8;

/// Decides what each step computes, and owns every sequence and the cache's bookkeeping.
#[derive(Debug)]
pub struct Scheduler {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    prefill_beside_decode: usize,
    /// Rows of logits per step that chunks with prompt log-probabilities may bring it to.
    max_rows: usize,
    max_model_len: usize,
    cache: KvCache,
    /// By arrival.
    waiting: BTreeMap<SequenceId, Sequence>,
    /// By arrival: the last is the first to be preempted.
    running: Vec<Sequence>,
    /// Samples that wait until another of their request has computed the prompt for all.
    held: BTreeMap<RequestId, VecDeque<Sequence>>,
    preemptions: u64,
}

/// What is left of a step while it is planned.
struct Budget {
    tokens: usize,
    rows: usize,
}

impl Scheduler {
    /// An empty scheduler with the limits of `config`.
    #[must_use]
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            prefill_beside_decode: config.prefill_beside_decode,
            max_rows: MAX_LOGITS / config.vocab_size.max(1),
            max_model_len: config.max_model_len,
            cache: KvCache::new(config.num_blocks, config.enable_prefix_caching),
            waiting: BTreeMap::new(),
            running: Vec::new(),
            held: BTreeMap::new(),
            preemptions: 0,
        }
    }

    /// The longest that a sequence can become. The last token needs no place in the cache.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.max_model_len.min(self.cache.stats().total * BLOCK_SIZE + 1)
    }

    /// Queues the samples of one request: the first now, the others when the prompt is computed.
    pub fn submit(&mut self, mut samples: VecDeque<Sequence>) {
        let Some(first) = samples.pop_front() else { return };
        self.hold(first.id().request, samples);
        self.waiting.insert(first.id(), first);
    }

    /// Plans what each running sequence computes next (its [`Sequence::chunk`]); returns the tokens.
    pub fn schedule(&mut self, now: f64) -> usize {
        let mut left = Budget { tokens: self.max_num_batched_tokens, rows: self.max_rows };
        for sequence in &mut self.running {
            sequence.planned = None;
        }
        let preempted = self.plan_decodes(&mut left);
        let num_decodes = self.max_num_batched_tokens - left.tokens;
        if num_decodes > 0 {
            let prompts = self.num_prompts(!preempted).min(MAX_PROMPTS);
            let prefill = self.prefill_beside_decode.saturating_mul(prompts);
            left.tokens = left.tokens.min(num_decodes.max(prefill));
        }
        for sequence in &mut self.running {
            if sequence.planned.is_none() {
                plan(sequence, &mut left);
            }
        }
        if !preempted {
            self.admit(&mut left, now);
        }
        self.running.iter().filter_map(|sequence| sequence.planned).map(|planned| planned.len).sum()
    }

    /// Plans the step after the planned one (its [`Sequence::chunk_ahead`]), which may still run: one row
    /// for each token that it draws and that is not the last. Says whether there is such a step: not
    /// where somebody waits for a place that is free, something else than draws goes on, or blocks are lacking.
    pub fn plan_ahead(&mut self) -> bool {
        let draws = |sequence: &Sequence| {
            sequence.planned.is_some_and(|planned| matches!(planned.rows, LogitRows::Drawn(_)))
        };
        let may_admit = self.num_waiting() > 0 && self.running.len() < self.max_num_seqs;
        if may_admit || !self.running.iter().all(draws) {
            return false;
        }
        let (limit, mut rows) = (self.max_len(), 0);
        for sequence in &mut self.running {
            let len = sequence.tokens().len() + 1;
            if !sequence.plan_ahead(rows, limit) {
                continue;
            }
            if !sequence.table.as_mut().is_some_and(|table| self.cache.append(table, len)) {
                self.running.iter_mut().for_each(|sequence| sequence.ahead = None);
                return false;
            }
            rows += 1;
        }
        rows > 0
    }

    /// Whether something is planned.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        self.running.iter().any(|sequence| sequence.planned.is_some())
    }

    /// Commits the planned tokens, which are now in the cache.
    pub fn advance(&mut self) {
        let mut released = Vec::new();
        for sequence in &mut self.running {
            let Some(planned) = sequence.planned else { continue };
            sequence.num_computed += planned.len;
            if let Some(mut table) = sequence.table.take() {
                self.cache.commit(&mut table, sequence.tokens(), sequence.num_computed);
                sequence.table = Some(table);
            }
            if sequence.num_computed >= sequence.num_prompt() {
                released.extend(self.held.remove(&sequence.id().request).into_iter().flatten());
            }
        }
        self.waiting.extend(released.into_iter().map(|sample| (sample.id(), sample)));
    }

    /// Takes out the running sequences that are finished.
    pub fn sweep(&mut self) {
        let finished: Vec<Sequence> =
            self.running.extract_if(.., |sequence| sequence.is_finished).collect();
        for sequence in finished {
            self.retire(sequence);
        }
    }

    /// Takes out one sample, or all of a request, and returns them.
    pub fn remove(&mut self, request: RequestId, sample: Option<u32>) -> Vec<Sequence> {
        let matches =
            |id: SequenceId| id.request == request && sample.is_none_or(|s| s == id.sample);
        let mut removed = Vec::new();
        if let Some(held) = self.held.remove(&request) {
            let (taken, kept): (VecDeque<_>, VecDeque<_>) =
                held.into_iter().partition(|sequence| matches(sequence.id()));
            removed.extend(taken);
            self.hold(request, kept);
        }
        let waiting = self.waiting.extract_if(samples_of(request), |&id, _| matches(id));
        removed.extend(waiting.map(|(_, sequence)| sequence));
        removed.extend(self.running.extract_if(.., |sequence| matches(sequence.id())));
        removed.into_iter().map(|sequence| self.retire(sequence)).collect()
    }

    /// The running sequences, oldest first.
    #[must_use]
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// The running sequences, oldest first.
    pub fn running_mut(&mut self) -> &mut [Sequence] {
        &mut self.running
    }

    /// All live sequences.
    pub fn live(&self) -> impl Iterator<Item = &Sequence> {
        let held = self.held.values().flatten();
        self.running.iter().chain(self.waiting.values()).chain(held)
    }

    /// Sequences that wait for a place.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.waiting.len() + self.held.values().map(VecDeque::len).sum::<usize>()
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How often a running sequence has lost its blocks.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The cache's counts.
    #[must_use]
    pub fn cache_stats(&self) -> CacheStats {
        self.cache.stats()
    }

    /// Forgets every prefix.
    pub fn clear_prefix_cache(&mut self) {
        self.cache.clear_prefix_cache();
    }

    /// Checks the cache against the live sequences. For tests: it is slow.
    pub fn check(&self) -> Result<()> {
        let tables = self.running.iter().filter_map(|sequence| sequence.table.as_ref());
        if tables.clone().count() != self.running.len() {
            return Err(Error::bug("a running sequence has no blocks"));
        }
        if self.is_idle() && !self.held.is_empty() {
            return Err(Error::bug("samples are held with nobody to wait for"));
        }
        self.cache.check(tables)
    }

    /// Plans decode rows, oldest first. True when that took blocks from a sequence.
    fn plan_decodes(&mut self, left: &mut Budget) -> bool {
        let (mut index, mut preempted) = (0, false);
        while index < self.running.len() && left.tokens > 0 {
            let sequence = &mut self.running[index];
            let len = sequence.tokens().len();
            let is_decode = sequence.num_pending() == 1;
            let table = sequence.table.as_mut();
            if is_decode && !table.is_some_and(|table| self.cache.append(table, len)) {
                // The victim may be `sequence` itself. If it is the only one left it fits: the
                // engine ends sequences at `max_len`.
                self.preempt_newest();
                preempted = true;
                continue;
            }
            if is_decode {
                plan(sequence, left);
            }
            index += 1;
        }
        preempted
    }

    /// Sequences without a place in the planned step that have a prompt to compute; those that wait for a seat that is
    /// free, where `may_admit`.
    fn num_prompts(&self, may_admit: bool) -> usize {
        let prefilling = self.running.iter().filter(|sequence| sequence.planned.is_none()).count();
        let seats = self.max_num_seqs.saturating_sub(self.running.len());
        prefilling + if may_admit { self.waiting.len().min(seats) } else { 0 }
    }

    fn preempt_newest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        if let Some(table) = sequence.preempt() {
            self.cache.free(table);
        }
        self.preemptions += 1;
        self.waiting.insert(sequence.id(), sequence);
    }

    /// Starts waiting sequences, in order; one that does not fit is not overtaken.
    fn admit(&mut self, left: &mut Budget, now: f64) {
        while left.tokens > 0 && self.running.len() < self.max_num_seqs {
            let Some(next) = self.waiting.first_entry() else { break };
            let sequence = next.get();
            let allocated = self.cache.allocate(&Allocation {
                tokens: sequence.tokens(),
                request: sequence.id().request,
                // Prompt log-probabilities need every row of the prompt.
                lookup: sequence.prompt_logprobs.is_none(),
                // Or the newcomer would be preempted in the next step.
                spare: self.running.iter().filter(|other| other.grows_next()).count(),
            });
            let Some(table) = allocated else { break };
            let mut sequence = next.remove();
            sequence.start(table, now);
            plan(&mut sequence, left);
            // Samples and preempted sequences may be older than what runs.
            let place = self.running.partition_point(|other| other.id() < sequence.id());
            self.running.insert(place, sequence);
        }
    }

    /// Frees what a departed sequence held; if samples wait for its prompt, the next takes over.
    fn retire(&mut self, mut sequence: Sequence) -> Sequence {
        if let Some(table) = sequence.table.take() {
            self.cache.free(table);
        }
        let request = sequence.id().request;
        if self.held.contains_key(&request) && !self.is_led(request) {
            let mut held = self.held.remove(&request).unwrap_or_default();
            self.waiting.extend(held.pop_front().map(|leader| (leader.id(), leader)));
            self.hold(request, held);
        }
        sequence
    }

    /// Whether a sample of `request` is on its way to compute the prompt.
    fn is_led(&self, request: RequestId) -> bool {
        self.waiting.range(samples_of(request)).next().is_some()
            || self.running.iter().any(|other| other.id().request == request)
    }

    fn hold(&mut self, request: RequestId, samples: VecDeque<Sequence>) {
        if !samples.is_empty() {
            self.held.insert(request, samples);
        }
    }
}

/// Refuses a prompt that can never run.
pub fn check_prompt(prompt: &[u32], config: &EngineConfig) -> Result<()> {
    let len = prompt.len();
    if len == 0 {
        return Err(Error::invalid("the prompt must hold at least one token; given: none"));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::invalid(format!(
            "the prompt must hold token ids between 0 and {}; given: {id}",
            config.vocab_size - 1
        )));
    }
    if len >= config.max_model_len {
        return Err(Error::invalid(format!(
            "the prompt must leave room for a token within max_model_len: at most {} tokens; given: {len}",
            config.max_model_len - 1
        )));
    }
    let room = config.num_blocks * BLOCK_SIZE;
    if len > room {
        return Err(Error::invalid(format!(
            "the prompt must fit the KV cache of {room} tokens ({} blocks of {BLOCK_SIZE}); given: {len} tokens",
            config.num_blocks
        )));
    }
    Ok(())
}

fn samples_of(request: RequestId) -> RangeInclusive<SequenceId> {
    SequenceId { request, sample: 0 }..=SequenceId { request, sample: u32::MAX }
}

/// Plans as many of the sequence's pending tokens as the budget has.
fn plan(sequence: &mut Sequence, left: &mut Budget) {
    let pending = sequence.num_pending();
    let wants_rows = sequence.prompt_logprobs.is_some();
    // One row even if the others have used them up: decode rows must not starve a prompt.
    let most = if wants_rows { left.rows.max(1) } else { usize::MAX };
    let len = pending.min(left.tokens).min(most);
    if len == 0 {
        return;
    }
    let rows = match (wants_rows, len == pending) {
        (true, _) => LogitRows::All,
        (false, true) => LogitRows::Last,
        (false, false) => LogitRows::None,
    };
    let planned = Planned { len, rows, place: 0 };
    left.tokens -= len;
    left.rows = left.rows.saturating_sub(planned.num_rows());
    sequence.planned = Some(planned);
}
