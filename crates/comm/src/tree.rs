//! The fixed order of sums.
//!
//! Floating-point sums depend on their order. A step's gradient is the sum over its micro-batches
//! `0 .. m`, taken as one binary tree that splits a range into halves:
//! `sum(lo, hi) = sum(lo, mid) + sum(mid, hi)`, `mid = lo + (hi - lo) / 2`.
//! When the number of ranks is a power of two that divides `m`, the range of each rank is a node of
//! that tree, so it does not matter who computes which node: 1, 2, 4 or 8 ranks give the same bits.
//! Other ranks compute neighbouring micro-batches at a time, and whoever owns a number sums the few
//! nodes that those make up ([`nodes`]): the same bits again, for more messages.

use std::ops::Range;
use std::sync::Arc;

/// The micro-batches of one rank out of `0 .. n_items`: a node of the tree.
///
/// Panics if `n_ranks` does not divide `n_items` (the plan has checked that).
pub fn share(n_items: usize, rank: usize, n_ranks: usize) -> Range<usize> {
    assert!(n_ranks > 0 && n_items.is_multiple_of(n_ranks), "{n_items} micro-batches on {n_ranks} ranks");
    let per_rank = n_items / n_ranks;
    rank * per_rank..(rank + 1) * per_rank
}

/// Shards begin at multiples of so many values: what is summed in parts of this length has the same parts whoever sums
/// them. The norm of a gradient is.
pub const SHARD_ALIGN: usize = 16 << 10;

/// The part of `0 .. len` that a rank sums, and owns where state is divided among ranks.
pub fn shard(len: usize, rank: usize, n_ranks: usize) -> Range<usize> {
    let n_parts = len.div_ceil(SHARD_ALIGN);
    let border = |rank: usize| (n_parts * rank / n_ranks * SHARD_ALIGN).min(len);
    border(rank)..border(rank + 1)
}

/// Whether the ranks' shares of so many items, in order, are nodes of the tree, so that each can sum its own.
pub fn are_nodes(n_items: usize, n_ranks: usize) -> bool {
    n_ranks > 0 && n_items.is_multiple_of(n_ranks) && (n_ranks.is_power_of_two() || n_ranks == n_items)
}

/// The fewest nodes of the tree over `n_leaves` that make up `leaves`, in order.
pub fn nodes(leaves: Range<usize>, n_leaves: usize) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    push_nodes(&leaves, 0..n_leaves, &mut found);
    found
}

fn push_nodes(leaves: &Range<usize>, node: Range<usize>, found: &mut Vec<Range<usize>>) {
    if node.start >= leaves.end || node.end <= leaves.start {
        return;
    }
    if leaves.start <= node.start && node.end <= leaves.end {
        return found.push(node);
    }
    let mid = node.start + node.len() / 2;
    push_nodes(leaves, node.start..mid, found);
    push_nodes(leaves, mid..node.end, found);
}

/// Of a vector what every rank sums, and owns where state is divided among ranks: ranges that do not overlap, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    of_ranks: Arc<[Vec<Range<usize>>]>,
    /// Which ranks' values make up a sum; in order, not always all.
    nodes: Arc<[Range<usize>]>,
}

impl Shards {
    pub fn new(of_ranks: Vec<Vec<Range<usize>>>) -> Shards {
        let all = std::iter::once(0..of_ranks.len()).collect();
        Shards { of_ranks: of_ranks.into(), nodes: all }
    }

    /// Of a reduce-scatter: not one sum over all ranks, but one over each of these ranges of them. The sums of the first lie
    /// where they do without it, those of the next [`Shards::end`] behind, and so on.
    pub fn with_nodes(self, nodes: &[Range<usize>]) -> Shards {
        Shards { nodes: nodes.into(), ..self }
    }

    /// Where the shards of all end.
    pub fn end(&self) -> usize {
        self.of_ranks.iter().flatten().map(|range| range.end).max().unwrap_or(0)
    }

    /// The sums over `own` of what every rank has brought of it, each with where it begins.
    pub(crate) fn sums(&self, own: &Range<usize>, parts: &[&[f32]], give: &mut dyn FnMut(usize, Sum)) {
        let end = self.end();
        for (i, node) in self.nodes.iter().enumerate() {
            give(own.start + i * end, Sum(&parts[node.clone()]));
        }
    }

    /// One [`shard`] each.
    pub fn even(len: usize, n_ranks: usize) -> Shards {
        Shards::new((0..n_ranks).map(|rank| vec![shard(len, rank, n_ranks)]).collect())
    }

    pub fn of(&self, rank: usize) -> &[Range<usize>] {
        &self.of_ranks[rank]
    }

    /// How many values a rank owns.
    pub fn len_of(&self, rank: usize) -> usize {
        self.of(rank).iter().map(|range| range.len()).sum()
    }

    /// What a rank owns of `values`, without gaps.
    pub fn own(&self, rank: usize, values: &[f32]) -> Arc<[f32]> {
        self.of(rank).iter().flat_map(|range| &values[range.clone()]).copied().collect()
    }

