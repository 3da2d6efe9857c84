//! Scores, softmax and weighted values of a few queries over some spans of positions.

use super::cache::{AnyHeadKv, BLOCK_TOKENS, HeadKv, padded};
use super::element::Cached;
use crate::simd::{Simd, dispatch};
use std::hint::black_box;
use std::ops::Range;

/// Positions whose softmax is taken at once.
pub(super) const SPAN: usize = 8 * BLOCK_TOKENS;
const SPAN_BLOCKS: usize = SPAN / BLOCK_TOKENS;

/// Queries that read keys and values together: two sweeps of 12 over a span that is in L1 or L2 by then.
pub(super) const QUERIES_MAX: usize = 24;

/// Some queries over some spans.
pub(super) struct Attend<'a> {
    pub(super) kv: AnyHeadKv<'a>,
    /// Head width.
    pub(super) d: usize,
    /// Blocks of the sequence.
    pub(super) blocks: &'a [u32],
    /// Queries; the rest of the arrays is unused.
    pub(super) n: usize,
    /// Positions each query sees; starts and ends ascend.
    pub(super) visible: &'a [Range<usize>],
    pub(super) spans: Range<usize>,
    /// The queries times the scale of the scores, divided by ln 2, `[d][QUERIES_MAX]`; the unused ones are numbers too.
    pub(super) q_dq: &'a [f32],
}

/// Softmax so far of each query, and its weighted values, not yet divided by the sum of the weights.
#[derive(Clone, Default)]
pub(super) struct Part {
    /// Largest score. Scores are divided by ln 2: weights are powers of 2.
    pub(super) max: [f32; QUERIES_MAX],
    /// Sum of 2^(score - max).
    pub(super) sum: [f32; QUERIES_MAX],
    /// `[QUERIES_MAX][d]`, d rounded up to registers.
    pub(super) out_qd: Vec<f32>,
}

impl Part {
    /// `n_queries` that have seen nothing yet, of heads `d` wide. What the others hold is nobody's.
    pub(super) fn clear(&mut self, n_queries: usize, d: usize) {
        (self.max, self.sum) = ([f32::NEG_INFINITY; QUERIES_MAX], [0.0; QUERIES_MAX]);
        self.out_qd.resize(QUERIES_MAX * padded(d), 0.0);
        self.out_qd[..n_queries * padded(d)].fill(0.0);
    }
}

/// Weights (first scores) of the queries in one span.
#[derive(Clone)]
pub(super) struct Weights(Rows);
type Rows = [[f32; SPAN]; QUERIES_MAX];

impl Default for Weights {
    fn default() -> Self {
        Self([[0.0; SPAN]; QUERIES_MAX])
    }
}

dispatch!(
    /// Adds what `task` says to `part`; `weights` is scratch.
    pub(super) fn attend(task: &Attend<'_>, part: &mut Part, weights: &mut Weights) = attend_simd
);

#[inline(always)]
fn attend_simd<S: Simd>(s: S, task: &Attend<'_>, part: &mut Part, weights: &mut Weights) {
    match task.kv {
        AnyHeadKv::Int8(kv) => attend_spans(s, task, kv, part, weights),
        AnyHeadKv::Bf16(kv) => attend_spans(s, task, kv, part, weights),
        AnyHeadKv::F32(kv) => attend_spans(s, task, kv, part, weights),
    }
}

#[inline(always)]
fn attend_spans<S: Simd, E: Cached>(
    s: S,
    task: &Attend<'_>,
    kv: HeadKv<'_, E>,
    part: &mut Part,
    Weights(weights): &mut Weights,
) {
    let mut keep = [1.0; QUERIES_MAX];
    for span in task.spans.clone() {
        let in_span = |position: usize| position.saturating_sub(span * SPAN).min(SPAN);
        let n_positions = in_span(task.visible[task.n - 1].end);
        let n_blocks = n_positions.div_ceil(BLOCK_TOKENS);
        let (blocks, next) = task.blocks[span * SPAN_BLOCKS..].split_at(n_blocks);
        let span = Span { kv, blocks, next, n_positions };
        let visible = |i: usize| in_span(task.visible[i].start)..in_span(task.visible[i].end);
        scores(s, task, &span, weights);
        for first in (0..task.n).step_by(TOGETHER) {
            let rows = &mut weights[first..first + TOGETHER];
            let n = TOGETHER.min(task.n - first);
            (0..n).for_each(|i| {
                hide(&mut rows[i][..n_blocks * BLOCK_TOKENS], &visible(first + i), f32::NEG_INFINITY)
            });
            softmax(s, (rows, n_blocks * BLOCK_TOKENS), first, part, &mut keep);
            for i in 0..n {
                let weights = &mut rows[i][..n_blocks * BLOCK_TOKENS];
                hide(weights, &visible(first + i), 0.0);
                span.scale_values(s, weights);
            }
        }
        add_values(s, task, &span, (weights, &keep), &mut part.out_qd);
    }
}

/// Queries whose softmax is taken together: their chains of additions hide each other's latency.
const TOGETHER: usize = 3;

/// See [`Span::ahead`]. By turns on a processor of each kind: on one with AVX-512 8 were best, on one without (Zen 3) 2 to 4, and
/// 8 took a fifth longer there than 3.
const fn matrices_ahead<S: Simd>() -> usize {
    if S::REGISTERS == 32 { 8 } else { 3 }
}

/// One span of a sequence.
struct Span<'a, E> {
    kv: HeadKv<'a, E>,
    blocks: &'a [u32],
    /// Blocks of the sequence after these.
    next: &'a [u32],
    /// Positions that any query sees.
    n_positions: usize,
}

