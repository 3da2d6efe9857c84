//! How a product is cut into tasks, and what a task does.

use std::cell::RefCell;
use std::ops::Range;

use super::pack::{Format, Source, block_words, pack};
use super::tile::{LINE, Packed, Target, rows_max, tile_of_rows};
use super::{
    Accumulate, DEPTH_BLOCK, OWN_DEPTH_MAX, ROWS_BLOCK, SHARED_DEPTH_MAX, SHARED_WORDS_MAX, TASKS_PER_THREAD,
};
use crate::cpu::{Level, features};
use crate::pool::Disjoint;
use crate::simd::{Portable, Simd, dispatch};
use crate::{Buf, Pool};

thread_local! {
    /// The block of the operand that is not shared, packed by the task this thread is working on.
    static OWN: RefCell<Buf<f32>> = RefCell::new(Buf::default());
}

/// One product.
pub(super) struct Job<'a> {
    pub(super) level: Level,
    pub(super) a: Source<'a>,
    pub(super) b: Source<'a>,
    /// a.n_lanes × b.n_lanes.
    pub(super) c: Disjoint<'a, f32>,
    pub(super) k: usize,
    pub(super) format: Format,
    pub(super) accumulate: Accumulate,
}

/// The operand that is packed once for all tasks, for some of its lanes and depths.
struct Shared<'a> {
    words: &'a [f32],
    /// Block of depths `d` begins at `(d - depths.start) / DEPTH_BLOCK * block_stride`.
    block_stride: usize,
    lanes: Range<usize>,
    depths: Range<usize>,
}

impl Shared<'_> {
    /// The words of one block of depths.
    fn block(&self, depths: &Range<usize>) -> &[f32] {
        &self.words[(depths.start - self.depths.start) / DEPTH_BLOCK * self.block_stride..]
    }

    /// The panel of b whose first column is `col`.
    fn panel_of_b(&self, col: usize, depths: &Range<usize>) -> &[f32] {
        &self.block(depths)[(col - self.lanes.start) * depths.len()..]
    }
}

