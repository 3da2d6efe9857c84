//! [`Avx2`] and [`Avx512`]: the primitives as x86-64 intrinsics.
//!
//! Every method is one or two instructions once inlined into a function that `dispatch!` compiles for the instruction
//! set. SAFETY, for all of them: a value of the type exists only where the processor has the instructions (`new` is
//! unsafe and asks for that), and memory is touched only by the `*_ptr` methods, whose callers promise the bounds.

use super::Simd;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX2 with FMA and F16C, 8 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

/// AVX-512 F, BW, DQ, VL, VNNI, 16 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ, VL and VNNI, and all that [`Avx2`] asks for.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

/// Methods that are one intrinsic: `name(args) -> type = intrinsic;`. Intrinsics that take the operands in another order
/// or need a constant are spelled out below.
macro_rules! intrinsics {
    ($(fn $name:ident($($arg:ident: $ty:ident),*) -> $ret:ty = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: intrinsics!(@$ty)),*) -> $ret {
            // SAFETY: see the head of the file.
            unsafe { $e }
        }
    )*};
    (@F) => { Self::F };
    (@I) => { Self::I };
    (@H) => { Self::H };
    (@f32) => { f32 };
    (@i32) => { i32 };
    (@Pair) => { [i16; 2] };
    (@Ptr) => { *const f32 };
}

/// Methods that read or write LANES (or 2·LANES) elements at a pointer.
macro_rules! memory {
    ($(fn $name:ident($p:ident: $ptr:ty $(, $v:ident: $ty:ty)?) $(-> $ret:ty)? = $e:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $p: $ptr $(, $v: $ty)?) $(-> $ret)? {
            // SAFETY: see the head of the file.
            unsafe { $e }
        }
    )*};
}

/// The two int16 as the int32 they are in memory.
#[inline(always)]
fn pair_bits([low, high]: [i16; 2]) -> i32 {
    (low as u16 as u32 | (high as u16 as u32) << 16) as i32
}

