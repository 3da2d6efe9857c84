//! Scores, softmax and weighted values of a few queries over some spans of positions.

use super::cache::{BLOCK_TOKENS, HeadKv, padded};
use crate::Elems;
use crate::elem::Elem;
use crate::pool::Disjoint;
use crate::simd::{Simd, dispatch};
use std::ops::Range;

/// Positions whose softmax is taken at once.
pub(super) const SPAN: usize = 4 * BLOCK_TOKENS;

/// Queries that read keys and values together: two groups of six.
pub(super) const QUERIES_MAX: usize = 12;

/// Softmax so far, of each query.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// Largest score.
    pub(super) max: [f32; QUERIES_MAX],
    /// Sum of e^(score - max).
    pub(super) sum: [f32; QUERIES_MAX],
}

impl Default for State {
    fn default() -> Self {
        Self { max: [f32::NEG_INFINITY; QUERIES_MAX], sum: [0.0; QUERIES_MAX] }
    }
}

impl State {
    /// Takes in a span of query `i`. Returns the factors of what was there and of what the span adds.
    pub(super) fn merge(&mut self, i: usize, max: f32, sum: f32) -> (f32, f32) {
        let old = self.max[i];
        if max == f32::NEG_INFINITY {
            return (if old == f32::NEG_INFINITY { 0.0 } else { 1.0 }, 0.0);
        }
        let new = old.max(max);
        let (keep, take) = ((old - new).exp(), (max - new).exp());
        self.max[i] = new;
        self.sum[i] = self.sum[i] * keep + sum * take;
        (keep, take)
    }
}

/// Some queries over some spans.
pub(super) struct Attend<'a> {
    pub(super) kv: HeadKv<'a>,
    /// Blocks of the sequence.
    pub(super) blocks: &'a [u32],
    /// Queries; the rest of the arrays is unused.
    pub(super) n: usize,
    /// d numbers each.
    pub(super) queries: [&'a [f32]; QUERIES_MAX],
    /// Factor of the scores.
    pub(super) scale: f32,
    /// Positions each query sees; starts and ends ascend.
    pub(super) visible: [Range<usize>; QUERIES_MAX],
    pub(super) spans: Range<usize>,
    /// Where each query's d sums are, not yet divided; written by this task alone.
    pub(super) out: &'a Disjoint<'a, f32>,
    pub(super) out_at: [usize; QUERIES_MAX],
}

