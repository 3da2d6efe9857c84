//! Rotary position embedding (Su et al. 2021), in Hugging Face's rotate-half order.
//!
//! With `θ_i = position · base^(-2i/d)`, for i in 0..d/2 of every head:
//! `y_i = x_i · cos θ_i - x_{i+d/2} · sin θ_i`, `y_{i+d/2} = x_{i+d/2} · cos θ_i + x_i · sin θ_i`.
//!
//! Backward is the rotation by `-θ`.

use std::sync::OnceLock;

use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use crate::split::piece;
use crate::{Buf, Pool};

/// Rows one task takes.
const TASK_ROWS: usize = 64;

/// Positions whose cosines and sines are computed together.
const CHUNK_POSITIONS: usize = 256;

/// Cosines and sines of positions, computed when a position near is first asked for: those of a long context that
/// nobody uses take no memory.
#[derive(Clone, Debug)]
pub struct RopeTable {
    n_positions: usize,
    frequencies: Vec<f64>,
    attention_factor: f64,
    chunks: Box<[OnceLock<Chunk>]>,
}

/// Of [`CHUNK_POSITIONS`] positions, `[t, d/2]` each.
#[derive(Clone, Debug)]
struct Chunk {
    cos_td: Buf<f32>,
    sin_td: Buf<f32>,
}

impl RopeTable {
    /// Positions `0..n_positions` of heads `head_width` wide. Computed in f64: in f32 the angle is off by 1e-3 after
    /// ten thousand positions.
    pub fn new(n_positions: usize, head_width: usize, base: f32) -> Self {
        assert!(head_width.is_multiple_of(2), "rope: odd head width {head_width}");
        let frequency = |i: usize| f64::from(base).powf(-2.0 * i as f64 / head_width as f64);
        let frequencies: Vec<f64> = (0..head_width / 2).map(frequency).collect();
        Self::from_frequencies(n_positions, &frequencies, 1.0)
    }

    /// As [`RopeTable::new`], with `θ_i = position · frequencies[i]`, and cosines and sines times `attention_factor`: what
    /// the scaled variants for long contexts (linear, Llama 3, YaRN) come down to. Heads are twice as wide as there are
    /// frequencies.
    pub fn from_frequencies(n_positions: usize, frequencies: &[f64], attention_factor: f64) -> Self {
        let n_chunks = n_positions.div_ceil(CHUNK_POSITIONS);
        Self {
            n_positions,
            frequencies: frequencies.to_vec(),
            attention_factor,
            chunks: std::iter::repeat_with(OnceLock::new).take(n_chunks).collect(),
        }
    }

    pub(crate) fn n_positions(&self) -> usize {
        self.n_positions
    }

    fn head_width(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Cosines and sines of a position, `d/2` each.
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let (chunk, i) = (position / CHUNK_POSITIONS, position % CHUNK_POSITIONS);
        let chunk = self.chunks[chunk].get_or_init(|| self.chunk(chunk * CHUNK_POSITIONS));
        let half = self.frequencies.len();
        (&chunk.cos_td[i * half..][..half], &chunk.sin_td[i * half..][..half])
    }

    #[cold]
    fn chunk(&self, first: usize) -> Chunk {
        let half = self.frequencies.len();
        let n_positions = CHUNK_POSITIONS.min(self.n_positions - first);
        let mut chunk =
            Chunk { cos_td: Buf::zeroed(n_positions * half), sin_td: Buf::zeroed(n_positions * half) };
        for p in 0..n_positions {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = ((first + p) as f64 * frequency).sin_cos();
                chunk.cos_td[p * half + i] = (self.attention_factor * cos) as f32;
                chunk.sin_td[p * half + i] = (self.attention_factor * sin) as f32;
            }
        }
        chunk
    }
}

/// The heads to rotate: the first `n_heads` of every row of a matrix `stride` wide. Row i has position `i % n_positions`.
#[derive(Clone, Copy, Debug)]
pub struct RopeDims {
    /// t
    pub n_positions: usize,
    /// Heads to rotate: queries and keys stand side by side and are rotated together.
    pub n_heads: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// By θ.
    Forward,
    /// By -θ: the gradient.
    Backward,
}

