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
/// <https://arxiv.org/abs/1910.02054>). It changes no bit. Ranks that cannot sum a share of the micro-batches by themselves
/// (see [`tree::are_nodes`]) divide gradients at least.
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
    /// Parameters that lie behind it: of an embedding that another stage trains.
    pub(crate) n_copied: usize,
    pub(crate) units: Vec<Unit>,
    /// What of the flat vector AdamW updates, with a mean of squared gradients: all, but matrices of Muon.
    squared: Vec<Range<usize>>,
    /// Of every rank, what it owns of the flat vector.
    pub(crate) all: Shards,
    /// Micro-batches of a step.
    n_micro_batches: usize,
    /// Of them each rank computes so many, but that in the last turn there may be less than ranks.
    pub(crate) n_turns: usize,
}

/// Where the sum of some neighbouring micro-batches goes: it is the partial sum of this number, and is then merged with so many
/// of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) waiting: usize,
    pub(crate) merges: usize,
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

    /// Of a part that begins so far behind the beginning of the whole model's vector: where its norm is summed is counted from
    /// there.
    pub(crate) fn behind(
        first: usize,
        trainable: &Trainable,
        (zero, ranks): (Zero, [usize; 2]),
        n_micro_batches: usize,
    ) -> Layout {
        let (units, n) = (trainable.units(), trainable.n_params());
        let layout = Layout::of_units_behind(first, (units, n), (zero, ranks), n_micro_batches);
        Layout { n_copied: trainable.n_values() - n, ..layout }
    }

    pub(crate) fn of_units(
        units: Vec<Range<usize>>,
        n: usize,
        (zero, [rank, n_ranks]): (Zero, [usize; 2]),
        n_micro_batches: usize,
    ) -> Layout {
        Layout::of_units_behind(0, (units, n), (zero, [rank, n_ranks]), n_micro_batches)
    }

    fn of_units_behind(
        first: usize,
        (units, n): (Vec<Range<usize>>, usize),
        (zero, [rank, n_ranks]): (Zero, [usize; 2]),
        n_micro_batches: usize,
    ) -> Layout {
        // Into the part in which the vector begins.
        let into = first % SHARD_ALIGN;
        // What ends where it begins has no part.
        let up = |at: usize| match at {
            0 => 0,
            _ => ((at + into).next_multiple_of(SHARD_ALIGN) - into).min(n),
        };
        let buckets: Vec<Range<usize>> = units
            .iter()
            .map(|unit| if unit.start == 0 { 0..up(unit.end) } else { up(unit.start)..up(unit.end) })
            .collect();
        let of_rank = |rank: usize| {
            let owned = buckets.iter().map(|bucket| share((bucket, into), rank, n_ranks));
            joined(owned.filter(|range| !range.is_empty()))
        };
        let all = Shards::new((0..n_ranks).map(of_rank).collect());
        let unit = |(range, bucket): (Range<usize>, &Range<usize>)| {
            let window = ((range.start + into) / SHARD_ALIGN * SHARD_ALIGN).max(into) - into..up(range.end);
            Unit {
                shards: inside(&all, n_ranks, bucket, range.start),
                window_shards: inside(&all, n_ranks, &window, window.start),
                bucket: bucket.clone(),
                range,
                window,
            }
        };
        let units = units.into_iter().zip(&buckets).map(unit).collect();
        let zero = zero_of(zero, n_ranks, n_micro_batches);
        let n_turns = n_micro_batches.div_ceil(n_ranks);
        let squared = std::iter::once(0..n).collect();
        Layout { zero, rank, n_ranks, n, n_copied: 0, units, squared, all, n_micro_batches, n_turns }
    }

    /// Where Muon updates these matrices, which are in order.
    pub(crate) fn with_muon(self, matrices: &[Range<usize>]) -> Layout {
        Layout { squared: between(matrices, self.n), ..self }
    }

    /// The nodes of the tree over all micro-batches that ranks compute in a turn, where gradients are divided.
    fn nodes(&self, turn: usize) -> Vec<Range<usize>> {
        let end = ((turn + 1) * self.n_ranks).min(self.n_micro_batches);
        tree::nodes(turn * self.n_ranks..end, self.n_micro_batches)
    }

    /// Of each of these which ranks compute it.
    pub(crate) fn ranks_of_nodes(&self, turn: usize) -> Vec<Range<usize>> {
        let first = turn * self.n_ranks;
        self.nodes(turn).into_iter().map(|node| node.start - first..node.end - first).collect()
    }

    /// And where its sum goes.
    pub(crate) fn slots(&self, turn: usize) -> Vec<Slot> {
        let n = self.n_micro_batches;
        let slot = |node: Range<usize>| Slot {
            waiting: tree::nodes(0..node.start, n).len(),
            merges: tree::merges_of(&node, n),
        };
        self.nodes(turn).into_iter().map(slot).collect()
    }

    /// Partial sums that there are at most.
    pub(crate) fn n_sums(&self) -> usize {
        if self.zero < Zero::Gradients {
            return tree::depth(self.n_turns);
        }
        let slots = (0..self.n_turns).flat_map(|turn| self.slots(turn));
        slots.map(|slot| slot.waiting + 1).max().unwrap_or(0)
    }

    /// The micro-batches of a rank, in the order in which it computes them. Where gradients are divided all ranks compute
    /// neighbours at the same time: their sum is then a node of the tree.
    pub(crate) fn micro_batches(&self, rank: usize) -> Vec<usize> {
        if self.zero >= Zero::Gradients {
            return (rank..self.n_micro_batches).step_by(self.n_ranks).collect();
        }
        tree::share(self.n_micro_batches, rank, self.n_ranks).collect()
    }

    /// Ranks that own something: where nothing is divided the first stands for all.
    pub(crate) fn n_owners(&self) -> usize {
        if self.zero == Zero::Nothing { 1 } else { self.n_ranks }
    }

    /// What a rank owns: its shard, or all.
    pub(crate) fn owned(&self, rank: usize) -> Vec<Range<usize>> {
        match self.zero {
            Zero::Nothing => std::iter::once(0..self.n).collect(),
            _ => self.all.of(rank).to_vec(),
        }
    }

    /// What this rank updates and remembers.
    pub(crate) fn places(&self) -> Vec<Place> {
        places(&self.owned(self.rank))
    }

    /// Of these ranges what has a mean of squared gradients.
    pub(crate) fn squared(&self, ranges: &[Range<usize>]) -> Vec<Range<usize>> {
        let cut = |range: &Range<usize>| {
            let both = self.squared.iter().map(|s| s.start.max(range.start)..s.end.min(range.end));
            both.filter(|both| !both.is_empty()).collect::<Vec<_>>()
        };
        ranges.iter().flat_map(cut).collect()
    }

    /// How many numbers of what this rank updates have one.
    pub(crate) fn n_squared(&self) -> usize {
        self.squared(&self.owned(self.rank)).iter().map(|range| range.len()).sum()
    }

    /// How many numbers this rank updates.
    pub(crate) fn n_own(&self) -> usize {
        if self.zero == Zero::Nothing { self.n } else { self.all.len_of(self.rank) }
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

/// What so many ranks divide that are to divide `asked`.
fn zero_of(asked: Zero, n_ranks: usize, n_micro_batches: usize) -> Zero {
    match () {
        // Alone there is nobody to divide with.
        () if n_ranks == 1 => Zero::Nothing,
        // What a rank computes is no node of the tree: it can keep no sum of its own.
        () if !tree::are_nodes(n_micro_batches, n_ranks) => asked.max(Zero::Gradients),
        () => asked,
    }
}

/// What of `0..n` lies between matrices, which are in order.
pub(crate) fn between(matrices: &[Range<usize>], n: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    for matrix in matrices.iter().cloned().chain(std::iter::once(n..n)) {
        if at < matrix.start {
            ranges.push(at..matrix.start);
        }
        at = matrix.end;
    }
    ranges
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

/// An even share of the parts of a bucket of a vector that begins so far into a part.
fn share((bucket, into): (&Range<usize>, usize), rank: usize, n_ranks: usize) -> Range<usize> {
    let (start, end) = (bucket.start + into, bucket.end + into);
    let first = start / SHARD_ALIGN * SHARD_ALIGN;
    let n_parts = (end - first).div_ceil(SHARD_ALIGN);
    let border = |rank: usize| (first + n_parts * rank / n_ranks * SHARD_ALIGN).clamp(start, end) - into;
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
        for n_ranks in [1, 2, 3, 4, 8] {
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
        for n_ranks in [2, 3, 4, 5, 8, 16] {
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
