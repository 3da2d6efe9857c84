//! Products of float weights with f32 inputs: one chain over the inputs for every output, whatever the number of columns.
//!
//! `acc = fma(w, x, acc)`; where the processor is at its best with bf16 pairs, BF16 weights take inputs rounded to bf16:
//! `acc = (acc + w₁·x₁) + w₀·x₀` for two inputs at a time.

use super::kernels::{Sums, TILES_MAX};
use super::kind::WeightKind;
use super::layout::{TILE, WORD_BYTES};
use crate::Pool;
use crate::buf::Plain;
use crate::cpu::{Level, features};
use crate::simd::{Portable, Simd, dispatch};
use half::f16;
use std::ops::Range;

/// Some tiles times one column, or up to two tiles times some columns.
pub(super) struct FloatTiles<'a> {
    pub(super) kind: WeightKind,
    /// One after another.
    pub(super) tiles: &'a [u8],
    /// At most [`TILES_MAX`] if `n` is 1, 2 otherwise.
    pub(super) n_tiles: usize,
    /// The inputs, as [`interleave`] lays them out.
    pub(super) x: &'a [f32],
    /// Instead of them pairs of bf16, as [`interleave_pairs`] does, if those are to be used.
    pub(super) pairs: Option<&'a [u32]>,
    pub(super) n: usize,
    pub(super) n_in: usize,
}

/// Whether BF16 weights are multiplied as pairs. AMD's processors do twice as many products a second that way than in
/// f32; Intel's, without AMX, half as many.
pub(super) fn uses_pairs(level: Level) -> bool {
    level == Level::Avx512 && features().bf16_fast
}

/// Multiplies.
pub(super) fn float_tiles(level: Level, task: &FloatTiles<'_>, sums: &mut Sums) {
    if task.pairs.is_some() { pair_tiles(level, task, sums) } else { fma_tiles(level, task, sums) }
}

