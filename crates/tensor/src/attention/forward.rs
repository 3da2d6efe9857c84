//! Forward of one key/value head of one row.

use std::ops::Range;

use super::product::Product;
use super::{AttentionDims, Head, Mask, TILE, ask_for, take};
use crate::Buf;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};

/// Below every score, yet `e^(MASKED - max)` is computed without infinities.
pub(super) const MASKED: f32 = -1e30;

/// What the tasks share.
pub(super) struct Job<'a> {
    pub(super) dims: AttentionDims,
    pub(super) mask: Mask<'a>,
    pub(super) qkv: &'a [f32],
    pub(super) out_nhd: Disjoint<'a, f32>,
    pub(super) lse_bht: Disjoint<'a, f32>,
}

dispatch!(pub(super) fn group(job: &Job, row: usize, group: usize, scratch: &mut Buf<f32>) = group_simd);
#[inline(always)]
fn group_simd<S: Simd>(s: S, job: &Job, row: usize, group: usize, scratch: &mut Buf<f32>) {
    let dims = job.dims;
    let (t, d) = (dims.n_positions, dims.head_width);
    let (t_padded, d_padded) = (dims.padded_positions(), dims.padded_width::<S>());
    let keys_stride = dims.transposed_stride();
    scratch.reserve_scratch(d * keys_stride + (t_padded + TILE) * d_padded + TILE * (d + t_padded));
    let mut rest = &mut scratch[..];
    let keys_dt = take(&mut rest, d * keys_stride);
    let values_td = take(&mut rest, t_padded * d_padded);
    let query = take(&mut rest, TILE * d);
    let p = take(&mut rest, TILE * t_padded);
    let out = take(&mut rest, TILE * d_padded);

    let head = |head: usize, first: usize, n_rows: usize| {
        let at = (row * t + first) * dims.qkv_width() + head * d;
        Head { data: &job.qkv[at..], stride: dims.qkv_width(), n_rows, width: d }
    };
    head(dims.n_heads + group, 0, t).transpose(s, keys_dt, keys_stride);
    head(dims.n_heads + dims.n_kv_heads + group, 0, t).copy(s, values_td, d_padded, 1.0);
    let mut tiles = dims.tiles(group).peekable();
    while let Some((h, first)) = tiles.next() {
        let n_queries = TILE.min(t - first);
        let next = tiles.peek().map(|&(h, first)| head(h, first, 1).data.as_ptr());
        // Whole tiles: what is too far back, and the padding, is masked.
        let first_key = job.mask.first_tile(dims, row, first);
        let n_keys = first + TILE - first_key;
        head(h, first, n_queries).copy(s, query, d, dims.scale);
        let scores = [TILE, n_keys, d];
        let keys = &keys_dt[first_key..];
        Product { a: query, a_row: d, a_col: 1, b: keys, b_stride: keys_stride, dims: scores }
            .run(s, p, t_padded, false);
        let lse_at = (row * dims.n_heads + h) * t + first;
        // SAFETY: this task alone has this head of this row.
        let lse = unsafe { job.lse_bht.slice(lse_at..lse_at + n_queries) };
        let out_at = |i: usize| (row * t + first + i) * dims.out_width() + h * d;
        let mut scales = [0.0; TILE];
        for i in 0..n_queries {
            ask_for(s, job.out_nhd.as_ptr().wrapping_add(out_at(i)), d);
            if let Some(query) = next {
                ask_for(s, query.wrapping_add(i * dims.qkv_width()), d);
            }
            let p = &mut p[i * t_padded..][..n_keys];
            let seen = job.mask.first(dims, row, first + i) - first_key..first + i + 1 - first_key;
            (lse[i], scales[i]) = softmax(s, p, seen);
        }
        Product {
            a: p,
            a_row: t_padded,
            a_col: 1,
            b: &values_td[first_key * d_padded..],
            b_stride: d_padded,
            dims: [TILE, d_padded, n_keys],
        }
        .run(s, out, d_padded, false);
        for i in 0..n_queries {
            // SAFETY: as above.
            let to = unsafe { job.out_nhd.slice(out_at(i)..out_at(i) + d) };
            let from = &out[i * d_padded..][..d];
            for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
                s.store(to, s.mul(s.load(from), s.splat(scales[i])));
            }
        }
    }
}

/// Turns scores into `e^(score - max)`, those outside of `seen` into zeros. Gives ln Σ e^score and 1 / Σ e^(score - max).
#[inline(always)]
fn softmax<S: Simd>(s: S, p: &mut [f32], seen: Range<usize>) -> (f32, f32) {
    p[..seen.start].fill(MASKED);
    p[seen.end..].fill(MASKED);
    let mut max = s.splat(MASKED);
    for x in p.chunks_exact(S::LANES) {
        max = s.max(s.load(x), max);
    }
    let max = s.max_lane(max);
    let mut sum = s.zero();
    for x in p.chunks_exact_mut(S::LANES) {
        let e = s.exp_or_zero(s.sub(s.load(x), s.splat(max)));
        sum = s.add(sum, e); // what is masked adds at most 1e-38
        s.store(x, e);
    }
    p[..seen.start].fill(0.0);
    p[seen.end..].fill(0.0);
    let sum = s.sum(sum);
    (max + sum.ln(), 1.0 / sum)
}
