//! The tile kernel: R rows × two registers of columns of c, over one block of k.

use crate::cpu::LINE_BYTES;
use crate::simd::{MAX_LANES, Simd};

/// What a tile is computed from: `n_words` rows of packed words each.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    pub(super) n_words: usize,
    pub(super) a: *const f32,
    pub(super) b: *const f32,
    /// What will be read after some more tiles and is far away now; a line of it is asked for with each word.
    pub(super) ahead: *const f32,
    /// Words from one line of it to the next, 0 if there is nothing to ask for.
    pub(super) ahead_step: usize,
}

/// Words of a line of the cache.
pub(super) const LINE: usize = LINE_BYTES / size_of::<f32>();

/// A tile of c to be written.
#[derive(Clone, Copy)]
pub(super) struct Target {
    /// Top left element.
    pub(super) c: *mut f32,
    /// Elements from one row of c to the next.
    pub(super) stride: usize,
    /// Rows and columns the tile has inside c; the rest was padding.
    pub(super) n_rows: usize,
    pub(super) n_cols: usize,
    /// Write the sums instead of adding them to c.
    pub(super) overwrite: bool,
}

/// Most rows of a tile with LANES lanes: as many as leave room for two registers of b and one of a among the 16 of AVX2
/// (6·2 + 3) or the 32 of AVX-512 (14·2 + 3).
pub(super) const fn rows_max(lanes: usize) -> usize {
    if lanes == 8 { 6 } else { 14 }
}

/// Computes a tile. `n_rows` of it (1..=MR) are inside c; the next larger kernel there is computes them, so that few
/// rows cost little and few kernels are compiled.
///
/// # Safety
/// `packed.a` holds `n_words` rows of MR words, `packed.b` as many of 2·LANES, and the target's rows and columns are writable and
/// not used by others.
#[inline(always)]
pub(super) unsafe fn tile_of_rows<S: Simd, const MR: usize, const PAIRS: bool>(
    s: S,
    packed: Packed,
    target: Target,
) {
    // SAFETY: the caller's promise. The constant conditions keep kernels larger than MR from being compiled.
    unsafe {
        match target.n_rows {
            1 => tile::<S, 1, MR, PAIRS>(s, packed, target),
            2 => tile::<S, 2, MR, PAIRS>(s, packed, target),
            3..=4 => tile::<S, 4, MR, PAIRS>(s, packed, target),
            5..=6 => tile::<S, 6, MR, PAIRS>(s, packed, target),
            7..=10 if MR > 6 => tile::<S, 10, MR, PAIRS>(s, packed, target),
            11..=14 if MR > 10 => tile::<S, 14, MR, PAIRS>(s, packed, target),
            n_rows => unreachable!("a tile of {n_rows} rows, at most {MR}"),
        }
    }
}

/// ```text
/// sum[r][j] = Σ_k a[k][r] · b[k][j]     one chain of fused multiply-adds in the order of k
/// c[r][j]   = sum  or  c + sum
/// ```
/// Per word of depth: 2 loads of b, R broadcasts of a, 2·R FMAs. With R = 6 on AVX2 that is 12 FMAs (6 cycles at two a
/// cycle) against 8 loads (4 cycles at two a cycle): the FMA units stay full, and 12 chains cover their latency of 4.
///
/// # Safety
/// As [`tile_of_rows`].
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const MR: usize, const PAIRS: bool>(
    s: S,
    packed: Packed,
    target: Target,
) {
    let Packed { n_words, mut a, mut b, mut ahead, ahead_step } = packed;
    let Target { c, stride, n_rows, n_cols, overwrite } = target;
    for r in 0..R {
        // The lines of c are needed in some hundred cycles.
        s.prefetch(c.wrapping_add(r * stride));
        s.prefetch(c.wrapping_add(r * stride + 2 * S::LANES - 1));
    }
    let mut sums = [[s.zero(); 2]; R];
    for _ in 0..n_words {
        s.prefetch_l2(ahead);
        ahead = ahead.wrapping_add(ahead_step);
        // SAFETY: the caller's promise: word `i` of n_words of a and b.
        unsafe {
            let b0 = s.load_ptr(b);
            let b1 = s.load_ptr(b.add(S::LANES));
            for r in 0..R {
                let a_r = s.splat(*a.add(r));
                if PAIRS {
                    sums[r][0] = s.dot_bf16(a_r, b0, sums[r][0]);
                    sums[r][1] = s.dot_bf16(a_r, b1, sums[r][1]);
                } else {
                    sums[r][0] = s.fma(a_r, b0, sums[r][0]);
                    sums[r][1] = s.fma(a_r, b1, sums[r][1]);
                }
            }
            a = a.add(MR);
            b = b.add(2 * S::LANES);
        }
    }
    // Each loop over the sums is short and without branches, so that it is unrolled: an index into `sums` that is not a
    // constant would keep the sums in memory, and the loop above at a third of its speed.
    // SAFETY: the caller's promise: n_rows × n_cols elements; `part` has room for all sums.
    unsafe {
        if n_rows == R && n_cols == 2 * S::LANES {
            if !overwrite {
                for r in 0..R {
                    let c = c.add(r * stride);
                    sums[r][0] = s.add(s.load_ptr(c), sums[r][0]);
                    sums[r][1] = s.add(s.load_ptr(c.add(S::LANES)), sums[r][1]);
                }
            }
            for r in 0..R {
                let c = c.add(r * stride);
                s.store_ptr(c, sums[r][0]);
                s.store_ptr(c.add(S::LANES), sums[r][1]);
            }
        } else {
            let mut part = [[0.0; 2 * MAX_LANES]; R];
            for r in 0..R {
                s.store_ptr(part[r].as_mut_ptr(), sums[r][0]);
                s.store_ptr(part[r].as_mut_ptr().add(S::LANES), sums[r][1]);
            }
            for (r, sums) in part[..n_rows].iter().enumerate() {
                let c = std::slice::from_raw_parts_mut(c.add(r * stride), n_cols);
                for (c, sum) in c.iter_mut().zip(sums) {
                    *c = if overwrite { *sum } else { *c + sum };
                }
            }
        }
    }
}
