//! The products themselves: some tiles times some columns.
//!
//! Quantized weights, per 32 inputs and row: high = Σ q_w·q_high and low = Σ q_w·q_low in int32, exact, then
//! t = fma(low, 1/1024, high), acc = fma(t, d·scale, acc) and for Q4_1 acc = fma(m, Σx, acc). The integers are exact in
//! any order and the float steps are the same in the same order everywhere, so a row's result does not depend on which
//! kernel made it. Float weights: one chain acc = fma(w, x, acc) over the inputs.

use super::activations::{Activations, Block, LOW, SPLIT};
use super::kind::{BLOCK, WeightKind};
use super::layout::{Q4_BYTES, Q8_BYTES, TILE, halves, unpack};
use crate::simd::{Simd, dispatch};

/// Columns a task takes at a time: their sums (16 rows × 48 × 4 B = 3 KiB) stay in L1, their inputs in L2. A multiple of
/// every step of columns below.
pub(super) const COLS_MAX: usize = 48;

/// Results of a task: `sums[col][row of the tile]`.
pub(super) type Sums = [[f32; TILE]; COLS_MAX];

/// One tile times one column of quantized inputs.
pub(super) struct DecodeTile<'a> {
    pub(super) kind: WeightKind,
    pub(super) tile: &'a [u8],
    pub(super) x: &'a Activations,
}

