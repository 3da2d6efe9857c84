//! Backward of one key/value head of one row.

use std::ops::Range;

use super::forward::MASKED;
use super::product::Product;
use super::{Attended, AttentionDims, Head, Mask, TILE, ask_for, take};
use crate::Buf;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};

/// Keys taken at a time: two tiles of TILE · BLOCK · 4 B = 16 KiB each stay in the cache between the five products.
const BLOCK: usize = 4 * TILE;

/// What the tasks share.
pub(super) struct Job<'a> {
    pub(super) dims: AttentionDims,
    pub(super) mask: Mask<'a>,
    pub(super) attended: Attended<'a>,
    pub(super) dout_nhd: &'a [f32],
    pub(super) dqkv: Disjoint<'a, f32>,
}

/// Keys and values of the group in the orders the products want, and the sums of their gradients.
struct Group<'a> {
    keys_dt: &'a mut [f32],
    keys_td: &'a mut [f32],
    values_dt: &'a mut [f32],
    dkeys_td: &'a mut [f32],
    dvalues_td: &'a mut [f32],
}

/// One tile of queries and what belongs to it. Queries are scaled.
struct Tile<'a> {
    query: &'a mut [f32],
    dout: &'a mut [f32],
    dquery: &'a mut [f32],
    p: &'a mut [f32],
    dp: &'a mut [f32],
    /// Position of the first query.
    first: usize,
    n_queries: usize,
    /// The first position that each query sees.
    first_seen: [usize; TILE],
    lse: &'a [f32],
    /// dout · out of every query.
    dot: [f32; TILE],
}

dispatch!(pub(super) fn group(job: &Job, row: usize, group: usize, scratch: &mut Buf<f32>) = group_simd);
#[inline(always)]
fn group_simd<S: Simd>(s: S, job: &Job, row: usize, group: usize, scratch: &mut Buf<f32>) {
    let dims = job.dims;
    let (t, d) = (dims.n_positions, dims.head_width);
    let (t_padded, d_padded) = (dims.padded_positions(), dims.padded_width::<S>());
    let stride = dims.transposed_stride();
    scratch.reserve_scratch(2 * d * stride + 3 * t_padded * d_padded + TILE * (3 * d_padded + 2 * BLOCK));
    let mut rest = &mut scratch[..];
    let mut kv = Group {
        keys_dt: take(&mut rest, d * stride),
        keys_td: take(&mut rest, t_padded * d_padded),
        values_dt: take(&mut rest, d * stride),
        dkeys_td: take(&mut rest, t_padded * d_padded),
        dvalues_td: take(&mut rest, t_padded * d_padded),
    };
    let mut tile = Tile {
        query: take(&mut rest, TILE * d_padded),
        dout: take(&mut rest, TILE * d_padded),
        dquery: take(&mut rest, TILE * d_padded),
        p: take(&mut rest, TILE * BLOCK),
        dp: take(&mut rest, TILE * BLOCK),
        first: 0,
        n_queries: 0,
        first_seen: [0; TILE],
        lse: &[],
        dot: [0.0; TILE],
    };
    let (key_head, value_head) = (dims.n_heads + group, dims.n_heads + dims.n_kv_heads + group);
    job.head(row, key_head, 0, t).transpose(s, kv.keys_dt, stride);
    job.head(row, key_head, 0, t).copy(s, kv.keys_td, d_padded, 1.0);
    job.head(row, value_head, 0, t).transpose(s, kv.values_dt, stride);
    kv.dkeys_td.fill(0.0);
    kv.dvalues_td.fill(0.0);
    let mut tiles = dims.tiles(group).peekable();
    while let Some((h, first)) = tiles.next() {
        load_tile(s, job, &mut tile, [row, h, first]);
        let next = tiles.peek().copied();
        let ask = |i| job.ask_for(s, row, (h, first + i), next.map(|(h, first)| (h, first + i)));
        let mut ask = Some(ask);
        for first_key in (job.mask.first_tile(dims, row, first)..first + TILE).step_by(BLOCK) {
            let n_keys = BLOCK.min(first + TILE - first_key);
            block(s, &mut tile, &mut kv, (dims, first_key..first_key + n_keys), ask.take());
        }
        job.store_rows(s, tile.dquery, [row, h, first], tile.n_queries, dims.scale);
    }
    job.store_rows(s, kv.dkeys_td, [row, key_head, 0], t, 1.0);
    job.store_rows(s, kv.dvalues_td, [row, value_head, 0], t, 1.0);
}

