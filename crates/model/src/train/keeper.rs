//! [`Keeper`]: who keeps the parameters that a pass computes with, and takes the gradients that it leaves.
//!
//! A model is a row of units: what comes before the layers (0), the layers (1 ..= l), and what comes after them (l + 1);
//! [`crate::Trainable::units`] says where each lies in the flat vector. Of LoRA all changes are the one unit 0.
//!
//! A pass tells its keeper, unit by unit, what it needs, needs no more, and has completed:
//! ```text
//! forward    need 0, release 0 · need 1 · need 2, release 1 · … · need l + 1, release l
//! head       (need 0, where the head is the embedding; then most of 0 is settled) · release
//! backward   complete l + 1 · need l, release l, complete l · … · complete 0
//! ```
//! So at most two layers are needed at a time. Gradients complete from the last unit to the first, while those before are
//! still computed: that is when they can travel.

use std::ops::Range;
use std::sync::Arc;

/// Numbers of the flat vector from `first` on. The memory may be longer than what is of use.
#[derive(Clone)]
pub struct Kept {
    pub first: usize,
    pub values: Arc<[f32]>,
}

/// Of a stage of a pipeline (see [`crate::Stage`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbor {
    Before,
    Behind,
}

/// See the module. It has no way to fail: a keeper that cannot go on remembers why, and gives any numbers until the pass is
/// over.
pub trait Keeper {
    /// The parameters of a unit, all of them, until it is released. Not asked where a pass was given all parameters.
    fn need(&mut self, unit: usize) -> Kept;

    /// The window that [`Keeper::need`] gave is dropped.
    fn release(&mut self, unit: usize);

    /// Where the gradients of these parameters of one unit go. What is there is overwritten or, once it was, added to; it
    /// stays until the unit is complete.
    fn grads(&mut self, range: Range<usize>) -> &mut [f32];

    /// Long before the unit is complete its gradients are what they will be, but for those in `open`: ranges in order that
    /// do not overlap. Of an embedding that is the head as well these are the rows of the micro-batch's tokens.
    fn settled(&mut self, unit: usize, open: &[Range<usize>]) {
        let _ = (unit, open);
    }

    /// Nothing more is added to the gradients of this unit by this pass.
    fn complete(&mut self, unit: usize);

    /// Where several compute a part of the model each (see [`crate::Division`]): replaces `values` by the sum of all of theirs.
    fn sum(&mut self, _values: &mut [f32]) {}

    /// Where this is a stage of a model (see [`crate::Stage`]): what the neighbour has sent for the same rows: the stream where
    /// it comes before this one, the stream's gradient where it comes behind.
    fn receive(&mut self, from: Neighbor, _values: &mut [f32]) {
        unreachable!("a whole model has no stage {from:?}")
    }

    fn send(&mut self, to: Neighbor, _values: &[f32]) {
        unreachable!("a whole model has no stage {to:?}")
    }

    /// The gradients of the embedding begin with those that it has as the head, on the last stage: of the same rows, in the
    /// gradients of what lies there behind the flat vector.
    fn begin_with_head(&mut self, embedding: Range<usize>) {
        unreachable!("a whole model has its head, and {embedding:?}")
    }
}

/// All gradients in one vector.
pub(super) struct Flat<'a>(pub(super) &'a mut [f32]);

impl Keeper for Flat<'_> {
    fn need(&mut self, unit: usize) -> Kept {
        unreachable!("the pass has all parameters, among them those of unit {unit}")
    }

    fn release(&mut self, _unit: usize) {}

    fn grads(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.0[range]
    }

    fn complete(&mut self, _unit: usize) {}
}

impl Kept {
    pub(super) fn of(&self, range: &Range<usize>) -> Option<&[f32]> {
        let start = range.start.checked_sub(self.first)?;
        self.values.get(start..start + range.len())
    }
}

#[cfg(test)]
mod tests {
    use tensor::{Pool, Precision};

    use super::*;
    use crate::train::tests::{B, T, configs, params, plain, tokens};
    use crate::{Objective, TrainModel, Trainable};

