//! LayerNorm (Ba et al. 2016): every row is shifted to mean 0 and divided by its standard deviation, then scaled and
//! shifted per column.
//!
//! `mean = Σ x / c`, `rstd = 1 / sqrt(Σ (x - mean)² / c + eps)`, `y = (x - mean) · rstd · w + b`.
//!
//! Backward, with `x̂ = (x - mean) · rstd` and `g = dy · w`: `dx = rstd · (g - mean(g) - x̂ · mean(g · x̂))`,
//! `dw = Σ_n dy · x̂`, `db = Σ_n dy`. Mean and rstd are computed again: the row is in the first-level cache anyway.

use crate::pool::Disjoint;
use crate::rmsnorm::Residual;
use crate::simd::{Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Rows one task takes. Also the length over which `dw` and `db` are summed before the sums are added up in order.
const TASK_ROWS: usize = 64;

/// A LayerNorm's numbers.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// Scale of every column.
    pub w_c: &'a [f32],
    /// Shift of every column.
    pub b_c: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

/// Plain reference of one row.
pub fn layernorm_reference(y_c: &mut [f32], x_c: &[f32], norm: LayerNorm) {
    let c = x_c.len() as f32;
    let mean = x_c.iter().sum::<f32>() / c;
    let variance = x_c.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / c;
    let rstd = 1.0 / (variance + norm.eps).sqrt();
    for (i, y) in y_c.iter_mut().enumerate() {
        *y = (x_c[i] - mean) * rstd * norm.w_c[i] + norm.b_c[i];
    }
}

/// `y = layernorm(x)` for every row.
pub fn layernorm_forward(pool: &Pool, y_nc: &mut [f32], x_nc: &[f32], norm: LayerNorm) {
    let (n, c) = norm.check([y_nc.len(), x_nc.len()]);
    let y = Disjoint::new(y_nc);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows.
        let y = unsafe { y.slice(cells.clone()) };
        forward(pool.level(), y, &x_nc[cells], norm);
    });
}

/// `sum = x + delta` and `y = layernorm(sum)` in one pass over memory.
pub fn residual_layernorm_forward(
    pool: &Pool,
    [sum_nc, y_nc]: [&mut [f32]; 2],
    input: Residual,
    norm: LayerNorm,
) {
    let (n, c) = norm.check([sum_nc.len(), y_nc.len(), input.x_nc.len(), input.delta_nc.len()]);
    let (sum, y) = (Disjoint::new(sum_nc), Disjoint::new(y_nc));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows.
        let (sum, y) = unsafe { (sum.slice(cells.clone()), y.slice(cells.clone())) };
        add(pool.level(), sum, &input.x_nc[cells.clone()], &input.delta_nc[cells]);
        forward(pool.level(), y, sum, norm);
    });
}

/// Adds the gradient of `x` to `dx_nc` (the residual stream's gradient is there already) and overwrites `dw_c` and
/// `db_c`. `scratch` is kept between calls.
pub fn layernorm_backward(
    pool: &Pool,
    dx_nc: &mut [f32],
    [dw_c, db_c]: [&mut [f32]; 2],
    (dy_nc, x_nc): (&[f32], &[f32]),
    norm: LayerNorm,
    scratch: &mut Buf<f32>,
) {
    let (n, c) = norm.check([dx_nc.len(), dy_nc.len(), x_nc.len()]);
    assert!(dw_c.len() == c && db_c.len() == c, "layernorm backward: shapes differ");
    let n_tasks = n.div_ceil(TASK_ROWS);
    // Each task: dw, db, and one row of differences from the mean.
    scratch.reserve_scratch(n_tasks * 3 * c);
    let (dx, partial) = (Disjoint::new(dx_nc), Disjoint::new(scratch));
    pool.run(n_tasks, &|task| {
        let rows = piece(task, TASK_ROWS, n);
        let cells = rows.start * c..rows.end * c;
        // SAFETY: tasks have disjoint rows, and a piece of partial sums each.
        let (dx, sums) =
            unsafe { (dx.slice(cells.clone()), partial.slice(task * 3 * c..(task + 1) * 3 * c)) };
        backward(pool.level(), dx, sums, &dy_nc[cells.clone()], &x_nc[cells], norm);
    });
    dw_c.fill(0.0);
    db_c.fill(0.0);
    for sums in scratch[..n_tasks * 3 * c].chunks_exact(3 * c) {
        dw_c.iter_mut().zip(&sums[..c]).for_each(|(dw, sum)| *dw += sum);
        db_c.iter_mut().zip(&sums[c..2 * c]).for_each(|(db, sum)| *db += sum);
    }
}

