//! A matrix with a change of low rank: `out_oi = w_oi + b_or · a_ri`, in one pass over memory: w is read, out is written, and
//! 2·r operations a number hide behind that.

use super::{Elems, Mat};
use crate::Pool;
use crate::simd::{Simd, dispatch};

/// Rows that a task computes: 32 · 576 · 4 B = 72 KiB.
const TASK_ROWS: usize = 32;

/// See the [module](self). An element is one chain of multiply-adds in the order of r, from w.
///
/// # Panics
/// If the dimensions do not fit each other, or an operand is transposed, not dense or not f32.
pub fn changed(pool: &Pool, out_oi: &mut [f32], w_oi: &[f32], [b, a]: [Mat; 2]) {
    let ([o, r], [r_a, i]) = (b.dims(), a.dims());
    assert!(r == r_a && r > 0 && i > 0, "{o}x{r} times {r_a}x{i}");
    assert!(out_oi.len() == o * i && w_oi.len() == o * i, "a change of {o}x{i} numbers");
    let (a, b) = (dense(a), dense(b));
    pool.run_chunks(out_oi, TASK_ROWS * i, |task, out| {
        let first = task * TASK_ROWS;
        let n = out.len() / i;
        let job = Rows { w: &w_oi[first * i..][..n * i], b: &b[first * r..][..n * r], a, r };
        changed_rows(pool.level(), out, &job);
    });
}

fn dense<'a>(mat: Mat<'a>) -> &'a [f32] {
    assert!(!mat.transposed && mat.stride == mat.cols, "changes lie dense");
    match mat.data {
        Elems::F32(data) => &data[..mat.rows * mat.cols],
        Elems::Bf16(_) => panic!("changes are f32"),
    }
}

/// Some rows of w and b, and all of a.
struct Rows<'a> {
    w: &'a [f32],
    b: &'a [f32],
    a: &'a [f32],
    r: usize,
}

dispatch!(fn changed_rows(out: &mut [f32], job: &Rows) = changed_rows_simd);
#[inline(always)]
fn changed_rows_simd<S: Simd>(s: S, out: &mut [f32], job: &Rows) {
    let n = job.b.len() / job.r;
    let mut row = 0;
    while row < n {
        row += match n - row {
            8.. if S::REGISTERS >= 32 => changed_tiles::<S, 8>(s, out, job, row),
            4.. => changed_tiles::<S, 4>(s, out, job, row),
            _ => changed_tiles::<S, 1>(s, out, job, row),
        };
    }
}

/// R rows, two registers of columns at a time. Gives R.
#[inline(always)]
fn changed_tiles<S: Simd, const R: usize>(s: S, out: &mut [f32], job: &Rows, row: usize) -> usize {
    let (width, i) = (2 * S::LANES, job.a.len() / job.r);
    let b: [&[f32]; R] = std::array::from_fn(|k| &job.b[(row + k) * job.r..][..job.r]);
    for col in (0..i).step_by(width) {
        let first = col..i.min(col + S::LANES);
        let second = first.end..i.min(col + width);
        let mut sums = [[s.zero(); 2]; R];
        for k in 0..R {
            let w = &job.w[(row + k) * i..][..i];
            sums[k] = [s.load(&w[first.clone()]), s.load(&w[second.clone()])];
        }
        for l in 0..job.r {
            let a = &job.a[l * i..][..i];
            let right = [s.load(&a[first.clone()]), s.load(&a[second.clone()])];
            for k in 0..R {
                // SAFETY: `l` is below r, the length of every row of b.
                let left = s.splat(unsafe { *b[k].get_unchecked(l) });
                sums[k] = [s.fma(left, right[0], sums[k][0]), s.fma(left, right[1], sums[k][1])];
            }
        }
        for k in 0..R {
            let out = &mut out[(row + k) * i..][..i];
            s.store(&mut out[first.clone()], sums[k][0]);
            s.store(&mut out[second.clone()], sums[k][1]);
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

    #[test]
    fn matches_plain_sums_on_every_level() {
        for [o, i, r] in [[1, 1, 1], [7, 40, 3], [75, 65, 16]] {
            let (w, b, a) = (numbers(1, o * i), numbers(2, o * r), numbers(3, r * i));
            let change = |at: usize| (0..r).map(|l| b[at / i * r + l] * a[l * i + at % i]).sum::<f32>();
            let expected: Vec<f32> = w.iter().enumerate().map(|(at, w)| w + change(at)).collect();
            let of = [Mat::new(&b[..], o, r), Mat::new(&a[..], r, i)];
            let mut first: Option<(crate::cpu::Level, Vec<f32>)> = None;
            for pool in every_pool() {
                let mut out = vec![9.0; o * i];
                changed(&pool, &mut out, &w, of);
                assert_close(&out, &expected, 1e-5);
                if let Some((_, first)) = first.as_ref().filter(|(level, _)| *level == pool.level()) {
                    assert!(*first == out, "threads change bits");
                } else {
                    first = Some((pool.level(), out));
                }
            }
        }
    }
}