/// Plain reference of one head at one position.
pub fn rope_reference(x_d: &mut [f32], position: usize, base: f32) {
    let half = x_d.len() / 2;
    for i in 0..half {
        let angle = position as f64 * f64::from(base).powf(-(i as f64) / half as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        let (a, b) = (x_d[i], x_d[half + i]);
        (x_d[i], x_d[half + i]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// Rotates in place.
pub fn rope(pool: &Pool, x_n: &mut [f32], dims: RopeDims, table: &RopeTable, turn: Turn) {
    let RopeDims { n_positions, n_heads, stride } = dims;
    assert!(n_heads * table.head_width() <= stride && stride > 0, "rope: heads are wider than the row");
    assert!(n_positions > 0 && n_positions <= table.n_positions(), "rope: the table is too short");
    assert!(x_n.len().is_multiple_of(stride), "rope: not whole rows");
    let n = x_n.len() / stride;
    let x = Disjoint::new(x_n);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let x = unsafe { x.slice(rows.start * stride..rows.end * stride) };
        rotate(pool.level(), x, rows.start, dims, table, turn);
    });
}

dispatch!(pub(crate) fn rotate(x_n: &mut [f32], first: usize, dims: RopeDims, table: &RopeTable, turn: Turn) = rotate_simd);
#[inline(always)]
fn rotate_simd<S: Simd>(s: S, x_n: &mut [f32], first: usize, dims: RopeDims, table: &RopeTable, turn: Turn) {
    let d = table.head_width();
    let half = d / 2;
    let sign = s.splat(if turn == Turn::Forward { 1.0 } else { -1.0 });
    for (i, x) in x_n.chunks_exact_mut(dims.stride).enumerate() {
        let position = (first + i) % dims.n_positions;
        let (cos_d, sin_d) = table.row(position);
        for head in x[..dims.n_heads * d].chunks_exact_mut(d) {
            let (low, high) = head.split_at_mut(half);
            let angles = cos_d.chunks(S::LANES).zip(sin_d.chunks(S::LANES));
            let pairs = low.chunks_mut(S::LANES).zip(high.chunks_mut(S::LANES));
            for ((cos, sin), (low, high)) in angles.zip(pairs) {
                let (cos, sin) = (s.load(cos), s.mul(s.load(sin), sign));
                let (a, b) = (s.load(low), s.load(high));
                s.store(low, s.sub(s.mul(a, cos), s.mul(b, sin)));
                s.store(high, s.fma(a, sin, s.mul(b, cos)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, every_pool, numbers};

    #[test]
    fn turns_heads_forward_and_back() {
        for (t, n_heads, d, stride) in [(5, 1, 2, 2), (70, 3, 12, 40), (9, 2, 64, 200)] {
            let n = 2 * t;
            let x = numbers(1, n * stride);
            let mut expected = x.clone();
            for (i, row) in expected.chunks_mut(stride).enumerate() {
                row[..n_heads * d].chunks_mut(d).for_each(|head| rope_reference(head, i % t, 1e4));
            }
            let table = RopeTable::new(t, d, 1e4);
            let dims = RopeDims { n_positions: t, n_heads, stride };
            for pool in every_pool() {
                let mut y = x.clone();
                rope(&pool, &mut y, dims, &table, Turn::Forward);
                assert_close(&y, &expected, 1e-5);
                rope(&pool, &mut y, dims, &table, Turn::Backward);
                assert_close(&y, &x, 1e-5); // a rotation's transpose is its inverse
            }
        }
    }

    /// Linear scaling by two is a position half as far, and the factor scales queries and keys.
    #[test]
    fn frequencies_and_factor_are_the_callers() {
        let (t, d, factor) = (9, 12, 1.25);
        let halved: Vec<f64> = (0..d / 2).map(|i| 1e4_f64.powf(-2.0 * i as f64 / d as f64) / 2.0).collect();
        let (full, scaled) = (RopeTable::new(t, d, 1e4), RopeTable::from_frequencies(2 * t, &halved, factor));
        let x = numbers(1, d);
        for position in 0..t {
            let mut expected = x.clone();
            rope_reference(&mut expected, position, 1e4);
            expected.iter_mut().for_each(|x| *x *= factor as f32);
            let mut y = x.clone();
            let dims = RopeDims { n_positions: 2 * t, n_heads: 1, stride: d };
            rotate(crate::cpu::Level::Avx512, &mut y, 2 * position, dims, &scaled, Turn::Forward);
            assert_close(&y, &expected, 1e-5);
        }
        assert_eq!((full.n_positions(), scaled.n_positions()), (t, 2 * t));
    }
}