impl<E: Cached> Span<'_, E> {
    /// The matrix that is read [`matrices_ahead`] after number `i`: the keys of the span's blocks are read first, then
    /// their values, then the keys of the next span. Memory is asked for that much before it is used: the hardware's own
    /// guesses end with a matrix, and 8 of 2 KiB are some 1,000 cycles of work for three queries, more than a trip to
    /// memory. It is asked for to L2: L1 has places for few lines that are on their way, and would wait for one.
    #[inline(always)]
    fn ahead<S: Simd>(&self, i: usize) -> &[E] {
        let (n, i) = (self.blocks.len(), i + matrices_ahead::<S>());
        match (self.blocks.get(i), self.blocks.get(i.wrapping_sub(n)), self.next.get(i.wrapping_sub(2 * n))) {
            (Some(&block), _, _) | (_, _, Some(&block)) => self.kv.block(block).0,
            (_, Some(&block), _) => self.kv.block(block).1,
            _ => &[],
        }
    }

    /// Scores are of the stored numbers; the keys' own factors make them those of the keys.
    #[inline(always)]
    fn scale_keys<S: Simd>(&self, s: S, scores: &mut [f32]) {
        if E::SCALED {
            for (scores, &block) in scores.chunks_exact_mut(BLOCK_TOKENS).zip(self.blocks) {
                scale_each(s, scores, self.kv.block_scales(block).0);
            }
        }
    }

    /// The values' own factors become part of their weights.
    #[inline(always)]
    fn scale_values<S: Simd>(&self, s: S, weights: &mut [f32]) {
        if E::SCALED {
            for (weights, &block) in weights.chunks_exact_mut(BLOCK_TOKENS).zip(self.blocks) {
                scale_each(s, weights, self.kv.block_scales(block).1);
            }
        }
    }
}

#[inline(always)]
fn scale_each<S: Simd>(s: S, x: &mut [f32], factors: &[f32]) {
    for (x, factor) in x.chunks_exact_mut(S::LANES).zip(factors.chunks_exact(S::LANES)) {
        s.store(x, s.mul(s.load(x), s.load(factor)));
    }
}

/// Runs `$f::<S, E, R, C>` for groups of C queries with R registers each until all are done, C as large as fits: more
/// queries share a load, and `R · C` sums hide the latency of a multiply-add. Groups may reach past the last query, but
/// not past QUERIES_MAX. A query's sum is the same in all of them.
macro_rules! in_groups {
    ($n:expr, $registers:expr, |$i:ident| $f:ident::<S, E, _, _>($($arg:expr),*)) => {{
        let mut $i = 0;
        while $i < $n {
            $i += match ($n - $i, $registers) {
                (10.., 32) => { $f::<S, E, 2, 12>($($arg),*); 12 }
                (4.., 32) => { $f::<S, E, 4, 6>($($arg),*); 6 }
                (_, 32) => { $f::<S, E, 4, 3>($($arg),*); 3 }
                (4.., 16) => { $f::<S, E, 2, 6>($($arg),*); 6 }
                (_, 16) => { $f::<S, E, 2, 3>($($arg),*); 3 }
                _ => { $f::<S, E, 2, 2>($($arg),*); 2 }
            };
        }
    }};
}

