//! [`Candidates`]: what is left of a row to draw from.

use super::select;
use crate::draw::Draw;
use crate::error::Result;
use crate::wide::Loops;

/// Where a nucleus is looked for first: what is less likely, relative to the likeliest, rarely belongs to it.
const NUCLEUS_BARS: [f32; 2] = [1.0 / 128.0, 1.0 / 16_384.0];

/// The ids that a token is drawn from. Scratch memory between two draws.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// Ascending; none where they are the whole vocabulary.
    ids: Vec<u32>,
    /// Probabilities over that of the likeliest.
    weights: Vec<f32>,
    places: Vec<u32>,
}

/// A draw from a row.
pub(super) struct DrawOne<'a> {
    pub(super) candidates: &'a mut Candidates,
    pub(super) logits: &'a [f32],
    pub(super) draw: &'a Draw,
}

impl Loops for DrawOne<'_> {
    type Output = Result<u32>;

    #[inline(always)]
    fn run(self) -> Result<u32> {
        let Self { candidates, logits, draw } = self;
        let max = super::row_max(logits)?;
        let Some(scale) = draw.inverse_temperature else {
            return Ok(select::position(logits, max) as u32);
        };
        candidates.weigh(logits, max, scale, draw.top_k);
        candidates.cut(draw.min_p, draw.top_p);
        let chosen = select::pick(&candidates.weights, draw.uniform);
        Ok(candidates.ids.get(chosen).map_or(chosen as u32, |&id| id))
    }
}

impl Candidates {
    /// Starts with the ids no less likely than the `top_k`-th.
    #[inline(always)]
    fn weigh(&mut self, logits: &[f32], max: f32, scale: f32, top_k: Option<usize>) {
        self.ids.clear();
        let Some(k) = top_k else { return select::weigh(logits, max, scale, &mut self.weights) };
        let last = select::top(logits, k)[k - 1];
        select::at_least(logits, logits[last as usize], &mut self.ids);
        let kept: Vec<f32> = self.ids.iter().map(|&id| logits[id as usize]).collect();
        select::weigh(&kept, max, scale, &mut self.weights);
    }

    /// Drops weights below `min_p`, then those outside the nucleus that holds `top_p` of the rest.
    #[inline(always)]
    fn cut(&mut self, min_p: f32, top_p: f64) {
        let target = (top_p < 1.0).then(|| top_p * select::mass_from(&self.weights, min_p));
        let mut bar = min_p;
        if let Some(target) = target {
            for nearer in NUCLEUS_BARS {
                if nearer > min_p && select::mass_from(&self.weights, nearer) >= target {
                    bar = nearer;
                    break;
                }
            }
        }
        if bar > 0.0 {
            self.keep_from(bar);
        }
        if let Some(target) = target {
            select::cut_to_nucleus(&mut self.weights, target);
        }
    }

    /// Drops weights below `bar`.
    #[inline(always)]
    fn keep_from(&mut self, bar: f32) {
        select::at_least(&self.weights, bar, &mut self.places);
        compact(&mut self.weights, &self.places);
        if self.ids.is_empty() {
            std::mem::swap(&mut self.ids, &mut self.places);
        } else {
            compact(&mut self.ids, &self.places);
        }
    }
}

/// Leaves the values at `places`, which ascend.
fn compact<T: Copy>(values: &mut Vec<T>, places: &[u32]) {
    for (to, &from) in places.iter().enumerate() {
        values[to] = values[from as usize];
    }
    values.truncate(places.len());
}
