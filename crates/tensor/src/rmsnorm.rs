//! RMSNorm (Zhang & Sennrich 2019): every row is divided by its root mean square, then scaled per column.
//!
//! `rstd = 1 / sqrt(mean(x²) + eps)`, `y = x · rstd · w`.
//!
//! Backward, with `g = dy · w`: `dx = rstd · (g - x · rstd² · mean(g · x))`, `dw = Σ_n dy · x · rstd`.

use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Rows one task takes. Also the length over which `dw` is summed before the sums are added up in order, so that the
/// bits do not depend on the threads.
const TASK_ROWS: usize = 64;

/// What the forward pass leaves for the backward pass.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// Input rows `[n, c]`.
    pub x_nc: &'a [f32],
    /// Reciprocal root mean square of every row.
    pub rstd_n: &'a [f32],
    /// Scale of every column.
    pub w_c: &'a [f32],
}

/// Plain reference: one row of `y`; gives its `rstd`.
pub fn rmsnorm_reference(y_c: &mut [f32], x_c: &[f32], w_c: &[f32], eps: f32) -> f32 {
    let mean = x_c.iter().map(|x| x * x).sum::<f32>() / x_c.len() as f32;
    let rstd = 1.0 / (mean + eps).sqrt();
    for ((y, x), w) in y_c.iter_mut().zip(x_c).zip(w_c) {
        *y = x * rstd * w;
    }
    rstd
}

/// `y = rmsnorm(x)` for every row; `rstd_n` is kept for [`rmsnorm_backward`].
pub fn rmsnorm_forward(
    pool: &Pool,
    y_nc: &mut [f32],
    rstd_n: &mut [f32],
    x_nc: &[f32],
    w_c: &[f32],
    eps: f32,
) {
    let (n, c) = (rstd_n.len(), w_c.len());
    assert!(c > 0 && x_nc.len() == n * c && y_nc.len() == n * c, "rmsnorm: shapes differ");
    let (y, rstd) = (Disjoint::new(y_nc), Disjoint::new(rstd_n));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows.
        let (y, rstd) = unsafe { (y.slice(cells.clone()), rstd.slice(rows)) };
        forward(pool.level(), y, rstd, &x_nc[cells], w_c, eps);
    });
}

/// The two inputs of a residual addition.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    /// The stream so far, `[n, c]`.
    pub x_nc: &'a [f32],
    /// What a sub-layer adds to it, `[n, c]`.
    pub delta_nc: &'a [f32],
}

/// `sum = x + delta` and `y = rmsnorm(sum)` in one pass over memory.
pub fn residual_rmsnorm_forward(
    pool: &Pool,
    [sum_nc, y_nc]: [&mut [f32]; 2],
    rstd_n: &mut [f32],
    input: Residual,
    w_c: &[f32],
    eps: f32,
) {
    let (n, c) = (rstd_n.len(), w_c.len());
    let lens = [sum_nc.len(), y_nc.len(), input.x_nc.len(), input.delta_nc.len()];
    assert!(c > 0 && lens == [n * c; 4], "residual rmsnorm: shapes differ");
    let (sum, y, rstd) = (Disjoint::new(sum_nc), Disjoint::new(y_nc), Disjoint::new(rstd_n));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows.
        let (sum, y, rstd) = unsafe { (sum.slice(cells.clone()), y.slice(cells.clone()), rstd.slice(rows)) };
        add(pool.level(), sum, &input.x_nc[cells.clone()], &input.delta_nc[cells]);
        forward(pool.level(), y, rstd, sum, w_c, eps);
    });
}

/// `y` again from what the forward pass left: cheaper than keeping it for every layer.
pub fn rmsnorm_again(pool: &Pool, y_nc: &mut [f32], normed: Normed) {
    let (n, c) = normed.check(y_nc.len());
    let y = Disjoint::new(y_nc);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows.
        let y = unsafe { y.slice(cells.clone()) };
        scale_rows(pool.level(), y, &normed.x_nc[cells], &normed.rstd_n[rows], normed.w_c);
    });
}

