//! Log-probabilities: natural logarithms of the softmax of the raw logits.

use super::select;
use crate::error::Result;

/// One entry of a list of log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// One more than the number of likelier ids; equal ids share a rank.
    pub rank: u32,
}

/// `token` first, then the `top` likeliest other ids in order (ties by id).
///
/// If `token` is itself among the `top` likeliest it is listed only once, so the list has `top` or
/// `top + 1` entries.
pub fn token_logprobs(logits: &[f32], token: u32, top: usize) -> Result<Vec<TokenLogprob>> {
    let max = super::row_max(logits)?;
    let log_sum = select::sum_exp(logits, max).ln();
    let entry = |id: u32, rank: u32| TokenLogprob {
        id,
        logprob: (f64::from(logits[id as usize]) - f64::from(max) - log_sum) as f32,
        rank,
    };
    let mut list = vec![entry(token, select::count_above(logits, logits[token as usize]) + 1)];
    let (mut rank, mut previous) = (1, f32::INFINITY);
    for (place, id) in (1_u32..).zip(select::top(logits, top)) {
        let value = logits[id as usize];
        if value < previous {
            (rank, previous) = (place, value);
        }
        if id != token {
            list.push(entry(id, rank));
        }
    }
    Ok(list)
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
