//! What the scheduler puts into each step, and that nothing goes wrong in 100,000 random ones.

mod fake;

use std::collections::BTreeMap;
use std::sync::Arc;

use astrai_rs::cache::block::BlockTable;
use astrai_rs::cache::{Allocation, KvCache};
use astrai_rs::config::EngineConfig;
use astrai_rs::engine::stats::Stats;
use astrai_rs::engine::{Engine, Request, RequestId, SequenceId};
use astrai_rs::sampler::SamplingOptions;
use fake::{Fake, Outputs, Rng, collect, config, engine, greedy, reference, request};

/// Submits requests of (prompt length, options) together; each step must compute the chunks of its
/// line: `start+len`, oldest request first, `.` without logits, `*` with those of every row.
fn check(config: &EngineConfig, requests: &[(usize, SamplingOptions)], expect: &[&str]) {
    let (mut fake, log) = (Fake::new(config), Arc::default());
    fake.log = Some(Arc::clone(&log));
    let mut engine = Engine::new(fake, config.clone()).expect("valid");
    for (index, (len, options)) in requests.iter().enumerate() {
        let prompt = (0..*len).map(|at| ((at + 7 * index) % config.vocab_size) as u32).collect();
        engine.submit(request(prompt, options, config)).expect("fits");
    }
    while engine.has_work() {
        engine.step();
        engine.check().expect("sound");
    }
    assert_eq!(*log.lock().expect("whole"), expect);
    assert_eq!((engine.stats().kv_blocks_used, engine.stats().num_requests_waiting), (0, 0));
}

fn budget(max_num_batched_tokens: usize) -> EngineConfig {
    EngineConfig { max_num_batched_tokens, enable_prefix_caching: false, ..config() }
}

#[test]
fn one_request() {
    check(&budget(100), &[(5, greedy(3))], &["0+5", "5+1", "6+1"]);
    check(&budget(4), &[(10, greedy(2))], &["0+4.", "4+4.", "8+2", "10+1"]);
    check(&budget(1), &[(2, greedy(2))], &["0+1.", "1+1", "2+1"]);
}

#[test]
fn decode_rows_and_prefill_chunks_share_a_step() {
    let requests = [(3, greedy(4)), (10, greedy(1)), (2, greedy(1))];
    check(&budget(6), &requests, &["0+3 0+3.", "3+1 3+5.", "4+1 8+2 0+2", "5+1"]);
}

#[test]
fn running_requests_do_not_wait_for_long_prompts() {
    let few = EngineConfig { prefill_beside_decode: 2, ..budget(6) };
    let requests = [(3, greedy(5)), (10, greedy(1))];
    check(&few, &requests, &["0+3 0+3.", "3+1 3+2.", "4+1 5+2.", "5+1 7+2.", "6+1 9+1"]);
    // Two prompts wait: two tokens for each of them, which the oldest takes first.
    let requests = [(6, greedy(4)), (5, greedy(1)), (4, greedy(1))];
    check(&few, &requests, &["0+6", "6+1 0+4.", "7+1 4+1 0+2.", "8+1 2+2"]);
    // Who has no seat does not count.
    let seats = EngineConfig { max_num_seqs: 2, ..few };
    check(&seats, &requests, &["0+6", "6+1 0+2.", "7+1 2+2.", "8+1 4+1", "0+4"]);
    // Nor does anybody behind the eighth.
    let wide = EngineConfig { prefill_beside_decode: 2, ..budget(40) };
    let requests = [&[(40, greedy(2))][..], &[(); 9].map(|()| (15, greedy(1)))].concat();
    let expect =
        ["0+40", "40+1 0+15 0+1.", "1+14 0+15 0+11.", "11+4 0+15 0+15 0+6.", "6+9 0+15 0+15"];
    check(&wide, &requests, &expect);
}

#[test]
fn admission_is_first_come_first_served() {
    let seats = EngineConfig { max_num_seqs: 2, ..budget(100) };
    check(&seats, &[(1, greedy(2)), (2, greedy(1)), (3, greedy(1))], &["0+1 0+2", "1+1 0+3"]);
    // The second does not fit beside the first; the third would, and still waits.
    let blocks = EngineConfig { num_blocks: 4, ..budget(100) };
    let requests = [(30, greedy(2)), (40, greedy(1)), (1, greedy(1))];
    check(&blocks, &requests, &["0+30", "30+1", "0+40 0+1"]);
}

