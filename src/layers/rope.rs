//! Cosine and sine tables of the rotary embedding, with the frequency scalings of the field.

use std::f64::consts::PI;

use candle_core::Tensor;

use crate::backend::Backend;
use crate::error::Result;
use crate::spec::{RopeScaling, RopeSpec};

/// Cosines and sines `[max_positions, head_dim / 2]` in f32.
///
/// Frequencies and angles are rounded to f32 before the cosine, as transformers computes them.
pub fn rope_tables(
    rope: &RopeSpec,
    head_dim: usize,
    max_positions: usize,
    backend: &Backend,
) -> Result<(Tensor, Tensor)> {
    let frequencies = inverse_frequencies(rope, head_dim);
    let factor = match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
        _ => 1.0,
    };
    let size = max_positions * frequencies.len();
    let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
    for position in 0..max_positions {
        for &frequency in &frequencies {
            let (s, c) = (position as f32 * frequency).sin_cos();
            cos.push(c * factor);
            sin.push(s * factor);
        }
    }
    let shape = [max_positions, frequencies.len()];
    Ok((backend.floats(cos, &shape)?, backend.floats(sin, &shape)?))
}

/// Radians per position of each of the `head_dim / 2` rotated pairs.
#[must_use]
pub fn inverse_frequencies(rope: &RopeSpec, head_dim: usize) -> Vec<f32> {
    let dim = head_dim as f64;
    let theta = match rope.scaling {
        RopeScaling::Ntk { factor } => rope.theta * factor.powf(dim / (dim - 2.0)),
        _ => rope.theta,
    };
    let scale = |pair: usize, frequency: f64| match &rope.scaling {
        RopeScaling::None | RopeScaling::Ntk { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::PerFrequency { factors } => frequency / f64::from(factors[pair]),
        scaling @ RopeScaling::Llama3 { .. } => llama3(scaling, frequency),
        scaling @ RopeScaling::Yarn { .. } => yarn(scaling, frequency, pair, dim, theta),
    };
    (0..head_dim / 2).map(|pair| scale(pair, theta.powf(-2.0 * pair as f64 / dim)) as f32).collect()
}

/// Long wavelengths are divided by `factor`, short ones kept, those between interpolated.
fn llama3(scaling: &RopeScaling, frequency: f64) -> f64 {
    let &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } =
        scaling
    else {
        return frequency;
    };
    let rotations = original_max_positions as f64 * frequency / (2.0 * PI);
    let kept =
        ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
    kept * frequency + (1.0 - kept) * frequency / factor
}

/// YaRN's "NTK by parts" (arXiv 2309.00071, section 3.2) with the bounds of its public code.
fn yarn(scaling: &RopeScaling, frequency: f64, pair: usize, dim: f64, theta: f64) -> f64 {
    let &RopeScaling::Yarn {
        factor, original_max_positions, beta_fast, beta_slow, truncate, ..
    } = scaling
    else {
        return frequency;
    };
    // The pair index at which a frequency makes `rotations` turns over the original context.
    let correction = |rotations: f64| {
        dim * (original_max_positions as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low >= high {
        high = low + 0.001; // as in the public code: avoids a division by zero
    }
    let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
    frequency / factor * interpolated + frequency * (1.0 - interpolated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::RopePairing;

    fn frequencies(scaling: RopeScaling) -> Vec<f32> {
        let rope = RopeSpec { theta: 10_000.0, pairing: RopePairing::HalfSplit, scaling };
        inverse_frequencies(&rope, 8)
    }

    #[test]
    fn plain_series_is_geometric() {
        assert_eq!(frequencies(RopeScaling::None), [1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_divides_all() {
        assert_eq!(
            frequencies(RopeScaling::Linear { factor: 4.0 }),
            [0.25, 0.025, 0.0025, 0.00025]
        );
    }

    #[test]
    fn ntk_raises_the_base_and_keeps_the_first_frequency() {
        let scaled = frequencies(RopeScaling::Ntk { factor: 8.0 });
        assert!((scaled[0] - 1.0).abs() < 1e-7);
        // base' = base * 8^(8/6), so the last frequency is base'^(-6/8) = 0.001 / 8.
        assert!((scaled[3] - 0.001 / 8.0).abs() < 1e-9, "{scaled:?}");
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaled = frequencies(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 1024,
        });
        assert!((scaled[0] - 1.0).abs() < 1e-7);
        assert!((scaled[3] - 0.001 / 8.0).abs() < 1e-9, "{scaled:?}");
    }

    #[test]
    fn per_frequency_divides_each() {
        let factors = vec![1.0, 2.0, 4.0, 8.0];
        let scaled = frequencies(RopeScaling::PerFrequency { factors });
        assert_eq!(scaled, [1.0, 0.05, 0.0025, 0.000_125]);
    }
}
