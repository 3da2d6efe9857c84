//! SIMD: a kernel is written once, generic over [`Simd`], and runs on every instruction set.
//!
//! # How to write a kernel
//! ```
//! use tensor::{cpu::Level, simd::{Simd, dispatch}};
//!
//! // 1. The body: generic, `#[inline(always)]`, takes the instruction set as its first argument.
//! #[inline(always)]
//! fn axpy_simd<S: Simd>(s: S, y: &mut [f32], x: &[f32], a: f32) {
//!     let a = s.splat(a);
//!     for (y, x) in y.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
//!         s.store(y, s.fma(a, s.load(x), s.load(y))); // whole registers and tails alike
//!     }
//! }
//! // 2. The dispatch: makes `fn axpy(level: Level, y: &mut [f32], x: &[f32], a: f32)`.
//! dispatch!(fn axpy(y: &mut [f32], x: &[f32], a: f32) = axpy_simd);
//!
//! // 3. The call, at the level of the pool the op was given: `axpy(pool.level(), y, x, 2.0)`.
//! let mut y = [1.0; 11];
//! axpy(Level::Avx2, &mut y, &[1.0; 11], 2.0);
//! assert_eq!(y, [3.0; 11]);
//! ```
//! Rules:
//! - Every generic function a body calls is `#[inline(always)]` too: the intrinsics become instructions only when all of
//!   it is inlined into the function that `dispatch!` compiles with the features switched on. No closures in hot loops
//!   for the same reason.
//! - A value of a `Simd` type is the proof that the processor has the instructions (only `dispatch!` makes one), so
//!   arithmetic is safe. Memory goes through slices ([`Simd::load`], [`Simd::store`]), or through pointers in
//!   `unsafe` code where the bounds checks were measured to cost.
//! - Dispatch once per task, not once per row: it costs a few ns, and nothing is inlined across it.
//! - Results may differ between levels (lane counts change the order of sums; Scalar rounds products), never between
//!   thread counts.
//!
//! Lanes: `F` holds LANES f32 (8 or 16), `I` LANES i32, `H` 2·LANES i16 seen as LANES pairs: [`Simd::madd`] multiplies
//! int16 pairs and sums each pair into its int32 lane.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

use half::{bf16, f16};