dispatch!(pub(super) fn decode_tile(task: &DecodeTile<'_>, sums: &mut [f32; TILE]) = decode_tile_simd);

#[inline(always)]
fn decode_tile_simd<S: Simd>(s: S, task: &DecodeTile<'_>, sums: &mut [f32; TILE]) {
    // Bound here, outside the loops, so that each kind is a loop of its own.
    match (task.kind, S::LANES) {
        (WeightKind::Q4_0, 8) => decode_q4::<S, 2, false>(s, task, sums),
        (WeightKind::Q4_0, _) => decode_q4::<S, 1, false>(s, task, sums),
        (WeightKind::Q4_1, 8) => decode_q4::<S, 2, true>(s, task, sums),
        (WeightKind::Q4_1, _) => decode_q4::<S, 1, true>(s, task, sums),
        (WeightKind::Q8_0, 8) => decode_q8::<S, 2>(s, task, sums),
        (WeightKind::Q8_0, _) => decode_q8::<S, 1>(s, task, sums),
        _ => unreachable!("float weights take float inputs"),
    }
}

/// `R` registers hold the tile's rows. Nibbles 0 and 2 of a word are used where they stand, nibbles 1 and 3 sixteen times
/// too large: two sums, joined as 16·sum₀ + sum₁, save half of the shifts. The result is 16 times too large, exactly.
#[inline(always)]
fn decode_q4<S: Simd, const R: usize, const MIN: bool>(s: S, task: &DecodeTile<'_>, sums: &mut [f32; TILE]) {
    let block_bytes = TILE * task.kind.block_bytes();
    let mut acc = [s.zero(); R];
    let (even, odd) = (s.splat_h(0x000f), s.splat_h(0x00f0));
    for (b, block) in task.tile.chunks_exact(block_bytes).enumerate() {
        let x = task.x.block(b, 0..1);
        prefetch(block, block_bytes);
        // Sums of even and odd nibbles, for high and low.
        let zero = |part: usize| s.splat_i(if MIN { 0 } else { -8 * 16 * x.sums[0][part] });
        let mut sum = [[[s.splat_i(0), zero(0)], [s.splat_i(0), zero(1)]]; R];
        for w in 0..4 {
            for r in 0..R {
                let at = (w * TILE + r * S::LANES) * 4;
                // SAFETY: a register's worth of words, inside the 4 · 16 words at the start of the block.
                let word = unsafe { s.load_h_ptr(block.as_ptr().add(at).cast()) };
                let upper = s.shr_h::<8>(word);
                let nibbles =
                    [s.and_h(word, even), s.and_h(word, odd), s.and_h(upper, even), s.and_h(upper, odd)];
                for (j, nibbles) in nibbles.into_iter().enumerate() {
                    for part in 0..2 {
                        let sum = &mut sum[r][part][j % 2];
                        *sum = s.madd(*sum, nibbles, pair_of(s, x.q, part, 4 * w + j));
                    }
                }
            }
        }
        let (scale, shift) = (s.splat(x.scales[0] / 16.0), s.splat(x.x_sums[0]));
        for r in 0..R {
            let [high, low] = sum[r].map(|[even, odd]| s.to_f(s.add_i(s.shl_i::<4>(even), odd)));
            let total = s.fma(low, s.splat(LOW), high);
            // SAFETY: 16 halves d follow the words, and for MIN 16 halves m follow those.
            unsafe {
                let d = block.as_ptr().add(Q4_BYTES + 2 * r * S::LANES).cast();
                acc[r] = s.fma(total, s.mul(s.load_f16_ptr(d), scale), acc[r]);
                if MIN {
                    acc[r] = s.fma(s.load_f16_ptr(d.add(TILE)), shift, acc[r]);
                }
            }
        }
    }
    for r in 0..R {
        s.store(&mut sums[r * S::LANES..], acc[r]);
    }
}

/// Pair `p` of the high (0) or low (1) part of a column's block.
#[inline(always)]
fn pair_of<S: Simd>(s: S, q: &[i16], part: usize, p: usize) -> S::H {
    s.splat_pair([q[part * BLOCK + 2 * p], q[part * BLOCK + 2 * p + 1]])
}

#[inline(always)]
fn decode_q8<S: Simd, const R: usize>(s: S, task: &DecodeTile<'_>, sums: &mut [f32; TILE]) {
    let block_bytes = TILE * task.kind.block_bytes();
    let mut acc = [s.zero(); R];
    for (b, block) in task.tile.chunks_exact(block_bytes).enumerate() {
        let x = task.x.block(b, 0..1);
        prefetch(block, block_bytes);
        // Two chains each, for the latency of an addition (of a whole `vpdpwssd` with AVX-512).
        let mut sum = [[[s.splat_i(0); 2]; 2]; R];
        for p in 0..BLOCK / 2 {
            for r in 0..R {
                let at = (p * TILE + r * S::LANES) * 2;
                // SAFETY: a register's worth of int8 pairs, inside the 16 · 16 pairs at the start of the block.
                let q = unsafe { s.load_h_from_i8_ptr(block.as_ptr().add(at).cast()) };
                for part in 0..2 {
                    sum[r][part][p % 2] = s.madd(sum[r][part][p % 2], q, pair_of(s, x.q, part, p));
                }
            }
        }
        let scale = s.splat(x.scales[0]);
        for r in 0..R {
            let [high, low] = sum[r].map(|[a, b]| s.to_f(s.add_i(a, b)));
            let total = s.fma(low, s.splat(LOW), high);
            // SAFETY: 16 halves d follow the pairs.
            let d = unsafe { s.load_f16_ptr(block.as_ptr().add(Q8_BYTES + 2 * r * S::LANES).cast()) };
            acc[r] = s.fma(total, s.mul(d, scale), acc[r]);
        }
    }
    for r in 0..R {
        s.store(&mut sums[r * S::LANES..], acc[r]);
    }
}

/// How far ahead of the kernel the stream of weights is asked for.
const PREFETCH_BYTES: usize = 1024;

/// Asks for the cache lines that lie [`PREFETCH_BYTES`] after `block`. Past the end of the weights it does nothing harmful.
#[inline(always)]
fn prefetch(block: &[u8], bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..bytes.div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let ahead = block.as_ptr().wrapping_add(PREFETCH_BYTES + 64 * line);
        // SAFETY: a prefetch never faults and changes no memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, bytes);
}

/// One tile times several columns of quantized inputs.
pub(super) struct BatchTile<'a> {
    pub(super) kind: WeightKind,
    pub(super) tile: &'a [u8],
    pub(super) x: &'a Activations,
    /// At most [`COLS_MAX`].
    pub(super) cols: std::ops::Range<usize>,
}

dispatch!(pub(super) fn batch_tile(task: &BatchTile<'_>, sums: &mut Sums) = batch_tile_simd);

/// A block of weights is widened to int16 once (1 KiB, in L1) and then multiplied with all columns.
#[inline(always)]
fn batch_tile_simd<S: Simd>(s: S, task: &BatchTile<'_>, sums: &mut Sums) {
    let n = task.cols.len();
    sums[..n].fill([0.0; TILE]);
    let block_bytes = TILE * task.kind.block_bytes();
    let scales_at = if task.kind == WeightKind::Q8_0 { Q8_BYTES } else { Q4_BYTES };
    let mut w = WideBlock { pairs: [0; TILE * BLOCK], d: [0.0; TILE], m: [0.0; TILE] };
    for (b, block) in task.tile.chunks_exact(block_bytes).enumerate() {
        unpack(task.kind, block, &mut w.pairs);
        widen(s, &block[scales_at..], &mut w.d);
        let x = task.x.block(b, task.cols.clone());
        if task.kind == WeightKind::Q4_1 {
            widen(s, &block[scales_at + 2 * TILE..], &mut w.m);
            block_columns::<S, true>(s, &w, x, &mut sums[..n]);
        } else {
            block_columns::<S, false>(s, &w, x, &mut sums[..n]);
        }
    }
}

/// A block of a tile in the form the products need.
#[repr(align(64))]
struct WideBlock {
    /// `[16 pairs][16 rows][2]`
    pairs: [i16; TILE * BLOCK],
    d: [f32; TILE],
    m: [f32; TILE],
}

#[inline(always)]
fn widen<S: Simd>(s: S, bytes: &[u8], out: &mut [f32; TILE]) {
    let halves = halves(bytes);
    for (half, out) in halves.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        s.store(out, s.load_f16(half));
    }
}

/// Walks the columns in the widest steps the registers allow: high and low sums of 3 columns × 2 registers with 16
/// registers, of 6 × 1 with 32.
#[inline(always)]
fn block_columns<S: Simd, const MIN: bool>(s: S, w: &WideBlock, x: Block<'_>, sums: &mut [[f32; TILE]]) {
    let mut c = 0;
    while c < sums.len() {
        c += match (sums.len() - c, S::LANES) {
            (3.., 8) => columns::<S, 2, 3, MIN>(s, w, x, c, sums),
            (2.., 8) => columns::<S, 2, 2, MIN>(s, w, x, c, sums),
            (_, 8) => columns::<S, 2, 1, MIN>(s, w, x, c, sums),
            (6.., _) => columns::<S, 1, 6, MIN>(s, w, x, c, sums),
            (3.., _) => columns::<S, 1, 3, MIN>(s, w, x, c, sums),
            (_, _) => columns::<S, 1, 1, MIN>(s, w, x, c, sums),
        }
    }
}

/// `R` registers of rows times `C` columns from column `c` on; returns `C`.
#[inline(always)]
fn columns<S: Simd, const R: usize, const C: usize, const MIN: bool>(
    s: S,
    w: &WideBlock,
    x: Block<'_>,
    c: usize,
    sums: &mut [[f32; TILE]],
) -> usize {
    let q = &x.q[c * SPLIT..(c + C) * SPLIT];
    let mut total = [[[s.splat_i(0); C]; 2]; R];
    for p in 0..BLOCK / 2 {
        // SAFETY: pair p of the rows, 2 · LANES int16 each, inside the 16 · 16 pairs.
        let rows: [S::H; R] = std::array::from_fn(|r| unsafe {
            s.load_h_ptr(w.pairs.as_ptr().add((p * TILE + r * S::LANES) * 2))
        });
        for j in 0..C {
            for part in 0..2 {
                let pair = pair_of(s, &q[j * SPLIT..], part, p);
                for r in 0..R {
                    total[r][part][j] = s.madd(total[r][part][j], rows[r], pair);
                }
            }
        }
    }
    for (j, sums) in sums[c..c + C].iter_mut().enumerate() {
        let scale = s.splat(x.scales[c + j]);
        for (r, sums) in sums.chunks_exact_mut(S::LANES).enumerate() {
            let [high, low] = [total[r][0][j], total[r][1][j]].map(|sum| s.to_f(sum));
            let d = s.mul(s.load(&w.d[r * S::LANES..]), scale);
            let mut acc = s.fma(s.fma(low, s.splat(LOW), high), d, s.load(sums));
            if MIN {
                acc = s.fma(s.load(&w.m[r * S::LANES..]), s.splat(x.x_sums[c + j]), acc);
            }
            s.store(sums, acc);
        }
    }
    C
}
