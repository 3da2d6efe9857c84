//! [`State`]: what changes from step to step.

use std::ops::Range;

use model::{Stripes, Trainable};
use tensor::{Buf, Pool};

use crate::guard::Health;
use crate::layout::{Layout, Place, Zero, places};

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
    /// Running mean of the squared gradient, of what is owned and not of Muon.
    pub(crate) adam_v: Buf<f32>,
    /// Where of the flat vector that is.
    pub(crate) squared: Vec<Place>,
    /// Finished steps, those that were skipped among them.
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) elapsed_seconds: f64,
    pub(crate) health: Health,
}

/// What a rank writes of a [`State`]: vectors in little-endian f32, of what it stores.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    /// Where what is stored of the flat vector lies in the first two of these, in order, and where in the third.
    pub(crate) places: [Vec<Place>; 2],
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
    /// With memory for what is stored, all of it touched: a page that is touched for the first time takes longer than
    /// copying does.
    pub(crate) fn new(places: [Vec<Place>; 2]) -> Snapshot {
        let [n, n_squared] = [0, 1].map(|i: usize| places[i].last().map_or(0, |place| place.own.end));
        let mut snapshot = Snapshot { places, ..Snapshot::default() };
        let lens = [n, n, n_squared];
        snapshot.vectors.iter_mut().zip(lens).for_each(|(bytes, n)| bytes.resize(4 * n, 0));
        snapshot
    }

    /// What of a range of the flat vector is stored of a vector, and where that lies there.
    fn within(&self, vector: usize, range: &Range<usize>) -> Vec<Place> {
        let places = &self.places[usize::from(vector == 2)];
        let first = places.partition_point(|place| place.at.end <= range.start);
        let until = places[first..].iter().take_while(|place| place.at.start < range.end);
        let cut = |place: &Place| {
            let at = place.at.start.max(range.start)..place.at.end.min(range.end);
            let own = place.own.start + (at.start - place.at.start);
            Place { own: own..own + at.len(), at }
        };
        until.map(cut).collect()
    }
}

impl State {
    /// Before the first step, with parameters that are all 0.
    pub(crate) fn empty(layout: &Layout) -> State {
        let n_own = layout.n_own();
        let squared = places(&layout.squared(&layout.owned(layout.rank)));
        let n_params = if layout.zero == Zero::Parameters { n_own } else { layout.n + layout.n_copied };
        State {
            zero: layout.zero,
            places: layout.places(),
            params: Buf::zeroed(n_params),
            adam_m: Buf::zeroed(n_own),
            adam_v: Buf::zeroed(squared.last().map_or(0, |place| place.own.end)),
            squared,
            step: 0,
            tokens: 0,
            elapsed_seconds: 0.0,
            health: Health::default(),
        }
    }

    /// `stripes` says where the rank's flat vector lies in that of the whole model.
    pub(crate) fn initial(layout: &Layout, (whole, stripes): (&Trainable, &Stripes), seed: u64) -> State {
        let mut state = State::empty(layout);
        let kept = stripes.cut(&state.params_kept());
        let mut rest = &mut state.params[..];
        for run in kept.runs() {
            let (values, behind) = rest.split_at_mut(run.len());
            whole.init_part(seed, run, values);
            rest = behind;
        }
        state
    }

    /// Which parameters are here, one behind the other.
    pub(crate) fn params_kept(&self) -> Vec<Range<usize>> {
        match self.zero {
            Zero::Parameters => self.owned(),
            _ => std::iter::once(0..self.params.len()).collect(),
        }
    }

    /// What this rank updates of the flat vector.
    pub(crate) fn owned(&self) -> Vec<Range<usize>> {
        self.places.iter().map(|place| place.at.clone()).collect()
    }

    /// Where the parameters of a place lie.
    pub(crate) fn params_at(&self, place: &Place) -> Range<usize> {
        if self.zero == Zero::Parameters { place.own.clone() } else { place.at.clone() }
    }

    /// Where the gradients of a place lie.
    pub(crate) fn grads_at(&self, place: &Place) -> Range<usize> {
        if self.zero >= Zero::Gradients { place.own.clone() } else { place.at.clone() }
    }

    /// Where the means of squares of a range lie that AdamW updates at once.
    pub(crate) fn squared_at(&self, at: &Range<usize>) -> Range<usize> {
        let place = &self.squared[self.squared.partition_point(|place| place.at.end <= at.start)];
        assert!(place.at.start <= at.start && at.end <= place.at.end, "{at:?} has no squares");
        let start = place.own.start + (at.start - place.at.start);
        start..start + at.len()
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

    /// Copies the vectors of a place as they are now, as far as they are stored, as fast as memory is.
    pub(crate) fn copy_to(&self, pool: &Pool, snapshot: &mut Snapshot, place: &Place) {
        for vector in 0..snapshot.vectors.len() {
            for Place { at, own: to } in snapshot.within(vector, &place.at) {
                let own = place.own.start + (at.start - place.at.start);
                let part = Place { own: own..own + at.len(), at };
                let values = match vector {
                    0 => &self.params[self.params_at(&part)],
                    1 => &self.adam_m[part.own],
                    _ => &self.adam_v[self.squared_at(&part.at)],
                };
                let bytes = &mut snapshot.vectors[vector][4 * to.start..4 * to.end];
                pool.run_chunks(bytes, 4 * COPY_LEN, |i, part| {
                    let values = &values[i * COPY_LEN..];
                    for (four, value) in part.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                        *four = value.to_le_bytes();
                    }
                });
            }
        }
    }

    /// Copies all of what is owned.
    pub(crate) fn copy_all_to(&self, pool: &Pool, snapshot: &mut Snapshot) {
        self.places.iter().for_each(|place| self.copy_to(pool, snapshot, place));
    }
}