dispatch!(fn fma_tiles(task: &FloatTiles<'_>, sums: &mut Sums) = fma_tiles_simd);

#[inline(always)]
fn fma_tiles_simd<S: Simd>(s: S, task: &FloatTiles<'_>, sums: &mut Sums) {
    match task.kind {
        WeightKind::F32 => tiles::<S, F32>(s, task, sums),
        WeightKind::F16 => tiles::<S, F16>(s, task, sums),
        WeightKind::Bf16 => tiles::<S, Bf16>(s, task, sums),
        kind => unreachable!("{kind:?} has kernels of its own"),
    }
}

/// The one kernel that needs an instruction its level does not promise, so it has its own dispatch.
fn pair_tiles(level: Level, task: &FloatTiles<'_>, sums: &mut Sums) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
    fn avx512_bf16(s: crate::simd::Avx512, task: &FloatTiles<'_>, sums: &mut Sums) {
        tiles::<_, Bf16Pairs>(s, task, sums)
    }
    match level.available() {
        // SAFETY: the processor has the level and AVX512-BF16.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if features().bf16 => unsafe { avx512_bf16(crate::simd::Avx512::new(), task, sums) },
        _ => tiles::<_, Bf16Pairs>(Portable::<16>, task, sums),
    }
}

#[inline(always)]
fn tiles<S: Simd, W: Word>(s: S, task: &FloatTiles<'_>, sums: &mut Sums) {
    assert!(task.n_tiles <= if task.n == 1 { TILES_MAX } else { 2 });
    match (task.n, S::LANES, task.n_tiles) {
        // One column: the chains of several tiles hide each other's latency.
        (1, 8, 4) => _ = chains::<S, W, 8, 1>(s, task, [0, 0], sums),
        (1, 16, 4) => _ = chains::<S, W, 4, 1>(s, task, [0, 0], sums),
        // Loops, because a closure is a function without the instructions of this one.
        (_, 8, _) => {
            for tile in 0..task.n_tiles {
                columns::<S, W, 2>(s, task, tile, sums);
            }
        }
        (1, _, _) => {
            for tile in 0..task.n_tiles {
                columns::<S, W, 1>(s, task, tile, sums);
            }
        }
        (_, _, 2) => columns::<S, W, 2>(s, task, 0, sums),
        (_, _, _) => columns::<S, W, 1>(s, task, 0, sums),
    }
}

/// Columns that are computed together when `n` are left: as many as the registers allow.
fn width(n: usize, lanes: usize) -> usize {
    match (n, lanes) {
        (12.., 16) => 12,
        (6.., _) => 6,
        (4.., _) => 4,
        (2.., _) => 2,
        (_, _) => 1,
    }
}

/// All columns of `R` registers of rows.
#[inline(always)]
fn columns<S: Simd, W: Word, const R: usize>(s: S, task: &FloatTiles<'_>, tile: usize, sums: &mut Sums) {
    let mut c = 0;
    while c < task.n {
        c += match width(task.n - c, S::LANES) {
            12 => chains::<S, W, R, 12>(s, task, [tile, c], sums),
            6 => chains::<S, W, R, 6>(s, task, [tile, c], sums),
            4 => chains::<S, W, R, 4>(s, task, [tile, c], sums),
            2 => chains::<S, W, R, 2>(s, task, [tile, c], sums),
            _ => chains::<S, W, R, 1>(s, task, [tile, c], sums),
        };
    }
}

/// `R` registers of rows times `C` columns from tile and column `[tile, c]` on; returns `C`.
#[inline(always)]
fn chains<S: Simd, W: Word, const R: usize, const C: usize>(
    s: S,
    task: &FloatTiles<'_>,
    [tile, c]: [usize; 2],
    sums: &mut Sums,
) -> usize {
    let tile_bytes = task.tiles.len() / task.n_tiles;
    let place = |r: usize| (tile + r * S::LANES / TILE, r * S::LANES % TILE);
    assert!(place(R - 1).0 < task.n_tiles && c + C <= task.n);
    let tiles: [*const u8; R] = std::array::from_fn(|r| {
        let (tile, row) = place(r);
        task.tiles[tile * tile_bytes + row * W::BYTES / TILE..].as_ptr()
    });
    let x = Columns::<C>::of(task, c);
    let mut acc = [[s.zero(); C]; R];
    let n_whole = task.n_in / W::INPUTS;
    for word in 0..n_whole {
        let mut w = [[s.zero(); 2]; R];
        for r in 0..R {
            if c == 0 {
                // The tiles that come next.
                s.prefetch(tiles[r].wrapping_add(word * W::BYTES + task.tiles.len()).cast());
            }
            // SAFETY: a register of the 16 rows of a word of the tile.
            w[r] = unsafe { W::load(s, tiles[r].add(word * W::BYTES)) };
        }
        for j in 0..C {
            for r in 0..R {
                // SAFETY: the column has all inputs of a whole word.
                acc[r][j] = unsafe { W::step(s, w[r], &x, [word, j], acc[r][j]) };
            }
        }
    }
    if n_whole * W::INPUTS < task.n_in {
        for r in 0..R {
            // SAFETY: the tile has another word, with a zero for the missing input.
            let w = unsafe { W::load(s, tiles[r].add(n_whole * W::BYTES)) };
            for j in 0..C {
                // SAFETY: the column has one more input.
                acc[r][j] = unsafe { W::last(s, w, &x, [n_whole, j], acc[r][j]) };
            }
        }
    }
    for r in 0..R {
        let (tile, row) = place(r);
        for j in 0..C {
            s.store(&mut sums[c + j][tile][row..], acc[r][j]);
        }
    }
    C
}

/// The inputs of `C` columns that are computed together, in either form. They lie side by side, input by input: with a
/// pointer to each column the processor would run out of registers for pointers.
struct Columns<'a, const C: usize> {
    x_kc: &'a [f32],
    pairs_kc: &'a [u32],
}

impl<'a, const C: usize> Columns<'a, C> {
    #[inline(always)]
    fn of(task: &FloatTiles<'a>, c: usize) -> Self {
        let n_pairs = task.n_in.div_ceil(2);
        match task.pairs {
            Some(pairs) => Self { x_kc: &[], pairs_kc: &pairs[c * n_pairs..(c + C) * n_pairs] },
            None => Self { x_kc: &task.x[c * task.n_in..(c + C) * task.n_in], pairs_kc: &[] },
        }
    }
}

/// Lays the `n` columns of `x_ni` out for [`FloatTiles::x`]: those that are computed together as `[n_in][C]`, one group
/// after another. As long as `x_ni`.
pub(super) fn interleave(pool: &Pool, x_ni: &[f32], n: usize, out: &mut [f32]) {
    let n_in = x_ni.len() / n;
    for_groups(pool, n, n_in, out, |cols, out| {
        for (j, x_i) in x_ni[cols.start * n_in..cols.end * n_in].chunks_exact(n_in).enumerate() {
            out[j..].iter_mut().step_by(cols.len()).zip(x_i).for_each(|(out, x)| *out = *x);
        }
    });
}

/// As [`interleave`], with the inputs as pairs of bf16: the first of two in the low half, a missing one 0. `out` is
/// `n · ceil(n_in / 2)` long.
pub(super) fn interleave_pairs(pool: &Pool, x_ni: &[f32], n: usize, out: &mut [u32]) {
    let n_in = x_ni.len() / n;
    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
    for_groups(pool, n, n_in.div_ceil(2), out, |cols, out| {
        for (j, x_i) in x_ni[cols.start * n_in..cols.end * n_in].chunks_exact(n_in).enumerate() {
            let pairs = x_i.chunks(2).map(|x| bits(x[0]) | x.get(1).map_or(0, |&x| bits(x) << 16));
            out[j..].iter_mut().step_by(cols.len()).zip(pairs).for_each(|(out, pair)| *out = pair);
        }
    });
}

/// Calls `fill(columns, their part of out)` for all groups of columns that are computed together; a column has `n_words`.
fn for_groups<T: Plain>(
    pool: &Pool,
    n: usize,
    n_words: usize,
    out: &mut [T],
    fill: impl Fn(Range<usize>, &mut [T]) + Sync,
) {
    let lanes = lanes(pool.level());
    let most = width(usize::MAX, lanes);
    pool.run_chunks(out, most * n_words, |task, out| {
        let (mut first, mut out) = (task * most, out);
        while !out.is_empty() {
            let cols = first..first + width(n.min((task + 1) * most) - first, lanes);
            let (mine, rest) = std::mem::take(&mut out).split_at_mut(cols.len() * n_words);
            (first, out) = (cols.end, rest);
            fill(cols, mine);
        }
    });
}

dispatch!(fn lanes() -> usize = lanes_simd);

fn lanes_simd<S: Simd>(_: S) -> usize {
    S::LANES
}

/// The unit of a tile: 16 rows of one or two inputs.
trait Word {
    const INPUTS: usize;
    const BYTES: usize;

    /// LANES rows, the weights of each input in a register.
    /// # Safety
    /// They are readable at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 2];

    /// acc plus the products of a word and a column, `place`.
    /// # Safety
    /// The columns have all inputs of the word.
    unsafe fn step<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        place: [usize; 2],
        acc: S::F,
    ) -> S::F;

    /// As [`Word::step`], of a word of which the second input is missing.
    /// # Safety
    /// The columns have the first input.
    #[inline(always)]
    unsafe fn last<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        place: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: words of one input miss none.
        unsafe { Self::step(s, w, x, place, acc) }
    }
}

