//! The engine with a fake model: outputs do not depend on what else runs, and every end is an orderly one.

mod fake;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::Duration;

use astrai_rs::config::EngineConfig;
use astrai_rs::engine::thread::EngineHandle;
use astrai_rs::engine::{Engine, SequenceId};
use astrai_rs::error::{Error, ErrorKind, Result};
use astrai_rs::sampler::SamplingOptions;
use astrai_rs::step::Forward;
use fake::{Fake, Fault, Outputs, Rng, collect, config, engine, greedy, reference, request, run};

const FOREVER: Duration = Duration::from_mins(1);

/// A mixture over every field; each is set in some requests only.
fn random_options(rng: &mut Rng, vocab: usize) -> SamplingOptions {
    let mut o =
        SamplingOptions { max_tokens: 1 + rng.below(24) as i64, ..SamplingOptions::default() };
    let mut sometimes = |percent: usize, set: &mut dyn FnMut(&mut Rng)| {
        if rng.chance(percent) {
            set(rng);
        }
    };
    sometimes(15, &mut |rng| o.n = 2 + rng.below(3) as i64);
    sometimes(60, &mut |rng| o.temperature = [0.0, 0.3, 0.9, 1.8][rng.below(4)]);
    sometimes(30, &mut |rng| o.seed = Some(rng.below(1000) as u64));
    sometimes(30, &mut |rng| o.top_k = 1 + rng.below(vocab) as i64);
    sometimes(30, &mut |rng| o.top_p = rng.range(0.2, 0.99));
    sometimes(30, &mut |rng| o.min_p = rng.range(0.01, 0.3));
    sometimes(30, &mut |rng| o.presence_penalty = rng.range(-2.0, 2.0));
    sometimes(30, &mut |rng| o.frequency_penalty = rng.range(-2.0, 2.0));
    sometimes(30, &mut |rng| o.frequency_window = rng.below(64) as i64);
    sometimes(30, &mut |rng| o.repetition_penalty = rng.range(0.5, 1.9));
    sometimes(30, &mut |rng| o.stop_token_ids = rng.ids(2, vocab));
    sometimes(30, &mut |_| o.ignore_eos = true);
    sometimes(30, &mut |rng| o.logit_bias = vec![(rng.below(vocab) as i64, rng.range(-5.0, 5.0))]);
    sometimes(10, &mut |rng| {
        o.allowed_token_ids = Some([rng.ids(6, vocab), (0..6).collect()].concat());
    });
    sometimes(20, &mut |rng| o.bad_words = vec![rng.ids(1, vocab), rng.ids(2, vocab)]);
    sometimes(50, &mut |rng| o.logprobs = Some([-1, 0, 1, 5][rng.below(4)]));
    sometimes(15, &mut |rng| o.prompt_logprobs = Some([-1, 0, 2][rng.below(3)]));
    let most = o.max_tokens as usize + 1;
    sometimes(30, &mut |rng| o.min_tokens = rng.below(most) as i64);
    o
}

fn random_requests(count: usize) -> Vec<(Vec<u32>, SamplingOptions)> {
    let mut rng = Rng(42);
    let vocab = config().vocab_size;
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    let requests = (0..count).map(|_| {
        let mut prompt = Vec::new();
        if !prompts.is_empty() && rng.chance(60) {
            let other = &prompts[rng.below(prompts.len())];
            prompt.extend_from_slice(&other[..=rng.below(other.len())]);
        }
        prompt.extend((0..=rng.below(40)).map(|_| rng.below(vocab) as u32));
        prompt.truncate(90);
        prompts.push(prompt.clone());
        let options = random_options(&mut rng, vocab);
        // The seed of a request without one comes from its id, and that differs between the runs.
        let seed = options.seed.or(Some(prompts.len() as u64));
        (prompt, SamplingOptions { seed, ..options })
    });
    requests.collect()
}

#[test]
fn outputs_do_not_depend_on_batch_chunks_cache_or_preemption() {
    let requests = random_requests(300);
    let base = EngineConfig { eos_token_ids: vec![3, 4], ..config() };
    let alone = run_alone(&requests, &base);
    for ((name, config), draws) in
        variants(&base).into_iter().flat_map(|v| [(v.clone(), false), (v, true)])
    {
        let fake = if draws { Fake::drawing(&config) } else { Fake::new(&config) };
        let mut engine = Engine::new(fake, config.clone()).expect("valid");
        for (prompt, options) in &requests {
            engine.submit(request(prompt.clone(), options, &config)).expect("fits");
        }
        let outputs = run(&mut engine);
        assert_eq!(outputs.len(), alone.len());
        for (id, output) in &outputs {
            assert_eq!(output, &alone[id], "{name}: {id:?} differs");
        }
        assert!(engine.stats().preemptions > 0 || !name.contains("preemption"), "{name}");
        assert!(engine.stats().prefix_cache_hits > 0 || !name.contains("hits"), "{name}");
        assert_eq!(engine.stats().kv_blocks_used, 0);
    }
}

