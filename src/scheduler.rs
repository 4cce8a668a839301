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

/// Decides what each step computes, and owns every sequence and the cache's bookkeeping.
#[derive(Debug)]
pub struct Scheduler {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
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
    pub fn samples_of(request: RequestId) -> RangeInclusive<SequenceId> {
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
    let planned = Planned { len, rows };
    left.tokens -= len;
    left.rows = left.rows.saturating_sub(planned.num_rows());
    sequence.planned = Some(planned);
}
