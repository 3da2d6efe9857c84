//! Attention of new tokens over the keys and values of their sequences, kept in blocks (paged, after Kwon et al. 2023).
//!
//! `out_hd = Σ_s softmax_s(scale · q_hd · k_sd) · v_sd` over the positions s up to the token's own, all of them or the
//! last few ([`AttentionSpec::window`]), or over all of the row where a model reads both ways; the h/g query heads of one
//! key/value head read it together.
//!
//! Order of the sums: positions are cut into groups of 256, counted from position 0 of the sequence, and these into spans
//! of 128. In a group the softmax goes from span to span with a running maximum (as in FlashAttention, Dao et al. 2022);
//! the groups are merged one after another. So a token's result depends on its sequence alone: not on the step it was
//! computed in, what else was in it, or the threads. Test: `results_do_not_depend_on_the_step`.

mod cache;
mod element;
mod kernels;
mod staggered;
#[cfg(test)]
mod tests;

pub use cache::{BLOCK_TOKENS, KvCache, KvDims, KvType, PagedRow};

use crate::cpu::Level;
use crate::pool::Disjoint;
use crate::split::piece;
use crate::{Buf, Pool};
use cache::padded;
use std::cell::RefCell;
use std::ops::Range;

use kernels::{Attend, Merge, Part, QUERIES_MAX, SPAN, Weights, attend, merge};

/// Spans of a group: 256 positions, 64 KiB of bf16 keys and values 64 wide, some 5 us to read.
const GROUP_SPANS: usize = 2;

/// What a layer's attention is, beside its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Factor of every score; 1/√d in most models.
    pub scale: f32,
    /// A token at position p sees `p - window + 1 ..= p` (Gemma 3's local layers); `None`: all positions up to p.
    pub window: Option<usize>,
    /// A token sees none of the positions after its own. Otherwise every token of a row sees all of them.
    pub causal: bool,
}

impl AttentionSpec {
    /// Scores divided by √d, and no window.
    pub fn plain(head_width: usize) -> Self {
        Self { scale: 1.0 / (head_width as f32).sqrt(), window: None, causal: true }
    }

