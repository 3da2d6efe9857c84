//! Products of quantized weights: some tiles times some columns.
//!
//! For each group of 32 inputs, and each part of it that has a scale of its own:
//! ```text
//! t   = Σ q_w · q_x − zero · Σ q_x       in int32, exact
//! acc = fma(t, a · scale, acc)
//! acc = fma(b, Σ x, acc)                 where b is stored
//! ```
//! The integers are exact in any order and the float steps are the same in the same order everywhere, so a row's result
//! does not depend on which kernel made it.

use super::activations::{Activations, Block};
use super::dot::{Dot, STEPS, X_BYTES, dot_steps};
use super::groups::{affine, ints, nibble_words};
use super::kind::BLOCK;
use super::layout::{Form, TILE};
use crate::cpu::LINE_BYTES;
use crate::simd::{Simd, dispatch};

/// Columns a task takes at a time: their sums (32 rows × 48 × 4 B = 6 KiB) stay in L1, their inputs in L2. A multiple of
/// every step of columns below.
pub(super) const COLS_MAX: usize = 48;

/// Tiles that are worked on at once with several columns: an input that was fetched meets two registers of rows.
pub(super) const BATCH_TILES: usize = 2;

/// Tiles that are worked on at once at most.
pub(super) const TILES_MAX: usize = 4;

/// Results of some columns, in turn for each of up to [`TILES_MAX`] tiles.
pub(super) type Sums = [[[f32; TILE]; TILES_MAX]];

/// One tile times one column of quantized inputs.
pub(super) struct DecodeTile<'a> {
    pub(super) form: Form,
    pub(super) tile: &'a [u8],
    pub(super) n_in: usize,
    pub(super) x: &'a Activations,
}

