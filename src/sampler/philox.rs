//! Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
//! numbers: as easy as 1, 2, 3" (SC 2011). A draw is a function of its key and counter and of
//! nothing else, so it does not matter what else is drawn, or when.

/// The uniform number in [0, 1) of one sample at one position of its sequence.
#[must_use]
pub fn uniform(seed: u64, sample: u32, position: usize) -> f64 {
    let position = position as u64;
    let counter = [position as u32, (position >> 32) as u32, sample, 0];
    // The 53 bits that an f64 holds.
    (pair(philox4x32_10(counter, seed)) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

/// The seed of a request that brings none.
#[must_use]
pub fn derive_seed(base: u64, request: u64) -> u64 {
    // The last word differs from `uniform`'s: the two never share a counter.
    pair(philox4x32_10([request as u32, (request >> 32) as u32, 0, 1], base))
}

fn pair(words: [u32; 4]) -> u64 {
    u64::from(words[0]) << 32 | u64::from(words[1])
}

fn philox4x32_10(mut counter: [u32; 4], key: u64) -> [u32; 4] {
    let mut key = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let even = u64::from(counter[0]) * 0xD251_1F53;
        let odd = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (odd >> 32) as u32 ^ counter[1] ^ key[0],
            odd as u32,
            (even >> 32) as u32 ^ counter[3] ^ key[1],
            even as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with Random123.
    #[test]
    fn known_answers() {
        let check = |counter, key, expect| assert_eq!(philox4x32_10(counter, key), expect);
        check([0; 4], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            0x299f_31d0_a409_3822,
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn seed_sample_and_position_each_change_the_draw() {
        let draw = uniform(1, 0, 5);
        assert!((0.0..1.0).contains(&draw));
        for other in [uniform(2, 0, 5), uniform(1, 1, 5), uniform(1, 0, 6)] {
            assert!((draw - other).abs() > 0.0);
        }
    }
}
