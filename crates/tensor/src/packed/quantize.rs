//! From f32 weights to stored blocks.
//!
//! Kinds of 32-weight blocks take their scale from the extremes and round each weight to nearest. Kinds of 256-weight
//! blocks look for the scales of their groups: for some numbers of steps near the full range, weights are rounded, the
//! scale (and minimum) that fits the rounded weights best is solved for, and the pair with the least squared error is kept.

use super::blocks::pack_six_bits;
use super::kind::{BLOCK, SUPER, WeightKind};
use half::f16;

/// Appends the block of `w`.
pub(super) fn push_block(kind: WeightKind, w: &[f32], bytes: &mut Vec<u8>) {
    match kind {
        WeightKind::Q8_0 => push_q8_0(bytes, w),
        WeightKind::Q4_0 | WeightKind::Q5_0 => push_symmetric(kind, bytes, w),
        WeightKind::Q4_1 | WeightKind::Q5_1 => push_with_min(kind, bytes, w),
        WeightKind::Q4_K => push_k(bytes, w, 15),
        WeightKind::Q5_K => push_k(bytes, w, 31),
        WeightKind::Q6_K => push_q6_k(bytes, w),
        WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => unreachable!("floats have no blocks"),
    }
}

fn push_q8_0(bytes: &mut Vec<u8>, w: &[f32]) {
    let d = w.iter().fold(0.0f32, |a, x| a.max(x.abs())) / 127.0;
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(w.iter().map(|x| (x * inverse(d)).round() as i8 as u8));
}

/// The weight of the largest magnitude becomes the lowest integer, which has no positive counterpart.
fn push_symmetric(kind: WeightKind, bytes: &mut Vec<u8>, w: &[f32]) {
    let zero = if kind == WeightKind::Q4_0 { 8.0 } else { 16.0 };
    let d = largest(w) / -zero;
    bytes.extend(f16::from_f32(d).to_le_bytes());
    let q = round(w, |x| x * inverse(d) + zero, 2.0 * zero - 1.0);
    push_bits(bytes, &q, kind == WeightKind::Q5_0);
}

fn push_with_min(kind: WeightKind, bytes: &mut Vec<u8>, w: &[f32]) {
    let q_max = if kind == WeightKind::Q4_1 { 15.0 } else { 31.0 };
    let [min, max] = extremes(w);
    let d = (max - min) / q_max;
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(f16::from_f32(min).to_le_bytes());
    push_bits(bytes, &round(w, |x| (x - min) * inverse(d), q_max), kind == WeightKind::Q5_1);
}

/// The fifth bits if there are any, then the nibbles.
fn push_bits(bytes: &mut Vec<u8>, q: &[u8], fifth: bool) {
    if fifth {
        let bits = q.iter().enumerate().fold(0u32, |bits, (k, q)| bits | u32::from(q >> 4) << k);
        bytes.extend(bits.to_le_bytes());
    }
    bytes.extend((0..BLOCK / 2).map(|i| q[i] & 15 | (q[i + BLOCK / 2] & 15) << 4));
}

/// A Q4_K or Q5_K block: `q_max` is 15 or 31.
fn push_k(bytes: &mut Vec<u8>, w: &[f32], q_max: u8) {
    let fits: Vec<Fit> = w.chunks_exact(BLOCK).map(|w| Fit::with_min(w, f32::from(q_max))).collect();
    let [d, e] = [|fit: &Fit| fit.a, |fit: &Fit| -fit.b]
        .map(|part| f16::from_f32(fits.iter().map(part).fold(0.0, f32::max) / 63.0));
    let six = |x: f32, unit: f16| (x * inverse(unit.to_f32())).round().clamp(0.0, 63.0) as u8;
    let s: [u8; 8] = std::array::from_fn(|g| six(fits[g].a, d));
    let t: [u8; 8] = std::array::from_fn(|g| six(-fits[g].b, e));
    let mut q = Vec::with_capacity(SUPER);
    for (g, w) in w.chunks_exact(BLOCK).enumerate() {
        let (a, m) = (d.to_f32() * f32::from(s[g]), e.to_f32() * f32::from(t[g]));
        q.extend(round(w, |x| (x + m) * inverse(a), f32::from(q_max)));
    }
    bytes.extend(d.to_le_bytes());
    bytes.extend(e.to_le_bytes());
    bytes.extend(pack_six_bits(&s, &t));
    if q_max > 15 {
        bytes.extend((0..BLOCK).map(|k| (0..8).fold(0, |bits, g| bits | (q[g * BLOCK + k] >> 4) << g)));
    }
    for pair in q.chunks_exact(2 * BLOCK) {
        bytes.extend((0..BLOCK).map(|k| pair[k] & 15 | (pair[BLOCK + k] & 15) << 4));
    }
}

