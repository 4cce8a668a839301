//! Whole models on the emulated GPU, or a real one without the feature `cuda-emulator`: reference logits
//! in every compute type, and the engine's promise that an output does not depend on what else runs.

#![cfg(feature = "cuda")]

mod fake;
mod golden_support;

use astrai_rs::backend::Backend;
#[cfg(feature = "cuda-emulator")]
use astrai_rs::backend::Heads;
#[cfg(feature = "cuda-emulator")]
use astrai_rs::backend::emulator;
use astrai_rs::checkpoint;
use astrai_rs::config::{DType, EngineConfig};
use astrai_rs::engine::Engine;
use astrai_rs::sampler::SamplingOptions;
use fake::{Outputs, Rng, request, run};
#[cfg(feature = "cuda-emulator")]
use golden_support::logits;
use golden_support::{Golden, fixture, logit_error, runner};

fn gpu(dtype: DType) -> Backend {
    Backend::cuda(0, dtype).expect("a GPU")
}

goldens!(|name| {
    golden_support::check(name, gpu(DType::Float32));
    check_logits(name, DType::BFloat16, 0.08);
});

fn check_logits(name: &str, dtype: DType, tolerance: f32) {
    let error = logit_error(&Golden::read(name), &mut runner(name, gpu(dtype)));
    assert!(error <= tolerance, "{name} {dtype:?}: |Δlogit| of {error:e}");
}

#[test]
fn float16_is_closer_than_bfloat16() {
    for name in ["llama", "mistral-swa", "astrai-qknorm-gated"] {
        check_logits(name, DType::Float16, 0.012);
    }
}

/// Of compute capability 8.0: kernels start when their turn has come.
#[cfg(feature = "cuda-emulator")]
#[test]
fn an_older_gpu_computes_the_same() {
    let golden = Golden::read("llama");
    let bits = |ordinal| -> Vec<u32> {
        let backend = Backend::cuda(ordinal, DType::BFloat16).expect("a GPU");
        let logits = logits(&golden, &mut runner("llama", backend));
        logits.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(1), bits(0));
}

fn random_requests(vocab: usize) -> Vec<(Vec<u32>, SamplingOptions)> {
    let mut rng = Rng(7);
    let mut begun: Vec<u32> = Vec::new();
    let requests = (0..16).map(|seed| {
        let mut prompt = if rng.chance(50) { begun.clone() } else { Vec::new() };
        prompt.extend((0..=rng.below(40)).map(|_| rng.below(vocab) as u32));
        begun.clone_from(&prompt);
        begun.truncate(30);
        let options = SamplingOptions {
            max_tokens: 1 + rng.below(8) as i64,
            temperature: [0.0, 0.8][rng.below(2)],
            seed: Some(seed),
            logprobs: [None, Some(2)][rng.below(2)],
            presence_penalty: [0.0, 0.5][rng.below(2)], // drawn by the device, and not
            ..SamplingOptions::default()
        };
        (prompt, options)
    });
    requests.collect()
}

fn outputs(
    name: &str,
    dtype: DType,
    config: &EngineConfig,
    requests: &[(Vec<u32>, SamplingOptions)],
    alone: bool,
) -> Outputs {
    let mut engine = Engine::new(runner(name, gpu(dtype)), config.clone()).expect("valid");
    let mut outputs = Outputs::new();
    for (prompt, options) in requests {
        engine.submit(request(prompt.clone(), options, config)).expect("fits");
        if alone {
            outputs.extend(run(&mut engine));
        }
    }
    outputs.extend(run(&mut engine));
    outputs
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn decode_steps_replay_graphs_and_take_no_memory() {
    let vocab_size = checkpoint::load(&fixture("llama")).expect("loads").spec.vocab_size;
    let config = EngineConfig { vocab_size, num_blocks: 32, ..fake::config() };
    let mut engine =
        Engine::new(runner("llama", gpu(DType::BFloat16)), config.clone()).expect("valid");
    let options = |max_tokens| SamplingOptions { max_tokens, ..SamplingOptions::default() };
    let round = |engine: &mut Engine<_>| {
        let count = |what| emulator::count(what);
        let before = [count(c"graph launches"), count(c"allocations")];
        for max_tokens in [5, 12, 12] {
            engine.submit(request(vec![1, 2, 3], &options(max_tokens), &config)).expect("fits");
        }
        run(engine);
        [count(c"graph launches") - before[0], count(c"allocations") - before[1]]
    };
    // Eleven decode steps: the first of each size, 3 and 2, is computed before its graph is captured.
    assert_eq!(round(&mut engine)[0], 9);
    round(&mut engine); // takes new memory in place of the logits that the graphs keep
    assert_eq!(round(&mut engine), [11, 0]);
}

/// Eleven rows take the graph of sixteen.
#[test]
fn rows_of_padding_change_nothing() {
    let vocab_size = checkpoint::load(&fixture("llama")).expect("loads").spec.vocab_size;
    let config = EngineConfig { vocab_size, num_blocks: 32, ..fake::config() };
    let requests: Vec<_> = (0..11).map(|id| (vec![40 - id, id + 1], fake::greedy(6))).collect();
    let alone = outputs("llama", DType::BFloat16, &config, &requests, true);
    assert_eq!(outputs("llama", DType::BFloat16, &config, &requests, false), alone);
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn graphs_keep_their_memory_when_there_is_no_more() {
    let vocab_size = checkpoint::load(&fixture("llama")).expect("loads").spec.vocab_size;
    let config = EngineConfig { vocab_size, num_blocks: 32, ..fake::config() };
    let backend = gpu(DType::BFloat16);
    let mut engine = Engine::new(runner("llama", backend.clone()), config.clone()).expect("valid");
    let options = SamplingOptions { max_tokens: 8, ..fake::greedy(8) };
    let mut round = || {
        engine.submit(request(vec![1, 2, 3], &options, &config)).expect("fits");
        run(&mut engine).into_values().next().expect("one")
    };
    let first = round();
    let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let error = backend.layer_kv(1 << 24, heads).expect_err("64 GiB").to_string();
    assert!(error.contains("bytes left"), "{error}");
    assert_eq!(round(), first);
}

#[test]
fn outputs_do_not_depend_on_batch_chunks_cache_or_preemption() {
    for (name, dtype) in [
        ("llama", DType::BFloat16),
        ("mistral-swa", DType::BFloat16),
        ("astrai-qknorm-gated", DType::Float16),
        ("qwen3", DType::Float32),
    ] {
        let vocab_size = checkpoint::load(&fixture(name)).expect("loads").spec.vocab_size;
        let base = EngineConfig { vocab_size, num_blocks: 32, ..fake::config() };
        let requests = random_requests(vocab_size);
        let no_hits = EngineConfig { enable_prefix_caching: false, ..base.clone() };
        let alone = outputs(name, dtype, &no_hits, &requests, true);
        for config in [
            base.clone(),
            EngineConfig { num_blocks: 10, ..base.clone() },
            EngineConfig { max_num_batched_tokens: 7, ..base.clone() },
            EngineConfig { prefill_beside_decode: 3, ..no_hits },
        ] {
            let together = outputs(name, dtype, &config, &requests, false);
            assert_eq!(together, alone, "{name} {dtype:?} {config:?}");
        }
    }
}
