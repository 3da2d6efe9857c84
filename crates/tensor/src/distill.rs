//! Distillation (Hinton et al. 2015, <https://arxiv.org/abs/1503.02531>), fused with cross-entropy: with logits z of the model
//! and y of its teacher, `p(x, T) = softmax(x / T)`, and w the teacher's share,
//!
//! `loss = (1-w) · (ln Σ_v e^z_v - z_target) + w·T² · Σ_v p_v(y, T) · (ln p_v(y, T) - ln p_v(z, T))`, in nats.
//!
//! Backward: `dz_v = (1-w) · (p_v(z, 1) - [v = target]) + w·T · (p_v(z, T) - p_v(y, T))`, written over the logits in the same
//! call. The factor T² keeps that gradient as large as the other one whatever T is.
//!
//! As with [`crate::cross_entropy`] callers make the logits of a chunk of tokens at a time, of both models.

use crate::Pool;
use crate::cross_entropy::{IGNORED, largest};
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Rows one task takes.
const TASK_ROWS: usize = 4;

/// How much a teacher counts, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distill {
    /// w, from 0 (the tokens alone) to 1 (the teacher alone).
    pub weight: f32,
    /// T; above 1 unlikely tokens count more.
    pub temperature: f32,
    /// Of the square of the logits' logarithmic sum in the gradient, as in
    /// [`crate::cross_entropy::cross_entropy_forward_backward`].
    pub z_loss: f32,
}

/// Plain reference of one row: the loss; the logits become their gradient.
pub fn distill_reference(logits_v: &mut [f32], teacher_v: &[f32], target: u32, distill: Distill) -> f32 {
    if target == IGNORED {
        logits_v.fill(0.0);
        return 0.0;
    }
    let Distill { weight: w, temperature: t, z_loss } = distill;
    let lse = |x: &[f32], t: f32| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) / t;
        x.iter().map(|x| (x / t - max).exp()).sum::<f32>().ln() + max
    };
    let (of_tokens, of_model, of_teacher) = (lse(logits_v, 1.0), lse(logits_v, t), lse(teacher_v, t));
    let mut loss = (1.0 - w) * (of_tokens - logits_v[target as usize]);
    for (i, (z, y)) in logits_v.iter_mut().zip(teacher_v).enumerate() {
        let [log_model, log_teacher] = [*z / t - of_model, y / t - of_teacher];
        loss += w * t * t * log_teacher.exp() * (log_teacher - log_model);
        let of_token = if i == target as usize { 1.0 - w } else { 0.0 };
        *z = (1.0 - w + 2.0 * z_loss * of_tokens) * (*z - of_tokens).exp() - of_token
            + w * t * (log_model.exp() - log_teacher.exp());
    }
    loss
}

/// `losses_n` gets the loss of every row; `logits_nv` become the gradient of the sum of the losses. Rows whose target is
/// [`IGNORED`] get zeros.
///
/// # Panics
/// If a target is neither below v nor ignored, or shapes differ.
pub fn distill_forward_backward(
    pool: &Pool,
    losses_n: &mut [f32],
    (logits_nv, teacher_nv): (&mut [f32], &[f32]),
    targets_n: &[u32],
    distill: Distill,
) {
    let n = targets_n.len();
    let v = logits_nv.len() / n.max(1);
    assert!(losses_n.len() == n && logits_nv.len() == n * v, "distillation: shapes differ");
    assert_eq!(teacher_nv.len(), n * v, "distillation: a teacher of the same vocabulary");
    let outside = targets_n.iter().find(|&&target| target != IGNORED && target as usize >= v);
    assert!(outside.is_none(), "distillation: target {outside:?} in a vocabulary of {v}");
    let (losses, logits) = (Disjoint::new(losses_n), Disjoint::new(logits_nv));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        for row in piece(task, TASK_ROWS, n) {
            let cells = row * v..(row + 1) * v;
            // SAFETY: tasks have disjoint rows.
            let (loss, logits_v) = unsafe { (losses.slice(row..row + 1), logits.slice(cells.clone())) };
            loss[0] = match targets_n[row] {
                IGNORED => {
                    logits_v.fill(0.0);
                    0.0
                }
                target => one_row(pool.level(), logits_v, &teacher_nv[cells], target, distill),
            };
        }
    });
}

/// Sums over a row, and of what lies about the largest logits they are relative to.
struct Sums {
    /// Of e^z, e^(z/T) and e^(y/T).
    of_tokens: f32,
    of_model: f32,
    of_teacher: f32,
    /// Of e^(y/T) · (y - z) / T.
    cross: f32,
}

