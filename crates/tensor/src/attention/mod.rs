//! Causal grouped-query attention over whole rows, for training.
//!
//! For every query head h with its key/value head g = h / (h/g), at position i that sees positions first_i to i:
//! `p_j = softmax_{first_i ≤ j ≤ i}(s · q_i · k_j)`, `out_i = Σ_j p_j v_j`. Mostly s is 1/√d. What is seen, a [`Mask`]
//! says: all of the row before, of the own document in a row of many, of a window.
//!
//! Backward (Dao et al. 2022, FlashAttention), with `D_i = dout_i · out_i` and `P` computed again from the kept
//! logarithm of the softmax's denominator: `dv_j = Σ_i P_ij dout_i`, `dS_ij = P_ij (dout_i · v_j - D_i)`,
//! `dq_i = s Σ_j dS_ij k_j`, `dk_j = s Σ_i dS_ij q_i`.
//!
//! Queries, keys and values stand side by side in one matrix `[n, (h + 2g)·d]`, as one matrix product makes them. A task
//! is one key/value head of one row with all its query heads: it owns its part of every output, so nothing is summed
//! across tasks. It works on tiles of queries; no `t×t` matrix exists. Keys before the first one that a tile sees cost nothing.

mod backward;
mod forward;
mod product;

use std::cell::RefCell;

use crate::cpu::LINE_BYTES;
use crate::pool::Disjoint;
use crate::simd::Simd;
use crate::{Buf, Pool};

/// Queries in a tile. A tile of probabilities has TILE · t · 4 B (32 KiB at t = 256).
const TILE: usize = 32;

thread_local! {
    /// Tiles of the task this thread works on; kept, so that a step allocates nothing after the first.
    static SCRATCH: RefCell<Buf<f32>> = RefCell::new(Buf::default());
}

/// The shape of one attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDims {
    /// b
    pub n_rows: usize,
    /// t
    pub n_positions: usize,
    /// h, a multiple of g.
    pub n_heads: usize,
    /// g
    pub n_kv_heads: usize,
    /// d
    pub head_width: usize,
    /// Factor of scores: 1/√d, but for models that say otherwise.
    pub scale: f32,
}

/// What a token sees of its row, besides itself: positions before it that are not masked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mask<'a> {
    /// `[b, t]`: where in its row the document of a token begins. Never after the token, and never decreasing in a row.
    /// `None`: every row is one document.
    pub starts_bt: Option<&'a [u32]>,
    /// Positions a token sees at most, itself included.
    pub window: Option<usize>,
}

impl Mask<'_> {
    /// The first position that position `i` of `row` sees.
    #[inline(always)]
    fn first(&self, dims: AttentionDims, row: usize, i: usize) -> usize {
        let start = self.starts_bt.map_or(0, |starts| starts[row * dims.n_positions + i] as usize);
        start.max(self.window.map_or(0, |window| (i + 1).saturating_sub(window)))
    }

    /// The tile of it.
    #[inline(always)]
    fn first_tile(&self, dims: AttentionDims, row: usize, i: usize) -> usize {
        self.first(dims, row, i) / TILE * TILE
    }

    fn check(&self, dims: AttentionDims) {
        assert!(self.window != Some(0), "attention: an empty window");
        let Some(starts_bt) = self.starts_bt else { return };
        assert_eq!(starts_bt.len(), dims.n_tokens(), "attention: starts");
        for starts_t in starts_bt.chunks_exact(dims.n_positions) {
            let ordered = starts_t.is_sorted() && starts_t.iter().enumerate().all(|(i, s)| *s as usize <= i);
            assert!(ordered, "attention: a document begins after one of its tokens");
        }
    }
}

