//! Whole documents in rows of a fixed length.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::batches::NO_TARGET;
use crate::encode::{MARK_BEGINS, MARK_LEARNED};
use crate::{Dataset, Error, Result, Row, Split};

/// Marks read at a time.
const READ_TOKENS: u64 = 1 << 20;

/// Which documents share a row: a pure function of the dataset and the row's length.
///
/// Documents are placed longest first, each in the fullest row that has room for it (best fit decreasing: at most 22 %
/// more rows than the fewest, and on chats about none; Johnson 1973). One that is longer than a row ends with it.
#[derive(Debug)]
pub(crate) struct Packing {
    /// Tokens of the split, whole documents.
    rows: Vec<Vec<Range<u64>>>,
    /// Documents that a row's end cuts off.
    pub(crate) n_cut: u64,
    /// Documents of which nothing to learn is in a row.
    pub(crate) n_dropped: u64,
}

impl Packing {
    pub(crate) fn new(dataset: &Dataset, split: Split, t: usize, is_pairs: bool) -> Result<Packing> {
        let documents = documents(dataset, split, t)?;
        let mut packing = Packing { rows: Vec::new(), n_cut: 0, n_dropped: 0 };
        let together = if is_pairs { 2 } else { 1 };
        let usable = |group: &&[Place]| group.len() == together && group.iter().all(|place| place.teaches);
        let groups: Vec<&[Place]> = documents.chunks(together).filter(usable).collect();
        packing.n_dropped = documents.len() as u64 - (groups.len() * together) as u64;
        packing.n_cut =
            groups.iter().flat_map(|group| group.iter()).filter(|place| place.is_cut).count() as u64;
        if groups.is_empty() {
            let (name, split) = (dataset.info().name.clone(), split.name());
            return Err(Error::NothingToLearn { name, split, window_tokens: Some(t as u64) });
        }
        packing.rows = match is_pairs {
            // A side of a pair has a row of its own.
            true => {
                groups.iter().flat_map(|pair| pair.iter()).map(|place| vec![place.tokens.clone()]).collect()
            }
            false => pack(groups.into_iter().flatten().map(|place| place.tokens.clone()).collect(), t),
        };
        Ok(packing)
    }

    pub(crate) fn n_rows(&self) -> u64 {
        self.rows.len() as u64
    }

    pub(crate) fn row(&self, dataset: &Dataset, split: Split, t: usize, row_idx: u64) -> Result<Row> {
        let Some(documents) = self.rows.get(row_idx as usize) else {
            let (name, split, n_tokens) =
                (dataset.info().name.clone(), split.name(), self.n_rows() * t as u64);
            let start = row_idx.saturating_mul(t as u64);
            return Err(Error::OutOfRange {
                name,
                split,
                start,
                end: start.saturating_add(t as u64),
                n_tokens,
            });
        };
        let mut row = Row::default();
        for range in documents {
            let ids = dataset.tokens(split, range.clone())?;
            let marks = dataset.marks(split, range.clone())?;
            let start = row.tokens.len() as u32;
            row.tokens.extend_from_slice(&ids[..ids.len() - 1]);
            let target = |(id, mark): (&u32, &u8)| if mark & MARK_LEARNED != 0 { *id } else { NO_TARGET };
            row.targets.extend(ids[1..].iter().zip(&marks[1..]).map(target));
            row.starts.resize(row.tokens.len(), start);
        }
        // What is left of the row is a document of its own, of which nothing is learned.
        let rest = row.tokens.len() as u32;
        row.tokens.resize(t, 0);
        row.targets.resize(t, NO_TARGET);
        row.starts.resize(t, rest);
        Ok(row)
    }
}

/// A document in the split.
struct Place {
    /// Its tokens, at most t and the target of the last.
    tokens: Range<u64>,
    /// Some of them are to be learned.
    teaches: bool,
    is_cut: bool,
}

/// Every document of the split, found by its marks.
fn documents(dataset: &Dataset, split: Split, t: usize) -> Result<Vec<Place>> {
    let n_tokens = dataset.info().split(split).n_tokens;
    let mut documents: Vec<Place> = Vec::new();
    for at in (0..n_tokens).step_by(READ_TOKENS as usize) {
        let marks = dataset.marks(split, at..(at + READ_TOKENS).min(n_tokens))?;
        for (i, mark) in (at..).zip(marks) {
            if mark & MARK_BEGINS != 0 {
                documents.push(Place { tokens: i..i + 1, teaches: false, is_cut: false });
                continue;
            }
            let Some(document) = documents.last_mut() else {
                let reason = "its first token begins no document".to_string();
                return Err(Error::Damaged { name: dataset.info().name.clone(), reason });
            };
            if i - document.tokens.start <= t as u64 {
                document.tokens.end = i + 1;
                document.teaches |= mark & MARK_LEARNED != 0;
            } else {
                document.is_cut = true;
            }
        }
    }
    Ok(documents)
}

/// Best fit, longest first. A document of n ids takes n - 1 tokens: the last is only a target.
fn pack(mut documents: Vec<Range<u64>>, t: usize) -> Vec<Vec<Range<u64>>> {
    let length = |range: &Range<u64>| (range.end - range.start - 1) as usize;
    documents.sort_by_key(|range| (std::cmp::Reverse(length(range)), range.start));
    let mut rows: Vec<Vec<Range<u64>>> = Vec::new();
    // Rows by the room that is left in them.
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for document in documents {
        let need = length(&document);
        let fullest = by_room.range(need..).next().map(|(room, _)| *room);
        let row = match fullest {
            Some(room) => take(&mut by_room, room),
            None => None,
        };
        let (row, room) = row.unwrap_or_else(|| {
            rows.push(Vec::new());
            (rows.len() - 1, t)
        });
        rows[row].push(document);
        by_room.entry(room - need).or_default().push(row);
    }
    rows
}

/// Takes one of the rows with this much room.
fn take(by_room: &mut BTreeMap<usize, Vec<usize>>, room: usize) -> Option<(usize, usize)> {
    let rows = by_room.get_mut(&room)?;
    let row = rows.pop()?;
    if rows.is_empty() {
        by_room.remove(&room);
    }
    Some((row, room))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_stay_whole_and_rows_are_full() {
        let mut at = 0;
        let lengths: Vec<u64> = (0..500).map(|i| 2 + (i * 7919) % 60).collect();
        let documents: Vec<Range<u64>> = lengths
            .iter()
            .map(|n| {
                at += n;
                at - n..at
            })
            .collect();
        let rows = pack(documents.clone(), 64);
        let mut seen: Vec<Range<u64>> = rows.iter().flatten().cloned().collect();
        seen.sort_by_key(|range| range.start);
        assert_eq!(seen, documents);
        let used = |row: &Vec<Range<u64>>| row.iter().map(|d| d.end - d.start - 1).sum::<u64>();
        assert!(rows.iter().all(|row| used(row) <= 64));
        let total: u64 = rows.iter().map(used).sum();
        assert!(total as f64 > 0.97 * 64.0 * rows.len() as f64, "{total} tokens in {} rows", rows.len());
    }
}
