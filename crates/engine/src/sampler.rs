//! From a row of logits to a token.
//!
//! Every draw is a few linear passes over the vocabulary that the compiler vectorizes, and only a
//! handful of candidates are ever looked at one by one: some tens of µs for 49,152 logits.

use std::collections::HashMap;

use crate::random;
use crate::request::{Logprobs, Sampling, TokenId};

/// What one draw needs. Nothing else decides the outcome.
pub(crate) struct Draw<'a> {
    pub(crate) logits_v: &'a [f32],
    pub(crate) sampling: &'a Sampling,
    pub(crate) counts: &'a TokenCounts,
    /// Ids that cannot be drawn now.
    pub(crate) banned: &'a [TokenId],
    /// Index of the token in the output.
    pub(crate) position: u64,
    /// How many of the most likely tokens to report, if any log-probability is wanted.
    pub(crate) logprobs: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) id: TokenId,
    pub(crate) logprobs: Option<Logprobs>,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum SampleError {
    #[error("the model gave a logit that is not a number")]
    NotANumber,
    #[error("the model gave an infinite logit")]
    Infinite,
    #[error("no token can be drawn: every logit is minus infinity")]
    NothingLeft,
}

/// How often each token occurred in a sequence; empty while no penalty asks for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct TokenCounts {
    by_id: HashMap<TokenId, Occurrence>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Occurrence {
    in_prompt: bool,
    n_generated: u32,
}

impl TokenCounts {
    pub(crate) fn new(sampling: &Sampling, prompt: &[TokenId]) -> TokenCounts {
        let mut counts = TokenCounts::default();
        if sampling.repetition_penalty != 1.0 {
            prompt.iter().for_each(|&id| counts.by_id.entry(id).or_default().in_prompt = true);
        }
        counts
    }

    pub(crate) fn add(&mut self, sampling: &Sampling, id: TokenId) {
        if has_penalties(sampling) {
            self.by_id.entry(id).or_default().n_generated += 1;
        }
    }
}

/// Scratch space; one per thread that draws.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    adjusted_v: Vec<f32>,
    weights_v: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// A token and its weight: its probability relative to the most likely token's.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    weight: f32,
    id: TokenId,
}

impl Sampler {
    pub(crate) fn draw(&mut self, draw: &Draw) -> Result<Drawn, SampleError> {
        let id = self.draw_id(draw)?;
        let logprobs = match draw.logprobs {
            Some(n_top) => Some(self.logprobs(draw.logits_v, id, n_top)?),
            None => None,
        };
        Ok(Drawn { id, logprobs })
    }

    /// Log-probabilities of `id` and of the `n_top` most likely tokens under the plain softmax.
    pub(crate) fn logprobs(
        &mut self,
        logits_v: &[f32],
        id: TokenId,
        n_top: usize,
    ) -> Result<Logprobs, SampleError> {
        let max = finite_max(logits_v)?;
        let sum = weigh(&mut self.weights_v, logits_v, max, 1.0);
        let log_sum = sum.ln() as f32;
        let of = |id: TokenId| logits_v[id as usize] - max - log_sum;
        most_likely(&mut self.candidates, &self.weights_v, n_top);
        let mut top: Vec<_> = self.candidates.iter().map(|c| (c.id, of(c.id))).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Ok(Logprobs { logprob: of(id), top })
    }

    fn draw_id(&mut self, draw: &Draw) -> Result<TokenId, SampleError> {
        let sampling = draw.sampling;
        let needs_change =
            !sampling.logit_bias.is_empty() || !draw.banned.is_empty() || has_penalties(sampling);
        let logits_v = if needs_change {
            adjust(&mut self.adjusted_v, draw);
            &self.adjusted_v
        } else {
            draw.logits_v
        };
        let max = finite_max(logits_v)?;
        if sampling.temperature == 0.0 {
            let first = logits_v.iter().position(|&logit| logit == max);
            return Ok(first.expect("the maximum is among them") as TokenId);
        }
        let random = random::uniform(sampling.seed, draw.position);
        let weights_v = &mut self.weights_v;
        let sum = weigh(weights_v, logits_v, max, 1.0 / sampling.temperature);
        if sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p == 0.0 {
            return Ok(walk_all(weights_v, sum, random));
        }
        let candidates = &mut self.candidates;
        filter(candidates, weights_v, sum, sampling);
        Ok(walk(candidates, random))
    }
}

