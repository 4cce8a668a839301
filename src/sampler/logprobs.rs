//! Log-probabilities of the tokens of a row of logits.

use super::select;
use crate::draw::{RowSummary, TokenLogprob};
use crate::error::Result;
use crate::wide::{Loops, widest};

/// The list of [`RowSummary::logprobs`] for `token` and the `top` likeliest ids.
pub fn token_logprobs(logits: &[f32], token: u32, top: usize) -> Result<Vec<TokenLogprob>> {
    Ok(widest(Summarise { logits, token, top })?.logprobs())
}

struct Summarise<'a> {
    logits: &'a [f32],
    token: u32,
    top: usize,
}

impl Loops for Summarise<'_> {
    type Output = Result<RowSummary>;

    #[inline(always)]
    fn run(self) -> Result<RowSummary> {
        let Self { logits, token, top } = self;
        let max = super::row_max(logits)?;
        let logit = logits[token as usize];
        Ok(RowSummary {
            token,
            logit,
            above: select::count_above(logits, logit),
            max,
            sum_exp: select::sum_exp(logits, max),
            top: select::top(logits, top).into_iter().map(|id| (id, logits[id as usize])).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids_and_ranks(logits: &[f32], token: u32, top: usize) -> Vec<(u32, u32)> {
        let list = token_logprobs(logits, token, top).expect("finite");
        list.iter().map(|entry| (entry.id, entry.rank)).collect()
    }

    #[test]
    fn the_token_comes_first_and_once() {
        let logits = [1.0, 3.0, 3.0, 2.0];
        assert_eq!(ids_and_ranks(&logits, 0, 0), [(0, 4)]);
        assert_eq!(ids_and_ranks(&logits, 0, 2), [(0, 4), (1, 1), (2, 1)]);
        assert_eq!(ids_and_ranks(&logits, 3, 4), [(3, 3), (1, 1), (2, 1), (0, 4)]);
    }

    #[test]
    fn values_are_natural_logs_of_the_softmax() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 7.0 - 5.0).collect();
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for entry in token_logprobs(&logits, 17, 1000).expect("finite") {
            let exact = f64::from(logits[entry.id as usize]) - sum.ln();
            assert!((f64::from(entry.logprob) - exact).abs() < 2e-6);
        }
    }

    #[test]
    fn impossible_ids_have_minus_infinity() {
        let list = token_logprobs(&[f32::NEG_INFINITY, 0.0], 0, 0).expect("one is possible");
        assert_eq!(list, [TokenLogprob { id: 0, logprob: f32::NEG_INFINITY, rank: 2 }]);
    }
}
