//! The sampler against a naive version in f64 that sorts everything, for every field.

use std::collections::{BTreeMap, BTreeSet};

use astrai_rs::sampler::philox::uniform;
use astrai_rs::sampler::{Row, SampleState, Sampler, SamplingOptions, SamplingParams};
use proptest::prelude::*;

const EOS: u32 = 1;

/// Logits after biases, masks and penalties, in f64; forbidden ids are minus infinity.
fn changed_logits(
    logits: &[f32],
    tokens: &[u32],
    num_prompt: usize,
    o: &SamplingOptions,
) -> Vec<f64> {
    let (output, mut logits) =
        (&tokens[num_prompt..], logits.iter().map(|&l| f64::from(l)).collect::<Vec<_>>());
    for &(id, bias) in &o.logit_bias {
        logits[id as usize] += bias;
    }
    let mut forbidden: BTreeSet<usize> = BTreeSet::new();
    if let Some(allowed) = &o.allowed_token_ids {
        forbidden.extend((0..logits.len()).filter(|&id| !allowed.contains(&(id as i64))));
    }
    if (output.len() as i64) < o.min_tokens {
        forbidden.insert(EOS as usize);
        forbidden.extend(o.stop_token_ids.iter().map(|&id| id as usize));
    }
    for word in &o.bad_words {
        let start: Vec<u32> = word[..word.len() - 1].iter().map(|&id| id as u32).collect();
        if output.len() >= start.len() && output[output.len() - start.len()..] == start[..] {
            forbidden.insert(word[word.len() - 1] as usize);
        }
    }
    let window = num_prompt.saturating_sub(o.frequency_window as usize);
    for (id, logit) in logits.iter_mut().enumerate() {
        let is_id = |token: &&u32| **token as usize == id;
        if tokens.iter().any(|token| token as &u32 == &(id as u32)) {
            *logit = if *logit > 0.0 {
                *logit / o.repetition_penalty
            } else {
                *logit * o.repetition_penalty
            };
        }
        *logit -= o.frequency_penalty * tokens[window..].iter().filter(is_id).count() as f64;
        *logit -=
            if output.iter().any(|token| *token as usize == id) { o.presence_penalty } else { 0.0 };
        if forbidden.contains(&id) {
            *logit = f64::NEG_INFINITY;
        }
    }
    logits
}

/// The tokens that `u` may draw, where thresholds may round either way by `slack`.
fn possible_draws(logits: &[f64], o: &SamplingOptions, u: f64, slack: f64) -> BTreeSet<u32> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut possible = BTreeSet::new();
    for slip in [-slack, 0.0, slack] {
        let mut weights: Vec<f64> =
            logits.iter().map(|&l| ((l - max) / o.temperature).exp()).collect();
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let bar = match o.top_k {
            k if k > 0 && (k as usize) < order.len() => logits[order[k as usize - 1]] - slack,
            _ => f64::NEG_INFINITY,
        };
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            if logit < bar || *weight < o.min_p * (1.0 + slip) {
                *weight = 0.0;
            }
        }
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        for &id in &order {
            if sum >= (o.top_p + slip) * total && o.top_p < 1.0 {
                weights[id] = 0.0;
            }
            sum += weights[id];
        }
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        for (id, &weight) in weights.iter().enumerate() {
            let (low, high) = (sum / total - slack, (sum + weight) / total + slack);
            if weight > 0.0 && (low..high).contains(&u) {
                possible.insert(id as u32);
            }
            sum += weight;
        }
    }
    possible
}

fn sample(logits: &[f32], tokens: &[u32], num_prompt: usize, options: &SamplingOptions) -> u32 {
    let params = SamplingParams::new(options, logits.len()).expect("valid");
    let mut state = SampleState::new(options.seed.unwrap_or(0), 0);
    let row = Row { logits, tokens, num_prompt, params: &params, mask: None };
    Sampler::new(vec![EOS]).sample(&row, &mut state).expect("something is left")
}