impl AttentionDims {
    /// Width of a row of queries, keys and values: (h + 2g)·d.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_width
    }

    /// Width of a row of outputs: h·d.
    pub fn out_width(&self) -> usize {
        self.n_heads * self.head_width
    }

    fn n_tokens(&self) -> usize {
        self.n_rows * self.n_positions
    }

    fn heads_per_group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// The tiles of a group in the order in which they are computed: their heads and first queries.
    fn tiles(&self, group: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (per_group, t) = (self.heads_per_group(), self.n_positions);
        let heads = group * per_group..(group + 1) * per_group;
        heads.flat_map(move |h| (0..t).step_by(TILE).map(move |first| (h, first)))
    }

    /// Positions rounded up to whole tiles.
    fn padded_positions(&self) -> usize {
        self.n_positions.next_multiple_of(TILE)
    }

    /// From one row of transposed keys or values to the next: a cache line more than the positions, since rows that lie a power
    /// of two apart share a few places of the cache (64 rows of 2 KiB: 48 lines of the 128 that a product reads again and
    /// again).
    fn transposed_stride(&self) -> usize {
        self.padded_positions() + 16
    }

    /// Head width rounded up to what [`product::Product`] wants of columns.
    fn padded_width<S: Simd>(&self) -> usize {
        self.head_width.next_multiple_of(2 * S::LANES)
    }

    fn check(&self, qkv: &[f32], out: &[f32], lse: &[f32]) {
        let Self { n_rows, n_positions, n_heads, n_kv_heads, head_width, scale: _ } = *self;
        assert!(
            n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads),
            "attention: {n_heads} heads in {n_kv_heads} groups"
        );
        assert!(head_width > 0 && n_positions > 0, "attention: empty heads or rows");
        let n = self.n_tokens();
        assert_eq!(qkv.len(), n * self.qkv_width(), "attention: qkv");
        assert_eq!(out.len(), n * self.out_width(), "attention: out");
        assert_eq!(lse.len(), n_rows * n_heads * n_positions, "attention: lse");
    }
}

/// What the forward pass leaves for the backward pass.
#[derive(Clone, Copy)]
pub struct Attended<'a> {
    /// Queries, keys and values, `[n, (h + 2g)·d]`.
    pub qkv: &'a [f32],
    /// `[n, h·d]`
    pub out_nhd: &'a [f32],
    /// ln of the softmax's denominator, `[b, h, t]`.
    pub lse_bht: &'a [f32],
}

/// `out_nhd` from `qkv`; `lse_bht` is kept for [`attention_backward`].
///
/// # Panics
/// If a shape differs from `dims`, or a document of the mask begins after one of its tokens.
pub fn attention_forward(
    pool: &Pool,
    (dims, mask): (AttentionDims, Mask),
    out_nhd: &mut [f32],
    lse_bht: &mut [f32],
    qkv: &[f32],
) {
    dims.check(qkv, out_nhd, lse_bht);
    mask.check(dims);
    let job =
        forward::Job { dims, mask, qkv, out_nhd: Disjoint::new(out_nhd), lse_bht: Disjoint::new(lse_bht) };
    pool.run(dims.n_rows * dims.n_kv_heads, &|task| {
        let (row, group) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
        SCRATCH.with_borrow_mut(|scratch| forward::group(pool.level(), &job, row, group, scratch));
    });
}

/// `dqkv` (overwritten) from `dout_nhd`.
///
/// # Panics
/// As [`attention_forward`].
pub fn attention_backward(
    pool: &Pool,
    (dims, mask): (AttentionDims, Mask),
    dqkv: &mut [f32],
    attended: Attended,
    dout_nhd: &[f32],
) {
    dims.check(attended.qkv, attended.out_nhd, attended.lse_bht);
    assert!(
        dqkv.len() == attended.qkv.len() && dout_nhd.len() == attended.out_nhd.len(),
        "attention: gradients"
    );
    mask.check(dims);
    let job = backward::Job { dims, mask, attended, dout_nhd, dqkv: Disjoint::new(dqkv) };
    pool.run(dims.n_rows * dims.n_kv_heads, &|task| {
        let (row, group) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
        SCRATCH.with_borrow_mut(|scratch| backward::group(pool.level(), &job, row, group, scratch));
    });
}

/// Plain reference.
pub fn attention_reference((dims, mask): (AttentionDims, Mask), qkv: &[f32]) -> Vec<f32> {
    let (d, stride) = (dims.head_width, dims.qkv_width());
    let mut out_nhd = vec![0.0; dims.n_tokens() * dims.out_width()];
    for n in 0..dims.n_tokens() {
        let (row, i) = (n / dims.n_positions, n % dims.n_positions);
        let first = n - i + mask.first(dims, row, i);
        for h in 0..dims.n_heads {
            let g = h / dims.heads_per_group();
            let head = |n: usize, head: usize| &qkv[n * stride + head * d..][..d];
            let q = head(n, h);
            let scores = (first..=n).map(|j| {
                let k = head(j, dims.n_heads + g);
                q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>() * dims.scale
            });
            let scores: Vec<f32> = scores.collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = scores.iter().map(|x| (x - max).exp()).sum();
            for (j, score) in scores.iter().enumerate() {
                let p = (score - max).exp() / sum;
                let v = head(first + j, dims.n_heads + dims.n_kv_heads + g);
                let out = &mut out_nhd[n * dims.out_width() + h * d..][..d];
                out.iter_mut().zip(v).for_each(|(out, v)| *out += p * v);
            }
        }
    }
    out_nhd
}

