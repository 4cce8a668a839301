//! [`SamplingParams`]: how one request samples, checked once and trusted from then on.

use crate::error::{Error, Result};

/// Most samples of one request. Each is a sequence of its own; a request for millions is a mistake
/// or an attack (CVE-2026-34756).
pub const MAX_SAMPLES: i64 = 1024;

/// Temperatures below this are greedy: the division would leave one candidate anyway.
pub const GREEDY_BELOW: f64 = 1e-5;

/// What a caller asks for, unchecked: vLLM's fields and meanings.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Samples to draw, up to [`MAX_SAMPLES`].
    pub n: i64,
    /// Subtracted from the logit of every token that the output holds; in [-2, 2].
    pub presence_penalty: f64,
    /// Subtracted once per occurrence in the output (see `frequency_window`); in [-2, 2].
    pub frequency_penalty: f64,
    /// Divides the positive and multiplies the negative logits of tokens in prompt or output; above 0.
    pub repetition_penalty: f64,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the smallest set of likeliest tokens whose probabilities sum to this; in (0, 1].
    pub top_p: f64,
    /// Keeps the tokens no less likely than the k-th; 0 or -1 for all.
    pub top_k: i64,
    /// Keeps tokens of at least this fraction of the likeliest one's probability; in [0, 1].
    pub min_p: f64,
    /// Replays the same draws in any batch. `None` draws a seed from the engine's.
    pub seed: Option<u64>,
    /// Further ids that end the output; the one that did is the stop reason.
    pub stop_token_ids: Vec<i64>,
    /// End-of-text ids do not end the output.
    pub ignore_eos: bool,
    /// Longest output, in tokens; at least 1.
    pub max_tokens: i64,
    /// No end-of-text or stop id is drawn before this many tokens; at most `max_tokens`.
    pub min_tokens: i64,
    /// Log-probabilities of the sampled and of this many top tokens; -1 for the whole vocabulary.
    pub logprobs: Option<i64>,
    /// The same for every token of the prompt but the first.
    pub prompt_logprobs: Option<i64>,
    /// Added to the logits of ids; in [-100, 100].
    pub logit_bias: Vec<(i64, f64)>,
    /// Only these ids are drawn.
    pub allowed_token_ids: Option<Vec<i64>>,
    /// Sequences that the output never completes.
    pub bad_words: Vec<Vec<i64>>,
    /// How many of the prompt's last tokens `frequency_penalty` counts too (`AstrAI`'s `rep_window`).
    pub frequency_window: i64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            n: 1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            max_tokens: 256,
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            frequency_window: 0,
        }
    }
}

/// Sampling options that [`SamplingParams::new`] has checked.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    pub(crate) n: u32,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) repetition_penalty: f32,
    /// What logits are multiplied by; `None` is greedy.
    pub(crate) inverse_temperature: Option<f32>,
    pub(crate) top_p: f64,
    /// `None` for all.
    pub(crate) top_k: Option<usize>,
    pub(crate) min_p: f32,
    pub(crate) seed: Option<u64>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) allowed_token_ids: Option<Vec<u32>>,
    pub(crate) bad_words: Vec<Vec<u32>>,
    pub(crate) frequency_window: usize,
}

impl SamplingParams {
    /// Checks the options for a model of `vocab_size` ids. This is the only judge of them: what
    /// comes out is valid everywhere.
    pub fn new(options: &SamplingOptions, vocab_size: usize) -> Result<Self> {
        let o = options;
        let vocabulary = Vocabulary(vocab_size);
        let max_tokens = integer("max_tokens", o.max_tokens, 1, i64::MAX)?;
        let min_tokens = count("min_tokens", o.min_tokens)?;
        if min_tokens > max_tokens {
            return Err(Error::invalid(format!(
                "min_tokens must be at most max_tokens ({max_tokens}); given: {min_tokens}"
            )));
        }
        Ok(Self {
            n: integer("n", o.n, 1, MAX_SAMPLES)? as u32,
            presence_penalty: number("presence_penalty", o.presence_penalty, -2.0, 2.0)? as f32,
            frequency_penalty: number("frequency_penalty", o.frequency_penalty, -2.0, 2.0)? as f32,
            repetition_penalty: (above_zero("repetition_penalty", o.repetition_penalty, f64::MAX)?
                as f32)
                .clamp(f32::MIN_POSITIVE, f32::MAX),
            inverse_temperature: inverse_temperature(o.temperature)?,
            top_p: above_zero("top_p", o.top_p, 1.0)?,
            top_k: top_k(o.top_k, vocab_size)?,
            min_p: number("min_p", o.min_p, 0.0, 1.0)? as f32,
            seed: o.seed,
            stop_token_ids: vocabulary.ids("stop_token_ids", &o.stop_token_ids)?,
            ignore_eos: o.ignore_eos,
            max_tokens,
            min_tokens,
            logprobs: vocabulary.logprobs("logprobs", o.logprobs)?,
            prompt_logprobs: vocabulary.logprobs("prompt_logprobs", o.prompt_logprobs)?,
            logit_bias: vocabulary.biases(&o.logit_bias)?,
            allowed_token_ids: vocabulary.allowed(o.allowed_token_ids.as_deref())?,
            bad_words: vocabulary.bad_words(&o.bad_words)?,
            frequency_window: count("frequency_window", o.frequency_window)?,
        })
    }

