//! [`Layout`]: which rank keeps which part of the state, and which gradients travel together.
//!
//! The flat vector is cut into parts of [`tree::SHARD_ALIGN`] values, whose squares are summed in one order whoever does it.
//! Every unit of the model (see [`model::Keeper`]) has a bucket: the parts that are complete once it is, after all units
//! behind it. A part that two units share lies in the bucket of the first. Every rank owns an even share of the parts of every
//! bucket, so that all have as much to send for each.

use std::ops::Range;

use comm::tree::{self, SHARD_ALIGN, Shards};
use model::Trainable;

/// What the ranks divide among them instead of copying it (ZeRO, Rajbhandari et al. 2020,
/// <https://arxiv.org/abs/1910.02054>). It changes no bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Zero {
    /// Nothing.
    #[default]
    Nothing,
    /// What the optimizer remembers.
    Optimizer,
    /// Gradients, too.
    Gradients,
    /// And the parameters.
    Parameters,
}

impl Zero {
    /// By the number that the stage has in the paper.
    pub fn of_stage(stage: u8) -> Option<Zero> {
        [Zero::Nothing, Zero::Optimizer, Zero::Gradients, Zero::Parameters].get(usize::from(stage)).copied()
    }

    pub fn stage(self) -> u8 {
        self as u8
    }
}

/// See the module.
pub(crate) struct Layout {
    pub(crate) zero: Zero,
    pub(crate) rank: usize,
    pub(crate) n_ranks: usize,
    /// Of the flat vector.
    pub(crate) n: usize,
    pub(crate) units: Vec<Unit>,
    /// Of every rank, what it owns of the flat vector.
    pub(crate) all: Shards,
    /// Micro-batches that each rank computes in a step.
    pub(crate) n_turns: usize,
}

pub(crate) struct Unit {
    pub(crate) range: Range<usize>,
    pub(crate) bucket: Range<usize>,
    /// Of the bucket, counted from the start of the unit.
    pub(crate) shards: Shards,
    /// Whole parts around the unit.
    pub(crate) window: Range<usize>,
    /// Of the window, counted from its start.
    pub(crate) window_shards: Shards,
}

/// A range of the flat vector, and where it lies in what a rank owns without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) at: Range<usize>,
    pub(crate) own: Range<usize>,
}

impl Layout {
    pub(crate) fn new(
        trainable: &Trainable,
        zero: Zero,
        ranks: [usize; 2],
        n_micro_batches: usize,
    ) -> Layout {
        Layout::of_units(trainable.units(), trainable.n_params(), (zero, ranks), n_micro_batches)
    }

    pub(crate) fn of_units(
        units: Vec<Range<usize>>,
        n: usize,
        (zero, [rank, n_ranks]): (Zero, [usize; 2]),
        n_micro_batches: usize,
    ) -> Layout {
        let up = |at: usize| at.next_multiple_of(SHARD_ALIGN).min(n);
        let buckets: Vec<Range<usize>> = units
            .iter()
            .map(|unit| if unit.start == 0 { 0..up(unit.end) } else { up(unit.start)..up(unit.end) })
            .collect();
        let of_rank = |rank: usize| {
            let owned = buckets.iter().map(|bucket| share(bucket, rank, n_ranks));
            joined(owned.filter(|range| !range.is_empty()))
        };
        let all = Shards::new((0..n_ranks).map(of_rank).collect());
        let unit = |(range, bucket): (Range<usize>, &Range<usize>)| {
            let window = range.start / SHARD_ALIGN * SHARD_ALIGN..up(range.end);
            Unit {
                shards: inside(&all, n_ranks, bucket, range.start),
                window_shards: inside(&all, n_ranks, &window, window.start),
                bucket: bucket.clone(),
                range,
                window,
            }
        };
        let units = units.into_iter().zip(&buckets).map(unit).collect();
        // Alone there is nobody to divide with.
        let zero = if n_ranks == 1 { Zero::Nothing } else { zero };
        Layout { zero, rank, n_ranks, n, units, all, n_turns: n_micro_batches / n_ranks }
    }

    /// The micro-batches of a rank, in the order in which it computes them. Where gradients are divided all ranks compute
    /// neighbours at the same time: their sum is then a node of the tree.
    pub(crate) fn micro_batches(&self, rank: usize) -> Vec<usize> {
        if self.zero >= Zero::Gradients {
            return (0..self.n_turns).map(|turn| turn * self.n_ranks + rank).collect();
        }
        tree::share(self.n_turns * self.n_ranks, rank, self.n_ranks).collect()
    }

    /// What this rank updates and remembers: its shard, or all.
    pub(crate) fn places(&self) -> Vec<Place> {
        match self.zero {
            Zero::Nothing => vec![Place { at: 0..self.n, own: 0..self.n }],
            _ => places(self.all.of(self.rank)),
        }
    }