dispatch!(pub(super) fn attend(task: &Attend<'_>, state: &mut State) = attend_simd);

#[inline(always)]
fn attend_simd<S: Simd>(s: S, task: &Attend<'_>, state: &mut State) {
    match task.kv.data {
        Elems::Bf16(data) => attend_spans(s, task, data, state),
        Elems::F32(data) => attend_spans(s, task, data, state),
    }
}

/// Weights (first scores) of the queries in one span.
type Weights = [[f32; SPAN]; QUERIES_MAX];

#[inline(always)]
fn attend_spans<S: Simd, E: Elem>(s: S, task: &Attend<'_>, data: &[E], state: &mut State) {
    let mut weights: Weights = [[0.0; SPAN]; QUERIES_MAX];
    for span in task.spans.clone() {
        let in_span = |position: usize| position.saturating_sub(span * SPAN).min(SPAN);
        let part = SpanOf { data, span, n_positions: in_span(task.visible[task.n - 1].end) };
        scores(s, task, part, &mut weights);
        let mut keep_take = [(0.0, 0.0); QUERIES_MAX];
        for i in 0..task.n {
            let visible = in_span(task.visible[i].start)..in_span(task.visible[i].end);
            let (max, sum) = softmax(s, &mut weights[i], visible, task.scale);
            keep_take[i] = state.merge(i, max, sum);
        }
        add_values(s, task, part, &weights, &keep_take);
    }
}

/// One span of a sequence.
#[derive(Clone, Copy)]
struct SpanOf<'a, E> {
    data: &'a [E],
    span: usize,
    /// Positions that any query sees.
    n_positions: usize,
}

impl<'a, E> SpanOf<'a, E> {
    /// Keys `[d][16]` and values `[16][d padded]` of block `b` of the span.
    #[inline(always)]
    fn block(&self, task: &Attend<'_>, b: usize) -> (&'a [E], &'a [E]) {
        let HeadKv { first, stride, values, .. } = task.kv;
        let at = task.blocks[self.span * (SPAN / BLOCK_TOKENS) + b] as usize * stride + first;
        self.data[at..at + 2 * values].split_at(values)
    }

    fn n_blocks(&self) -> usize {
        self.n_positions.div_ceil(BLOCK_TOKENS)
    }
}

#[inline(always)]
fn scores<S: Simd, E: Elem>(s: S, task: &Attend<'_>, part: SpanOf<'_, E>, weights: &mut Weights) {
    for b in 0..part.n_blocks() {
        let (k, _) = part.block(task, b);
        let mut i = 0;
        while i < task.n {
            i += match (task.n - i, S::LANES) {
                (6.., 8) => scores_of::<S, E, 2, 6>(s, task, k, (i, b), weights),
                (3.., 8) => scores_of::<S, E, 2, 3>(s, task, k, (i, b), weights),
                (_, 8) => scores_of::<S, E, 2, 1>(s, task, k, (i, b), weights),
                (12.., _) => scores_of::<S, E, 1, 12>(s, task, k, (i, b), weights),
                (6.., _) => scores_of::<S, E, 1, 6>(s, task, k, (i, b), weights),
                (3.., _) => scores_of::<S, E, 1, 3>(s, task, k, (i, b), weights),
                (_, _) => scores_of::<S, E, 1, 1>(s, task, k, (i, b), weights),
            };
        }
    }
}

/// q · k of `C` queries from `i` on with the 16 positions of block `b`; returns `C`.
#[inline(always)]
fn scores_of<S: Simd, E: Elem, const R: usize, const C: usize>(
    s: S,
    task: &Attend<'_>,
    k: &[E],
    (i, b): (usize, usize),
    weights: &mut Weights,
) -> usize {
    let q: [&[f32]; C] = std::array::from_fn(|j| task.queries[i + j]);
    let mut acc = [[s.zero(); C]; R];
    chains(s, &mut acc, k, BLOCK_TOKENS, q);
    for j in 0..C {
        for r in 0..R {
            s.store(&mut weights[i + j][b * BLOCK_TOKENS + r * S::LANES..], acc[r][j]);
        }
    }
    C
}

/// Turns the scores in `visible` into e^(score · scale - max) and the rest into 0. Returns max and the sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, weights: &mut [f32; SPAN], visible: Range<usize>, scale: f32) -> (f32, f32) {
    weights[..visible.start].fill(f32::NEG_INFINITY);
    weights[visible.end..].fill(f32::NEG_INFINITY);
    let scale = s.splat(scale);
    let mut max = s.splat(f32::NEG_INFINITY);
    for w in weights.chunks_exact_mut(S::LANES) {
        let scaled = s.mul(s.load(w), scale);
        max = s.max(max, scaled);
        s.store(w, scaled);
    }
    let max = s.max_lane(max);
    if !visible.is_empty() {
        for w in weights.chunks_exact_mut(S::LANES) {
            s.store(w, s.exp(s.sub(s.load(w), s.splat(max))));
        }
    }
    weights[..visible.start].fill(0.0);
    weights[visible.end..].fill(0.0);
    let mut sum = s.zero();
    for w in weights.chunks_exact(S::LANES) {
        sum = s.add(sum, s.load(w));
    }
    (max, s.sum(sum))
}

#[inline(always)]
fn add_values<S: Simd, E: Elem>(
    s: S,
    task: &Attend<'_>,
    part: SpanOf<'_, E>,
    weights: &Weights,
    keep_take: &[(f32, f32); QUERIES_MAX],
) {
    let mut i = 0;
    while i < task.n {
        i += match (task.n - i, S::LANES) {
            (6.., 8) => values_of::<S, E, 2, 6>(s, task, part, i, (weights, keep_take)),
            (3.., 8) => values_of::<S, E, 2, 3>(s, task, part, i, (weights, keep_take)),
            (_, 8) => values_of::<S, E, 2, 1>(s, task, part, i, (weights, keep_take)),
            (12.., _) => values_of::<S, E, 1, 12>(s, task, part, i, (weights, keep_take)),
            (6.., _) => values_of::<S, E, 1, 6>(s, task, part, i, (weights, keep_take)),
            (3.., _) => values_of::<S, E, 1, 3>(s, task, part, i, (weights, keep_take)),
            (_, _) => values_of::<S, E, 1, 1>(s, task, part, i, (weights, keep_take)),
        };
    }
}

