//! [`State`]: what changes from step to step.

use std::ops::Range;

use model::Trainable;
use tensor::{Buf, Pool};

use crate::guard::Health;

/// What changes from step to step.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) params: Buf<f32>,
    /// The parameters that this rank updates: all, or where ranks divide them its shard.
    pub(crate) owned: Range<usize>,
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

/// A [`State`] as it is written: vectors in little-endian f32.
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
    pub(crate) fn initial(trainable: &Trainable, seed: u64) -> State {
        let n = trainable.n_params();
        State {
            params: trainable.init(seed),
            owned: 0..n,
            adam_m: Buf::zeroed(n),
            adam_v: Buf::zeroed(n),
            step: 0,
            tokens: 0,
            elapsed_seconds: 0.0,
            health: Health::default(),
        }
    }

    /// Steps that moved the parameters.
    pub(crate) fn n_updates(&self) -> u64 {
        self.step - self.health.n_skipped
    }

    /// Keeps the means of these parameters only, out of all.
    pub(crate) fn divide(&mut self, owned: Range<usize>) {
        if owned.len() < self.params.len() {
            self.adam_m = Buf::from_slice(&self.adam_m[owned.clone()]);
            self.adam_v = Buf::from_slice(&self.adam_v[owned.clone()]);
            self.owned = owned;
        }
    }

    /// Sets all of `snapshot` but the vectors.
    pub(crate) fn count_to(&self, snapshot: &mut Snapshot) {
        snapshot.step = self.step;
        snapshot.tokens = self.tokens;
        snapshot.elapsed_seconds = self.elapsed_seconds;
        snapshot.health = self.health;
    }

    /// Copies a part of the vectors as it is now, of which nothing is another rank's, as fast as memory is.
    pub(crate) fn copy_to(&self, pool: &Pool, snapshot: &mut Snapshot, range: Range<usize>) {
        let vectors = [&self.params, &self.adam_m, &self.adam_v];
        for (bytes, values) in snapshot.vectors.iter_mut().zip(vectors) {
            let (bytes, values) = (&mut bytes[4 * range.start..4 * range.end], &values[range.clone()]);
            pool.run_chunks(bytes, 4 * COPY_LEN, |i, part| {
                let values = &values[i * COPY_LEN..];
                for (four, value) in part.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *four = value.to_le_bytes();
                }
            });
        }
    }

    /// The state that a snapshot was taken of.
    pub(crate) fn from_snapshot(snapshot: &Snapshot) -> State {
        let [params, adam_m, adam_v] = snapshot.vectors.each_ref().map(|bytes| values(bytes));
        let Snapshot { step, tokens, elapsed_seconds, health, .. } = *snapshot;
        State { owned: 0..params.len(), params, adam_m, adam_v, step, tokens, elapsed_seconds, health }
    }
}

/// What little-endian bytes stand for.
pub(crate) fn values(bytes: &[u8]) -> Buf<f32> {
    let mut values = Buf::zeroed(bytes.len() / 4);
    for (value, four) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*four);
    }
    values
}
