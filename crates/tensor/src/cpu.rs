//! What this processor can do, found once at run time.

use std::sync::OnceLock;

/// A line of the cache.
pub(crate) const LINE_BYTES: usize = 64;

/// Instruction set a kernel runs on. Ordered: a processor that has one has all before it.
///
/// Which one is used travels with the [`crate::Pool`] (`pool.level()`), so a test can run any op at any level this
/// machine has, beside other tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Portable Rust with 8 lanes; the compiler may still use SSE2.
    Scalar,
    /// Portable Rust with 16 lanes and AVX-512's tile shapes: lets a machine without AVX-512 test everything about the
    /// AVX-512 kernels but the instructions themselves.
    Scalar16,
    /// AVX2 with FMA and F16C: 8 lanes.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI: 16 lanes. Processors without VNNI (Skylake-X) count as [`Level::Avx2`].
    Avx512,
}

impl Level {
    /// This level, or the best one this machine has if it lacks it. Every dispatch goes through here, which is what makes
    /// calling instruction-set specific code sound.
    #[inline]
    pub fn available(self) -> Level {
        self.min(features().level)
    }

    /// f32 in a register.
    pub fn lanes(self) -> usize {
        match self {
            Level::Scalar | Level::Avx2 => 8,
            Level::Scalar16 | Level::Avx512 => 16,
        }
    }

    /// Every level this machine can run, slowest first. For tests.
    pub fn all_available() -> Vec<Level> {
        let all = [Level::Scalar, Level::Scalar16, Level::Avx2, Level::Avx512];
        all.into_iter().filter(|&level| level <= features().level).collect()
    }
}

/// What this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Best level.
    pub level: Level,
    /// AVX512-BF16: products of bf16 pairs summed in f32. Only with [`Level::Avx512`].
    pub bf16: bool,
    /// Whether those are faster than f32: so on AMD's processors; on Intel's `vdpbf16ps` takes four times as long as an FMA
    /// (measured on Emerald Rapids: 218 GFLOP/s of bf16, 443 of f32), since their place for bf16 is AMX.
    pub bf16_fast: bool,
    /// VNNI: int16 and int8 products summed in int32 in one instruction. Part of [`Level::Avx512`].
    pub vnni: bool,
}

/// Features of this processor; detected on the first call.
#[inline]
pub fn features() -> Features {
    static FEATURES: OnceLock<Features> = OnceLock::new();
    *FEATURES.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Features {
    use std::arch::is_x86_feature_detected as has;
    let avx2 = has!("avx2") && has!("fma") && has!("f16c");
    let avx512 = avx2
        && has!("avx512f")
        && has!("avx512bw")
        && has!("avx512dq")
        && has!("avx512vl")
        && has!("avx512vnni");
    let level = match (avx2, avx512) {
        (_, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, false) => Level::Scalar16,
    };
    let bf16 = avx512 && has!("avx512bf16");
    Features { level, bf16, bf16_fast: bf16 && is_amd(), vnni: avx512 }
}

/// CPUID leaf 0 spells the maker's name in ebx, edx, ecx.
#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Features {
    Features { level: Level::Scalar16, bf16: false, bf16_fast: false, vnni: false }
}

/// One line for the start-up message, e.g. `avx512 bf16 vnni` or `avx2`.
pub fn describe() -> String {
    let Features { level, bf16, vnni, .. } = features();
    let mut text = match level {
        Level::Scalar | Level::Scalar16 => "scalar",
        Level::Avx2 => "avx2",
        Level::Avx512 => "avx512",
    }
    .to_string();
    for (name, has) in [("bf16", bf16), ("vnni", vnni)] {
        if has {
            text.push(' ');
            text.push_str(name);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_clamped_to_the_machine() {
        assert_eq!(Level::Scalar.available(), Level::Scalar);
        assert!(Level::Avx512.available() <= features().level);
        assert!(Level::all_available().contains(&features().level));
        assert!(!describe().is_empty());
    }
}
