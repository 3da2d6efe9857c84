//! Merging the symbols of one word: always the lowest rank first, and of equal ranks the leftmost.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::spec::{Merge, Tokens, VOCAB_MAX};
use crate::tokenizer::TokenId;

/// Up to here, looking for the lowest rank by scanning beats a heap: a word's ranks fit in a few cache lines.
const SCAN_MAX: usize = 48;
/// Symbols above which the buffers of a long word are given back instead of kept for the next.
const KEEP_SYMBOLS_MAX: usize = 1 << 16;
const NO_RANK: u32 = u32::MAX;

/// (left, right) → (rank, result): open addressing at most two thirds full, 12 bytes an entry, mostly one cache line a
/// look-up. Its size follows the number of merges, of which a vocabulary of 262,144 has half a million, not the next power
/// of two.
#[derive(Debug)]
pub(crate) struct MergeTable {
    entries: Vec<Entry>,
}

/// The id of the left token with the low bits of the result above it, that of the right one with the high bits, and the rank;
/// [`NO_RANK`] marks a free entry.
#[derive(Debug, Clone, Copy)]
struct Entry {
    left: u32,
    right: u32,
    rank: u32,
}

const FREE: Entry = Entry { left: 0, right: 0, rank: NO_RANK };

/// Bits of an id; in two words of 32 bits those of a third one are left over.
const ID_BITS: u32 = VOCAB_MAX.ilog2();
const ID_MASK: u32 = (1 << ID_BITS) - 1;
const REST_BITS: u32 = u32::BITS - ID_BITS;
const _: () = assert!(VOCAB_MAX == 1 << ID_BITS && 2 * REST_BITS >= ID_BITS);

impl Entry {
    fn new(merge: &Merge) -> Entry {
        let Merge { left, right, result, rank } = *merge;
        assert!(left.max(right).max(result) <= ID_MASK, "{merge:?} is of a larger vocabulary than any");
        Entry { left: left | result << ID_BITS, right: right | result >> REST_BITS << ID_BITS, rank }
    }

    #[inline(always)]
    fn is_of(&self, left: TokenId, right: TokenId) -> bool {
        self.left & ID_MASK == left && self.right & ID_MASK == right
    }

    #[inline(always)]
    fn result(&self) -> TokenId {
        self.left >> ID_BITS | self.right >> ID_BITS << REST_BITS
    }

    fn merge(&self) -> Merge {
        let [left, right] = [self.left, self.right].map(|word| word & ID_MASK);
        Merge { left, right, result: self.result(), rank: self.rank }
    }
}

impl MergeTable {
    /// A pair that is listed twice keeps its last rank, as in Hugging Face's map.
    pub(crate) fn new(merges: &[Merge]) -> MergeTable {
        let n_entries = merges.len() + merges.len() / 2 + 1;
        let mut table = MergeTable { entries: vec![FREE; n_entries] };
        for merge in merges {
            let at = table.find(merge.left, merge.right);
            table.entries[at] = Entry::new(merge);
        }
        table
    }

    /// The merges in the order in which every loader lists them.
    pub(crate) fn listed(&self, tokens: &Tokens) -> Vec<Merge> {
        let used = self.entries.iter().filter(|entry| entry.rank != NO_RANK);
        let mut merges: Vec<Merge> = used.map(Entry::merge).collect();
        // Of equal ranks there are several only by score, where results follow each other, each cut ever further behind.
        merges.sort_unstable_by_key(|merge| (merge.rank, merge.result, tokens.bytes(merge.left).len()));
        merges
    }

    /// Rank and result of the merge of two neighbours; the rank is [`NO_RANK`] where there is none.
    #[inline(always)]
    fn get(&self, left: TokenId, right: TokenId) -> (u32, TokenId) {
        let entry = &self.entries[self.find(left, right)];
        (entry.rank, entry.result())
    }

    /// Where the pair is, or the free entry where it would go.
    #[inline(always)]
    fn find(&self, left: TokenId, right: TokenId) -> usize {
        let pair = (left as u64) << 32 | right as u64;
        let mixed = (pair ^ pair >> 29).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The upper half as a fraction of 1: there are fewer than 2^32 entries, since ranks have 32 bits.
        let mut at = (((mixed >> 32) * self.entries.len() as u64) >> 32) as usize;
        loop {
            let entry = &self.entries[at];
            if entry.rank == NO_RANK || entry.is_of(left, right) {
                return at;
            }
            at = if at + 1 == self.entries.len() { 0 } else { at + 1 };
        }
    }
}

/// The working memory of [`Merger::merge`], kept between words.
#[derive(Default)]
pub(crate) struct Merger {
    /// The word's symbols: filled by the caller, merged in place.
    pub(crate) symbols: Vec<TokenId>,
    pairs: Vec<(u32, TokenId)>,
    heap: BinaryHeap<Reverse<Candidate>>,
    next: Vec<u32>,
    prev: Vec<u32>,
}

/// A merge that was possible when it was pushed. Ordered by rank, then position.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    at: u32,
    left: TokenId,
    right: TokenId,
}

