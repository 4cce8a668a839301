//! A model without weights: the logits of a row are a hash of the whole token history, read back
//! from a simulated cache. A wrong block table, a missing recomputation or a prefix hit on blocks
//! that are not computed yet shows up as a panic or as different tokens.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use astrai_rs::cache::block::BlockId;
use astrai_rs::config::{BLOCK_SIZE, EngineConfig};
use astrai_rs::draw::Drawn;
use astrai_rs::engine::{Engine, Event, FinishReason, PromptLogprobs, Request, SequenceId};
use astrai_rs::error::{Error, ErrorKind, Result};
use astrai_rs::sampler::philox::derive_seed;
use astrai_rs::sampler::{
    Row, SampleState, Sampler, SamplingOptions, SamplingParams, TokenLogprob, token_logprobs,
};
use astrai_rs::step::{Chunk, ChunkTokens, Forward, LogitRows, Logits, Outcome, Running, Step};

/// What goes wrong in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Error,
    Panic,
    /// The logits of the first row are NaN.
    Nan,
}

#[derive(Debug)]
pub struct Fake {
    vocab_size: usize,
    /// Position and token per slot of the cache.
    cells: Vec<Option<(usize, u32)>>,
    /// One line per step: `start+len` per chunk, then `.` for no logits, `*` for all rows.
    pub log: Option<Arc<Mutex<Vec<String>>>>,
    /// The step with this number fails.
    pub fault: Option<(usize, Fault)>,
    pub pause: std::time::Duration,
    num_steps: usize,
    /// As a GPU, it draws tokens, and gives them out only when they are waited for: these are the last
    /// step's.
    drawn: Option<Vec<u32>>,
    /// Steps that were on their way before the one before was waited for.
    pub num_ahead: Arc<AtomicUsize>,
    /// Steps that nobody has waited for.
    running: Arc<AtomicUsize>,
}

impl Fake {
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            cells: vec![None; config.num_blocks * BLOCK_SIZE],
            log: None,
            fault: None,
            pause: std::time::Duration::ZERO,
            num_steps: 0,
            drawn: None,
            num_ahead: Arc::default(),
            running: Arc::default(),
        }
    }

    pub fn drawing(config: &EngineConfig) -> Self {
        Self { drawn: Some(Vec::new()), ..Self::new(config) }
    }

    fn cell(&mut self, blocks: &[BlockId], position: usize) -> &mut Option<(usize, u32)> {
        let block = blocks[position / BLOCK_SIZE].0 as usize;
        &mut self.cells[block * BLOCK_SIZE + position % BLOCK_SIZE]
    }

    /// Logits of the rows of a chunk, as many as it asks for.
    fn rows(&mut self, chunk: &Chunk<'_>) -> Vec<f32> {
        let end = chunk.start + chunk.tokens.len();
        assert_eq!(chunk.blocks.len(), end.div_ceil(BLOCK_SIZE), "blocks cover the chunk exactly");
        let first = match chunk.logits {
            LogitRows::None => return Vec::new(),
            LogitRows::Last | LogitRows::Drawn(_) => end - 1,
            LogitRows::All => chunk.start,
        };
        let (mut history, mut values) = (SEED, Vec::new());
        for position in 0..end {
            let (written_at, token) =
                self.cell(chunk.blocks, position).expect("computed before use");
            assert_eq!(written_at, position, "the slot belongs to another position");
            history = mix(history ^ u64::from(token));
            if position >= first {
                values.extend((0..self.vocab_size).map(|id| logit(history, id)));
            }
        }
        values
    }

    fn tokens(&self, chunk: &Chunk<'_>) -> Vec<u32> {
        match chunk.tokens {
            ChunkTokens::Known(tokens) => tokens.to_vec(),
            ChunkTokens::Drawn(place) => vec![self.drawn.as_ref().expect("it draws")[place]],
        }
    }

    /// Says what is computed; all writes before all reads, so that an overlap of two tables shows.
    fn write(&mut self, step: &Step<'_>) {
        let mut line = String::new();
        for chunk in &step.chunks {
            let tokens = self.tokens(chunk);
            assert!(!tokens.is_empty(), "no empty chunks");
            let suffix = match chunk.logits {
                LogitRows::None => ".",
                LogitRows::Last | LogitRows::Drawn(_) => "",
                LogitRows::All => "*",
            };
            let _ = write!(line, " {}+{}{suffix}", chunk.start, tokens.len());
            for (position, token) in (chunk.start..).zip(tokens) {
                *self.cell(chunk.blocks, position) = Some((position, token));
            }
        }
        if let Some(log) = &self.log {
            log.lock().expect("whole").push(line.trim_start().to_owned());
        }
    }
}

