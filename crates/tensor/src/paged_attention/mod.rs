//! Attention of new tokens over the keys and values of their sequences, kept in blocks (paged, after Kwon et al. 2023).
//!
//! `out_hd = Σ_s softmax_s(scale · q_hd · k_sd) · v_sd` over the positions s up to the token's own, all of them or the
//! last few ([`AttentionSpec::window`]); the h/g query heads of one key/value head read it together.
//!
//! Order of the sums: positions are cut into spans of 64, counted from position 0 of the sequence. Within a span the
//! softmax is plain, spans are merged one after another (as in FlashAttention, Dao et al. 2022). So a token's result
//! depends on its sequence alone: not on the step it was computed in, what else was in it, or the threads. Test:
//! `results_do_not_depend_on_the_step`.

mod cache;
mod kernels;
#[cfg(test)]
mod tests;

pub use cache::{BLOCK_TOKENS, KvCache, KvDims, KvType, PagedRow};

use crate::pool::Disjoint;
use crate::{Buf, Pool};
use std::ops::Range;

use kernels::{Attend, Merge, QUERIES_MAX, SPAN, State, attend, merge};

/// What a layer's attention is, beside its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Factor of every score; 1/√d in most models.
    pub scale: f32,
    /// A token at position p sees `p - window + 1 ..= p` (Gemma 3's local layers); `None`: all positions up to p.
    pub window: Option<usize>,
}

impl AttentionSpec {
    /// Scores divided by √d, and no window.
    pub fn plain(head_width: usize) -> Self {
        Self { scale: 1.0 / (head_width as f32).sqrt(), window: None }
    }