    /// Keeps every unit by itself, and sees to it that a pass asks for what it should.
    struct Strict<'a> {
        params: &'a [f32],
        units: Vec<Range<usize>>,
        held: Vec<usize>,
        /// Gradients of units that are not complete.
        open: Vec<Option<Vec<f32>>>,
        completed: Vec<usize>,
        dparams: Vec<f32>,
        /// What was settled early: its unit, its gradients then, and what was open.
        settled: Option<(usize, Vec<f32>, Vec<Range<usize>>)>,
    }

    impl<'a> Strict<'a> {
        fn new(trainable: &Trainable, params: &'a [f32]) -> Self {
            let (units, dparams) = (trainable.units(), vec![f32::NAN; params.len()]);
            let open = vec![None; units.len()];
            let (held, completed) = (Vec::new(), Vec::new());
            Self { params, units, held, open, completed, dparams, settled: None }
        }

        fn unit(&self, range: &Range<usize>) -> usize {
            let holds = |unit: &Range<usize>| unit.start <= range.start && range.end <= unit.end;
            self.units.iter().position(holds).expect("gradients of one unit")
        }
    }

    impl Keeper for Strict<'_> {
        fn need(&mut self, unit: usize) -> Kept {
            self.held.push(unit);
            let n_layers =
                self.held.iter().filter(|held| **held > 0 && **held + 1 < self.units.len()).count();
            assert!(n_layers <= 2, "{:?}", self.held);
            let range = self.units[unit].clone();
            Kept { first: range.start, values: self.params[range].into() }
        }

        fn release(&mut self, unit: usize) {
            let at = self.held.iter().position(|held| *held == unit).expect("it was needed");
            self.held.swap_remove(at);
        }

        fn grads(&mut self, range: Range<usize>) -> &mut [f32] {
            let unit = self.unit(&range);
            let (first, len) = (self.units[unit].start, self.units[unit].len());
            let open = self.open[unit].get_or_insert_with(|| vec![f32::NAN; len]);
            &mut open[range.start - first..range.end - first]
        }

        fn settled(&mut self, unit: usize, open: &[Range<usize>]) {
            let grads = self.open[unit].clone().expect("it has gradients");
            assert!(open.windows(2).all(|pair| pair[0].end < pair[1].start), "{open:?}");
            self.settled = Some((unit, grads, open.to_vec()));
        }

        fn complete(&mut self, unit: usize) {
            let grads = self.open[unit].take().expect("it has gradients");
            if let Some((_, then, open)) = self.settled.as_ref().filter(|(settled, ..)| *settled == unit) {
                let is_open = |at: usize| open.iter().any(|range| range.contains(&at));
                assert!((0..grads.len()).all(|at| is_open(at) || then[at].to_bits() == grads[at].to_bits()));
                assert!(open.iter().map(|range| range.len()).sum::<usize>() < grads.len());
            }
            self.dparams[self.units[unit].clone()].copy_from_slice(&grads);
            self.completed.push(unit);
        }
    }

    #[test]
    fn units_one_by_one_give_the_same_bits() {
        let pool = Pool::new(2);
        for config in configs() {
            let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
            let of = plain(&tokens, &targets);
            for recompute in [false, true] {
                let model = TrainModel::new(Trainable::new(&config), B, T, Precision::F32);
                let mut model = model.with_recompute(recompute);
                let params = params(model.trainable());
                let mut dparams = vec![0.0; params.len()];
                let loss = model.loss_and_grads(&pool, &params, of, &mut dparams);
                let mut keeper = Strict::new(model.trainable(), &params);
                assert_eq!(model.loss_and_grads_to(&pool, None, of, &mut keeper), loss);
                assert!(keeper.dparams == dparams, "{:?}", config.architecture);
                assert_eq!(keeper.completed, (0..config.n_layers + 2).rev().collect::<Vec<_>>());
                assert!(keeper.held.is_empty() && keeper.settled.is_some() == config.tied_embeddings);
                let alone = model.loss(&pool, &params, of);
                assert_eq!(model.loss_of(&pool, None, of, &mut keeper), alone);
                assert!(keeper.held.is_empty());
            }
        }
    }

    #[test]
    fn preferences_ask_their_start_of_nobody() {
        let (pool, b, config) = (Pool::new(1), 2, crate::config::tests::tiny());
        let start = Trainable::new(&config);
        let weights = start.to_weights(&pool, &params(&start), tensor::packed::WeightKind::F32);
        let trainable = Trainable::from_weights(weights).unwrap();
        let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
        let of = (plain(&tokens[..b * T], &targets[..b * T]).0, Objective::Dpo { beta: 0.2 });
        let mut params = params(&trainable);
        params.iter_mut().for_each(|x| *x *= 1.01);
        let mut model = TrainModel::new(trainable, b, T, Precision::F32);
        let mut dparams = vec![0.0; params.len()];
        let loss = model.loss_and_grads(&pool, &params, of, &mut dparams);
        let mut keeper = Strict::new(model.trainable(), &params);
        assert_eq!(model.loss_and_grads_to(&pool, None, of, &mut keeper), loss);
        assert!(keeper.dparams == dparams && keeper.held.is_empty() && loss.margin != 0.0);
    }
}
