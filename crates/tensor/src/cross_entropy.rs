//! Softmax and cross-entropy, fused: `loss = ln Σ_v e^{logit_v} - logit_target`, in nats.
//!
//! Backward: `dlogit_v = softmax_v - [v = target]`, written over the logits in the same call. Callers make the logits of
//! a chunk of tokens at a time, so that `[n, v]` never exists.

use crate::Pool;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// The target of a token that has no loss and no gradient.
pub const IGNORED: u32 = u32::MAX;

/// Rows one task takes.
const TASK_ROWS: usize = 4;

/// Plain reference of one row: the loss; the logits become their gradient.
pub fn cross_entropy_reference(logits_v: &mut [f32], target: u32) -> f32 {
    if target == IGNORED {
        logits_v.fill(0.0);
        return 0.0;
    }
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits_v.iter().map(|x| (x - max).exp()).sum();
    let loss = sum.ln() + max - logits_v[target as usize];
    logits_v.iter_mut().for_each(|x| *x = (*x - max).exp() / sum);
    logits_v[target as usize] -= 1.0;
    loss
}

/// `losses_n` gets the loss of every row of `logits_nv`; the logits become the gradient of the sum of the losses.
/// Rows whose target is [`IGNORED`] get zeros.
///
/// With `z` the gradient is that of `loss + z · (ln Σ_v e^{logit_v})²` (z-loss: de Brébisson & Vincent 2016; PaLM, Chowdhery
/// et al. 2022), which keeps logits from drifting; `losses_n` gets the loss without that term.
///
/// # Panics
/// If a target is neither below v nor ignored.
pub fn cross_entropy_forward_backward(
    pool: &Pool,
    losses_n: &mut [f32],
    logits_nv: &mut [f32],
    targets_n: &[u32],
    z: f32,
) {
    let (n, v) = check(losses_n, logits_nv, targets_n);
    let (losses, logits) = (Disjoint::new(losses_n), Disjoint::new(logits_nv));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let (losses, logits) =
            unsafe { (losses.slice(rows.clone()), logits.slice(rows.start * v..rows.end * v)) };
        forward_backward(pool.level(), losses, logits, &targets_n[rows], v, z);
    });
}

/// `losses_n` alone, the logits stay as they are.
///
/// # Panics
/// If a target is neither below v nor ignored.
pub fn cross_entropy_forward(pool: &Pool, losses_n: &mut [f32], logits_nv: &[f32], targets_n: &[u32]) {
    let (n, v) = check(losses_n, logits_nv, targets_n);
    let losses = Disjoint::new(losses_n);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let losses = unsafe { losses.slice(rows.clone()) };
        forward(pool.level(), losses, &logits_nv[rows.start * v..rows.end * v], &targets_n[rows], v);
    });
}

fn check(losses_n: &[f32], logits_nv: &[f32], targets_n: &[u32]) -> (usize, usize) {
    let n = targets_n.len();
    assert!(losses_n.len() == n && logits_nv.len().is_multiple_of(n.max(1)), "cross-entropy: shapes differ");
    let v = logits_nv.len() / n.max(1);
    let outside = targets_n.iter().find(|&&target| target != IGNORED && target as usize >= v);
    assert!(outside.is_none(), "cross-entropy: target {outside:?} in a vocabulary of {v}");
    (n, v)
}

dispatch!(fn forward_backward(losses_n: &mut [f32], logits_nv: &mut [f32], targets_n: &[u32], v: usize, z: f32) = forward_backward_simd);
#[inline(always)]
fn forward_backward_simd<S: Simd>(
    s: S,
    losses_n: &mut [f32],
    logits_nv: &mut [f32],
    targets_n: &[u32],
    v: usize,
    z: f32,
) {
    for ((loss, logits_v), &target) in losses_n.iter_mut().zip(logits_nv.chunks_exact_mut(v)).zip(targets_n) {
        if target == IGNORED {
            *loss = 0.0;
            logits_v.fill(0.0);
            continue;
        }
        let max = largest(s, logits_v);
        let at_target = logits_v[target as usize];
        let mut sum = s.zero();
        let mut whole = logits_v.chunks_exact_mut(S::LANES);
        for logits in &mut whole {
            let e = s.exp_or_zero(s.sub(s.load(logits), s.splat(max)));
            sum = s.add(sum, e);
            s.store(logits, e);
        }
        let mut sum = s.sum(sum);
        for logit in whole.into_remainder() {
            *logit = (*logit - max).exp();
            sum += *logit;
        }
        // d/dlogit of z·lse² is 2·z·lse·softmax.
        let lse = sum.ln() + max;
        let scale = s.splat((1.0 + 2.0 * z * lse) / sum);
        for logits in logits_v.chunks_mut(S::LANES) {
            let scaled = s.mul(s.load(logits), scale);
            s.store(logits, scaled);
        }
        logits_v[target as usize] -= 1.0;
        *loss = sum.ln() + (max - at_target);
    }
}

