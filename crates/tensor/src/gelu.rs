//! GELU (Hendrycks & Gimpel 2016), `x · Φ(x)` with Φ the normal distribution, and GeGLU (Shazeer 2020),
//! `act = gelu_tanh(gate) · up`, in the layout of [`crate::swiglu`].
//!
//! - [`Gelu::Tanh`]: `x/2 · (1 + tanh u)` with `u = √(2/π) · (x + 0.044715 x³)`, which is `x · σ(2u)`.
//! - [`Gelu::Erf`]: `x/2 · (1 + erf(x/√2))`.
//!
//! Backward of the tanh form, with `σ = σ(2u)`: `gelu'(x) = σ + x · σ · (1 - σ) · 2u'`, `2u' = 2√(2/π) · (1 + 3 · 0.044715 x²)`.
//! The exact form has none: the models that have it are served here, not trained.

use crate::Pool;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;

/// Elements one task takes.
const TASK_LEN: usize = 1 << 14;
/// Rows one task of GeGLU takes.
const TASK_ROWS: usize = 16;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// The approximation GPT-2 and Gemma were trained with (`gelu_new`, `gelu_pytorch_tanh`).
    Tanh,
    /// The definition (`gelu`; BERT).
    Erf,
}

/// Plain reference, in f64.
pub fn gelu_reference(x: f32, form: Gelu) -> f64 {
    let x = f64::from(x);
    match form {
        Gelu::Tanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        }
        Gelu::Erf => 0.5 * x * (1.0 + erf_reference(x / std::f64::consts::SQRT_2)),
    }
}

/// `erf x = 2/√π · e^(-x²) · Σ 2^k x^(2k+1) / (1·3·5·…·(2k+1))` (DLMF 7.6.2): all terms have one sign.
fn erf_reference(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * k + 1);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// Every element of `x` becomes its GELU.
pub fn gelu_forward(pool: &Pool, x: &mut [f32], form: Gelu) {
    pool.run_chunks(x, TASK_LEN, |_, x| match form {
        Gelu::Tanh => gelu_tanh_all(pool.level(), x),
        Gelu::Erf => gelu_erf_all(pool.level(), x),
    });
}

/// `act_nf = gelu_tanh(gate_nf) · up_nf`; gate and up stand side by side in the rows of `gate_up_n2f`.
pub fn geglu_forward(pool: &Pool, act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) {
    assert!(f > 0 && act_nf.len().is_multiple_of(f), "geglu: {} is not rows of {f}", act_nf.len());
    assert_eq!(gate_up_n2f.len(), 2 * act_nf.len(), "geglu: gate and up do not fit the activation");
    let n = act_nf.len() / f;
    let act = Disjoint::new(act_nf);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let act = unsafe { act.slice(rows.start * f..rows.end * f) };
        geglu(pool.level(), act, &gate_up_n2f[rows.start * 2 * f..rows.end * 2 * f], f);
    });
}

/// `act_nf = gelu_tanh(up_nf)`; `up_nf` is kept for [`gelu_backward`].
pub fn gelu_into(pool: &Pool, act_nf: &mut [f32], up_nf: &[f32]) {
    assert_eq!(act_nf.len(), up_nf.len(), "gelu: lengths differ");
    pool.run_chunks(act_nf, TASK_LEN, |task, act| {
        let up = &up_nf[piece(task, TASK_LEN, up_nf.len())];
        gelu_tanh_into(pool.level(), act, up);
    });
}

/// Backward in place, tanh form: `up_nf` becomes its own gradient and `act_nf`, which holds the gradient of the activation,
/// becomes the activation again, as in [`crate::swiglu::swiglu_backward`].
pub fn gelu_backward(pool: &Pool, up_nf: &mut [f32], act_nf: &mut [f32]) {
    assert_eq!(act_nf.len(), up_nf.len(), "gelu: lengths differ");
    let (len, up) = (up_nf.len(), Disjoint::new(up_nf));
    pool.run_chunks(act_nf, TASK_LEN, |task, act| {
        // SAFETY: tasks have disjoint pieces.
        let up = unsafe { up.slice(piece(task, TASK_LEN, len)) };
        gelu_tanh_backward(pool.level(), up, act);
    });
}

/// Backward of [`geglu_forward`] in place, as [`gelu_backward`].
pub fn geglu_backward(pool: &Pool, gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) {
    assert!(f > 0 && act_nf.len().is_multiple_of(f), "geglu: {} is not rows of {f}", act_nf.len());
    assert_eq!(gate_up_n2f.len(), 2 * act_nf.len(), "geglu: gate and up do not fit the activation");
    let n = act_nf.len() / f;
    let (gate_up, act) = (Disjoint::new(gate_up_n2f), Disjoint::new(act_nf));
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let (gate_up, act) = unsafe {
            (gate_up.slice(rows.start * 2 * f..rows.end * 2 * f), act.slice(rows.start * f..rows.end * f))
        };
        geglu_gradient(pool.level(), gate_up, act, f);
    });
}

