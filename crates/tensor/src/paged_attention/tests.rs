use std::ops::Range;

use super::*;
use crate::rope::{RopeTable, rope_reference};
use crate::testing::{every_pool, numbers};

const BASE: f32 = 1e4;

/// A sequence's queries, keys and values before rotation: `[position][h + 2g][d]`.
struct Sequence {
    qkv: Vec<f32>,
    blocks: Vec<u32>,
    dims: KvDims,
}

impl Sequence {
    fn new(seed: u64, n: usize, dims: KvDims, blocks: impl Iterator<Item = u32>) -> Self {
        let qkv = numbers(seed, n * width(dims)).iter().map(|x| 3.0 * x).collect();
        Self { qkv, blocks: blocks.take(n.div_ceil(BLOCK_TOKENS)).collect(), dims }
    }

    /// Plain attention in f64, `[position][h][d]`.
    fn reference(&self, spec: AttentionSpec) -> Vec<f64> {
        let KvDims { n_heads, n_kv_heads, head_width: d, .. } = self.dims;
        let mut qkv = self.qkv.clone();
        for (position, token) in qkv.chunks_mut(width(self.dims)).enumerate() {
            token[..(n_heads + n_kv_heads) * d]
                .chunks_mut(d)
                .for_each(|head| rope_reference(head, position, BASE));
        }
        let head = |t: usize, i: usize| &qkv[t * width(self.dims) + i * d..][..d];
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let mut out = Vec::new();
        for t in 0..self.qkv.len() / width(self.dims) {
            for h in 0..n_heads {
                let g = h / (n_heads / n_kv_heads);
                let score = |s: usize| dot(head(t, h), head(s, n_heads + g)) * f64::from(spec.scale);
                let n = self.qkv.len() / width(self.dims);
                let seen = match spec.causal {
                    true => spec.window.map_or(0, |window| (t + 1).saturating_sub(window))..t + 1,
                    false => 0..n,
                };
                let weights: Vec<f64> = seen.clone().map(|s| score(s).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d).map(|i| {
                    let value = |s: usize| f64::from(head(s, n_heads + n_kv_heads + g)[i]);
                    weights.iter().zip(seen.clone()).map(|(w, s)| w * value(s)).sum::<f64>() / total
                }));
            }
        }
        out
    }
}

fn width(dims: KvDims) -> usize {
    (dims.n_heads + 2 * dims.n_kv_heads) * dims.head_width
}

/// Runs steps; each names sequences and the ranges of their positions. Returns the outputs by sequence.
fn run(
    pool: &Pool,
    (kv_type, spec): (KvType, AttentionSpec),
    sequences: &[Sequence],
    steps: &[Vec<(usize, Range<usize>)>],
) -> Vec<Vec<f32>> {
    let dims = sequences[0].dims;
    let mut cache = KvCache::new(dims, kv_type, 40);
    let table = RopeTable::new(512, dims.head_width, BASE);
    let mut scratch = AttentionScratch::default();
    let mut results = vec![Vec::new(); sequences.len()];
    for step in steps {
        let mut qkv_no = Vec::new();
        let mut rows = Vec::new();
        for (i, range) in step {
            let seq = &sequences[*i];
            qkv_no.extend_from_slice(&seq.qkv[range.start * width(dims)..range.end * width(dims)]);
            rows.push(PagedRow { n_tokens: range.len(), n_context: range.end, blocks: &seq.blocks });
        }
        let out_width = dims.n_heads * dims.head_width;
        let mut out = vec![f32::NAN; qkv_no.len() / width(dims) * out_width];
        let layer = dims.n_layers - 1;
        cache.append(pool, layer, &mut qkv_no, &rows, Some(&table));
        paged_attention(pool, &mut out, &qkv_no, (&cache, layer, spec), &rows, &mut scratch);
        let mut rest = &out[..];
        for (i, range) in step {
            let (mine, others) = rest.split_at(range.len() * out_width);
            results[*i].extend_from_slice(mine);
            rest = others;
        }
    }
    results
}

