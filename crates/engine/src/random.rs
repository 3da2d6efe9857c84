//! Counter-based random numbers: a pure function of (seed, position), so a request draws the same
//! ones whatever else is in the batch, after preemption and on any number of threads.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

/// A number in [0, 1) for drawing output token `position` of the request with this seed.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let [a, b, ..] = philox(words(position, 0), [seed as u32, (seed >> 32) as u32]);
    // 53 bits fill the mantissa of an f64.
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The 128-bit counter; `purpose` keeps later uses of a position's randomness apart from drawing.
fn words(position: u64, purpose: u64) -> [u32; 4] {
    [position as u32, (position >> 32) as u32, purpose as u32, (purpose >> 32) as u32]
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let left = u64::from(counter[0]) * 0xD251_1F53;
        let right = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the paper's library (Random123, `kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        let check = |counter, key, expected| assert_eq!(philox(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([!0; 4], [!0; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn uniform_stays_below_one_and_averages_a_half() {
        let numbers: Vec<f64> = (0..10_000).map(|i| uniform(i % 7, i / 7)).collect();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        // The standard error of the mean is 0.29 / 100.
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
    }
}