/// Stores the transpose of eight rows of eight: first pairs, then quads, then halves change places.
///
/// # Safety
/// AVX2; 8 elements are writable at `dst + k · stride` for k in 0..8.
#[inline(always)]
unsafe fn store_transposed(rows: [__m256; 8], dst: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b, c, d, e, f, g, h] = rows;
        let (ab0, ab1) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (cd0, cd1) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let (ef0, ef1) = (_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f));
        let (gh0, gh1) = (_mm256_unpacklo_ps(g, h), _mm256_unpackhi_ps(g, h));
        let abcd = [
            _mm256_shuffle_ps::<0x44>(ab0, cd0),
            _mm256_shuffle_ps::<0xee>(ab0, cd0),
            _mm256_shuffle_ps::<0x44>(ab1, cd1),
            _mm256_shuffle_ps::<0xee>(ab1, cd1),
        ];
        let efgh = [
            _mm256_shuffle_ps::<0x44>(ef0, gh0),
            _mm256_shuffle_ps::<0xee>(ef0, gh0),
            _mm256_shuffle_ps::<0x44>(ef1, gh1),
            _mm256_shuffle_ps::<0xee>(ef1, gh1),
        ];
        for k in 0..4 {
            _mm256_storeu_ps(dst.add(k * stride), _mm256_permute2f128_ps::<0x20>(abcd[k], efgh[k]));
        }
        for k in 0..4 {
            _mm256_storeu_ps(dst.add((k + 4) * stride), _mm256_permute2f128_ps::<0x31>(abcd[k], efgh[k]));
        }
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type F = __m256;
    type I = __m256i;
    type H = __m256i;

    memory! {
        fn load_ptr(p: *const f32) -> Self::F = _mm256_loadu_ps(p);
        fn store_ptr(p: *mut f32, v: Self::F) = _mm256_storeu_ps(p, v);
        fn load_bf16_ptr(p: *const bf16) -> Self::F =
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
        fn load_f16_ptr(p: *const f16) -> Self::F = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        fn load_i8_ptr(p: *const i8) -> Self::F = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        fn load_i_ptr(p: *const i32) -> Self::I = _mm256_loadu_si256(p.cast());
        fn store_i_ptr(p: *mut i32, v: Self::I) = _mm256_storeu_si256(p.cast(), v);
        fn load_h_ptr(p: *const i16) -> Self::H = _mm256_loadu_si256(p.cast());
        fn load_h_from_i8_ptr(p: *const i8) -> Self::H = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
        fn load_h_from_u8_ptr(p: *const u8) -> Self::H = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
    }
    intrinsics! {
        fn splat(x: f32) -> Self::F = _mm256_set1_ps(x);
        fn add(a: F, b: F) -> Self::F = _mm256_add_ps(a, b);
        fn sub(a: F, b: F) -> Self::F = _mm256_sub_ps(a, b);
        fn mul(a: F, b: F) -> Self::F = _mm256_mul_ps(a, b);
        fn div(a: F, b: F) -> Self::F = _mm256_div_ps(a, b);
        fn fma(a: F, b: F, c: F) -> Self::F = _mm256_fmadd_ps(a, b, c);
        fn max(a: F, b: F) -> Self::F = _mm256_max_ps(a, b);
        fn min(a: F, b: F) -> Self::F = _mm256_min_ps(a, b);
        fn sqrt(a: F) -> Self::F = _mm256_sqrt_ps(a);
        fn splat_i(x: i32) -> Self::I = _mm256_set1_epi32(x);
        fn add_i(a: I, b: I) -> Self::I = _mm256_add_epi32(a, b);
        fn sub_i(a: I, b: I) -> Self::I = _mm256_sub_epi32(a, b);
        fn mul_i(a: I, b: I) -> Self::I = _mm256_mullo_epi32(a, b);
        fn to_f(a: I) -> Self::F = _mm256_cvtepi32_ps(a);
        fn to_i(a: F) -> Self::I = _mm256_cvtps_epi32(a);
        fn bits_to_f(a: I) -> Self::F = _mm256_castsi256_ps(a);
        fn bits_to_i(a: F) -> Self::I = _mm256_castps_si256(a);
        fn splat_pair(pair: Pair) -> Self::H = _mm256_set1_epi32(pair_bits(pair));
        fn add_h(a: H, b: H) -> Self::H = _mm256_add_epi16(a, b);
        fn sub_h(a: H, b: H) -> Self::H = _mm256_sub_epi16(a, b);
        fn and_h(a: H, b: H) -> Self::H = _mm256_and_si256(a, b);
        fn and_i(a: I, b: I) -> Self::I = _mm256_and_si256(a, b);
        fn or_i(a: I, b: I) -> Self::I = _mm256_or_si256(a, b);
        fn select_nan(a: F, yes: I, no: I) -> Self::I =
            _mm256_blendv_epi8(no, yes, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a)));
        fn prefetch(p: Ptr) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
        fn prefetch_l2(p: Ptr) -> () = _mm_prefetch::<_MM_HINT_T1>(p.cast());
        fn madd(acc: I, a: H, b: H) -> Self::I = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
    }
    #[inline(always)]
    unsafe fn transpose8_ptr(
        self,
        src: *const f32,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: see the head of the file.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for lane in 0..8 {
                if lane < n_lanes {
                    rows[lane] = _mm256_loadu_ps(src.add(lane * src_stride));
                }
            }
            store_transposed(rows, dst, dst_stride);
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
        // SAFETY: see the head of the file.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for lane in 0..8 {
                if lane < n_lanes {
                    rows[lane] = Avx2(()).load_bf16_ptr(src.add(lane * src_stride));
                }
            }
            store_transposed(rows, dst, dst_stride);
        }
    }
    #[inline(always)]
    fn dot_bf16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see the head of the file.
        unsafe {
            let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32));
            let high = |x| _mm256_and_ps(x, mask);
            let low = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(x)));
            _mm256_fmadd_ps(low(a), low(b), _mm256_fmadd_ps(high(a), high(b), c))
        }
    }
    #[inline(always)]
    fn shr_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        // SAFETY: see the head of the file.
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        // SAFETY: see the head of the file.
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn shr_h<const BITS: u32>(self, a: Self::H) -> Self::H {
        // SAFETY: see the head of the file.
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // SAFETY: see the head of the file.
        unsafe {
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        // SAFETY: see the head of the file.
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type F = __m512;
    type I = __m512i;
    type H = __m512i;

    memory! {
        fn load_ptr(p: *const f32) -> Self::F = _mm512_loadu_ps(p);
        fn store_ptr(p: *mut f32, v: Self::F) = _mm512_storeu_ps(p, v);
        fn load_bf16_ptr(p: *const bf16) -> Self::F =
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
        fn load_f16_ptr(p: *const f16) -> Self::F = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        fn load_i8_ptr(p: *const i8) -> Self::F = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        fn load_i_ptr(p: *const i32) -> Self::I = _mm512_loadu_si512(p.cast());
        fn store_i_ptr(p: *mut i32, v: Self::I) = _mm512_storeu_si512(p.cast(), v);
        fn load_h_ptr(p: *const i16) -> Self::H = _mm512_loadu_si512(p.cast());
        fn load_h_from_i8_ptr(p: *const i8) -> Self::H = _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast()));
        fn load_h_from_u8_ptr(p: *const u8) -> Self::H = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
    }
    intrinsics! {
        fn splat(x: f32) -> Self::F = _mm512_set1_ps(x);
        fn add(a: F, b: F) -> Self::F = _mm512_add_ps(a, b);
        fn sub(a: F, b: F) -> Self::F = _mm512_sub_ps(a, b);
        fn mul(a: F, b: F) -> Self::F = _mm512_mul_ps(a, b);
        fn div(a: F, b: F) -> Self::F = _mm512_div_ps(a, b);
        fn fma(a: F, b: F, c: F) -> Self::F = _mm512_fmadd_ps(a, b, c);
        fn max(a: F, b: F) -> Self::F = _mm512_max_ps(a, b);
        fn min(a: F, b: F) -> Self::F = _mm512_min_ps(a, b);
        fn sqrt(a: F) -> Self::F = _mm512_sqrt_ps(a);
        fn sum(a: F) -> f32 = {
            let low = _mm512_castps512_ps256(a);
            Avx2::new().sum(_mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(a)))
        };
        fn max_lane(a: F) -> f32 = {
            let low = _mm512_castps512_ps256(a);
            Avx2::new().max_lane(_mm256_max_ps(low, _mm512_extractf32x8_ps::<1>(a)))
        };
        fn splat_i(x: i32) -> Self::I = _mm512_set1_epi32(x);
        fn add_i(a: I, b: I) -> Self::I = _mm512_add_epi32(a, b);
        fn sub_i(a: I, b: I) -> Self::I = _mm512_sub_epi32(a, b);
        fn mul_i(a: I, b: I) -> Self::I = _mm512_mullo_epi32(a, b);
        fn to_f(a: I) -> Self::F = _mm512_cvtepi32_ps(a);
        fn to_i(a: F) -> Self::I = _mm512_cvtps_epi32(a);
        fn bits_to_f(a: I) -> Self::F = _mm512_castsi512_ps(a);
        fn bits_to_i(a: F) -> Self::I = _mm512_castps_si512(a);
        fn splat_pair(pair: Pair) -> Self::H = _mm512_set1_epi32(pair_bits(pair));
        fn add_h(a: H, b: H) -> Self::H = _mm512_add_epi16(a, b);
        fn sub_h(a: H, b: H) -> Self::H = _mm512_sub_epi16(a, b);
        fn and_h(a: H, b: H) -> Self::H = _mm512_and_si512(a, b);
        fn and_i(a: I, b: I) -> Self::I = _mm512_and_si512(a, b);
        fn or_i(a: I, b: I) -> Self::I = _mm512_or_si512(a, b);
        fn select_nan(a: F, yes: I, no: I) -> Self::I =
            _mm512_mask_mov_epi32(no, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), yes);
        fn prefetch(p: Ptr) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
        fn prefetch_l2(p: Ptr) -> () = _mm_prefetch::<_MM_HINT_T1>(p.cast());
        fn dot_bf16(a: F, b: F, c: F) -> Self::F =
            _mm512_dpbf16_ps(c, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
        fn madd(acc: I, a: H, b: H) -> Self::I = _mm512_dpwssd_epi32(acc, a, b);
    }
    #[inline(always)]
    unsafe fn transpose8_ptr(
        self,
        src: *const f32,
        src_stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: see the head of the file.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for lane in 0..8 {
                if lane < n_lanes {
                    rows[lane] = _mm256_loadu_ps(src.add(lane * src_stride));
                }
            }
            store_transposed(rows, dst, dst_stride);
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
        // SAFETY: see the head of the file.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for lane in 0..8 {
                if lane < n_lanes {
                    rows[lane] = Avx2(()).load_bf16_ptr(src.add(lane * src_stride));
                }
            }
            store_transposed(rows, dst, dst_stride);
        }
    }
    #[inline(always)]
    fn shr_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        // SAFETY: see the head of the file.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn shl_i<const BITS: u32>(self, a: Self::I) -> Self::I {
        // SAFETY: see the head of the file.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn shr_h<const BITS: u32>(self, a: Self::H) -> Self::H {
        // SAFETY: see the head of the file.
        unsafe { _mm512_srl_epi16(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
}
