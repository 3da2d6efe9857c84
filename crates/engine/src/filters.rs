//! Which tokens top-k, top-p, min-p and typical-p leave: linear work, because a token is looked at by itself only if its
//! logit is near enough to the largest one.

use std::cmp::Ordering;

use tensor::{cpu, logits};

use crate::request::{Sampling, TokenId};

/// Turns logits into weights: probabilities relative to the most likely token's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// The largest logit.
    pub(crate) max: f32,
    /// One over the temperature; finite and positive.
    pub(crate) factor: f32,
}

impl Scale {
    pub(crate) fn weight(self, logit: f32) -> f32 {
        logits::weight(logit, self.max, self.factor)
    }

    /// A logit that every token of at least this weight has, rounding included.
    fn logit_of(self, weight: f32) -> f32 {
        let distance = -weight.ln() / self.factor;
        self.max - distance * 1.000_01 - self.max.abs() * 1e-6
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    /// What it is ordered by, the best highest: its logit, or how typical it is.
    rank: f32,
    weight: f32,
    id: TokenId,
}

/// Scratch space, and the outcome of [`Candidates::filter`].
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    kept: Vec<Candidate>,
    ids: Vec<TokenId>,
}

pub(crate) fn has_filters(sampling: &Sampling) -> bool {
    sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0 || sampling.typical_p < 1.0
}

/// Whether [`Candidates::filter`] asks for the sum of all weights: no cheaper filter comes before top-p.
pub(crate) fn needs_whole(sampling: &Sampling) -> bool {
    sampling.top_k == 0 && sampling.min_p == 0.0 && sampling.top_p < 1.0
}

impl Candidates {
    /// Keeps what min-p, top-k, top-p and typical-p leave, in this order: never nothing, because the most likely token
    /// passes the first three, and typical-p keeps one at least. `whole` is the sum of all weights, if asked for.
    pub(crate) fn filter(&mut self, logits_v: &[f32], scale: Scale, sampling: &Sampling, whole: f64) {
        if sampling.top_k > 0 {
            self.keep_most_likely(logits_v, scale, sampling.top_k);
            self.kept.retain(|c| c.weight >= sampling.min_p);
        } else if needs_whole(sampling) {
            let target = f64::from(sampling.top_p) * whole;
            self.gather(logits_v, scale, |kept| mass(kept) >= target);
            self.keep_best(target);
        } else {
            self.collect(logits_v, scale, sampling.min_p);
        }
        if sampling.top_p < 1.0 && !needs_whole(sampling) {
            self.keep_best(f64::from(sampling.top_p) * mass(&self.kept));
        }
        if sampling.typical_p < 1.0 {
            self.keep_typical(scale, sampling.typical_p);
        }
    }

    /// One of the kept tokens, by weight; `random` is in [0, 1).
    pub(crate) fn draw(&self, random: f64) -> TokenId {
        let mut left = random * mass(&self.kept);
        for candidate in &self.kept {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.id;
            }
        }
        self.kept[self.kept.len() - 1].id
    }

    /// The `n` most likely tokens, best first, the lower id first among equals.
    pub(crate) fn most_likely(
        &mut self,
        logits_v: &[f32],
        scale: Scale,
        n: usize,
    ) -> impl Iterator<Item = TokenId> {
        self.keep_most_likely(logits_v, scale, n);
        self.kept.sort_unstable_by(best_first);
        self.kept.iter().map(|c| c.id)
    }

    fn keep_most_likely(&mut self, logits_v: &[f32], scale: Scale, n: usize) {
        if n == 0 {
            return self.kept.clear();
        }
        self.gather(logits_v, scale, |kept| kept.len() >= n);
        if self.kept.len() > n {
            self.kept.select_nth_unstable_by(n - 1, best_first);
            self.kept.truncate(n);
        }
    }

    /// Collects the likeliest tokens down to some weight at which there are enough, or all of them.
    /// A model's distribution is peaked, so one of the first weights mostly does.
    fn gather(&mut self, logits_v: &[f32], scale: Scale, is_enough: impl Fn(&[Candidate]) -> bool) {
        for weight in [1.0 / 16.0, 1.0 / 256.0, 1.0 / 8192.0, 1.0 / 1_048_576.0] {
            self.collect(logits_v, scale, weight);
            if is_enough(&self.kept) {
                return;
            }
        }
        self.collect(logits_v, scale, 0.0);
    }

    /// All tokens of at least this weight. A weight of 0 is a token that cannot be drawn, and never one of them.
    fn collect(&mut self, logits_v: &[f32], scale: Scale, weight_min: f32) {
        logits::at_least(cpu::features().level, &mut self.ids, logits_v, scale.logit_of(weight_min));
        let candidate = |&id: &TokenId| {
            let rank = logits_v[id as usize];
            Candidate { rank, weight: scale.weight(rank), id }
        };
        self.kept.clear();
        let kept = self.ids.iter().map(candidate).filter(|c| c.weight >= weight_min && c.weight > 0.0);
        self.kept.extend(kept);
    }

    /// Truncates to the smallest set of best candidates whose weights sum to at least `target`,
    /// by halving like quickselect: linear, however flat the distribution.
    fn keep_best(&mut self, target: f64) {
        let kept = &mut self.kept;
        let (mut start, mut end, mut mass_before) = (0, kept.len(), 0.0);
        // The answer's length lies in start + 1 ..= end, and everything before start is in it.
        while end - start > 1 {
            let middle = (end - start) / 2;
            let open = &mut kept[start..end];
            open.select_nth_unstable_by(middle - 1, best_first);
            let mass_upper = mass(&open[..middle]);
            if mass_before + mass_upper >= target {
                end = start + middle;
            } else {
                mass_before += mass_upper;
                start += middle;
            }
        }
        kept.truncate(end);
    }

    /// Meister et al., "Locally Typical Sampling", 2023: prefers tokens whose surprise -ln p is near the expected one,
    /// the entropy, over likelier ones.
    fn keep_typical(&mut self, scale: Scale, typical_p: f32) {
        let sum = mass(&self.kept);
        let log_sum = sum.ln();
        // -ln p = ln sum - ln weight, and a weight is the exponential of its scaled distance from the largest logit.
        let surprise = |c: &Candidate| log_sum - f64::from((c.rank - scale.max) * scale.factor);
        let entropy = self.kept.iter().map(|c| f64::from(c.weight) * surprise(c)).sum::<f64>() / sum;
        self.kept.iter_mut().for_each(|c| c.rank = -(surprise(c) - entropy).abs() as f32);
        self.keep_best(f64::from(typical_p) * sum);
    }
}

fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.rank.total_cmp(&a.rank).then(a.id.cmp(&b.id))
}

#[cfg(test)]
impl Candidates {
    pub(crate) fn ids(&self) -> Vec<TokenId> {
        let mut ids: Vec<_> = self.kept.iter().map(|c| c.id).collect();
        ids.sort_unstable();
        ids
    }
}