    /// Samples to draw.
    #[must_use]
    pub fn num_samples(&self) -> u32 {
        self.n
    }

    /// Whether any penalty changes a logit.
    pub(super) fn penalises(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || (self.repetition_penalty - 1.0).abs() > 0.0
    }
}

/// The checks that need to know which ids there are.
struct Vocabulary(usize);

impl Vocabulary {
    fn id(&self, field: &str, id: i64) -> Result<u32> {
        if (0..self.0 as i64).contains(&id) {
            return Ok(id as u32);
        }
        Err(Error::invalid(format!(
            "{field} must hold token ids between 0 and {}; given: {id}",
            self.0 - 1
        )))
    }

    fn ids(&self, field: &str, ids: &[i64]) -> Result<Vec<u32>> {
        ids.iter().map(|&id| self.id(field, id)).collect()
    }

    fn logprobs(&self, field: &str, given: Option<i64>) -> Result<Option<usize>> {
        match given {
            None => Ok(None),
            Some(-1) => Ok(Some(self.0)),
            Some(top) if (0..=self.0 as i64).contains(&top) => Ok(Some(top as usize)),
            Some(top) => Err(Error::invalid(format!(
                "{field} must be between 0 and {} (the vocabulary), or -1 for all of it; given: {top}",
                self.0
            ))),
        }
    }

    fn biases(&self, given: &[(i64, f64)]) -> Result<Vec<(u32, f32)>> {
        let bias = |&(id, bias): &(i64, f64)| {
            let id = self.id("logit_bias", id)?;
            Ok((id, number(&format!("logit_bias[{id}]"), bias, -100.0, 100.0)? as f32))
        };
        given.iter().map(bias).collect()
    }

    fn allowed(&self, given: Option<&[i64]>) -> Result<Option<Vec<u32>>> {
        if given.is_some_and(<[i64]>::is_empty) {
            return Err(Error::invalid("allowed_token_ids must hold at least one id; given: []"));
        }
        given.map(|ids| self.ids("allowed_token_ids", ids)).transpose()
    }

    fn bad_words(&self, given: &[Vec<i64>]) -> Result<Vec<Vec<u32>>> {
        if given.iter().any(Vec::is_empty) {
            return Err(Error::invalid(
                "bad_words must hold sequences of at least one id; given: []",
            ));
        }
        given.iter().map(|word| self.ids("bad_words", word)).collect()
    }
}

fn integer(field: &str, given: i64, least: i64, most: i64) -> Result<usize> {
    if (least..=most).contains(&given) {
        return Ok(given as usize);
    }
    let allowed = if most == i64::MAX {
        format!("at least {least}")
    } else {
        format!("between {least} and {most}")
    };
    Err(Error::invalid(format!("{field} must be {allowed}; given: {given}")))
}

fn count(field: &str, given: i64) -> Result<usize> {
    integer(field, given, 0, i64::MAX)
}

fn number(field: &str, given: f64, least: f64, most: f64) -> Result<f64> {
    if (least..=most).contains(&given) {
        return Ok(given);
    }
    Err(Error::invalid(format!("{field} must be between {least} and {most}; given: {given}")))
}

fn above_zero(field: &str, given: f64, most: f64) -> Result<f64> {
    if given > 0.0 && given <= most {
        return Ok(given);
    }
    let limit = if most < f64::MAX { format!(" and at most {most}") } else { " and finite".into() };
    Err(Error::invalid(format!("{field} must be above 0{limit}; given: {given}")))
}

fn inverse_temperature(given: f64) -> Result<Option<f32>> {
    if !given.is_finite() || given < 0.0 {
        return Err(Error::invalid(format!(
            "temperature must be a finite number of at least 0; given: {given}"
        )));
    }
    // Never 0: that times minus infinity, a forbidden id, would be NaN.
    Ok((given >= GREEDY_BELOW).then(|| ((1.0 / given) as f32).max(f32::MIN_POSITIVE)))
}