dispatch!(fn one_row(logits_v: &mut [f32], teacher_v: &[f32], target: u32, distill: Distill) -> f32 = one_row_simd);
#[inline(always)]
fn one_row_simd<S: Simd>(
    s: S,
    logits_v: &mut [f32],
    teacher_v: &[f32],
    target: u32,
    distill: Distill,
) -> f32 {
    let Distill { weight: w, temperature: t, z_loss } = distill;
    let max = [largest(s, logits_v), largest(s, teacher_v)];
    let at_target = logits_v[target as usize];
    let sums = sums(s, [logits_v, teacher_v], max, 1.0 / t);
    let lse = sums.of_tokens.ln() + max[0];
    let factors =
        [(1.0 - w + 2.0 * z_loss * lse) / sums.of_tokens, w * t / sums.of_model, -w * t / sums.of_teacher];
    gradient(s, (logits_v, teacher_v), max, factors, 1.0 / t);
    logits_v[target as usize] -= 1.0 - w;
    let divergence = sums.cross / sums.of_teacher - sums.of_teacher.ln() + sums.of_model.ln();
    (1.0 - w) * (sums.of_tokens.ln() + (max[0] - at_target)) + w * t * t * divergence
}

#[inline(always)]
fn sums<S: Simd>(s: S, [logits_v, teacher_v]: [&[f32]; 2], max: [f32; 2], cold: f32) -> Sums {
    let [mut tokens, mut model, mut teacher, mut cross] = [s.zero(); 4];
    let (logits, teachers) = (logits_v.chunks_exact(S::LANES), teacher_v.chunks_exact(S::LANES));
    let rest = (logits.remainder(), teachers.remainder());
    for (z, y) in logits.zip(teachers) {
        let (z, y) = (s.sub(s.load(z), s.splat(max[0])), s.sub(s.load(y), s.splat(max[1])));
        let (z_cold, y_cold) = (s.mul(z, s.splat(cold)), s.mul(y, s.splat(cold)));
        let e = s.exp(y_cold);
        tokens = s.add(tokens, s.exp(z));
        model = s.add(model, s.exp(z_cold));
        teacher = s.add(teacher, e);
        cross = s.fma(e, s.sub(y_cold, z_cold), cross);
    }
    let [mut of_tokens, mut of_model, mut of_teacher, mut cross] =
        [s.sum(tokens), s.sum(model), s.sum(teacher), s.sum(cross)];
    for (z, y) in rest.0.iter().zip(rest.1) {
        let (z, y) = (z - max[0], y - max[1]);
        let e = (y * cold).exp();
        of_tokens += z.exp();
        of_model += (z * cold).exp();
        of_teacher += e;
        cross += e * (y - z) * cold;
    }
    Sums { of_tokens, of_model, of_teacher, cross }
}

