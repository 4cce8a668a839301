//! [`Draw`]: what a device needs to draw a token by itself.

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
}
