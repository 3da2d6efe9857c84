//! Weights packed for inference: `y_no = x_ni · Wᵀ`.
//!
//! Weights stay in the bits they are stored in (4 to 8, 16 or 32), rearranged into tiles of 16 interleaved rows
//! ([`layout`]). With quantized weights the inputs become 16-bit integers with a scale for every 32 ([`activations`]), and
//! the products integers ([`dot`]), of which an instruction does four a lane ([`kernels`]). A row's result depends on its
//! weights and its own input only: not on the other columns, their number, or the threads. Test:
//! `rows_do_not_depend_on_the_batch`.
//!
//! The plain reference is [`WeightKind::dequantize`] and a sum in f64 (see the tests).

mod activations;
mod arena;
mod blocks;
mod dot;
mod float_kernels;
mod groups;
mod kernels;
mod kind;
mod layout;
mod quantize;
mod tasks;
#[cfg(test)]
mod tests;

pub use kind::WeightKind;

use crate::cpu::Level;
use crate::pool::Disjoint;
use crate::split::piece;
use crate::{Buf, Pool};
use activations::Activations;
use arena::Piece;
use float_kernels::{FloatTiles, float_tiles, interleave, interleave_pairs, uses_pairs};
use kernels::{BATCH_TILES, BatchTiles, COLS_MAX, DecodeTile, TILES_MAX, batch_tiles, decode_tile};
use layout::{Form, TILE};
use std::ops::Range;
use tasks::Tasks;

/// A weight matrix of `n_out` rows and `n_in` columns, packed for [`project`].
pub struct Packed {
    kind: WeightKind,
    n_out: usize,
    n_in: usize,
    /// `ceil(n_out / 16)` tiles; rows past `n_out` are zero.
    tiles: Piece,
}

/// Memory [`project`] works in, kept between calls so that none allocates after the largest.
#[derive(Default)]
pub struct PackedScratch {
    activations: Activations,
    /// Inputs of float weights, interleaved; of BF16 weights as pairs, where those are used.
    columns: Buf<f32>,
    pairs: Buf<u32>,
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
    pub fn zeroed(kind: WeightKind, [n_out, n_in]: [usize; 2]) -> Self {
        assert!(kind.bytes(n_in).is_some_and(|bytes| bytes > 0), "rows of {n_in} are no whole blocks");
        let tiles = Piece::zeroed(n_out.div_ceil(TILE) * layout::tile_bytes(kind, n_in));
        Self { kind, n_out, n_in, tiles }
    }

    /// Bytes that packed weights of this kind and shape take in memory; `None` if rows are no whole blocks.
    pub fn bytes_of(kind: WeightKind, [n_out, n_in]: [usize; 2]) -> Option<usize> {
        kind.bytes(n_in).map(|_| n_out.div_ceil(TILE) * layout::tile_bytes(kind, n_in))
    }

    /// Packs rows from `first` on, as files store them.
    ///
    /// # Panics
    /// If `first` is no multiple of [`Packed::ROWS_STEP`], or `bytes` is not whole rows of this matrix.
    pub fn set_rows(&mut self, pool: &Pool, first: usize, bytes: &[u8]) {
        let Self { kind, n_out, n_in, .. } = *self;
        let row_bytes = kind.bytes(n_in).expect("checked when made");
        let n_rows = bytes.len() / row_bytes;
        assert!(n_rows * row_bytes == bytes.len(), "{} bytes of {self:?}", bytes.len());
        assert!(first + n_rows <= n_out && first.is_multiple_of(TILE), "rows {first} + {n_rows} of {self:?}");
        let tile_bytes = layout::tile_bytes(kind, n_in);
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
        self.kind
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
        write!(f, "Packed({} {}x{})", self.kind.name(), self.n_out, self.n_in)
    }
}

/// Multiplies `n` inputs with a stack of matrices: `y_no` holds for every input the outputs of the first matrix, then
/// those of the second, and so on. One stack is one pass of the threads.
///
/// # Panics
/// If the matrices differ in `n_in`, or the slices do not fit.
pub fn project(pool: &Pool, y_no: &mut [f32], stack: &[&Packed], x_ni: &[f32], scratch: &mut PackedScratch) {
    project_before(pool, y_no, (stack, &[]), x_ni, scratch);
}