/// What one task computes: a part of c, over the depths that are packed.
struct Task<'a> {
    job: &'a Job<'a>,
    shared: &'a Shared<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Job<'_> {
    /// Rows of a tile, which is the width of a panel of a.
    fn tile_rows(&self) -> usize {
        rows_max(self.lanes())
    }

    /// Columns of a tile, which is the width of a panel of b.
    fn tile_cols(&self) -> usize {
        2 * self.lanes()
    }

    fn lanes(&self) -> usize {
        self.level.lanes()
    }

    /// b is packed once, tasks pack blocks of a.
    pub(super) fn run_many_rows(&self, pool: &Pool, buf: &mut Buf<f32>) {
        let (m, n) = (self.a.n_lanes, self.b.n_lanes);
        for depths in chunks(0..self.k, SHARED_DEPTH_MAX) {
            let cols_max = SHARED_WORDS_MAX / depths.len() / self.tile_cols() * self.tile_cols();
            for cols in chunks(0..n, cols_max) {
                let shared = self.pack_shared(pool, buf, Operand::B, cols.clone(), depths.clone());
                let [row_tasks, col_tasks] = self.task_counts(m, cols.len(), pool.n_threads());
                let n_cols = cols.len().div_ceil(col_tasks).next_multiple_of(self.tile_cols());
                let col_tasks = cols.len().div_ceil(n_cols);
                pool.run(row_tasks * col_tasks, &|i| {
                    let rows = even_share(m, self.tile_rows(), i / col_tasks, row_tasks);
                    let cols = chunk(cols.clone(), n_cols, i % col_tasks);
                    let task = Task { job: self, shared: &shared, rows, cols };
                    OWN.with_borrow_mut(|own| multiply(Operand::B, &task, own));
                });
            }
        }
    }

    /// a is packed once, tasks pack panels of b.
    pub(super) fn run_few_rows(&self, pool: &Pool, buf: &mut Buf<f32>) {
        let (m, n) = (self.a.n_lanes, self.b.n_lanes);
        for depths in chunks(0..self.k, SHARED_DEPTH_MAX) {
            let shared = self.pack_shared(pool, buf, Operand::A, 0..m, depths);
            let n_tasks = if pool.n_threads() == 1 { 1 } else { TASKS_PER_THREAD * pool.n_threads() };
            let n_cols = n.div_ceil(n_tasks).next_multiple_of(self.tile_cols());
            pool.run(n.div_ceil(n_cols), &|i| {
                let task = Task { job: self, shared: &shared, rows: 0..m, cols: chunk(0..n, n_cols, i) };
                OWN.with_borrow_mut(|own| multiply(Operand::A, &task, own));
            });
        }
    }

    /// Into how many tasks rows and columns are cut. One thread takes all columns at once, so that each block of a is packed
    /// once; with more threads tasks are halved until there are TASKS_PER_THREAD each, or they are too small to be worth
    /// packing. Of tasks that have all columns there are as many for every thread: with 15 for two threads, one would wait for
    /// the last while 4 % of the time pass.
    fn task_counts(&self, m: usize, n: usize, n_threads: usize) -> [usize; 2] {
        let (mut n_row_tasks, mut n_col_tasks) = (m.div_ceil(ROWS_BLOCK), 1);
        let wanted = if n_threads == 1 { 1 } else { n_threads * TASKS_PER_THREAD };
        while n_row_tasks * n_col_tasks < wanted {
            let (rows, cols) = (m / n_row_tasks, n / n_col_tasks);
            if cols > 512 || cols > 4 * rows {
                n_col_tasks *= 2;
            } else if rows >= 48 {
                n_row_tasks *= 2;
            } else if cols >= 128 {
                n_col_tasks *= 2;
            } else {
                break;
            }
        }
        if n_col_tasks == 1 {
            n_row_tasks = n_row_tasks.next_multiple_of(n_threads);
        }
        [n_row_tasks.min(m.div_ceil(self.tile_rows())), n_col_tasks]
    }

    /// Packs `lanes` × `depths` of an operand with all threads.
    fn pack_shared<'s>(
        &self,
        pool: &Pool,
        buf: &'s mut Buf<f32>,
        operand: Operand,
        lanes: Range<usize>,
        depths: Range<usize>,
    ) -> Shared<'s> {
        // A piece of work is one block of depths and, of b, some panels; a's panels cannot be told apart (they may
        // write into each other's place before it is filled, see `pack`), and it has few of them.
        let (w, source, lanes_piece) = match operand {
            Operand::A => (self.tile_rows(), &self.a, lanes.len()),
            Operand::B => (self.tile_cols(), &self.b, 16 * self.tile_cols()),
        };
        let block_stride = block_words(w, lanes.len(), DEPTH_BLOCK.min(depths.len()));
        let n_blocks = depths.len().div_ceil(DEPTH_BLOCK);
        buf.reserve_scratch(n_blocks * block_stride);
        let words = Disjoint::new(&mut buf[..n_blocks * block_stride]);
        let pieces = lanes.len().div_ceil(lanes_piece);
        pool.run(n_blocks * pieces, &|i| {
            let (block_idx, piece_idx) = (i / pieces, i % pieces);
            let block = chunk(depths.clone(), DEPTH_BLOCK, block_idx);
            let piece = chunk(lanes.clone(), lanes_piece, piece_idx);
            let at = block_idx * block_stride + piece_idx * lanes_piece * block.len();
            // SAFETY: pieces of b are whole panels without slack, a has one piece per block: no two overlap.
            let dst = unsafe { words.slice(at..at + block_words(w, piece.len(), block.len())) };
            pack_operand(
                self.level,
                operand,
                dst,
                source,
                Block { lanes: piece, depths: block, format: self.format },
            );
        });
        Shared { words: &buf[..], block_stride, lanes, depths }
    }
}

/// `range` in pieces of `len`.
fn chunks(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..range.len().div_ceil(len)).map(move |i| chunk(range.clone(), len, i))
}

/// Piece `i` of `range` in pieces of `len`.
fn chunk(range: Range<usize>, len: usize, i: usize) -> Range<usize> {
    let start = range.start + i * len;
    start..range.end.min(start + len)
}