fn variants(base: &EngineConfig) -> Vec<(&'static str, EngineConfig)> {
    let small = |num_blocks| EngineConfig { num_blocks, ..base.clone() };
    let budget = |max_num_batched_tokens| EngineConfig { max_num_batched_tokens, ..base.clone() };
    vec![
        ("together", EngineConfig { enable_prefix_caching: false, ..base.clone() }),
        ("prefix hits", base.clone()),
        ("preemption", EngineConfig { enable_prefix_caching: false, ..small(20) }),
        ("preemption and prefix hits", small(14)),
        ("budget 1", budget(1)),
        ("budget 2", budget(2)),
        ("budget 7", budget(7)),
        ("little prefill", EngineConfig { prefill_beside_decode: 3, ..base.clone() }),
        ("budget 64", EngineConfig { max_num_seqs: 17, ..budget(64) }),
        ("small everything", EngineConfig { max_num_seqs: 5, num_blocks: 9, ..budget(33) }),
    ]
}

/// Each request in an engine of its own, and checked against the sampler without any engine.
fn run_alone(requests: &[(Vec<u32>, SamplingOptions)], base: &EngineConfig) -> Outputs {
    let mut outputs = Outputs::new();
    for (index, (prompt, options)) in requests.iter().enumerate() {
        let mut engine = engine(&EngineConfig { enable_prefix_caching: false, ..base.clone() });
        let given = request(prompt.clone(), options, base);
        engine.submit(given.clone()).expect("fits");
        for (id, output) in run(&mut engine) {
            let expect = reference(&given, options, id, base);
            assert_eq!((&output.tokens, &output.finish), (&expect.tokens, &expect.finish));
            outputs.insert(SequenceId { request: index as u64, ..id }, output);
        }
    }
    outputs
}

#[test]
fn a_device_that_draws_gets_steps_ahead() {
    let config = EngineConfig { eos_token_ids: vec![3, 4], ..config() };
    let requests = (0..20_u32).map(|id| {
        let options = SamplingOptions {
            max_tokens: 1 + i64::from(id),
            temperature: [0.0, 1.2][id as usize % 2],
            seed: Some(u64::from(id)),
            stop_token_ids: vec![7],
            logprobs: [None, Some(3)][id as usize / 2 % 2],
            ..SamplingOptions::default()
        };
        (vec![id; 1 + id as usize], options)
    });
    let requests: Vec<_> = requests.collect();
    let alone = run_alone(&requests, &config);
    let fake = Fake::drawing(&config);
    let num_ahead = fake.num_ahead.clone();
    let mut engine = Engine::new(fake, config.clone()).expect("valid");
    for (prompt, options) in &requests {
        engine.submit(request(prompt.clone(), options, &config)).expect("fits");
    }
    assert_eq!(run(&mut engine), alone);
    // All but the first; a last one may have been for nothing.
    let steps = engine.stats().steps as usize;
    assert!((steps - 1..=steps).contains(&num_ahead.load(Relaxed)), "{num_ahead:?} of {steps}");
}