/// Adds the gradient of `x` to `dx_nc` (the residual stream's gradient is there already) and overwrites `dw_c`.
/// `scratch` is kept between calls.
pub fn rmsnorm_backward(
    pool: &Pool,
    dx_nc: &mut [f32],
    dw_c: &mut [f32],
    dy_nc: &[f32],
    normed: Normed,
    scratch: &mut Buf<f32>,
) {
    let (n, c) = normed.check(dx_nc.len());
    assert!(dw_c.len() == c && dy_nc.len() == n * c, "rmsnorm backward: shapes differ");
    let n_tasks = n.div_ceil(TASK_ROWS);
    scratch.reserve_scratch(n_tasks * c);
    let (dx, partial) = (Disjoint::new(dx_nc), Disjoint::new(scratch));
    pool.run(n_tasks, &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows, and one row of partial sums each.
        let (dx, dw) = unsafe { (dx.slice(cells.clone()), partial.slice(task * c..(task + 1) * c)) };
        let part =
            Normed { x_nc: &normed.x_nc[cells.clone()], rstd_n: &normed.rstd_n[rows], w_c: normed.w_c };
        backward(pool.level(), dx, dw, &dy_nc[cells], part);
    });
    dw_c.fill(0.0);
    for partial_c in scratch[..n_tasks * c].chunks_exact(c) {
        dw_c.iter_mut().zip(partial_c).for_each(|(dw, p)| *dw += p);
    }
}

impl Normed<'_> {
    fn check(&self, len: usize) -> (usize, usize) {
        let (n, c) = (self.rstd_n.len(), self.w_c.len());
        assert!(c > 0 && self.x_nc.len() == n * c && len == n * c, "rmsnorm: shapes differ");
        (n, c)
    }
}

dispatch!(fn forward(y_nc: &mut [f32], rstd_n: &mut [f32], x_nc: &[f32], w_c: &[f32], eps: f32) = forward_simd);
#[inline(always)]
fn forward_simd<S: Simd>(s: S, y_nc: &mut [f32], rstd_n: &mut [f32], x_nc: &[f32], w_c: &[f32], eps: f32) {
    let c = w_c.len();
    for ((y_c, x_c), rstd) in y_nc.chunks_exact_mut(c).zip(x_nc.chunks_exact(c)).zip(rstd_n) {
        let mut squares = s.zero();
        for x in x_c.chunks(S::LANES) {
            let x = s.load(x);
            squares = s.fma(x, x, squares);
        }
        *rstd = 1.0 / (s.sum(squares) / c as f32 + eps).sqrt();
        scale_row(s, y_c, x_c, *rstd, w_c);
    }
}

dispatch!(fn scale_rows(y_nc: &mut [f32], x_nc: &[f32], rstd_n: &[f32], w_c: &[f32]) = scale_rows_simd);
#[inline(always)]
fn scale_rows_simd<S: Simd>(s: S, y_nc: &mut [f32], x_nc: &[f32], rstd_n: &[f32], w_c: &[f32]) {
    let c = w_c.len();
    for ((y_c, x_c), rstd) in y_nc.chunks_exact_mut(c).zip(x_nc.chunks_exact(c)).zip(rstd_n) {
        scale_row(s, y_c, x_c, *rstd, w_c);
    }
}

#[inline(always)]
fn scale_row<S: Simd>(s: S, y_c: &mut [f32], x_c: &[f32], rstd: f32, w_c: &[f32]) {
    let rstd = s.splat(rstd);
    for ((y, x), w) in y_c.chunks_mut(S::LANES).zip(x_c.chunks(S::LANES)).zip(w_c.chunks(S::LANES)) {
        s.store(y, s.mul(s.mul(s.load(x), rstd), s.load(w)));
    }
}

dispatch!(fn add(sum: &mut [f32], a: &[f32], b: &[f32]) = add_simd);
#[inline(always)]
fn add_simd<S: Simd>(s: S, sum: &mut [f32], a: &[f32], b: &[f32]) {
    for ((sum, a), b) in sum.chunks_mut(S::LANES).zip(a.chunks(S::LANES)).zip(b.chunks(S::LANES)) {
        s.store(sum, s.add(s.load(a), s.load(b)));
    }
}