#[inline(always)]
fn scores<S: Simd, E: Cached>(s: S, task: &Attend<'_>, span: &Span<'_, E>, weights: &mut Rows) {
    in_groups!(task.n, S::REGISTERS, |i| scores_of::<S, E, _, _>(s, task, span, i, weights));
}

/// q · k of `C` queries from `i` on.
#[inline(always)]
fn scores_of<S: Simd, E: Cached, const R: usize, const C: usize>(
    s: S,
    task: &Attend<'_>,
    span: &Span<'_, E>,
    i: usize,
    weights: &mut Rows,
) {
    assert!(i + C <= QUERIES_MAX && task.q_dq.len() >= task.d * QUERIES_MAX && S::LANES <= BLOCK_TOKENS);
    let registers = BLOCK_TOKENS / S::LANES;
    let last = span.blocks.len() - 1;
    for first in (0..span.blocks.len() * registers).step_by(R) {
        // Registers past the last block read it again; their scores are nobody's.
        let rows: [*const E; R] = std::array::from_fn(|r| {
            let (block, part) = ((first + r) / registers, (first + r) % registers);
            let (keys, _) = span.kv.block(span.blocks[block.min(last)]);
            keys[E::at(0, part * S::LANES, BLOCK_TOKENS)..].as_ptr()
        });
        let ahead: [*const E; R] = std::array::from_fn(|r| {
            let (block, part) = ((first + r) / registers, (first + r) % registers);
            let matrix = if i == 0 { span.ahead::<S>(block) } else { &[] };
            matrix.as_ptr().wrapping_add(E::at(0, part * S::LANES, BLOCK_TOKENS))
        });
        let mut acc = [[s.zero(); R]; C];
        // SAFETY: keys have at least d rows of BLOCK_TOKENS, of which this register is LANES columns; C queries from i
        // on are inside q_dq by the assertion.
        unsafe {
            let q = task.q_dq.as_ptr().add(i);
            acc = chains::<S, E, R, C, QUERIES_MAX, 1>(s, acc, (rows, ahead), (task.d, BLOCK_TOKENS), q);
        }
        for j in 0..C {
            for r in 0..R {
                s.store(&mut weights[i + j][(first + r) * S::LANES..][..S::LANES], acc[j][r]);
            }
        }
    }
    for weights in &mut weights[i..i + C] {
        span.scale_keys(s, weights);
    }
}

/// Fills what is not `visible`.
#[inline(always)]
fn hide(weights: &mut [f32], visible: &Range<usize>, with: f32) {
    weights[..visible.start].fill(with);
    weights[visible.end..].fill(with);
}

/// Turns the first `len` scores of [`TOGETHER`] queries, `first` on, into 2^(score - max), max being the largest so far,
/// and adds them to the sums. `keep` becomes the factor of what was summed before. Queries past the last are computed
/// as well; what they hold is nobody's.
///
/// A hidden score counts as 2^-126, which vanishes beside the 1 of the largest, in whatever register it stands; a query
/// that sees nothing has the same sum and maximum as before.
#[inline(always)]
fn softmax<S: Simd>(
    s: S,
    (rows, len): (&mut [[f32; SPAN]], usize),
    first: usize,
    part: &mut Part,
    keep: &mut [f32; QUERIES_MAX],
) {
    let mut largest = [s.splat(f32::NEG_INFINITY); TOGETHER];
    for at in (0..len).step_by(S::LANES) {
        for j in 0..TOGETHER {
            largest[j] = s.max(largest[j], s.load(&rows[j][at..at + S::LANES]));
        }
    }
    let mut new = [s.zero(); TOGETHER];
    for j in 0..TOGETHER {
        let (old, max) = (part.max[first + j], part.max[first + j].max(s.max_lane(largest[j])));
        keep[first + j] = if max == old { 1.0 } else { (old - max).exp2() };
        part.max[first + j] = max;
        new[j] = s.splat(max);
    }
    let mut total = [s.zero(); TOGETHER];
    for at in (0..len).step_by(S::LANES) {
        for j in 0..TOGETHER {
            let weights = &mut rows[j][at..at + S::LANES];
            let weight = exp2(s, s.sub(s.load(weights), new[j]));
            total[j] = s.add(total[j], weight);
            s.store(weights, weight);
        }
    }
    for j in 0..TOGETHER {
        part.sum[first + j] = part.sum[first + j] * keep[first + j] + s.sum(total[j]);
    }
}