#[test]
fn steps_ahead_survive_aborts_arrivals_and_ends() {
    let config = EngineConfig { eos_token_ids: vec![3, 4], num_blocks: 12, ..config() };
    let fake = Fake::drawing(&config);
    let num_ahead = fake.num_ahead.clone();
    let mut engine = Engine::new(fake, config.clone()).expect("valid");
    let (mut rng, mut outputs, mut given) = (Rng(5), Outputs::new(), Vec::new());
    while given.len() < 1500 || engine.has_work() {
        // Busy times and quiet ones.
        if given.len() < 1500 && rng.chance([30, 3][given.len() / 50 % 2]) {
            let options = SamplingOptions {
                max_tokens: 1 + rng.below(40) as i64,
                temperature: [0.0, 0.9][rng.below(2)],
                seed: Some(given.len() as u64),
                n: 1 + rng.below(3) as i64,
                ..SamplingOptions::default()
            };
            let prompt: Vec<u32> = (0..=rng.below(50)).map(|_| rng.below(4) as u32).collect();
            let asked = request(prompt, &options, &config);
            let id = engine.submit(asked.clone()).expect("fits");
            given.push((id, asked, options));
        }
        if rng.chance(3) && !given.is_empty() {
            let (id, ..) = given[given.len() - 1 - rng.below(given.len().min(6))];
            engine.abort(id, [None, Some(0)][rng.below(2)]);
        }
        if rng.chance(1) {
            engine.clear_prefix_cache();
        }
        collect(&mut outputs, engine.step());
        engine.check().expect("sound");
    }
    let counts = (num_ahead.load(Relaxed), engine.stats().preemptions);
    assert!(counts.0 > 500 && counts.1 > 50, "{counts:?}");
    assert_eq!(engine.stats().kv_blocks_used, 0);
    for (id, output) in &outputs {
        let (_, asked, options) = &given[id.request as usize];
        let expect = reference(asked, options, *id, &config);
        let finish = output.finish.as_ref().expect("over");
        if finish.0 == "abort" {
            assert!(expect.tokens.starts_with(&output.tokens), "{id:?}");
        } else {
            assert_eq!((&output.tokens, Some(finish)), (&expect.tokens, expect.finish.as_ref()));
        }
    }
}

#[test]
fn prompt_logprobs_tell_of_every_token_but_the_first() {
    let config = config();
    let options = SamplingOptions { prompt_logprobs: Some(2), ..greedy(2) };
    let prompt: Vec<u32> = (0..30).collect();
    let mut engine = engine(&config);
    for _ in 0..2 {
        engine.submit(request(prompt.clone(), &options, &config)).expect("fits");
    }
    for output in run(&mut engine).into_values() {
        let lists = output.prompt_logprobs.expect("asked for");
        assert_eq!((lists.len(), lists[0].is_none()), (30, true));
        for (position, list) in lists.iter().enumerate().skip(1) {
            let logits = fake::logits_after(&prompt[..position], config.vocab_size);
            let expect =
                astrai_rs::sampler::token_logprobs(&logits, prompt[position], 2).expect("finite");
            assert_eq!(list.as_ref(), Some(&expect));
        }
    }
}

#[test]
fn stop_ids_are_told_apart() {
    let base = config();
    let first = {
        let mut engine = engine(&base);
        engine.submit(request(vec![1, 2], &greedy(4), &base)).expect("fits");
        run(&mut engine).into_values().next().expect("one").tokens
    };
    let end = |eos: Vec<u32>, set: &dyn Fn(&mut SamplingOptions)| {
        let config = EngineConfig { eos_token_ids: eos, ..base.clone() };
        let mut options = greedy(4);
        set(&mut options);
        let mut engine = engine(&config);
        engine.submit(request(vec![1, 2], &options, &config)).expect("fits");
        let output = run(&mut engine).into_values().next().expect("one");
        let (name, detail) = output.finish.expect("over");
        (output.tokens.len(), name, detail)
    };
    let stop = first[1];
    let at = first.iter().position(|&token| token == stop).expect("there") + 1;
    assert_eq!(end(vec![], &|_| {}), (4, "length", String::new()));
    assert_eq!(end(vec![stop], &|_| {}), (at, "stop", String::new()));
    assert_eq!(end(vec![stop], &|o| o.ignore_eos = true), (4, "length", String::new()));
    let by_id = |o: &mut SamplingOptions| o.stop_token_ids = vec![i64::from(stop)];
    assert_eq!(end(vec![], &by_id), (at, "stop", stop.to_string()));
    assert_eq!(end(vec![stop], &by_id), (at, "stop", String::new()));
    assert_eq!(end(vec![stop], &|o| o.min_tokens = 4).1, "length");
}

