//! [`WeightKind`]: how weights are stored in files, and the plain way to read them.
//!
//! The quantized kinds are GGML's (<https://github.com/ggml-org/ggml>): runs of 32 weights of one row with shared f16
//! scale d, and for Q4_1 an f16 minimum m.
//!
//! | kind | block | weight k |
//! |---|---|---|
//! | Q8_0 | d, 32 × i8 | d·q |
//! | Q4_0 | d, 16 × u8 | d·(nibble − 8) |
//! | Q4_1 | d, m, 16 × u8 | d·nibble + m |
//!
//! Byte i of a 4-bit block holds weight i in its low nibble and weight i + 16 in its high one. All little-endian.

use half::{bf16, f16};

/// Weights that share a scale in the quantized kinds.
pub(super) const BLOCK: usize = 32;

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
}

impl WeightKind {
    /// Every kind.
    pub const ALL: [WeightKind; 6] = [Self::F32, Self::Bf16, Self::F16, Self::Q8_0, Self::Q4_0, Self::Q4_1];

    /// Weights in the smallest unit of storage; the length of a row is a multiple of it.
    pub fn block_elems(self) -> usize {
        if self.is_quantized() { BLOCK } else { 1 }
    }

    /// Bytes of that unit.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
        }
    }

    /// Bytes of `n_elems` weights; `None` if they are no whole number of blocks or the count overflows.
    pub fn bytes(self, n_elems: usize) -> Option<usize> {
        let whole = n_elems.is_multiple_of(self.block_elems());
        whole.then(|| (n_elems / self.block_elems()).checked_mul(self.block_bytes())).flatten()
    }

    /// Whether weights share scales in blocks.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1)
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
            Self::F16 => blocks.for_each(|(b, w)| w[0] = half_at(b, 0)),
            Self::Q8_0 => blocks.for_each(|(b, w)| {
                let d = half_at(b, 0);
                w.iter_mut().zip(&b[2..]).for_each(|(w, &q)| *w = d * f32::from(q as i8));
            }),
            Self::Q4_0 => blocks.for_each(|(b, w)| {
                let d = half_at(b, 0);
                w.iter_mut().enumerate().for_each(|(k, w)| *w = d * (f32::from(nibble(&b[2..], k)) - 8.0));
            }),
            Self::Q4_1 => blocks.for_each(|(b, w)| {
                let (d, m) = (half_at(b, 0), half_at(b, 1));
                w.iter_mut().enumerate().for_each(|(k, w)| *w = d * f32::from(nibble(&b[4..], k)) + m);
            }),
        }
    }

    /// The stored form of `weights` (whole blocks), rounded to nearest: for tests and conversions.
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
                Self::Q8_0 => push_q8_0(&mut bytes, w),
                Self::Q4_0 => {
                    let amax = w.iter().fold(0.0f32, |a, &x| if x.abs() > a.abs() { x } else { a });
                    push_q4(&mut bytes, w, amax / -8.0, None);
                }
                Self::Q4_1 => {
                    let min = w.iter().copied().fold(f32::INFINITY, f32::min);
                    let max = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    push_q4(&mut bytes, w, (max - min) / 15.0, Some(min));
                }
            }
        }
        bytes
    }
}

/// Half `i` of a block's header.
pub(super) fn half_at(block: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([block[2 * i], block[2 * i + 1]]).to_f32()
}

/// 4-bit value `k` of a block's 16 bytes.
pub(super) fn nibble(bytes: &[u8], k: usize) -> u8 {
    (bytes[k % 16] >> (4 * (k / 16))) & 15
}

fn push_q8_0(bytes: &mut Vec<u8>, w: &[f32]) {
    let d = w.iter().fold(0.0f32, |a, x| a.max(x.abs())) / 127.0;
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(w.iter().map(|x| (x * inverse(d)).round() as i8 as u8));
}

/// A 4-bit block with scale `d`, and minimum if the kind has one; without it the zero point is 8.
fn push_q4(bytes: &mut Vec<u8>, w: &[f32], d: f32, min: Option<f32>) {
    bytes.extend(f16::from_f32(d).to_le_bytes());
    if let Some(min) = min {
        bytes.extend(f16::from_f32(min).to_le_bytes());
    }
    let q = |x: f32| match min {
        Some(min) => ((x - min) * inverse(d)).round().clamp(0.0, 15.0) as u8,
        None => (x * inverse(d) + 8.0).round().clamp(0.0, 15.0) as u8,
    };
    bytes.extend((0..BLOCK / 2).map(|i| q(w[i]) | q(w[i + BLOCK / 2]) << 4));
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