    /// A rank's ranges in pieces of at most `len`, each with where it lies in what the rank owns without gaps.
    pub(crate) fn pieces(&self, rank: usize, len: usize) -> Vec<(Range<usize>, usize)> {
        let pieces = self.of(rank).iter().flat_map(|range| crate::pieces(range.clone(), len));
        let mut at = 0;
        let place = |piece: Range<usize>| {
            at += piece.len();
            (piece.clone(), at - piece.len())
        };
        pieces.map(place).collect()
    }
}

/// Vectors whose sum is wanted.
pub(crate) struct Sum<'a>(&'a [&'a [f32]]);

impl Sum<'_> {
    /// In the order of the tree.
    pub(crate) fn write(&self, out: &mut [f32]) {
        sum(self.0, out);
    }
}

/// How many sums of two are done once leaf `leaf` of `n_leaves` is there, in the order of [`reduce`]: each adds the newest
/// partial sum to the one before it. Leaves may so be summed part by part as they come.
pub fn merges(leaf: usize, n_leaves: usize) -> usize {
    assert!(leaf < n_leaves, "leaf {leaf} of {n_leaves}");
    let (mut items, mut n) = (0..n_leaves, 0);
    while items.len() > 1 {
        let mid = items.start + items.len() / 2;
        if leaf < mid {
            (items, n) = (items.start..mid, 0);
        } else {
            // The right half ends here or later: its end is the end of the whole.
            (items, n) = (mid..items.end, n + 1);
        }
    }
    n
}

/// As [`merges`], once the sum of a whole node is there.
pub fn merges_of(node: &Range<usize>, n_leaves: usize) -> usize {
    // What its own sum takes is done.
    merges(node.end - 1, n_leaves) - merges(node.len() - 1, node.len())
}

/// Partial sums that wait at most while `n_leaves` are summed, with the newest leaf.
pub fn depth(n_leaves: usize) -> usize {
    let mut waiting = 0;
    let deepest = (0..n_leaves).map(|leaf| {
        waiting += 1;
        let deepest = waiting;
        waiting -= merges(leaf, n_leaves);
        deepest
    });
    deepest.max().unwrap_or(0)
}

/// Sums the vectors that `leaf(item, out)` writes, for every item of `items`, in tree order, into `out`.
///
/// `spare` holds one buffer for each level of the tree (`ceil(log2(items.len()))`); it grows on first use
/// and is kept by the caller so that later steps allocate nothing.
pub fn reduce<E, F: FnMut(usize, &mut [f32]) -> Result<(), E>>(
    items: Range<usize>,
    out: &mut [f32],
    spare: &mut Vec<Vec<f32>>,
    leaf: &mut F,
) -> Result<(), E> {
    assert!(!items.is_empty(), "a sum over no micro-batches");
    if items.len() == 1 {
        return leaf(items.start, out);
    }
    let mid = items.start + items.len() / 2;
    reduce(items.start..mid, out, spare, leaf)?;
    let mut right = spare.pop().unwrap_or_default();
    right.resize(out.len(), 0.0);
    let summed = reduce(mid..items.end, &mut right, spare, leaf);
    add(out, &right);
    spare.push(right);
    summed
}

/// Values that are summed at a time: so many of every rank stay in the first cache. 4 KiB each.
const BLOCK: usize = 1 << 10;

/// Sums vectors of one length in tree order, into `out`: what [`reduce`] does, across ranks.
pub(crate) fn sum(parts: &[&[f32]], out: &mut [f32]) {
    let mut spare = Vec::new();
    for (i, out) in out.chunks_mut(BLOCK).enumerate() {
        sum_block(parts, i * BLOCK, out, &mut spare);
    }
}

fn sum_block(parts: &[&[f32]], at: usize, out: &mut [f32], spare: &mut Vec<[f32; BLOCK]>) {
    let n = out.len();
    match parts {
        [one] => out.copy_from_slice(&one[at..at + n]),
        [a, b] => {
            for ((sum, a), b) in out.iter_mut().zip(&a[at..at + n]).zip(&b[at..at + n]) {
                *sum = a + b;
            }
        }
        _ => {
            let (left, right) = parts.split_at(parts.len() / 2);
            sum_block(left, at, out, spare);
            let mut sums = spare.pop().unwrap_or([0.0; BLOCK]);
            sum_block(right, at, &mut sums[..n], spare);
            add(out, &sums[..n]);
            spare.push(sums);
        }
    }
}