/// All positions, and windows shorter and longer than a span.
fn specs(dims: KvDims) -> [AttentionSpec; 3] {
    let plain = AttentionSpec::plain(dims.head_width);
    [
        plain,
        AttentionSpec { window: Some(7), ..plain },
        AttentionSpec { scale: 0.2, window: Some(90), ..plain },
    ]
}

fn shapes() -> [KvDims; 4] {
    [(1, 1, 8), (4, 2, 20), (9, 3, 64), (14, 1, 34)].map(|(n_heads, n_kv_heads, head_width)| KvDims {
        n_layers: 2,
        n_heads,
        n_kv_heads,
        head_width,
    })
}

#[test]
fn agrees_with_plain_attention() {
    for dims in shapes() {
        let sequences = [Sequence::new(1, 150, dims, (0..40).rev())];
        let both_ways = AttentionSpec { causal: false, ..AttentionSpec::plain(dims.head_width) };
        for spec in specs(dims).into_iter().chain([both_ways]) {
            let reference = sequences[0].reference(spec);
            for pool in every_pool() {
                for (kv_type, tolerance) in [(KvType::F32, 1e-5), (KvType::Bf16, 5e-2), (KvType::Int8, 0.2)] {
                    let out = &run(&pool, (kv_type, spec), &sequences, &[vec![(0, 0..150)]])[0];
                    for (i, (out, expected)) in out.iter().zip(&reference).enumerate() {
                        let error = (f64::from(*out) - expected).abs();
                        assert!(
                            error < tolerance,
                            "{dims:?} {spec:?} {kv_type:?} {:?} [{i}]: {out}, not {expected}",
                            pool.level()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_step() {
    for (dims, kv_type) in shapes().into_iter().flat_map(|dims| [(dims, KvType::Bf16), (dims, KvType::Int8)])
    {
        // Long enough for two groups.
        let sequences = [
            Sequence::new(1, 290, dims, (0..20).map(|b| 2 * b)),
            Sequence::new(2, 70, dims, (0..20).map(|b| 39 - 2 * b)),
        ];
        let one_by_one: Vec<_> =
            (0..40).chain(250..290).map(|t| vec![(0, if t == 250 { 40..251 } else { t..t + 1 })]).collect();
        let mut mixed = vec![vec![(1, 0..1), (0, 0..65)], vec![(0, 65..67), (1, 1..64)], vec![(0, 67..200)]];
        mixed.extend((200..206).map(|t| vec![(0, t..t + 1), (1, t - 136..t - 135)]));
        mixed.extend([vec![(0, 206..250)], vec![(0, 250..290)]]);
        for (spec, pool) in
            specs(dims).into_iter().flat_map(|spec| every_pool().map(move |pool| (spec, pool)))
        {
            let single = Pool::with_level(1, pool.level());
            let how = (kv_type, spec);
            let alone = run(&single, how, &sequences, &[vec![(0, 0..290)], vec![(1, 0..70)]]);
            let case = format!("{dims:?}, {how:?}, {:?}, {}", pool.level(), pool.n_threads());
            assert_eq!(run(&pool, how, &sequences, &one_by_one)[0], alone[0], "one by one, {case}");
            assert_eq!(run(&pool, how, &sequences, &mixed), alone, "mixed, {case}");
        }
    }
}

/// Two continuations of one beginning, of which the second writes into a copy of the first's last block.
#[test]
fn a_copied_block_is_a_fork() {
    let dims = shapes()[1];
    let (pool, spec) = (Pool::new(2), AttentionSpec::plain(dims.head_width));
    let first = Sequence::new(1, 40, dims, [5, 3, 1].into_iter());
    let mut second = Sequence::new(2, 40, dims, [5, 7, 2].into_iter());
    second.qkv[..20 * width(dims)].copy_from_slice(&first.qkv[..20 * width(dims)]);
    for kv_type in [KvType::Int8, KvType::Bf16, KvType::F32] {
        let alone = &run(&pool, (kv_type, spec), std::slice::from_ref(&second), &[vec![(0, 0..40)]])[0];
        let mut cache = KvCache::new(dims, kv_type, 8);
        let feed = |cache: &mut KvCache, seq: &Sequence, range: Range<usize>| {
            let mut qkv = seq.qkv[range.start * width(dims)..range.end * width(dims)].to_vec();
            let row = PagedRow { n_tokens: range.len(), n_context: range.end, blocks: &seq.blocks };
            let table = RopeTable::new(64, dims.head_width, BASE);
            let mut out = vec![f32::NAN; range.len() * dims.n_heads * dims.head_width];
            for layer in 0..dims.n_layers {
                let mut qkv = qkv.clone();
                cache.append(&pool, layer, &mut qkv, &[row], Some(&table));
            }
            cache.append(&pool, 1, &mut qkv, &[row], Some(&table));
            paged_attention(
                &pool,
                &mut out,
                &qkv,
                (cache, 1, spec),
                &[row],
                &mut AttentionScratch::default(),
            );
            out
        };
        feed(&mut cache, &first, 0..20);
        cache.copy_block(3, 7, 4);
        feed(&mut cache, &first, 20..40);
        let out = feed(&mut cache, &second, 20..40);
        assert_eq!(out, alone[20 * dims.n_heads * dims.head_width..], "{kv_type:?}");
    }
}

/// Models with learned positions: queries and keys are used as they are.
#[test]
fn without_rope_nothing_turns() {
    let dims = shapes()[1];
    let mut qkv = numbers(3, 5 * width(dims));
    let before = qkv.clone();
    let rows = [PagedRow { n_tokens: 5, n_context: 5, blocks: &[0] }];
    let (pool, mut cache) = (Pool::new(2), KvCache::new(dims, KvType::F32, 1));
    cache.append(&pool, 0, &mut qkv, &rows, None);
    assert_eq!(qkv, before);
    // The first token sees itself alone: its output is its value.
    let mut out = vec![0.0; 5 * dims.n_heads * dims.head_width];
    let spec = AttentionSpec::plain(dims.head_width);
    paged_attention(&pool, &mut out, &qkv, (&cache, 0, spec), &rows, &mut AttentionScratch::default());
    let value = (dims.n_heads + dims.n_kv_heads) * dims.head_width;
    assert_eq!(out[..dims.head_width], qkv[value..value + dims.head_width]);
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let dims = shapes()[0];
    let refused = |n_tokens, n_context, blocks: &[u32], message: &str| {
        let step = || {
            let mut cache = KvCache::new(dims, KvType::F32, 4);
            let mut qkv = vec![0.0; n_tokens * width(dims)];
            let rows = [PagedRow { n_tokens, n_context, blocks }];
            cache.append(&Pool::new(1), 0, &mut qkv, &rows, Some(&RopeTable::new(64, 8, BASE)));
        };
        let panic = std::panic::catch_unwind(step).expect_err(message);
        let text = panic.downcast_ref::<String>().expect("a formatted message");
        assert!(text.contains(message), "{text}");
    };
    refused(1, 17, &[0], "1 blocks for 17 positions");
    refused(1, 1, &[4], "past the cache's 4");
    refused(2, 1, &[0], "2 new of 1");
    refused(0, 1, &[0], "0 new of 1");
    refused(32, 32, &[1, 1], "block 1 is written twice");
}

/// Values left over by another sequence in blocks that are given out again are never read, not even times zero.
#[test]
fn left_over_values_are_not_read() {
    let dims = shapes()[2];
    let how = (KvType::Bf16, AttentionSpec::plain(dims.head_width));
    let clean = Sequence::new(5, 20, dims, 0..2);
    let mut dirty = Sequence::new(6, 32, dims, 0..2);
    dirty.qkv.fill(f32::NAN);
    for pool in every_pool() {
        let alone = run(&pool, how, std::slice::from_ref(&clean), &[vec![(0, 0..20)]]);
        let sequences = [
            Sequence { qkv: clean.qkv.clone(), blocks: clean.blocks.clone(), dims },
            Sequence { qkv: dirty.qkv.clone(), blocks: dirty.blocks.clone(), dims },
        ];
        let after = run(&pool, how, &sequences, &[vec![(1, 0..32)], vec![(0, 0..20)]]);
        assert_eq!(after[0], alone[0]);
    }
}
