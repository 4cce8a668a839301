//! The softmax of attention: what each query sees of a tile, and weights of scores.
#![allow(unsafe_code)] // Scores are vectors.

use super::attention_tile::SCORES;
use super::lanes::{LANES, Lanes};
use crate::config::BLOCK_SIZE;

/// What one query sees of the pages `pages.0..pages.1` of a tile.
pub(super) struct Masks {
    pub(super) seen: (usize, usize),
    /// Position of the tile.
    pub(super) start: usize,
    pub(super) pages: (usize, usize),
}

impl Masks {
    /// Bit `i` is set when position `page + i` lies in `first..=last`.
    #[inline(always)]
    fn of(page: usize, first: usize, last: usize) -> u16 {
        let start = first.saturating_sub(page).min(LANES);
        let end = (last + 1).saturating_sub(page).min(LANES);
        (((1u32 << end) - 1) & !((1u32 << start) - 1)) as u16
    }

    #[inline(always)]
    fn page(&self, index: usize) -> u16 {
        Self::of(self.start + index * BLOCK_SIZE, self.seen.0, self.seen.1)
    }

    /// First position of the pages, and the first behind them.
    fn bounds(&self) -> (usize, usize) {
        (self.start + self.pages.0 * BLOCK_SIZE, self.start + self.pages.1 * BLOCK_SIZE)
    }

    /// Whether the query sees a position of the pages; that of an empty slot sees none.
    fn sees_any(&self) -> bool {
        let (start, end) = self.bounds();
        self.seen.0 < end && self.seen.1 >= start
    }

    fn sees_all(&self) -> bool {
        let (start, end) = self.bounds();
        self.seen.0 <= start && self.seen.1 + 1 >= end
    }

    /// The greatest score that the query sees; `ALL`: it sees all.
    #[inline(always)]
    fn greatest<L: Lanes, const ALL: bool>(&self, scores: &[f32; SCORES]) -> f32 {
        let none = L::splat(f32::NEG_INFINITY);
        let mut top = none;
        for page in self.pages.0..self.pages.1 {
            // SAFETY: a page has 16 scores.
            let score = unsafe { L::load(scores[page * LANES..][..LANES].as_ptr()) };
            top = top.max(if ALL { score } else { score.select(self.page(page), none) });
        }
        top.greatest()
    }

    /// Turns scores into weights, and adds them to `sums`, which fade before.
    #[inline(always)]
    fn weigh<L: Lanes, const ALL: bool>(
        &self,
        scores: &mut [f32; SCORES],
        sums: &mut [f32],
        (greatest, decay): (f32, f32),
    ) {
        let sums: &mut [f32] = &mut sums[..LANES];
        // SAFETY: all are 16 values.
        unsafe {
            let mut sum = L::load(sums.as_ptr()).mul(L::splat(decay));
            for page in self.pages.0..self.pages.1 {
                let scores = &mut scores[page * LANES..][..LANES];
                let mut weight = L::load(scores.as_ptr()).sub(L::splat(greatest)).exp();
                if !ALL {
                    weight = weight.select(self.page(page), L::splat(0.0));
                }
                weight.store(scores.as_mut_ptr());
                sum = sum.add(weight);
            }
            sum.store(sums.as_mut_ptr());
        }
    }
}

/// Turns the scores of a block's queries into weights and updates their greatest scores and sums;
/// returns the factors that the earlier outputs still have to be multiplied with.
#[inline(always)]
pub(super) fn softmax<L: Lanes, const M: usize>(
    scores: &mut [[f32; SCORES]; M],
    masks: &[Masks; M],
    greatest: &mut [f32],
    sums: &mut [f32],
) -> [f32; M] {
    let mut changes = [0.0; LANES];
    for slot in 0..M {
        if masks[slot].sees_any() {
            let top = if masks[slot].sees_all() {
                masks[slot].greatest::<L, true>(&scores[slot])
            } else {
                masks[slot].greatest::<L, false>(&scores[slot])
            };
            let before = greatest[slot];
            greatest[slot] = before.max(top);
            changes[slot] = before - greatest[slot];
        }
    }
    // SAFETY: 16 values.
    unsafe { L::load(changes.as_ptr()).exp().store(changes.as_mut_ptr()) };
    for slot in 0..M {
        let (scores, sums) = (&mut scores[slot], &mut sums[slot * LANES..]);
        let scale = (greatest[slot], changes[slot]);
        if !masks[slot].sees_any() {
            scores.fill(0.0);
        } else if masks[slot].sees_all() {
            masks[slot].weigh::<L, true>(scores, sums, scale);
        } else {
            masks[slot].weigh::<L, false>(scores, sums, scale);
        }
    }
    std::array::from_fn(|slot| changes[slot])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_select_what_a_row_sees() {
        assert_eq!(Masks::of(16, 0, 40), 0xffff);
        assert_eq!(Masks::of(16, 20, 22), 0b111_0000);
        assert_eq!(Masks::of(16, 0, 15), 0);
        assert_eq!(Masks::of(16, 32, 40), 0);
        assert_eq!(Masks::of(0, 0, 0), 1);
    }
}
