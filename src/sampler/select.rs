//! Arithmetic over whole rows: maximum, weights, the largest n, the nucleus, the draw.
//!
//! Nothing here sorts a vocabulary. Loops over rows run in fixed lanes, so they vectorise and every
//! sum has one order.

use std::cmp::Ordering;

const LANES: usize = 16;
/// Values that are compared with a bar together.
const CHUNK: usize = 4 * LANES;
/// Entries that share a partial sum in [`pick`].
const BLOCK: usize = 256;
/// Weights in (0, 1] by exponent and three bits of mantissa: `bits >> SHIFT` is at most this less one.
const BUCKETS: usize = (0x3F80_0000 >> SHIFT) + 1;
const SHIFT: u32 = 20;

/// The largest value; `None` when one of them is NaN.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> Option<f32> {
    let (mut largest, mut nan) = ([f32::NEG_INFINITY; LANES], [0_u32; LANES]);
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let value = chunk[lane];
            largest[lane] = if value > largest[lane] { value } else { largest[lane] };
            nan[lane] |= u32::from(value.is_nan());
        }
    }
    let is_nan = nan.iter().any(|&bits| bits != 0) || rest.iter().any(|value| value.is_nan());
    let largest =
        largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    (!is_nan).then_some(largest)
}

/// The first index of a value of at least `wanted`, which must be there.
#[inline(always)]
pub(super) fn position(values: &[f32], wanted: f32) -> usize {
    let mut start = 0;
    // A branch per chunk rather than per value.
    while start < values.len() && !reaches(&values[start..values.len().min(start + CHUNK)], wanted)
    {
        start += CHUNK;
    }
    let within = values[start..].iter().position(|&value| value >= wanted);
    start + within.expect("the caller took `wanted` from `values`")
}

/// Whether any value is at least `bar`.
#[inline(always)]
fn reaches(chunk: &[f32], bar: f32) -> bool {
    let mut found = false;
    for &value in chunk {
        found |= value >= bar;
    }
    found
}

/// `exp(x)` for `x <= 0`, to about one unit in the last place; 0 where that is below 1e-38.
///
/// `2^n * e^r` with `|r| <= ln(2) / 2` and a Taylor polynomial whose remainder is below 1e-8. The
/// standard function is a call per element; this one vectorises.
// Inlined by force: it vectorises only inside its caller's loop.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // The two parts of ln 2: the first has few bits, so that its product with n is exact.
    const LN2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    let bounded = if x < -87.0 { -87.0 } else { x };
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * LN2[0] - n * LN2[1];
    let tail = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
    let e = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * tail))));
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let result = e * f32::from_bits(exponent << 23);
    if x < -87.0 { 0.0 } else { result }
}

/// The sum of `exp(value - max)`, in f64.
#[inline(always)]
pub(super) fn sum_exp(values: &[f32], max: f32) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        // In two loops, or the sums and the polynomial compete for registers.
        let mut weights = [0.0; LANES];
        for lane in 0..LANES {
            weights[lane] = exp(chunk[lane] - max);
        }
        for lane in 0..LANES {
            sums[lane] += f64::from(weights[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(exp(value - max))).sum::<f64>()
}

/// Replaces `weights` by `exp((value - max) * scale)`: the probabilities over that of the likeliest.
#[inline(always)]
pub(super) fn weigh(values: &[f32], max: f32, scale: f32, weights: &mut Vec<f32>) {
    weights.resize(values.len(), 0.0);
    for (weight, value) in weights.iter_mut().zip(values) {
        *weight = exp((value - max) * scale);
    }
}

/// Larger values first, equal ones by index.
fn order(values: &[f32], a: u32, b: u32) -> Ordering {
    let (x, y) = (values[a as usize], values[b as usize]);
    y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

/// The indices of the `n` largest values, in order; equal values by index.
///
/// Keeps a buffer of twice `n`; whenever it is full, the smaller half goes and the smallest that
/// stays becomes the bar for what comes after. Linear in the row whatever its order.
#[inline(always)]
pub(super) fn top(values: &[f32], n: usize) -> Vec<u32> {
    let n = n.min(values.len());
    if n == 0 {
        return Vec::new();
    }
    let mut top = Top { values, n, kept: Vec::with_capacity(values.len().min(2 * n)), bar: None };
    for (chunk, start) in values.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        if top.bar.is_none_or(|bar| reaches(chunk, bar)) {
            top.see(chunk, start);
        }
    }
    top.cut();
    top.kept.sort_unstable_by(|&a, &b| order(values, a, b));
    top.kept
}

/// What [`top`] keeps on its way.
struct Top<'a> {
    values: &'a [f32],
    n: usize,
    kept: Vec<u32>,
    bar: Option<f32>,
}