fn push_q6_k(bytes: &mut Vec<u8>, w: &[f32]) {
    let fits: Vec<Fit> = w.chunks_exact(BLOCK / 2).map(|w| Fit::symmetric(w, 32.0)).collect();
    let scales: Vec<f32> = fits.iter().map(|fit| fit.a).collect();
    let d = f16::from_f32(largest(&scales) / -128.0);
    let s: Vec<i8> =
        scales.iter().map(|a| (a * inverse(d.to_f32())).round().clamp(-128.0, 127.0) as i8).collect();
    let mut q = Vec::with_capacity(SUPER);
    for (w, &s) in w.chunks_exact(BLOCK / 2).zip(&s) {
        let a = d.to_f32() * f32::from(s);
        q.extend(round(w, |x| x * inverse(a) + 32.0, 63.0));
    }
    let halves = || q.chunks_exact(SUPER / 2);
    for q in halves() {
        bytes.extend((0..2 * BLOCK).map(|i| q[i] & 15 | (q[i + 2 * BLOCK] & 15) << 4));
    }
    for q in halves() {
        bytes.extend((0..BLOCK).map(|k| (0..4).fold(0, |bits, g| bits | (q[g * BLOCK + k] >> 4) << (2 * g))));
    }
    bytes.extend(s.iter().map(|&s| s as u8));
    bytes.extend(d.to_le_bytes());
}

/// Scale and offset of a group before they are rounded themselves.
#[derive(Clone, Copy)]
struct Fit {
    a: f32,
    b: f32,
    error: f32,
}

/// Full ranges to try: q_max and somewhat less or more, in steps of a tenth, since cutting off one extreme can serve
/// the others.
const TRIES: std::ops::RangeInclusive<i32> = -10..=20;

impl Fit {
    /// w ≈ a·q + b with q in 0..=q_max and b <= 0, as the formats have it.
    fn with_min(w: &[f32], q_max: f32) -> Self {
        let [min, max] = extremes(w);
        let min = min.min(0.0);
        let mut best = Self { a: 0.0, b: min, error: f32::INFINITY };
        for step in TRIES {
            let inverse = inverse(max - min) * (q_max + 0.1 * step as f32);
            let q = round(w, |x| (x - min) * inverse, q_max);
            let [mut sq, mut sqq, mut sx, mut sqx] = [0.0f32; 4];
            for (&x, &q) in w.iter().zip(&q) {
                let q = f32::from(q);
                (sq, sqq, sx, sqx) = (sq + q, sqq + q * q, sx + x, sqx + q * x);
            }
            if sqq == 0.0 {
                continue;
            }
            let n = w.len() as f32;
            let determinant = n * sqq - sq * sq;
            let b = (sqq * sx - sq * sqx) / determinant;
            // Weights that are all alike, or of which none is negative: a line through 0.
            let (a, b) = match determinant > 0.0 && b <= 0.0 {
                true => ((n * sqx - sq * sx) / determinant, b),
                false => (sqx / sqq, 0.0),
            };
            best.take_if_better(w, &q, a, b);
        }
        best
    }

    /// w ≈ a·(q − zero) with q in 0..2·zero; a has either sign.
    fn symmetric(w: &[f32], zero: f32) -> Self {
        let amax = largest(w);
        let mut best = Self { a: 0.0, b: 0.0, error: f32::INFINITY };
        for step in TRIES {
            let inverse = inverse(amax) * -(zero + 0.1 * step as f32);
            let q = round(w, |x| x * inverse + zero, 2.0 * zero - 1.0);
            let centred = |q: u8| f32::from(q) - zero;
            let sqx: f32 = w.iter().zip(&q).map(|(x, &q)| x * centred(q)).sum();
            let sqq: f32 = q.iter().map(|&q| centred(q) * centred(q)).sum();
            if sqq > 0.0 {
                let a = sqx / sqq;
                best.take_if_better(w, &q, a, -zero * a);
            }
        }
        best
    }

    fn take_if_better(&mut self, w: &[f32], q: &[u8], a: f32, b: f32) {
        let error = w.iter().zip(q).map(|(x, &q)| (a * f32::from(q) + b - x).powi(2)).sum();
        if error < self.error {
            *self = Self { a, b, error };
        }
    }
}

/// Every weight through `to_q`, rounded to an integer of 0..=q_max.
fn round(w: &[f32], to_q: impl Fn(f32) -> f32, q_max: f32) -> Vec<u8> {
    w.iter().map(|&x| to_q(x).round().clamp(0.0, q_max) as u8).collect()
}

/// The element of the largest magnitude.
fn largest(w: &[f32]) -> f32 {
    w.iter().fold(0.0f32, |a, &x| if x.abs() > a.abs() { x } else { a })
}

fn extremes(w: &[f32]) -> [f32; 2] {
    let min = w.iter().copied().fold(f32::INFINITY, f32::min);
    [min, w.iter().copied().fold(f32::NEG_INFINITY, f32::max)]
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