dispatch!(fn gelu_tanh_into(act: &mut [f32], up: &[f32]) = gelu_tanh_into_simd);
#[inline(always)]
fn gelu_tanh_into_simd<S: Simd>(s: S, act: &mut [f32], up: &[f32]) {
    for (act, up) in act.chunks_mut(S::LANES).zip(up.chunks(S::LANES)) {
        s.store(act, gelu_tanh(s, s.load(up)));
    }
}

dispatch!(fn gelu_tanh_backward(up: &mut [f32], act: &mut [f32]) = gelu_tanh_backward_simd);
#[inline(always)]
fn gelu_tanh_backward_simd<S: Simd>(s: S, up: &mut [f32], act: &mut [f32]) {
    for (up, act) in up.chunks_mut(S::LANES).zip(act.chunks_mut(S::LANES)) {
        let (value, slope) = gelu_tanh_slope(s, s.load(up));
        let dup = s.mul(s.load(act), slope);
        s.store(up, dup);
        s.store(act, value);
    }
}

dispatch!(fn geglu_gradient(gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) = geglu_gradient_simd);
#[inline(always)]
fn geglu_gradient_simd<S: Simd>(s: S, gate_up_n2f: &mut [f32], act_nf: &mut [f32], f: usize) {
    for (act_f, gate_up) in act_nf.chunks_exact_mut(f).zip(gate_up_n2f.chunks_exact_mut(2 * f)) {
        let (gate_f, up_f) = gate_up.split_at_mut(f);
        let columns = gate_f.chunks_mut(S::LANES).zip(up_f.chunks_mut(S::LANES));
        for ((gate_at, up_at), act_at) in columns.zip(act_f.chunks_mut(S::LANES)) {
            let (up, dact) = (s.load(up_at), s.load(act_at));
            let (value, slope) = gelu_tanh_slope(s, s.load(gate_at));
            s.store(gate_at, s.mul(s.mul(dact, up), slope));
            s.store(up_at, s.mul(dact, value));
            s.store(act_at, s.mul(value, up));
        }
    }
}

dispatch!(fn gelu_tanh_all(x: &mut [f32]) = gelu_tanh_all_simd);
#[inline(always)]
fn gelu_tanh_all_simd<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_mut(S::LANES) {
        s.store(x, gelu_tanh(s, s.load(x)));
    }
}

dispatch!(fn gelu_erf_all(x: &mut [f32]) = gelu_erf_all_simd);
#[inline(always)]
fn gelu_erf_all_simd<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_mut(S::LANES) {
        s.store(x, gelu_erf(s, s.load(x)));
    }
}

dispatch!(fn geglu(act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) = geglu_simd);
#[inline(always)]
fn geglu_simd<S: Simd>(s: S, act_nf: &mut [f32], gate_up_n2f: &[f32], f: usize) {
    for (act_f, gate_up) in act_nf.chunks_exact_mut(f).zip(gate_up_n2f.chunks_exact(2 * f)) {
        let (gate_f, up_f) = gate_up.split_at(f);
        let columns = gate_f.chunks(S::LANES).zip(up_f.chunks(S::LANES));
        for ((gate, up), act) in columns.zip(act_f.chunks_mut(S::LANES)) {
            s.store(act, s.mul(gelu_tanh(s, s.load(gate)), s.load(up)));
        }
    }
}

/// 2√(2/π): 2u = x · (A + 0.044715 A x²).
const A: f32 = 1.595_769;

/// The value and its derivative.
#[inline(always)]
fn gelu_tanh_slope<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let one = s.splat(1.0);
    // From ±10 on σ is 0 or 1 in f32, and nothing bends any more.
    let near = s.min(s.max(x, s.splat(-10.0)), s.splat(10.0));
    let square = s.mul(near, near);
    let u2 = s.mul(near, s.fma(square, s.splat(0.044715 * A), s.splat(A)));
    let sigma = s.div(one, s.add(one, s.exp(s.neg(u2))));
    let inner = s.mul(near, s.fma(square, s.splat(3.0 * 0.044715 * A), s.splat(A)));
    let slope = s.fma(s.mul(sigma, s.sub(one, sigma)), inner, sigma);
    (s.mul(x, sigma), slope)
}

#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let u2 = s.mul(x, s.fma(s.mul(x, x), s.splat(0.044715 * A), s.splat(A)));
    s.div(x, s.add(one, s.exp(s.neg(u2))))
}

