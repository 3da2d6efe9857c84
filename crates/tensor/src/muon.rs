//! Muon (Jordan et al. 2024): momentum whose matrix is made nearly orthogonal by Newton-Schulz iterations.
//!
//! With `g = gradient · grad_scale`: `m = μm + (1-μ)g`, `u = μm + (1-μ)g` (Nesterov),
//! `x₀ = u / max(‖u‖, eps)`, five times `x = ax + (bA + cA²)x` with `A = xxᵀ` (of the smaller side),
//! `p = p · (1 - lr·wd) - lr · √max(1, rows/cols) · x`. This is PyTorch's `torch.optim.Muon`, which rounds x to bf16
//! after every product where we round operands only.
//!
//! The quintic's coefficients do not converge to 1: singular values end between about 0.7 and 1.2, and get there fast.

use crate::pool::Disjoint;
use crate::split::piece;
use crate::{Accumulate, Buf, Mat, Pool, Precision, matmul};

const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
const NORM_MIN: f64 = 1e-7;

/// Elements one task takes: 3 arrays · 4 B · 16 Ki = 192 KiB.
const TASK_LEN: usize = 16 << 10;

/// One update's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Muon {
    /// Learning rate of this step.
    pub lr: f32,
    /// μ, the decay of the mean.
    pub momentum: f32,
    /// wd, applied to all of the matrix.
    pub weight_decay: f32,
    /// Factor on every gradient.
    pub grad_scale: f32,
    /// Of the products.
    pub precision: Precision,
}

/// Memory that every matrix uses in turn; it grows to the largest.
#[derive(Default)]
pub struct MuonScratch {
    x: Buf<f32>,
    next: Buf<f32>,
    gram: Buf<f32>,
    square: Buf<f32>,
    squares: Vec<f64>,
}

/// Updates one matrix `[rows, cols]` and its momentum. The same bits for every number of threads.
pub fn muon(
    pool: &Pool,
    [params, momentum]: [&mut [f32]; 2],
    grads: &[f32],
    [rows, cols]: [usize; 2],
    (muon, scratch): (&Muon, &mut MuonScratch),
) {
    let len = rows * cols;
    assert!(
        [params.len(), momentum.len(), grads.len()] == [len; 3],
        "muon: lengths differ from {rows}x{cols}"
    );
    let side = rows.min(cols);
    let MuonScratch { x, next, gram, square, squares } = scratch;
    for (buf, n) in
        [(&mut *x, len), (&mut *next, len), (&mut *gram, side * side), (&mut *square, side * side)]
    {
        if buf.len() < n {
            *buf = Buf::zeroed(n);
        }
    }
    let (x, next) = (&mut x[..len], &mut next[..len]);
    let (gram, square) = (&mut gram[..side * side], &mut square[..side * side]);

    let (mu, rest) = (muon.momentum, 1.0 - muon.momentum);
    each(pool, [&mut *x, momentum], |at, [x, m]| {
        for ((x, m), g) in x.iter_mut().zip(m).zip(&grads[at..]) {
            let g = g * muon.grad_scale;
            *m = mu * *m + rest * g;
            *x = mu * *m + rest * g;
        }
    });
    let norm = crate::adamw::sum_squares(pool, x, squares).sqrt().max(NORM_MIN);
    let scale = (1.0 / norm) as f32;
    each(pool, [&mut *x, &mut *next], |_, [x, _]| x.iter_mut().for_each(|x| *x *= scale));

    let [a, b, c] = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let mat = Mat::new(&*x, rows, cols);
        let (left, right) = if rows <= cols { (mat, mat.t()) } else { (mat.t(), mat) };
        matmul(pool, gram, left, right, muon.precision, Accumulate::Overwrite);
        let of_gram = Mat::new(&*gram, side, side);
        matmul(pool, square, of_gram, of_gram, muon.precision, Accumulate::Overwrite);
        each(pool, [&mut *square, &mut *gram], |_, [square, gram]| {
            square.iter_mut().zip(gram).for_each(|(s, g)| *s = b * *g + c * *s);
        });
        each(pool, [&mut *next, &mut *x], |_, [next, x]| {
            next.iter_mut().zip(x).for_each(|(n, x)| *n = a * *x);
        });
        let (mat, polynomial) = (Mat::new(&*x, rows, cols), Mat::new(&*square, side, side));
        let (left, right) = if rows <= cols { (polynomial, mat) } else { (mat, polynomial) };
        matmul(pool, next, left, right, muon.precision, Accumulate::Add);
        x.copy_from_slice(next);
    }

    let keep = 1.0 - muon.lr * muon.weight_decay;
    let rate = muon.lr * (rows as f32 / cols as f32).max(1.0).sqrt();
    each(pool, [params, x], |_, [p, x]| {
        p.iter_mut().zip(x).for_each(|(p, x)| *p = *p * keep - rate * *x);
    });
}

