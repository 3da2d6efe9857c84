//! [`Dot`]: products of unsigned bytes with 16-bit inputs, summed in int32, on every instruction set.
//!
//! All give the same integer, x being 16 bits wide and a sum of 32 products with bytes below 2^29. Only the way there
//! differs:
//! - VNNI multiplies four bytes a lane with signed bytes (`vpdpbusd`), so x = 256·high + low is multiplied in two
//!   passes: all of high, a shift, all of low on top of it.
//! - AVX2 multiplies two int16 a lane (`vpmaddwd`), so a step has two halves: the even bytes of a lane with the even
//!   inputs, then the odd ones.

use super::groups::nibbles;
use super::kind::BLOCK;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};
use std::ops::Range;

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

    /// Registers of weights that a step is multiplied as.
    const HALVES: usize;

    /// Half `half` of the bytes of a step, in the form [`Dot::dot`] takes.
    fn half(self, w: Self::I, half: usize) -> Self::I;

    /// Lays out inputs `4·step .. 4·step + LANES` of a block for [`Dot::dot`].
    /// # Safety
    /// [`X_BYTES`] are writable at `block`.
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I);

    /// Adds the products of one (pass, step, half): in every lane the bytes of `w` with their inputs.
    /// # Safety
    /// [`X_BYTES`] are readable at `block`.
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, at: [usize; 3]) -> Self::I;

    /// All products of a group of 4-bit integers: word w has steps 2w and 2w + 1, in the low and high nibbles of its bytes.
    /// # Safety
    /// [`X_BYTES`] are readable at `block`.
    #[inline(always)]
    unsafe fn dot_nibbles(self, words: [Self::I; STEPS / 2], block: *const u8) -> Self::I {
        // SAFETY: the caller's promise.
        unsafe { dot_steps(self, &nibbles(self, words), block, 0..STEPS) }
    }
}

/// The products of some steps of a group, whose integers are bytes.
///
/// # Safety
/// [`X_BYTES`] are readable at `block`.
#[inline(always)]
pub(super) unsafe fn dot_steps<S: Dot>(
    s: S,
    q: &[S::I; STEPS],
    block: *const u8,
    steps: Range<usize>,
) -> S::I {
    // Two chains a pass, for the latency of a product.
    let mut sums = [[s.splat_i(0); 2]; 2];
    for pass in 0..S::PASSES {
        for step in steps.clone() {
            let sum = &mut sums[pass][step % 2];
            for half in 0..S::HALVES {
                // SAFETY: the caller's promise.
                *sum = unsafe { s.dot(*sum, s.half(q[step], half), block, [pass, step, half]) };
            }
        }
    }
    let first = s.add_i(sums[0][0], sums[0][1]);
    let second = s.add_i(sums[1][0], sums[1][1]);
    if S::PASSES == 2 { s.add_i(s.shl_i::<8>(first), second) } else { first }
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
    const HALVES: usize = 1;

    #[inline(always)]
    fn half(self, w: Self::I, _half: usize) -> Self::I {
        w
    }

    #[inline(always)]
    unsafe fn put(self, block: *mut u8, step: usize, x: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { put_pairs(block, step, &x) }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, [_, step, _]: [usize; 3]) -> Self::I {
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
    const HALVES: usize = 2;

    /// An int32 of two bytes with zeros between is a pair of int16.
    #[inline(always)]
    fn half(self, w: Self::I, half: usize) -> Self::I {
        if half == 0 { self.and_h(w, self.splat_h(0xff)) } else { self.shr_h::<8>(w) }
    }

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
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, [_, step, half]: [usize; 3]) -> Self::I {
        // SAFETY: the caller's promise: 8 bytes for each step.
        self.madd(sum, w, unsafe { pair(block, 2 * step + half) })
    }

    /// Nibbles are multiplied where they stand in an int16, as 1, 16 or 256 times what they are, and each place has a sum of
    /// its own that is divided at the end: 12 instructions a word, where unpacking to bytes first takes 15. A sum is of 8
    /// products below 15·256·X_MAX at most, 1.01e9.
    #[inline(always)]
    unsafe fn dot_nibbles(self, words: [Self::I; STEPS / 2], block: *const u8) -> Self::I {
        use std::arch::x86_64::*;
        let mut sums = [self.splat_i(0); 4];
        for (w, word) in words.into_iter().enumerate() {
            // The int16s of a lane have (in this order of nibbles) inputs 0, 4, 1, 5 and 2, 6, 3, 7 of the two steps.
            // SAFETY: the caller's promise: four pairs for each two steps.
            unsafe {
                sums[0] = self.madd(sums[0], self.and_h(word, self.splat_h(0x000f)), pair(block, 4 * w));
                sums[1] = self.madd(sums[1], self.and_h(word, self.splat_h(0x00f0)), pair(block, 4 * w + 2));
                sums[2] = self.madd(sums[2], self.and_h(word, self.splat_h(0x0f00)), pair(block, 4 * w + 1));
                sums[3] = self.madd(sums[3], self.shr_h::<12>(word), pair(block, 4 * w + 3));
            }
        }
        // SAFETY: the processor has AVX2. The shifts divide whole multiples.
        let (by_16, by_256) = unsafe { (_mm256_srai_epi32::<4>(sums[1]), _mm256_srai_epi32::<8>(sums[2])) };
        self.add_i(self.add_i(sums[0], sums[3]), self.add_i(by_16, by_256))
    }
}

/// Pair `i` of a block of inputs, in all lanes: one instruction that loads.
/// # Safety
/// The block has that many, and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair(block: *const u8, i: usize) -> std::arch::x86_64::__m256i {
    // SAFETY: the caller's promise.
    unsafe { std::arch::x86_64::_mm256_set1_epi32(block.cast::<i32>().add(i).read_unaligned()) }
}

#[cfg(target_arch = "x86_64")]
impl Dot for Avx512 {
    const PASSES: usize = 2;
    const HALVES: usize = 1;

    #[inline(always)]
    fn half(self, w: Self::I, _half: usize) -> Self::I {
        w
    }

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
    unsafe fn dot(self, sum: Self::I, w: Self::I, block: *const u8, [pass, step, _]: [usize; 3]) -> Self::I {
        use std::arch::x86_64::*;
        // SAFETY: the processor has VNNI; the caller's promise: 4 bytes for each step and pass.
        unsafe {
            let x = block.add(pass * BLOCK + 4 * step).cast::<i32>().read_unaligned();
            _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x))
        }
    }
}
