//! Passes over one row of logits, for those who draw tokens: its largest, the sums of its softmax, who is above a
//! threshold, who is masked.
//!
//! Each is plain Rust that the compiler turns into the registers of the instruction set it is dispatched to. The order
//! of every sum is fixed by [`LANES`] and [`CHUNK`], not by the registers: unlike other ops these give the same bits on
//! every machine, so that a seed gives the same tokens everywhere.

use crate::simd::{Simd, dispatch};

/// Independent accumulators of a loop; a multiple of every register's lanes.
const LANES: usize = 32;
/// Logits whose sum is kept apart: at most this many f32 are added before they join an f64, which keeps 6 digits, and
/// a search need look at no more than two of them one by one.
pub const CHUNK: usize = 1024;

/// What one pass over a row finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Largest {
    /// The largest logit; minus infinity where there is none. NaNs are passed over.
    pub logit: f32,
    /// The first index that holds it.
    pub index: usize,
    /// Whether any logit is NaN.
    pub has_nan: bool,
}

dispatch!(
    /// The largest logit of a row, by reading it once.
    pub fn largest(logits_v: &[f32]) -> Largest = largest_plain
);
#[inline(always)]
fn largest_plain<S: Simd>(_: S, logits_v: &[f32]) -> Largest {
    let mut found = Largest { logit: f32::NEG_INFINITY, index: 0, has_nan: false };
    let mut found_chunk = 0;
    for (chunk_idx, chunk) in logits_v.chunks(CHUNK).enumerate() {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut nan = [0u32; LANES];
        let (whole, rest) = chunk.as_chunks::<LANES>();
        for logits in whole {
            for lane in 0..LANES {
                max[lane] = if logits[lane] > max[lane] { logits[lane] } else { max[lane] };
                nan[lane] |= u32::from(logits[lane].is_nan());
            }
        }
        let logit = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        found.has_nan |= nan.iter().any(|&n| n != 0) || rest.iter().any(|x| x.is_nan());
        if logit > found.logit {
            (found.logit, found_chunk) = (logit, chunk_idx);
        }
    }
    let start = found_chunk * CHUNK;
    let chunk = &logits_v[start..logits_v.len().min(start + CHUNK)];
    found.index = start + chunk.iter().position(|&logit| logit == found.logit).unwrap_or(0);
    found
}

dispatch!(
    /// Replaces `sums` by Σ e^((logit - max) · scale) of each [`CHUNK`] of a row. No logit is above `max`, none is NaN,
    /// `scale` is positive and finite.
    pub fn exp_sums(sums: &mut Vec<f64>, logits_v: &[f32], max: f32, scale: f32) = exp_sums_plain
);
#[inline(always)]
fn exp_sums_plain<S: Simd>(_: S, sums: &mut Vec<f64>, logits_v: &[f32], max: f32, scale: f32) {
    sums.clear();
    for chunk in logits_v.chunks(CHUNK) {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = chunk.as_chunks::<LANES>();
        for logits in whole {
            for lane in 0..LANES {
                lanes[lane] += weight(logits[lane], max, scale);
            }
        }
        let whole: f64 = lanes.iter().map(|&sum| f64::from(sum)).sum();
        let rest: f64 = rest.iter().map(|&logit| f64::from(weight(logit, max, scale))).sum();
        sums.push(whole + rest);
    }
}

/// e^((logit - max) · scale): a logit's probability relative to the largest one's.
#[inline(always)]
pub fn weight(logit: f32, max: f32, scale: f32) -> f32 {
    exp_negative((logit - max) * scale)
}

/// e^x for x <= 0 to 2 ulp, and 0 below -87. Plain arithmetic, so that loops over it vectorize and
/// every machine gives the same bits: x = (k + f) ln 2, e^x = 2^k * 2^f, |f| <= 1/2, Taylor for 2^f.
#[inline(always)]
fn exp_negative(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let t = clamped * std::f32::consts::LOG2_E;
    let rounded = t + ROUND;
    // ln 2 in two parts, the first exact in a product with a small integer, keeps f's last bits.
    let k = rounded - ROUND;
    let r = (clamped - k * 0.693_359_4) - k * -2.121_944_4e-4;
    let tail = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
    let power = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * tail))));
    let two_to_k = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { power * two_to_k }
}

dispatch!(
    /// Replaces `ids` by the indices of all logits that are at least `threshold`, in order, and above minus infinity.
    pub fn at_least(ids: &mut Vec<u32>, logits_v: &[f32], threshold: f32) = at_least_plain
);
#[inline(always)]
fn at_least_plain<S: Simd>(_: S, ids: &mut Vec<u32>, logits_v: &[f32], threshold: f32) {
    ids.clear();
    let threshold = threshold.max(f32::MIN);
    let (whole, rest) = logits_v.as_chunks::<LANES>();
    for (part_idx, part) in whole.iter().enumerate() {
        // Almost always none, and vectorized; only then look closer.
        let any = part.iter().fold(0u32, |any, &logit| any | u32::from(logit >= threshold));
        if any != 0 {
            push_at_least(ids, part, part_idx * LANES, threshold);
        }
    }
    push_at_least(ids, rest, whole.len() * LANES, threshold);
}