impl LayerNorm<'_> {
    /// Rows and columns, after checking the shapes.
    fn check<const N: usize>(&self, lens: [usize; N]) -> (usize, usize) {
        let c = self.w_c.len();
        assert!(c > 0 && self.b_c.len() == c, "layernorm: {c} scales and {} shifts", self.b_c.len());
        assert!(lens[0].is_multiple_of(c) && lens == [lens[0]; N], "layernorm: shapes differ: {lens:?}, {c}");
        (lens[0] / c, c)
    }
}

dispatch!(fn add(sum: &mut [f32], a: &[f32], b: &[f32]) = add_simd);
#[inline(always)]
fn add_simd<S: Simd>(s: S, sum: &mut [f32], a: &[f32], b: &[f32]) {
    for ((sum, a), b) in sum.chunks_mut(S::LANES).zip(a.chunks(S::LANES)).zip(b.chunks(S::LANES)) {
        s.store(sum, s.add(s.load(a), s.load(b)));
    }
}

dispatch!(fn forward(y_nc: &mut [f32], x_nc: &[f32], norm: LayerNorm) = forward_simd);
#[inline(always)]
fn forward_simd<S: Simd>(s: S, y_nc: &mut [f32], x_nc: &[f32], norm: LayerNorm) {
    let c = norm.w_c.len();
    for (y_c, x_c) in y_nc.chunks_exact_mut(c).zip(x_nc.chunks_exact(c)) {
        // y holds the differences for a moment.
        let rstd = s.splat(differences(s, y_c, x_c, norm.eps));
        let columns = norm.w_c.chunks(S::LANES).zip(norm.b_c.chunks(S::LANES));
        for (y, (w, b)) in y_c.chunks_mut(S::LANES).zip(columns) {
            let normed = s.mul(s.load(y), rstd);
            s.store(y, s.fma(normed, s.load(w), s.load(b)));
        }
    }
}

dispatch!(fn backward(dx_nc: &mut [f32], sums: &mut [f32], dy_nc: &[f32], x_nc: &[f32], norm: LayerNorm) = backward_simd);
#[inline(always)]
fn backward_simd<S: Simd>(
    s: S,
    dx_nc: &mut [f32],
    sums: &mut [f32],
    dy_nc: &[f32],
    x_nc: &[f32],
    norm: LayerNorm,
) {
    let c = norm.w_c.len();
    let (dw_c, rest) = sums.split_at_mut(c);
    let (db_c, difference_c) = rest.split_at_mut(c);
    dw_c.fill(0.0);
    db_c.fill(0.0);
    let rows = dx_nc.chunks_exact_mut(c).zip(dy_nc.chunks_exact(c)).zip(x_nc.chunks_exact(c));
    for ((dx_c, dy_c), x_c) in rows {
        let rstd = differences(s, difference_c, x_c, norm.eps);
        let rstd_s = s.splat(rstd);
        let (mut g_sum, mut g_dot) = (s.zero(), s.zero());
        let columns = dy_c.chunks(S::LANES).zip(difference_c.chunks(S::LANES)).zip(norm.w_c.chunks(S::LANES));
        let gradients = dw_c.chunks_mut(S::LANES).zip(db_c.chunks_mut(S::LANES));
        for (((dy, difference), w), (dw, db)) in columns.zip(gradients) {
            let (dy, difference) = (s.load(dy), s.load(difference));
            let g = s.mul(dy, s.load(w));
            g_sum = s.add(g_sum, g);
            g_dot = s.fma(g, difference, g_dot);
            let (dw_sum, db_sum) = (s.fma(s.mul(dy, difference), rstd_s, s.load(dw)), s.add(s.load(db), dy));
            s.store(dw, dw_sum);
            s.store(db, db_sum);
        }
        // dx += rstd · g + difference · (-rstd³ · mean(g · difference)) - rstd · mean(g)
        let back = s.splat(-rstd * rstd * rstd * (s.sum(g_dot) / c as f32));
        let shift = s.splat(-rstd * (s.sum(g_sum) / c as f32));
        let columns = dy_c.chunks(S::LANES).zip(difference_c.chunks(S::LANES)).zip(norm.w_c.chunks(S::LANES));
        for (((dy, difference), w), dx) in columns.zip(dx_c.chunks_mut(S::LANES)) {
            let sum = s.add(s.load(dx), s.fma(s.load(difference), back, shift));
            let sum = s.fma(s.mul(s.load(dy), rstd_s), s.load(w), sum);
            s.store(dx, sum);
        }
    }
}