/// Takes the first `len` elements off `rest`.
#[inline(always)]
fn take<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (first, others) = std::mem::take(rest).split_at_mut(len);
    *rest = others;
    first
}

/// Asks for the lines of `n` elements from `p` on, which are needed in some thousand cycles.
#[inline(always)]
fn ask_for<S: Simd>(s: S, p: *const f32, n: usize) {
    (0..n).step_by(LINE_BYTES / size_of::<f32>()).for_each(|i| s.prefetch_l2(p.wrapping_add(i)));
}

/// One head of some rows: where its first element is, how far its rows are apart, how many there are.
#[derive(Clone, Copy)]
struct Head<'a> {
    data: &'a [f32],
    stride: usize,
    n_rows: usize,
    width: usize,
}

impl Head<'_> {
    /// Copies the rows, `scale` times, to rows `to_stride` apart; the columns after the head's width become zeros, and so
    /// do rows up to the end of `to`.
    #[inline(always)]
    fn copy<S: Simd>(self, s: S, to: &mut [f32], to_stride: usize, scale: f32) {
        for (i, to) in to.chunks_exact_mut(to_stride).enumerate() {
            if i >= self.n_rows {
                to.fill(0.0);
                continue;
            }
            let from = &self.data[i * self.stride..][..self.width];
            let (to, padding) = to.split_at_mut(self.width);
            for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
                s.store(to, s.mul(s.load(from), s.splat(scale)));
            }
            padding.fill(0.0);
        }
    }

    /// Writes the transpose, `to_dt[j · to_stride + i]`; positions after the last become zeros.
    #[inline(always)]
    fn transpose<S: Simd>(self, s: S, to_dt: &mut [f32], to_stride: usize) {
        const BLOCK: usize = 8;
        assert!(to_stride.is_multiple_of(BLOCK) && to_dt.len() == self.width * to_stride);
        assert!(self.n_rows <= to_stride && self.data.len() >= (self.n_rows - 1) * self.stride + self.width);
        let whole = self.width - self.width % BLOCK;
        for i in (0..to_stride).step_by(BLOCK) {
            let n_lanes = self.n_rows.saturating_sub(i).min(BLOCK);
            for j in (0..whole).step_by(BLOCK) {
                // A block without rows is not read; its address must only be inside the slice.
                let from = &self.data[if n_lanes == 0 { 0 } else { i * self.stride + j }..];
                // SAFETY: rows i..i+n_lanes and columns j..j+8 are inside the head; in the transpose, rows j..j+8
                // and columns i..i+8 are inside `to_dt`.
                unsafe {
                    let to = to_dt.as_mut_ptr().add(j * to_stride + i);
                    s.transpose8_ptr(from.as_ptr(), self.stride, n_lanes, to, to_stride);
                }
            }
        }
        for j in whole..self.width {
            let to_t = &mut to_dt[j * to_stride..][..to_stride];
            to_t.fill(0.0);
            for (i, to) in to_t[..self.n_rows].iter_mut().enumerate() {
                *to = self.data[i * self.stride + j];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, every_pool, numbers};

    fn dims(
        n_rows: usize,
        n_positions: usize,
        n_heads: usize,
        n_kv_heads: usize,
        head_width: usize,
    ) -> AttentionDims {
        let scale = 1.0 / (head_width as f32).sqrt();
        AttentionDims { n_rows, n_positions, n_heads, n_kv_heads, head_width, scale }
    }

    /// Rows of documents that are `lengths` long, over and over; the last one is cut off.
    fn starts(dims: AttentionDims, lengths: &[usize]) -> Vec<u32> {
        let mut next = lengths.iter().cycle();
        let mut starts = Vec::new();
        for _ in 0..dims.n_rows {
            let row_end = starts.len() + dims.n_positions;
            while starts.len() < row_end {
                let (first, length) = (starts.len() + dims.n_positions - row_end, *next.next().unwrap());
                starts.extend(std::iter::repeat_n(first as u32, length.min(row_end - starts.len())));
            }
        }
        starts
    }

    /// Everything, windows, documents, and windows in documents.
    fn masks(starts_bt: &[u32]) -> [Mask<'_>; 5] {
        let starts = Some(starts_bt);
        [(None, None), (None, Some(1)), (None, Some(37)), (starts, None), (starts, Some(9))]
            .map(|(starts_bt, window)| Mask { starts_bt, window })
    }

    fn forward(pool: &Pool, (dims, mask): (AttentionDims, Mask), qkv: &[f32]) -> [Vec<f32>; 2] {
        let mut out = vec![9.0; dims.n_tokens() * dims.out_width()];
        let mut lse = vec![9.0; dims.n_rows * dims.n_heads * dims.n_positions];
        attention_forward(pool, (dims, mask), &mut out, &mut lse, qkv);
        [out, lse]
    }

    #[test]
    fn forward_matches_the_reference_on_every_level() {
        for dims in [
            dims(1, 1, 1, 1, 2),
            dims(2, 5, 2, 1, 6),
            dims(1, 32, 3, 3, 8),
            dims(2, 70, 6, 2, 20),
            dims(1, 200, 4, 2, 64),
        ] {
            let qkv: Vec<f32> =
                numbers(1, dims.n_tokens() * dims.qkv_width()).iter().map(|x| x * 3.0).collect();
            let starts = starts(dims, &[3, 40, 1, 77]);
            for mask in masks(&starts) {
                let expected = attention_reference((dims, mask), &qkv);
                for pool in every_pool() {
                    assert_close(&forward(&pool, (dims, mask), &qkv)[0], &expected, 1e-5);
                }
            }
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        for dims in [dims(2, 1, 1, 1, 2), dims(1, 40, 4, 2, 10), dims(1, 131, 2, 1, 16)] {
            let qkv: Vec<f32> =
                numbers(1, dims.n_tokens() * dims.qkv_width()).iter().map(|x| x * 2.0).collect();
            let dout = numbers(2, dims.n_tokens() * dims.out_width());
            let starts = starts(dims, &[3, 40, 1, 77]);
            for mask in masks(&starts) {
                let loss = |qkv: &[f32]| -> f64 {
                    let out = attention_reference((dims, mask), qkv);
                    out.iter().zip(&dout).map(|(out, dout)| f64::from(*out) * f64::from(*dout)).sum()
                };
                for pool in every_pool() {
                    let [out, lse] = forward(&pool, (dims, mask), &qkv);
                    let mut dqkv = vec![9.0; qkv.len()];
                    let attended = Attended { qkv: &qkv, out_nhd: &out, lse_bht: &lse };
                    attention_backward(&pool, (dims, mask), &mut dqkv, attended, &dout);
                    check_gradient(&qkv, &dqkv, loss);
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads_or_neighbours() {
        let one = dims(1, 45, 4, 2, 16);
        let three = AttentionDims { n_rows: 3, ..one };
        let qkv = numbers(1, three.n_tokens() * three.qkv_width());
        let plain = Mask::default();
        let all = every_pool().map(|pool| (pool.level(), forward(&pool, (three, plain), &qkv)));
        let all = all.collect::<Vec<_>>();
        for pair in all.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            assert_eq!(pair[0].1, pair[1].1);
        }
        let alone = forward(&Pool::new(1), (one, plain), &qkv[..one.n_tokens() * one.qkv_width()]);
        let among = forward(&Pool::new(1), (three, plain), &qkv);
        assert_eq!(alone[0], among[0][..alone[0].len()]);
    }

    #[test]
    fn large_scores_stay_finite() {
        let dims = dims(1, 64, 1, 1, 4);
        let qkv: Vec<f32> = numbers(1, dims.n_tokens() * dims.qkv_width()).iter().map(|x| x * 1e4).collect();
        for pool in every_pool() {
            let [out, lse] = forward(&pool, (dims, Mask::default()), &qkv);
            assert!(out.iter().chain(&lse).all(|x| x.is_finite()));
        }
    }

    #[test]
    #[should_panic(expected = "begins after")]
    fn a_document_that_begins_after_its_token_is_refused() {
        let dims = dims(1, 3, 1, 1, 2);
        let mask = Mask { starts_bt: Some(&[0, 2, 2]), window: None };
        forward(&Pool::new(1), (dims, mask), &[0.0; 3 * 6]);
    }
}
