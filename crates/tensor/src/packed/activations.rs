//! [`Activations`]: the inputs of quantized weights, as 16-bit integers with a scale for every 32.
//!
//! x = scale · q with |q| <= 32,639, so every input is off by at most 1/65,278 of its block's largest: 256 times closer
//! than the 8 bits that others use. docs/decisions/0006 has what that does to a model's answers.

use super::dot::{Dot, X_BYTES, X_MAX};
use super::kind::BLOCK;
use crate::cpu::Level;
use crate::pool::Disjoint;
use crate::simd::dispatch;
use crate::split::piece;
use crate::{Buf, Pool};
use std::ops::Range;

/// Below this a block counts as zero: its scale would leave the range of normal floats.
const AMAX_MIN: f32 = 1e-30;

/// Up to this many inputs one thread is done before a second has woken: about 2 us.
const INLINE_MAX: usize = 1 << 13;

/// Columns that one task quantizes.
const TASK_COLS: usize = 16;

/// `n` columns of `n_in` inputs, quantized. Kept between calls as scratch.
///
/// Stored block by block, not column by column: what a kernel reads for one block of weights lies together.
#[derive(Default)]
pub(super) struct Activations {
    n: usize,
    /// `[n_in / 32][n][X_BYTES]`, each block as [`Dot`] lays it out.
    q: Buf<u8>,
    /// `[n_in / 32][n]`
    scales: Buf<f32>,
    /// `[n_in / 32][n][2]`: sums of q of the halves of a block.
    sums: Buf<i32>,
    /// `[n_in / 32][n]`: sum of scale · q.
    x_sums: Buf<f32>,
}

/// One block of some columns.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) q: &'a [u8],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [i32],
    pub(super) x_sums: &'a [f32],
}

impl Activations {
    /// Takes over `x_ni`.
    pub(super) fn set(&mut self, pool: &Pool, x_ni: &[f32], n: usize) {
        let n_in = x_ni.len() / n;
        let n_blocks = n_in / BLOCK;
        self.n = n;
        self.q.reserve_scratch(X_BYTES * n * n_blocks);
        self.scales.reserve_scratch(n * n_blocks);
        self.sums.reserve_scratch(2 * n * n_blocks);
        self.x_sums.reserve_scratch(n * n_blocks);
        let out = Out {
            n,
            q: Disjoint::new(&mut self.q),
            scales: Disjoint::new(&mut self.scales),
            sums: Disjoint::new(&mut self.sums),
            x_sums: Disjoint::new(&mut self.x_sums),
        };
        // SAFETY: every column is quantized by one task.
        let quantize_cols =
            |task: usize| unsafe { quantize(pool.level(), &out, x_ni, piece(task, TASK_COLS, n)) };
        let n_tasks = n.div_ceil(TASK_COLS);
        if x_ni.len() < INLINE_MAX {
            (0..n_tasks).for_each(quantize_cols);
        } else {
            pool.run(n_tasks, &quantize_cols);
        }
    }

    /// Block `b` of columns `cols`.
    #[inline(always)]
    pub(super) fn block(&self, b: usize, cols: Range<usize>) -> Block<'_> {
        let at = b * self.n + cols.start..b * self.n + cols.end;
        Block {
            q: &self.q[at.start * X_BYTES..at.end * X_BYTES],
            scales: &self.scales[at.clone()],
            sums: &self.sums[2 * at.start..2 * at.end],
            x_sums: &self.x_sums[at],
        }
    }
}

/// [`Activations`] that are being filled.
struct Out<'a> {
    n: usize,
    q: Disjoint<'a, u8>,
    scales: Disjoint<'a, f32>,
    sums: Disjoint<'a, i32>,
    x_sums: Disjoint<'a, f32>,
}

/// Quantizes the columns `cols` of `x_ni`.
/// # Safety
/// Nobody else has to do with these columns of `out`.
unsafe fn quantize(level: Level, out: &Out<'_>, x_ni: &[f32], cols: Range<usize>) {
    dispatch!(fn quantize_cols(out: &Out<'_>, x_ni: &[f32], cols: Range<usize>) = quantize_simd);
    quantize_cols(level, out, x_ni, cols);
}

/// Safe for those only who keep the promise of [`quantize`].
#[inline(always)]
fn quantize_simd<S: Dot>(s: S, out: &Out<'_>, x_ni: &[f32], cols: Range<usize>) {
    let n_in = x_ni.len() / out.n;
    // Columns inside blocks: what is written lies together.
    for b in 0..n_in / BLOCK {
        for col in cols.clone() {
            let x = &x_ni[col * n_in + b * BLOCK..][..BLOCK];
            let mut amax = s.zero();
            for x in x.chunks_exact(S::LANES) {
                amax = s.max(amax, s.abs(s.load(x)));
            }
            let amax = s.max_lane(amax);
            let (scale, inverse) = if amax < AMAX_MIN { (0.0, 0.0) } else { (amax / X_MAX, X_MAX / amax) };
            let at = b * out.n + col;
            // SAFETY: the promise of `quantize`.
            let (q, sums) = unsafe {
                (out.q.slice(at * X_BYTES..(at + 1) * X_BYTES), out.sums.slice(2 * at..2 * at + 2))
            };
            // Whole numbers below 2^24: exact in f32, in any order.
            let mut halves = [0.0f32; 2];
            for (i, x) in x.chunks_exact(S::LANES).enumerate() {
                let whole = s.to_i(s.mul(s.load(x), s.splat(inverse)));
                // SAFETY: q is X_BYTES long.
                unsafe { s.put(q.as_mut_ptr(), i * S::LANES / 4, whole) };
                halves[2 * i * S::LANES / BLOCK] += s.sum(s.to_f(whole));
            }
            sums.copy_from_slice(&halves.map(|half| half as i32));
            // SAFETY: as above.
            unsafe {
                out.scales.slice(at..at + 1)[0] = scale;
                out.x_sums.slice(at..at + 1)[0] = scale * (halves[0] + halves[1]);
            }
        }
    }
}
