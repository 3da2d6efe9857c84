//! [`Activations`]: the inputs of quantized weights, as 16-bit integers with a scale for every 32.
//!
//! x = scale · q with |q| <= 32,639, so every input is off by at most 1/65,278 of its block's largest: 256 times closer
//! than the 8 bits that others use. docs/decisions/0006 has what that does to a model's answers.

use super::dot::{Dot, X_BYTES, X_MAX};
use super::kind::BLOCK;
use crate::pool::Disjoint;
use crate::simd::dispatch;
use crate::split::piece;
use crate::{Buf, Pool};

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
        let (q, scales) = (Disjoint::new(&mut self.q), Disjoint::new(&mut self.scales));
        let (sums, x_sums) = (Disjoint::new(&mut self.sums), Disjoint::new(&mut self.x_sums));
        let quantize_cols = |task: usize| {
            let cols = piece(task, TASK_COLS, n);
            for b in 0..n_blocks {
                let at = b * n + cols.start..b * n + cols.end;
                // SAFETY: every column is quantized by one task.
                let out = unsafe {
                    BlockMut {
                        q: q.slice(at.start * X_BYTES..at.end * X_BYTES),
                        scales: scales.slice(at.clone()),
                        sums: sums.slice(2 * at.start..2 * at.end),
                        x_sums: x_sums.slice(at),
                    }
                };
                quantize(pool.level(), out, &x_ni[cols.start * n_in + b * BLOCK..], n_in);
            }
        };
        let n_tasks = n.div_ceil(TASK_COLS);
        if x_ni.len() < INLINE_MAX {
            (0..n_tasks).for_each(quantize_cols);
        } else {
            pool.run(n_tasks, &quantize_cols);
        }
    }

    /// Block `b` of columns `cols`.
    #[inline(always)]
    pub(super) fn block(&self, b: usize, cols: std::ops::Range<usize>) -> Block<'_> {
        let at = b * self.n + cols.start..b * self.n + cols.end;
        Block {
            q: &self.q[at.start * X_BYTES..at.end * X_BYTES],
            scales: &self.scales[at.clone()],
            sums: &self.sums[2 * at.start..2 * at.end],
            x_sums: &self.x_sums[at],
        }
    }
}

struct BlockMut<'a> {
    q: &'a mut [u8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    x_sums: &'a mut [f32],
}

dispatch!(fn quantize(out: BlockMut<'_>, x: &[f32], stride: usize) = quantize_simd);

/// Quantizes the first 32 elements of every row of `x`, rows `stride` apart.
#[inline(always)]
fn quantize_simd<S: Dot>(s: S, out: BlockMut<'_>, x: &[f32], stride: usize) {
    for (col, q) in out.q.chunks_exact_mut(X_BYTES).enumerate() {
        let x = &x[col * stride..][..BLOCK];
        let mut amax = s.zero();
        for x in x.chunks_exact(S::LANES) {
            amax = s.max(amax, s.abs(s.load(x)));
        }
        let amax = s.max_lane(amax);
        let (scale, inverse) = if amax < AMAX_MIN { (0.0, 0.0) } else { (amax / X_MAX, X_MAX / amax) };
        // Whole numbers below 2^24: exact in f32, in any order.
        let mut sums = [0.0f32; 2];
        for (i, x) in x.chunks_exact(S::LANES).enumerate() {
            let whole = s.to_i(s.mul(s.load(x), s.splat(inverse)));
            // SAFETY: q is X_BYTES long.
            unsafe { s.put(q.as_mut_ptr(), i * S::LANES / 4, whole) };
            sums[2 * i * S::LANES / BLOCK] += s.sum(s.to_f(whole));
        }
        out.scales[col] = scale;
        out.sums[2 * col] = sums[0] as i32;
        out.sums[2 * col + 1] = sums[1] as i32;
        out.x_sums[col] = scale * (sums[0] + sums[1]);
    }
}
