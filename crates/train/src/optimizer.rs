//! The update of all parameters by the mean, clipped gradient: AdamW, and where the plan says so Muon for the matrices of
//! the layers.

use std::ops::Range;

use model::ParamSpec;
use tensor::adamw::{AdamW, AdamWState};
use tensor::muon::{Muon, MuonScratch, muon};
use tensor::{Pool, Precision};

use crate::Plan;
use crate::layout::{Place, between};
use crate::plan;
use crate::state::{Snapshot, State};

/// Parts of names of matrices that are no map between hidden states: rows of tables, looked up or compared with.
const TABLES: [&str; 4] = ["embed", "wte", "wpe", "lm_head"];

/// Elements that are copied and then updated while they are in caches: 3 vectors · 4 B · 256 Ki = 3 MiB.
const COPIED_AT_ONCE: usize = 256 << 10;

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
        let matrices: Vec<_> =
            hidden(plan, specs).map(|spec| (spec.range.clone(), [spec.dims[0], spec.dims[1]])).collect();
        let n_params = specs.last().map_or(0, |spec| spec.range.end);
        let plain = between(&of_muon(plan, specs), n_params).into_iter().map(|range| {
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

    /// Moves the parameters that the state owns and what is remembered of their gradients; counts nothing. `before` gets
    /// the vectors as they were: each part is copied just before it is updated, when it has to come from memory anyway.
    pub(crate) fn update(
        &mut self,
        pool: &Pool,
        state: &mut State,
        (grads, rate): (&[f32], Rate),
        mut before: Option<&mut Snapshot>,
    ) {
        let Rate { lr_share, grad_scale } = rate;
        let plan::AdamW { beta1, beta2, epsilon: eps, weight_decay } = self.adamw;
        let lr = (f64::from(self.lr_peak) * lr_share) as f32;
        let adamw = AdamW { lr, beta1, beta2, eps, weight_decay, step: state.n_updates() + 1, grad_scale };
        let (owned, is_copied) = (state.places.clone(), before.is_some());
        for (range, decayed) in &self.plain {
            for part in owned.iter().flat_map(|place| parts(place, range, is_copied)) {
                if let Some(before) = &mut before {
                    state.copy_to(pool, before, &part);
                }
                let (at, of_grads) = (state.params_at(&part), state.grads_at(&part));
                let squared = state.squared_at(&part.at);
                let State { params, adam_m, adam_v, .. } = &mut *state;
                let decayed = within(&(part.at.start - range.start..part.at.end - range.start), decayed);
                let state =
                    AdamWState { params: &mut params[at], m: &mut adam_m[part.own], v: &mut adam_v[squared] };
                tensor::adamw::adamw(pool, state, &grads[of_grads], &decayed, &adamw);
            }
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
            if let Some(before) = &mut before {
                state.copy_to(pool, before, &Place { at: at.clone(), own: at.clone() });
            }
            let State { params, adam_m, .. } = &mut *state;
            let of = [&mut params[at.clone()], &mut adam_m[at.clone()]];
            muon(pool, of, &grads[at], *dims, (&settings, &mut self.scratch));
        }
    }
}

/// The tensors that Muon trains, if the plan has it.
fn hidden<'a>(plan: &Plan, specs: &'a [ParamSpec]) -> impl Iterator<Item = &'a ParamSpec> {
    let has_muon = plan.muon.is_some();
    let is_table = |spec: &ParamSpec| TABLES.iter().any(|part| spec.name.contains(part));
    specs.iter().filter(move |spec| has_muon && spec.dims.len() == 2 && !is_table(spec))
}

/// Where they lie.
pub(crate) fn of_muon(plan: &Plan, specs: &[ParamSpec]) -> Vec<Range<usize>> {
    hidden(plan, specs).map(|spec| spec.range.clone()).collect()
}

/// What of an owned place lies in `range`, in parts that are to be copied at once.
fn parts(place: &Place, range: &Range<usize>, is_copied: bool) -> Vec<Place> {
    let mine = range.start.max(place.at.start)..range.end.min(place.at.end);
    let len = if is_copied { COPIED_AT_ONCE } else { mine.len() };
    let part = |start: usize| {
        let at = start..(start + len).min(mine.end);
        let own = place.own.start + (at.start - place.at.start);
        Place { own: own..own + at.len(), at }
    };
    mine.clone().step_by(len.max(1)).map(part).collect()
}