#[inline(always)]
fn push_at_least(ids: &mut Vec<u32>, part: &[f32], start: usize, threshold: f32) {
    let above = part.iter().enumerate().filter(|(_, logit)| **logit >= threshold);
    ids.extend(above.map(|(i, _)| (start + i) as u32));
}

dispatch!(
    /// Replaces `masked_v` by the logits whose bit is set (bit `i % 32` of word `i / 32`), minus infinity for the rest.
    /// Words that are missing are zeros.
    pub fn mask(masked_v: &mut Vec<f32>, logits_v: &[f32], bits: &[u32]) = mask_plain
);
#[inline(always)]
fn mask_plain<S: Simd>(_: S, masked_v: &mut Vec<f32>, logits_v: &[f32], bits: &[u32]) {
    masked_v.clear();
    masked_v.resize(logits_v.len(), f32::NEG_INFINITY);
    for ((masked, logits), &word) in masked_v.chunks_mut(32).zip(logits_v.chunks(32)).zip(bits) {
        match word {
            // A grammar mostly allows nearly nothing or nearly everything.
            0 => (),
            u32::MAX => masked.copy_from_slice(logits),
            _ => (masked.iter_mut().zip(logits).enumerate())
                .filter(|(i, _)| word >> i & 1 == 1)
                .for_each(|(_, (masked, &logit))| *masked = logit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Level;
    use crate::testing::numbers;

    const LENGTHS: [usize; 8] = [1, 31, 32, 33, 1023, 1024, 1025, 5000];

    #[test]
    fn exp_is_exact_to_2_ulp() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let (ours, exact) = (f64::from(exp_negative(x)), f64::from(x).exp());
            let ulp = f64::from(f32::EPSILON) * exact;
            assert!((ours - exact).abs() <= 2.0 * ulp, "e^{x}: {ours} instead of {exact}");
        }
        assert_eq!(exp_negative(0.0), 1.0);
        assert_eq!((exp_negative(-1000.0), exp_negative(f32::NEG_INFINITY)), (0.0, 0.0));
    }

    #[test]
    fn every_level_gives_what_the_definitions_say_to_the_bit() {
        for len in LENGTHS {
            let mut logits_v = numbers(len as u64, len);
            logits_v[len / 2] = f32::NEG_INFINITY;
            let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let index = logits_v.iter().position(|&x| x == max).unwrap();
            let above: Vec<u32> = (0..len as u32).filter(|&i| logits_v[i as usize] >= 0.7).collect();
            let possible: Vec<u32> =
                (0..len as u32).filter(|&i| logits_v[i as usize] > f32::NEG_INFINITY).collect();
            let exact: f64 = logits_v.iter().map(|&x| (f64::from(x - max) * 1.25).exp()).sum();
            let mut first_sums = None;
            for level in Level::all_available() {
                let is_empty = max == f32::NEG_INFINITY;
                assert_eq!(largest(level, &logits_v), Largest { logit: max, index, has_nan: false });
                let (mut ids, mut sums) = (vec![7], vec![7.0]);
                at_least(level, &mut ids, &logits_v, 0.7);
                assert_eq!(ids, above);
                at_least(level, &mut ids, &logits_v, f32::NEG_INFINITY);
                assert_eq!(ids, possible);
                if is_empty {
                    continue;
                }
                exp_sums(level, &mut sums, &logits_v, max, 1.25);
                assert_eq!(sums.len(), len.div_ceil(CHUNK));
                assert!((sums.iter().sum::<f64>() - exact).abs() <= 1e-6 * exact, "{len} at {level:?}");
                assert_eq!(*first_sums.get_or_insert(sums.clone()), sums, "{len} at {level:?}");
            }
        }
    }

    #[test]
    fn a_nan_is_seen_wherever_it_is() {
        for len in LENGTHS {
            for at in [0, len / 2, len - 1] {
                let mut logits_v = numbers(3, len);
                logits_v[at] = f32::NAN;
                assert!(Level::all_available().iter().all(|&level| largest(level, &logits_v).has_nan));
            }
        }
    }

    #[test]
    fn masked_logits_are_gone_and_the_others_unchanged() {
        for len in LENGTHS {
            let logits_v = numbers(5, len);
            // All, none and some of a word's bits; the last words are missing.
            let bits: Vec<u32> =
                (0..len as u32 / 40).map(|i| [u32::MAX, 0, 0x8421_1249][i as usize % 3]).collect();
            for level in Level::all_available() {
                let mut masked_v = vec![1.0; 3];
                mask(level, &mut masked_v, &logits_v, &bits);
                for (i, (&masked, &logit)) in masked_v.iter().zip(&logits_v).enumerate() {
                    let is_set = bits.get(i / 32).is_some_and(|word| word >> (i % 32) & 1 == 1);
                    assert_eq!(masked, if is_set { logit } else { f32::NEG_INFINITY });
                }
                assert_eq!(masked_v.len(), len);
            }
        }
    }
}
