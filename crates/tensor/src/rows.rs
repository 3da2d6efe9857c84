//! The smallest ops on rows: `x_nc += b_c` for every row, and `x *= factor`.

use crate::Pool;
use crate::simd::{Simd, dispatch};

/// Elements one task takes.
const TASK_LEN: usize = 1 << 14;

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

/// Multiplies all of `x`, rows or a single one, by `factor`.
pub fn scale(pool: &Pool, x: &mut [f32], factor: f32) {
    pool.run_chunks(x, TASK_LEN, |_, x| scale_all(pool.level(), x, factor));
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
            }
        }
    }
}