/// The parts of `decayed` inside of `range`, counted from its start.
fn within(range: &Range<usize>, decayed: &[Range<usize>]) -> Vec<Range<usize>> {
    let clip = |at: usize| at.clamp(range.start, range.end) - range.start;
    decayed.iter().map(|d| clip(d.start)..clip(d.end)).filter(|d| !d.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use tensor::Buf;

    use super::*;
    use crate::guard::Health;
    use crate::layout::Zero;

    const MATRIX: usize = 12;

    fn state(n: usize) -> State {
        let vector = |salt: usize| {
            let mut values = Buf::zeroed(n);
            values.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 31 + salt) % 97) as f32 * 0.01);
            values
        };
        State {
            zero: Zero::Nothing,
            places: vec![Place { at: 0..n, own: 0..n }],
            // Without the matrix of Muon at the end.
            squared: vec![Place { at: 0..n - MATRIX, own: 0..n - MATRIX }],
            params: vector(1),
            adam_m: vector(2),
            adam_v: Buf::from_slice(&vector(3)[..n - MATRIX]),
            step: 4,
            tokens: 5,
            elapsed_seconds: 6.0,
            health: Health::default(),
        }
    }

    #[test]
    fn what_was_before_an_update_is_copied_and_changes_nothing() {
        // Several parts, a border of decay inside of one, and a matrix for Muon.
        let n = 2 * COPIED_AT_ONCE + 777;
        let matrix = n - MATRIX..n;
        let optimizer = || Optimizer {
            adamw: plan::AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
            lr_peak: 0.1,
            muon: Some(plan::Muon::default()),
            precision: Precision::F32,
            plain: vec![
                (0..10, vec![]),
                (10..n - MATRIX, vec![100..COPIED_AT_ONCE, COPIED_AT_ONCE + 5..COPIED_AT_ONCE + 500]),
            ],
            matrices: vec![(matrix.clone(), [3, 4])],
            scratch: MuonScratch::default(),
        };
        let (pool, start) = (Pool::new(2), state(n));
        let (grads, rate) = (start.adam_m.clone(), Rate { lr_share: 0.5, grad_scale: 0.25 });
        let [mut plain, mut copied] = [start.clone(), start.clone()];
        optimizer().update(&pool, &mut plain, (&grads, rate), None);
        let mut before = Snapshot::new([start.places.clone(), start.squared.clone()]);
        start.count_to(&mut before);
        optimizer().update(&pool, &mut copied, (&grads, rate), Some(&mut before));
        let vectors = |s: &State| [&s.params, &s.adam_m, &s.adam_v].map(|v| v.to_vec());
        assert!(vectors(&copied) == vectors(&plain) && vectors(&plain) != vectors(&start));
        let bytes = |values: Vec<f32>| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        assert!(before.vectors == vectors(&start).map(bytes));
        assert_eq!((before.step, before.tokens, before.elapsed_seconds), (4, 5, 6.0));
        // Of which not all is stored from here.
        let ranges = [2..7, COPIED_AT_ONCE - 3..2 * COPIED_AT_ONCE + 9];
        let mut some = Snapshot::new([(); 2].map(|()| crate::layout::places(&ranges)));
        optimizer().update(&pool, &mut start.clone(), (&grads, rate), Some(&mut some));
        let stored = |values: &Vec<f32>| -> Vec<f32> {
            ranges.iter().flat_map(|range| &values[range.clone()]).copied().collect()
        };
        assert!(some.vectors == vectors(&start).map(|values| bytes(stored(&values))));
    }

    #[test]
    fn ranges_are_cut_around_matrices() {
        let matrices = [3..5, 5..9, 12..20];
        assert_eq!(between(&matrices, 25), [0..3, 9..12, 20..25]);
        assert_eq!(between(&matrices[..2], 12), [0..3, 9..12]);
        assert_eq!(between(&[], 4).first(), Some(&(0..4)));
        assert_eq!(within(&(9..12), &[0..10, 11..30]), [0..1, 2..3]);
        assert!(within(&(9..12), &[0..3, 4..9]).is_empty());
    }
}