/// `x - mean` of one row; gives its rstd.
#[inline(always)]
fn differences<S: Simd>(s: S, difference_c: &mut [f32], x_c: &[f32], eps: f32) -> f32 {
    let c = x_c.len() as f32;
    let mut sum = s.zero();
    for x in x_c.chunks(S::LANES) {
        sum = s.add(sum, s.load(x));
    }
    let mean = s.splat(s.sum(sum) / c);
    // Loaded again after it was stored: a tail's missing lanes must not count as -mean.
    let mut squares = s.zero();
    for (difference, x) in difference_c.chunks_mut(S::LANES).zip(x_c.chunks(S::LANES)) {
        s.store(difference, s.sub(s.load(x), mean));
        let difference = s.load(difference);
        squares = s.fma(difference, difference, squares);
    }
    1.0 / (s.sum(squares) / c + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    #[test]
    fn matches_the_reference_on_every_level() {
        for (n, c) in [(1, 1), (3, 7), (65, 24), (130, 33)] {
            let (x, delta) = (numbers(1, n * c), numbers(2, n * c));
            // Far from mean 0, where mean(x²) - mean² would lose everything.
            let added: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + 40.0 + b).collect();
            let x: Vec<f32> = x.iter().map(|x| x + 40.0).collect();
            let (w_c, b_c) = (&numbers(3, c)[..], &numbers(4, c)[..]);
            let norm = LayerNorm { w_c, b_c, eps: 1e-5 };
            let mut expected = vec![0.0; n * c];
            for (y_c, x_c) in expected.chunks_mut(c).zip(added.chunks(c)) {
                layernorm_reference(y_c, x_c, norm);
            }
            for pool in every_pool() {
                let [mut y, mut sum, mut y2] = [(); 3].map(|()| vec![9.0; n * c]);
                layernorm_forward(&pool, &mut y, &added, norm);
                let input = Residual { x_nc: &x, delta_nc: &delta };
                residual_layernorm_forward(&pool, [&mut sum, &mut y2], input, norm);
                assert_close(&y, &expected, 1e-4);
                assert_eq!((&sum, &y2), (&added, &y));
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, c) = (67, 11);
        let (x, w, b, dy) = (numbers(1, n * c), numbers(2, c), numbers(3, c), numbers(4, n * c));
        let x: Vec<f32> = x.iter().map(|x| x + 2.0).collect();
        let loss = |x: &[f32], w_c: &[f32], b_c: &[f32]| -> f64 {
            let mut y = vec![0.0; c];
            let mut sum = 0.0;
            for (x_c, dy_c) in x.chunks(c).zip(dy.chunks(c)) {
                layernorm_reference(&mut y, x_c, LayerNorm { w_c, b_c, eps: 1e-5 });
                sum += y.iter().zip(dy_c).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>();
            }
            sum
        };
        for pool in every_pool() {
            let (mut dx, mut dw, mut db) = (vec![1.0; n * c], vec![9.0; c], vec![9.0; c]);
            let norm = LayerNorm { w_c: &w, b_c: &b, eps: 1e-5 };
            layernorm_backward(&pool, &mut dx, [&mut dw, &mut db], (&dy, &x), norm, &mut Buf::default());
            dx.iter_mut().for_each(|dx| *dx -= 1.0); // it adds to what was there
            check_gradient(&x, &dx, |x| loss(x, &w, &b));
            check_gradient(&w, &dw, |w| loss(&x, w, &b));
            check_gradient(&b, &db, |b| loss(&x, &w, b));
        }
    }
}
