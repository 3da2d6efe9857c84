//! AdamW (Loshchilov & Hutter 2019), one pass over memory.
//!
//! With `g = gradient · grad_scale`: `m = β₁m + (1-β₁)g`, `v = β₂v + (1-β₂)g²`,
//! `p = p · (1 - lr·wd) - lr · (m / (1-β₁ᵏ)) / (√(v / (1-β₂ᵏ)) + eps)` at step k, counted from 1.
//! Parameters outside the decayed ranges have wd = 0. This is PyTorch's `torch.optim.AdamW`.

use std::ops::Range;

use crate::Pool;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Parameters one task takes: 4 arrays · 4 B · 16 Ki = 256 KiB.
const TASK_LEN: usize = 16 << 10;

/// One update's numbers.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the mean, β₁.
    pub beta1: f32,
    /// Decay of the mean square, β₂.
    pub beta2: f32,
    /// Added to the root mean square.
    pub eps: f32,
    /// wd of the decayed ranges.
    pub weight_decay: f32,
    /// Which update this is, from 1.
    pub step: u64,
    /// Factor on every gradient: 1 / tokens, times what clipping asks for.
    pub grad_scale: f32,
}

/// The parameters and their moments, all of one length.
pub struct AdamWState<'a> {
    /// Updated.
    pub params: &'a mut [f32],
    /// Running mean of the gradient; updated.
    pub m: &'a mut [f32],
    /// Running mean of its square; updated.
    pub v: &'a mut [f32],
}

/// Plain reference of one parameter.
pub fn adamw_reference([p, m, v]: [&mut f32; 3], grad: f32, adamw: &AdamW, decayed: bool) {
    let factors = Factors::new(adamw, decayed);
    let g = grad * adamw.grad_scale;
    *m = adamw.beta1 * *m + (1.0 - adamw.beta1) * g;
    *v = adamw.beta2 * *v + (1.0 - adamw.beta2) * g * g;
    *p = *p * factors.keep - factors.rate * *m / ((*v * factors.v_scale).sqrt() + adamw.eps);
}

/// One update of all parameters. `decayed` are the ranges with weight decay, sorted and disjoint.
pub fn adamw(pool: &Pool, state: AdamWState, grads: &[f32], decayed: &[Range<usize>], adamw: &AdamW) {
    let AdamWState { params, m, v } = state;
    let len = grads.len();
    assert!([params.len(), m.len(), v.len()] == [len; 3], "adamw: lengths differ");
    assert!(adamw.step > 0, "adamw: steps count from 1");
    assert!(decayed.is_sorted_by_key(|range| range.start), "adamw: ranges are not sorted");
    let [with, without] = [true, false].map(|decayed| Factors::new(adamw, decayed));
    let (params, m, v) = (Disjoint::new(params), Disjoint::new(m), Disjoint::new(v));
    pool.run(len.div_ceil(TASK_LEN), &|task| {
        let range = piece(task, TASK_LEN, len);
        for (range, is_decayed) in cut(range, decayed) {
            // SAFETY: tasks have disjoint ranges, and `cut` gives disjoint parts of each.
            let (params, m, v) =
                unsafe { (params.slice(range.clone()), m.slice(range.clone()), v.slice(range.clone())) };
            update(pool.level(), params, m, v, &grads[range], if is_decayed { &with } else { &without });
        }
    });
}

/// Σ x², summed in an order that does not depend on the threads. For the norm of the gradient.
pub fn sum_squares(pool: &Pool, x: &[f32], scratch: &mut Vec<f64>) -> f64 {
    let n_tasks = x.len().div_ceil(TASK_LEN);
    scratch.clear();
    scratch.resize(n_tasks, 0.0);
    let partial = Disjoint::new(scratch);
    pool.run(n_tasks, &|task| {
        // SAFETY: one element a task.
        let partial = unsafe { partial.slice(task..task + 1) };
        partial[0] = squares(pool.level(), &x[piece(task, TASK_LEN, x.len())]);
    });
    scratch.iter().sum()
}

/// Cuts `range` at the borders of `decayed`; says of each part whether it is decayed.
fn cut(range: Range<usize>, decayed: &[Range<usize>]) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut at = range.start;
    let mut next = decayed.partition_point(|d| d.end <= at);
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        let inside = decayed.get(next).is_some_and(|d| d.start <= at);
        let border = match decayed.get(next) {
            Some(d) if inside => d.end,
            Some(d) => d.start,
            None => range.end,
        };
        at = border.min(range.end);
        if inside && at == border {
            next += 1;
        }
        Some((start..at, inside))
    })
}

/// What is the same for all parameters of a step.
#[derive(Clone, Copy)]
struct Factors {
    beta1: f32,
    beta2: f32,
    /// 1 - lr·wd
    keep: f32,
    /// lr / (1-β₁ᵏ)
    rate: f32,
    /// 1 / (1-β₂ᵏ)
    v_scale: f32,
    eps: f32,
    grad_scale: f32,
}

