//! [`Activations`]: the inputs of quantized weights, as int16 with a scale for every 32.
//!
//! q = round(x · 32767 / max|x|) over 32 neighbours, so the error is at most max|x| / 65534: 15 bits keep the products
//! with 4- and 8-bit weights exact integers and the whole result within a few 1e-5 of f32 arithmetic.

use super::kind::BLOCK;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::{Buf, Pool};

/// Largest magnitude of a quantized activation.
const Q_MAX: f32 = 32767.0;

/// Below this a block counts as zero: its scale would leave the range of normal floats.
const AMAX_MIN: f32 = 1e-30;

/// Up to this many inputs one thread is done before a second has woken: about 2 us.
const INLINE_MAX: usize = 1 << 13;

/// `n` columns of `n_in` inputs, quantized. Kept between calls as scratch.
///
/// Stored block by block, not column by column: what a kernel reads for one block of weights lies together.
#[derive(Default)]
pub(super) struct Activations {
    n: usize,
    /// `[n_in / 32][n][32]`
    q: Buf<i16>,
    /// `[n_in / 32][n]`: x ≈ q · scale.
    scales: Buf<f32>,
    /// `[n_in / 32][n]`: sum of q.
    sums: Buf<i32>,
    /// `[n_in / 32][n]`: sum of q, times the scale.
    scaled_sums: Buf<f32>,
}

/// One block of some columns.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) q: &'a [i16],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [i32],
    pub(super) scaled_sums: &'a [f32],
}

impl Activations {
    /// Takes over `x_ni`.
    pub(super) fn set(&mut self, pool: &Pool, x_ni: &[f32], n: usize) {
        let n_blocks = x_ni.len() / n / BLOCK;
        self.n = n;
        self.q.reserve_scratch(x_ni.len());
        self.scales.reserve_scratch(n * n_blocks);
        self.sums.reserve_scratch(n * n_blocks);
        self.scaled_sums.reserve_scratch(n * n_blocks);
        let q = Disjoint::new(&mut self.q);
        let (scales, sums) = (Disjoint::new(&mut self.scales), Disjoint::new(&mut self.sums));
        let scaled_sums = Disjoint::new(&mut self.scaled_sums);
        let quantize_block = |b: usize| {
            let at = b * n..(b + 1) * n;
            // SAFETY: every block is quantized once.
            let out = unsafe {
                BlockMut {
                    q: q.slice(at.start * BLOCK..at.end * BLOCK),
                    scales: scales.slice(at.clone()),
                    sums: sums.slice(at.clone()),
                    scaled_sums: scaled_sums.slice(at),
                }
            };
            quantize(pool.level(), out, &x_ni[b * BLOCK..], x_ni.len() / n);
        };
        if x_ni.len() < INLINE_MAX {
            (0..n_blocks).for_each(quantize_block);
        } else {
            pool.run(n_blocks, &quantize_block);
        }
    }

    /// Block `b` of columns `cols`.
    #[inline(always)]
    pub(super) fn block(&self, b: usize, cols: std::ops::Range<usize>) -> Block<'_> {
        let at = b * self.n + cols.start..b * self.n + cols.end;
        Block {
            q: &self.q[at.start * BLOCK..at.end * BLOCK],
            scales: &self.scales[at.clone()],
            sums: &self.sums[at.clone()],
            scaled_sums: &self.scaled_sums[at],
        }
    }
}

struct BlockMut<'a> {
    q: &'a mut [i16],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    scaled_sums: &'a mut [f32],
}

dispatch!(fn quantize(out: BlockMut<'_>, x: &[f32], stride: usize) = quantize_simd);

/// Quantizes the first 32 elements of every row of `x`, rows `stride` apart.
#[inline(always)]
fn quantize_simd<S: Simd>(s: S, out: BlockMut<'_>, x: &[f32], stride: usize) {
    for (col, q) in out.q.chunks_exact_mut(BLOCK).enumerate() {
        let x = &x[col * stride..][..BLOCK];
        let mut amax = s.zero();
        for x in x.chunks_exact(S::LANES) {
            amax = s.max(amax, s.abs(s.load(x)));
        }
        let amax = s.max_lane(amax);
        let (scale, inverse) = if amax < AMAX_MIN { (0.0, 0.0) } else { (amax / Q_MAX, Q_MAX / amax) };
        let mut lanes = [0i32; BLOCK];
        for (x, lanes) in x.chunks_exact(S::LANES).zip(lanes.chunks_exact_mut(S::LANES)) {
            let v = s.to_i(s.mul(s.load(x), s.splat(inverse)));
            // SAFETY: the chunk is LANES long.
            unsafe { s.store_i_ptr(lanes.as_mut_ptr(), v) };
        }
        // Rounding of amax · (Q_MAX / amax) can reach at most Q_MAX, which fits.
        q.iter_mut().zip(&lanes).for_each(|(q, &lane)| *q = lane as i16);
        let sum: i32 = lanes.iter().sum();
        out.scales[col] = scale;
        out.sums[col] = sum;
        out.scaled_sums[col] = sum as f32 * scale;
    }
}
