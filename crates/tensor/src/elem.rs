//! [`Elem`]: floats that kernels read and widen to f32.

use crate::buf::Plain;
use crate::simd::Simd;
use half::{bf16, f16};

/// A float that widens to f32 exactly.
pub(crate) trait Elem: Plain {
    /// LANES elements from `p`, widened.
    /// # Safety
    /// LANES elements are readable at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
}

macro_rules! elem {
    ($($t:ty => $load:ident),*) => {$(
        impl Elem for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
                // SAFETY: the caller's promise.
                unsafe { s.$load(p) }
            }
        }
    )*};
}
elem!(f32 => load_ptr, bf16 => load_bf16_ptr, f16 => load_f16_ptr);
