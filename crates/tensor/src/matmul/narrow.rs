//! Products of which one side is a few, as low-rank changes of matrices (LoRA) have them: `y_nr = s · x_nk · b_kr` and
//! `c_rm = a_nrᵀ · x_nm` with r tens at most.
//!
//! [`super::matmul()`] packs its operands, which takes as long as it computes where every number is used r times. Here the
//! wide operand x is read once from where it lies, and only the narrow one is packed:
//! - [`narrow()`]: a register holds LANES of the r columns of a row of y, and numbers of x are broadcast;
//! - [`narrow_sum()`]: registers hold columns of x, and numbers of a are broadcast. A task has some columns and all rows.
//!
//! An element is the sum of blocks of rows or of depth, each one chain of multiply-adds in order. So its bits depend neither on
//! threads nor on where in a tile it lies.

use std::cell::RefCell;
use std::ops::Range;

use super::pack::{Format, Source, block_words, pack};
use super::{DEPTH_BLOCK, Elems, Mat};
use crate::pool::Disjoint;
use crate::simd::{MAX_LANES, Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Rows of y that a task of [`narrow()`] computes: some tiles of 24 or 12.
const TASK_ROWS: usize = 48;

/// Rows that [`narrow_sum()`] sums at once: 128 · 32 columns · 4 B = 16 KiB of x stay in L1 for all r.
const SUM_ROWS: usize = 128;

thread_local! {
    /// The packed operand of [`narrow()`]; kept by the thread that calls it.
    static PACKED: RefCell<Buf<f32>> = RefCell::new(Buf::default());
    /// Sums of a task of [`narrow_sum()`], `[r, 2·LANES]`, and columns that do not fill registers.
    static SUMS: RefCell<[Buf<f32>; 2]> = RefCell::new([Buf::default(), Buf::default()]);
}

/// Numbers as they lie in memory: rows `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    fn of(mat: Mat<'a>) -> Self {
        assert!(!mat.transposed, "the wide operand is read as it lies");
        match mat.data {
            Elems::F32(data) => Self { data, stride: mat.stride },
            Elems::Bf16(_) => panic!("the wide operand is f32"),
        }
    }
}

/// `y = scale · x · b`. Rows of y are `y_stride` apart; what lies between them stays as it is.
///
/// # Panics
/// If the dimensions do not fit each other, or x is transposed or not f32.
pub fn narrow(pool: &Pool, (y, y_stride): (&mut [f32], usize), x: Mat, b: Mat, scale: f32) {
    let ([n, k], [k_b, r]) = (x.dims(), b.dims());
    assert!(k == k_b && y_stride >= r && n > 0 && r > 0, "{n}x{k} times {k_b}x{r}, rows {y_stride} apart");
    assert!(y.len() >= (n - 1) * y_stride + r, "y has {} elements", y.len());
    let (x, b, y) = (Rows::of(x), Source::cols_of(b), Disjoint::new(y));
    PACKED.with_borrow_mut(|packed| {
        packed.reserve_scratch(block_words(MAX_LANES, r, k));
        pack_narrow(pool.level(), packed, &b, k);
        pool.run(n.div_ceil(TASK_ROWS), &|task| {
            let rows = piece(task, TASK_ROWS, n);
            // SAFETY: tasks have disjoint rows.
            let y = unsafe { y.slice(rows.start * y_stride..(rows.end - 1) * y_stride + r) };
            let job = Narrow { x, b: packed, dims: [rows.len(), k, r], scale };
            narrow_rows(pool.level(), &job, rows.start, (y, y_stride));
        });
    });
}