impl Merger {
    /// Merges `self.symbols` until no merge applies.
    pub(crate) fn merge(&mut self, table: &MergeTable) {
        if self.symbols.len() <= SCAN_MAX {
            self.merge_by_scan(table);
        } else {
            self.merge_by_heap(table);
        }
    }

    /// Quadratic in the symbols, of which there are at most [`SCAN_MAX`].
    fn merge_by_scan(&mut self, table: &MergeTable) {
        let Merger { symbols, pairs, .. } = self;
        pairs.clear();
        pairs.extend(symbols.windows(2).map(|pair| table.get(pair[0], pair[1])));
        while let Some((at, &(rank, result))) = pairs.iter().enumerate().min_by_key(|(_, pair)| pair.0) {
            if rank == NO_RANK {
                return;
            }
            symbols[at] = result;
            symbols.remove(at + 1);
            pairs.remove(at);
            if at > 0 {
                pairs[at - 1] = table.get(symbols[at - 1], result);
            }
            if at < pairs.len() {
                pairs[at] = table.get(result, symbols[at + 1]);
            }
        }
    }

    /// n log n: symbols are a linked list, candidates a heap; a candidate whose symbols changed meanwhile is dropped
    /// when it comes up.
    fn merge_by_heap(&mut self, table: &MergeTable) {
        const END: u32 = u32::MAX;
        let n = self.symbols.len();
        assert!(n < END as usize, "the caller cuts texts far below 2^32 bytes");
        let Merger { symbols, heap, next, prev, .. } = self;
        heap.clear();
        next.clear();
        next.extend((1..n as u32).chain([END]));
        prev.clear();
        prev.extend([END].into_iter().chain(0..n as u32 - 1));
        let candidate = |at: u32, left: TokenId, right: TokenId| {
            let (rank, _) = table.get(left, right);
            (rank != NO_RANK).then_some(Reverse(Candidate { rank, at, left, right }))
        };
        heap.extend((0..n - 1).filter_map(|at| candidate(at as u32, symbols[at], symbols[at + 1])));
        while let Some(Reverse(Candidate { at, left, right, .. })) = heap.pop() {
            let second = next[at as usize];
            if second == END || symbols[at as usize] != left || symbols[second as usize] != right {
                continue;
            }
            let (_, result) = table.get(left, right);
            symbols[at as usize] = result;
            symbols[second as usize] = NO_RANK; // Out of the list: never equal to a candidate's symbol again.
            let after = next[second as usize];
            next[at as usize] = after;
            if after != END {
                prev[after as usize] = at;
                heap.extend(candidate(at, result, symbols[after as usize]));
            }
            let before = prev[at as usize];
            if before != END {
                heap.extend(candidate(before, symbols[before as usize], result));
            }
        }
        symbols.retain(|&symbol| symbol != NO_RANK);
        if n > KEEP_SYMBOLS_MAX {
            let symbols = std::mem::take(&mut self.symbols);
            *self = Merger { symbols, ..Merger::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: find the lowest rank, merge its leftmost place, start over.
    fn merge_plain(table: &MergeTable, mut symbols: Vec<TokenId>) -> Vec<TokenId> {
        loop {
            let best = (0..symbols.len().saturating_sub(1))
                .map(|at| (table.get(symbols[at], symbols[at + 1]), at))
                .min_by_key(|&((rank, _), at)| (rank, at));
            match best {
                Some(((rank, result), at)) if rank != NO_RANK => {
                    symbols.splice(at..at + 2, [result]);
                }
                _ => return symbols,
            }
        }
    }

    proptest! {
        #[test]
        fn ids_of_any_vocabulary_fit_an_entry(
            left in 0..=ID_MASK, right in 0..=ID_MASK, result in 0..=ID_MASK, rank in 0..NO_RANK,
        ) {
            let merge = Merge { left, right, result, rank };
            prop_assert_eq!(Entry::new(&merge).merge(), merge);
            prop_assert!(Entry::new(&merge).is_of(left, right));
            let table = MergeTable::new(&[merge]);
            prop_assert_eq!(table.get(left, right), (rank, result));
            prop_assert_eq!(table.get(left ^ 1, right).0, NO_RANK);
        }

        #[test]
        fn both_ways_of_merging_follow_the_definition(
            pairs in prop::collection::vec((0u32..12, 0u32..12, 0u32..20), 1..40),
            symbols in prop::collection::vec(0u32..4, 0..200),
        ) {
            let merges: Vec<Merge> = pairs.iter().enumerate()
                .map(|(i, &(left, right, rank))| Merge { left, right, result: 4 + i as u32 % 9, rank })
                .collect();
            let table = MergeTable::new(&merges);
            let expected = merge_plain(&table, symbols.clone());
            let mut merger = Merger { symbols: symbols.clone(), ..Merger::default() };
            merger.merge_by_scan(&table);
            prop_assert_eq!(&merger.symbols, &expected);
            if !symbols.is_empty() {
                let mut merger = Merger { symbols, ..Merger::default() };
                merger.merge_by_heap(&table);
                prop_assert_eq!(&merger.symbols, &expected);
            }
        }
    }
}