impl Factors {
    fn new(adamw: &AdamW, decayed: bool) -> Self {
        // In f64, as PyTorch computes them: 1-β₂ᵏ loses all its digits in f32 at the first steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(adamw.step as f64);
        let decay = if decayed { f64::from(adamw.lr) * f64::from(adamw.weight_decay) } else { 0.0 };
        Self {
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            keep: (1.0 - decay) as f32,
            rate: (f64::from(adamw.lr) / correction(adamw.beta1)) as f32,
            v_scale: (1.0 / correction(adamw.beta2)) as f32,
            eps: adamw.eps,
            grad_scale: adamw.grad_scale,
        }
    }
}

dispatch!(fn update(params: &mut [f32], m: &mut [f32], v: &mut [f32], grads: &[f32], factors: &Factors) = update_simd);
#[inline(always)]
fn update_simd<S: Simd>(
    s: S,
    params: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grads: &[f32],
    factors: &Factors,
) {
    let [beta1, beta2] = [factors.beta1, factors.beta2].map(|x| s.splat(x));
    let [rest1, rest2] = [1.0 - factors.beta1, 1.0 - factors.beta2].map(|x| s.splat(x));
    let [keep, rate, v_scale] = [factors.keep, -factors.rate, factors.v_scale].map(|x| s.splat(x));
    let [eps, grad_scale] = [factors.eps, factors.grad_scale].map(|x| s.splat(x));
    let state = params.chunks_mut(S::LANES).zip(m.chunks_mut(S::LANES)).zip(v.chunks_mut(S::LANES));
    for (((p_at, m_at), v_at), grad) in state.zip(grads.chunks(S::LANES)) {
        let g = s.mul(s.load(grad), grad_scale);
        let m = s.fma(beta1, s.load(m_at), s.mul(rest1, g));
        let v = s.fma(beta2, s.load(v_at), s.mul(rest2, s.mul(g, g)));
        let step = s.div(m, s.add(s.sqrt(s.mul(v, v_scale)), eps));
        let p = s.fma(rate, step, s.mul(s.load(p_at), keep));
        s.store(m_at, m);
        s.store(v_at, v);
        s.store(p_at, p);
    }
}

dispatch!(fn squares(x: &[f32]) -> f64 = squares_simd);
#[inline(always)]
fn squares_simd<S: Simd>(s: S, x: &[f32]) -> f64 {
    // Short f32 sums, added up in f64.
    let mut sum = 0.0;
    for part in x.chunks(64 * S::LANES) {
        let mut squares = s.zero();
        for x in part.chunks(S::LANES) {
            let x = s.load(x);
            squares = s.fma(x, x, squares);
        }
        sum += f64::from(s.sum(squares));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

    fn settings(step: u64) -> AdamW {
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
    }

    #[test]
    fn matches_the_reference_on_every_level() {
        let len = 2 * TASK_LEN + 77;
        let decayed = [3..40, TASK_LEN - 5..TASK_LEN + 9, 2 * TASK_LEN + 70..len];
        let start = numbers(1, len);
        let mut expected = [start.clone(), vec![0.0; len], vec![0.0; len]];
        for step in 1..=3 {
            let grads = numbers(step, len);
            let [p, m, v] = &mut expected;
            for i in 0..len {
                let is_decayed = decayed.iter().any(|range| range.contains(&i));
                adamw_reference([&mut p[i], &mut m[i], &mut v[i]], grads[i], &settings(step), is_decayed);
            }
        }
        for pool in every_pool() {
            let [mut params, mut m, mut v] = [start.clone(), vec![0.0; len], vec![0.0; len]];
            for step in 1..=3 {
                let state = AdamWState { params: &mut params, m: &mut m, v: &mut v };
                adamw(&pool, state, &numbers(step, len), &decayed, &settings(step));
            }
            for (found, expected) in [params, m, v].iter().zip(&expected) {
                assert_close(found, expected, 1e-6);
            }
        }
    }

    #[test]
    fn the_first_step_moves_every_parameter_by_lr() {
        // m / (√v) is the sign of the gradient then.
        let (mut p, mut m, mut v) = ([1.0; 3], [0.0; 3], [0.0; 3]);
        let state = AdamWState { params: &mut p, m: &mut m, v: &mut v };
        adamw(&Pool::new(1), state, &[5.0, -1e-3, 2.0], &[0..0, 2..3], &settings(1));
        assert_close(&p, &[0.99, 1.01, 0.99 - 1e-3], 1e-5);
    }

    #[test]
    fn cuts_at_every_border() {
        let decayed = [2..4, 4..5, 8..20];
        let parts: Vec<_> = cut(0..10, &decayed).collect();
        assert_eq!(parts, [(0..2, false), (2..4, true), (4..5, true), (5..8, false), (8..10, true)]);
        assert_eq!(cut(9..12, &decayed).collect::<Vec<_>>(), [(9..12, true)]);
        assert_eq!(cut(20..22, &decayed).collect::<Vec<_>>(), [(20..22, false)]);
        assert_eq!(cut(5..7, &[]).collect::<Vec<_>>(), [(5..7, false)]);
    }

    #[test]
    fn sums_of_squares_do_not_depend_on_threads() {
        let x = numbers(1, 3 * TASK_LEN + 5);
        let expected: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        for level in crate::cpu::Level::all_available() {
            let sums = [1, 2, 3].map(|n| sum_squares(&Pool::with_level(n, level), &x, &mut Vec::new()));
            assert!((sums[0] / expected - 1.0).abs() < 1e-6 && sums[1] == sums[0] && sums[2] == sums[0]);
        }
    }
}