/// As [`project`], and `next` is the stack that will be multiplied next: until then threads without work fetch what they
/// will read of it first.
///
/// # Panics
/// As [`project`].
pub fn project_before(
    pool: &Pool,
    y_no: &mut [f32],
    (stack, next): (&[&Packed], &[Packed]),
    x_ni: &[f32],
    scratch: &mut PackedScratch,
) {
    let n_in = stack[0].n_in;
    let n_out: usize = stack.iter().map(|w| w.n_out).sum();
    let n = x_ni.len() / n_in;
    assert!(stack.iter().all(|w| w.n_in == n_in), "matrices of one stack share their input: {stack:?}");
    assert_eq!((x_ni.len(), y_no.len()), (n * n_in, n * n_out), "{stack:?} times {n} inputs");
    if n == 0 {
        return;
    }
    let level = pool.level();
    if stack.iter().any(|w| w.kind.is_quantized()) {
        scratch.activations.set(pool, x_ni, n);
    }
    let pairs = |w: &Packed| w.kind == WeightKind::Bf16 && uses_pairs(level);
    if stack.iter().any(|w| pairs(w)) {
        scratch.pairs.reserve_scratch(n * n_in.div_ceil(2));
        interleave_pairs(pool, x_ni, n, &mut scratch.pairs[..n * n_in.div_ceil(2)]);
    }
    // One column is its own interleaving.
    let columns = match n > 1 && stack.iter().any(|w| !w.kind.is_quantized() && !pairs(w)) {
        false => x_ni,
        true => {
            scratch.columns.reserve_scratch(x_ni.len());
            interleave(pool, x_ni, n, &mut scratch.columns[..x_ni.len()]);
            &scratch.columns
        }
    };
    let x = Input { columns, pairs: &scratch.pairs, quantized: &scratch.activations, n, level };
    let y = Disjoint::new(y_no);
    let tasks = Tasks::new(pool, stack.iter().copied(), n);
    let next_tasks = Tasks::new(pool, next.iter(), n);
    let multiply_task = |task: usize| {
        let (tiles, cols) = (tasks.tiles(task), tasks.cols(task));
        // The task's tiles run over the whole stack; each matrix takes those that are its own.
        let (mut first_tile, mut o) = (0, 0);
        for w in stack {
            let mine = |tile: usize| tile.clamp(first_tile, first_tile + w.n_tiles()) - first_tile;
            let out = |col: usize, row: usize| col * n_out + o + row;
            let tiles = mine(tiles.start)..mine(tiles.end);
            let put = |col: usize, row: usize, sums: &[f32; TILE]| {
                let sums = &sums[..(w.n_out - row).min(TILE)];
                // SAFETY: each (column, row) belongs to one task.
                unsafe { y.slice(out(col, row)..out(col, row) + sums.len()) }.copy_from_slice(sums);
            };
            // Zeros for more columns than there are would take a tenth of what one column takes, a fortieth of eight.
            match n {
                _ if tiles.is_empty() => {}
                1 => multiply::<1>(w, tiles, &x, cols.clone(), put),
                2..=8 => multiply::<8>(w, tiles, &x, cols.clone(), put),
                _ => multiply::<COLS_MAX>(w, tiles, &x, cols.clone(), put),
            }
            first_tile += w.n_tiles();
            o += w.n_out;
        }
    };
    pool.run_shares(tasks.n(), &multiply_task, &|thread| next_tasks.first_read(next, thread));
}

/// The inputs in every form; a kernel takes the one it needs.
struct Input<'a> {
    columns: &'a [f32],
    pairs: &'a [u32],
    quantized: &'a Activations,
    n: usize,
    level: Level,
}

/// Multiplies tiles with up to `COLS` columns and passes each result on: `put(column, first row, 16 rows)`.
fn multiply<const COLS: usize>(
    w: &Packed,
    tiles: Range<usize>,
    x: &Input<'_>,
    cols: Range<usize>,
    put: impl Fn(usize, usize, &[f32; TILE]),
) {
    let mut sums = [[[0.0; TILE]; TILES_MAX]; COLS];
    let form = Form::of(w.kind);
    let step = match (form, x.n) {
        (Some(_), 1) => 1,
        (None, 1) => TILES_MAX,
        (_, _) => BATCH_TILES,
    };
    for first in tiles.clone().step_by(step) {
        let group = first..(first + step).min(tiles.end);
        let (n_in, n_tiles, tiles) = (w.n_in, group.len(), w.tiles(group.clone()));
        match (form, x.n) {
            (Some(form), 1) => {
                let task = DecodeTile { form, tile: tiles, n_in, x: x.quantized };
                decode_tile(x.level, &task, &mut sums[0][0])
            }
            (Some(form), _) => {
                let task = BatchTiles { form, tiles, n_tiles, n_in, x: x.quantized, cols: cols.clone() };
                batch_tiles(x.level, &task, &mut sums)
            }
            (None, _) => float_tiles(x.level, &x.float_task(w, tiles, n_tiles, cols.clone()), &mut sums),
        }
        for (col, sums) in cols.clone().zip(&sums) {
            for (tile, sums) in group.clone().zip(sums) {
                put(col, tile * TILE, sums);
            }
        }
    }
}

impl Input<'_> {
    fn float_task<'a>(
        &'a self,
        w: &Packed,
        tiles: &'a [u8],
        n_tiles: usize,
        cols: Range<usize>,
    ) -> FloatTiles<'a> {
        let (n_in, n_pairs) = (w.n_in, w.n_in.div_ceil(2));
        let pairs = w.kind == WeightKind::Bf16 && uses_pairs(self.level);
        FloatTiles {
            kind: w.kind,
            tiles,
            n_tiles,
            x: if pairs { &[] } else { &self.columns[cols.start * n_in..cols.end * n_in] },
            pairs: pairs.then(|| &self.pairs[cols.start * n_pairs..cols.end * n_pairs]),
            n: cols.len(),
            n_in,
        }
    }
}