/// What the fake device has drawn.
#[derive(Debug)]
struct Drawing(Logits, Arc<AtomicUsize>);

impl Running for Drawing {
    fn wait(self: Box<Self>) -> Result<Logits> {
        Ok(self.0.clone())
    }
}

impl Drop for Drawing {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Relaxed);
    }
}

impl Forward for Fake {
    fn forward(&mut self, step: &Step<'_>, beat: &dyn Fn()) -> Result<Outcome> {
        beat();
        std::thread::sleep(self.pause);
        self.num_steps += 1;
        let fault = self.fault.filter(|&(at, _)| at == self.num_steps).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Error) => return Err(Error::new(ErrorKind::Device, "the device is gone")),
            Some(Fault::Panic) => panic!("a broken invariant"),
            _ => {}
        }
        let ahead = self.running.load(Relaxed);
        assert!(ahead <= 1, "two steps are under way");
        self.num_ahead.fetch_add(ahead, Relaxed);
        self.write(step);
        let (mut logits, mut sampler) = (Logits::default(), Sampler::new(Vec::new()));
        logits.vocab_size = self.vocab_size;
        let mut ids = Vec::new();
        for (index, chunk) in step.chunks.iter().enumerate() {
            let mut values = self.rows(chunk);
            if fault == Some(Fault::Nan) && index == 0 {
                values[..self.vocab_size].fill(f32::NAN);
            }
            let LogitRows::Drawn(draw) = chunk.logits else {
                logits.values.extend(values);
                continue;
            };
            let token = sampler.draw(&values, &draw).ok();
            ids.push(token.unwrap_or(0));
            logits.drawn.push(token.map(|token| {
                let logprobs = draw.logprobs.map(|top| token_logprobs(&values, token, top));
                Drawn { token, logprobs: logprobs.transpose().expect("numbers") }
            }));
        }
        if self.drawn.is_none() {
            return Ok(Outcome::Ready(logits));
        }
        self.drawn = Some(ids);
        self.running.fetch_add(1, Relaxed);
        Ok(Outcome::Running(Box::new(Drawing(logits, self.running.clone()))))
    }

    fn draws(&self) -> bool {
        self.drawn.is_some()
    }
}

const SEED: u64 = 0x5eed;

pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn logit(history: u64, id: usize) -> f32 {
    (mix(history ^ (id as u64) << 32) >> 40) as f32 / (1 << 21) as f32 - 4.0
}

/// The logits that the fake gives after these tokens.
pub fn logits_after(tokens: &[u32], vocab_size: usize) -> Vec<f32> {
    let history = tokens.iter().fold(SEED, |history, &token| mix(history ^ u64::from(token)));
    (0..vocab_size).map(|id| logit(history, id)).collect()
}

/// A small source of test cases.
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// A number in `0..end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (mix(self.0) % end as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn range(&mut self, least: f64, most: f64) -> f64 {
        least + (most - least) * self.below(1 << 20) as f64 / f64::from(1 << 20)
    }

    pub fn ids(&mut self, count: usize, end: usize) -> Vec<i64> {
        (0..count).map(|_| self.below(end) as i64).collect()
    }
}

