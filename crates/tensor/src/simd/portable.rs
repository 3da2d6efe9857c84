//! [`Portable`]: the primitives in plain Rust.

use super::Simd;
use half::{bf16, f16};

/// N lanes of plain Rust: the reference the other instruction sets are tested against, and what runs on processors
/// without AVX2. N is 8 (AVX2's shape) or 16 (AVX-512's).
#[derive(Clone, Copy, Debug)]
pub struct Portable<const N: usize>;

/// Lane-wise `f`.
#[inline(always)]
fn zip<A: Copy, B: Copy, R, const N: usize>(a: [A; N], b: [B; N], f: impl Fn(A, B) -> R) -> [R; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Both halves of a pair of lanes.
#[inline(always)]
fn both(a: [i16; 2], b: [i16; 2], f: impl Fn(i16, i16) -> i16) -> [i16; 2] {
    [f(a[0], b[0]), f(a[1], b[1])]
}

impl<const N: usize> Simd for Portable<N> {
    const LANES: usize = N;
    /// Few: a register is several of the machine's here, and code for many takes the compiler minutes.
    const REGISTERS: usize = 8;
    type F = [f32; N];
    type I = [i32; N];
    type H = [[i16; 2]; N];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise; an unaligned read is fine.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(self, p: *const bf16) -> Self::F {
        // SAFETY: the caller's promise.
        let x = unsafe { p.cast::<[bf16; N]>().read_unaligned() };
        x.map(|x| f32::from_bits((x.to_bits() as u32) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(self, p: *const f16) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f16; N]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8_ptr(self, p: *const i8) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i8; N]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    fn prefetch(self, _p: *const f32) {}
    #[inline(always)]
    fn prefetch_l2(self, _p: *const f32) {}
    #[inline(always)]
    unsafe fn transpose8_ptr(
        self,
        src: *const f32,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        for k in 0..8 {
            for lane in 0..8 {
                // SAFETY: the caller's promise.
                unsafe {
                    let x = if lane < n_lanes { *src.add(lane * src_stride + k) } else { 0.0 };
                    *dst.add(k * dst_stride + lane) = x;
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose8_bf16_ptr(
        self,
        src: *const bf16,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        for k in 0..8 {
            for lane in 0..8 {
                // SAFETY: the caller's promise.
                unsafe {
                    let x = if lane < n_lanes { (*src.add(lane * src_stride + k)).to_f32() } else { 0.0 };
                    *dst.add(k * dst_stride + lane) = x;
                }
            }
        }
    }
    #[inline(always)]
    fn dot_bf16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // The product of two bf16 is exact in f32, so this rounds exactly as the instruction is defined to.
        let high = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let low = |x: f32| f32::from_bits(x.to_bits() << 16);
        std::array::from_fn(|i| (c[i] + high(a[i]) * high(b[i])) + low(a[i]) * low(b[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    /// Two roundings: without the instruction, one rounding is a library call per lane.
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // Halves onto each other, as the vector versions do.
        let mut lanes = a;
        let mut n = N;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                lanes[i] += lanes[i + n];
            }
        }
        lanes[0]
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load_i_ptr(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i_ptr(self, p: *mut i32, v: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::I>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        a.map(|a| a << BITS)
    }
    #[inline(always)]
    fn shr_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        a.map(|a| (a as u32 >> BITS) as i32)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn select_nan(self, a: Self::F, yes: Self::I, no: Self::I) -> Self::I {
        std::array::from_fn(|i| if a[i].is_nan() { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn to_f(self, a: Self::I) -> Self::F {
        a.map(|a| a as f32)
    }
    #[inline(always)]
    fn to_i(self, a: Self::F) -> Self::I {
        // Adding and taking away 1.5·2^23 rounds to nearest even below 2^22 without a library call; larger values have
        // no fraction worth rounding but for the last bits, where the slow way is taken.
        const SHIFT: f32 = 12_582_912.0;
        a.map(
            |a| if a.abs() < 4_194_304.0 { ((a + SHIFT) - SHIFT) as i32 } else { a.round_ties_even() as i32 },
        )
    }
    #[inline(always)]
    fn bits_to_f(self, a: Self::I) -> Self::F {
        a.map(|a| f32::from_bits(a as u32))
    }
    #[inline(always)]
    fn bits_to_i(self, a: Self::F) -> Self::I {
        a.map(|a| a.to_bits() as i32)
    }
    #[inline(always)]
    fn splat_pair(self, pair: [i16; 2]) -> Self::H {
        [pair; N]
    }
    #[inline(always)]
    unsafe fn load_h_ptr(self, p: *const i16) -> Self::H {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::H>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_h_from_i8_ptr(self, p: *const i8) -> Self::H {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[[i8; 2]; N]>().read_unaligned() }.map(|[a, b]| [a as i16, b as i16])
    }
    #[inline(always)]
    unsafe fn load_h_from_u8_ptr(self, p: *const u8) -> Self::H {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[[u8; 2]; N]>().read_unaligned() }.map(|[a, b]| [a as i16, b as i16])
    }
    #[inline(always)]
    fn add_h(self, a: Self::H, b: Self::H) -> Self::H {
        zip(a, b, |a, b| both(a, b, i16::wrapping_add))
    }
    #[inline(always)]
    fn sub_h(self, a: Self::H, b: Self::H) -> Self::H {
        zip(a, b, |a, b| both(a, b, i16::wrapping_sub))
    }
    #[inline(always)]
    fn and_h(self, a: Self::H, b: Self::H) -> Self::H {
        zip(a, b, |a, b| both(a, b, |a, b| a & b))
    }
    #[inline(always)]
    fn shr_h<const BITS: u32>(self, a: Self::H) -> Self::H {
        a.map(|a| a.map(|x| ((x as u16) >> BITS) as i16))
    }
    #[inline(always)]
    fn madd(self, acc: Self::I, a: Self::H, b: Self::H) -> Self::I {
        std::array::from_fn(|i| {
            let low = a[i][0] as i32 * b[i][0] as i32;
            let high = a[i][1] as i32 * b[i][1] as i32;
            acc[i].wrapping_add(low.wrapping_add(high))
        })
    }
}