fn has_penalties(sampling: &Sampling) -> bool {
    sampling.presence_penalty != 0.0
        || sampling.frequency_penalty != 0.0
        || sampling.repetition_penalty != 1.0
}

/// Copies the logits and changes those that bias, penalties and bans name.
fn adjust(adjusted_v: &mut Vec<f32>, draw: &Draw) {
    let sampling = draw.sampling;
    adjusted_v.clear();
    adjusted_v.extend_from_slice(draw.logits_v);
    for &(id, bias) in &sampling.logit_bias {
        adjusted_v[id as usize] += bias;
    }
    for (&id, occurrence) in &draw.counts.by_id {
        let logit = &mut adjusted_v[id as usize];
        // Keskar et al., "CTRL", 2019: towards less likely on either side of 0.
        let factor = sampling.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
        if occurrence.n_generated > 0 {
            *logit -= sampling.presence_penalty;
            *logit -= sampling.frequency_penalty * occurrence.n_generated as f32;
        }
    }
    for &id in draw.banned {
        adjusted_v[id as usize] = f32::NEG_INFINITY;
    }
}

/// Lanes of the passes below: independent accumulators that become vector registers.
const LANES: usize = 16;

/// The largest logit. Minus infinity is a legal logit (a token that cannot be), NaN and infinity are not.
fn finite_max(logits_v: &[f32]) -> Result<f32, SampleError> {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut nan = [0u32; LANES];
    let (whole, rest) = logits_v.as_chunks::<LANES>();
    for chunk in whole {
        for lane in 0..LANES {
            max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
            nan[lane] |= u32::from(chunk[lane].is_nan());
        }
    }
    let max = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let is_nan = nan.iter().any(|&n| n != 0) || rest.iter().any(|x| x.is_nan());
    match max {
        _ if is_nan => Err(SampleError::NotANumber),
        f32::INFINITY => Err(SampleError::Infinite),
        f32::NEG_INFINITY => Err(SampleError::NothingLeft),
        max => Ok(max),
    }
}

/// Fills `weights_v` with exp((logit - max) * scale), so the largest weight is 1, and returns their sum.
fn weigh(weights_v: &mut Vec<f32>, logits_v: &[f32], max: f32, scale: f32) -> f64 {
    weights_v.clear();
    weights_v.extend(logits_v.iter().map(|&logit| exp_negative((logit - max) * scale)));
    weights_v.chunks(CHUNK).map(|chunk| f64::from(lane_sum(chunk))).sum()
}

/// Weights summed in f32 before they join an f64: at most 1,024 of them keep 6 digits.
const CHUNK: usize = 1024;