/// 2^x for x <= 0, within 2 ulp above 2^-126 and nearly 0 below: n + r = x with |r| <= 1/2, a degree-6 polynomial
/// (Taylor: the first term left out is (ln 2 / 2)^7 / 7! = 1.2e-7) for 2^r, and n put into the exponent.
#[inline(always)]
fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    /// (ln 2)^k / k! for k from 6 to 0.
    const TERMS: [f32; 7] =
        [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];
    let x = s.max(x, s.splat(-126.0));
    let n = s.to_i(x);
    let r = s.sub(x, s.to_f(n));
    let mut p = s.splat(TERMS[0]);
    for term in &TERMS[1..] {
        p = s.fma(p, r, s.splat(*term));
    }
    s.bits_to_f(s.add_i(s.bits_to_i(p), s.shl_i::<23>(n)))
}

#[inline(always)]
fn add_values<S: Simd, E: Cached>(
    s: S,
    task: &Attend<'_>,
    span: &Span<'_, E>,
    (weights, keep): (&Rows, &[f32; QUERIES_MAX]),
    out_qd: &mut [f32],
) {
    in_groups!(task.n, S::REGISTERS, |i| values_of::<S, E, _, _>(
        s,
        task.d,
        span,
        (i, weights, keep),
        out_qd
    ));
}

/// out = out · keep + Σ weight · v for `C` queries from `i` on.
#[inline(always)]
fn values_of<S: Simd, E: Cached, const R: usize, const C: usize>(
    s: S,
    d: usize,
    span: &Span<'_, E>,
    args: (usize, &Rows, &[f32; QUERIES_MAX]),
    out_qd: &mut [f32],
) {
    let mut col = 0;
    while col < d {
        if col + R * S::LANES <= padded(d) {
            columns_of::<S, E, R, C>(s, (d, col), span, args, out_qd);
            col += R * S::LANES;
        } else {
            columns_of::<S, E, 1, C>(s, (d, col), span, args, out_qd);
            col += S::LANES;
        }
    }
}

/// [`values_of`] for `R` registers of dimensions from `col` on.
#[inline(always)]
fn columns_of<S: Simd, E: Cached, const R: usize, const C: usize>(
    s: S,
    (d, col): (usize, usize),
    span: &Span<'_, E>,
    (i, weights, keep): (usize, &Rows, &[f32; QUERIES_MAX]),
    out_qd: &mut [f32],
) {
    let width = padded(d);
    let out_qd = &mut out_qd[i * width + col..(i + C) * width];
    let mut acc = [[s.zero(); R]; C];
    for j in 0..C {
        for r in 0..R {
            acc[j][r] = s.mul(s.load(&out_qd[j * width + r * S::LANES..]), s.splat(keep[i + j]));
        }
    }
    let n_blocks = span.blocks.len();
    assert!(n_blocks <= SPAN_BLOCKS && span.n_positions.div_ceil(BLOCK_TOKENS) == n_blocks);
    let mut rows = [[std::ptr::null(); R]; SPAN_BLOCKS];
    let mut ahead = [[std::ptr::null(); R]; SPAN_BLOCKS];
    for (b, &block) in span.blocks.iter().enumerate() {
        let values = span.kv.block(block).1;
        let next = if i == 0 { span.ahead::<S>(n_blocks + b) } else { &[] };
        for r in 0..R {
            let at = E::at(0, col + r * S::LANES, width);
            rows[b][r] = values[at..].as_ptr();
            ahead[b][r] = next.as_ptr().wrapping_add(at);
        }
    }
    let w = weights[i..i + C].as_ptr().cast::<f32>();
    let n_whole = span.n_positions / BLOCK_TOKENS;
    // SAFETY: values have BLOCK_TOKENS rows `width` wide, and R registers from col on are inside; there are weights of C
    // queries, SPAN apart.
    unsafe {
        acc = whole_blocks::<S, E, R, C>(s, acc, (&rows, &ahead), (n_whole, width), w);
        if n_whole < n_blocks {
            let n = span.n_positions % BLOCK_TOKENS;
            let w = w.add(n_whole * BLOCK_TOKENS);
            acc = chains::<S, E, R, C, 1, SPAN>(s, acc, (rows[n_whole], ahead[n_whole]), (n, width), w);
        }
    }
    for j in 0..C {
        for r in 0..R {
            s.store(&mut out_qd[j * width + r * S::LANES..][..S::LANES], acc[j][r]);
        }
    }
}

