//! Weights packed for inference: `y_no = x_ni · Wᵀ`.
//!
//! Weights stay in the bits they are stored in (4, 8, 16 or 32), rearranged into tiles of 16 interleaved rows
//! ([`layout`]). With quantized weights the inputs become two int16 each ([`activations`]): as exact as f32, unlike 8-bit
//! inputs, and still integers, so that one instruction does two products a lane. A row's result depends on its weights and its
//! own input only: not on the other columns, their number, or the threads. Test: `rows_do_not_depend_on_the_batch`.
//!
//! The plain reference is [`WeightKind::dequantize`] and a sum in f64 (see the tests).

mod activations;
mod blocks;
mod float_kernels;
mod kernels;
mod kind;
mod layout;
mod quantize;
#[cfg(test)]
mod tests;

pub use kind::WeightKind;

use crate::cpu::Level;
use crate::pool::Disjoint;
use crate::split::piece;
use crate::{Buf, Pool};
use activations::Activations;
use float_kernels::{FloatTiles, TILES_MAX, float_tiles};
use kernels::{BatchTile, COLS_MAX, DecodeTile, Sums, batch_tile, decode_tile};
use layout::TILE;
use std::ops::Range;

/// A weight matrix of `n_out` rows and `n_in` columns, packed for [`project`].
pub struct Packed {
    /// As they came.
    stored: WeightKind,
    /// As they are in memory: some kinds are widened for now.
    kind: WeightKind,
    n_out: usize,
    n_in: usize,
    /// `ceil(n_out / 16)` tiles; rows past `n_out` are zero.
    tiles: Buf<u8>,
}

/// Memory [`project`] works in, kept between calls so that none allocates after the largest.
#[derive(Default)]
pub struct PackedScratch {
    activations: Activations,
}

impl Packed {
    /// Packs rows of `kind` as files store them.
    ///
    /// # Panics
    /// If `bytes` is not what `n_out · n_in` weights take, or `n_in` is no whole number of blocks.
    pub fn from_bytes(pool: &Pool, kind: WeightKind, bytes: &[u8], dims: [usize; 2]) -> Self {
        let mut packed = Self::zeroed(kind, dims);
        assert_eq!(Some(bytes.len()), kind.bytes(dims[0] * dims[1]), "{packed:?}");
        packed.set_rows(pool, 0, bytes);
        packed
    }

    /// Rows that [`Packed::set_rows`] starts at are a multiple of this.
    pub const ROWS_STEP: usize = TILE;

    /// Zeros, to be filled by [`Packed::set_rows`]: large files are packed without ever being whole in memory.
    ///
    /// # Panics
    /// If `n_in` is no whole number of blocks.
    pub fn zeroed(stored: WeightKind, [n_out, n_in]: [usize; 2]) -> Self {
        assert!(stored.bytes(n_in).is_some_and(|bytes| bytes > 0), "rows of {n_in} are no whole blocks");
        let kind = if layout::has_tiles(stored) { stored } else { WeightKind::F32 };
        let tiles = Buf::zeroed(n_out.div_ceil(TILE) * layout::tile_bytes(kind, n_in));
        Self { stored, kind, n_out, n_in, tiles }
    }

    /// Bytes that packed weights of this kind and shape take in memory; `None` if rows are no whole blocks.
    pub fn bytes_of(stored: WeightKind, [n_out, n_in]: [usize; 2]) -> Option<usize> {
        let kind = if layout::has_tiles(stored) { stored } else { WeightKind::F32 };
        stored.bytes(n_in).map(|_| n_out.div_ceil(TILE) * layout::tile_bytes(kind, n_in))
    }