    /// What each rank writes of a checkpoint: its shard, or the first of them all.
    pub(crate) fn writes(&self) -> Vec<Vec<Range<usize>>> {
        match self.zero {
            Zero::Nothing => std::iter::once(std::iter::once(0..self.n).collect()).collect(),
            _ => (0..self.n_ranks).map(|rank| self.all.of(rank).to_vec()).collect(),
        }
    }

    /// How many numbers this rank updates.
    pub(crate) fn n_own(&self) -> usize {
        if self.zero == Zero::Nothing { self.n } else { self.all.len_of(self.rank) }
    }

    /// What a rank owns of a range.
    pub(crate) fn owned_in(&self, rank: usize, range: &Range<usize>) -> Vec<Range<usize>> {
        let cut = |own: &Range<usize>| own.start.max(range.start)..own.end.min(range.end);
        self.all.of(rank).iter().map(cut).filter(|part| !part.is_empty()).collect()
    }

    /// The unit whose gradients these are.
    pub(crate) fn unit_of(&self, range: &Range<usize>) -> usize {
        self.units.partition_point(|unit| unit.range.end <= range.start)
    }

    /// Where something lies in what this rank owns without gaps.
    pub(crate) fn own_at(&self, at: usize) -> usize {
        let owned = self.all.of(self.rank);
        let before = owned.partition_point(|range| range.end <= at);
        let len: usize = owned[..before].iter().map(|range| range.len()).sum();
        len + at - owned[before].start
    }
}

/// Ranges, one behind the other.
pub(crate) fn places(ranges: &[Range<usize>]) -> Vec<Place> {
    let mut end = 0;
    let place = |at: &Range<usize>| {
        end += at.len();
        Place { at: at.clone(), own: end - at.len()..end }
    };
    ranges.iter().map(place).collect()
}

/// An even share of the parts of a bucket.
fn share(bucket: &Range<usize>, rank: usize, n_ranks: usize) -> Range<usize> {
    let n_parts = bucket.len().div_ceil(SHARD_ALIGN);
    let border = |rank: usize| (bucket.start + n_parts * rank / n_ranks * SHARD_ALIGN).min(bucket.end);
    border(rank)..border(rank + 1)
}

/// What lies in `window`, counted from `first`.
fn inside(all: &Shards, n_ranks: usize, window: &Range<usize>, first: usize) -> Shards {
    let cut = |range: &Range<usize>| {
        let (start, end) = (range.start.max(window.start), range.end.min(window.end));
        (start < end).then(|| start - first..end - first)
    };
    Shards::new((0..n_ranks).map(|rank| all.of(rank).iter().filter_map(cut).collect()).collect())
}

/// Ranges in order, those that touch as one.
fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(rank: usize, n_ranks: usize) -> Layout {
        let config = serde_json::json!({
            "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 200, "vocab_size": 301, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true, "max_position_embeddings": 32,
        });
        let config = model::Config::from_json(config.to_string().as_bytes()).unwrap();
        Layout::new(&Trainable::new(&config), Zero::Gradients, [rank, n_ranks], 16)
    }

    #[test]
    fn every_value_has_one_owner_and_shares_are_even() {
        for n_ranks in [1, 2, 4, 8] {
            let first = layout(0, n_ranks);
            let mut owners = vec![0; first.n];
            for rank in 0..n_ranks {
                first.all.of(rank).iter().flat_map(Clone::clone).for_each(|at| owners[at] += 1);
                let largest = first.units.len() * SHARD_ALIGN + first.n / n_ranks;
                assert!(first.all.len_of(rank) <= largest, "{rank} of {n_ranks}");
            }
            assert!(owners.iter().all(|n| *n == 1), "{n_ranks} ranks");
            let (mut at, mut buckets) = (0, 0);
            for unit in &first.units {
                assert_eq!((unit.range.start, unit.bucket.start), (at, buckets));
                (at, buckets) = (unit.range.end, unit.bucket.end);
                assert!(unit.window.start <= unit.range.start && unit.range.end <= unit.window.end);
                let owned: usize = (0..n_ranks).map(|rank| unit.window_shards.len_of(rank)).sum();
                assert_eq!(owned, unit.window.len());
            }
            assert_eq!((at, buckets), (first.n, first.n));
        }
    }

    #[test]
    fn ranks_compute_every_micro_batch_once() {
        for n_ranks in [2, 4, 8] {
            let mut all: Vec<usize> =
                (0..n_ranks).flat_map(|rank| layout(rank, n_ranks).micro_batches(rank)).collect();
            all.sort_unstable();
            assert_eq!(all, (0..16).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_owned_is_found() {
        let layout = layout(1, 4);
        for Place { at, own } in layout.places() {
            assert_eq!((layout.own_at(at.start), layout.own_at(at.end - 1)), (own.start, own.end - 1));
        }
        assert_eq!(layout.n_own(), layout.places().last().unwrap().own.end);
    }
}