/// [`chains`] through `n_blocks` matrices of BLOCK_TOKENS rows, in one loop: two, one inside the other, would keep the sums in
/// memory.
///
/// # Safety
/// As there, for each of the blocks.
#[inline(always)]
unsafe fn whole_blocks<S: Simd, E: Cached, const R: usize, const C: usize>(
    s: S,
    mut acc: [[S::F; R]; C],
    (rows, ahead): (&[[*const E; R]; SPAN_BLOCKS], &[[*const E; R]; SPAN_BLOCKS]),
    (n_blocks, width): (usize, usize),
    w: *const f32,
) -> [[S::F; R]; C] {
    const PAIRS: usize = BLOCK_TOKENS / 2;
    let again = again::<S, _>(rows);
    // SAFETY: the caller's promise.
    unsafe {
        for pair in 0..n_blocks * PAIRS {
            let (b, k) = (pair / PAIRS, pair % PAIRS * 2);
            for r in 0..R {
                s.prefetch_l2(ahead[b][r].wrapping_add(k * width).cast());
            }
            acc = row::<S, E, R, C, SPAN, false>(s, acc, rows[b], (k, width), w.add(2 * pair));
            acc = row::<S, E, R, C, SPAN, true>(s, acc, again[b], (k, width), w.add(2 * pair + 1));
        }
    }
    acc
}

/// acc[j][r] + Σ_k m_r[k] · x[k · XK + j · XJ] for k in 0..n, in this order: `R` registers of columns of a matrix `width`
/// wide, times `C` vectors. The same places from `ahead` on are asked for.
///
/// # Safety
/// `rows` point at registers of row 0 of matrices with n rows, rounded up to two, and all the x are readable.
#[inline(always)]
unsafe fn chains<S: Simd, E: Cached, const R: usize, const C: usize, const XK: usize, const XJ: usize>(
    s: S,
    mut acc: [[S::F; R]; C],
    (rows, ahead): ([*const E; R], [*const E; R]),
    (n, width): (usize, usize),
    x: *const f32,
) -> [[S::F; R]; C] {
    let again = again::<S, _>(&rows);
    // SAFETY: the caller's promise.
    unsafe {
        for k in (0..n & !1).step_by(2) {
            for r in 0..R {
                s.prefetch_l2(ahead[r].wrapping_add(k * width).cast());
            }
            acc = row::<S, E, R, C, XJ, false>(s, acc, rows, (k, width), x.add(k * XK));
            acc = row::<S, E, R, C, XJ, true>(s, acc, *again, (k, width), x.add((k + 1) * XK));
        }
        if n % 2 == 1 {
            acc = row::<S, E, R, C, XJ, false>(s, acc, rows, (n - 1, width), x.add((n - 1) * XK));
        }
    }
    acc
}

/// The same, which the compiler does not know: with 16 registers it would keep what an even row was made of for the odd
/// one, and the sums in memory for it.
#[inline(always)]
fn again<S: Simd, T>(rows: &T) -> &T {
    if S::REGISTERS == 16 { black_box(rows) } else { rows }
}

/// One row of [`chains`]: `k`, which is even, or (`ODD`) the one after it.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn row<S: Simd, E: Cached, const R: usize, const C: usize, const XJ: usize, const ODD: bool>(
    s: S,
    mut acc: [[S::F; R]; C],
    rows: [*const E; R],
    (k, width): (usize, usize),
    x: *const f32,
) -> [[S::F; R]; C] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut m = [s.zero(); R];
        for r in 0..R {
            m[r] = E::load::<S, ODD>(s, rows[r].add(k * width), width);
        }
        for j in 0..C {
            let x = s.splat(*x.add(j * XJ));
            for r in 0..R {
                acc[j][r] = s.fma(m[r], x, acc[j][r]);
            }
        }
    }
    acc
}

/// One query's merging of what was computed elsewhere: `out = keep · out + take · part`.
pub(super) struct Merge<'a> {
    pub(super) out_d: &'a mut [f32],
    pub(super) part_d: &'a [f32],
    pub(super) keep: f32,
    pub(super) take: f32,
}

dispatch!(pub(super) fn merge(task: &mut Merge<'_>) = merge_simd);

#[inline(always)]
fn merge_simd<S: Simd>(s: S, task: &mut Merge<'_>) {
    let (keep, take) = (s.splat(task.keep), s.splat(task.take));
    for (out, part) in task.out_d.chunks_mut(S::LANES).zip(task.part_d.chunks(S::LANES)) {
        s.store(out, s.fma(s.load(part), take, s.mul(s.load(out), keep)));
    }
}