#[test]
fn a_thousand_aborts_leave_nothing() {
    let config = EngineConfig { num_blocks: 40, ..config() };
    let (mut engine, mut rng, mut outputs) = (engine(&config), Rng(3), Outputs::new());
    for _ in 0..1000 {
        let len = 1 + rng.below(60);
        let options = SamplingOptions { n: 1 + rng.below(4) as i64, ..greedy(64) };
        let prompt = (0..len).map(|_| rng.below(4) as u32).collect();
        let id = engine.submit(request(prompt, &options, &config)).expect("fits");
        for _ in 0..rng.below(3) {
            collect(&mut outputs, engine.step());
        }
        if rng.chance(30) {
            engine.abort(id, Some(0));
            collect(&mut outputs, engine.step());
        }
        engine.abort(id, None);
        engine.abort(id, None);
        collect(&mut outputs, engine.take_events());
        engine.check().expect("sound");
    }
    let stats = engine.stats();
    assert_eq!(
        (stats.kv_blocks_used, stats.num_requests_running, stats.num_requests_waiting),
        (0, 0, 0)
    );
    assert!(!engine.has_work());
    assert!(outputs.values().all(|output| output.finish.is_some()));
}

#[test]
fn nan_fails_its_own_request_only() {
    nan_fails(Fake::new(&config()));
    nan_fails(Fake::drawing(&config()));
}

fn nan_fails(mut fake: Fake) {
    let config = config();
    fake.fault = Some((2, Fault::Nan));
    let mut engine = Engine::new(fake, config.clone()).expect("valid");
    for prompt in [vec![1; 20], vec![2; 20]] {
        engine.submit(request(prompt, &greedy(4), &config)).expect("fits");
    }
    let outputs: Vec<_> = run(&mut engine).into_values().collect();
    let expect = Some(("error", "the model's logits hold NaN or infinity".to_owned()));
    assert_eq!((outputs[0].tokens.len(), &outputs[0].finish), (1, &expect));
    assert_eq!(outputs[1].tokens.len(), 4);
    assert_eq!(engine.stats().kv_blocks_used, 0);
    engine.submit(request(vec![1; 20], &greedy(4), &config)).expect("still alive");
    assert_eq!(run(&mut engine).into_values().next().expect("one").tokens.len(), 4);
}

#[test]
fn nothing_left_to_sample_is_the_requests_own_fault() {
    let config = EngineConfig { eos_token_ids: vec![5], ..config() };
    let options = SamplingOptions { allowed_token_ids: Some(vec![5]), min_tokens: 1, ..greedy(4) };
    let mut engine = engine(&config);
    engine.submit(request(vec![1], &options, &config)).expect("fits");
    let output = run(&mut engine).into_values().next().expect("one");
    let (name, detail) = output.finish.expect("over");
    assert_eq!(name, "error");
    assert!(detail.starts_with("no token is left to sample"), "{detail}");
}

#[test]
fn a_failed_step_ends_all_requests_and_the_engine() {
    for (fault, kind, message) in [
        (Fault::Error, ErrorKind::Device, "the device is gone"),
        (Fault::Panic, ErrorKind::Bug, "the engine panicked: a broken invariant"),
    ] {
        let config = EngineConfig { max_num_seqs: 1, ..config() };
        let mut fake = Fake::new(&config);
        fake.fault = Some((2, fault));
        let mut engine = Engine::new(fake, config.clone()).expect("valid");
        let options = SamplingOptions { n: 2, ..greedy(4) };
        for _ in 0..2 {
            engine.submit(request(vec![1; 20], &options, &config)).expect("fits");
        }
        let outputs = run(&mut engine);
        assert_eq!(outputs.len(), 4, "running, waiting and held samples");
        for output in outputs.values() {
            assert_eq!(output.finish, Some(("error", message.to_owned())));
        }
        assert_eq!(engine.failure().map(Error::kind), Some(kind));
        let refused = engine.submit(request(vec![1], &greedy(1), &config)).expect_err("dead");
        assert_eq!((refused.kind(), refused.to_string().as_str()), (kind, message));
        assert_eq!(engine.stats().kv_blocks_used, 0);
    }
}

/// A handle on a fake that `change` has prepared.
fn start_with<F: Forward>(
    load: impl FnOnce() -> Result<(F, EngineConfig)> + Send + 'static,
) -> Result<EngineHandle> {
    EngineHandle::start(load, || Ok(()), || Ok(()))
}

fn start(config: &EngineConfig, change: impl FnOnce(&mut Fake) + Send + 'static) -> EngineHandle {
    let config = config.clone();
    start_with(move || {
        let mut fake = Fake::new(&config);
        change(&mut fake);
        Ok((fake, config))
    })
    .expect("loads")
}

/// Polls until `count` samples have ended.
fn finish(handle: &EngineHandle, count: usize) -> Outputs {
    let mut outputs = Outputs::new();
    while outputs.values().filter(|output| output.finish.is_some()).count() < count {
        let events = handle.poll(FOREVER).expect("open");
        assert!(!events.is_empty(), "timed out");
        collect(&mut outputs, events);
    }
    outputs
}