impl Top<'_> {
    fn see(&mut self, chunk: &[f32], start: u32) {
        for (index, &value) in (start..).zip(chunk) {
            // A later value that only equals the bar loses to the earlier index.
            if self.bar.is_none_or(|bar| value > bar) {
                self.kept.push(index);
                if self.kept.len() == (2 * self.n).max(CHUNK) {
                    self.cut();
                    self.bar = Some(self.values[self.kept[self.n - 1] as usize]);
                }
            }
        }
    }

    /// Leaves the `n` largest, the smallest of them last.
    fn cut(&mut self) {
        if self.kept.len() > self.n {
            let values = self.values;
            self.kept.select_nth_unstable_by(self.n - 1, |&a, &b| order(values, a, b));
            self.kept.truncate(self.n);
        }
    }
}

/// Replaces `indices` by those of all values of at least `bar`, ascending.
#[inline(always)]
pub(super) fn at_least(values: &[f32], bar: f32, indices: &mut Vec<u32>) {
    indices.clear();
    for (chunk, start) in values.chunks(CHUNK).zip((0_u32..).step_by(CHUNK)) {
        if reaches(chunk, bar) {
            indices
                .extend((start..).zip(chunk).filter(|(_, v)| **v >= bar).map(|(index, _)| index));
        }
    }
}

/// How many values are larger than `bar`.
#[inline(always)]
pub(super) fn count_above(values: &[f32], bar: f32) -> u32 {
    values.iter().map(|&value| u32::from(value > bar)).sum()
}

/// The sum of the weights of at least `bar`.
#[inline(always)]
pub(super) fn mass_from(weights: &[f32], bar: f32) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let weight = if chunk[lane] >= bar { chunk[lane] } else { 0.0 };
            sums[lane] += f64::from(weight);
        }
    }
    let rest = rest.iter().filter(|&&weight| weight >= bar).map(|&weight| f64::from(weight));
    sums.iter().sum::<f64>() + rest.sum::<f64>()
}

/// Zeroes all but the smallest set of largest weights whose sum reaches `target`; equal weights by
/// index. Weights are in [0, 1].
///
/// A histogram finds the narrow band of weights in which the set ends; only that band is put in order.
pub(super) fn cut_to_nucleus(weights: &mut [f32], target: f64) {
    let mass = histogram(weights);
    let mut above = 0.0;
    let border = (0..BUCKETS).rev().find(|&bucket| {
        let reached = above + mass[bucket] >= target;
        if !reached {
            above += mass[bucket];
        }
        reached
    });
    let Some(border) = border else { return };
    let mut band: Vec<u32> = (0_u32..)
        .zip(weights.iter())
        .filter(|(_, weight)| bucket_of(**weight) == border)
        .map(|(index, _)| index)
        .collect();
    let kept = shortest_head(weights, &mut band, target - above);
    let Some(&last) = kept.checked_sub(1).and_then(|last| band.get(last)) else { return };
    let bar = weights[last as usize];
    for &index in &band[kept..] {
        weights[index as usize] = 0.0;
    }
    for weight in weights {
        *weight = if *weight < bar { 0.0 } else { *weight };
    }
}

/// Rearranges the indices so that the fewest of the largest weights whose sum reaches `target` come first, the smallest of
/// them last, and returns how many they are: at least one, if there is any.
fn shortest_head(weights: &[f32], indices: &mut [u32], target: f64) -> usize {
    let (mut start, mut end, mut before) = (0, indices.len(), 0.0);
    // Halved until few are left to sort.
    while end - start > CHUNK {
        let middle = start.midpoint(end);
        indices[start..end].select_nth_unstable_by(middle - start, |&a, &b| order(weights, a, b));
        let mass: f64 =
            indices[start..middle].iter().map(|&i| f64::from(weights[i as usize])).sum();
        if before + mass >= target {
            end = middle;
        } else {
            before += mass;
            start = middle;
        }
    }
    indices[start..end].sort_unstable_by(|&a, &b| order(weights, a, b));
    while start < end && (before < target || start == 0) {
        before += f64::from(weights[indices[start] as usize]);
        start += 1;
    }
    start
}

