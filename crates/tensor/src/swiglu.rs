//! SwiGLU (Shazeer 2020): `act = silu(gate) · up`, with `silu(x) = x · σ(x)`.
//!
//! Gate and up stand side by side in one matrix `[n, 2f]`, as one matrix product makes them.
//!
//! Backward: `dgate = dact · up · σ · (1 + gate · (1 - σ))`, `dup = dact · gate · σ`.

use crate::Pool;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Rows one task takes.
const TASK_ROWS: usize = 16;

/// Plain reference of one element.
pub fn swiglu_reference(gate: f32, up: f32) -> f32 {
    gate / (1.0 + (-gate).exp()) * up
}

/// `act_nf = silu(gate_nf) · up_nf`.
pub fn swiglu_forward(pool: &Pool, act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) {
    let n = check(act_nf, gate_up_n2f, f);
    let act = Disjoint::new(act_nf);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let act = unsafe { act.slice(rows.start * f..rows.end * f) };
        forward(pool.level(), act, &gate_up_n2f[rows.start * 2 * f..rows.end * 2 * f], f);
    });
}

/// Backward in place: `gate_up_n2f` becomes its own gradient and `act_nf`, which holds the gradient of the activation,
/// becomes the activation again (the gradient of the next matrix needs it). So neither is kept twice.
pub fn swiglu_backward(pool: &Pool, gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) {
    let n = check(act_nf, gate_up_n2f, f);
    let (gate_up, act) = (Disjoint::new(gate_up_n2f), Disjoint::new(act_nf));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let (gate_up, act) = unsafe {
            (gate_up.slice(rows.start * 2 * f..rows.end * 2 * f), act.slice(rows.start * f..rows.end * f))
        };
        backward(pool.level(), gate_up, act, f);
    });
}

/// Rows, after checking the shapes.
fn check(act_nf: &[f32], gate_up_n2f: &[f32], f: usize) -> usize {
    assert!(f > 0 && act_nf.len().is_multiple_of(f), "swiglu: {} is not rows of {f}", act_nf.len());
    assert_eq!(gate_up_n2f.len(), 2 * act_nf.len(), "swiglu: gate and up do not fit the activation");
    act_nf.len() / f
}

dispatch!(fn forward(act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) = forward_simd);
#[inline(always)]
fn forward_simd<S: Simd>(s: S, act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) {
    for (act_f, gate_up) in act_nf.chunks_exact_mut(f).zip(gate_up_n2f.chunks_exact(2 * f)) {
        let (gate_f, up_f) = gate_up.split_at(f);
        let columns = gate_f.chunks(S::LANES).zip(up_f.chunks(S::LANES));
        for ((gate, up), act) in columns.zip(act_f.chunks_mut(S::LANES)) {
            let gate = s.load(gate);
            s.store(act, s.mul(s.mul(gate, sigmoid(s, gate)), s.load(up)));
        }
    }
}

dispatch!(fn backward(gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) = backward_simd);
#[inline(always)]
fn backward_simd<S: Simd>(s: S, gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) {
    let one = s.splat(1.0);
    for (act_f, gate_up) in act_nf.chunks_exact_mut(f).zip(gate_up_n2f.chunks_exact_mut(2 * f)) {
        let (gate_f, up_f) = gate_up.split_at_mut(f);
        let columns = gate_f.chunks_mut(S::LANES).zip(up_f.chunks_mut(S::LANES));
        for ((gate_at, up_at), act_at) in columns.zip(act_f.chunks_mut(S::LANES)) {
            let (gate, up, dact) = (s.load(gate_at), s.load(up_at), s.load(act_at));
            let sig = sigmoid(s, gate);
            let silu = s.mul(gate, sig);
            // σ · (1 + gate · (1 - σ)) = σ + silu · (1 - σ)
            let slope = s.fma(silu, s.sub(one, sig), sig);
            s.store(gate_at, s.mul(s.mul(dact, up), slope));
            s.store(up_at, s.mul(dact, silu));
            s.store(act_at, s.mul(silu, up));
        }
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, s.exp(s.neg(x))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    fn reference(gate_up: &[f32], f: usize) -> Vec<f32> {
        let rows = gate_up.chunks(2 * f);
        rows.flat_map(|row| (0..f).map(|i| swiglu_reference(row[i], row[f + i]))).collect()
    }

    #[test]
    fn forward_matches_the_reference_on_every_level() {
        for (n, f) in [(1, 1), (3, 21), (40, 32)] {
            let gate_up: Vec<f32> = numbers(1, n * 2 * f).iter().map(|x| x * 20.0).collect();
            for pool in every_pool() {
                let mut act = vec![9.0; n * f];
                swiglu_forward(&pool, &mut act, &gate_up, f);
                assert_close(&act, &reference(&gate_up, f), 1e-5);
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let gate_up = [-1e30, -200.0, 200.0, 0.0, 1.0, 1.0, 1.0, 1.0];
        for pool in every_pool() {
            let mut act = [0.0; 4];
            swiglu_forward(&pool, &mut act, &gate_up, 4);
            assert!(
                act[0].abs() < 1e-7 && act[1].abs() < 1e-30 && act[2] == 200.0 && act[3] == 0.0,
                "{act:?}"
            );
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, f) = (19, 9);
        let (gate_up, dact) = (numbers(1, n * 2 * f), numbers(2, n * f));
        let loss = |gate_up: &[f32]| -> f64 {
            reference(gate_up, f).iter().zip(&dact).map(|(a, d)| f64::from(a * d)).sum()
        };
        for pool in every_pool() {
            let (mut grad, mut act) = (gate_up.clone(), dact.clone());
            swiglu_backward(&pool, &mut grad, &mut act, f);
            assert_close(&act, &reference(&gate_up, f), 1e-5);
            check_gradient(&gate_up, &grad, loss);
        }
    }
}