/// Runs over pieces of two slices of one length; `work` gets where a piece begins.
fn each(pool: &Pool, [a, b]: [&mut [f32]; 2], work: impl Fn(usize, [&mut [f32]; 2]) + Sync) {
    assert_eq!(a.len(), b.len());
    let len = a.len();
    let (a, b) = (Disjoint::new(a), Disjoint::new(b));
    pool.run(len.div_ceil(TASK_LEN), &|task| {
        let range = piece(task, TASK_LEN, len);
        // SAFETY: tasks have disjoint pieces.
        let (a, b) = unsafe { (a.slice(range.clone()), b.slice(range.clone())) };
        work(range.start, [a, b]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

    fn settings(precision: Precision) -> Muon {
        Muon { lr: 0.02, momentum: 0.95, weight_decay: 0.1, grad_scale: 0.5, precision }
    }

    /// Three updates; parameters and momentum after them.
    fn updated(pool: &Pool, [rows, cols]: [usize; 2], precision: Precision) -> [Vec<f32>; 2] {
        let (mut params, mut momentum) = (numbers(1, rows * cols), vec![0.0; rows * cols]);
        let mut scratch = MuonScratch::default();
        for step in 2..5 {
            let with = (&settings(precision), &mut scratch);
            muon(pool, [&mut params, &mut momentum], &numbers(step, rows * cols), [rows, cols], with);
        }
        [params, momentum]
    }

    /// `fixtures/golden/muon.json`, made by `fixtures/torch/muon.py`.
    #[test]
    fn agrees_with_pytorch() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../fixtures/golden/muon.json")).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let [rows, cols] = ["rows", "cols"].map(|field| case[field].as_u64().unwrap() as usize);
            let of = |field: &str| -> Vec<f32> {
                case[field].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
            };
            let (exact, rounded) = (of("exact"), of("bf16"));
            for pool in every_pool() {
                assert_close(&updated(&pool, [rows, cols], Precision::F32)[0], &exact, 2e-5);
                // A step is 0.02 long; PyTorch rounds it to 8 bits after each of the five iterations.
                assert_close(&updated(&pool, [rows, cols], Precision::Bf16)[0], &rounded, 2e-3);
            }
        }
    }

    /// The singular values of what a step subtracts lie about 1: x xᵀ is near the identity.
    #[test]
    fn steps_are_nearly_orthogonal() {
        for [rows, cols] in [[24, 40], [40, 24], [16, 16]] {
            let (mut params, mut momentum) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
            let settings = Muon { lr: 1.0, weight_decay: 0.0, ..settings(Precision::F32) };
            let with = (&settings, &mut MuonScratch::default());
            muon(&Pool::new(1), [&mut params, &mut momentum], &numbers(3, rows * cols), [rows, cols], with);
            let scale = (rows as f32 / cols as f32).max(1.0);
            let side = rows.min(cols);
            let at =
                |i: usize, k: usize| if rows <= cols { params[i * cols + k] } else { params[k * cols + i] };
            let trace: f32 =
                (0..side).map(|i| (0..rows.max(cols)).map(|k| at(i, k) * at(i, k)).sum::<f32>()).sum();
            let mean = trace / scale / side as f32;
            assert!((0.55..1.35).contains(&mean), "{rows}x{cols}: mean square singular value {mean}");
        }
    }

    #[test]
    fn threads_change_no_bit_and_levels_little() {
        for dims in [[30, 70], [70, 30], [1, 5]] {
            let expected = updated(&Pool::new(1), dims, Precision::F32);
            for n_threads in [2, 3] {
                assert_eq!(updated(&Pool::new(n_threads), dims, Precision::F32), expected);
            }
            for pool in every_pool() {
                for (found, expected) in updated(&pool, dims, Precision::F32).iter().zip(&expected) {
                    assert_close(found, expected, 1e-4);
                }
                let rounded = updated(&pool, dims, Precision::Bf16);
                // Operands rounded to 8 bits, through five iterations.
                assert_close(&rounded[0], &expected[0], 2e-2);
                assert_close(&rounded[1], &expected[1], 1e-6);
            }
        }
    }

    #[test]
    fn a_gradient_of_zeros_moves_nothing_but_decay() {
        let mut params = vec![1.0; 12];
        let with = (&settings(Precision::F32), &mut MuonScratch::default());
        muon(&Pool::new(1), [&mut params, &mut [0.0; 12]], &[0.0; 12], [3, 4], with);
        assert_close(&params, &[1.0 - 0.02 * 0.1; 12], 1e-6);
    }
}