/// Writes `factors[0] · e^z + factors[1] · e^(z/T) + factors[2] · e^(y/T)` over the logits.
#[inline(always)]
fn gradient<S: Simd>(
    s: S,
    (logits_v, teacher_v): (&mut [f32], &[f32]),
    max: [f32; 2],
    factors: [f32; 3],
    cold: f32,
) {
    let mut logits = logits_v.chunks_exact_mut(S::LANES);
    let teachers = teacher_v.chunks_exact(S::LANES);
    let rest = teachers.remainder();
    for (at, y) in (&mut logits).zip(teachers) {
        let (z, y) = (s.sub(s.load(at), s.splat(max[0])), s.sub(s.load(y), s.splat(max[1])));
        let (z_cold, y_cold) = (s.mul(z, s.splat(cold)), s.mul(y, s.splat(cold)));
        let of_teacher = s.mul(s.exp(y_cold), s.splat(factors[2]));
        let of_both = s.fma(s.exp(z_cold), s.splat(factors[1]), of_teacher);
        let sum = s.fma(s.exp(z), s.splat(factors[0]), of_both);
        s.store(at, sum);
    }
    for (at, y) in logits.into_remainder().iter_mut().zip(rest) {
        let (z, y) = (*at - max[0], y - max[1]);
        *at = factors[0] * z.exp() + factors[1] * (z * cold).exp() + factors[2] * (y * cold).exp();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cross_entropy::cross_entropy_forward_backward;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    fn settings(weight: f32, temperature: f32) -> Distill {
        Distill { weight, temperature, z_loss: 0.0 }
    }

    #[test]
    fn matches_the_reference_on_every_level() {
        for (n, v) in [(1, 1), (5, 3), (9, 100), (6, 129)] {
            let spread = |seed: u64| -> Vec<f32> { numbers(seed, n * v).iter().map(|x| x * 12.0).collect() };
            let (logits, teacher) = (spread(1), spread(2));
            let targets: Vec<u32> =
                (0..n).map(|i| if i == 4 { IGNORED } else { (i * 31 % v) as u32 }).collect();
            for distill in
                [settings(0.3, 1.0), settings(1.0, 2.0), Distill { z_loss: 0.01, ..settings(0.7, 3.0) }]
            {
                let mut expected = logits.clone();
                let rows = expected.chunks_mut(v).zip(teacher.chunks(v)).zip(&targets);
                let expected_losses: Vec<f32> =
                    rows.map(|((row, y), &target)| distill_reference(row, y, target, distill)).collect();
                for pool in every_pool() {
                    let (mut losses, mut found) = (vec![9.0; n], logits.clone());
                    distill_forward_backward(&pool, &mut losses, (&mut found, &teacher), &targets, distill);
                    assert_close(&losses, &expected_losses, 1e-4);
                    assert_close(&found, &expected, 1e-5);
                }
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, v) = (3, 21);
        let (logits, teacher, targets) = (numbers(1, n * v), numbers(2, n * v), [20, 0, 7]);
        for distill in [settings(0.4, 2.0), settings(1.0, 0.5)] {
            let loss = |logits: &[f32]| -> f64 {
                let rows = logits.chunks(v).zip(teacher.chunks(v)).zip(targets);
                rows.map(|((z, y), t)| f64::from(distill_reference(&mut z.to_vec(), y, t, distill))).sum()
            };
            for pool in every_pool() {
                let mut grad = logits.clone();
                distill_forward_backward(&pool, &mut [0.0; 3], (&mut grad, &teacher), &targets, distill);
                check_gradient(&logits, &grad, loss);
            }
        }
    }

    /// Without a share the teacher changes nothing; a teacher that agrees neither.
    #[test]
    fn a_teacher_without_weight_or_difference_is_cross_entropy() {
        let (n, v) = (2, 50);
        let (logits, teacher, targets) = (numbers(1, n * v), numbers(2, n * v), [3, 49]);
        for pool in every_pool() {
            let (mut losses, mut plain) = (vec![0.0; n], logits.clone());
            cross_entropy_forward_backward(&pool, &mut losses, &mut plain, &targets, 0.02);
            let (mut found_losses, mut found) = (vec![0.0; n], logits.clone());
            let none = Distill { z_loss: 0.02, ..settings(0.0, 2.0) };
            distill_forward_backward(&pool, &mut found_losses, (&mut found, &teacher), &targets, none);
            assert_close(&found_losses, &losses, 1e-5);
            assert_close(&found, &plain, 1e-6);
            let mut found = logits.clone();
            distill_forward_backward(
                &pool,
                &mut found_losses,
                (&mut found, &logits),
                &targets,
                settings(1.0, 2.0),
            );
            assert_close(&found_losses, &[0.0; 2], 1e-6);
            assert_close(&found, &[0.0; 100], 1e-6);
        }
    }

    /// Numbers of PyTorch 2.15 in f64, printed by `fixtures/torch/distill.py`.
    #[test]
    fn agrees_with_pytorch() {
        let logits = [0.5, -1.25, 2.0, 0.0, 3.5, 1.0, 0.25, -0.5, 4.0, -3.0];
        let teacher = [0.0, 1.5, 2.5, -1.0, 1.0, -2.0, 0.5, 3.0, 1.0, 0.0];
        let cold = [
            0.023_496_6,
            -0.058_199,
            -0.706_030_5,
            0.017_701_7,
            0.723_031_1,
            -0.655_713_8,
            0.002_338_7,
            -0.225_253_3,
            0.889_512_4,
            -0.010_884_1,
        ];
        let warm = [
            0.010_801_9,
            -0.285_553_1,
            -0.437_134,
            0.035_934_8,
            0.675_950_5,
            -0.080_017_4,
            -0.061_761_9,
            -0.658_346_6,
            0.940_757_5,
            -0.140_631_6,
        ];
        for (distill, expected_losses, expected) in [
            (settings(0.3, 1.0), [1.617_058_2, 3.173_091_2], cold),
            (settings(0.75, 2.0), [1.565_461_4, 3.705_758_6], warm),
        ] {
            for pool in every_pool() {
                let (mut losses, mut found) = ([0.0; 2], logits);
                distill_forward_backward(&pool, &mut losses, (&mut found, &teacher), &[2, 0], distill);
                assert_close(&losses, &expected_losses, 2e-6);
                assert_close(&found, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn a_poisoned_row_has_a_loss_that_shows_it() {
        for pool in every_pool() {
            let (mut losses, mut logits) = ([0.0; 2], [f32::NAN; 40]);
            let teacher = numbers(1, 40);
            distill_forward_backward(
                &pool,
                &mut losses,
                (&mut logits, &teacher),
                &[1, 19],
                settings(0.5, 1.0),
            );
            assert!(losses.iter().all(|x| !x.is_finite()), "{losses:?}");
        }
    }
}
