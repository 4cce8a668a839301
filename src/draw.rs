//! [`Draw`]: what a device needs to draw a token by itself; [`Drawn`]: the token, and its log-probabilities
//! from a [`RowSummary`].

/// Most of the likeliest tokens that a device lists.
pub const MAX_DRAWN_LOGPROBS: usize = 64;

/// How a token is drawn where nothing changes its logits first: a row of logits and this give the token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// What logits are multiplied by; `None` takes the likeliest token.
    pub inverse_temperature: Option<f32>,
    /// Keeps the tokens no less likely than the k-th.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of likeliest tokens whose probabilities sum to this.
    pub top_p: f64,
    /// Keeps tokens of at least this fraction of the likeliest one's probability.
    pub min_p: f32,
    /// Where in the kept probabilities the token is; in [0, 1).
    pub uniform: f64,
    /// How many of the likeliest tokens to list the log-probabilities of, up to [`MAX_DRAWN_LOGPROBS`],
    /// beside the drawn one's; `None` lists nothing.
    pub logprobs: Option<usize>,
}

/// A token, with what [`RowSummary::logprobs`] lists.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Token id.
    pub token: u32,
    /// Where they are asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

/// One entry of a list of log-probabilities: natural logarithms of the softmax of the raw logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// One more than the number of likelier ids; equal ids share a rank.
    pub rank: u32,
}

/// What a row of logits says of one token and of the likeliest ones.
#[derive(Debug, Clone, PartialEq)]
pub struct RowSummary {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
    /// Ids with a larger logit.
    pub above: u32,
    /// The largest logit.
    pub max: f32,
    /// Σ exp(logit − max) over the row.
    pub sum_exp: f64,
    /// Ids and logits of the likeliest, in order; ties by id.
    pub top: Vec<(u32, f32)>,
}

impl RowSummary {
    /// The token first, then the likeliest other ids in order. It is listed only once, so the list has as
    /// many entries as `top`, or one more.
    #[must_use]
    pub fn logprobs(&self) -> Vec<TokenLogprob> {
        let log_sum = self.sum_exp.ln();
        let entry = |id, logit: f32, rank| TokenLogprob {
            id,
            logprob: (f64::from(logit) - f64::from(self.max) - log_sum) as f32,
            rank,
        };
        let mut list = vec![entry(self.token, self.logit, self.above + 1)];
        let (mut rank, mut previous) = (1, f32::INFINITY);
        for (place, &(id, logit)) in (1_u32..).zip(&self.top) {
            if logit < previous {
                (rank, previous) = (place, logit);
            }
            if id != self.token {
                list.push(entry(id, logit, rank));
            }
        }
        list
    }
}
