//! Several datasets as one order of rows, each with its weight.

use crate::{Batches, Permutation, Result, Row};

/// Rows (of pairs: pairs) of a cycle, in which every dataset has its share exactly: weights are kept to 1 / 4096.
const CYCLE: u64 = 4096;

/// The rows of a run: those of its datasets, mixed by weight.
///
/// Which row of which dataset has which index is a pure function of (seed, index). Within every cycle of 4096 each
/// dataset has the same number of places, permuted anew in every cycle.
#[derive(Clone, Debug)]
pub struct Mixture {
    parts: Vec<Part>,
    seed: u64,
    /// 2 for pairs, which stay side by side.
    together: u64,
}

#[derive(Clone, Debug)]
struct Part {
    batches: Batches,
    /// Places in a cycle, before they are permuted: `first .. first + n`.
    first: u64,
    n: u64,
}

impl Mixture {
    /// Datasets with their weights, which need not add up to 1. `None` if the weights give some dataset no place, or if
    /// only some of the datasets are pairs.
    pub fn new(parts: Vec<(Batches, f64)>, seed: u64) -> Option<Mixture> {
        let total: f64 = parts.iter().map(|(_, weight)| weight).sum();
        let is_pairs = parts.first()?.0.is_pairs();
        if !(total > 0.0 && total.is_finite())
            || parts.iter().any(|(batches, _)| batches.is_pairs() != is_pairs)
        {
            return None;
        }
        let places = places(&parts.iter().map(|(_, weight)| weight / total).collect::<Vec<_>>());
        let mut first = 0;
        let part = |((batches, _), n): ((Batches, f64), u64)| {
            first += n;
            Part { batches, first: first - n, n }
        };
        let parts: Vec<Part> = parts.into_iter().zip(places).map(part).collect();
        let together = if is_pairs { 2 } else { 1 };
        parts.iter().all(|part| part.n > 0).then_some(Mixture { parts, seed, together })
    }

    /// The dataset (by its place in the list) that row `index` comes from, and the row's index in its order.
    pub fn place(&self, index: u64) -> (usize, u64) {
        // One dataset is in its own order.
        if self.parts.len() == 1 {
            return (0, index);
        }
        let (item, side) = (index / self.together, index % self.together);
        let (cycle, at) = (item / CYCLE, item % CYCLE);
        let at = Permutation::new(CYCLE, self.seed, cycle).at(at);
        let which = self.parts.partition_point(|part| part.first + part.n <= at);
        let part = &self.parts[which];
        (which, (cycle * part.n + at - part.first) * self.together + side)
    }

    pub fn row(&self, index: u64) -> Result<Row> {
        let (part, row) = self.place(index);
        self.parts[part].batches.row(row)
    }

    /// How often the rows of a dataset are seen in the first `n_rows` of the run, about.
    pub fn epochs(&self, part: usize, n_rows: u64) -> f64 {
        let share = if self.parts.len() == 1 { 1.0 } else { self.parts[part].n as f64 / CYCLE as f64 };
        n_rows as f64 * share / self.parts[part].batches.n_rows() as f64
    }

    pub fn is_pairs(&self) -> bool {
        self.together == 2
    }
}

/// Whole places for shares that add up to 1: rounded down, and the rest to the largest remainders.
fn places(shares: &[f64]) -> Vec<u64> {
    let exact: Vec<f64> = shares.iter().map(|share| share * CYCLE as f64).collect();
    let mut places: Vec<u64> = exact.iter().map(|x| *x as u64).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    let remainder = |i: &usize| exact[*i] - exact[*i].floor();
    order.sort_by(|a, b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(b)));
    let rest = CYCLE.saturating_sub(places.iter().sum());
    order.iter().cycle().take(rest as usize).for_each(|&i| places[i] += 1);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_fill_the_cycle() {
        assert_eq!(places(&[0.5, 0.25, 0.25]), [2048, 1024, 1024]);
        assert_eq!(places(&[1.0 / 3.0; 3]), [1366, 1365, 1365]);
        assert_eq!(places(&[0.7, 0.3 - 1e-4, 1e-4]).iter().sum::<u64>(), CYCLE);
        assert_eq!(places(&[0.999_99, 0.000_01])[1], 0);
    }
}
