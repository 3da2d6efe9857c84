//! [`Group`]: 32 weights of a quantized block, whatever its kind, as small integers with their scales.

use super::kind::{BLOCK, WeightKind};
use super::layout::Form;
use half::f16;

/// Bytes of the 6-bit scales and minima of a Q4_K or Q5_K block.
pub(super) const SIX_BIT_BYTES: usize = 12;

/// 32 weights of one row: weight k is a·q\[k\] + b, with the a and b of its half.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) kind: WeightKind,
    pub(super) q: [u8; BLOCK],
    /// The block's unit of scales.
    pub(super) d: f16,
    /// Of minima: m or e; 0 where the kind has none.
    pub(super) m: f16,
    /// What d is multiplied with for each half of 16; 1 where the kind has none.
    pub(super) s: [i8; 2],
    /// What e is multiplied with; 0 where the kind has none.
    pub(super) t: u8,
}

impl Group {
    /// Group `g` of a stored block.
    pub(super) fn of(kind: WeightKind, block: &[u8], g: usize) -> Self {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        let plain = |m: f16, q: [u8; BLOCK]| Self { kind, q, d: half(0), m, s: [1; 2], t: 0 };
        match kind {
            WeightKind::Q8_0 => plain(f16::ZERO, std::array::from_fn(|k| block[2 + k] ^ 0x80)),
            WeightKind::Q4_0 => plain(f16::ZERO, nibbles(&block[2..])),
            WeightKind::Q4_1 => plain(half(2), nibbles(&block[4..])),
            WeightKind::Q5_0 => plain(f16::ZERO, fifth_bits(nibbles(&block[6..]), &block[2..])),
            WeightKind::Q5_1 => plain(half(2), fifth_bits(nibbles(&block[8..]), &block[4..])),
            WeightKind::Q4_K | WeightKind::Q5_K => {
                let [s, t] = six_bits(&block[4..], g);
                let (upper, lower) = block[4 + SIX_BIT_BYTES..].split_at(block.len() - 16 - 128);
                // Groups 2i and 2i + 1 are the low and high nibbles of the same 32 bytes; bit g of upper byte k is theirs.
                let nibble = |k: usize| lower[g / 2 * BLOCK + k] >> (4 * (g % 2)) & 15;
                let fifth = |k: usize| upper.get(k).map_or(0, |bits| (bits >> g & 1) << 4);
                let q = std::array::from_fn(|k| nibble(k) | fifth(k));
                Self { kind, q, d: half(0), m: half(2), s: [s as i8; 2], t }
            }
            WeightKind::Q6_K => {
                let (lower, upper) = (&block[g / 4 * 64..], &block[128 + g / 4 * 32..]);
                // In each half of the block: 64 bytes of nibbles, low for groups 0 and 1, and 32 of four upper bits.
                let nibble = |k: usize| lower[g % 2 * BLOCK + k] >> (4 * (g % 4 / 2)) & 15;
                let q = std::array::from_fn(|k| nibble(k) | (upper[k] >> (2 * (g % 4)) & 3) << 4);
                let s = [block[192 + 2 * g] as i8, block[192 + 2 * g + 1] as i8];
                Self { kind, q, d: half(208), m: f16::ZERO, s, t: 0 }
            }
            WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => unreachable!("floats have no groups"),
        }
    }

    /// a and b of half `h`.
    pub(super) fn affine(&self, h: usize) -> (f32, f32) {
        let a = self.d.to_f32() * f32::from(self.s[h]);
        let b = match Form::of(self.kind) {
            Some(Form { min: true, k: true, .. }) => -self.m.to_f32() * f32::from(self.t),
            Some(Form { min: true, .. }) => self.m.to_f32(),
            Some(form) => -a * form.zero() as f32,
            None => 0.0,
        };
        (a, b)
    }

    /// The weights in f32.
    pub(super) fn widen(&self, w: &mut [f32]) {
        let halves = w.chunks_exact_mut(BLOCK / 2).zip(self.q.chunks_exact(BLOCK / 2));
        for (h, (w, q)) in halves.enumerate() {
            let (a, b) = self.affine(h);
            w.iter_mut().zip(q).for_each(|(w, &q)| *w = a * f32::from(q) + b);
        }
    }
}

/// Byte i holds weight i in its low nibble and weight i + 16 in its high one.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|k| bytes[k % 16] >> (4 * (k / 16)) & 15)
}

/// Adds bit k of `bits` as the fifth of weight k.
fn fifth_bits(mut q: [u8; BLOCK], bits: &[u8]) -> [u8; BLOCK] {
    q.iter_mut().enumerate().for_each(|(k, q)| *q |= (bits[k / 8] >> (k % 8) & 1) << 4);
    q
}

/// Scale and minimum of group `g`: the first four of each are the low 6 bits of bytes 0..4 and 4..8; of the others,
/// bytes 8..12 hold the low nibbles and the top bits of the first eight bytes the two bits above.
fn six_bits(bytes: &[u8], g: usize) -> [u8; 2] {
    match g {
        0..4 => [bytes[g] & 63, bytes[g + 4] & 63],
        _ => [bytes[g + 4] & 15 | bytes[g - 4] >> 6 << 4, bytes[g + 4] >> 4 | bytes[g] >> 6 << 4],
    }
}

/// The inverse of [`six_bits`].
pub(super) fn pack_six_bits(s: &[u8; 8], t: &[u8; 8]) -> [u8; SIX_BIT_BYTES] {
    let mut bytes = [0; SIX_BIT_BYTES];
    for g in 0..4 {
        bytes[g] = s[g] | s[g + 4] >> 4 << 6;
        bytes[g + 4] = t[g] | t[g + 4] >> 4 << 6;
        bytes[g + 8] = s[g + 4] & 15 | (t[g + 4] & 15) << 4;
    }
    bytes
}
