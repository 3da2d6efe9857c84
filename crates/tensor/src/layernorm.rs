//! LayerNorm (Ba et al. 2016): every row is shifted to mean 0 and divided by its standard deviation, then scaled and
//! shifted per column.
//!
//! `mean = Σ x / c`, `rstd = 1 / sqrt(Σ (x - mean)² / c + eps)`, `y = (x - mean) · rstd · w + b`.
//!
//! Forward only: the models that have it are served here, not trained.

use crate::Pool;
use crate::pool::Disjoint;
use crate::rmsnorm::Residual;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Rows one task takes.
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
        let mut sum = s.zero();
        for x in x_c.chunks(S::LANES) {
            sum = s.add(sum, s.load(x));
        }
        let mean = s.splat(s.sum(sum) / c as f32);
        // y holds the differences for a moment: a tail's missing lanes must not count as -mean.
        let mut squares = s.zero();
        for (y, x) in y_c.chunks_mut(S::LANES).zip(x_c.chunks(S::LANES)) {
            s.store(y, s.sub(s.load(x), mean));
            let difference = s.load(y);
            squares = s.fma(difference, difference, squares);
        }
        let rstd = s.splat(1.0 / (s.sum(squares) / c as f32 + norm.eps).sqrt());
        let columns = norm.w_c.chunks(S::LANES).zip(norm.b_c.chunks(S::LANES));
        for (y, (w, b)) in y_c.chunks_mut(S::LANES).zip(columns) {
            let normed = s.mul(s.load(y), rstd);
            s.store(y, s.fma(normed, s.load(w), s.load(b)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

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
}
