//! RMSNorm of single heads: every head of the queries and of the keys is divided by its own root mean square and scaled
//! per dimension, before it is rotated (Qwen3, Gemma 3).
//!
//! `y_d = x_d / sqrt(mean(x_d²) + eps) · w_d`.
//!
//! Backward as in [`crate::rmsnorm`]; the reciprocal root mean squares are computed again.

use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Rows one task takes. Also the length over which `dw` is summed before the sums are added up in order.
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

/// Turns the gradient of the normed heads in `dx_no` into that of the heads before, in place, and overwrites `dw`: the
/// gradients of the parts' scales, one after the other. `x_nk` are the heads before the norm, without what follows them
/// in a row. `scratch` is kept between calls.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn head_norm_backward(
    pool: &Pool,
    (dx_no, stride): (&mut [f32], usize),
    dw: &mut [f32],
    x_nk: &[f32],
    (parts, eps): (&[HeadNorm], f32),
    scratch: &mut Buf<f32>,
) {
    let width: usize = parts.iter().map(|part| part.n_heads * part.w_d.len()).sum();
    let n_weights: usize = parts.iter().map(|part| part.w_d.len()).sum();
    assert!(stride > 0 && width <= stride, "head norm: heads of {width} in rows of {stride}");
    let n = dx_no.len() / stride;
    assert!(dx_no.len() == n * stride && x_nk.len() == n * width, "head norm backward: shapes differ");
    assert_eq!(dw.len(), n_weights, "head norm backward: scales");
    let n_tasks = n.div_ceil(TASK_ROWS);
    scratch.reserve_scratch(n_tasks * n_weights);
    let (dx, partial) = (Disjoint::new(dx_no), Disjoint::new(scratch));
    pool.run(n_tasks, &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows, and one row of partial sums each.
        let (dx, dw) = unsafe {
            (
                dx.slice(rows.start * stride..rows.end * stride),
                partial.slice(task * n_weights..(task + 1) * n_weights),
            )
        };
        let x = &x_nk[rows.start * width..rows.end * width];
        backward(pool.level(), (dx, stride), dw, (x, width), (parts, eps));
    });
    dw.fill(0.0);
    for partial in scratch[..n_tasks * n_weights].chunks_exact(n_weights) {
        dw.iter_mut().zip(partial).for_each(|(dw, p)| *dw += p);
    }
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

dispatch!(fn backward(dx: (&mut [f32], usize), dw: &mut [f32], x: (&[f32], usize), norm: (&[HeadNorm], f32)) = backward_simd);
#[inline(always)]
fn backward_simd<S: Simd>(
    s: S,
    (dx_no, stride): (&mut [f32], usize),
    dw: &mut [f32],
    (x_nk, width): (&[f32], usize),
    (parts, eps): (&[HeadNorm], f32),
) {
    dw.fill(0.0);
    for (mut dx_row, mut x_row) in dx_no.chunks_exact_mut(stride).zip(x_nk.chunks_exact(width)) {
        let mut dw = &mut dw[..];
        for part in parts {
            let d = part.w_d.len();
            let (dx_heads, dx_rest) = dx_row.split_at_mut(part.n_heads * d);
            let (x_heads, x_rest) = x_row.split_at(part.n_heads * d);
            let (dw_d, dw_rest) = dw.split_at_mut(d);
            (dx_row, x_row, dw) = (dx_rest, x_rest, dw_rest);
            for (dx_d, x_d) in dx_heads.chunks_exact_mut(d).zip(x_heads.chunks_exact(d)) {
                head_backward(s, dx_d, dw_d, x_d, part.w_d, eps);
            }
        }
    }
}

/// One head.
#[inline(always)]
fn head_backward<S: Simd>(s: S, dx_d: &mut [f32], dw_d: &mut [f32], x_d: &[f32], w_d: &[f32], eps: f32) {
    let d = x_d.len() as f32;
    let (mut squares, mut dot) = (s.zero(), s.zero());
    for ((x, dy), w) in x_d.chunks(S::LANES).zip(dx_d.chunks(S::LANES)).zip(w_d.chunks(S::LANES)) {
        let x = s.load(x);
        squares = s.fma(x, x, squares);
        dot = s.fma(s.mul(s.load(dy), x), s.load(w), dot);
    }
    let rstd = 1.0 / (s.sum(squares) / d + eps).sqrt();
    let (rstd_s, back) = (s.splat(rstd), s.splat(-(s.sum(dot) / d) * rstd * rstd * rstd));
    let columns = x_d.chunks(S::LANES).zip(w_d.chunks(S::LANES));
    let gradients = dx_d.chunks_mut(S::LANES).zip(dw_d.chunks_mut(S::LANES));
    for ((x, w), (dx, dw)) in columns.zip(gradients) {
        let (x, scaled) = (s.load(x), s.mul(s.load(dx), rstd_s));
        let sum = s.fma(scaled, x, s.load(dw));
        s.store(dw, sum);
        s.store(dx, s.fma(x, back, s.mul(scaled, s.load(w))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rmsnorm::rmsnorm_reference;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

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

    #[test]
    fn backward_matches_finite_differences() {
        const EPS: f32 = 1e-5;
        let (n, q, k, d) = (21, 3, 1, 10);
        let (width, stride) = ((q + k) * d, (q + 2 * k) * d);
        let (x, w, dy) = (numbers(1, n * width), numbers(2, 2 * d), numbers(3, n * stride));
        let loss = |x: &[f32], w: &[f32]| -> f64 {
            let mut y = vec![0.0; d];
            let mut sum = 0.0;
            for (row, dy_o) in x.chunks(width).zip(dy.chunks(stride)) {
                for (head, (x_d, dy_d)) in row.chunks(d).zip(dy_o.chunks(d)).enumerate() {
                    rmsnorm_reference(&mut y, x_d, if head < q { &w[..d] } else { &w[d..] }, EPS);
                    sum += y.iter().zip(dy_d).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>();
                }
            }
            sum
        };
        let parts = [HeadNorm { n_heads: q, w_d: &w[..d] }, HeadNorm { n_heads: k, w_d: &w[d..] }];
        for pool in every_pool() {
            let (mut dx, mut dw) = (dy.clone(), vec![9.0; 2 * d]);
            head_norm_backward(&pool, (&mut dx, stride), &mut dw, &x, (&parts, EPS), &mut Buf::default());
            for (dx_o, dy_o) in dx.chunks(stride).zip(dy.chunks(stride)) {
                assert_eq!(dx_o[width..], dy_o[width..], "values have no norm");
            }
            let heads: Vec<f32> = dx.chunks(stride).flat_map(|row| row[..width].to_vec()).collect();
            check_gradient(&x, &heads, |x| loss(x, &w));
            check_gradient(&w, &dw, |w| loss(&x, w));
        }
    }
}
