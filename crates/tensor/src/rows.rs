//! The smallest ops on rows: `x_nc += b_c` for every row, its backward `db_c = Σ_n dx_nc`, and factors for all rows or
//! for each.

use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Elements one task takes.
const TASK_LEN: usize = 1 << 14;
/// Rows summed by one task.
const SUM_ROWS: usize = 64;

/// Adds `b_c` to every row of `x_nc`.
///
/// # Panics
/// If `x_nc` is not whole rows.
pub fn add_bias(pool: &Pool, x_nc: &mut [f32], b_c: &[f32]) {
    let c = b_c.len();
    assert!(c > 0 && x_nc.len().is_multiple_of(c), "bias of {c} on {} elements", x_nc.len());
    let task_rows = (TASK_LEN / c).max(1);
    pool.run_chunks(x_nc, task_rows * c, |_, x_nc| add_rows(pool.level(), x_nc, b_c));
}

/// Overwrites `db_c` with the sum of all rows: over pieces of [`SUM_ROWS`] first, then over the pieces in order, so that
/// the bits do not depend on the threads. `scratch` is kept between calls.
///
/// # Panics
/// If `dx_nc` is not whole rows.
pub fn bias_backward(pool: &Pool, db_c: &mut [f32], dx_nc: &[f32], scratch: &mut Buf<f32>) {
    let c = db_c.len();
    assert!(c > 0 && dx_nc.len().is_multiple_of(c), "bias of {c} on {} elements", dx_nc.len());
    let n = dx_nc.len() / c;
    let n_tasks = n.div_ceil(SUM_ROWS);
    scratch.reserve_scratch(n_tasks * c);
    let partial = Disjoint::new(scratch);
    pool.run(n_tasks, &|task| {
        let rows = piece(task, SUM_ROWS, n);
        // SAFETY: one row of partial sums a task.
        let sum_c = unsafe { partial.slice(task * c..(task + 1) * c) };
        sum_rows(pool.level(), sum_c, &dx_nc[rows.start * c..rows.end * c]);
    });
    db_c.fill(0.0);
    for partial_c in scratch[..n_tasks * c].chunks_exact(c) {
        db_c.iter_mut().zip(partial_c).for_each(|(db, p)| *db += p);
    }
}

/// Multiplies all of `x`, rows or a single one, by `factor`.
pub fn scale(pool: &Pool, x: &mut [f32], factor: f32) {
    pool.run_chunks(x, TASK_LEN, |_, x| scale_all(pool.level(), x, factor));
}

/// Multiplies every row of `x_nc` by a factor of its own.
///
/// # Panics
/// If `x_nc` is not as many rows as there are factors.
pub fn scale_rows(pool: &Pool, x_nc: &mut [f32], factors_n: &[f32]) {
    let n = factors_n.len();
    assert!(n > 0 && x_nc.len().is_multiple_of(n), "{n} factors for {} elements", x_nc.len());
    let c = x_nc.len() / n;
    let task_rows = (TASK_LEN / c.max(1)).max(1);
    pool.run_chunks(x_nc, task_rows * c, |task, x_nc| {
        for (x_c, factor) in x_nc.chunks_exact_mut(c).zip(&factors_n[task * task_rows..]) {
            scale_all(pool.level(), x_c, *factor);
        }
    });
}

dispatch!(fn add_rows(x_nc: &mut [f32], b_c: &[f32]) = add_rows_simd);
#[inline(always)]
fn add_rows_simd<S: Simd>(s: S, x_nc: &mut [f32], b_c: &[f32]) {
    for x_c in x_nc.chunks_exact_mut(b_c.len()) {
        for (x, b) in x_c.chunks_mut(S::LANES).zip(b_c.chunks(S::LANES)) {
            s.store(x, s.add(s.load(x), s.load(b)));
        }
    }
}

dispatch!(fn sum_rows(sum_c: &mut [f32], x_nc: &[f32]) = sum_rows_simd);
#[inline(always)]
fn sum_rows_simd<S: Simd>(s: S, sum_c: &mut [f32], x_nc: &[f32]) {
    sum_c.fill(0.0);
    for x_c in x_nc.chunks_exact(sum_c.len()) {
        for (sum, x) in sum_c.chunks_mut(S::LANES).zip(x_c.chunks(S::LANES)) {
            s.store(sum, s.add(s.load(sum), s.load(x)));
        }
    }
}

dispatch!(fn scale_all(x: &mut [f32], factor: f32) = scale_all_simd);
#[inline(always)]
fn scale_all_simd<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for x in x.chunks_mut(S::LANES) {
        s.store(x, s.mul(s.load(x), factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{every_pool, numbers};

    /// One rounding each, so every level gives the same bits.
    #[test]
    fn bias_and_scale_are_exact() {
        for (n, c) in [(1, 1), (3, 7), (900, 33), (2, TASK_LEN + 3)] {
            let (x, b) = (numbers(1, n * c), numbers(2, c));
            let biased: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + b[i % c]).collect();
            let scaled: Vec<f32> = biased.iter().map(|x| x * 0.3).collect();
            for pool in every_pool() {
                let mut y = x.clone();
                add_bias(&pool, &mut y, &b);
                assert_eq!(y, biased);
                scale(&pool, &mut y, 0.3);
                assert_eq!(y, scaled);
                let factors = numbers(3, n);
                let expected: Vec<f32> = y.iter().enumerate().map(|(i, y)| y * factors[i / c]).collect();
                scale_rows(&pool, &mut y, &factors);
                assert_eq!(y, expected);
            }
        }
    }

    #[test]
    fn the_gradient_of_a_bias_is_the_sum_of_rows() {
        for (n, c) in [(1, 1), (3, 7), (200, 33)] {
            let x = numbers(1, n * c);
            let mut expected = vec![0.0; c];
            for piece in x.chunks(SUM_ROWS * c) {
                for j in 0..c {
                    expected[j] += piece.chunks(c).fold(0.0, |sum, row| sum + row[j]);
                }
            }
            for pool in every_pool() {
                let mut db = vec![9.0; c];
                bias_backward(&pool, &mut db, &x, &mut Buf::default());
                assert_eq!(db, expected);
            }
        }
    }
}