/// Part `i` of `n` of so many rows, in whole tiles: the first parts have one more than the others, the last one has what is
/// left.
fn even_share(n_rows: usize, tile_rows: usize, i: usize, n: usize) -> Range<usize> {
    let n_tiles = n_rows.div_ceil(tile_rows);
    let border = |i: usize| (n_tiles / n * i + i.min(n_tiles % n)) * tile_rows;
    border(i)..border(i + 1).min(n_rows)
}

/// The operand that is packed once for all tasks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    A,
    B,
}

/// A part of an operand to pack.
struct Block {
    lanes: Range<usize>,
    depths: Range<usize>,
    format: Format,
}

#[inline(always)]
fn pack_operand_simd<S: Simd>(s: S, operand: Operand, dst: &mut [f32], source: &Source, block: Block) {
    let Block { lanes, depths, format } = block;
    match (operand, S::LANES) {
        (Operand::A, 8) => pack::<S, { rows_max(8) }>(s, dst, source, lanes, depths, format),
        (Operand::A, _) => pack::<S, { rows_max(16) }>(s, dst, source, lanes, depths, format),
        (Operand::B, 8) => pack::<S, 16>(s, dst, source, lanes, depths, format),
        (Operand::B, _) => pack::<S, 32>(s, dst, source, lanes, depths, format),
    }
}
dispatch!(fn pack_operand(operand: Operand, dst: &mut [f32], source: &Source, block: Block) = pack_operand_simd);

/// Runs a task on the instruction set of its job.
fn multiply(shared: Operand, task: &Task, own: &mut Buf<f32>) {
    match task.job.format {
        Format::F32 | Format::Rounded => multiply_f32(task.job.level, shared, task, own),
        Format::Pairs => multiply_pairs(task.job.level, shared, task, own),
    }
}

dispatch!(fn multiply_f32(shared: Operand, task: &Task, own: &mut Buf<f32>) = multiply_f32_simd);

#[inline(always)]
fn multiply_f32_simd<S: Simd>(s: S, shared: Operand, task: &Task, own: &mut Buf<f32>) {
    if S::LANES == 8 {
        multiply_tiles::<S, { rows_max(8) }, 16, false>(s, shared, task, own);
    } else {
        multiply_tiles::<S, { rows_max(16) }, 32, false>(s, shared, task, own);
    }
}

/// The one kernel that needs an instruction its level does not promise, so it has its own dispatch.
fn multiply_pairs(level: Level, shared: Operand, task: &Task, own: &mut Buf<f32>) {
    const MR: usize = rows_max(16);
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
    fn avx512_bf16(s: crate::simd::Avx512, shared: Operand, task: &Task, own: &mut Buf<f32>) {
        multiply_tiles::<_, MR, 32, true>(s, shared, task, own);
    }
    match level.available() {
        // SAFETY: the processor has the level and AVX512-BF16.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if features().bf16 => unsafe {
            avx512_bf16(crate::simd::Avx512::new(), shared, task, own)
        },
        _ => multiply_tiles::<_, MR, 32, true>(Portable::<16>, shared, task, own),
    }
}

/// All tiles of a task.
#[inline(always)]
fn multiply_tiles<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    s: S,
    operand: Operand,
    task: &Task,
    own: &mut Buf<f32>,
) {
    assert_eq!(NR, 2 * S::LANES);
    match operand {
        Operand::A => multiply_shared_a::<S, MR, NR, PAIRS>(s, task, own),
        Operand::B => multiply_shared_b::<S, MR, NR, PAIRS>(s, task, own),
    }
}

/// Packs each panel of b just before the only time it is read.
#[inline(always)]
fn multiply_shared_a<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    s: S,
    task: &Task,
    own: &mut Buf<f32>,
) {
    let Task { job, shared, cols, .. } = task;
    own.reserve_scratch(block_words(NR, NR, DEPTH_BLOCK));
    for col in cols.clone().step_by(NR) {
        for depths in chunks(shared.depths.clone(), DEPTH_BLOCK) {
            pack::<S, NR>(s, own, &job.b, col..cols.end.min(col + NR), depths.clone(), job.format);
            let panel = Panel { a: shared.block(&depths), b: own, ahead: &[], col, depths };
            multiply_panel::<S, MR, PAIRS>(s, task, panel);
        }
    }
}