    /// Positions the token at `position` sees.
    fn visible(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// What [`paged_attention`] works in, kept between calls.
#[derive(Default)]
pub struct AttentionScratch {
    tiles: Vec<Tile>,
    /// Results of single spans, when the spans of a tile are tasks of their own: `[task][QUERIES_MAX][d]`.
    parts: Buf<f32>,
    /// Their softmax states.
    states: Vec<State>,
}

/// Up to [`QUERIES_MAX`] consecutive queries of one row and key/value head. A query is a token and a head.
#[derive(Clone, Copy)]
struct Tile {
    row_idx: usize,
    /// Index of the row's first token in the step.
    first_token: usize,
    kv_head: usize,
    first_query: usize,
    n_queries: usize,
    /// First span its first query sees.
    first_span: usize,
    /// Spans from there to the last query's position.
    n_spans: usize,
    /// Index of its first part in the scratch.
    first_part: usize,
}

/// Attention of the new tokens of `rows`, whose keys and values must be in `layer` of the cache ([`KvCache::append`]).
/// `qkv_no` holds for each token h + 2·g heads: rotated queries, keys, values; only the queries are read.
///
/// # Panics
/// If the slices do not fit the rows, a row names a block the cache does not have, or the window is empty.
pub fn paged_attention(
    pool: &Pool,
    out_nhd: &mut [f32],
    qkv_no: &[f32],
    (cache, layer, spec): (&KvCache, usize, AttentionSpec),
    rows: &[PagedRow<'_>],
    scratch: &mut AttentionScratch,
) {
    let KvDims { n_heads, n_kv_heads, head_width: d, .. } = cache.dims();
    let n: usize = rows.iter().map(|row| row.n_tokens).sum();
    assert_eq!(out_nhd.len(), n * n_heads * d, "output of {n} tokens");
    assert_eq!(qkv_no.len(), n * (n_heads + 2 * n_kv_heads) * d, "queries, keys and values of {n} tokens");
    assert!(spec.window != Some(0), "a window without the token itself");
    rows.iter().for_each(|row| cache.check(row));
    let n_parts = lay_out_tiles(&mut scratch.tiles, rows, cache.dims(), spec);
    let out = Disjoint::new(out_nhd);
    let job = |tile: &Tile| Job {
        cache,
        layer,
        spec,
        qkv_no,
        row: rows[tile.row_idx],
        tile: *tile,
        level: pool.level(),
    };
    let tiles = &scratch.tiles;
    // Many tiles keep all threads busy; with few (one stream decoding a long context) their spans are shared out too.
    if tiles.len() >= TILES_PER_THREAD * pool.n_threads() || n_parts == tiles.len() {
        let whole = |i: usize| job(&tiles[i]).all_spans(&out);
        if n_parts <= PARTS_INLINE {
            (0..tiles.len()).for_each(whole)
        } else {
            pool.run(tiles.len(), &whole)
        }
        return;
    }
    scratch.parts.reserve_scratch(n_parts * QUERIES_MAX * d);
    scratch.states.resize(scratch.states.len().max(n_parts), State::default());
    let (parts, states) = (Disjoint::new(&mut scratch.parts), Disjoint::new(&mut scratch.states));
    pool.run(n_parts, &|part| {
        let tile = &tiles[tiles.partition_point(|tile| tile.first_part <= part) - 1];
        // SAFETY: each part is one task's.
        let state = unsafe { &mut states.slice(part..part + 1)[0] };
        job(tile).one_span(part, &parts, state);
    });
    for tile in tiles {
        job(tile).merge_parts(&scratch.parts, &scratch.states, &out);
    }
}

/// Tiles a thread should have before spans are worth handing out one by one.
const TILES_PER_THREAD: usize = 4;

/// Up to this many spans (of 64 positions and a few queries, about 1 us each) are done before another thread has woken.
const PARTS_INLINE: usize = 4;

/// Fills `tiles`; returns the number of spans of all of them.
fn lay_out_tiles(tiles: &mut Vec<Tile>, rows: &[PagedRow<'_>], dims: KvDims, spec: AttentionSpec) -> usize {
    let heads_per_kv = dims.n_heads / dims.n_kv_heads;
    tiles.clear();
    let (mut first_token, mut first_part) = (0, 0);
    for (row_idx, row) in rows.iter().enumerate() {
        let n_queries = row.n_tokens * heads_per_kv;
        for first_query in (0..n_queries).step_by(QUERIES_MAX) {
            let n_queries = QUERIES_MAX.min(n_queries - first_query);
            let position = |query: usize| row.position(query / heads_per_kv);
            let first_span = spec.visible(position(first_query)).start / SPAN;
            let n_spans = position(first_query + n_queries - 1) / SPAN + 1 - first_span;
            for kv_head in 0..dims.n_kv_heads {
                tiles.push(Tile {
                    row_idx,
                    first_token,
                    kv_head,
                    first_query,
                    n_queries,
                    first_span,
                    n_spans,
                    first_part,
                });
                first_part += n_spans;
            }
        }
        first_token += row.n_tokens;
    }
    first_part
}

/// A tile with what its work needs.
struct Job<'a> {
    cache: &'a KvCache,
    layer: usize,
    spec: AttentionSpec,
    qkv_no: &'a [f32],
    row: PagedRow<'a>,
    tile: Tile,
    level: crate::cpu::Level,
}

impl Job<'_> {
    /// Token (in the step) and head of query `i` of the tile, and the positions it sees.
    fn query(&self, i: usize) -> (usize, usize, Range<usize>) {
        let dims = self.cache.dims();
        let heads_per_kv = dims.n_heads / dims.n_kv_heads;
        let (token, head) =
            ((self.tile.first_query + i) / heads_per_kv, (self.tile.first_query + i) % heads_per_kv);
        (
            self.tile.first_token + token,
            self.tile.kv_head * heads_per_kv + head,
            self.spec.visible(self.row.position(token)),
        )
    }

    /// Where query `i` of the tile puts its result in `out_nhd`.
    fn out_at(&self, i: usize) -> usize {
        let (token, head, _) = self.query(i);
        (token * self.cache.dims().n_heads + head) * self.cache.dims().head_width
    }

    fn attend(
        &self,
        spans: Range<usize>,
        state: &mut State,
        out: &Disjoint<'_, f32>,
        out_at: [usize; QUERIES_MAX],
    ) {
        let dims = self.cache.dims();
        let d = dims.head_width;
        let mut task = Attend {
            kv: self.cache.head(self.layer, self.tile.kv_head),
            scale: self.spec.scale,
            blocks: self.row.blocks,
            n: self.tile.n_queries,
            queries: [&[]; QUERIES_MAX],
            visible: [const { 0..0 }; QUERIES_MAX],
            spans,
            out,
            out_at,
        };
        for i in 0..task.n {
            let (token, head, visible) = self.query(i);
            let at = token * (dims.n_heads + 2 * dims.n_kv_heads) * d + head * d;
            (task.queries[i], task.visible[i]) = (&self.qkv_no[at..at + d], visible);
        }
        attend(self.level, &task, state);
    }

    fn all_spans(&self, out: &Disjoint<'_, f32>) {
        let mut state = State::default();
        let out_at = std::array::from_fn(|i| self.out_at(i.min(self.tile.n_queries - 1)));
        self.attend(self.tile.first_span..self.tile.first_span + self.tile.n_spans, &mut state, out, out_at);
        self.normalize(&state, out);
    }

    fn one_span(&self, part: usize, parts: &Disjoint<'_, f32>, state: &mut State) {
        *state = State::default();
        let span = self.tile.first_span + part - self.tile.first_part;
        let d = self.cache.dims().head_width;
        self.attend(span..span + 1, state, parts, std::array::from_fn(|i| (part * QUERIES_MAX + i) * d));
    }

    fn merge_parts(&self, parts: &[f32], states: &[State], out: &Disjoint<'_, f32>) {
        let d = self.cache.dims().head_width;
        let mut total = State::default();
        for part in self.tile.first_part..self.tile.first_part + self.tile.n_spans {
            for i in 0..self.tile.n_queries {
                let (keep, take) = total.merge(i, states[part].max[i], states[part].sum[i]);
                let at = self.out_at(i);
                // SAFETY: the tile's own outputs; no task runs now.
                let out_d = unsafe { out.slice(at..at + d) };
                let part_d = &parts[(part * QUERIES_MAX + i) * d..][..d];
                merge(self.level, &mut Merge { out_d, part_d, keep, take });
            }
        }
        self.normalize(&total, out);
    }

    /// Divides by the sum of the weights.
    fn normalize(&self, state: &State, out: &Disjoint<'_, f32>) {
        for i in 0..self.tile.n_queries {
            let at = self.out_at(i);
            // SAFETY: a query's output belongs to its tile.
            let out_d = unsafe { out.slice(at..at + self.cache.dims().head_width) };
            let inverse = 1.0 / state.sum[i];
            out_d.iter_mut().for_each(|x| *x *= inverse);
        }
    }
}