fn top_k(given: i64, vocab_size: usize) -> Result<Option<usize>> {
    match given {
        -1 | 0 => Ok(None),
        1.. => Ok(Some(given as usize).filter(|&k| k < vocab_size)),
        _ => Err(Error::invalid(format!(
            "top_k must be at least 1, or 0 or -1 for all ids; given: {given}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(set: impl FnOnce(&mut SamplingOptions), expect: &str) {
        let mut options = SamplingOptions::default();
        set(&mut options);
        let error = SamplingParams::new(&options, 100).expect_err(expect);
        assert_eq!(error.to_string(), expect);
    }

    #[test]
    fn counts_are_refused_with_field_given_and_allowed() {
        check(|o| o.n = 0, "n must be between 1 and 1024; given: 0");
        check(|o| o.n = 1_000_000_000, "n must be between 1 and 1024; given: 1000000000");
        check(|o| o.max_tokens = 0, "max_tokens must be at least 1; given: 0");
        check(|o| o.min_tokens = -1, "min_tokens must be at least 0; given: -1");
        check(|o| o.min_tokens = 257, "min_tokens must be at most max_tokens (256); given: 257");
        check(|o| o.top_k = -2, "top_k must be at least 1, or 0 or -1 for all ids; given: -2");
        check(|o| o.frequency_window = -1, "frequency_window must be at least 0; given: -1");
        let all = "must be between 0 and 100 (the vocabulary), or -1 for all of it";
        check(|o| o.logprobs = Some(-2), &format!("logprobs {all}; given: -2"));
        check(|o| o.logprobs = Some(101), &format!("logprobs {all}; given: 101"));
        check(|o| o.prompt_logprobs = Some(101), &format!("prompt_logprobs {all}; given: 101"));
    }

    #[test]
    fn numbers_are_refused_with_field_given_and_allowed() {
        let range = "must be between -2 and 2";
        check(|o| o.presence_penalty = 2.1, &format!("presence_penalty {range}; given: 2.1"));
        check(|o| o.presence_penalty = f64::NAN, &format!("presence_penalty {range}; given: NaN"));
        check(|o| o.frequency_penalty = -3.0, &format!("frequency_penalty {range}; given: -3"));
        let above = "must be above 0 and finite";
        check(|o| o.repetition_penalty = 0.0, &format!("repetition_penalty {above}; given: 0"));
        check(
            |o| o.repetition_penalty = f64::INFINITY,
            &format!("repetition_penalty {above}; given: inf"),
        );
        let finite = "must be a finite number of at least 0";
        check(|o| o.temperature = -0.1, &format!("temperature {finite}; given: -0.1"));
        check(|o| o.temperature = f64::NAN, &format!("temperature {finite}; given: NaN"));
        check(|o| o.temperature = f64::INFINITY, &format!("temperature {finite}; given: inf"));
        check(|o| o.top_p = 0.0, "top_p must be above 0 and at most 1; given: 0");
        check(|o| o.top_p = 1.5, "top_p must be above 0 and at most 1; given: 1.5");
        check(|o| o.top_p = f64::NAN, "top_p must be above 0 and at most 1; given: NaN");
        check(|o| o.min_p = -0.5, "min_p must be between 0 and 1; given: -0.5");
        check(|o| o.min_p = 1.5, "min_p must be between 0 and 1; given: 1.5");
        check(
            |o| o.logit_bias = vec![(3, 101.0)],
            "logit_bias[3] must be between -100 and 100; given: 101",
        );
    }

    #[test]
    fn ids_are_refused_with_field_given_and_allowed() {
        let range = "must hold token ids between 0 and 99";
        check(|o| o.stop_token_ids = vec![1, -1], &format!("stop_token_ids {range}; given: -1"));
        check(|o| o.logit_bias = vec![(100, 0.0)], &format!("logit_bias {range}; given: 100"));
        check(
            |o| o.allowed_token_ids = Some(vec![100]),
            &format!("allowed_token_ids {range}; given: 100"),
        );
        check(|o| o.bad_words = vec![vec![1, 100]], &format!("bad_words {range}; given: 100"));
        check(
            |o| o.allowed_token_ids = Some(Vec::new()),
            "allowed_token_ids must hold at least one id; given: []",
        );
        check(
            |o| o.bad_words = vec![vec![1], Vec::new()],
            "bad_words must hold sequences of at least one id; given: []",
        );
    }

    #[test]
    fn values_at_the_borders_are_taken() {
        let options = SamplingOptions {
            n: MAX_SAMPLES,
            presence_penalty: -2.0,
            temperature: 1e300,
            top_p: f64::MIN_POSITIVE,
            top_k: i64::MAX,
            min_p: 1.0,
            max_tokens: i64::MAX,
            min_tokens: i64::MAX,
            logprobs: Some(-1),
            prompt_logprobs: Some(100),
            logit_bias: vec![(99, -100.0)],
            ..SamplingOptions::default()
        };
        let params = SamplingParams::new(&options, 100).expect("all allowed");
        assert_eq!(
            (params.top_k, params.logprobs, params.prompt_logprobs),
            (None, Some(100), Some(100))
        );
    }
}