fn options(vocab: i64) -> impl Strategy<Value = SamplingOptions> {
    let id = 0..vocab;
    let penalties = (
        prop_oneof![Just(0.0), -2.0..2.0],
        prop_oneof![Just(0.0), -2.0..2.0],
        prop_oneof![Just(1.0), 0.2..3.0],
    );
    let cuts = (
        prop_oneof![Just(1.0), 0.05_f64..1.0],
        prop_oneof![Just(0), 1..vocab + 2],
        prop_oneof![Just(0.0), 0.001..0.9_f64],
        prop_oneof![Just(1.0), 0.05..3.0_f64],
    );
    let masks = (
        prop::collection::vec((id.clone(), -3.0..3.0_f64), 0..3),
        // Id 0 is neither an end nor forbidden by a word below: something is always left.
        prop::option::of(
            prop::collection::vec(id.clone(), 1..6).prop_map(|ids| [vec![0], ids].concat()),
        ),
        prop::collection::vec(prop::collection::vec(1..vocab, 1..3), 0..3),
        prop::collection::vec(1..vocab, 0..3),
        0..3_i64,
    );
    (penalties, cuts, masks, any::<u64>(), 0..6_i64).prop_map(
        |(
            (presence, frequency, repetition),
            (top_p, top_k, min_p, temperature),
            masks,
            seed,
            window,
        )| {
            let (logit_bias, allowed_token_ids, bad_words, stop_token_ids, min_tokens) = masks;
            SamplingOptions {
                presence_penalty: presence,
                frequency_penalty: frequency,
                repetition_penalty: repetition,
                temperature,
                top_p,
                top_k,
                min_p,
                seed: Some(seed),
                stop_token_ids,
                min_tokens,
                logit_bias,
                allowed_token_ids,
                bad_words,
                frequency_window: window,
                ..SamplingOptions::default()
            }
        },
    )
}