    /// Packs rows from `first` on, as files store them.
    ///
    /// # Panics
    /// If `first` is no multiple of [`Packed::ROWS_STEP`], or `bytes` is not whole rows of this matrix.
    pub fn set_rows(&mut self, pool: &Pool, first: usize, bytes: &[u8]) {
        let Self { stored, kind, n_out, n_in, .. } = *self;
        let n_rows = bytes.len() / stored.bytes(n_in).expect("checked when made");
        assert!(stored.bytes(n_rows * n_in) == Some(bytes.len()), "{} bytes of {self:?}", bytes.len());
        assert!(first + n_rows <= n_out && first.is_multiple_of(TILE), "rows {first} + {n_rows} of {self:?}");
        let widened = (kind != stored).then(|| {
            let mut w_oi = vec![0.0; n_rows * n_in];
            stored.dequantize(bytes, &mut w_oi);
            kind.quantize(&w_oi)
        });
        let bytes = widened.as_deref().unwrap_or(bytes);
        let (row_bytes, tile_bytes) = (bytes.len() / n_rows.max(1), layout::tile_bytes(kind, n_in));
        let tiles = &mut self.tiles[first / TILE * tile_bytes..][..n_rows.div_ceil(TILE) * tile_bytes];
        pool.run_chunks(tiles, tile_bytes, |t, tile| {
            let rows = piece(t, TILE * row_bytes, bytes.len());
            layout::interleave(kind, &bytes[rows], n_in, tile);
        });
    }

    /// Packs f32 rows `w_oi` without loss.
    ///
    /// # Panics
    /// If `w_oi` is not `n_out · n_in` long.
    pub fn from_f32(pool: &Pool, w_oi: &[f32], dims: [usize; 2]) -> Self {
        let bytes: Vec<u8> = w_oi.iter().flat_map(|w| w.to_le_bytes()).collect();
        Self::from_bytes(pool, WeightKind::F32, &bytes, dims)
    }

    /// How the weights are stored.
    pub fn kind(&self) -> WeightKind {
        self.stored
    }

    /// Rows and columns: outputs and inputs.
    pub fn dims(&self) -> [usize; 2] {
        [self.n_out, self.n_in]
    }

    /// Bytes of memory, all of which one [`project`] call reads.
    pub fn bytes(&self) -> usize {
        self.tiles.len()
    }

    /// Row `i` in f32: the look-up of an embedding.
    ///
    /// # Panics
    /// If there is no such row, or `row` is not `n_in` long.
    pub fn row_f32(&self, i: usize, row: &mut [f32]) {
        assert!(i < self.n_out && row.len() == self.n_in, "row {i} of {:?} into {}", self.dims(), row.len());
        layout::row_f32(self.kind, self.tiles(i / TILE..i / TILE + 1), i % TILE, row);
    }

    fn n_tiles(&self) -> usize {
        self.n_out.div_ceil(TILE)
    }

    fn tiles(&self, tiles: Range<usize>) -> &[u8] {
        let bytes = layout::tile_bytes(self.kind, self.n_in);
        &self.tiles[tiles.start * bytes..tiles.end * bytes]
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed({} {}x{})", self.stored.name(), self.n_out, self.n_in)
    }
}

