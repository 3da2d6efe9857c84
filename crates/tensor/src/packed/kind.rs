//! [`WeightKind`]: how weights are stored in files.
//!
//! The quantized kinds are GGML's (<https://github.com/ggml-org/ggml>): every weight is w = a·q + b with a small integer q
//! and a, b shared by a group of 16 or 32 weights of one row. What a file stores for them ([`blocks`]):
//!
//! | kind | weights a block | block | q | a | b |
//! |---|---|---|---|---|---|
//! | Q8_0 | 32 | d, 32 × i8 | byte + 128 | d | −128·d |
//! | Q4_0 | 32 | d, 16 × u8 | 4 bits | d | −8·d |
//! | Q4_1 | 32 | d, m, 16 × u8 | 4 bits | d | m |
//! | Q5_0 | 32 | d, u32 of fifth bits, 16 × u8 | 5 bits | d | −16·d |
//! | Q5_1 | 32 | d, m, u32 of fifth bits, 16 × u8 | 5 bits | d | m |
//! | Q4_K | 256 | d, e, 12 bytes of 6-bit s and t, 128 × u8 | 4 bits | d·s | −e·t |
//! | Q5_K | 256 | d, e, 12 bytes of 6-bit s and t, 32 × u8 of fifth bits, 128 × u8 | 5 bits | d·s | −e·t |
//! | Q6_K | 256 | 128 × u8, 64 × u8 of upper bits, 16 × i8 s, d | 6 bits | d·s | −32·d·s |
//!
//! d, e and m are f16, everything is little-endian. Groups are of 32, Q6_K's of 16. a and b are exact in f32 and a·q is
//! too, so w is rounded once, if at all.

use super::blocks::Group;
use super::quantize;
use half::{bf16, f16};

/// Weights of one group as the kernels take them; the smallest block of a quantized kind.
pub(super) const BLOCK: usize = 32;

/// Weights of a block of the kinds whose name ends in K.
pub(super) const SUPER: usize = 256;

/// Storage type of a weight matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum WeightKind {
    /// 4-byte floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8 bits, blocks of 32 with an f16 scale.
    Q8_0,
    /// 4 bits, blocks of 32 with an f16 scale.
    Q4_0,
    /// 4 bits, blocks of 32 with an f16 scale and an f16 minimum.
    Q4_1,
    /// 5 bits, blocks of 32 with an f16 scale.
    Q5_0,
    /// 5 bits, blocks of 32 with an f16 scale and an f16 minimum.
    Q5_1,
    /// 4 bits, groups of 32 with 6-bit scales and minima, blocks of 256 with f16 units for those.
    Q4_K,
    /// 5 bits, otherwise as Q4_K.
    Q5_K,
    /// 6 bits, groups of 16 with 8-bit scales, blocks of 256 with an f16 unit for those.
    Q6_K,
}

impl WeightKind {
    /// Every kind.
    pub const ALL: [WeightKind; 11] = [
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Weights in the smallest unit of storage; the length of a row is a multiple of it.
    pub fn block_elems(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => BLOCK,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => SUPER,
        }
    }

    /// Bytes of that unit.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
            Self::Q5_0 => 2 + 4 + BLOCK / 2,
            Self::Q5_1 => 4 + 4 + BLOCK / 2,
            Self::Q4_K => 4 + 12 + SUPER / 2,
            Self::Q5_K => 4 + 12 + SUPER / 8 + SUPER / 2,
            Self::Q6_K => SUPER / 2 + SUPER / 4 + SUPER / 16 + 2,
        }
    }

    /// Bytes of `n_elems` weights; `None` if they are no whole number of blocks or the count overflows.
    pub fn bytes(self, n_elems: usize) -> Option<usize> {
        let whole = n_elems.is_multiple_of(self.block_elems());
        whole.then(|| (n_elems / self.block_elems()).checked_mul(self.block_bytes())).flatten()
    }

    /// Whether weights share scales in blocks.
    pub fn is_quantized(self) -> bool {
        self.block_elems() > 1
    }

    /// The name GGUF tools use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Widens stored weights to f32, exactly as the formulas above say.
    ///
    /// # Panics
    /// If `bytes` is not what `weights.len()` weights take.
    pub fn dequantize(self, bytes: &[u8], weights: &mut [f32]) {
        assert_eq!(
            self.bytes(weights.len()),
            Some(bytes.len()),
            "{} weights of kind {self:?}",
            weights.len()
        );
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(weights.chunks_exact_mut(self.block_elems()));
        match self {
            Self::F32 => blocks.for_each(|(b, w)| w[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::Bf16 => blocks.for_each(|(b, w)| w[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::F16 => blocks.for_each(|(b, w)| w[0] = f16::from_le_bytes([b[0], b[1]]).to_f32()),
            _ => blocks.for_each(|(b, w)| {
                w.chunks_exact_mut(BLOCK).enumerate().for_each(|(g, w)| Group::of(self, b, g).widen(w));
            }),
        }
    }

    /// The stored form of `weights` (whole blocks), each rounded to nearest where that is all there is to choose; the
    /// kinds with 256-weight blocks search for the scales with the least squared error.
    ///
    /// # Panics
    /// If `weights` is no whole number of blocks.
    pub fn quantize(self, weights: &[f32]) -> Vec<u8> {
        assert!(weights.len().is_multiple_of(self.block_elems()), "{} weights in {self:?}", weights.len());
        let mut bytes = Vec::with_capacity(self.bytes(weights.len()).expect("whole blocks"));
        for w in weights.chunks_exact(self.block_elems()) {
            match self {
                Self::F32 => bytes.extend(w[0].to_le_bytes()),
                Self::Bf16 => bytes.extend(bf16::from_f32(w[0]).to_le_bytes()),
                Self::F16 => bytes.extend(f16::from_f32(w[0]).to_le_bytes()),
                _ => quantize::push_block(self, w, &mut bytes),
            }
        }
        bytes
    }
}