/// out = out · keep + take · Σ weight · v for `C` queries from `i` on, 16 dimensions at a time; returns `C`.
#[inline(always)]
fn values_of<S: Simd, E: Elem, const R: usize, const C: usize>(
    s: S,
    task: &Attend<'_>,
    part: SpanOf<'_, E>,
    i: usize,
    (weights, keep_take): (&Weights, &[(f32, f32); QUERIES_MAX]),
) -> usize {
    let width = padded(task.kv.d);
    for first in (0..task.kv.d).step_by(BLOCK_TOKENS) {
        let mut acc = [[s.zero(); C]; R];
        for b in 0..part.n_blocks() {
            let (_, v) = part.block(task, b);
            let n = BLOCK_TOKENS.min(part.n_positions - b * BLOCK_TOKENS);
            let w: [&[f32]; C] = std::array::from_fn(|j| &weights[i + j][b * BLOCK_TOKENS..][..n]);
            chains(s, &mut acc, &v[first..], width, w);
        }
        for j in 0..C {
            let at = task.out_at[i + j];
            // SAFETY: each query's output is this task's alone.
            let out = unsafe { task.out.slice(at + first..at + task.kv.d.min(first + BLOCK_TOKENS)) };
            let (keep, take) = keep_take[i + j];
            for (r, out) in out.chunks_mut(S::LANES).enumerate() {
                s.store(out, merged(s, s.load(out), acc[r][j], keep, take));
            }
        }
    }
    C
}

/// acc[r][j] += Σ_k m[k][r] · x[j][k]: `R` registers of rows of `m`, rows `stride` apart, times `C` vectors.
#[inline(always)]
fn chains<S: Simd, E: Elem, const R: usize, const C: usize>(
    s: S,
    acc: &mut [[S::F; C]; R],
    m: &[E],
    stride: usize,
    x: [&[f32]; C],
) {
    let n = x[0].len();
    assert!(n > 0 && m.len() >= (n - 1) * stride + R * S::LANES && x.iter().all(|x| x.len() == n));
    for k in 0..n {
        let mut row = [s.zero(); R];
        for r in 0..R {
            // SAFETY: inside `m` by the assertion above.
            row[r] = unsafe { E::load(s, m.as_ptr().add(k * stride + r * S::LANES)) };
        }
        for j in 0..C {
            // SAFETY: every x has n elements.
            let x = s.splat(unsafe { *x[j].get_unchecked(k) });
            for r in 0..R {
                acc[r][j] = s.fma(row[r], x, acc[r][j]);
            }
        }
    }
}

/// `keep · old + take · new`; what was there before the first span is not looked at.
#[inline(always)]
fn merged<S: Simd>(s: S, old: S::F, new: S::F, keep: f32, take: f32) -> S::F {
    let new_only = s.mul(new, s.splat(take));
    if keep == 0.0 { new_only } else { s.fma(new, s.splat(take), s.mul(old, s.splat(keep))) }
}

/// One query's merging of a span computed elsewhere.
pub(super) struct Merge<'a> {
    pub(super) out_d: &'a mut [f32],
    pub(super) part_d: &'a [f32],
    pub(super) keep: f32,
    pub(super) take: f32,
}

dispatch!(pub(super) fn merge(task: &mut Merge<'_>) = merge_simd);

#[inline(always)]
fn merge_simd<S: Simd>(s: S, task: &mut Merge<'_>) {
    for (out, part) in task.out_d.chunks_mut(S::LANES).zip(task.part_d.chunks(S::LANES)) {
        s.store(out, merged(s, s.load(out), s.load(part), task.keep, task.take));
    }
}