/// Multiplies `n` inputs with a stack of matrices: `y_no` holds for every input the outputs of the first matrix, then
/// those of the second, and so on. One stack is one pass of the threads.
///
/// # Panics
/// If the matrices differ in `n_in`, or the slices do not fit.
pub fn project(pool: &Pool, y_no: &mut [f32], stack: &[&Packed], x_ni: &[f32], scratch: &mut PackedScratch) {
    let n_in = stack[0].n_in;
    let n_out: usize = stack.iter().map(|w| w.n_out).sum();
    let n = x_ni.len() / n_in;
    assert!(stack.iter().all(|w| w.n_in == n_in), "matrices of one stack share their input: {stack:?}");
    assert_eq!((x_ni.len(), y_no.len()), (n * n_in, n * n_out), "{stack:?} times {n} inputs");
    if n == 0 {
        return;
    }
    if stack.iter().any(|w| w.kind.is_quantized()) {
        scratch.activations.set(pool, x_ni, n);
    }
    let x = Input { x_ni, quantized: &scratch.activations, n, level: pool.level() };
    let y = Disjoint::new(y_no);
    let tasks = Tasks::new(pool, stack, n);
    pool.run(tasks.tile_groups * tasks.col_groups, &|task| {
        let cols = piece(task / tasks.tile_groups, COLS_MAX, n);
        let tiles = piece(task % tasks.tile_groups, tasks.tiles_per_group, tasks.n_tiles);
        // The task's tiles run over the whole stack; each matrix takes those that are its own.
        let (mut first_tile, mut o) = (0, 0);
        for w in stack {
            let mine = |tile: usize| tile.clamp(first_tile, first_tile + w.n_tiles()) - first_tile;
            let out = |col: usize, row: usize| col * n_out + o + row;
            multiply(w, mine(tiles.start)..mine(tiles.end), &x, cols.clone(), &|col, row, sums| {
                let sums = &sums[..(w.n_out - row).min(TILE)];
                // SAFETY: each (column, row) belongs to one task.
                unsafe { y.slice(out(col, row)..out(col, row) + sums.len()) }.copy_from_slice(sums);
            });
            first_tile += w.n_tiles();
            o += w.n_out;
        }
    });
}

/// How a product is cut into tasks: groups of tiles times groups of columns.
struct Tasks {
    n_tiles: usize,
    tiles_per_group: usize,
    tile_groups: usize,
    col_groups: usize,
}

impl Tasks {
    fn new(pool: &Pool, stack: &[&Packed], n: usize) -> Self {
        let n_tiles: usize = stack.iter().map(|w| w.n_tiles()).sum();
        let col_groups = n.div_ceil(COLS_MAX);
        let wanted = (TASKS_PER_THREAD * pool.n_threads()).div_ceil(col_groups);
        let tiles_per_group = n_tiles.div_ceil(wanted).next_multiple_of(TILES_MAX);
        Self { n_tiles, tiles_per_group, tile_groups: n_tiles.div_ceil(tiles_per_group), col_groups }
    }
}

/// Enough that a thread which was held up by another process leaves its share to the others.
const TASKS_PER_THREAD: usize = 8;

/// The inputs in both forms; a kernel takes the one it needs.
struct Input<'a> {
    x_ni: &'a [f32],
    quantized: &'a Activations,
    n: usize,
    level: Level,
}

/// Multiplies tiles with columns and passes each result on: `put(column, first row, 16 rows)`.
fn multiply(
    w: &Packed,
    tiles: Range<usize>,
    x: &Input<'_>,
    cols: Range<usize>,
    put: &dyn Fn(usize, usize, &[f32; TILE]),
) {
    let mut sums: Sums = [[0.0; TILE]; COLS_MAX];
    // With one column float weights are taken several tiles at a time, everything else tile by tile.
    let step = if x.n == 1 && !w.kind.is_quantized() { TILES_MAX } else { 1 };
    for first in tiles.clone().step_by(step) {
        let group = first..(first + step).min(tiles.end);
        let tile = w.tiles(group.clone());
        match (w.kind.is_quantized(), x.n) {
            (true, 1) => {
                decode_tile(x.level, &DecodeTile { kind: w.kind, tile, x: x.quantized }, &mut sums[0])
            }
            (true, _) => batch_tile(
                x.level,
                &BatchTile { kind: w.kind, tile, x: x.quantized, cols: cols.clone() },
                &mut sums,
            ),
            (false, _) => {
                let x_ni = &x.x_ni[cols.start * w.n_in..cols.end * w.n_in];
                let task = FloatTiles { kind: w.kind, tiles: tile, x_ni, n: cols.len(), n_in: w.n_in };
                float_tiles(x.level, &task, &mut sums)
            }
        }
        for (i, sums) in sums[..group.len().max(cols.len())].iter().enumerate() {
            let (col, tile) = if cols.len() == 1 { (cols.start, first + i) } else { (cols.start + i, first) };
            put(col, tile * TILE, sums);
        }
    }
}