dispatch!(fn backward(dx_nc: &mut [f32], dw_c: &mut [f32], dy_nc: &[f32], normed: Normed) = backward_simd);
#[inline(always)]
fn backward_simd<S: Simd>(s: S, dx_nc: &mut [f32], dw_c: &mut [f32], dy_nc: &[f32], normed: Normed) {
    let c = normed.w_c.len();
    dw_c.fill(0.0);
    let rows = dx_nc.chunks_exact_mut(c).zip(dy_nc.chunks_exact(c)).zip(normed.x_nc.chunks_exact(c));
    for (((dx_c, dy_c), x_c), rstd) in rows.zip(normed.rstd_n) {
        let rstd_s = s.splat(*rstd);
        let mut dot = s.zero();
        let columns = dy_c.chunks(S::LANES).zip(x_c.chunks(S::LANES)).zip(normed.w_c.chunks(S::LANES));
        for (((dy, x), w), dw) in columns.zip(dw_c.chunks_mut(S::LANES)) {
            let dy_x = s.mul(s.load(dy), s.load(x));
            dot = s.fma(dy_x, s.load(w), dot);
            let sum = s.fma(dy_x, rstd_s, s.load(dw));
            s.store(dw, sum);
        }
        // dx += rstd · dy · w - x · (rstd³ · mean)
        let back = s.splat(-(s.sum(dot) / c as f32) * rstd * rstd * rstd);
        let columns = dy_c.chunks(S::LANES).zip(x_c.chunks(S::LANES)).zip(normed.w_c.chunks(S::LANES));
        for (((dy, x), w), dx) in columns.zip(dx_c.chunks_mut(S::LANES)) {
            let sum = s.fma(s.mul(s.load(dy), rstd_s), s.load(w), s.load(dx));
            let sum = s.fma(s.load(x), back, sum);
            s.store(dx, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    const EPS: f32 = 1e-5;

    #[test]
    fn forward_matches_the_reference_on_every_level() {
        for (n, c) in [(1, 1), (3, 7), (65, 24), (130, 33)] {
            let (x, delta, w) = (numbers(1, n * c), numbers(2, n * c), numbers(3, c));
            let added: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            for pool in every_pool() {
                let [mut y, mut sum, mut y2, mut again, mut expected] = [(); 5].map(|()| vec![0.0; n * c]);
                let [mut rstd, mut rstd2] = [(); 2].map(|()| vec![0.0; n]);
                rmsnorm_forward(&pool, &mut y, &mut rstd, &added, &w, EPS);
                let input = Residual { x_nc: &x, delta_nc: &delta };
                residual_rmsnorm_forward(&pool, [&mut sum, &mut y2], &mut rstd2, input, &w, EPS);
                rmsnorm_again(&pool, &mut again, Normed { x_nc: &added, rstd_n: &rstd, w_c: &w });
                for ((y_c, x_c), rstd) in expected.chunks_mut(c).zip(added.chunks(c)).zip(&rstd) {
                    let expected_rstd = rmsnorm_reference(y_c, x_c, &w, EPS);
                    assert_close(&[*rstd], &[expected_rstd], 1e-5);
                }
                assert_close(&y, &expected, 1e-5);
                assert_eq!((&sum, &y2, &rstd2, &again), (&added, &y, &rstd, &y));
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, c) = (67, 11);
        let (x, w, dy) = (numbers(1, n * c), numbers(2, c), numbers(3, n * c));
        let loss = |x: &[f32], w: &[f32]| -> f64 {
            let mut y = vec![0.0; c];
            let mut sum = 0.0;
            for (x_c, dy_c) in x.chunks(c).zip(dy.chunks(c)) {
                rmsnorm_reference(&mut y, x_c, w, EPS);
                sum += y.iter().zip(dy_c).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>();
            }
            sum
        };
        for pool in every_pool() {
            let mut rstd = vec![0.0; n];
            rmsnorm_forward(&pool, &mut vec![0.0; n * c], &mut rstd, &x, &w, EPS);
            let (mut dx, mut dw) = (vec![1.0; n * c], vec![9.0; c]);
            let normed = Normed { x_nc: &x, rstd_n: &rstd, w_c: &w };
            rmsnorm_backward(&pool, &mut dx, &mut dw, &dy, normed, &mut Buf::default());
            dx.iter_mut().for_each(|dx| *dx -= 1.0); // it adds to what was there
            check_gradient(&x, &dx, |x| loss(x, &w));
            check_gradient(&w, &dw, |w| loss(&x, w));
        }
    }
}
