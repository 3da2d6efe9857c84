//! RMSNorm of single heads: every head of the queries and of the keys is divided by its own root mean square and scaled
//! per dimension, before it is rotated (Qwen3, Gemma 3).
//!
//! `y_d = x_d / sqrt(mean(x_d²) + eps) · w_d`. Forward only.

use crate::Pool;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Rows one task takes.
const TASK_ROWS: usize = 16;

/// Neighbouring heads that share a scale.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm<'a> {
    /// How many.
    pub n_heads: usize,
    /// Scale of every dimension.
    pub w_d: &'a [f32],
}

/// Normalizes in place the first heads of every row of `x_no`, a matrix `stride` wide: those of `parts[0]`, then those of
/// `parts[1]`, and so on. What follows them (the values) stays as it is.
///
/// # Panics
/// If the heads are wider than a row, or `x_no` is not whole rows.
pub fn head_norm_forward(pool: &Pool, x_no: &mut [f32], stride: usize, parts: &[HeadNorm], eps: f32) {
    let width: usize = parts.iter().map(|part| part.n_heads * part.w_d.len()).sum();
    assert!(stride > 0 && width <= stride, "head norm: heads of {width} in rows of {stride}");
    assert!(x_no.len().is_multiple_of(stride), "head norm: {} is not rows of {stride}", x_no.len());
    let n = x_no.len() / stride;
    let x = Disjoint::new(x_no);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let x = unsafe { x.slice(rows.start * stride..rows.end * stride) };
        forward(pool.level(), x, stride, parts, eps);
    });
}

dispatch!(fn forward(x_no: &mut [f32], stride: usize, parts: &[HeadNorm], eps: f32) = forward_simd);
#[inline(always)]
fn forward_simd<S: Simd>(s: S, x_no: &mut [f32], stride: usize, parts: &[HeadNorm], eps: f32) {
    for mut row in x_no.chunks_exact_mut(stride) {
        for part in parts {
            let d = part.w_d.len();
            let (heads, rest) = row.split_at_mut(part.n_heads * d);
            row = rest;
            for head_d in heads.chunks_exact_mut(d) {
                let mut squares = s.zero();
                for x in head_d.chunks(S::LANES) {
                    let x = s.load(x);
                    squares = s.fma(x, x, squares);
                }
                let rstd = s.splat(1.0 / (s.sum(squares) / d as f32 + eps).sqrt());
                for (x, w) in head_d.chunks_mut(S::LANES).zip(part.w_d.chunks(S::LANES)) {
                    s.store(x, s.mul(s.mul(s.load(x), rstd), s.load(w)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rmsnorm::rmsnorm_reference;
    use crate::testing::{assert_close, every_pool, numbers};

    #[test]
    fn heads_match_rmsnorm_and_the_rest_is_left_alone() {
        const EPS: f32 = 1e-6;
        for (n, q, k, d) in [(1, 1, 1, 2), (5, 3, 1, 20), (40, 4, 2, 64)] {
            let stride = (q + 2 * k) * d;
            let x = numbers(1, n * stride);
            let (q_w, k_w) = (numbers(2, d), numbers(3, d));
            let mut expected = x.clone();
            for (row, x_o) in expected.chunks_mut(stride).zip(x.chunks(stride)) {
                for head in 0..q + k {
                    let cells = head * d..(head + 1) * d;
                    let w = if head < q { &q_w } else { &k_w };
                    rmsnorm_reference(&mut row[cells.clone()], &x_o[cells], w, EPS);
                }
            }
            let parts = [HeadNorm { n_heads: q, w_d: &q_w }, HeadNorm { n_heads: k, w_d: &k_w }];
            for pool in every_pool() {
                let mut y = x.clone();
                head_norm_forward(&pool, &mut y, stride, &parts, EPS);
                assert_close(&y, &expected, 1e-5);
            }
        }
    }
}