dispatch!(fn forward(losses_n: &mut [f32], logits_nv: &[f32], targets_n: &[u32], v: usize) = forward_simd);
#[inline(always)]
fn forward_simd<S: Simd>(s: S, losses_n: &mut [f32], logits_nv: &[f32], targets_n: &[u32], v: usize) {
    for ((loss, logits_v), &target) in losses_n.iter_mut().zip(logits_nv.chunks_exact(v)).zip(targets_n) {
        if target == IGNORED {
            *loss = 0.0;
            continue;
        }
        let max = largest(s, logits_v);
        let mut sum = s.zero();
        let whole = logits_v.chunks_exact(S::LANES);
        let tail: f32 = whole.remainder().iter().map(|x| (x - max).exp()).sum();
        for logits in whole {
            sum = s.add(sum, s.exp(s.sub(s.load(logits), s.splat(max))));
        }
        *loss = (s.sum(sum) + tail).ln() + (max - logits_v[target as usize]);
    }
}

#[inline(always)]
pub(crate) fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    let whole = x.chunks_exact(S::LANES);
    let tail = whole.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in whole {
        max = s.max(s.load(x), max);
    }
    s.max_lane(max).max(tail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    #[test]
    fn matches_the_reference_on_every_level() {
        for (n, v) in [(1, 1), (5, 3), (9, 100), (6, 129)] {
            let logits: Vec<f32> = numbers(1, n * v).iter().map(|x| x * 30.0).collect();
            let targets: Vec<u32> =
                (0..n).map(|i| if i == 4 { IGNORED } else { (i * 31 % v) as u32 }).collect();
            let mut expected = logits.clone();
            let rows = expected.chunks_mut(v).zip(&targets);
            let expected_losses: Vec<f32> = rows.map(|(row, &t)| cross_entropy_reference(row, t)).collect();
            for pool in every_pool() {
                let (mut losses, mut alone, mut found) = (vec![9.0; n], vec![9.0; n], logits.clone());
                cross_entropy_forward(&pool, &mut alone, &logits, &targets);
                cross_entropy_forward_backward(&pool, &mut losses, &mut found, &targets, 0.0);
                assert_close(&losses, &expected_losses, 1e-5);
                assert_close(&alone, &expected_losses, 1e-5);
                assert_close(&found, &expected, 1e-5);
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, v) = (3, 21);
        let (logits, targets) = (numbers(1, n * v), [20, 0, 7]);
        let loss = |logits: &[f32]| -> f64 {
            let rows = logits.chunks(v).zip(targets);
            rows.map(|(row, t)| f64::from(cross_entropy_reference(&mut row.to_vec(), t))).sum()
        };
        for pool in every_pool() {
            let mut grad = logits.clone();
            cross_entropy_forward_backward(&pool, &mut [0.0; 3], &mut grad, &targets, 0.0);
            check_gradient(&logits, &grad, loss);
        }
    }

    /// Numbers of PyTorch 2.15 in f64: cross_entropy + 0.01 · logsumexp².
    #[test]
    fn z_loss_agrees_with_pytorch() {
        let expected = [0.040_817, 0.007_092_9, -0.817_07, 0.024_756_8, 0.819_83];
        for pool in every_pool() {
            let (mut loss, mut logits) = ([0.0], [0.5, -1.25, 2.0, 0.0, 3.5]);
            cross_entropy_forward_backward(&pool, &mut loss, &mut logits, &[2], 0.01);
            assert_close(&loss, &[1.771_374_6], 1e-6);
            assert_close(&logits, &expected, 3e-6);
        }
    }

    #[test]
    fn a_poisoned_row_has_a_loss_that_shows_it() {
        for pool in every_pool() {
            let mut losses = [0.0; 2];
            let mut logits = [f32::NAN; 40];
            cross_entropy_forward_backward(&pool, &mut losses, &mut logits, &[1, 19], 0.0);
            assert!(losses.iter().all(|x| !x.is_finite()), "{losses:?}");
        }
    }
}
