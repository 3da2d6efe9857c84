//! Gradients that travel before their unit is complete.
//!
//! An embedding that is the head as well has nearly all of its gradients at the beginning of the backward pass, and is complete
//! at its end, when nothing is left to compute beside its exchange: of GPT-2's 124 million gradients it is 31 %. So it travels
//! when it is settled, and in the end once more the few blocks that were open on some rank. Each number is summed in the same
//! order either way.

use std::ops::Range;
use std::sync::Arc;

use comm::Pending;
use comm::tree::Shards;

use crate::layout::Unit;

/// Values that travel together the second time.
const BLOCK: usize = 64;

/// Some of the blocks of the flat vector that lie in a unit's bucket, or touch it.
#[derive(Clone)]
pub(crate) struct Blocks {
    bucket: Range<usize>,
    /// One bit a block, from the one on in which the bucket begins.
    words: Vec<u32>,
}

/// What is under way early.
pub(crate) struct Early {
    pub(crate) unit: usize,
    /// Blocks that were open on this rank.
    pub(crate) open: Blocks,
    /// All values, those in open blocks worth nothing.
    pub(crate) values: Pending,
    /// Every rank's open blocks.
    pub(crate) blocks: Pending,
}

/// Blocks that travel by themselves: where each begins among them, and its range.
pub(crate) struct Rows(Vec<(usize, Range<usize>)>);

impl Blocks {
    /// Those that touch one of `ranges`, and those that the unit behind has a part in.
    pub(crate) fn touching(unit: &Unit, ranges: &[Range<usize>]) -> Blocks {
        let bucket = unit.bucket.clone();
        let n_blocks = bucket.end.div_ceil(BLOCK) - bucket.start / BLOCK;
        let mut blocks = Blocks { words: vec![0; n_blocks.div_ceil(32)], bucket };
        ranges.iter().for_each(|range| blocks.add(range));
        blocks.add(&(unit.range.end..unit.bucket.end));
        blocks
    }

    fn add(&mut self, range: &Range<usize>) {
        let range = range.start.max(self.bucket.start)..range.end.min(self.bucket.end);
        if range.is_empty() {
            return;
        }
        let first = self.bucket.start / BLOCK;
        for block in range.start / BLOCK - first..range.end.div_ceil(BLOCK) - first {
            self.words[block / 32] |= 1 << (block % 32);
        }
    }

    /// As numbers that are only copied.
    pub(crate) fn to_numbers(&self) -> Arc<[f32]> {
        self.words.iter().map(|word| f32::from_bits(*word)).collect()
    }

    /// Where every rank's blocks are among those of all.
    pub(crate) fn shards(&self, n_ranks: usize) -> Shards {
        let n = self.words.len();
        Shards::new((0..n_ranks).map(|rank| std::iter::once(rank * n..(rank + 1) * n).collect()).collect())
    }

    /// Adds what another rank has, of which `numbers` are those from `at` on.
    pub(crate) fn join(&mut self, at: usize, numbers: &[f32]) {
        let n = self.words.len();
        for (i, number) in numbers.iter().enumerate() {
            self.words[(at + i) % n] |= number.to_bits();
        }
    }

