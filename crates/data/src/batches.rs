use crate::{Dataset, Error, Permutation, Result, Split};

/// A split's token stream as training sees it: windows of `t + 1` ids (inputs, and targets one further), `t` apart, in
/// a new random order every epoch.
///
/// Which window has which index is a pure function of (seed, epoch, index): nothing has to be saved to go on with a run
/// but the index.
#[derive(Clone, Debug)]
pub struct Batches {
    dataset: Dataset,
    split: Split,
    seed: u64,
    t: u64,
    n_windows: u64,
}

impl Batches {
    /// A split that is smaller than one window is an error.
    ///
    /// # Panics
    /// If `t` is 0.
    pub fn new(dataset: &Dataset, split: Split, seed: u64, t: usize) -> Result<Batches> {
        assert!(t > 0, "windows of no tokens");
        let (t, n_tokens) = (t as u64, dataset.info().split(split).n_tokens);
        if n_tokens <= t {
            let (name, split, window_tokens) = (dataset.info().name.clone(), split.name(), t + 1);
            return Err(Error::TooSmall { name, split, n_tokens, window_tokens });
        }
        Ok(Batches { dataset: dataset.clone(), split, seed, t, n_windows: (n_tokens - 1) / t })
    }

    /// Windows in an epoch. The last tokens of the stream, too few for a window, are in none.
    pub fn n_windows(&self) -> u64 {
        self.n_windows
    }

    /// The epoch, from 0, that a global index lies in.
    pub fn epoch(&self, index: u64) -> u64 {
        index / self.n_windows
    }

    /// The `t + 1` ids at a global index: window `index` of all that a run ever sees, epoch after epoch.
    pub fn window(&self, index: u64) -> Result<Vec<u32>> {
        let permutation = Permutation::new(self.n_windows, self.seed, self.epoch(index));
        self.window_at(permutation.at(index % self.n_windows))
    }

    /// The `t + 1` ids at a place in the stream, in the order of the documents: for evaluation.
    ///
    /// # Errors
    /// If `window_idx` is not below `n_windows`.
    pub fn window_at(&self, window_idx: u64) -> Result<Vec<u32>> {
        let start = window_idx.saturating_mul(self.t);
        self.dataset.tokens(self.split, start..start.saturating_add(self.t + 1))
    }
}
