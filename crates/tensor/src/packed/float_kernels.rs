//! Products of float weights with f32 inputs: one chain acc = fma(w, x, acc) over the inputs for every output, whatever
//! the number of columns.

use super::kernels::Sums;
use super::kind::WeightKind;
use super::layout::TILE;
use crate::elem::Elem;
use crate::simd::{Simd, dispatch};
use half::{bf16, f16};

/// Tiles that are worked on at once when there is one column: their chains hide each other's latency.
pub(super) const TILES_MAX: usize = 4;

/// Some tiles times one column, or one tile times some columns.
pub(super) struct FloatTiles<'a> {
    pub(super) kind: WeightKind,
    /// Up to [`TILES_MAX`] tiles one after another; exactly one unless `n` is 1.
    pub(super) tiles: &'a [u8],
    /// `[n][n_in]`
    pub(super) x_ni: &'a [f32],
    pub(super) n: usize,
    pub(super) n_in: usize,
}

dispatch!(
    /// Sums of tile t are `sums[t]` when there is one column, those of column c are `sums[c]` when there is one tile.
    pub(super) fn float_tiles(task: &FloatTiles<'_>, sums: &mut Sums) = float_tiles_simd
);

#[inline(always)]
fn float_tiles_simd<S: Simd>(s: S, task: &FloatTiles<'_>, sums: &mut Sums) {
    match task.kind {
        WeightKind::F32 => steps::<S, f32>(s, task, sums),
        WeightKind::Bf16 => steps::<S, bf16>(s, task, sums),
        WeightKind::F16 => steps::<S, f16>(s, task, sums),
        _ => unreachable!("quantized weights have kernels of their own"),
    }
}

#[inline(always)]
fn steps<S: Simd, E: Elem>(s: S, task: &FloatTiles<'_>, sums: &mut Sums) {
    let tile_bytes = task.n_in * TILE * size_of::<E>();
    let n_tiles = task.tiles.len() / tile_bytes;
    assert!(n_tiles <= TILES_MAX && (task.n == 1 || n_tiles == 1));
    let mut c = 0;
    while task.n == 1 && c < n_tiles {
        let tiles = &task.tiles[c * tile_bytes..];
        c += match (n_tiles - c, S::LANES) {
            (4.., 8) => chains::<S, E, 8, 1>(s, tiles, task, 0, &mut sums[c..]) * 4,
            (_, 8) => chains::<S, E, 2, 1>(s, tiles, task, 0, &mut sums[c..]),
            (4.., _) => chains::<S, E, 4, 1>(s, tiles, task, 0, &mut sums[c..]) * 4,
            (_, _) => chains::<S, E, 1, 1>(s, tiles, task, 0, &mut sums[c..]),
        };
    }
    while task.n > 1 && c < task.n {
        c += match (task.n - c, S::LANES) {
            (6.., 8) => chains::<S, E, 2, 6>(s, task.tiles, task, c, &mut sums[c..]),
            (4.., 8) => chains::<S, E, 2, 4>(s, task.tiles, task, c, &mut sums[c..]),
            (2.., 8) => chains::<S, E, 2, 2>(s, task.tiles, task, c, &mut sums[c..]),
            (_, 8) => chains::<S, E, 2, 1>(s, task.tiles, task, c, &mut sums[c..]),
            (12.., _) => chains::<S, E, 1, 12>(s, task.tiles, task, c, &mut sums[c..]),
            (6.., _) => chains::<S, E, 1, 6>(s, task.tiles, task, c, &mut sums[c..]),
            (4.., _) => chains::<S, E, 1, 4>(s, task.tiles, task, c, &mut sums[c..]),
            (2.., _) => chains::<S, E, 1, 2>(s, task.tiles, task, c, &mut sums[c..]),
            (_, _) => chains::<S, E, 1, 1>(s, task.tiles, task, c, &mut sums[c..]),
        };
    }
}

/// `R` registers of rows (of one tile, or of several with `C` = 1) times `C` columns from column `c` on; returns `C`.
#[inline(always)]
fn chains<S: Simd, E: Elem, const R: usize, const C: usize>(
    s: S,
    tiles: &[u8],
    task: &FloatTiles<'_>,
    c: usize,
    sums: &mut [[f32; TILE]],
) -> usize {
    let n_in = task.n_in;
    let tile_bytes = n_in * TILE * size_of::<E>();
    let place = |r: usize| (r * S::LANES / TILE, r * S::LANES % TILE);
    assert!(tiles.len() >= (place(R - 1).0 + 1) * tile_bytes);
    let x: [&[f32]; C] = std::array::from_fn(|j| &task.x_ni[(c + j) * n_in..][..n_in]);
    let mut acc = [[s.zero(); C]; R];
    for k in 0..n_in {
        let mut w = [s.zero(); R];
        for r in 0..R {
            let (tile, row) = place(r);
            // SAFETY: a register of the 16 rows of input k; the tile lies in `tiles` (asserted above).
            w[r] =
                unsafe { E::load(s, tiles.as_ptr().add(tile * tile_bytes).cast::<E>().add(k * TILE + row)) };
        }
        for j in 0..C {
            let x = s.splat(x[j][k]);
            for r in 0..R {
                acc[r][j] = s.fma(w[r], x, acc[r][j]);
            }
        }
    }
    for r in 0..R {
        let (tile, row) = place(r);
        for j in 0..C {
            s.store(&mut sums[tile + j][row..], acc[r][j]);
        }
    }
    C
}