    /// Ranges of the bucket that lie in these blocks, or where not `inside` in none of them. In order, as long as can be.
    pub(crate) fn ranges(&self, inside: bool) -> Vec<Range<usize>> {
        let first = self.bucket.start / BLOCK;
        let n_blocks = self.bucket.end.div_ceil(BLOCK) - first;
        let is_in = |block: &usize| (self.words[block / 32] >> (block % 32) & 1 == 1) == inside;
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for block in (0..n_blocks).filter(is_in) {
            let start = ((first + block) * BLOCK).max(self.bucket.start);
            let end = ((first + block + 1) * BLOCK).min(self.bucket.end);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

impl Rows {
    pub(crate) fn new(blocks: &Blocks) -> Rows {
        let mut end = 0;
        let row = |range: Range<usize>| {
            end += range.len();
            (end - range.len(), range)
        };
        Rows(blocks.ranges(true).into_iter().map(row).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.last().map_or(0, |(at, range)| at + range.len())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(usize, Range<usize>)> {
        self.0.iter()
    }

    /// What each rank owns of them, as it owns the unit's bucket.
    pub(crate) fn shards(&self, unit: &Unit, n_ranks: usize) -> Shards {
        let of_rank = |rank: usize| {
            let owned = unit.shards.of(rank).iter();
            let owned = owned.map(|own| unit.range.start + own.start..unit.range.start + own.end);
            let parts = owned.flat_map(|own| self.0.iter().map(move |(at, range)| cut(*at, range, &own)));
            parts.flatten().collect()
        };
        Shards::new((0..n_ranks).map(of_rank).collect())
    }

    /// Where the numbers from `at` on of these belong: parts of the piece, and their ranges.
    pub(crate) fn places(&self, at: usize, len: usize) -> Vec<(Range<usize>, Range<usize>)> {
        let first = self.0.partition_point(|(start, range)| start + range.len() <= at);
        let until = self.0[first..].iter().take_while(|(start, _)| *start < at + len);
        let place = |(start, range): &(usize, Range<usize>)| {
            let (from, to) = (at.max(*start), (at + len).min(start + range.len()));
            (from - at..to - at, range.start + (from - start)..range.start + (to - start))
        };
        until.map(place).collect()
    }
}

/// What of a row lies in `own`, counted as the rows lie one behind the other.
fn cut(at: usize, range: &Range<usize>, own: &Range<usize>) -> Option<Range<usize>> {
    let (start, end) = (range.start.max(own.start), range.end.min(own.end));
    (start < end).then(|| at + (start - range.start)..at + (end - range.start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Layout, Zero};

    /// Of units that begin inside of parts, and of blocks.
    fn unit(n_ranks: usize) -> Unit {
        let units = [0..100_013, 100_013..150_007].map(|range: Range<usize>| range);
        let layout = Layout::of_units(units.to_vec(), 150_007, (Zero::Gradients, [0, n_ranks]), n_ranks);
        layout.units.into_iter().next().unwrap()
    }

    #[test]
    fn blocks_are_what_is_open_on_some_rank() {
        let unit = unit(2);
        let mut open = Blocks::touching(&unit, &[3..5, 130..200]);
        let behind = 100_013 / BLOCK * BLOCK..unit.bucket.end;
        assert_eq!(open.ranges(true), [0..64, 128..256, behind.clone()]);
        assert_eq!(open.ranges(false), [64..128, 256..behind.start]);
        let other = Blocks::touching(&unit, std::slice::from_ref(&(64..65)));
        // In pieces, as they come.
        let (numbers, n) = (other.to_numbers(), other.words.len());
        open.join(n, &numbers[..7]);
        open.join(n + 7, &numbers[7..]);
        assert_eq!(open.ranges(true), [0..256, behind]);
        assert_eq!(open.shards(2).of(1), std::slice::from_ref(&(n..2 * n)));
    }

    #[test]
    fn rows_go_where_they_came_from() {
        let unit = unit(4);
        let rows = Rows::new(&Blocks::touching(&unit, &[10..20, 50_000..70_000, 99_000..99_001]));
        let ranges: Vec<Range<usize>> = rows.iter().map(|(_, range)| range.clone()).collect();
        assert_eq!(rows.len(), ranges.iter().map(|range| range.len()).sum::<usize>());
        let all: Vec<usize> = ranges.into_iter().flatten().collect();
        for (at, len) in [(0, rows.len()), (5, 100), (60, 20_000), (rows.len() - 1, 1), (7, 0)] {
            let places = rows.places(at, len);
            let found: Vec<usize> = places.iter().flat_map(|(_, range)| range.clone()).collect();
            assert_eq!(found, all[at..at + len], "{at}, {len}");
            let parts: Vec<usize> = places.into_iter().flat_map(|(part, _)| part).collect();
            assert_eq!(parts, (0..len).collect::<Vec<_>>());
        }
        let shards = rows.shards(&unit, 4);
        let mut owned = 0;
        for rank in 0..4 {
            for at in shards.of(rank).iter().flat_map(Clone::clone) {
                let is_own = |own: &Range<usize>| own.contains(&(all[at] - unit.range.start));
                assert!(unit.shards.of(rank).iter().any(is_own), "{at} of {rank}");
                owned += 1;
            }
        }
        assert_eq!(owned, rows.len());
    }
}