pub fn config() -> EngineConfig {
    EngineConfig {
        max_model_len: 128,
        max_num_seqs: 256,
        max_num_batched_tokens: 2048,
        prefill_beside_decode: 2048,
        num_blocks: 1024,
        enable_prefix_caching: true,
        seed: 7,
        eos_token_ids: Vec::new(),
        vocab_size: 32,
    }
}

pub fn engine(config: &EngineConfig) -> Engine<Fake> {
    Engine::new(Fake::new(config), config.clone()).expect("valid")
}

pub fn request(prompt: Vec<u32>, options: &SamplingOptions, config: &EngineConfig) -> Request {
    let params = SamplingParams::new(options, config.vocab_size).expect("valid");
    Request { prompt, params, grammar: None }
}

/// `max_tokens` of greedy output.
pub fn greedy(max_tokens: i64) -> SamplingOptions {
    SamplingOptions { temperature: 0.0, max_tokens, ..SamplingOptions::default() }
}

/// All that came of one sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Output {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<Vec<TokenLogprob>>,
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Name of the finish reason, stop token or error text.
    pub finish: Option<(&'static str, String)>,
}

pub type Outputs = BTreeMap<SequenceId, Output>;

/// Adds events to what came before; a sample must not go on after its end.
pub fn collect(outputs: &mut Outputs, events: Vec<Event>) {
    for event in events {
        let output = outputs.entry(event.id).or_default();
        assert_eq!(output.finish, None, "{:?} goes on after its end", event.id);
        output.tokens.extend(event.token_ids);
        output.logprobs.extend(event.logprobs.into_iter().flatten());
        if event.prompt_logprobs.is_some() {
            assert!(output.prompt_logprobs.is_none(), "prompt logprobs come once");
            output.prompt_logprobs = event.prompt_logprobs;
        }
        output.finish = event.finish.map(|finish| {
            let detail = match &finish.reason {
                FinishReason::StopToken(token) => token.to_string(),
                FinishReason::Error(error) => error.to_string(),
                _ => String::new(),
            };
            (finish.reason.name(), detail)
        });
    }
}

/// Steps until nothing is left, checking the books each time.
pub fn run<F: Forward>(engine: &mut Engine<F>) -> Outputs {
    let mut outputs = Outputs::new();
    let mut steps = 0;
    while engine.has_work() {
        collect(&mut outputs, engine.step());
        engine.check().expect("sound");
        steps += 1;
        assert!(steps < 200_000, "no end in sight");
    }
    outputs
}

/// What a sample must give, computed without engine, scheduler or cache. Knows `max_tokens`, stop
/// ids and everything of the sampler.
pub fn reference(
    request: &Request,
    options: &SamplingOptions,
    id: SequenceId,
    config: &EngineConfig,
) -> Output {
    let seed = options.seed.unwrap_or_else(|| derive_seed(config.seed, id.request));
    let mut sampler = Sampler::new(config.eos_token_ids.clone());
    let mut state = SampleState::new(seed, id.sample);
    let mut tokens = request.prompt.clone();
    let num_prompt = tokens.len();
    let limit = config.max_model_len.min(config.num_blocks * BLOCK_SIZE + 1);
    let finish = loop {
        let logits = logits_after(&tokens, config.vocab_size);
        let row = Row {
            logits: &logits,
            tokens: &tokens,
            num_prompt,
            params: &request.params,
            mask: None,
        };
        let token = sampler.sample(&row, &mut state).expect("possible");
        tokens.push(token);
        if !options.ignore_eos && config.eos_token_ids.contains(&token) {
            break ("stop", String::new());
        } else if options.stop_token_ids.contains(&i64::from(token)) {
            break ("stop", token.to_string());
        } else if (tokens.len() - num_prompt) as i64 >= options.max_tokens || tokens.len() >= limit
        {
            break ("length", String::new());
        }
    };
    Output { tokens: tokens.split_off(num_prompt), finish: Some(finish), ..Output::default() }
}