/// With t = 1 / (1 + p·|z|): `1 - erf |z| = (a₁t + … + a₅t⁵) · e^(-z²)` within 1.5e-7 (Abramowitz & Stegun 7.1.26).
/// For negative x this is used as it is, so that nothing is lost where 1 + erf is small.
#[inline(always)]
fn gelu_erf<S: Simd>(s: S, x: S::F) -> S::F {
    const P: f32 = 0.327_591_1;
    const TERMS: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let one = s.splat(1.0);
    let z = s.mul(s.abs(x), s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(one, s.fma(z, s.splat(P), one));
    let mut p = s.splat(TERMS[0]);
    for term in &TERMS[1..] {
        p = s.fma(p, t, s.splat(*term));
    }
    // Half of what is missing from 1: Φ(-|x|).
    let tail = s.mul(s.mul(s.mul(p, t), s.splat(0.5)), s.exp(s.neg(s.mul(z, z))));
    // x · Φ(x) = max(x, 0) - |x| · Φ(-|x|)
    s.sub(s.max(x, s.zero()), s.mul(s.abs(x), tail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    fn inputs(n: usize) -> Vec<f32> {
        numbers(1, n).iter().map(|x| x * 8.0).collect()
    }

    #[test]
    fn both_forms_match_the_reference_on_every_level() {
        for n in [1, 7, 40, TASK_LEN + 5] {
            let x = inputs(n);
            for form in [Gelu::Tanh, Gelu::Erf] {
                let expected: Vec<f32> = x.iter().map(|&x| gelu_reference(x, form) as f32).collect();
                for pool in every_pool() {
                    let mut y = x.clone();
                    gelu_forward(&pool, &mut y, form);
                    assert_close(&y, &expected, 2e-6);
                }
            }
        }
    }

    #[test]
    fn known_values() {
        // Φ(1) = 0.8413447460685429; tanh(√(2/π) · 1.044715) = 0.682383988…
        assert!((gelu_reference(1.0, Gelu::Erf) - 0.841_344_746_068_542_9).abs() < 1e-12);
        assert!((gelu_reference(1.0, Gelu::Tanh) - 0.841_191_990_608_276).abs() < 1e-9);
        assert!((gelu_reference(-3.0, Gelu::Erf) + 3.0 * 0.001_349_898_031_630_094_6).abs() < 1e-12);
    }

    #[test]
    fn extremes_stay_finite() {
        for form in [Gelu::Tanh, Gelu::Erf] {
            for pool in every_pool() {
                let mut y = [-1e30, -200.0, -0.0, 0.0, 200.0, 1e12];
                gelu_forward(&pool, &mut y, form);
                assert!(y[0].abs() < 1e-6 && y[1].abs() < 1e-30, "{form:?}: {y:?}");
                assert_eq!(y[2..], [0.0, 0.0, 200.0, 1e12], "{form:?}");
            }
        }
    }

    #[test]
    fn geglu_matches_the_reference_on_every_level() {
        for (n, f) in [(1, 1), (3, 21), (40, 32)] {
            let gate_up = inputs(n * 2 * f);
            let rows = gate_up.chunks(2 * f);
            let product = |row: &[f32], i: usize| gelu_reference(row[i], Gelu::Tanh) as f32 * row[f + i];
            let expected: Vec<f32> = rows.flat_map(|row| (0..f).map(|i| product(row, i))).collect();
            for pool in every_pool() {
                let mut act = vec![9.0; n * f];
                geglu_forward(&pool, &mut act, &gate_up, f);
                assert_close(&act, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (n, f) = (19, 9);
        let (gate_up, dact) = (numbers(1, n * 2 * f), numbers(2, n * f));
        let gate_up: Vec<f32> = gate_up.iter().map(|x| x * 3.0).collect();
        let gelu = |x: f32| gelu_reference(x, Gelu::Tanh) as f32;
        let gated = |gate_up: &[f32]| -> Vec<f32> {
            gate_up.chunks(2 * f).flat_map(|row| (0..f).map(|i| gelu(row[i]) * row[f + i])).collect()
        };
        let dot =
            |act: &[f32]| -> f64 { act.iter().zip(&dact).map(|(a, d)| f64::from(*a) * f64::from(*d)).sum() };
        for pool in every_pool() {
            let (mut grad, mut act) = (gate_up.clone(), dact.clone());
            geglu_backward(&pool, &mut grad, &mut act, f);
            assert_close(&act, &gated(&gate_up), 2e-6);
            check_gradient(&gate_up, &grad, |x| dot(&gated(x)));

            let up = &gate_up[..n * f];
            let all = |x: &[f32]| x.iter().map(|x| gelu(*x)).collect::<Vec<f32>>();
            let (mut grad, mut act, mut again) = (up.to_vec(), dact.clone(), vec![9.0; n * f]);
            gelu_backward(&pool, &mut grad, &mut act);
            gelu_into(&pool, &mut again, up);
            assert_close(&act, &all(up), 2e-6);
            assert_close(&again, &all(up), 2e-6);
            check_gradient(up, &grad, |x| dot(&all(x)));
        }
    }

    #[test]
    fn slopes_of_extremes_stay_finite() {
        for pool in every_pool() {
            let (mut x, mut act) = ([-1e30, -200.0, 0.0, 200.0, 1e18, 1e30], [1.0; 6]);
            gelu_backward(&pool, &mut x, &mut act);
            assert_eq!(x[2..], [0.5, 1.0, 1.0, 1.0]);
            assert!(x[0].abs() < 1e-3 && x[1].abs() < 1e-30, "{x:?}");
        }
    }
}
