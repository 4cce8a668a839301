//! Tokens drawn on the device, and their logprobs.

use astrai_rs::backend::Backend;
use astrai_rs::config::DType;
use astrai_rs::draw::{Draw, Drawn};
use astrai_rs::sampler::{
    Row, SampleState, Sampler, SamplingOptions, SamplingParams, TokenLogprob, token_logprobs,
};
use candle_core::Tensor;

use crate::backend_support::{Random, gpu};
use crate::residual;

const GREEDY: Draw = Draw {
    inverse_temperature: None,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.5,
    logprobs: None,
};

fn tokens_of(backend: &Backend, logits: &Tensor, draws: &[(u32, Draw)]) -> Vec<Option<u32>> {
    let drawn = backend.draw(logits, draws).unwrap().wait().unwrap().into_iter();
    drawn.map(|drawn| Some(drawn?.token)).collect()
}

/// Tokens of the device and of the sampler, for random rows and these options.
fn check_draws(random: &mut Random, backend: &Backend, vocab: usize, options: &SamplingOptions) {
    let params = SamplingParams::new(options, vocab).unwrap();
    let rows = 12;
    let mut logits: Vec<f32> = random.floats(rows * vocab).iter().map(|x| 12.0 * x).collect();
    for x in &mut logits[..6 * vocab] {
        *x = (2.0 * *x).round() / 2.0; // with many ties
    }
    let device = residual(backend, &logits, &[rows, vocab]);
    let (mut draws, mut want) = (Vec::new(), Vec::new());
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let mut state = SampleState::new(row as u64, 0);
        let tokens = [1, 2, 3];
        let row_of = Row { logits, tokens: &tokens, num_prompt: 2, params: &params, mask: None };
        draws.push((row as u32, row_of.draw(&state).expect("plain")));
        want.push(Some(Sampler::new(Vec::new()).sample(&row_of, &mut state).unwrap()));
    }
    let got = tokens_of(backend, &device, &draws);
    assert_eq!(got, want, "{vocab} ids, {options:?}");
    // In another batch the same.
    let some: Vec<_> = draws.iter().copied().step_by(5).rev().collect();
    let expect: Vec<_> = want.iter().copied().step_by(5).rev().collect();
    assert_eq!(tokens_of(backend, &device, &some), expect);
}

#[test]
fn draws_are_the_samplers() {
    let mut random = Random::new(12);
    let backend = gpu(DType::BFloat16);
    for vocab in [3, 40, 1000, 3000] {
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (1.0, 0, 1.0, 0.0),
            (4.0, 5, 1.0, 0.0),
            (1.5, 0, 0.7, 0.0),
            (2.0, 0, 1.0, 0.05),
            (3.0, 50, 0.9, 0.01),
            (9.0, 1, 0.5, 0.0),
            (0.3, 0, 1e-3, 1.0),
            (100.0, 2000, 0.999, 0.0),
        ] {
            let options =
                SamplingOptions { temperature, top_k, top_p, min_p, ..SamplingOptions::default() };
            check_draws(&mut random, &backend, vocab, &options);
        }
    }
}

#[test]
fn logprobs_are_the_samplers() {
    let mut random = Random::new(13);
    let backend = gpu(DType::BFloat16);
    for vocab in [3, 40, 1000, 3000] {
        let mut logits: Vec<f32> = random.floats(6 * vocab).iter().map(|x| 12.0 * x).collect();
        for x in &mut logits[..3 * vocab] {
            *x = (*x / 4.0).round(); // with many ties
        }
        let device = residual(&backend, &logits, &[6, vocab]);
        for tops in [[Some(0), None, Some(5)], [Some(1), Some(64), Some(vocab.min(20))]] {
            let draw = |row: usize| Draw {
                inverse_temperature: Some(0.1),
                top_k: None,
                top_p: 1.0,
                min_p: 0.0,
                uniform: row as f64 / 6.0,
                logprobs: tops[row % 3],
            };
            let draws: Vec<_> = (0..6).map(|row| (row as u32, draw(row))).collect();
            let drawn = backend.draw(&device, &draws).unwrap().wait().unwrap();
            let drawn = drawn.into_iter().map(Option::unwrap);
            for (row, Drawn { token, logprobs }) in drawn.enumerate() {
                let logits = &logits[row * vocab..][..vocab];
                let want = tops[row % 3].map(|top| token_logprobs(logits, token, top).unwrap());
                let ids = |list: &[TokenLogprob]| {
                    list.iter().map(|entry| (entry.id, entry.rank)).collect::<Vec<_>>()
                };
                assert_eq!(logprobs.as_deref().map(ids), want.as_deref().map(ids));
                for (got, want) in logprobs.iter().flatten().zip(want.iter().flatten()) {
                    assert!((got.logprob - want.logprob).abs() < 2e-6, "{got:?} {want:?}");
                }
            }
        }
    }
}

#[test]
fn draws_that_nobody_waits_for_do_no_harm() {
    let backend = gpu(DType::Float32);
    let logits = residual(&backend, &[0.0, 1.0], &[1, 2]);
    drop(backend.draw(&logits, &[(0, GREEDY)]).unwrap());
    assert_eq!(tokens_of(&backend, &logits, &[(0, GREEDY)]), [Some(1)]);
}

#[test]
fn a_row_that_is_no_row_of_numbers_gives_no_token() {
    let backend = gpu(DType::Float32);
    let draw = Draw { logprobs: Some(1), ..GREEDY };
    let below = f32::NEG_INFINITY;
    for (row, want) in [
        ([1.0, 1.0, f32::NAN], None),
        ([1.0, 1.0, f32::INFINITY], None),
        ([below; 3], None),
        ([1.0, 1.0, 2.0], Some(2)),
        ([below, -3.0, below], Some(1)),
        ([-0.0, 0.0, -1.0], Some(0)), // equal
    ] {
        let logits = [[0.0, 1.0, -1.0], row].concat();
        let device = residual(&backend, &logits, &[2, 3]);
        let drawn = tokens_of(&backend, &device, &[(0, draw), (1, draw)]);
        assert_eq!(drawn, [Some(1), want], "{row:?}");
        let sampled = Sampler::new(Vec::new()).draw(&row, &draw).ok();
        assert_eq!(sampled, want, "{row:?}");
        let warm = Draw { inverse_temperature: Some(1.0), top_k: Some(2), top_p: 0.9, ..draw };
        let sampled = Sampler::new(Vec::new()).draw(&row, &warm).ok();
        assert_eq!(tokens_of(&backend, &device, &[(1, warm)]), [sampled], "{row:?}");
    }
}