struct F32;
struct F16;
struct Bf16;
struct Bf16Pairs;

/// acc = fma(w, x\[k\]\[j\], acc)
#[inline(always)]
unsafe fn fma_input<S: Simd, const C: usize>(
    s: S,
    w: S::F,
    x: &Columns<'_, C>,
    [k, j]: [usize; 2],
    acc: S::F,
) -> S::F {
    // SAFETY: the caller's promise.
    s.fma(w, s.splat(unsafe { *x.x_kc.get_unchecked(k * C + j) }), acc)
}

impl Word for F32 {
    const INPUTS: usize = 1;
    const BYTES: usize = WORD_BYTES;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's promise.
        [unsafe { s.load_ptr(p.cast()) }, s.zero()]
    }
    #[inline(always)]
    unsafe fn step<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        [word, j]: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { fma_input(s, w[0], x, [word, j], acc) }
    }
}

impl Word for F16 {
    const INPUTS: usize = 1;
    const BYTES: usize = TILE * size_of::<f16>();

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's promise.
        [unsafe { s.load_f16_ptr(p.cast()) }, s.zero()]
    }
    #[inline(always)]
    unsafe fn step<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        [word, j]: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { fma_input(s, w[0], x, [word, j], acc) }
    }
}

impl Word for Bf16 {
    const INPUTS: usize = 2;
    const BYTES: usize = WORD_BYTES;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's promise.
        let word = unsafe { s.load_i_ptr(p.cast()) };
        let high = s.and_i(word, s.splat_i(0xffff_0000_u32 as i32));
        [s.bits_to_f(s.shl_i::<16>(word)), s.bits_to_f(high)]
    }
    #[inline(always)]
    unsafe fn step<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        [word, j]: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { fma_input(s, w[1], x, [2 * word + 1, j], fma_input(s, w[0], x, [2 * word, j], acc)) }
    }
    #[inline(always)]
    unsafe fn last<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        [word, j]: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { fma_input(s, w[0], x, [2 * word, j], acc) }
    }
}

impl Word for Bf16Pairs {
    const INPUTS: usize = 2;
    const BYTES: usize = WORD_BYTES;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's promise.
        [unsafe { s.load_ptr(p.cast()) }, s.zero()]
    }
    #[inline(always)]
    unsafe fn step<S: Simd, const C: usize>(
        s: S,
        w: [S::F; 2],
        x: &Columns<'_, C>,
        [word, j]: [usize; 2],
        acc: S::F,
    ) -> S::F {
        // SAFETY: the caller's promise.
        let pair = unsafe { *x.pairs_kc.get_unchecked(word * C + j) };
        s.dot_bf16(w[0], s.splat(f32::from_bits(pair)), acc)
    }
}