/// `c = aᵀ · x`, element (i, j) at `i · strides[0] + j · strides[1]` of `c`. What lies between stays as it is.
///
/// # Panics
/// If the dimensions do not fit each other, or an operand is transposed or not f32.
pub fn narrow_sum(pool: &Pool, (c, strides): (&mut [f32], [usize; 2]), a: Mat, x: Mat) {
    let ([n, r], [n_x, m]) = (a.dims(), x.dims());
    assert!(n == n_x && n > 0 && r > 0 && m > 0, "{n}x{r} transposed times {n_x}x{m}");
    let is_apart = strides[0] >= m * strides[1] || strides[1] >= r * strides[0];
    assert!(is_apart && c.len() > (r - 1) * strides[0] + (m - 1) * strides[1], "c has {} elements", c.len());
    let (a, x, c) = (Rows::of(a), Rows::of(x), Disjoint::new(c));
    let width = 2 * pool.level().lanes();
    pool.run(m.div_ceil(width), &|task| {
        let cols = piece(task, width, m);
        SUMS.with_borrow_mut(|scratch| {
            sum_columns(pool.level(), &Summed { a, x, dims: [n, r] }, cols.clone(), scratch);
            for i in 0..r {
                for (j, sum) in scratch[0][i * width..][..cols.len()].iter().enumerate() {
                    // SAFETY: inside of c, as was asserted, and a task alone has these columns.
                    unsafe { *c.as_ptr().add(i * strides[0] + (cols.start + j) * strides[1]) = *sum };
                }
            }
        });
    });
}

dispatch!(fn pack_narrow(dst: &mut [f32], b: &Source, k: usize) = pack_narrow_simd);
/// Panels of LANES columns, all of the depth.
#[inline(always)]
fn pack_narrow_simd<S: Simd>(s: S, dst: &mut [f32], b: &Source, k: usize) {
    match S::LANES {
        8 => pack::<S, 8>(s, dst, b, 0..b.n_lanes, 0..k, Format::F32),
        _ => pack::<S, 16>(s, dst, b, 0..b.n_lanes, 0..k, Format::F32),
    }
}

/// What the tasks of [`narrow()`] share, and the rows of one.
struct Narrow<'a> {
    x: Rows<'a>,
    /// Panels of LANES columns.
    b: &'a [f32],
    /// n of the task, k and r.
    dims: [usize; 3],
    scale: f32,
}

dispatch!(fn narrow_rows(job: &Narrow, first: usize, y: (&mut [f32], usize)) = narrow_rows_simd);
#[inline(always)]
fn narrow_rows_simd<S: Simd>(s: S, job: &Narrow, first: usize, (y, y_stride): (&mut [f32], usize)) {
    let n = job.dims[0];
    let mut row = 0;
    while row < n {
        let at = (first + row, &mut y[row * y_stride..], y_stride);
        // As many sums as registers allow: each register of b is used so often.
        row += match n - row {
            24.. if S::REGISTERS >= 32 => narrow_tiles::<S, 24>(s, job, at),
            12.. => narrow_tiles::<S, 12>(s, job, at),
            4.. => narrow_tiles::<S, 4>(s, job, at),
            _ => narrow_tiles::<S, 1>(s, job, at),
        };
    }
}

/// All columns of R rows. Gives R.
#[inline(always)]
fn narrow_tiles<S: Simd, const R: usize>(
    s: S,
    job: &Narrow,
    (row, y, y_stride): (usize, &mut [f32], usize),
) -> usize {
    let [_, k, r] = job.dims;
    let Rows { data, stride } = job.x;
    assert!((row + R - 1) * stride + k <= data.len() && job.b.len() >= r.div_ceil(S::LANES) * S::LANES * k);
    for col in (0..r).step_by(S::LANES) {
        let mut sums = [[0.0; MAX_LANES]; R];
        for depth in (0..k).step_by(DEPTH_BLOCK) {
            let n_depth = DEPTH_BLOCK.min(k - depth);
            // SAFETY: rows `row..row + R` of x have k numbers, and the panel has k registers; both were asserted.
            unsafe {
                let x = data.as_ptr().add(row * stride + depth);
                let b = job.b.as_ptr().add(col * k + depth * S::LANES);
                narrow_tile::<S, R>(s, (x, stride), b, n_depth, &mut sums);
            }
        }
        let n_cols = S::LANES.min(r - col);
        for (i, sums) in sums.iter().enumerate() {
            let scaled = s.mul(s.load(sums), s.splat(job.scale));
            s.store(&mut y[i * y_stride + col..][..n_cols], scaled);
        }
    }
    R
}

