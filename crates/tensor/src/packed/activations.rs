//! [`Activations`]: the inputs of quantized weights, as pairs of int16 with a scale for every 32.
//!
//! x = scale · (high + low / 1024) with |high| < 2^14 and |low| <= 2^9: 24 bits of the block's largest input, what f32
//! itself has, and the scale is a power of two, so nothing else is rounded. One int16 alone (15 bits) is not enough: it
//! moves SmolLM2's log-probabilities by up to 3e-3, where two f32 implementations differ by 3e-4.

use super::kind::BLOCK;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::{Buf, Pool};

/// What `low` counts.
pub(super) const LOW: f32 = 1.0 / 1024.0;

/// Numbers stored for one block of one column: 32 high, then 32 low.
pub(super) const SPLIT: usize = 2 * BLOCK;

/// `high` of a block's largest input lies in 2^13 .. 2^14.
const HIGH_EXPONENT: i32 = 13;

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
    /// `[n_in / 32][n][high, low][32]`
    q: Buf<i16>,
    /// `[n_in / 32][n]`
    scales: Buf<f32>,
    /// `[n_in / 32][n]`: sums of high and of low.
    sums: Vec<[i32; 2]>,
    /// `[n_in / 32][n]`: sum of x.
    x_sums: Buf<f32>,
}

/// One block of some columns.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) q: &'a [i16],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [[i32; 2]],
    pub(super) x_sums: &'a [f32],
}

impl Activations {
    /// Takes over `x_ni`.
    pub(super) fn set(&mut self, pool: &Pool, x_ni: &[f32], n: usize) {
        let n_blocks = x_ni.len() / n / BLOCK;
        self.n = n;
        self.q.reserve_scratch(2 * x_ni.len());
        self.scales.reserve_scratch(n * n_blocks);
        self.sums.resize(self.sums.len().max(n * n_blocks), [0; 2]);
        self.x_sums.reserve_scratch(n * n_blocks);
        let q = Disjoint::new(&mut self.q);
        let (scales, sums) = (Disjoint::new(&mut self.scales), Disjoint::new(&mut self.sums));
        let x_sums = Disjoint::new(&mut self.x_sums);
        let quantize_block = |b: usize| {
            let at = b * n..(b + 1) * n;
            // SAFETY: every block is quantized once.
            let out = unsafe {
                BlockMut {
                    q: q.slice(at.start * SPLIT..at.end * SPLIT),
                    scales: scales.slice(at.clone()),
                    sums: sums.slice(at.clone()),
                    x_sums: x_sums.slice(at),
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
            q: &self.q[at.start * SPLIT..at.end * SPLIT],
            scales: &self.scales[at.clone()],
            sums: &self.sums[at.clone()],
            x_sums: &self.x_sums[at],
        }
    }
}

struct BlockMut<'a> {
    q: &'a mut [i16],
    scales: &'a mut [f32],
    sums: &'a mut [[i32; 2]],
    x_sums: &'a mut [f32],
}

dispatch!(fn quantize(out: BlockMut<'_>, x: &[f32], stride: usize) = quantize_simd);

/// Quantizes the first 32 elements of every row of `x`, rows `stride` apart.
#[inline(always)]
fn quantize_simd<S: Simd>(s: S, out: BlockMut<'_>, x: &[f32], stride: usize) {
    for (col, q) in out.q.chunks_exact_mut(SPLIT).enumerate() {
        let x = &x[col * stride..][..BLOCK];
        let mut amax = s.zero();
        for x in x.chunks_exact(S::LANES) {
            amax = s.max(amax, s.abs(s.load(x)));
        }
        let (scale, inverse) = scale_of(s.max_lane(amax));
        let mut lanes = [0i32; SPLIT];
        let (high, low) = lanes.split_at_mut(BLOCK);
        let outs = high.chunks_exact_mut(S::LANES).zip(low.chunks_exact_mut(S::LANES));
        for (x, (high, low)) in x.chunks_exact(S::LANES).zip(outs) {
            let scaled = s.mul(s.load(x), s.splat(inverse));
            let whole = s.to_i(scaled);
            let rest = s.sub(scaled, s.to_f(whole));
            // SAFETY: the chunks are LANES long.
            unsafe {
                s.store_i_ptr(high.as_mut_ptr(), whole);
                s.store_i_ptr(low.as_mut_ptr(), s.to_i(s.mul(rest, s.splat(1.0 / LOW))));
            }
        }
        q.iter_mut().zip(&lanes).for_each(|(q, &lane)| *q = lane as i16);
        let [high, low]: [i32; 2] = [lanes[..BLOCK].iter().sum(), lanes[BLOCK..].iter().sum()];
        out.scales[col] = scale;
        out.sums[col] = [high, low];
        // At most 32 · 2^24: exact as an integer.
        out.x_sums[col] = (high * (1.0 / LOW) as i32 + low) as f32 * (scale * LOW);
    }
}

/// The power of two by which a block is divided, and its inverse.
#[inline(always)]
fn scale_of(amax: f32) -> (f32, f32) {
    if amax < AMAX_MIN {
        return (0.0, 0.0);
    }
    const BIAS: i32 = 127;
    let exponent = (amax.to_bits() >> 23) as i32 - BIAS - HIGH_EXPONENT;
    let power = |e: i32| f32::from_bits(((BIAS + e) as u32) << 23);
    (power(exponent), power(-exponent))
}
