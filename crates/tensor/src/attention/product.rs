//! [`Product`]: small matrix products on operands that are in the first-level cache already.
//!
//! Unlike [`crate::matmul()`] nothing is packed: tiles of attention are used once or twice, and packing would cost as
//! much as the product.

use crate::simd::Simd;

/// What the rows of c are a multiple of: most rows that are computed at a time, with 32 registers. With 2 registers of columns
/// that makes 16 sums, so that two multiply-add units with a latency of 4 are kept busy while some wait for the caches. Of 16
/// registers 8 sums are all there is room for.
pub(super) const ROWS_MAX: usize = 8;
const ROWS_OF_16_REGISTERS: usize = 4;

/// Registers of columns computed at a time.
const REGISTERS: usize = 2;

/// `c_mn (+)= a_mk · b_kn`. Only a may be transposed, by its steps.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) a: &'a [f32],
    /// Elements from one row of a to the next.
    pub(super) a_row: usize,
    /// Elements from one column of a to the next.
    pub(super) a_col: usize,
    pub(super) b: &'a [f32],
    pub(super) b_stride: usize,
    /// m, n and k: m a multiple of [`ROWS_MAX`], n of two registers.
    pub(super) dims: [usize; 3],
}

impl Product<'_> {
    /// Computes into rows of `c` that are `c_stride` apart; `add` keeps what is there.
    #[inline(always)]
    pub(super) fn run<S: Simd>(self, s: S, c: &mut [f32], c_stride: usize, add: bool) {
        let [m, n, k] = self.dims;
        let width = REGISTERS * S::LANES;
        assert!(m.is_multiple_of(ROWS_MAX) && n.is_multiple_of(width) && m * n * k > 0);
        assert!(c.len() >= (m - 1) * c_stride + n && self.b.len() >= (k - 1) * self.b_stride + n);
        assert!(self.a.len() > (m - 1) * self.a_row + (k - 1) * self.a_col);
        // SAFETY: the asserts above are the bounds of rows i..i+ROWS and columns j..j+width of every tile.
        unsafe {
            match S::REGISTERS >= 32 {
                true => self.tiles::<S, ROWS_MAX>(s, c.as_mut_ptr(), c_stride, add),
                false => self.tiles::<S, ROWS_OF_16_REGISTERS>(s, c.as_mut_ptr(), c_stride, add),
            }
        }
    }

    /// # Safety
    /// The matrices have all elements of `dims`, which are whole tiles.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const ROWS: usize>(self, s: S, c: *mut f32, c_stride: usize, add: bool) {
        let [m, n, _] = self.dims;
        for j in (0..n).step_by(REGISTERS * S::LANES) {
            for i in (0..m).step_by(ROWS) {
                // SAFETY: the caller's promise.
                unsafe {
                    let (a, b) = (self.a.as_ptr().add(i * self.a_row), self.b.as_ptr().add(j));
                    self.tile::<S, ROWS>(s, c.add(i * c_stride + j), c_stride, a, b, add);
                }
            }
        }
    }

    /// ROWS × (REGISTERS · LANES) of c.
    /// ```text
    /// for l in 0..k: for r in ROWS: c[r, :] += a[r, l] * b[l, :]
    /// ```
    /// # Safety
    /// `a`, `b` and `c` point at tiles that lie inside their matrices.
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize>(
        self,
        s: S,
        c: *mut f32,
        c_stride: usize,
        mut a: *const f32,
        mut b: *const f32,
        add: bool,
    ) {
        let mut sums = [[s.zero(); REGISTERS]; ROWS];
        // SAFETY: by the caller's promise all reads and writes stay inside the tiles; the pointers step past the last
        // element at most with `wrapping_add`, where they are not read.
        unsafe {
            for _ in 0..self.dims[2] {
                let right = [s.load_ptr(b), s.load_ptr(b.add(S::LANES))];
                for r in 0..ROWS {
                    let left = s.splat(*a.add(r * self.a_row));
                    for x in 0..REGISTERS {
                        sums[r][x] = s.fma(left, right[x], sums[r][x]);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_stride);
            }
            for r in 0..ROWS {
                for x in 0..REGISTERS {
                    let at = c.add(r * c_stride + x * S::LANES);
                    let sum = if add { s.add(s.load_ptr(at), sums[r][x]) } else { sums[r][x] };
                    s.store_ptr(at, sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Level;
    use crate::simd::dispatch;
    use crate::testing::{assert_close, numbers};

    dispatch!(fn product(product: Product, c: &mut [f32], c_stride: usize, add: bool) = product_simd);
    #[inline(always)]
    fn product_simd<S: Simd>(s: S, product: Product, c: &mut [f32], c_stride: usize, add: bool) {
        product.run(s, c, c_stride, add);
    }

    #[test]
    fn multiplies_plain_and_transposed() {
        let (m, n, k, stride) = (16, 64, 5, 70);
        let (a, b, start) = (numbers(1, m * k), numbers(2, k * stride), numbers(3, m * stride));
        for (a_row, a_col, add) in [(k, 1, false), (k, 1, true), (1, m, false), (1, m, true)] {
            let mut expected = start.clone();
            for i in 0..m {
                for j in 0..n {
                    let sum: f32 = (0..k).map(|l| a[i * a_row + l * a_col] * b[l * stride + j]).sum();
                    let c = &mut expected[i * stride + j];
                    *c = if add { *c + sum } else { sum };
                }
            }
            for level in Level::all_available() {
                let mut c = start.clone();
                let operands = Product { a: &a, a_row, a_col, b: &b, b_stride: stride, dims: [m, n, k] };
                product(level, operands, &mut c, stride, add);
                assert_close(&c, &expected, 1e-5);
            }
        }
    }
}