/// Fetches the queries of head `h` from position `first` on, with everything known of them.
#[inline(always)]
fn load_tile<'a, S: Simd>(s: S, job: &Job<'a>, tile: &mut Tile<'a>, [row, h, first]: [usize; 3]) {
    let dims = job.dims;
    let (t, d, d_padded) = (dims.n_positions, dims.head_width, dims.padded_width::<S>());
    tile.first = first;
    tile.n_queries = TILE.min(t - first);
    tile.lse = &job.attended.lse_bht[(row * dims.n_heads + h) * t + first..][..tile.n_queries];
    job.head(row, h, first, tile.n_queries).copy(s, tile.query, d_padded, dims.scale);
    let at = (row * t + first) * dims.out_width() + h * d;
    let dout = Head { data: &job.dout_nhd[at..], stride: dims.out_width(), n_rows: tile.n_queries, width: d };
    dout.copy(s, tile.dout, d_padded, 1.0);
    tile.dquery.fill(0.0);
    for i in 0..tile.n_queries {
        tile.first_seen[i] = job.mask.first(dims, row, first + i);
        let (out_d, dout_d) =
            (&job.attended.out_nhd[at + i * dims.out_width()..][..d], &tile.dout[i * d_padded..][..d]);
        let mut sum = s.zero();
        for (out, dout) in out_d.chunks(S::LANES).zip(dout_d.chunks(S::LANES)) {
            sum = s.fma(s.load(out), s.load(dout), sum);
        }
        tile.dot[i] = s.sum(sum);
    }
}

/// Adds what the tile and the keys in `range` contribute to each other's gradients.
#[inline(always)]
fn block<S: Simd>(
    s: S,
    tile: &mut Tile,
    kv: &mut Group,
    (dims, range): (AttentionDims, Range<usize>),
    ask: Option<impl Fn(usize)>,
) {
    let (d, stride, d_padded) = (dims.head_width, dims.transposed_stride(), dims.padded_width::<S>());
    let n_keys = range.len();
    let scores = [TILE, n_keys, d];
    Product {
        a: tile.query,
        a_row: d_padded,
        a_col: 1,
        b: &kv.keys_dt[range.start..],
        b_stride: stride,
        dims: scores,
    }
    .run(s, tile.p, BLOCK, false);
    Product {
        a: tile.dout,
        a_row: d_padded,
        a_col: 1,
        b: &kv.values_dt[range.start..],
        b_stride: stride,
        dims: scores,
    }
    .run(s, tile.dp, BLOCK, false);
    for i in 0..TILE {
        ask.iter().for_each(|ask| ask(i));
        let (p, dp) = (&mut tile.p[i * BLOCK..][..n_keys], &mut tile.dp[i * BLOCK..][..n_keys]);
        if i >= tile.n_queries {
            p.fill(0.0);
            dp.fill(0.0);
            continue;
        }
        let within = |position: usize| position.saturating_sub(range.start).min(n_keys);
        let seen = within(tile.first_seen[i])..within(tile.first + i + 1);
        softmax_backward(s, [p, dp], seen, tile.lse[i], tile.dot[i]);
    }
    // P and dS are read transposed here: rows are keys, and the sums run over queries.
    let sums = [n_keys, d_padded, TILE];
    let rows = range.start * d_padded..;
    Product { a: tile.p, a_row: 1, a_col: BLOCK, b: tile.dout, b_stride: d_padded, dims: sums }.run(
        s,
        &mut kv.dvalues_td[rows.clone()],
        d_padded,
        true,
    );
    Product { a: tile.dp, a_row: 1, a_col: BLOCK, b: tile.query, b_stride: d_padded, dims: sums }.run(
        s,
        &mut kv.dkeys_td[rows.clone()],
        d_padded,
        true,
    );
    let sums = [TILE, d_padded, n_keys];
    Product { a: tile.dp, a_row: BLOCK, a_col: 1, b: &kv.keys_td[rows], b_stride: d_padded, dims: sums }.run(
        s,
        tile.dquery,
        d_padded,
        true,
    );
}