#[test]
fn the_thread_gives_what_the_engine_gives() {
    let config = config();
    let handle = Arc::new(start(&config, |_| {}));
    let submitters: Vec<_> = (0..8_u32)
        .map(|thread| {
            let (handle, config) = (handle.clone(), config.clone());
            std::thread::spawn(move || {
                let submit = |i| {
                    let prompt = vec![thread, i];
                    let given = request(prompt.clone(), &greedy(5), &config);
                    (handle.submit(given).expect("open"), prompt)
                };
                (0..20).map(submit).collect::<Vec<_>>()
            })
        })
        .collect();
    let prompts: Vec<_> = submitters.into_iter().flat_map(|t| t.join().expect("fine")).collect();
    let outputs = finish(&handle, 160);
    for (id, prompt) in prompts {
        let id = SequenceId { request: id, sample: 0 };
        let expect = reference(&request(prompt, &greedy(5), &config), &greedy(5), id, &config);
        assert_eq!(outputs[&id], expect);
    }
    let stats = handle.stats();
    assert_eq!((stats.generation_tokens_total, stats.prompt_tokens_total), (800, 320));
    assert!(stats.steps > 0 && stats.heartbeat_s <= stats.uptime_s);
    assert_eq!(stats.kv_blocks_total, 1024);
}

#[test]
fn metrics_are_in_order() {
    let config = config();
    let handle = start(&config, |_| {});
    handle.submit(request(vec![1; 40], &greedy(2), &config)).expect("open");
    finish(&handle, 1);
    handle.submit(request(vec![1; 40], &greedy(2), &config)).expect("open");
    let mut last = None;
    while last.is_none() {
        let events = handle.poll(FOREVER).expect("open");
        last = events.into_iter().find_map(|event| event.finish);
    }
    let metrics = last.expect("just found").metrics;
    let times = [
        Some(metrics.arrival_time),
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.finished_time,
    ];
    assert!(times.iter().all(Option::is_some) && times.is_sorted(), "{times:?}");
    assert_eq!((metrics.num_cached_tokens, metrics.num_preemptions), (32, 0));
}

#[test]
fn a_load_error_reaches_the_constructor() {
    let error = start_with::<Fake>(|| Err(Error::checkpoint("no such tensor"))).expect_err("told");
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Checkpoint, "no such tensor")
    );
    let error = start_with::<Fake>(|| panic!("a bad file")).expect_err("told");
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Bug, "the engine panicked: a bad file")
    );
    let bad = EngineConfig { max_num_seqs: 0, ..config() };
    let error = start_with(move || Ok((Fake::new(&bad), bad))).expect_err("told");
    assert_eq!(error.to_string(), "max_num_seqs must be at least 1; given: 0");
}

#[test]
fn a_wait_for_the_model_can_be_given_up() {
    let (done, wait) = mpsc::channel::<()>();
    let load = move || {
        wait.recv().expect_err("the test gives up first");
        let config = config();
        Ok((Fake::new(&config), config))
    };
    let given_up = EngineHandle::start(load, || Ok(()), || Err(Error::invalid("enough")));
    assert_eq!(given_up.expect_err("given up").to_string(), "enough");
    drop(done);
}

#[test]
fn closing_ends_live_requests_and_every_later_call() {
    let config =
        EngineConfig { max_model_len: 100_000, max_num_seqs: 4, num_blocks: 8000, ..config() };
    let handle = start(&config, |fake| fake.pause = Duration::from_millis(1));
    for _ in 0..6 {
        let options = SamplingOptions { n: 2, ..greedy(90_000) };
        handle.submit(request(vec![1; 20], &options, &config)).expect("open");
    }
    let mut outputs = Outputs::new();
    collect(&mut outputs, handle.poll(FOREVER).expect("open"));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| handle.close());
        }
    });
    handle.close();
    collect(&mut outputs, handle.poll(FOREVER).expect("the last events"));
    assert_eq!(outputs.len(), 12);
    for output in outputs.values() {
        assert_eq!(output.finish, Some(("error", "the engine is closed".to_owned())));
    }
    assert_eq!(handle.poll(FOREVER).expect_err("closed").kind(), ErrorKind::Shutdown);
    let refused = handle.submit(request(vec![1], &greedy(1), &config)).expect_err("closed");
    assert_eq!(refused.kind(), ErrorKind::Shutdown);
    assert_eq!(handle.clear_prefix_cache().expect_err("closed").kind(), ErrorKind::Shutdown);
    handle.abort(0, None);
    assert_eq!(handle.stats().num_requests_running, 0);
}

