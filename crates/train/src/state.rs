//! [`State`]: what changes from step to step.

use std::ops::Range;

use model::Trainable;
use tensor::{Buf, Pool};

use crate::guard::Health;
use crate::layout::{Layout, Place, Zero};

/// What changes from step to step, of one rank.
#[derive(Clone)]
pub(crate) struct State {
    /// What the ranks divide among them.
    pub(crate) zero: Zero,
    /// The parameters that this rank updates: all, or its shard.
    pub(crate) places: Vec<Place>,
    /// All, or where they are divided what the rank owns.
    pub(crate) params: Buf<f32>,
    /// Running mean of the gradient, of what is owned.
    pub(crate) adam_m: Buf<f32>,
    /// Running mean of the squared gradient, of what is owned.
    pub(crate) adam_v: Buf<f32>,
    /// Finished steps, those that were skipped among them.
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) elapsed_seconds: f64,
    pub(crate) health: Health,
}

/// What a rank writes of a [`State`]: vectors in little-endian f32, of what it owns.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    /// Parameters and the two means, as in [`State`].
    pub(crate) vectors: [Vec<u8>; 3],
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) elapsed_seconds: f64,
    pub(crate) health: Health,
}

/// Elements of a vector that a thread copies at a time: 64 KiB, as the update takes them.
const COPY_LEN: usize = 16 << 10;

impl Snapshot {
    /// With memory for vectors of `n` numbers, all of it touched: a page that is touched for the first time takes longer
    /// than copying does.
    pub(crate) fn new(n: usize) -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.vectors.iter_mut().for_each(|bytes| bytes.resize(4 * n, 0));
        snapshot
    }
}

impl State {
    /// Before the first step, with parameters that are all 0.
    pub(crate) fn empty(layout: &Layout) -> State {
        let n_own = layout.n_own();
        let n_params = if layout.zero == Zero::Parameters { n_own } else { layout.n };
        State {
            zero: layout.zero,
            places: layout.places(),
            params: Buf::zeroed(n_params),
            adam_m: Buf::zeroed(n_own),
            adam_v: Buf::zeroed(n_own),
            step: 0,
            tokens: 0,
            elapsed_seconds: 0.0,
            health: Health::default(),
        }
    }

    pub(crate) fn initial(layout: &Layout, trainable: &Trainable, seed: u64) -> State {
        let mut state = State::empty(layout);
        for place in state.params_kept() {
            trainable.init_part(seed, place.at, &mut state.params[place.own]);
        }
        state
    }

    /// Which parameters are here, and where in `params` they lie.
    pub(crate) fn params_kept(&self) -> Vec<Place> {
        match self.zero {
            Zero::Parameters => self.places.clone(),
            _ => State::whole(self.params.len()),
        }
    }

    /// All of so many, where they lie in the flat vector.
    pub(crate) fn whole(n: usize) -> Vec<Place> {
        vec![Place { at: 0..n, own: 0..n }]
    }

    /// Where the parameters of a place lie.
    pub(crate) fn params_at(&self, place: &Place) -> Range<usize> {
        if self.zero == Zero::Parameters { place.own.clone() } else { place.at.clone() }
    }

    /// Where the gradients of a place lie.
    pub(crate) fn grads_at(&self, place: &Place) -> Range<usize> {
        if self.zero >= Zero::Gradients { place.own.clone() } else { place.at.clone() }
    }

    /// Steps that moved the parameters.
    pub(crate) fn n_updates(&self) -> u64 {
        self.step - self.health.n_skipped
    }

    /// Sets all of `snapshot` but the vectors.
    pub(crate) fn count_to(&self, snapshot: &mut Snapshot) {
        snapshot.step = self.step;
        snapshot.tokens = self.tokens;
        snapshot.elapsed_seconds = self.elapsed_seconds;
        snapshot.health = self.health;
    }

    /// Copies the vectors of a place as they are now, as fast as memory is.
    pub(crate) fn copy_to(&self, pool: &Pool, snapshot: &mut Snapshot, place: &Place) {
        let own = &place.own;
        let vectors =
            [&self.params[self.params_at(place)], &self.adam_m[own.clone()], &self.adam_v[own.clone()]];
        for (bytes, values) in snapshot.vectors.iter_mut().zip(vectors) {
            pool.run_chunks(&mut bytes[4 * own.start..4 * own.end], 4 * COPY_LEN, |i, part| {
                let values = &values[i * COPY_LEN..];
                for (four, value) in part.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *four = value.to_le_bytes();
                }
            });
        }
    }

    /// Copies all of what is owned.
    pub(crate) fn copy_all_to(&self, pool: &Pool, snapshot: &mut Snapshot) {
        self.places.iter().for_each(|place| self.copy_to(pool, snapshot, place));
    }
}