    /// Positions the token at `position` of a row with `n_context` sees.
    fn visible(&self, position: usize, n_context: usize) -> Range<usize> {
        if !self.causal {
            return 0..n_context;
        }
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// What [`paged_attention`] works in, kept between calls.
#[derive(Default)]
pub struct AttentionScratch {
    tiles: Vec<Tile>,
    /// Results of single groups, when the groups of a tile are tasks of their own, see [`Tile::part`].
    parts: Buf<f32>,
}

/// Up to [`QUERIES_MAX`] consecutive queries of one row and key/value head. A query is a token and a head.
#[derive(Clone)]
struct Tile {
    row_idx: usize,
    /// Index of the row's first token in the step.
    first_token: usize,
    kv_head: usize,
    first_query: usize,
    n_queries: usize,
    /// Groups from that of the first position its first query sees to that of its last query.
    groups: Range<usize>,
    /// What the tiles before it take, in units of [`Tile::work`].
    work_before: usize,
    /// Where its first group's result is in the scratch.
    parts_at: usize,
}

/// Memory for the results of groups, up to which they are tasks of their own, so that a long context is shared out and
/// waits for nobody.
const PARTS_BYTES_MAX: usize = 8 << 20;

/// Up to so many multiply-adds (about 4 us) the work is done before another thread has woken.
const INLINE_MAX: usize = 100_000;

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
    let AttentionScratch { tiles, parts } = scratch;
    let size = lay_out_tiles(tiles, rows, cache.dims(), spec);
    let out = Disjoint::new(out_nhd);
    let job = |tile| Job { cache, layer, spec, qkv_no, rows, tile, level: pool.level() };
    if size.multiply_adds <= INLINE_MAX {
        return tiles.iter().for_each(|tile| job(tile).all_groups(&out));
    }
    // Tiles, none of which is much of the work, are tasks as they are: of prompts, and of many streams of one length.
    let n_shares = TASKS_PER_THREAD * pool.n_threads();
    let are_even = size.multiply_adds_max * n_shares <= size.multiply_adds;
    if are_even || size.n_parts == tiles.len() || size.part_elems * size_of::<f32>() > PARTS_BYTES_MAX {
        return pool.run(tiles.len(), &|i| job(&tiles[i]).all_groups(&out));
    }
    parts.reserve_scratch(size.part_elems);
    let parts_out = Disjoint::new(parts);
    // Enough tasks that a thread which loses its core holds the others up little, and no more: a task gathers its
    // queries, and asks for the keys and values it comes to next while it computes.
    let task_work = (size.work / n_shares).clamp(1, TASK_WORK_MAX);
    pool.run(size.work.div_ceil(task_work), &|task| {
        let mine = piece(task, task_work, size.work);
        let first =
            tiles.partition_point(|tile| tile.work_before + tile.work() * tile.groups.len() <= mine.start);
        for tile in tiles[first..].iter().take_while(|tile| tile.work_before < mine.end) {
            let groups_before = |work: usize| work.saturating_sub(tile.work_before).div_ceil(tile.work());
            let groups = groups_before(mine.start)..groups_before(mine.end).min(tile.groups.len());
            if !groups.is_empty() {
                job(tile).some_groups(groups, &parts_out);
            }
        }
    });
    // A few thousand multiply-adds a tile.
    pool.run(tiles.len().div_ceil(MERGE_TILES), &|task| {
        for tile in &tiles[piece(task, MERGE_TILES, tiles.len())] {
            job(tile).merge_parts(parts, &out);
        }
    });
}

/// Work of one task at most: 1 MiB of bf16 keys and values 64 wide, read by three queries.
const TASK_WORK_MAX: usize = 16 * (READ_WORK + 3);
const TASKS_PER_THREAD: usize = 8;

/// What reading the keys and values of a group takes, in units of what a query takes that sees them: 64 KiB come from
/// memory in 4 us, and the 33,000 multiply-adds take half a one.
const READ_WORK: usize = 8;

/// Tiles whose groups one task merges: so many that a few streams are merged by the caller alone.
const MERGE_TILES: usize = 32;

/// What there is to do in all tiles.
#[derive(Default)]
struct Size {
    n_parts: usize,
    part_elems: usize,
    /// In units of [`Tile::work`].
    work: usize,
    multiply_adds: usize,
    /// Of one tile.
    multiply_adds_max: usize,
}

fn lay_out_tiles(tiles: &mut Vec<Tile>, rows: &[PagedRow<'_>], dims: KvDims, spec: AttentionSpec) -> Size {
    let heads_per_kv = dims.n_heads / dims.n_kv_heads;
    tiles.clear();
    let (mut first_token, mut size) = (0, Size::default());
    for (row_idx, row) in rows.iter().enumerate() {
        let n_queries = row.n_tokens * heads_per_kv;
        for first_query in (0..n_queries).step_by(QUERIES_MAX) {
            let n_queries = QUERIES_MAX.min(n_queries - first_query);
            let visible = |query: usize| spec.visible(row.position(query / heads_per_kv), row.n_context);
            let seen = visible(first_query).start..visible(first_query + n_queries - 1).end;
            let groups = seen.start / (GROUP_SPANS * SPAN)..seen.end.div_ceil(GROUP_SPANS * SPAN);
            for kv_head in 0..dims.n_kv_heads {
                let tile = Tile {
                    row_idx,
                    first_token,
                    kv_head,
                    first_query,
                    n_queries,
                    groups: groups.clone(),
                    work_before: size.work,
                    parts_at: size.part_elems,
                };
                size.n_parts += groups.len();
                size.part_elems += groups.len() * part_elems(n_queries, dims.head_width);
                size.work += groups.len() * tile.work();
                let multiply_adds = 2 * n_queries * seen.len() * dims.head_width;
                size.multiply_adds += multiply_adds;
                size.multiply_adds_max = size.multiply_adds_max.max(multiply_adds);
                tiles.push(tile);
            }
        }
        first_token += row.n_tokens;
    }
    size
}

/// Of a group's result: d weighted values, maximum and sum of each query.
fn part_elems(n_queries: usize, d: usize) -> usize {
    n_queries * (d + 2)
}

impl Tile {
    /// What one of its groups takes, in units of what a query does that sees the group.
    fn work(&self) -> usize {
        READ_WORK + self.n_queries
    }

    /// Where the result of group `i` of this tile is in the scratch.
    fn part(&self, i: usize, d: usize) -> Range<usize> {
        let len = part_elems(self.n_queries, d);
        self.parts_at + i * len..self.parts_at + (i + 1) * len
    }
}

/// What a task computes in, kept by its thread.
#[derive(Default)]
struct Work {
    queries: Queries,
    weights: Weights,
    group: Part,
    total: Part,
}

/// The queries of a tile.
#[derive(Default)]
struct Queries {
    /// See [`Attend::q_dq`].
    q_dq: Vec<f32>,
    /// Positions each query sees.
    visible: Vec<Range<usize>>,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

/// A tile with what its work needs.
struct Job<'a> {
    cache: &'a KvCache,
    layer: usize,
    spec: AttentionSpec,
    qkv_no: &'a [f32],
    rows: &'a [PagedRow<'a>],
    tile: &'a Tile,
    level: Level,
}

impl Job<'_> {
    /// Every group, one after another.
    fn all_groups(&self, out: &Disjoint<'_, f32>) {
        let d = self.cache.dims().head_width;
        WORK.with_borrow_mut(|work| {
            self.gather_queries(&mut work.queries);
            work.total.clear(self.tile.n_queries, d);
            for group_idx in self.tile.groups.clone() {
                self.attend(group_idx, work);
                let Work { group, total, .. } = work;
                for i in 0..self.tile.n_queries {
                    let part_d = &group.out_qd[i * padded(d)..][..d];
                    self.merge(total, i, (group.max[i], group.sum[i]), part_d);
                }
            }
            self.finish(&work.total, out);
        });
    }