/// Packs the task's rows of a. A panel of b stays in L1 while they pass, and the next one is fetched from afar; a column of
/// tiles is added to block after block while it is near, so c goes to memory once in [`OWN_DEPTH_MAX`], not in each block.
#[inline(always)]
fn multiply_shared_b<S: Simd, const MR: usize, const NR: usize, const PAIRS: bool>(
    s: S,
    task: &Task,
    own: &mut Buf<f32>,
) {
    let Task { job, shared, rows, cols } = task;
    let own_stride = block_words(MR, rows.len(), DEPTH_BLOCK.min(shared.depths.len()));
    own.reserve_scratch(OWN_DEPTH_MAX.min(shared.depths.len()).div_ceil(DEPTH_BLOCK) * own_stride);
    for near in chunks(shared.depths.clone(), OWN_DEPTH_MAX) {
        for (own, depths) in own.chunks_mut(own_stride).zip(chunks(near.clone(), DEPTH_BLOCK)) {
            pack::<S, MR>(s, own, &job.a, rows.clone(), depths, job.format);
        }
        let mut panels = (cols.clone().step_by(NR))
            .flat_map(|col| chunks(near.clone(), DEPTH_BLOCK).map(move |depths| (col, depths)))
            .peekable();
        while let Some((col, depths)) = panels.next() {
            let a = &own[(depths.start - near.start) / DEPTH_BLOCK * own_stride..];
            let b = shared.panel_of_b(col, &depths);
            let ahead = panels.peek().map_or(&[][..], |(col, depths)| shared.panel_of_b(*col, depths));
            multiply_panel::<S, MR, PAIRS>(s, task, Panel { a, b, ahead, col, depths });
        }
    }
}

/// A packed block of a, a packed panel of b, and where they are in the product.
struct Panel<'a> {
    a: &'a [f32],
    b: &'a [f32],
    /// The panel of b that comes next, or nothing.
    ahead: &'a [f32],
    col: usize,
    depths: Range<usize>,
}

/// One column of tiles.
#[inline(always)]
fn multiply_panel<S: Simd, const MR: usize, const PAIRS: bool>(s: S, task: &Task, panel: Panel) {
    let Task { job, rows, cols, .. } = task;
    let n = job.b.n_lanes;
    let n_depth = panel.depths.len();
    let n_words = job.format.n_words(n_depth);
    assert!(
        panel.a.len() >= rows.len().next_multiple_of(MR) * n_depth && panel.b.len() >= 2 * S::LANES * n_depth
    );
    assert!(rows.end <= job.a.n_lanes && cols.end <= n && panel.col < cols.end);
    let n_tiles = rows.len().div_ceil(MR);
    let ahead_step = if panel.ahead.is_empty() { 0 } else { (2 * S::LANES).div_ceil(n_tiles).min(LINE) };
    let overwrite = job.accumulate == Accumulate::Overwrite && panel.depths.start == 0;
    for row in (0..rows.len()).step_by(MR) {
        // SAFETY: the packed panels were measured above; the tile is inside the task's rows and columns of c, and no
        // two tasks of a run share any.
        unsafe {
            let target = Target {
                c: job.c.as_ptr().add((rows.start + row) * n + panel.col),
                stride: n,
                n_rows: MR.min(rows.len() - row),
                n_cols: (cols.end - panel.col).min(2 * S::LANES),
                overwrite,
            };
            let a = panel.a.as_ptr().add(row * n_depth);
            // Each tile asks for its share, so that what is far away comes as slowly as it may.
            let ahead = panel.ahead.as_ptr().wrapping_add(row / MR * n_words * ahead_step);
            let packed = Packed { n_words, a, b: panel.b.as_ptr(), ahead, ahead_step };
            tile_of_rows::<S, MR, PAIRS>(s, packed, target);
        }
    }
}