fn add(sum: &mut [f32], other: &[f32]) {
    for (s, o) in sum.iter_mut().zip(other) {
        *s += o;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf_value(item: usize, at: usize) -> f32 {
        // Values of very different sizes, so that another order of sums gives other bits.
        let x = ((item * 7919 + at * 104_729) % 1013) as f32;
        x * 10f32.powi((item % 7) as i32 - 3)
    }

    fn sum_of(items: Range<usize>, width: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; width];
        let mut leaf = |item: usize, out: &mut [f32]| {
            for (at, o) in out.iter_mut().enumerate() {
                *o = leaf_value(item, at);
            }
            Ok::<(), ()>(())
        };
        reduce(items, &mut out, &mut Vec::new(), &mut leaf).unwrap();
        out
    }

    #[test]
    fn ranks_shares_are_nodes_of_the_tree() {
        for n_items in [8, 16, 24, 40] {
            let whole = sum_of(0..n_items, 2500);
            for n_ranks in [1, 2, 4, 8] {
                let parts: Vec<Vec<f32>> =
                    (0..n_ranks).map(|rank| sum_of(share(n_items, rank, n_ranks), 2500)).collect();
                let parts: Vec<&[f32]> = parts.iter().map(|p| p.as_slice()).collect();
                let mut summed = vec![0.0; 2500];
                sum(&parts, &mut summed);
                for at in 0..2500 {
                    assert_eq!(summed[at].to_bits(), whole[at].to_bits(), "{n_items} on {n_ranks}");
                }
            }
        }
    }

    #[test]
    fn leaves_summed_as_they_come_give_the_same_bits() {
        for n_items in 1..=40 {
            let mut sums: Vec<Vec<f32>> = Vec::new();
            let mut deepest = 0;
            for item in 0..n_items {
                sums.push((0..100).map(|at| leaf_value(item, at)).collect());
                deepest = deepest.max(sums.len());
                for _ in 0..merges(item, n_items) {
                    let right = sums.pop().unwrap();
                    add(sums.last_mut().unwrap(), &right);
                }
            }
            let [sum] = &sums[..] else { panic!("{n_items}: {} sums are left", sums.len()) };
            let whole = sum_of(0..n_items, 100);
            assert!(sum.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits()), "{n_items}");
            assert_eq!(depth(n_items), deepest);
        }
    }

    #[test]
    fn leaves_dealt_out_in_turns_are_nodes_too_where_turns_are_a_power_of_two() {
        for (n_ranks, n_turns) in [(2, 1), (2, 4), (4, 2), (8, 4), (4, 1)] {
            let n_items = n_ranks * n_turns;
            let whole = sum_of(0..n_items, 50);
            let turns: Vec<Vec<f32>> =
                (0..n_turns).map(|turn| sum_of(turn * n_ranks..(turn + 1) * n_ranks, 50)).collect();
            let turns: Vec<&[f32]> = turns.iter().map(|turn| &turn[..]).collect();
            let mut summed = vec![0.0; 50];
            sum(&turns, &mut summed);
            assert!(summed.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits()), "{n_ranks}");
        }
    }

    /// Leaves dealt out in turns of any number of ranks, some of whom have nothing to do in the last one.
    #[test]
    fn nodes_summed_as_they_come_give_the_same_bits_on_any_number_of_ranks() {
        for n_items in 1..=24 {
            let whole = sum_of(0..n_items, 20);
            for n_ranks in 1..=n_items {
                let mut sums: Vec<Vec<f32>> = Vec::new();
                for first in (0..n_items).step_by(n_ranks) {
                    for node in nodes(first..(first + n_ranks).min(n_items), n_items) {
                        assert_eq!(sums.len(), nodes(0..node.start, n_items).len(), "what waits");
                        sums.push(sum_of_node(node.clone(), n_items, 20));
                        for _ in 0..merges_of(&node, n_items) {
                            let right = sums.pop().unwrap();
                            add(sums.last_mut().unwrap(), &right);
                        }
                    }
                }
                let [sum] = &sums[..] else { panic!("{n_items}: {} sums are left", sums.len()) };
                assert!(
                    sum.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{n_items} {n_ranks}"
                );
            }
        }
    }

    fn sum_of_node(node: Range<usize>, n_items: usize, width: usize) -> Vec<f32> {
        assert_eq!(nodes(node.clone(), n_items), std::slice::from_ref(&node), "a node is one");
        sum_of(node, width)
    }

    #[test]
    fn the_order_matters_for_these_values() {
        let trees = sum_of(0..24, 64);
        let orders_differ = |at: usize| {
            let forward: f32 = (0..24).map(|item| leaf_value(item, at)).sum();
            forward.to_bits() != trees[at].to_bits()
        };
        assert!((0..64).any(orders_differ), "the test values are too tame to prove anything");
    }

    #[test]
    fn shards_are_disjoint_and_aligned() {
        for len in [0, 1, SHARD_ALIGN, 5 * SHARD_ALIGN + 3, 64 * SHARD_ALIGN] {
            for n_ranks in [1, 2, 4, 8] {
                let shards: Vec<_> = (0..n_ranks).map(|rank| shard(len, rank, n_ranks)).collect();
                assert_eq!((shards[0].start, shards[n_ranks - 1].end), (0, len));
                assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start), "{shards:?}");
                let is_aligned = |at: usize| at == len || at.is_multiple_of(SHARD_ALIGN);
                assert!(shards.iter().all(|s| is_aligned(s.start)), "{shards:?}");
            }
        }
    }

    #[test]
    fn a_failing_leaf_is_reported() {
        let mut leaf = |item: usize, _: &mut [f32]| if item == 3 { Err(item) } else { Ok(()) };
        assert_eq!(reduce(0..8, &mut [0.0], &mut Vec::new(), &mut leaf), Err(3));
    }
}
