//! [`Dot`]: products of unsigned bytes with 16-bit inputs, summed in int32, on every instruction set.
//!
//! All give the same integer, x being 16 bits wide and a sum of 32 products with bytes below 2^29. Only the way there
//! differs:
//! - VNNI multiplies four bytes a lane with signed bytes (`vpdpbusd`), so x = 256·high + low is multiplied in two
//!   passes: all of high, a shift, all of low on top of it.
//! - AVX2 multiplies two int16 a lane (`vpmaddwd`): the even bytes of a lane with the even inputs, then the odd ones.

use super::kind::BLOCK;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// Four inputs are one step: a lane holds their four weights of one row.
pub(super) const STEPS: usize = BLOCK / 4;

/// Bytes of a block of 32 inputs of 16 bits.
pub(super) const X_BYTES: usize = 2 * BLOCK;

/// |x| stays below: 256·127 + 127, so that high fits a signed byte.
pub(super) const X_MAX: f32 = 32639.0;

/// An instruction set's way to multiply.
pub(super) trait Dot: Simd {
    /// Passes over the inputs; between two the sums so far are multiplied with 256.
    const PASSES: usize;

    /// Lays out inputs `4·step .. 4·step + LANES` of a block for [`Dot::dot`].
    /// # Safety
    /// [`X_BYTES`] are writable at `block`.
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I);

    /// Adds the products of step `step` in pass `pass`: in every lane four bytes of `w` with the four inputs.
    /// # Safety
    /// [`X_BYTES`] are readable at `block`.
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, pass: usize, step: usize) -> Self::I;
}

/// x0, x2 and x1, x3 of a step, as pairs of int16.
unsafe fn put_pairs(block: *mut u8, step: usize, x: &[i32]) {
    for (i, x) in x.chunks_exact(4).enumerate() {
        let pairs = [x[0], x[2], x[1], x[3]].map(|x| x as i16);
        // SAFETY: the caller's promise: 8 bytes for each step.
        unsafe { block.add(8 * (step + i)).cast::<[i16; 4]>().write_unaligned(pairs) };
    }
}

impl<const N: usize> Dot for Portable<N> {
    const PASSES: usize = 1;

    #[inline(always)]
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { put_pairs(block, step, &x) }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, _pass: usize, step: usize) -> Self::I {
        // SAFETY: the caller's promise: 8 bytes for each step.
        let [x0, x2, x1, x3] =
            unsafe { block.add(8 * step).cast::<[i16; 4]>().read_unaligned() }.map(i32::from);
        std::array::from_fn(|lane| {
            let [w0, w1, w2, w3] = w[lane].to_le_bytes().map(i32::from);
            sum[lane] + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        })
    }
}

#[cfg(target_arch = "x86_64")]
impl Dot for Avx2 {
    const PASSES: usize = 1;

    #[inline(always)]
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I) {
        let mut lanes = [0; 8];
        // SAFETY: LANES is 8; the caller's promise.
        unsafe {
            self.store_i_ptr(lanes.as_mut_ptr(), x);
            put_pairs(block, step, &lanes);
        }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, _pass: usize, step: usize) -> Self::I {
        // SAFETY: the caller's promise: 8 bytes for each step.
        let [even_x, odd_x] = unsafe { block.add(8 * step).cast::<[[i16; 2]; 2]>().read_unaligned() };
        // An int32 of two bytes with zeros between is a pair of int16.
        let even_w = self.and_h(w, self.splat_h(0xff));
        let odd_w = self.shr_h::<8>(w);
        let sum = self.madd(sum, even_w, self.splat_pair(even_x));
        self.madd(sum, odd_w, self.splat_pair(odd_x))
    }
}

#[cfg(target_arch = "x86_64")]
impl Dot for Avx512 {
    const PASSES: usize = 2;

    #[inline(always)]
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I) {
        use std::arch::x86_64::*;
        // SAFETY: the processor has AVX-512 F; the caller's promise: high bytes, then low ones.
        unsafe {
            let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
            let at = block.add(4 * step);
            _mm_storeu_si128(at.cast(), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(at.add(BLOCK).cast(), _mm512_cvtepi32_epi8(x));
        }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, pass: usize, step: usize) -> Self::I {
        use std::arch::x86_64::*;
        // SAFETY: the processor has VNNI; the caller's promise: 4 bytes for each step and pass.
        unsafe {
            let x = block.add(pass * BLOCK + 4 * step).cast::<i32>().read_unaligned();
            _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x))
        }
    }
}