dispatch!(pub(super) fn decode_tile(task: &DecodeTile<'_>, sums: &mut [f32; TILE]) = decode_tile_simd);

#[inline(always)]
fn decode_tile_simd<S: Dot>(s: S, task: &DecodeTile<'_>, sums: &mut [f32; TILE]) {
    // Bound here, outside the loops, so that each form is a loop of its own.
    let Form { bits, min, k } = task.form;
    match (bits, min, k) {
        (4, false, false) => decode::<S, 4, false, false>(s, task, sums),
        (4, true, false) => decode::<S, 4, true, false>(s, task, sums),
        (5, false, false) => decode::<S, 5, false, false>(s, task, sums),
        (5, true, false) => decode::<S, 5, true, false>(s, task, sums),
        (8, false, false) => decode::<S, 8, false, false>(s, task, sums),
        (4, true, true) => decode::<S, 4, true, true>(s, task, sums),
        (5, true, true) => decode::<S, 5, true, true>(s, task, sums),
        (6, false, true) => decode::<S, 6, false, true>(s, task, sums),
        _ => unreachable!("no kind has groups of {bits} bits, {min}, {k}"),
    }
}

#[inline(always)]
fn decode<S: Dot, const BITS: usize, const MIN: bool, const K: bool>(
    s: S,
    task: &DecodeTile<'_>,
    sums: &mut [f32; TILE],
) {
    match S::LANES {
        8 => decode_rows::<S, 2, BITS, MIN, K>(s, task, sums),
        _ => decode_rows::<S, 1, BITS, MIN, K>(s, task, sums),
    }
}

/// The whole tile, `R` registers of rows: each input that was fetched meets all of them.
#[inline(always)]
fn decode_rows<S: Dot, const R: usize, const BITS: usize, const MIN: bool, const K: bool>(
    s: S,
    task: &DecodeTile<'_>,
    sums: &mut [f32; TILE],
) {
    let form = Form { bits: BITS, min: MIN, k: K };
    let (group_bytes, steps) = (form.group_bytes(), STEPS / form.parts());
    let (ints_part, scales) = task.tile.split_at(form.ints_bytes(task.n_in));
    let mut acc = [s.zero(); R];
    for (g, group) in ints_part.chunks_exact(group_bytes).enumerate() {
        let x = task.x.block(g, 0..1);
        let q_sums = [x.sums[0], x.sums[1]];
        prefetch(s, task.tile, task.tile.len(), [g, task.n_in / BLOCK]);
        for (r, acc) in acc.iter_mut().enumerate() {
            let row = r * S::LANES;
            // SAFETY: LANES rows from `row` on of a group, and of its scales.
            let (group, (a, b)) =
                unsafe { (group.as_ptr().add(4 * row), affine(s, form, scales.as_ptr().add(2 * row), g)) };
            for part in 0..form.parts() {
                // SAFETY: as above; x.q is one block.
                let total = unsafe {
                    match BITS {
                        4 => s.dot_nibbles(nibble_words(s, group), x.q.as_ptr()),
                        _ => dot_steps(
                            s,
                            &ints::<S, BITS>(s, group),
                            x.q.as_ptr(),
                            part * steps..(part + 1) * steps,
                        ),
                    }
                };
                let zero = match form.parts() {
                    2 => offset::<2>(form.zero(), q_sums, part),
                    _ => offset::<1>(form.zero(), q_sums, part),
                };
                let total = if MIN { total } else { s.add_i(total, s.splat_i(zero)) };
                *acc = s.fma(s.to_f(total), s.mul(a[part], s.splat(x.scales[0])), *acc);
            }
            if MIN {
                *acc = s.fma(b, s.splat(x.x_sums[0]), *acc);
            }
        }
    }
    for (sums, acc) in sums.chunks_exact_mut(S::LANES).zip(acc) {
        s.store(sums, acc);
    }
}

/// What the zero point adds to the products of a part of a column; `q_sums` are those of the halves of its block.
#[inline(always)]
fn offset<const PARTS: usize>(zero: i32, q_sums: [i32; 2], part: usize) -> i32 {
    -zero * if PARTS == 2 { q_sums[part] } else { q_sums[0] + q_sums[1] }
}

/// Asks for the part of the tile `ahead` bytes after `tile` that falls to group `g` of `n_groups`: by the time the kernel
/// comes there, the groups have asked for all of it, integers and scales. Past the end of the weights it does no harm.
#[inline(always)]
fn prefetch<S: Simd>(s: S, tile: &[u8], ahead: usize, [g, n_groups]: [usize; 2]) {
    let share = tile.len() / n_groups;
    for line in (0..share).step_by(LINE_BYTES) {
        s.prefetch(tile.as_ptr().wrapping_add(ahead + g * share + line).cast());
    }
}

/// Up to [`BATCH_TILES`] tiles times several columns of quantized inputs.
pub(super) struct BatchTiles<'a> {
    pub(super) form: Form,
    /// One after another.
    pub(super) tiles: &'a [u8],
    pub(super) n_tiles: usize,
    pub(super) n_in: usize,
    pub(super) x: &'a Activations,
    /// At most [`COLS_MAX`].
    pub(super) cols: std::ops::Range<usize>,
}

dispatch!(pub(super) fn batch_tiles(task: &BatchTiles<'_>, sums: &mut Sums) = batch_tiles_simd);

#[inline(always)]
fn batch_tiles_simd<S: Dot>(s: S, task: &BatchTiles<'_>, sums: &mut Sums) {
    // Bound here, outside the loops, for a loop each.
    match (S::LANES, task.n_tiles, task.form.parts()) {
        // 8 lanes: a tile is two registers.
        (8, _, parts) => {
            for tile in 0..task.n_tiles {
                match (parts, task.form.min) {
                    (2, _) => batch::<S, 2, 2, false>(s, task, tile, sums),
                    (_, true) => batch::<S, 2, 1, true>(s, task, tile, sums),
                    (_, false) => batch::<S, 2, 1, false>(s, task, tile, sums),
                }
            }
        }
        (_, 2, parts) => match (parts, task.form.min) {
            (2, _) => batch::<S, 2, 2, false>(s, task, 0, sums),
            (_, true) => batch::<S, 2, 1, true>(s, task, 0, sums),
            (_, false) => batch::<S, 2, 1, false>(s, task, 0, sums),
        },
        (_, _, parts) => match (parts, task.form.min) {
            (2, _) => batch::<S, 1, 2, false>(s, task, 0, sums),
            (_, true) => batch::<S, 1, 1, true>(s, task, 0, sums),
            (_, false) => batch::<S, 1, 1, false>(s, task, 0, sums),
        },
    }
}

/// A group of `R` registers of rows in the form the products need: 2 KiB at most, in L1.
#[repr(align(64))]
struct WideGroup {
    /// `[step][half][R][LANES]`: as [`Dot::half`] makes them.
    ints: [i32; STEPS * BATCH_TILES * TILE],
    /// `[part][R][LANES]`
    a: [f32; 2 * BATCH_TILES * TILE],
    /// `[R][LANES]`
    b: [f32; BATCH_TILES * TILE],
    /// What the zero point adds to the products of each column: `[part][column]`
    offsets: [[i32; COLS_MAX]; 2],
}

/// `R` registers of rows from tile `tile` on: a group of weights is widened once and then multiplied with all columns.
#[inline(always)]
fn batch<S: Dot, const R: usize, const PARTS: usize, const MIN: bool>(
    s: S,
    task: &BatchTiles<'_>,
    tile: usize,
    sums: &mut Sums,
) {
    let n = task.cols.len();
    for sums in &mut sums[..n] {
        sums.as_flattened_mut()[tile * TILE..][..R * S::LANES].fill(0.0);
    }
    let mut w = WideGroup {
        ints: [0; STEPS * BATCH_TILES * TILE],
        a: [0.0; 2 * BATCH_TILES * TILE],
        b: [0.0; BATCH_TILES * TILE],
        offsets: [[0; COLS_MAX]; 2],
    };
    for g in 0..task.n_in / BLOCK {
        match task.form.bits {
            4 => widen::<S, R, 4>(s, task, tile, g, &mut w),
            5 => widen::<S, R, 5>(s, task, tile, g, &mut w),
            6 => widen::<S, R, 6>(s, task, tile, g, &mut w),
            _ => widen::<S, R, 8>(s, task, tile, g, &mut w),
        }
        let x = task.x.block(g, task.cols.clone());
        if !MIN {
            for (part, offsets) in w.offsets[..PARTS].iter_mut().enumerate() {
                for (to, q_sums) in offsets.iter_mut().zip(x.sums.as_chunks().0) {
                    *to = offset::<PARTS>(task.form.zero(), *q_sums, part);
                }
            }
        }
        let mut c = 0;
        while c < n {
            let place = Place { c, tile };
            c += match (n - c, S::LANES) {
                (4.., 8) => columns::<S, R, 4, PARTS, MIN>(s, &w, x, place, sums),
                (8.., 16) => columns::<S, R, 8, PARTS, MIN>(s, &w, x, place, sums),
                (4.., 16) => columns::<S, R, 4, PARTS, MIN>(s, &w, x, place, sums),
                (2.., _) => columns::<S, R, 2, PARTS, MIN>(s, &w, x, place, sums),
                (_, _) => columns::<S, R, 1, PARTS, MIN>(s, &w, x, place, sums),
            }
        }
    }
}

/// Unpacks group `g` of `R` registers of rows.
#[inline(always)]
fn widen<S: Dot, const R: usize, const BITS: usize>(
    s: S,
    task: &BatchTiles<'_>,
    tile: usize,
    g: usize,
    w: &mut WideGroup,
) {
    let form = Form { bits: BITS, ..task.form };
    let tile_bytes = task.tiles.len() / task.n_tiles;
    for r in 0..R {
        let (tile, row) = (tile + r * S::LANES / TILE, r * S::LANES % TILE);
        let bytes = &task.tiles[tile * tile_bytes..][..tile_bytes];
        let (ints_part, scales) = bytes.split_at(form.ints_bytes(task.n_in));
        let group = &ints_part[g * form.group_bytes()..][..form.group_bytes()];
        prefetch(s, bytes, task.tiles.len(), [g, task.n_in / BLOCK]);
        // SAFETY: LANES rows from `row` on of a group, and of its scales; `w` has room for R registers.
        unsafe {
            let q = ints::<S, BITS>(s, group.as_ptr().add(4 * row));
            for (step, q) in q.into_iter().enumerate() {
                for half in 0..S::HALVES {
                    let at = ((step * S::HALVES + half) * R + r) * S::LANES;
                    s.store_i_ptr(w.ints.as_mut_ptr().add(at), s.half(q, half));
                }
            }
            let (a, b) = affine(s, form, scales.as_ptr().add(2 * row), g);
            for (part, a) in a.into_iter().enumerate() {
                s.store_ptr(w.a.as_mut_ptr().add((part * R + r) * S::LANES), a);
            }
            s.store_ptr(w.b.as_mut_ptr().add(r * S::LANES), b);
        }
    }
}

/// Where the results of [`columns`] go.
#[derive(Clone, Copy)]
struct Place {
    /// First column.
    c: usize,
    /// First tile.
    tile: usize,
}

/// `R` registers of rows times `C` columns; returns `C`.
///
/// Per pass, step and half: R loads of weights, C of inputs, R·C products. With R = 2 and C = 8 a group of 32 is 256
/// products and some 80 steps to scale and sum them.
#[inline(always)]
fn columns<S: Dot, const R: usize, const C: usize, const PARTS: usize, const MIN: bool>(
    s: S,
    w: &WideGroup,
    x: Block<'_>,
    Place { c, tile }: Place,
    sums: &mut Sums,
) -> usize {
    // All that could fail comes first: past a branch the compiler would move the products of all but the first column, and
    // with them go the registers.
    let q = x.q[c * X_BYTES..(c + C) * X_BYTES].as_ptr();
    let (scales, x_sums): (&[f32; C], &[f32; C]) = (array(x.scales, c), array(x.x_sums, c));
    let offsets: [&[i32; C]; PARTS] = std::array::from_fn(|part| array(&w.offsets[part], c));
    let sums: [*mut f32; C] = {
        let sums: &mut [_; C] = (&mut sums[c..c + C]).try_into().expect("C of them");
        sums.each_mut().map(|sums| sums.as_flattened_mut()[tile * TILE..][..R * S::LANES].as_mut_ptr())
    };
    for part in 0..PARTS {
        let mut total = [[s.splat_i(0); C]; R];
        for pass in 0..S::PASSES {
            if pass > 0 {
                for r in 0..R {
                    for j in 0..C {
                        total[r][j] = s.shl_i::<8>(total[r][j]);
                    }
                }
            }
            // Where there is one pass the sums begin with it, which saves an addition.
            if !MIN && pass == S::PASSES - 1 {
                for j in 0..C {
                    let offset = s.splat_i(offsets[part][j]);
                    for r in 0..R {
                        total[r][j] = if pass == 0 { offset } else { s.add_i(total[r][j], offset) };
                    }
                }
            }
            for step in part * STEPS / PARTS..(part + 1) * STEPS / PARTS {
                for half in 0..S::HALVES {
                    // SAFETY: `w` holds R registers for each half, `q` C blocks.
                    unsafe {
                        let mut rows = [s.splat_i(0); R];
                        for r in 0..R {
                            let at = ((step * S::HALVES + half) * R + r) * S::LANES;
                            rows[r] = s.load_i_ptr(w.ints.as_ptr().add(at));
                        }
                        for j in 0..C {
                            for r in 0..R {
                                total[r][j] =
                                    s.dot(total[r][j], rows[r], q.add(j * X_BYTES), [pass, step, half]);
                            }
                        }
                    }
                }
            }
        }
        // Short loops without branches, so that they are unrolled: an index into `total` that is not a constant would
        // keep it in memory, and the loop above at half its speed.
        for j in 0..C {
            let scale = s.splat(scales[j]);
            for r in 0..R {
                // SAFETY: R registers of each.
                unsafe {
                    let sums = sums[j].add(r * S::LANES);
                    let a = s.load_ptr(w.a.as_ptr().add((part * R + r) * S::LANES));
                    let mut acc = s.fma(s.to_f(total[r][j]), s.mul(a, scale), s.load_ptr(sums));
                    if MIN {
                        let b = s.load_ptr(w.b.as_ptr().add(r * S::LANES));
                        acc = s.fma(b, s.splat(x_sums[j]), acc);
                    }
                    s.store_ptr(sums, acc);
                }
            }
        }
    }
    C
}

/// C elements from `at` on.
#[inline(always)]
fn array<T, const C: usize>(of: &[T], at: usize) -> &[T; C] {
    of[at..at + C].try_into().expect("C of them")
}
