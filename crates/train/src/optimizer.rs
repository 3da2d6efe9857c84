//! The update of all parameters by the mean, clipped gradient: AdamW, and where the plan says so Muon for the matrices of
//! the layers.

use std::ops::Range;

use model::ParamSpec;
use tensor::adamw::{AdamW, AdamWState};
use tensor::muon::{Muon, MuonScratch, muon};
use tensor::{Pool, Precision};

use crate::Plan;
use crate::plan;
use crate::state::State;

/// Parts of names of matrices that are no map between hidden states: rows of tables, looked up or compared with.
const TABLES: [&str; 4] = ["embed", "wte", "wpe", "lm_head"];

/// Which parameters are updated how.
pub(crate) struct Optimizer {
    adamw: plan::AdamW,
    lr_peak: f32,
    muon: Option<plan::Muon>,
    precision: Precision,
    /// Ranges for AdamW, each with its own ranges that have weight decay, counted from its start.
    plain: Vec<(Range<usize>, Vec<Range<usize>>)>,
    /// Matrices for Muon: their places and shapes.
    matrices: Vec<(Range<usize>, [usize; 2])>,
    scratch: MuonScratch,
}

/// What an update is multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct Rate {
    /// Of the peak learning rate.
    pub(crate) lr_share: f64,
    /// Applied to the gradient first: clipping and the mean over tokens.
    pub(crate) grad_scale: f32,
}

impl Optimizer {
    pub(crate) fn new(
        plan: &Plan,
        specs: &[ParamSpec],
        decayed: &[Range<usize>],
        precision: Precision,
    ) -> Optimizer {
        let is_hidden = |spec: &&ParamSpec| {
            plan.muon.is_some() && spec.dims.len() == 2 && !TABLES.iter().any(|part| spec.name.contains(part))
        };
        let matrices: Vec<_> = specs
            .iter()
            .filter(is_hidden)
            .map(|spec| (spec.range.clone(), [spec.dims[0], spec.dims[1]]))
            .collect();
        let n_params = specs.last().map_or(0, |spec| spec.range.end);
        let plain = between(&matrices, n_params).into_iter().map(|range| {
            let decayed = within(&range, decayed);
            (range, decayed)
        });
        Optimizer {
            adamw: plan.adamw,
            lr_peak: plan.schedule.lr_peak,
            muon: plan.muon,
            precision,
            plain: plain.collect(),
            matrices,
            scratch: MuonScratch::default(),
        }
    }

    /// Moves the parameters that the state owns and what is remembered of their gradients; counts nothing.
    pub(crate) fn update(&mut self, pool: &Pool, state: &mut State, grads: &[f32], rate: Rate) {
        let Rate { lr_share, grad_scale } = rate;
        let plan::AdamW { beta1, beta2, epsilon: eps, weight_decay } = self.adamw;
        let lr = (f64::from(self.lr_peak) * lr_share) as f32;
        let adamw = AdamW { lr, beta1, beta2, eps, weight_decay, step: state.n_updates() + 1, grad_scale };
        let State { params, owned, adam_m, adam_v, .. } = state;
        for (range, decayed) in &self.plain {
            let at = range.start.max(owned.start)..range.end.min(owned.end);
            if at.is_empty() {
                continue;
            }
            let decayed = within(&(at.start - range.start..at.end - range.start), decayed);
            let means = at.start - owned.start..at.end - owned.start;
            let state = AdamWState {
                params: &mut params[at.clone()],
                m: &mut adam_m[means.clone()],
                v: &mut adam_v[means],
            };
            tensor::adamw::adamw(pool, state, &grads[at], &decayed, &adamw);
        }
        let Some(plan) = self.muon else { return };
        let settings = Muon {
            lr: (f64::from(plan.lr_peak) * lr_share) as f32,
            momentum: plan.momentum,
            weight_decay: plan.weight_decay,
            grad_scale,
            precision: self.precision,
        };
        for (range, dims) in &self.matrices {
            let at = range.clone();
            let of = [&mut params[at.clone()], &mut adam_m[at.clone()]];
            muon(pool, of, &grads[at], *dims, (&settings, &mut self.scratch));
        }
    }
}

/// What of `0..n` lies between the matrices, which are in order.
fn between(matrices: &[(Range<usize>, [usize; 2])], n: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    for start_end in matrices.iter().map(|(range, _)| range.clone()).chain(std::iter::once(n..n)) {
        if at < start_end.start {
            ranges.push(at..start_end.start);
        }
        at = start_end.end;
    }
    ranges
}

/// The parts of `decayed` inside of `range`, counted from its start.
fn within(range: &Range<usize>, decayed: &[Range<usize>]) -> Vec<Range<usize>> {
    let clip = |at: usize| at.clamp(range.start, range.end) - range.start;
    decayed.iter().map(|d| clip(d.start)..clip(d.end)).filter(|d| !d.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_around_matrices() {
        let matrices = [(3..5, [1, 2]), (5..9, [2, 2]), (12..20, [2, 4])];
        assert_eq!(between(&matrices, 25), [0..3, 9..12, 20..25]);
        assert_eq!(between(&matrices[..2], 12), [0..3, 9..12]);
        assert_eq!(between(&[], 4).first(), Some(&(0..4)));
        assert_eq!(within(&(9..12), &[0..10, 11..30]), [0..1, 2..3]);
        assert!(within(&(9..12), &[0..3, 4..9]).is_empty());
    }
}
