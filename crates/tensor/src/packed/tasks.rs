//! [`Tasks`]: how a product is cut into tasks.

use super::Packed;
use super::kernels::{BATCH_TILES, COLS_MAX, TILES_MAX};
use crate::Pool;
use crate::split::piece;
use std::ops::Range;

/// Enough that a thread which was held up by another process leaves its share to the others.
const TASKS_PER_THREAD: usize = 8;
/// A task of one group of columns reads no more: some 2 us, by which threads may end at different times.
const TASK_BYTES_MAX: usize = 48 << 10;

/// Shares of tiles, one for each thread, cut into groups of tiles; with many columns a task is a group of tiles times a
/// group of columns. Tasks of one thread follow each other in memory, as do those it begins with in
/// [`Pool::run_shares`].
pub(super) struct Tasks {
    n_tiles: usize,
    n: usize,
    /// Tiles of a share, of which a thread has one.
    share_tiles: usize,
    /// Tiles of a task.
    group_tiles: usize,
    col_groups: usize,
}

impl Tasks {
    pub(super) fn new<'a>(pool: &Pool, stack: impl Iterator<Item = &'a Packed>, n: usize) -> Self {
        let (mut n_tiles, mut n_bytes, mut unit) = (0, 0, if n > 1 { BATCH_TILES } else { 1 });
        for w in stack {
            n_tiles += w.n_tiles();
            n_bytes += w.bytes();
            // Float kernels take several tiles at once.
            unit = if n == 1 && !w.kind.is_quantized() { TILES_MAX } else { unit };
        }
        let share_tiles = n_tiles.div_ceil(pool.n_threads()).next_multiple_of(BATCH_TILES).max(1);
        let col_groups = n.div_ceil(COLS_MAX);
        let group_tiles = match col_groups {
            1 => share_tiles.div_ceil(TASKS_PER_THREAD).min(TASK_BYTES_MAX * n_tiles / n_bytes.max(1)).max(1),
            _ => share_tiles.div_ceil(TASKS_PER_THREAD.div_ceil(col_groups)),
        };
        Self { n_tiles, n, share_tiles, group_tiles: group_tiles.next_multiple_of(unit), col_groups }
    }

    /// Tasks.
    pub(super) fn n(&self) -> usize {
        self.n_tiles.div_ceil(self.share_tiles) * self.share_tasks()
    }

    fn share_tasks(&self) -> usize {
        self.col_groups * self.groups()
    }

    /// Groups of a share.
    fn groups(&self) -> usize {
        self.share_tiles.div_ceil(self.group_tiles)
    }

    /// Tiles of the whole stack that a task multiplies; none if the last share is short.
    pub(super) fn tiles(&self, task: usize) -> Range<usize> {
        let share = piece(task / self.share_tasks(), self.share_tiles, self.n_tiles);
        let tiles = piece(task % self.groups(), self.group_tiles, share.len());
        share.start + tiles.start..share.start + tiles.end
    }

    /// Columns that a task multiplies.
    pub(super) fn cols(&self, task: usize) -> Range<usize> {
        piece(task % self.share_tasks() / self.groups(), COLS_MAX, self.n)
    }

    /// What a thread reads first of `stack`: its share, as far as that is in one matrix. Nothing where weights are read again
    /// and again.
    pub(super) fn first_read<'a>(&self, stack: &'a [Packed], thread: usize) -> &'a [u8] {
        let share = piece(thread, self.share_tiles, self.n_tiles);
        let mut first_tile = 0;
        for w in stack {
            let mine = share.start.max(first_tile)..share.end.min(first_tile + w.n_tiles());
            if self.col_groups == 1 && !mine.is_empty() {
                return w.tiles(mine.start - first_tile..mine.end - first_tile);
            }
            first_tile += w.n_tiles();
        }
        &[]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::WeightKind;

    #[test]
    fn every_tile_meets_every_column_once() {
        for n_threads in [1, 2, 3, 16] {
            let pool = Pool::new(n_threads);
            for n_outs in [vec![1], vec![16 * 36], vec![576, 192, 192], vec![1536, 1536], vec![3000]] {
                let stack: Vec<_> =
                    n_outs.iter().map(|&n_out| Packed::zeroed(WeightKind::Q4_1, [n_out, 576])).collect();
                let n_tiles: usize = stack.iter().map(Packed::n_tiles).sum();
                for n in [1, 2, 32, 48, 49, 512] {
                    let tasks = Tasks::new(&pool, stack.iter(), n);
                    let mut n_met = vec![0; n_tiles * n];
                    for task in 0..tasks.n() {
                        for tile in tasks.tiles(task) {
                            tasks.cols(task).for_each(|col| n_met[tile * n + col] += 1);
                        }
                    }
                    assert!(n_met.iter().all(|&n| n == 1), "{n_threads} threads, {n_outs:?}, {n} columns");
                    let read: usize = (0..n_threads).map(|i| tasks.first_read(&stack, i).len()).sum();
                    assert_eq!(read > 0, n <= COLS_MAX);
                }
            }
        }
    }

    #[test]
    fn a_thread_fetches_what_its_share_begins_with() {
        let [q, k, v] = [576, 192, 192].map(|n_out| Packed::zeroed(WeightKind::Q4_1, [n_out, 576]));
        let stack = [q, k, v];
        let tasks = Tasks::new(&Pool::new(2), stack.iter(), 1);
        // Of 60 tiles the second thread has 30..60: the last six of q come first.
        let [first, second] = [0, 1].map(|thread| tasks.first_read(&stack, thread));
        assert_eq!(
            (first.as_ptr(), first.len()),
            (stack[0].tiles(0..30).as_ptr(), stack[0].tiles(0..30).len())
        );
        assert_eq!(
            (second.as_ptr(), second.len()),
            (stack[0].tiles(30..36).as_ptr(), stack[0].tiles(30..36).len())
        );
        assert!(tasks.first_read(&stack, 2).is_empty());
    }
}
