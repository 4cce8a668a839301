//! What a step costs beside the model: scheduling 1 or 256 sequences, and sampling one row of 49,152 ids.
//!
//! `cargo bench --bench scheduler`. Every figure is the median of several rounds, in microseconds.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::hint::black_box;
use std::time::Instant;

use astrai_rs::config::EngineConfig;
use astrai_rs::engine::{Engine, Request};
use astrai_rs::error::Result;
use astrai_rs::sampler::{
    Row, SampleState, Sampler, SamplingOptions, SamplingParams, token_logprobs,
};
use astrai_rs::step::{Forward, LogitRows, Logits, Outcome, Step};

const MANY: usize = 256;
const VOCAB: usize = 49_152;

fn main() {
    let mut figures = vec![("step_1_running", step_us(1)), ("step_256_running", step_us(MANY))];
    let logits = logits();
    let base = SamplingOptions::default();
    let greedy = SamplingOptions { temperature: 0.0, ..base.clone() };
    let top_k = SamplingOptions { top_k: 50, ..base.clone() };
    let top_p = SamplingOptions { top_p: 0.9, ..base.clone() };
    let both = SamplingOptions { top_p: 0.9, ..top_k.clone() };
    let min_p = SamplingOptions { min_p: 0.05, ..base.clone() };
    let penalties = SamplingOptions { repetition_penalty: 1.1, ..greedy.clone() };
    for (name, options) in [
        ("row_greedy", greedy),
        ("row_temperature", base),
        ("row_top_k_50", top_k),
        ("row_top_p_0.9", top_p),
        ("row_top_k_50_top_p_0.9", both),
        ("row_min_p_0.05", min_p),
        ("row_greedy_penalties", penalties),
    ] {
        figures.push((name, row_us(&logits, &options)));
    }
    let flat = SamplingOptions { top_p: 0.9, temperature: 5.0, ..SamplingOptions::default() };
    figures.push(("row_top_p_0.9_flat", row_us(&logits, &flat)));
    for (name, top) in [("row_logprobs_0", 0), ("row_logprobs_20", 20), ("row_logprobs_all", VOCAB)]
    {
        figures.push((name, median_us(|| drop(black_box(token_logprobs(&logits, 17, top))))));
    }
    for (name, us) in &figures {
        println!("{name:<24} {us:>9.2} us");
    }
    let fields: Vec<String> =
        figures.iter().map(|(name, us)| format!("\"{name}_us\": {us:.2}")).collect();
    println!("{{\"vocab\": {VOCAB}, {}}}", fields.join(", "));
}

/// Median over rounds that last long enough for the clock.
fn median_us(mut work: impl FnMut()) -> f64 {
    let mut round = |times: u32| {
        let start = Instant::now();
        (0..times).for_each(|_| work());
        start.elapsed().as_secs_f64() * 1e6 / f64::from(times)
    };
    let times = (10_000.0 / round(3)).clamp(1.0, 10_000.0) as u32;
    let mut rounds: Vec<f64> = (0..21).map(|_| round(times)).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// Logits by Zipf's law with an exponent of 1.6, like rows of `SmolLM2`: 20 to 30 ids hold 0.9, some 400 are within e^-9.7 of
/// the likeliest.
fn logits() -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) + 1) as f32 / (1 << 24) as f32
    };
    (0..VOCAB).map(|_| -1.6 * uniform().ln()).collect()
}

fn row_us(logits: &[f32], options: &SamplingOptions) -> f64 {
    let params = SamplingParams::new(options, VOCAB).expect("valid");
    let tokens: Vec<u32> = (0..512).map(|i| i * 31).collect();
    let (mut sampler, mut state) = (Sampler::new(vec![2]), SampleState::new(1, 0));
    let row = Row { logits, tokens: &tokens, num_prompt: 256, params: &params, mask: None };
    median_us(|| drop(black_box(sampler.sample(&row, &mut state))))
}

/// A model that costs nothing: two ids, all logits zero.
struct Free;

impl Forward for Free {
    fn forward(&mut self, step: &Step<'_>, _beat: &dyn Fn()) -> Result<Outcome> {
        let rows = step.chunks.iter().filter(|chunk| chunk.logits != LogitRows::None).count();
        let values = vec![0.0; rows * 2];
        Ok(Outcome::Ready(Logits { values, vocab_size: 2, drawn: Vec::new() }))
    }
}

/// One decode step of so many sequences: schedule, chunks, commit, greedy rows of two ids, events.
fn step_us(sequences: usize) -> f64 {
    let config = EngineConfig {
        max_model_len: 1 << 30,
        max_num_seqs: sequences,
        max_num_batched_tokens: 2048,
        prefill_beside_decode: 2048,
        num_blocks: 1 << 18,
        enable_prefix_caching: true,
        seed: 0,
        eos_token_ids: Vec::new(),
        vocab_size: 2,
    };
    let mut engine = Engine::new(Free, config).expect("valid");
    let options =
        SamplingOptions { temperature: 0.0, max_tokens: 1 << 30, ..SamplingOptions::default() };
    for index in 0..sequences as u32 {
        let params = SamplingParams::new(&options, 2).expect("valid");
        let prompt = (0..100).map(|at| (index >> (at % 8)) & 1).collect();
        engine.submit(Request { prompt, params, grammar: None }).expect("fits");
    }
    while engine.stats().num_requests_running < sequences {
        engine.step();
    }
    median_us(|| drop(black_box(engine.step())))
}