#[test]
fn the_newest_is_preempted_and_computed_again() {
    let tight = EngineConfig { num_blocks: 4, ..budget(100) };
    let requests = [(31, greedy(4)), (15, greedy(3))];
    check(&tight, &requests, &["0+31 0+15", "31+1 15+1", "32+1", "33+1", "0+17"]);
    let requests = [(32, greedy(18)), (14, greedy(20))];
    let mut expect = vec!["0+32 0+14".to_owned()];
    expect.extend((0..2).map(|i| format!("{}+1 {}+1", 32 + i, 14 + i)));
    // Five blocks are wanted: the second gives its one up, and comes back when the first is done.
    expect.extend((2..17).map(|i| format!("{}+1", 32 + i)));
    expect.push("0+17".to_owned());
    expect.extend((17..33).map(|i| format!("{i}+1")));
    check(&tight, &requests, &expect.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_request_that_fills_the_cache_alone_ends_with_length() {
    let tiny = EngineConfig { num_blocks: 1, ..budget(100) };
    check(&tiny, &[(14, greedy(50))], &["0+14", "14+1", "15+1"]);
    let mut engine = engine(&tiny);
    engine.submit(request(vec![1; 14], &greedy(50), &tiny)).expect("fits");
    let outputs = fake::run(&mut engine);
    let output = &outputs[&SequenceId { request: 0, sample: 0 }];
    assert_eq!((output.tokens.len(), output.finish.as_ref().expect("over").0), (3, "length"));
}

#[test]
fn samples_wait_for_the_prompt_and_share_its_blocks() {
    let options = SamplingOptions { n: 3, max_tokens: 2, ..SamplingOptions::default() };
    check(&budget(100), &[(40, options)], &["0+40", "40+1 32+8 32+8", "40+1 40+1"]);
}

#[test]
fn prompt_logprobs_limit_the_rows_of_a_step() {
    let wide = EngineConfig { vocab_size: 4 << 20, max_model_len: 16, ..budget(100) };
    let options = SamplingOptions { prompt_logprobs: Some(0), ..greedy(1) };
    // Four rows of 4 Mi floats are 16 Mi; a decode row counts, and one row is always allowed.
    let requests = [(1, greedy(3)), (9, options)];
    check(&wide, &requests, &["0+1 0+3*", "1+1 3+3*", "2+1 6+3*"]);
}

#[test]
fn a_prefix_is_computed_once() {
    let (config, prompt) = (config(), (0..32).collect::<Vec<u32>>());
    let mut engine = engine(&config);
    for (hits, queries) in [(0, 32), (16, 64), (32, 96)] {
        engine.submit(request(prompt.clone(), &greedy(1), &config)).expect("fits");
        fake::run(&mut engine);
        let stats = engine.stats();
        assert_eq!((stats.prefix_cache_hits, stats.prefix_cache_queries), (hits, queries));
    }
    engine.clear_prefix_cache();
    assert_eq!(engine.stats().kv_blocks_cached, 0);
    engine.submit(request(prompt, &greedy(1), &config)).expect("fits");
    fake::run(&mut engine);
    assert_eq!(engine.stats().prefix_cache_hits, 32);
}

#[test]
fn prompts_that_can_never_run_are_refused_with_numbers() {
    let config = EngineConfig { num_blocks: 2, ..config() };
    let mut engine = engine(&config);
    let mut check = |prompt: Vec<u32>, expect: &str| {
        let error = engine.submit(request(prompt, &greedy(1), &config)).expect_err(expect);
        assert_eq!(error.to_string(), expect);
    };
    check(vec![], "the prompt must hold at least one token; given: none");
    check(vec![1, 32], "the prompt must hold token ids between 0 and 31; given: 32");
    check(
        vec![1; 128],
        "the prompt must leave room for a token within max_model_len: at most 127 tokens; given: 128",
    );
    check(
        vec![1; 33],
        "the prompt must fit the KV cache of 32 tokens (2 blocks of 16); given: 33 tokens",
    );
}

/// Blocks alone: two tokens, twelve blocks, everything in any order.
#[test]
fn a_hundred_thousand_random_cache_calls() {
    for keep in [true, false] {
        let (mut rng, mut cache) = (Rng(u64::from(keep)), KvCache::new(12, keep));
        let mut live: Vec<(Vec<u32>, usize, BlockTable)> = Vec::new();
        for step in 0..50_000 {
            match rng.below(10) {
                0..4 => {
                    let (ones, len) = (rng.below(3), 1 + rng.below(90));
                    let tokens: Vec<u32> = (0..len).map(|at| u32::from(at % 20 < ones)).collect();
                    let request = rng.below(3) as u64;
                    let (lookup, spare) = (rng.chance(80), rng.below(3));
                    let wanted = Allocation { tokens: &tokens, request, lookup, spare };
                    if let Some(table) = cache.allocate(&wanted) {
                        assert!(table.named_tokens() < tokens.len(), "the last is never found");
                        let computed = table.named_tokens();
                        live.push((tokens, computed, table));
                    }
                }
                4..8 if !live.is_empty() => {
                    let index = rng.below(live.len());
                    let (tokens, computed, table) = &mut live[index];
                    *computed += rng.below(tokens.len() - *computed + 1);
                    cache.commit(table, tokens, *computed);
                    let more = rng.below(40);
                    if cache.append(table, tokens.len() + more) {
                        tokens.extend((0..more).map(|_| rng.below(2) as u32));
                    }
                }
                8 if !live.is_empty() => {
                    let (_, _, table) = live.swap_remove(rng.below(live.len()));
                    cache.free(table);
                }
                _ if rng.chance(2) => cache.clear_prefix_cache(),
                _ => {}
            }
            if let Err(fault) = cache.check(live.iter().map(|(_, _, table)| table)) {
                panic!("step {step}, keep {keep}: {fault}");
            }
        }
    }
}

/// Requests over a two-token vocabulary, half of them sharing prompts, in a cache of few blocks:
/// submitted, aborted and finished at random. Books and outputs are checked at every step.
#[test]
fn a_hundred_thousand_random_steps() {
    let (mut preemptions, mut hits) = (0, 0);
    for seed in 0..10 {
        let mut rng = Rng(seed << 32);
        let config = EngineConfig {
            max_model_len: 40 + rng.below(80),
            max_num_seqs: 1 + rng.below(12),
            max_num_batched_tokens: [1, 3, 17, 64, 2048][seed as usize % 5],
            num_blocks: 1 + rng.below(16),
            enable_prefix_caching: seed % 3 != 0,
            vocab_size: 2,
            ..config()
        };
        let stats = random_steps(&config, &mut rng, 10_000);
        preemptions += stats.preemptions;
        hits += stats.prefix_cache_hits;
    }
    assert!(preemptions > 1000 && hits > 1000, "{preemptions} preemptions, {hits} hits");
}

fn random_steps(config: &EngineConfig, rng: &mut Rng, steps: usize) -> Stats {
    let mut engine = engine(config);
    let mut open: BTreeMap<RequestId, (Request, SamplingOptions)> = BTreeMap::new();
    let mut outputs = Outputs::new();
    let mut step = 0;
    while step < steps || engine.has_work() {
        step += 1;
        if step < steps && open.len() < 12 && rng.chance(30) {
            let (options, prompt) = random_request(rng, config);
            let given = request(prompt, &options, config);
            if let Ok(id) = engine.submit(given.clone()) {
                open.insert(id, (given, options));
            }
        }
        if rng.chance(2) && !open.is_empty() {
            let id = *open.keys().nth(rng.below(open.len())).expect("in range");
            engine.abort(id, rng.chance(50).then(|| rng.below(4) as u32));
        }
        if rng.chance(1) && rng.chance(20) {
            engine.clear_prefix_cache();
        }
        collect(&mut outputs, engine.step());
        engine.check().expect("sound");
        open.retain(|&id, (request, options)| {
            let mut samples =
                (0..options.n as u32).map(|sample| SequenceId { request: id, sample });
            !samples.all(|id| is_over(&outputs, request, options, id, config))
        });
        if open.is_empty() {
            outputs.clear();
        }
        assert!(step < 20 * steps, "no end in sight");
    }
    let stats = engine.stats();
    assert!(open.is_empty(), "all ended");
    assert_eq!(
        (stats.kv_blocks_used, stats.num_requests_running, stats.num_requests_waiting),
        (0, 0, 0)
    );
    stats
}

/// Whether a sample has ended; if so, its output must be what the sampler alone gives.
fn is_over(
    outputs: &Outputs,
    request: &Request,
    options: &SamplingOptions,
    id: SequenceId,
    config: &EngineConfig,
) -> bool {
    let Some(output) = outputs.get(&id).filter(|output| output.finish.is_some()) else {
        return false;
    };
    let expect = reference(request, options, id, config);
    if output.finish.as_ref().is_some_and(|finish| finish.0 == "abort") {
        assert_eq!(output.tokens, expect.tokens[..output.tokens.len()], "{id:?}");
    } else {
        assert_eq!(*output, expect, "{id:?}");
    }
    true
}

fn random_request(rng: &mut Rng, config: &EngineConfig) -> (SamplingOptions, Vec<u32>) {
    let options = SamplingOptions {
        n: if rng.chance(20) { 2 + rng.below(3) as i64 } else { 1 },
        temperature: if rng.chance(30) { 0.0 } else { 1.0 },
        max_tokens: 1 + rng.below(40) as i64,
        stop_token_ids: if rng.chance(20) { vec![1] } else { Vec::new() },
        repetition_penalty: if rng.chance(20) { 1.3 } else { 1.0 },
        ..SamplingOptions::default()
    };
    let len = 1 + rng.below(config.max_model_len - 1);
    let ones = rng.below(3);
    let shared = if rng.chance(60) { len } else { len / 2 };
    let token = |at| if at < shared { u32::from(at % 20 < ones) } else { rng.below(2) as u32 };
    (options, (0..len).map(token).collect())
}
