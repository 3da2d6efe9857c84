//! GELU (Hendrycks & Gimpel 2016), `x · Φ(x)` with Φ the normal distribution, and GeGLU (Shazeer 2020),
//! `act = gelu_tanh(gate) · up`, in the layout of [`crate::swiglu`].
//!
//! - [`Gelu::Tanh`]: `x/2 · (1 + tanh u)` with `u = √(2/π) · (x + 0.044715 x³)`, which is `x · σ(2u)`.
//! - [`Gelu::Erf`]: `x/2 · (1 + erf(x/√2))`.
//!
//! Forward only: the models that have it are served here, not trained.

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

#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    // 2u = x · (a + b x²) with a = 2√(2/π), b = 0.044715 a.
    const A: f32 = 1.595_769;
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
    use crate::testing::{assert_close, every_pool, numbers};

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
}