fn cases() -> impl Strategy<Value = (Vec<f32>, Vec<u32>, usize, SamplingOptions)> {
    (2_i64..40).prop_flat_map(|vocab| {
        // Quarters: ties are frequent and exact.
        let logits =
            prop::collection::vec((-24_i8..24).prop_map(|q| f32::from(q) / 4.0), vocab as usize);
        let tokens = prop::collection::vec(0..vocab as u32, 1..12);
        (logits, tokens, 1_usize..12, options(vocab)).prop_map(
            |(logits, tokens, prompt, options)| {
                let prompt = prompt.min(tokens.len());
                (logits, tokens, prompt, options)
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn draws_agree_with_the_naive_version((logits, tokens, num_prompt, options) in cases()) {
        let expect = changed_logits(&logits, &tokens, num_prompt, &options);
        let u = uniform(options.seed.expect("set"), 0, tokens.len());
        let possible = possible_draws(&expect, &options, u, 1e-5);
        let drawn = sample(&logits, &tokens, num_prompt, &options);
        prop_assert!(possible.contains(&drawn), "{drawn} is none of {possible:?}");
    }

    #[test]
    fn greedy_honours_masks_and_penalties((logits, tokens, num_prompt, options) in cases()) {
        let expect = changed_logits(&logits, &tokens, num_prompt, &options);
        let max = expect.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let drawn = sample(&logits, &tokens, num_prompt, &SamplingOptions { temperature: 0.0, ..options });
        prop_assert!(expect[drawn as usize] > max - 1e-4, "{drawn}: {expect:?}");
    }
}

#[test]
fn greedy_ties_go_to_the_lowest_id() {
    let greedy = SamplingOptions { temperature: 0.0, ..SamplingOptions::default() };
    for at in [0, 5, 63, 64, 65, 130] {
        let mut logits = vec![-1.0; 300];
        logits[at] = 2.0;
        logits[250] = 2.0;
        assert_eq!(sample(&logits, &[0], 1, &greedy), at as u32);
    }
}

#[test]
fn nuclei_of_any_width_agree_with_the_naive_version() {
    // Zipf's law: at a temperature of 0.5 one id holds most, at 9 all matter; ids are in no order of likelihood.
    let logits: Vec<f32> =
        (0..3000).map(|i| -1.6 * (((i * 7919) % 3001) as f32 / 3001.0 + 1e-4).ln()).collect();
    let wide: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    for temperature in [0.5, 1.0, 2.0, 9.0] {
        for (top_p, min_p, top_k) in [
            (0.5, 0.0, 0),
            (0.97, 0.0, 0),
            (0.9999, 0.0, 0),
            (0.999, 0.01, 0),
            (0.97, 0.001, 0),
            (0.9, 0.01, 700),
            (1.0, 0.05, 700),
        ] {
            for seed in 0..5 {
                let base = SamplingOptions {
                    temperature,
                    top_p,
                    seed: Some(seed),
                    ..SamplingOptions::default()
                };
                let options = SamplingOptions { min_p, top_k, ..base };
                let possible = possible_draws(&wide, &options, uniform(seed, 0, 1), 1e-6);
                let drawn = sample(&logits, &[0], 1, &options);
                assert!(possible.contains(&drawn), "{drawn} is none of {possible:?}: {options:?}");
            }
        }
    }
}

/// Chi-square of 20,000 draws at consecutive positions, the counter's fastest word.
fn chi_square(options: &SamplingOptions, logits: &[f32], probabilities: &BTreeMap<u32, f64>) {
    const DRAWS: usize = 20_000;
    let params = SamplingParams::new(options, logits.len()).expect("valid");
    let (mut sampler, mut state) =
        (Sampler::new(vec![]), SampleState::new(options.seed.unwrap_or(0), 0));
    let tokens = vec![0; DRAWS];
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for position in 1..=DRAWS {
        let row =
            Row { logits, tokens: &tokens[..position], num_prompt: 1, params: &params, mask: None };
        *counts.entry(sampler.sample(&row, &mut state).expect("possible")).or_default() += 1;
    }
    assert!(counts.keys().all(|id| probabilities.contains_key(id)), "only kept tokens: {counts:?}");
    let statistic: f64 = probabilities
        .iter()
        .map(|(id, p)| {
            let expected = p * DRAWS as f64;
            (*counts.get(id).unwrap_or(&0) as f64 - expected).powi(2) / expected
        })
        .sum();
    // Far in the tail: mean n - 1, six standard deviations.
    let freedom = (probabilities.len() - 1) as f64;
    assert!(
        statistic < freedom + 6.0 * (2.0 * freedom).sqrt(),
        "chi-square {statistic} of {freedom}"
    );
}

fn softmax(logits: &[f32], kept: &[u32], temperature: f64) -> BTreeMap<u32, f64> {
    let weight = |id: u32| (f64::from(logits[id as usize]) / temperature).exp();
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    kept.iter().map(|&id| (id, weight(id) / total)).collect()
}

#[test]
fn draws_have_the_right_frequencies() {
    let logits = [0.0, 1.0, 2.0, 3.0, 2.0, 1.5, -1.0, 0.5];
    let base = SamplingOptions { seed: Some(11), ..SamplingOptions::default() };
    let all: Vec<u32> = (0..8).collect();
    chi_square(&base, &logits, &softmax(&logits, &all, 1.0));
    let warm = SamplingOptions { temperature: 2.5, seed: Some(12), ..base.clone() };
    chi_square(&warm, &logits, &softmax(&logits, &all, 2.5));
    // The second largest logit is there twice; both stay.
    let top_k = SamplingOptions { top_k: 2, ..base.clone() };
    chi_square(&top_k, &logits, &softmax(&logits, &[2, 3, 4], 1.0));
    // exp(-1.5) = 0.223 of the likeliest is kept, exp(-2) = 0.135 is not.
    let min_p = SamplingOptions { min_p: 0.2, ..base.clone() };
    chi_square(&min_p, &logits, &softmax(&logits, &[2, 3, 4, 5], 1.0));
    // 0.457 + 0.168 reach 0.6; the other 0.168 has a higher id.
    let top_p = SamplingOptions { top_p: 0.6, ..base };
    chi_square(&top_p, &logits, &softmax(&logits, &[2, 3], 1.0));
}

#[test]
fn a_draw_depends_on_seed_sample_and_position_only() {
    let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 1009) as f32 / 300.0).collect();
    let options = SamplingOptions { seed: Some(5), ..SamplingOptions::default() };
    let params = SamplingParams::new(&options, logits.len()).expect("valid");
    let tokens = [0; 9];
    let row = Row { logits: &logits, tokens: &tokens, num_prompt: 4, params: &params, mask: None };
    let draw = |sampler: &mut Sampler, sample| {
        sampler.sample(&row, &mut SampleState::new(5, sample)).expect("possible")
    };
    let mut used = Sampler::new(vec![]);
    let draws: Vec<u32> = (0..50).map(|sample| draw(&mut used, sample)).collect();
    for sample in (0..50).rev() {
        assert_eq!(draw(&mut Sampler::new(vec![]), sample), draws[sample as usize]);
    }
    assert!(draws.iter().collect::<BTreeSet<_>>().len() > 40, "samples differ");
}

#[test]
fn nan_and_infinity_are_our_bug_not_a_panic() {
    let params = SamplingParams::new(&SamplingOptions::default(), 40).expect("valid");
    for (at, value) in [(0, f32::NAN), (39, f32::NAN), (20, f32::INFINITY)] {
        let mut logits = vec![0.0; 40];
        logits[at] = value;
        let row = Row { logits: &logits, tokens: &[0], num_prompt: 1, params: &params, mask: None };
        let error =
            Sampler::new(vec![]).sample(&row, &mut SampleState::new(0, 0)).expect_err("seen");
        assert_eq!(error.to_string(), "the model's logits hold NaN or infinity");
    }
}