/// `p` from scores to probabilities, `dp` from their gradient to that of the scores; zeros outside of `seen`.
#[inline(always)]
fn softmax_backward<S: Simd>(s: S, [p, dp]: [&mut [f32]; 2], seen: Range<usize>, lse: f32, dot: f32) {
    p[..seen.start].fill(MASKED);
    p[seen.end..].fill(MASKED);
    for (p_at, dp_at) in p.chunks_exact_mut(S::LANES).zip(dp.chunks_exact_mut(S::LANES)) {
        let p = s.exp_or_zero(s.sub(s.load(p_at), s.splat(lse)));
        let ds = s.mul(p, s.sub(s.load(dp_at), s.splat(dot)));
        s.store(p_at, p);
        s.store(dp_at, ds);
    }
    for x in [p, dp] {
        x[..seen.start].fill(0.0);
        x[seen.end..].fill(0.0);
    }
}

impl<'a> Job<'a> {
    /// Asks for what is needed of a query and its head when a tile's keys are through: from one row to the next it is too far
    /// for the processor to fetch it unasked.
    #[inline(always)]
    fn ask_for<S: Simd>(&self, s: S, row: usize, gradient: (usize, usize), next: Option<(usize, usize)>) {
        let dims = self.dims;
        let d = dims.head_width;
        let at = |(head, i): (usize, usize), width: usize| (row * dims.n_positions + i) * width + head * d;
        ask_for(s, self.dqkv.as_ptr().wrapping_add(at(gradient, dims.qkv_width())), d);
        let Some(next) = next else { return };
        ask_for(s, self.attended.qkv.as_ptr().wrapping_add(at(next, dims.qkv_width())), d);
        for of_out in [self.attended.out_nhd, self.dout_nhd] {
            ask_for(s, of_out.as_ptr().wrapping_add(at(next, dims.out_width())), d);
        }
    }

    /// Head `head` of `n_rows` rows of qkv from position `first` of row `row` on.
    #[inline(always)]
    fn head(&self, row: usize, head: usize, first: usize, n_rows: usize) -> Head<'a> {
        let (stride, width) = (self.dims.qkv_width(), self.dims.head_width);
        let at = (row * self.dims.n_positions + first) * stride + head * width;
        Head { data: &self.attended.qkv[at..], stride, n_rows, width }
    }

    /// Writes `scale` times the first `n` rows of a padded gradient to its head of dqkv.
    #[inline(always)]
    fn store_rows<S: Simd>(&self, s: S, from: &[f32], [row, head, first]: [usize; 3], n: usize, scale: f32) {
        let (stride, d) = (self.dims.qkv_width(), self.dims.head_width);
        for (i, from) in from.chunks_exact(self.dims.padded_width::<S>()).take(n).enumerate() {
            let at = (row * self.dims.n_positions + first + i) * stride + head * d;
            // SAFETY: a task alone has the heads of its group in its row, and stores each once.
            let to = unsafe { self.dqkv.slice(at..at + d) };
            for (to, from) in to.chunks_mut(S::LANES).zip(from[..d].chunks(S::LANES)) {
                s.store(to, s.mul(s.load(from), s.splat(scale)));
            }
        }
    }
}
