//! From a row of logits to a token.
//!
//! Every draw is one or two linear passes over the vocabulary at the speed of the memory, and only a handful of
//! candidates (`filters.rs`) are ever looked at one by one. Nothing is sorted.

use std::collections::HashMap;

use tensor::cpu;
use tensor::logits::{self, CHUNK, Largest};

use crate::filters::{self, Candidates, Scale};
use crate::random;
use crate::request::{Logprobs, Sampling, TokenId};

/// Temperatures below this are greedy: they leave nothing to chance, and dividing by them overflows.
const TEMPERATURE_MIN: f32 = 1e-4;

/// What one draw needs. Nothing else decides the outcome.
pub(crate) struct Draw<'a> {
    pub(crate) logits_v: &'a [f32],
    pub(crate) sampling: &'a Sampling,
    pub(crate) counts: &'a TokenCounts,
    /// The ids a constraint allows, one bit each; all where there is none.
    pub(crate) allowed: Option<&'a [u32]>,
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
    /// Of each [`CHUNK`] of a row: the sum of its weights.
    sums: Vec<f64>,
    candidates: Candidates,
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
        let max = largest(logits_v)?.logit;
        let log_sum = self.weigh(logits_v, Scale { max, factor: 1.0 }).ln() as f32;
        let of = |id: TokenId| logits_v[id as usize] - max - log_sum;
        let top = self.candidates.most_likely(logits_v, Scale { max, factor: 1.0 }, n_top);
        Ok(Logprobs { logprob: of(id), top: top.map(|id| (id, of(id))).collect() })
    }

    fn draw_id(&mut self, draw: &Draw) -> Result<TokenId, SampleError> {
        let sampling = draw.sampling;
        let mut adjusted_v = std::mem::take(&mut self.adjusted_v);
        let logits_v = if needs_change(draw) {
            adjust(&mut adjusted_v, draw);
            &adjusted_v
        } else {
            draw.logits_v
        };
        let id = self.draw_from(logits_v, sampling, draw.position);
        self.adjusted_v = adjusted_v;
        id
    }

    fn draw_from(
        &mut self,
        logits_v: &[f32],
        sampling: &Sampling,
        position: u64,
    ) -> Result<TokenId, SampleError> {
        let largest = largest(logits_v)?;
        if sampling.temperature < TEMPERATURE_MIN {
            return Ok(largest.index as TokenId);
        }
        let scale = Scale { max: largest.logit, factor: 1.0 / sampling.temperature };
        let random = random::uniform(sampling.seed, position);
        if !filters::has_filters(sampling) {
            let sum = self.weigh(logits_v, scale);
            return Ok(walk_all(logits_v, scale, &self.sums, random * sum));
        }
        // Top-p by itself is a share of the whole; after another filter, of what that one left.
        let whole = if filters::needs_whole(sampling) { self.weigh(logits_v, scale) } else { 0.0 };
        self.candidates.filter(logits_v, scale, sampling, whole);
        Ok(self.candidates.draw(random))
    }

    /// The sum of all weights; leaves those of the chunks in `sums`.
    fn weigh(&mut self, logits_v: &[f32], scale: Scale) -> f64 {
        logits::exp_sums(cpu::features().level, &mut self.sums, logits_v, scale.max, scale.factor);
        self.sums.iter().sum()
    }
}

fn needs_change(draw: &Draw) -> bool {
    let sampling = draw.sampling;
    !sampling.logit_bias.is_empty()
        || !draw.banned.is_empty()
        || draw.allowed.is_some()
        || has_penalties(sampling)
}

fn has_penalties(sampling: &Sampling) -> bool {
    sampling.presence_penalty != 0.0
        || sampling.frequency_penalty != 0.0
        || sampling.repetition_penalty != 1.0
}

/// Copies the logits and changes those that the constraint, bias, penalties and bans name.
fn adjust(adjusted_v: &mut Vec<f32>, draw: &Draw) {
    let sampling = draw.sampling;
    match draw.allowed {
        Some(bits) => logits::mask(cpu::features().level, adjusted_v, draw.logits_v, bits),
        None => {
            adjusted_v.clear();
            adjusted_v.extend_from_slice(draw.logits_v);
        }
    }
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

/// The largest logit. Minus infinity is a legal logit (a token that cannot be), NaN and infinity are not.
fn largest(logits_v: &[f32]) -> Result<Largest, SampleError> {
    let largest = logits::largest(cpu::features().level, logits_v);
    match largest.logit {
        _ if largest.has_nan => Err(SampleError::NotANumber),
        f32::INFINITY => Err(SampleError::Infinite),
        f32::NEG_INFINITY => Err(SampleError::NothingLeft),
        _ => Ok(largest),
    }
}

/// The id at which the running sum of all weights passes `target`, in id order.
fn walk_all(logits_v: &[f32], scale: Scale, sums: &[f64], target: f64) -> TokenId {
    let mut left = target;
    for (chunk_idx, (chunk, &sum)) in logits_v.chunks(CHUNK).zip(sums).enumerate() {
        if left >= sum {
            left -= sum;
            continue;
        }
        for (i, &logit) in chunk.iter().enumerate() {
            left -= f64::from(scale.weight(logit));
            if left < 0.0 {
                return (chunk_idx * CHUNK + i) as TokenId;
            }
        }
        // The chunk's sum was rounded up past its parts; what is left belongs to the next one.
    }
    // Rounding can leave a crumb past the last weight.
    logits_v.iter().rposition(|&logit| scale.weight(logit) > 0.0).unwrap_or(0) as TokenId
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
