use std::sync::Arc;

use crate::packing::Packing;
use crate::{Dataset, Error, Permutation, Result, Split};

/// The target of a token that has no loss.
pub const NO_TARGET: u32 = u32::MAX;

/// One row of t tokens, as training sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    pub tokens: Vec<u32>,
    /// For each token the id that follows it; [`NO_TARGET`] where nothing is to be learned.
    pub targets: Vec<u32>,
    /// For each token the index in the row of its document's first token: attention reaches back to it and no further.
    pub starts: Vec<u32>,
}

/// The rows of a split, in a new random order every epoch.
///
/// Which row has which index is a pure function of (seed, epoch, index): nothing has to be saved to go on with a run
/// but the index.
#[derive(Clone, Debug)]
pub struct Batches {
    dataset: Dataset,
    split: Split,
    seed: u64,
    t: u64,
    rows: Rows,
}

#[derive(Clone, Debug)]
enum Rows {
    /// Of text: windows of the token stream, `t` apart, with ids of `t + 1`, the targets one further.
    Windows { n: u64, isolated: bool },
    /// Of chats: whole documents, several in a row where they fit. Of pairs the two sides, one after the other.
    Packed { packing: Arc<Packing>, is_pairs: bool },
}

impl Batches {
    /// A split that is smaller than one window, or has nothing to learn, is an error.
    ///
    /// # Panics
    /// If `t` is 0.
    pub fn new(dataset: &Dataset, split: Split, seed: u64, t: usize) -> Result<Batches> {
        assert!(t > 0, "rows of no tokens");
        let info = dataset.info();
        let (t, n_tokens) = (t as u64, info.split(split).n_tokens);
        let rows = match &info.chats {
            Some(chats) => {
                let packing = Arc::new(Packing::new(dataset, split, t as usize, chats.is_pairs)?);
                Rows::Packed { packing, is_pairs: chats.is_pairs }
            }
            None if n_tokens <= t => {
                let (name, split, window_tokens) = (info.name.clone(), split.name(), t + 1);
                return Err(Error::TooSmall { name, split, n_tokens, window_tokens });
            }
            None => Rows::Windows { n: (n_tokens - 1) / t, isolated: false },
        };
        Ok(Batches { dataset: dataset.clone(), split, seed, t, rows })
    }

    /// With documents of text that do not see each other; those of chats never do.
    pub fn isolated(mut self, yes: bool) -> Batches {
        if let Rows::Windows { isolated, .. } = &mut self.rows {
            *isolated = yes;
        }
        self
    }

    /// Rows in an epoch. The last tokens of a stream of text, too few for a row, are in none.
    pub fn n_rows(&self) -> u64 {
        match &self.rows {
            Rows::Windows { n, .. } => *n,
            Rows::Packed { packing, .. } => packing.n_rows(),
        }
    }

    /// Whether rows come in twos: the better answer, and the worse one to the same messages.
    pub fn is_pairs(&self) -> bool {
        matches!(self.rows, Rows::Packed { is_pairs: true, .. })
    }

    /// Documents of chats that are longer than a row and end with it, and those of which nothing to learn is left.
    pub fn n_cut_and_dropped(&self) -> (u64, u64) {
        match &self.rows {
            Rows::Windows { .. } => (0, 0),
            Rows::Packed { packing, .. } => (packing.n_cut, packing.n_dropped),
        }
    }

    /// The epoch, from 0, that a global index lies in.
    pub fn epoch(&self, index: u64) -> u64 {
        index / self.n_rows()
    }

    /// Row `index` of all that a run ever sees, epoch after epoch.
    pub fn row(&self, index: u64) -> Result<Row> {
        let together = if self.is_pairs() { 2 } else { 1 };
        let permutation = Permutation::new(self.n_rows() / together, self.seed, self.epoch(index));
        let place = permutation.at(index % self.n_rows() / together);
        self.row_at(place * together + index % together)
    }

    /// The row at a place, in the order of the documents: for evaluation.
    ///
    /// # Errors
    /// If `row_idx` is not below `n_rows`.
    pub fn row_at(&self, row_idx: u64) -> Result<Row> {
        let t = self.t as usize;
        match &self.rows {
            Rows::Windows { isolated, .. } => {
                let start = row_idx.saturating_mul(self.t);
                let window = self.dataset.tokens(self.split, start..start.saturating_add(self.t + 1))?;
                let starts = match isolated {
                    true => starts_of(&window[..t], self.dataset.info().end_of_text),
                    false => vec![0; t],
                };
                Ok(Row { tokens: window[..t].to_vec(), targets: window[1..].to_vec(), starts })
            }
            Rows::Packed { packing, .. } => packing.row(&self.dataset, self.split, t, row_idx),
        }
    }
}

/// Documents end with `end_of_text`.
fn starts_of(tokens: &[u32], end_of_text: u32) -> Vec<u32> {
    let mut start = 0;
    let start_of = |(i, token): (usize, &u32)| {
        let own = start;
        if *token == end_of_text {
            start = i as u32 + 1;
        }
        own
    };
    tokens.iter().enumerate().map(start_of).collect()
}