/// The mass of each bucket.
fn histogram(weights: &[f32]) -> Vec<f64> {
    // Two tables, since neighbours often fall in one bucket and would wait for each other.
    let mut mass = vec![0.0_f64; 2 * BUCKETS];
    let (even, odd) = mass.split_at_mut(BUCKETS);
    let (pairs, rest) = weights.as_chunks::<2>();
    for &[first, second] in pairs {
        even[bucket_of(first)] += f64::from(first);
        odd[bucket_of(second)] += f64::from(second);
    }
    for &weight in rest {
        even[bucket_of(weight)] += f64::from(weight);
    }
    for (sum, other) in even.iter_mut().zip(odd) {
        *sum += *other;
    }
    mass.truncate(BUCKETS);
    mass
}

fn bucket_of(weight: f32) -> usize {
    ((weight.to_bits() >> SHIFT) as usize).min(BUCKETS - 1)
}

/// The index at which the running sum of the weights passes `u` times their total.
#[inline(always)]
pub(super) fn pick(weights: &[f32], u: f64) -> usize {
    let mut sums = Vec::with_capacity(weights.len().div_ceil(BLOCK));
    for block in weights.chunks(BLOCK) {
        sums.push(mass_from(block, 0.0));
    }
    let target = u * sums.iter().sum::<f64>();
    let (mut before, mut chosen) = (0.0, (0, 0.0));
    for (block, &sum) in sums.iter().enumerate() {
        if sum > 0.0 {
            chosen = (block, before);
        }
        before += sum;
        if target < before {
            break;
        }
    }
    let (block, mut running) = chosen;
    // Rounding may leave the target just past the end: then the last weight above 0 takes it.
    let mut last = block * BLOCK;
    for (index, &weight) in weights.iter().enumerate().skip(block * BLOCK).take(BLOCK) {
        if weight > 0.0 {
            last = index;
            running += f64::from(weight);
            if target < running {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for step in 0..=87_000 {
            let x = -(step as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}) is off by {error}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY), exp(-1e30)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn a_nan_anywhere_is_seen() {
        for at in 0..40 {
            let mut values = vec![1.0; 40];
            values[at] = f32::NAN;
            assert_eq!(max(&values), None);
            values[at] = 2.0;
            assert_eq!(max(&values), Some(2.0));
            assert_eq!(position(&values, 2.0), at);
        }
    }

    proptest! {
        #[test]
        fn top_is_the_head_of_a_stable_sort(values in prop::collection::vec(-3_i8..3, 1..300), n in 0_usize..310) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let mut sorted: Vec<u32> = (0..values.len() as u32).collect();
            sorted.sort_by(|&a, &b| order(&values, a, b));
            sorted.truncate(n);
            prop_assert_eq!(top(&values, n), sorted);
        }

        #[test]
        fn the_nucleus_is_the_shortest_head_that_reaches_p(
            levels in prop::collection::vec(0_u8..20, 1..900), p in 0.01_f64..1.0,
        ) {
            // Powers of two sum without rounding, so the border is exact on both sides.
            let weights: Vec<f32> = levels.iter().map(|&level| (-f32::from(level)).exp2()).collect();
            let mut sorted: Vec<u32> = (0..weights.len() as u32).collect();
            sorted.sort_by(|&a, &b| order(&weights, a, b));
            let target = p * weights.iter().map(|&w| f64::from(w)).sum::<f64>();
            let (mut expect, mut sum) = (vec![0.0; weights.len()], 0.0);
            for &index in &sorted {
                if sum < target {
                    expect[index as usize] = weights[index as usize];
                }
                sum += f64::from(weights[index as usize]);
            }
            let mut cut = weights.clone();
            cut_to_nucleus(&mut cut, target);
            prop_assert_eq!(cut, expect);
        }

        #[test]
        fn pick_inverts_the_running_sum(levels in prop::collection::vec(0_u8..9, 1..900), u in 0.0_f64..1.0) {
            let weights: Vec<f32> = levels.iter().map(|&level| if level == 0 { 0.0 } else { (-f32::from(level)).exp2() }).collect();
            prop_assume!(weights.iter().any(|&w| w > 0.0));
            let target = u * weights.iter().map(|&w| f64::from(w)).sum::<f64>();
            let mut running = 0.0;
            let expect = weights.iter().position(|&w| { running += f64::from(w); target < running });
            prop_assert_eq!(Some(pick(&weights, u)), expect);
        }
    }
}