#[test]
fn every_request_submitted_while_closing_ends_or_is_refused() {
    for _ in 0..50 {
        let config = config();
        let handle = start(&config, |_| {});
        let accepted = std::thread::scope(|scope| {
            let submitter = scope.spawn(|| {
                let submit = |_| handle.submit(request(vec![1], &greedy(3), &config)).is_ok();
                (0..200).map(submit).filter(|&accepted| accepted).count()
            });
            handle.close();
            submitter.join().expect("fine")
        });
        let mut outputs = Outputs::new();
        while let Ok(events) = handle.poll(FOREVER) {
            collect(&mut outputs, events);
        }
        let ended = outputs.values().filter(|output| output.finish.is_some()).count();
        assert_eq!(ended, accepted);
    }
}

#[test]
fn a_panic_on_the_thread_never_hangs_a_caller() {
    let config = config();
    let handle = start(&config, |fake| fake.fault = Some((3, Fault::Panic)));
    handle.submit(request(vec![1], &greedy(9), &config)).expect("open");
    let outputs = finish(&handle, 1);
    let expect = Some(("error", "the engine panicked: a broken invariant".to_owned()));
    assert_eq!(outputs.values().next().expect("one").finish, expect);
    assert_eq!(handle.poll(FOREVER).expect_err("dead").kind(), ErrorKind::Bug);
    let refused = handle.submit(request(vec![1], &greedy(1), &config)).expect_err("dead");
    assert_eq!(refused.kind(), ErrorKind::Bug);
    assert_eq!(handle.closed().map(|error| error.kind()), Some(ErrorKind::Bug));
    handle.close();
}

#[test]
fn aborts_through_the_thread_free_everything() {
    let config = EngineConfig { num_blocks: 64, ..config() };
    let handle = start(&config, |_| {});
    let mut rng = Rng(9);
    for _ in 0..1000 {
        let prompt = (0..=rng.below(50)).map(|_| rng.below(3) as u32).collect();
        let id = handle.submit(request(prompt, &greedy(70), &config)).expect("open");
        handle.abort(id, None);
    }
    finish(&handle, 1000);
    handle.clear_prefix_cache().expect("open");
    let id = handle.submit(request(vec![1], &greedy(1), &config)).expect("open");
    assert!(finish(&handle, 1).contains_key(&SequenceId { request: id, sample: 0 }));
    let stats = handle.stats();
    assert_eq!(
        (stats.kv_blocks_used, stats.num_requests_running, stats.num_requests_waiting),
        (0, 0, 0)
    );
}

#[test]
fn poll_waits_for_its_time_and_stats_never_for_a_step() {
    let config = config();
    let (entered, inside) = mpsc::channel();
    let (release, blocked) = mpsc::channel::<()>();
    let handle = start_with({
        let config = config.clone();
        move || Ok((Stuck { entered, blocked, vocab_size: config.vocab_size }, config))
    })
    .expect("loads");
    assert_eq!(handle.poll(Duration::ZERO).expect("open").len(), 0);
    handle.submit(request(vec![1], &greedy(1), &config)).expect("open");
    inside.recv().expect("the step has begun");
    assert_eq!(
        (handle.stats().steps, handle.poll(Duration::from_millis(1)).expect("open").len()),
        (0, 0)
    );
    release.send(()).expect("it waits");
    finish(&handle, 1);
    assert_eq!(handle.stats().steps, 1);
}

/// A model whose step lasts until the test lets it go on.
struct Stuck {
    entered: mpsc::Sender<()>,
    blocked: mpsc::Receiver<()>,
    vocab_size: usize,
}

impl astrai_rs::step::Forward for Stuck {
    fn forward(
        &mut self,
        _: &astrai_rs::step::Step<'_>,
        _beat: &dyn Fn(),
    ) -> astrai_rs::error::Result<astrai_rs::step::Outcome> {
        self.entered.send(()).expect("the test waits");
        self.blocked.recv().expect("the test lets go");
        let vocab_size = self.vocab_size;
        let values = vec![0.0; vocab_size];
        let logits = astrai_rs::step::Logits { values, vocab_size, drawn: Vec::new() };
        Ok(astrai_rs::step::Outcome::Ready(logits))
    }
}