    /// Some of the tile's groups, to be merged later.
    fn some_groups(&self, groups: Range<usize>, parts: &Disjoint<'_, f32>) {
        let d = self.cache.dims().head_width;
        WORK.with_borrow_mut(|work| {
            self.gather_queries(&mut work.queries);
            for group_idx in groups {
                self.attend(self.tile.groups.start + group_idx, work);
                // SAFETY: each part is one task's.
                let part = unsafe { parts.slice(self.tile.part(group_idx, d)) };
                let Part { out_qd, max, sum } = &work.group;
                let rows = out_qd.chunks_exact(padded(d)).zip(max.iter().zip(sum));
                for (part, (out_d, (max, sum))) in part.chunks_exact_mut(d + 2).zip(rows) {
                    part[..d].copy_from_slice(&out_d[..d]);
                    (part[d], part[d + 1]) = (*max, *sum);
                }
            }
        });
    }

    /// Merges what [`Job::some_groups`] left, as [`Job::all_groups`] does.
    fn merge_parts(&self, parts: &[f32], out: &Disjoint<'_, f32>) {
        let d = self.cache.dims().head_width;
        WORK.with_borrow_mut(|Work { total, .. }| {
            total.clear(self.tile.n_queries, d);
            for group in 0..self.tile.groups.len() {
                for (i, part) in parts[self.tile.part(group, d)].chunks_exact(d + 2).enumerate() {
                    self.merge(total, i, (part[d], part[d + 1]), &part[..d]);
                }
            }
            self.finish(total, out);
        });
    }

    fn attend(&self, group_idx: usize, work: &mut Work) {
        let d = self.cache.dims().head_width;
        let n = self.tile.n_queries;
        let Work { queries: Queries { q_dq, visible }, weights, group: part, .. } = work;
        let spans = visible[0].start / SPAN..visible[n - 1].end.div_ceil(SPAN);
        let group = group_idx * GROUP_SPANS..(group_idx + 1) * GROUP_SPANS;
        let task = Attend {
            kv: self.cache.head(self.layer, self.tile.kv_head),
            d,
            blocks: self.rows[self.tile.row_idx].blocks,
            n,
            visible,
            spans: spans.start.max(group.start)..spans.end.min(group.end),
            q_dq,
        };
        part.clear(n, d);
        attend(self.level, &task, part, weights);
    }

    /// Token (in the step), head and position of each query of the tile.
    fn queries(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let dims = self.cache.dims();
        let heads_per_kv = dims.n_heads / dims.n_kv_heads;
        let Tile { row_idx, first_token, kv_head, first_query, n_queries, .. } = *self.tile;
        let first_position = self.rows[row_idx].position(0);
        let (mut token, mut head) = (first_query / heads_per_kv, first_query % heads_per_kv);
        (0..n_queries).map(move |_| {
            let query = (first_token + token, kv_head * heads_per_kv + head, first_position + token);
            head += 1;
            if head == heads_per_kv {
                (token, head) = (token + 1, 0);
            }
            query
        })
    }

    /// The unused queries become 0.
    fn gather_queries(&self, Queries { q_dq, visible }: &mut Queries) {
        let dims = self.cache.dims();
        let d = dims.head_width;
        let n_context = self.rows[self.tile.row_idx].n_context;
        let scale = self.spec.scale * std::f32::consts::LOG2_E;
        q_dq.clear();
        q_dq.resize(d * QUERIES_MAX, 0.0);
        visible.clear();
        for (i, (token, head, position)) in self.queries().enumerate() {
            visible.push(self.spec.visible(position, n_context));
            let at = (token * (dims.n_heads + 2 * dims.n_kv_heads) + head) * d;
            for (q_q, q) in q_dq.chunks_exact_mut(QUERIES_MAX).zip(&self.qkv_no[at..at + d]) {
                q_q[i] = *q * scale;
            }
        }
    }

    /// Takes a group's result for query `i` into `total`.
    fn merge(&self, total: &mut Part, i: usize, (max, sum): (f32, f32), part_d: &[f32]) {
        if max == f32::NEG_INFINITY {
            return; // the query sees nothing of the group
        }
        let (old, new) = (total.max[i], total.max[i].max(max));
        let factor = |max: f32| if max == new { 1.0 } else { (max - new).exp2() };
        let (keep, take) = (factor(old), factor(max));
        (total.max[i], total.sum[i]) = (new, total.sum[i] * keep + sum * take);
        let width = padded(part_d.len());
        let out_d = &mut total.out_qd[i * width..][..part_d.len()];
        merge(self.level, &mut Merge { out_d, part_d, keep, take });
    }

    /// Divides by the sums of the weights.
    fn finish(&self, total: &Part, out: &Disjoint<'_, f32>) {
        let KvDims { n_heads, head_width: d, .. } = self.cache.dims();
        for (i, (token, head, _)) in self.queries().enumerate() {
            let at = (token * n_heads + head) * d;
            // SAFETY: a query's output belongs to its tile.
            let out_d = unsafe { out.slice(at..at + d) };
            let inverse = 1.0 / total.sum[i];
            out_d.iter_mut().zip(&total.out_qd[i * padded(d)..]).for_each(|(out, x)| *out = x * inverse);
        }
    }
}