fn lane_sum(weights: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (whole, rest) = weights.as_chunks::<LANES>();
    for chunk in whole {
        (0..LANES).for_each(|lane| sums[lane] += chunk[lane]);
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
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

/// The id at which the running sum passes `random` of the whole, in id order.
fn walk_all(weights_v: &[f32], sum: f64, random: f64) -> TokenId {
    let mut left = random * sum;
    for (chunk_idx, chunk) in weights_v.chunks(CHUNK).enumerate() {
        let chunk_sum = f64::from(lane_sum(chunk));
        if left >= chunk_sum {
            left -= chunk_sum;
            continue;
        }
        for (i, &weight) in chunk.iter().enumerate() {
            left -= f64::from(weight);
            if left < 0.0 {
                return (chunk_idx * CHUNK + i) as TokenId;
            }
        }
        // The chunk's sum was rounded up past its parts; what is left belongs to the next one.
    }
    // Rounding can leave a crumb past the last weight.
    weights_v.iter().rposition(|&weight| weight > 0.0).unwrap_or(0) as TokenId
}

fn walk(candidates: &[Candidate], random: f64) -> TokenId {
    let mut left = random * mass(candidates);
    for candidate in candidates {
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            return candidate.id;
        }
    }
    candidates[candidates.len() - 1].id
}

/// Leaves in `candidates` what min-p, top-k and top-p keep: never nothing, because the most likely
/// token always stays. The order is a function of the weights alone.
fn filter(candidates: &mut Vec<Candidate>, weights_v: &[f32], sum: f64, sampling: &Sampling) {
    if sampling.top_k > 0 {
        most_likely(candidates, weights_v, sampling.top_k);
        candidates.retain(|c| c.weight >= sampling.min_p);
        let target = f64::from(sampling.top_p) * mass(candidates);
        keep_nucleus(candidates, target);
        return;
    }
    // min-p comes first, and top-p is a share of what it leaves.
    let is_cut = sampling.min_p > 0.0;
    let kept = |&&weight: &&f32| weight >= sampling.min_p;
    let sum = if is_cut { weights_v.iter().filter(kept).map(|&w| f64::from(w)).sum() } else { sum };
    let target = f64::from(sampling.top_p) * sum;
    gather(candidates, weights_v, sampling.min_p, |found| mass(found) >= target);
    keep_nucleus(candidates, target);
}

/// The `n` most likely tokens, in no particular order; the lower id among equals.
fn most_likely(candidates: &mut Vec<Candidate>, weights_v: &[f32], n: usize) {
    if n == 0 {
        return candidates.clear();
    }
    gather(candidates, weights_v, 0.0, |found| found.len() >= n);
    if candidates.len() > n {
        candidates.select_nth_unstable_by(n - 1, best_first);
        candidates.truncate(n);
    }
}

/// Collects the heaviest tokens down to some threshold at which there are enough, or to `least`.
/// A model's distribution is peaked, so one of the first thresholds mostly does.
fn gather(
    candidates: &mut Vec<Candidate>,
    weights_v: &[f32],
    least: f32,
    is_enough: impl Fn(&[Candidate]) -> bool,
) {
    for threshold in [1.0 / 16.0, 1.0 / 256.0, 1.0 / 8192.0, 1.0 / 1_048_576.0, least] {
        let threshold = f32::max(threshold, least);
        collect_from(candidates, weights_v, threshold);
        if threshold == least || is_enough(candidates) {
            return;
        }
    }
}

fn collect_from(candidates: &mut Vec<Candidate>, weights_v: &[f32], threshold: f32) {
    candidates.clear();
    for (chunk_idx, chunk) in weights_v.chunks(LANES).enumerate() {
        // Almost always false, and vectorized; only then look closer.
        if !chunk.iter().fold(false, |any, &weight| any | (weight >= threshold)) {
            continue;
        }
        for (i, &weight) in chunk.iter().enumerate() {
            // A weight of 0 is a token that cannot be drawn, whatever the threshold.
            if weight >= threshold && weight > 0.0 {
                let id = (chunk_idx * LANES + i) as TokenId;
                candidates.push(Candidate { weight, id });
            }
        }
    }
}

/// Truncates to the smallest set of most likely candidates whose weights sum to at least `target`,
/// by halving like quickselect: linear, however flat the distribution.
fn keep_nucleus(candidates: &mut Vec<Candidate>, target: f64) {
    let (mut start, mut end, mut mass_before) = (0, candidates.len(), 0.0);
    // The answer's length lies in start + 1 ..= end, and everything before start is in it.
    while end - start > 1 {
        let middle = (end - start) / 2;
        let open = &mut candidates[start..end];
        open.select_nth_unstable_by(middle - 1, best_first);
        let mass_upper = mass(&open[..middle]);
        if mass_before + mass_upper >= target {
            end = start + middle;
        } else {
            mass_before += mass_upper;
            start += middle;
        }
    }
    candidates.truncate(end);
}

fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

fn best_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