/// ```text
/// sums[i] += Σ_k x[i][k] · b[k]
/// ```
/// # Safety
/// R rows of `n_depth` numbers are readable at `x`, as many registers at `b`.
#[inline(always)]
unsafe fn narrow_tile<S: Simd, const R: usize>(
    s: S,
    (mut x, stride): (*const f32, usize),
    mut b: *const f32,
    n_depth: usize,
    sums: &mut [[f32; MAX_LANES]; R],
) {
    let mut chains = [s.zero(); R];
    // SAFETY: the caller's promise; the last step goes to the end at most, where nothing is read.
    unsafe {
        for _ in 0..n_depth {
            let right = s.load_ptr(b);
            for i in 0..R {
                chains[i] = s.fma(s.splat(*x.add(i * stride)), right, chains[i]);
            }
            x = x.wrapping_add(1);
            b = b.wrapping_add(S::LANES);
        }
    }
    for i in 0..R {
        let sum = s.add(s.load(&sums[i]), chains[i]);
        s.store(&mut sums[i], sum);
    }
}

/// What the tasks of [`narrow_sum()`] share.
struct Summed<'a> {
    a: Rows<'a>,
    x: Rows<'a>,
    /// n and r.
    dims: [usize; 2],
}

dispatch!(fn sum_columns(job: &Summed, cols: Range<usize>, scratch: &mut [Buf<f32>; 2]) = sum_columns_simd);
/// Sums at most two registers of columns over all rows, into `scratch[0]`.
#[inline(always)]
fn sum_columns_simd<S: Simd>(s: S, job: &Summed, cols: Range<usize>, [sums, padded]: &mut [Buf<f32>; 2]) {
    let ([n, r], width) = (job.dims, 2 * S::LANES);
    assert!(cols.len() <= width);
    sums.reserve_scratch(r * width);
    padded.reserve_scratch(SUM_ROWS * width);
    sums[..r * width].fill(0.0);
    for first in (0..n).step_by(SUM_ROWS) {
        let rows = first..n.min(first + SUM_ROWS);
        let x = &job.x.data[first * job.x.stride + cols.start..];
        let x = match cols.len() == width {
            true => Rows { data: x, stride: job.x.stride },
            false => {
                for (i, to) in padded.chunks_exact_mut(width).take(rows.len()).enumerate() {
                    to[..cols.len()].copy_from_slice(&x[i * job.x.stride..][..cols.len()]);
                }
                Rows { data: &padded[..], stride: width }
            }
        };
        let mut i = 0;
        while i < r {
            let a = Rows { data: &job.a.data[first * job.a.stride + i..], stride: job.a.stride };
            let sums = &mut sums[i * width..];
            i += match r - i {
                8.. if S::REGISTERS >= 32 => sum_tile::<S, 8>(s, a, x, rows.len(), sums),
                4.. => sum_tile::<S, 4>(s, a, x, rows.len(), sums),
                _ => sum_tile::<S, 1>(s, a, x, rows.len(), sums),
            };
        }
    }
}

