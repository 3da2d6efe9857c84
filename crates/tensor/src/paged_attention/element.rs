//! [`Cached`]: the numbers a cache is made of, and how rows of them lie in a block.

use crate::buf::Plain;
use crate::simd::Simd;
use half::bf16;

/// A type of cached numbers. A matrix of them has an even number of rows; kernels read it two rows at a time.
pub(super) trait Cached: Plain {
    /// Every vector has a factor of its own, kept beside the numbers.
    const SCALED: bool;

    /// Where element (row, col) of a matrix `width` wide lies. Column 0 of an even row is at `row · width`.
    fn at(row: usize, col: usize, width: usize) -> usize;

    /// LANES columns of the even row at `p`, or (`ODD`) of the row after it, as f32.
    ///
    /// # Safety
    /// LANES columns of both rows are readable at `p`, which is `at(row, col, width)` of an even row.
    unsafe fn load<S: Simd, const ODD: bool>(s: S, p: *const Self, width: usize) -> S::F;

    /// The factor of a vector.
    fn scale(_x_d: &[f32]) -> f32 {
        1.0
    }

    /// `x`, divided by the vector's factor, as it is stored.
    fn store(x: f32, inverse_scale: f32) -> Self;
}

impl Cached for f32 {
    const SCALED: bool = false;

    fn at(row: usize, col: usize, width: usize) -> usize {
        row * width + col
    }

    #[inline(always)]
    unsafe fn load<S: Simd, const ODD: bool>(s: S, p: *const f32, width: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_ptr(if ODD { p.add(width) } else { p }) }
    }

    #[inline(always)]
    fn store(x: f32, _: f32) -> f32 {
        x
    }
}

/// Rows 2i and 2i+1 lie interleaved: a register of pairs becomes one row by a shift, the other by a mask, which is
/// cheaper than widening each (no shuffle).
impl Cached for bf16 {
    const SCALED: bool = false;

    fn at(row: usize, col: usize, width: usize) -> usize {
        (row / 2 * width + col) * 2 + row % 2
    }

    #[inline(always)]
    unsafe fn load<S: Simd, const ODD: bool>(s: S, p: *const bf16, _: usize) -> S::F {
        // SAFETY: the caller's promise: LANES pairs are LANES int32.
        let pairs = unsafe { s.load_i_ptr(p.cast()) };
        s.bits_to_f(if ODD {
            s.and_i(pairs, s.splat_i(0xffff_0000_u32 as i32))
        } else {
            s.shl_i::<16>(pairs)
        })
    }

    #[inline(always)]
    fn store(x: f32, _: f32) -> bf16 {
        bf16::from_f32(x)
    }
}

/// -127..=127 times a factor: the vector's largest number is 127.
impl Cached for i8 {
    const SCALED: bool = true;

    fn at(row: usize, col: usize, width: usize) -> usize {
        row * width + col
    }

    #[inline(always)]
    unsafe fn load<S: Simd, const ODD: bool>(s: S, p: *const i8, width: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_i8_ptr(if ODD { p.add(width) } else { p }) }
    }

    fn scale(x_d: &[f32]) -> f32 {
        x_d.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0
    }

    #[inline(always)]
    fn store(x: f32, inverse_scale: f32) -> i8 {
        (x * inverse_scale).round_ties_even() as i8
    }
}