/// One instruction set's primitives. See the [module](self) for how kernels use it.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 lanes per register.
    const LANES: usize;
    /// Vector registers a kernel may plan its sums for.
    const REGISTERS: usize;
    /// LANES × f32.
    type F: Copy;
    /// LANES × i32.
    type I: Copy;
    /// 2·LANES × i16, as LANES pairs.
    type H: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }
    /// The first LANES elements; fewer if `x` is shorter, the missing lanes zero.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::F {
        if x.len() >= Self::LANES {
            // SAFETY: the length was just checked.
            unsafe { self.load_ptr(x.as_ptr()) }
        } else {
            let mut lanes = [0.0; MAX_LANES];
            lanes[..x.len()].copy_from_slice(x);
            // SAFETY: MAX_LANES >= LANES.
            unsafe { self.load_ptr(lanes.as_ptr()) }
        }
    }
    /// Writes the first `min(LANES, x.len())` lanes.
    #[inline(always)]
    fn store(self, x: &mut [f32], v: Self::F) {
        if x.len() >= Self::LANES {
            // SAFETY: the length was just checked.
            unsafe { self.store_ptr(x.as_mut_ptr(), v) }
        } else {
            let n = x.len();
            x.copy_from_slice(&self.lanes(v)[..n]);
        }
    }
    /// Lanes as an array; only the first LANES entries are meaningful.
    #[inline(always)]
    fn lanes(self, v: Self::F) -> [f32; MAX_LANES] {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: MAX_LANES >= LANES.
        unsafe { self.store_ptr(lanes.as_mut_ptr(), v) };
        lanes
    }
    /// Like [`Simd::load`], widening bf16 (exact).
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> Self::F {
        if x.len() >= Self::LANES {
            // SAFETY: the length was just checked.
            unsafe { self.load_bf16_ptr(x.as_ptr()) }
        } else {
            let mut lanes = [bf16::ZERO; MAX_LANES];
            lanes[..x.len()].copy_from_slice(x);
            // SAFETY: MAX_LANES >= LANES.
            unsafe { self.load_bf16_ptr(lanes.as_ptr()) }
        }
    }
    /// Like [`Simd::load`], widening f16 (exact).
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> Self::F {
        if x.len() >= Self::LANES {
            // SAFETY: the length was just checked.
            unsafe { self.load_f16_ptr(x.as_ptr()) }
        } else {
            let mut lanes = [f16::ZERO; MAX_LANES];
            lanes[..x.len()].copy_from_slice(x);
            // SAFETY: MAX_LANES >= LANES.
            unsafe { self.load_f16_ptr(lanes.as_ptr()) }
        }
    }

    /// LANES elements from `p`, any alignment.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F;
    /// LANES elements to `p`, any alignment.
    /// # Safety
    /// LANES elements are writable at `p`.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::F);
    /// LANES bf16 from `p`, widened.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load_bf16_ptr(self, p: *const bf16) -> Self::F;
    /// LANES f16 from `p`, widened.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load_f16_ptr(self, p: *const f16) -> Self::F;
    /// LANES i8 from `p`, as f32.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load_i8_ptr(self, p: *const i8) -> Self::F;

    /// Asks for the cache line at `p`; never faults.
    fn prefetch(self, p: *const f32);
    /// The same to L2 only: for what is needed in some thousand cycles.
    fn prefetch_l2(self, p: *const f32);
    /// Transposes an 8×8 block: `dst[k · dst_stride + lane] = src[lane · src_stride + k]`; lanes from `n_lanes` on are
    /// not read and become zeros.
    /// # Safety
    /// 8 elements are readable at each of the `n_lanes` (at most 8) source rows, 8 are writable at each of 8 target rows.
    unsafe fn transpose8_ptr(
        self,
        src: *const f32,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    );
    /// As [`Simd::transpose8_ptr`], widening bf16.
    /// # Safety
    /// As there.
    unsafe fn transpose8_bf16_ptr(
        self,
        src: *const bf16,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    );

    /// a + b
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a - b
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once (twice in [`Portable`]).
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lane-wise maximum; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise minimum; `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Square root.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// -a
    #[inline(always)]
    fn neg(self, a: Self::F) -> Self::F {
        self.sub(self.splat(-0.0), a)
    }
    /// |a|
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        self.max(a, self.neg(a))
    }
    /// Rounded to bf16 (to nearest even, as `bf16::from_f32`) and widened again.
    #[inline(always)]
    fn round_bf16(self, a: Self::F) -> Self::F {
        let bits = self.bits_to_i(a);
        // Half a unit of the last kept place, minus one, plus the last kept bit: ties go to even.
        let odd = self.and_i(self.shr_i::<16>(bits), self.splat_i(1));
        let rounded = self.add_i(self.add_i(bits, self.splat_i(0x7fff)), odd);
        // A NaN may lose its payload above, not its quiet bit.
        let quiet = self.or_i(bits, self.splat_i(0x0040_0000));
        let kept = self.select_nan(a, quiet, rounded);
        self.bits_to_f(self.and_i(kept, self.splat_i(0xffff_0000_u32 as i32)))
    }
    /// bf16 pairs in lanes: `a` in the high half, `b` in the low half. Both must be rounded already.
    #[inline(always)]
    fn pair_bf16(self, a: Self::F, b: Self::F) -> Self::F {
        self.bits_to_f(self.or_i(self.bits_to_i(a), self.shr_i::<16>(self.bits_to_i(b))))
    }
    /// Lanes are bf16 pairs: `(c + a.high · b.high) + a.low · b.low`. On [`Avx512`] the caller must be compiled for
    /// AVX512-BF16, see `matmul`.
    fn dot_bf16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum of all lanes, in a fixed order.
    fn sum(self, a: Self::F) -> f32;
    /// Largest lane.
    fn max_lane(self, a: Self::F) -> f32;
    /// e^a within 2 ulp on [-87, 88]; below it 0 or nearly so, above it e^88, never infinite; NaN is undefined.
    #[inline(always)]
    fn exp(self, a: Self::F) -> Self::F {
        exp(self, a)
    }

    /// e^a of probabilities: 0 below 1e-24. Smaller ones times a gradient are denormal, which a multiplication takes a
    /// hundred times as long for: a trained model is sure of much, and its backward passes took three times as long.
    #[inline(always)]
    fn exp_or_zero(self, a: Self::F) -> Self::F {
        self.max(self.sub(exp(self, a), self.splat(1e-24)), self.zero())
    }

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// LANES i32 from `p`.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load_i_ptr(self, p: *const i32) -> Self::I;
    /// LANES i32 to `p`.
    /// # Safety
    /// LANES elements are writable at `p`.
    unsafe fn store_i_ptr(self, p: *mut i32, v: Self::I);
    /// a + b, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a - b, wrapping.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a · b, low 32 bits.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a << BITS
    fn shl_i<const BITS: u32>(self, a: Self::I) -> Self::I;
    /// a >> BITS, zeros shifted in.
    fn shr_i<const BITS: u32>(self, a: Self::I) -> Self::I;
    /// a & b
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a | b
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `yes` in the lanes where `a` is NaN, `no` elsewhere.
    fn select_nan(self, a: Self::F, yes: Self::I, no: Self::I) -> Self::I;
    /// Converted to f32, rounded to nearest even.
    fn to_f(self, a: Self::I) -> Self::F;
    /// Rounded to nearest even; lanes outside i32's range are undefined.
    fn to_i(self, a: Self::F) -> Self::I;
    /// The same bits as f32.
    fn bits_to_f(self, a: Self::I) -> Self::F;
    /// The same bits as i32.
    fn bits_to_i(self, a: Self::F) -> Self::I;

    /// The two int16 in `pair` (low half first in memory) in every pair of lanes.
    fn splat_pair(self, pair: [i16; 2]) -> Self::H;
    /// All 2·LANES lanes `x`.
    #[inline(always)]
    fn splat_h(self, x: i16) -> Self::H {
        self.splat_pair([x, x])
    }
    /// 2·LANES i16 from `p`.
    /// # Safety
    /// 2·LANES elements are readable at `p`.
    unsafe fn load_h_ptr(self, p: *const i16) -> Self::H;
    /// 2·LANES i8 from `p`, sign-extended.
    /// # Safety
    /// 2·LANES elements are readable at `p`.
    unsafe fn load_h_from_i8_ptr(self, p: *const i8) -> Self::H;
    /// 2·LANES u8 from `p`, zero-extended.
    /// # Safety
    /// 2·LANES elements are readable at `p`.
    unsafe fn load_h_from_u8_ptr(self, p: *const u8) -> Self::H;
    /// a + b, wrapping.
    fn add_h(self, a: Self::H, b: Self::H) -> Self::H;
    /// a - b, wrapping.
    fn sub_h(self, a: Self::H, b: Self::H) -> Self::H;
    /// a & b
    fn and_h(self, a: Self::H, b: Self::H) -> Self::H;
    /// a >> BITS, zeros shifted in.
    fn shr_h<const BITS: u32>(self, a: Self::H) -> Self::H;
    /// acc + a₀·b₀ + a₁·b₁ in every int32 lane, wrapping (`vpmaddwd` + `vpaddd`, or `vpdpwssd`).
    fn madd(self, acc: Self::I, a: Self::H, b: Self::H) -> Self::I;
}

/// Lanes of the widest instruction set; the size of arrays that hold one register.
pub const MAX_LANES: usize = 16;

/// e^x: x = n·ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial (minimax, as in Cephes' expf) for e^r, and n put
/// into the exponent.
#[inline(always)]
fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // ln 2 in two parts: the first has few bits, so n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const TERMS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = s.min(s.max(x, s.splat(-87.336_54)), s.splat(88.0));
    let n = s.to_i(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let n_f = s.to_f(n);
    let r = s.fma(n_f, s.splat(-LN2_HIGH), x);
    let r = s.fma(n_f, s.splat(-LN2_LOW), r);
    let mut p = s.splat(TERMS[0]);
    for term in &TERMS[1..] {
        p = s.fma(p, r, s.splat(*term));
    }
    let p = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    s.bits_to_f(s.add_i(s.bits_to_i(p), s.shl_i::<23>(n)))
}

/// Makes `fn NAME(level: Level, ARGS..) -> RET` out of a generic kernel `fn KERNEL<S: Simd>(s: S, ARGS..) -> RET`: one
/// compiled copy for each instruction set, chosen by `level`. See [`crate::simd`].
#[macro_export]
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:ident) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::cpu::Level, $($arg: $ty),*) $(-> $ret)? {
            use $crate::{cpu::Level, simd};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2(s: simd::Avx2, $($arg: $ty),*) $(-> $ret)? {
                $kernel(s, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn avx512(s: simd::Avx512, $($arg: $ty),*) $(-> $ret)? {
                $kernel(s, $($arg),*)
            }
            match level.available() {
                // SAFETY: `available` returns a level only if this processor has all of its instructions.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512(simd::Avx512::new(), $($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2(simd::Avx2::new(), $($arg),*) },
                Level::Scalar => $kernel(simd::Portable::<8>, $($arg),*),
                _ => $kernel(simd::Portable::<16>, $($arg),*),
            }
        }
    };
}
pub use crate::dispatch;
