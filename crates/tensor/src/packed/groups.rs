//! From the groups of a tile to registers: integers as bytes, scales as f32.

use super::dot::STEPS;
use super::layout::{Form, HALF_BYTES, WORD_BYTES};
use crate::simd::Simd;

/// The integers of one group for LANES rows: step by step, four bytes a lane.
///
/// # Safety
/// `group` points to row `r` of a group's integers of `BITS` bits, and LANES rows are there.
#[inline(always)]
pub(super) unsafe fn ints<S: Simd, const BITS: usize>(s: S, group: *const u8) -> [S::I; STEPS] {
    // SAFETY: the caller's promise: words are WORD_BYTES apart.
    let word = |w: usize| unsafe { s.load_i_ptr(group.add(w * WORD_BYTES).cast()) };
    let mut q = [s.splat_i(0); STEPS];
    if BITS == 8 {
        for (w, q) in q.iter_mut().enumerate() {
            *q = word(w);
        }
        return q;
    }
    // SAFETY: as above.
    q = nibbles(s, unsafe { nibble_words(s, group) });
    if BITS == 5 {
        let (mask, bits) = (s.splat_i(0x1010_1010), word(4));
        q[0] = s.or_i(q[0], s.and_i(s.shl_i::<4>(bits), mask));
        q[1] = s.or_i(q[1], s.and_i(s.shl_i::<3>(bits), mask));
        q[2] = s.or_i(q[2], s.and_i(s.shl_i::<2>(bits), mask));
        q[3] = s.or_i(q[3], s.and_i(s.shl_i::<1>(bits), mask));
        q[4] = s.or_i(q[4], s.and_i(bits, mask));
        q[5] = s.or_i(q[5], s.and_i(s.shr_i::<1>(bits), mask));
        q[6] = s.or_i(q[6], s.and_i(s.shr_i::<2>(bits), mask));
        q[7] = s.or_i(q[7], s.and_i(s.shr_i::<3>(bits), mask));
    }
    if BITS == 6 {
        let mask = s.splat_i(0x3030_3030);
        for (p, q) in q.chunks_exact_mut(4).enumerate() {
            let bits = word(4 + p);
            q[0] = s.or_i(q[0], s.and_i(s.shl_i::<4>(bits), mask));
            q[1] = s.or_i(q[1], s.and_i(s.shl_i::<2>(bits), mask));
            q[2] = s.or_i(q[2], s.and_i(bits, mask));
            q[3] = s.or_i(q[3], s.and_i(s.shr_i::<2>(bits), mask));
        }
    }
    q
}

/// The words of one group for LANES rows that hold the low four bits.
///
/// # Safety
/// As [`ints`], of fewer than 8 bits.
#[inline(always)]
pub(super) unsafe fn nibble_words<S: Simd>(s: S, group: *const u8) -> [S::I; STEPS / 2] {
    let mut words = [s.splat_i(0); STEPS / 2];
    for (w, word) in words.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *word = unsafe { s.load_i_ptr(group.add(w * WORD_BYTES).cast()) };
    }
    words
}

/// From two steps a word to one: low nibbles, then high ones.
#[inline(always)]
pub(super) fn nibbles<S: Simd>(s: S, words: [S::I; STEPS / 2]) -> [S::I; STEPS] {
    let nibble = s.splat_i(0x0f0f_0f0f);
    let mut q = [s.splat_i(0); STEPS];
    for (w, word) in words.into_iter().enumerate() {
        q[2 * w] = s.and_i(word, nibble);
        q[2 * w + 1] = s.and_i(s.shr_i::<4>(word), nibble);
    }
    q
}

/// a for both parts of a group (or the whole of it, twice) and b, for LANES rows; b is 0 where it is not stored.
///
/// # Safety
/// `scales` points to row `r` of the scales of a tile of `form` that has group `g`, and LANES rows are there.
#[inline(always)]
pub(super) unsafe fn affine<S: Simd>(s: S, form: Form, scales: *const u8, g: usize) -> ([S::F; 2], S::F) {
    let (units, steps) = form.scales_at(g);
    // SAFETY: the caller's promise.
    unsafe {
        let d = s.load_f16_ptr(scales.add(units).cast());
        let m = if form.min { s.load_f16_ptr(scales.add(units + HALF_BYTES).cast()) } else { s.zero() };
        if !form.k {
            return ([d; 2], m);
        }
        // Widening bf16 leaves the two bytes in the upper half of a lane.
        let pair = s.bits_to_i(s.load_bf16_ptr(scales.add(steps).cast()));
        let first = s.to_f(s.and_i(s.shr_i::<16>(pair), s.splat_i(0xff)));
        let second = s.to_f(s.shr_i::<24>(pair));
        if form.min {
            ([s.mul(d, first); 2], s.neg(s.mul(m, second)))
        } else {
            let scale = |step: S::F| s.mul(d, s.sub(step, s.splat(128.0)));
            ([scale(first), scale(second)], s.zero())
        }
    }
}