/// ```text
/// sums[i] += Σ_n a[n][i] · x[n]     of two registers of columns
/// ```
/// Gives R.
#[inline(always)]
fn sum_tile<S: Simd, const R: usize>(s: S, a: Rows, x: Rows, n: usize, sums: &mut [f32]) -> usize {
    let width = 2 * S::LANES;
    assert!(a.data.len() >= (n - 1) * a.stride + R && x.data.len() >= (n - 1) * x.stride + width);
    let mut chains = [[s.zero(); 2]; R];
    // SAFETY: n rows of R and of `width` numbers, as asserted; the last step is not read.
    unsafe {
        let (mut a_at, mut x_at) = (a.data.as_ptr(), x.data.as_ptr());
        for _ in 0..n {
            s.prefetch(x_at.wrapping_add(16 * x.stride));
            s.prefetch(x_at.wrapping_add(16 * x.stride + width - 1));
            let right = [s.load_ptr(x_at), s.load_ptr(x_at.add(S::LANES))];
            for i in 0..R {
                let left = s.splat(*a_at.add(i));
                chains[i] = [s.fma(left, right[0], chains[i][0]), s.fma(left, right[1], chains[i][1])];
            }
            a_at = a_at.wrapping_add(a.stride);
            x_at = x_at.wrapping_add(x.stride);
        }
    }
    for (sums, chains) in sums.chunks_exact_mut(width).zip(&chains) {
        let (low, high) = sums.split_at_mut(S::LANES);
        let [added_low, added_high] = [s.add(s.load(low), chains[0]), s.add(s.load(high), chains[1])];
        s.store(low, added_low);
        s.store(high, added_high);
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

    #[test]
    fn matches_plain_sums_on_every_level() {
        for [n, k, r] in [[1, 1, 1], [5, 300, 3], [61, 33, 16], [131, 600, 41]] {
            let (x, b) = (numbers(1, n * (k + 3)), numbers(2, k * r));
            let x = Mat::with_stride(&x[..], n, k, k + 3);
            for (b, is_transposed) in [(Mat::new(&b[..], k, r), false), (Mat::new(&b[..], r, k).t(), true)] {
                let y_stride = r + 2;
                let mut expected = vec![7.0; n * y_stride];
                for i in 0..n {
                    for j in 0..r {
                        expected[i * y_stride + j] =
                            0.5 * (0..k).map(|l| x.at(i, l) * b.at(l, j)).sum::<f32>();
                    }
                }
                for pool in every_pool() {
                    let mut y = vec![7.0; n * y_stride];
                    narrow(&pool, (&mut y, y_stride), x, b, 0.5);
                    assert_close(&y, &expected, 1e-4);
                    assert!(n > 1 || y[r..] == [7.0; 2], "{is_transposed}");
                }
            }
        }
    }

    #[test]
    fn sums_over_rows_match_on_every_level() {
        for [n, r, m] in [[1, 1, 1], [300, 3, 70], [129, 17, 33], [40, 16, 64]] {
            let (a, x) = (numbers(1, n * (r + 1)), numbers(2, n * (m + 5)));
            let (a, x) = (Mat::with_stride(&a[..], n, r, r + 1), Mat::with_stride(&x[..], n, m, m + 5));
            for strides in [[m, 1], [1, r]] {
                let mut expected = vec![0.0; r * m];
                for i in 0..r {
                    for j in 0..m {
                        let sum: f32 = (0..n).map(|l| a.at(l, i) * x.at(l, j)).sum();
                        expected[i * strides[0] + j * strides[1]] = sum;
                    }
                }
                for pool in every_pool() {
                    let mut c = vec![9.0; r * m];
                    narrow_sum(&pool, (&mut c, strides), a, x);
                    assert_close(&c, &expected, 1e-4);
                }
            }
        }
    }

    #[test]
    fn threads_and_places_change_no_bit() {
        let (n, k, r) = (200, 700, 19);
        let (x, b) = (numbers(1, n * k), numbers(2, k * r));
        let run = |n_threads: usize, rows: Range<usize>| {
            let pool = Pool::new(n_threads);
            let x = &x[rows.start * k..rows.end * k];
            let (mut y, mut c) = (vec![0.0; rows.len() * r], vec![0.0; r * k]);
            narrow(&pool, (&mut y, r), Mat::new(x, rows.len(), k), Mat::new(&b[..], k, r), 2.0);
            narrow_sum(&pool, (&mut c, [k, 1]), Mat::new(&y[..], rows.len(), r), Mat::new(x, rows.len(), k));
            (y, c)
        };
        let expected = run(1, 0..n);
        for n_threads in [2, 3] {
            assert!(run(n_threads, 0..n) == expected);
        }
        assert!(run(1, 77..n).0 == expected.0[77 * r..]);
    }
}
