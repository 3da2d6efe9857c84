//! The sampler against a plain reference: sort everything, cut, add up.

use super::*;

/// Logits like a model's: a few peaks over a broad floor. Pure function of the seed.
fn logits(seed: u64, vocab: usize, sharpness: f32) -> Vec<f32> {
    let noise = |i: usize| random::uniform(seed, i as u64).max(1e-9);
    (0..vocab).map(|i| -(-noise(i).ln()).ln() as f32 * sharpness).collect()
}

/// The definition of the filters, by sorting: the kept (id, probability) pairs, best first.
fn reference(logits_v: &[f32], sampling: &Sampling) -> Vec<(TokenId, f64)> {
    let scaled = |logit: f32| f64::from(logit) / f64::from(sampling.temperature);
    let max = logits_v.iter().map(|&logit| scaled(logit)).fold(f64::MIN, f64::max);
    let mut kept: Vec<(TokenId, f64)> = logits_v
        .iter()
        .enumerate()
        .map(|(id, &logit)| (id as TokenId, (scaled(logit) - max).exp()))
        .collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.retain(|(_, weight)| *weight > 0.0 && *weight >= f64::from(sampling.min_p));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k);
    }
    let sum: f64 = kept.iter().map(|k| k.1).sum();
    let mut cumulative = 0.0;
    let first_past = kept.iter().position(|k| {
        cumulative += k.1 / sum;
        cumulative >= f64::from(sampling.top_p)
    });
    kept.truncate(first_past.map_or(kept.len(), |i| i + 1));
    if sampling.typical_p < 1.0 {
        kept = typical(kept, f64::from(sampling.typical_p));
    }
    let sum: f64 = kept.iter().map(|k| k.1).sum();
    kept.iter().map(|&(id, weight)| (id, weight / sum)).collect()
}

/// Sorted by |-ln p - H|, until the probabilities reach `typical_p`.
fn typical(mut kept: Vec<(TokenId, f64)>, typical_p: f64) -> Vec<(TokenId, f64)> {
    let sum: f64 = kept.iter().map(|k| k.1).sum();
    kept.iter_mut().for_each(|k| k.1 /= sum);
    let entropy: f64 = kept.iter().map(|k| -k.1 * k.1.ln()).sum();
    let distance = |p: f64| (-p.ln() - entropy).abs();
    kept.sort_by(|a, b| distance(a.1).total_cmp(&distance(b.1)));
    let mut cumulative = 0.0;
    let first_past = kept.iter().position(|k| {
        cumulative += k.1;
        cumulative >= typical_p
    });
    kept.truncate(first_past.map_or(kept.len(), |i| i + 1));
    kept
}

fn draw(logits_v: &[f32], sampling: &Sampling, position: u64) -> Result<TokenId, SampleError> {
    let counts = TokenCounts::default();
    let draw =
        Draw { logits_v, sampling, counts: &counts, allowed: None, banned: &[], position, logprobs: None };
    Sampler::default().draw(&draw).map(|drawn| drawn.id)
}

#[test]
fn the_filters_keep_exactly_what_sorting_keeps() {
    let sampling = |temperature, top_k, top_p, min_p| Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        ..Sampling::default()
    };
    let typical = |typical_p, sampling: Sampling| Sampling { typical_p, ..sampling };
    let cases = [
        sampling(1.0, 5, 1.0, 0.0),
        sampling(1.0, 0, 0.9, 0.0),
        sampling(1.0, 0, 0.05, 0.0),
        sampling(0.7, 40, 0.95, 0.0),
        sampling(2.0, 0, 0.99, 0.0),
        sampling(1.5, 0, 1.0, 0.02),
        sampling(1.0, 50, 0.8, 0.01),
        sampling(1.0, 1, 1.0, 0.0),
        sampling(0.3, 100_000, 0.9, 0.3),
        sampling(1.2, 0, 0.7, 0.001),
        sampling(1.0, 0, 1.0, 1.0),
        typical(0.2, sampling(1.0, 0, 1.0, 0.0)),
        typical(0.9, sampling(0.8, 0, 1.0, 0.0)),
        typical(0.5, sampling(1.0, 30, 0.95, 0.0)),
        typical(0.5, sampling(1.3, 0, 0.9, 0.0)),
    ];
    for (i, sampling) in cases.iter().enumerate() {
        for (seed, vocab) in [(1, 10), (2, 1000), (3, 1003)] {
            let logits_v = logits(seed, vocab, 1.0 + i as f32 * 0.3);
            let max = largest(&logits_v).unwrap().logit;
            let scale = Scale { max, factor: 1.0 / sampling.temperature };
            let mut sampler = Sampler::default();
            let whole = sampler.weigh(&logits_v, scale);
            sampler.candidates.filter(&logits_v, scale, sampling, whole);
            let ids = sampler.candidates.ids();
            let mut expected: Vec<_> = reference(&logits_v, sampling).iter().map(|k| k.0).collect();
            expected.sort_unstable();
            assert_eq!(ids, expected, "case {i}, vocabulary {vocab}");
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits_v = logits(5, 300, 1.0);
    for (temperature, top_k, top_p, typical_p) in
        [(1.0, 0, 1.0, 1.0), (0.8, 20, 1.0, 1.0), (1.3, 0, 0.7, 1.0), (1.0, 0, 1.0, 0.6)]
    {
        let sampling = Sampling { temperature, top_k, top_p, typical_p, seed: 11, ..Sampling::default() };
        let n_draws = 20_000;
        let mut n_drawn = vec![0.0f64; logits_v.len()];
        for position in 0..n_draws {
            n_drawn[draw(&logits_v, &sampling, position).unwrap() as usize] += 1.0;
        }
        let expected = reference(&logits_v, &sampling);
        // Pearson's statistic over the cells large enough for it, the rest in one cell.
        let (mut statistic, mut n_cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
        for &(id, probability) in &expected {
            let (expected, found) = (probability * n_draws as f64, n_drawn[id as usize]);
            n_drawn[id as usize] = 0.0;
            if expected < 20.0 {
                rest = (rest.0 + expected, rest.1 + found);
                continue;
            }
            statistic += (found - expected).powi(2) / expected;
            n_cells += 1.0;
        }
        if rest.0 > 0.0 {
            statistic += f64::powi(rest.1 - rest.0, 2) / rest.0;
        }
        assert!(n_drawn.iter().all(|&n| n == 0.0), "a token outside the kept set was drawn");
        // Mean n, variance 2n: five standard deviations.
        assert!(statistic < n_cells + 5.0 * f64::sqrt(2.0 * n_cells), "{statistic} over {n_cells} cells");
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_only() {
    let logits_v = logits(8, 500, 0.5);
    let with_seed = |seed| Sampling { seed, ..Sampling::default() };
    let ids: Vec<_> = (0..40).map(|p| draw(&logits_v, &with_seed(1), p).unwrap()).collect();
    let mut busy = Sampler::default();
    for position in (0..40).rev() {
        let sampling = with_seed(1);
        let counts = TokenCounts::default();
        let logits_v = &logits_v;
        let draw = Draw {
            logits_v,
            sampling: &sampling,
            counts: &counts,
            allowed: None,
            banned: &[],
            position,
            logprobs: Some(3),
        };
        assert_eq!(busy.draw(&draw).unwrap().id, ids[position as usize]);
    }
    let others: Vec<_> = (0..40).map(|p| draw(&logits_v, &with_seed(2), p).unwrap()).collect();
    assert_ne!(ids, others);
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let mut logits_v = vec![0.0; 100];
    (logits_v[70], logits_v[40]) = (3.0, 3.0);
    assert_eq!(draw(&logits_v, &Sampling::greedy(), 0), Ok(40));
    assert_eq!(draw(&[f32::NEG_INFINITY, -5.0], &Sampling::greedy(), 0), Ok(1));
    // A temperature whose inverse is no number any more is as good as none.
    let coldest = Sampling { temperature: f32::from_bits(1), ..Sampling::default() };
    assert_eq!(draw(&logits_v, &coldest, 0), Ok(40));
}

#[test]
fn only_what_a_constraint_allows_is_drawn() {
    let logits_v = logits(6, 100, 1.0);
    let bits = [1 << 7, 0, 1 << 1 | 1 << 30];
    let counts = TokenCounts::default();
    let by = |sampling: &Sampling, banned: &[TokenId], position| {
        let draw = Draw {
            logits_v: &logits_v,
            sampling,
            counts: &counts,
            allowed: Some(&bits),
            banned,
            position,
            logprobs: Some(2),
        };
        Sampler::default().draw(&draw)
    };
    for sampling in [
        Sampling::greedy(),
        Sampling { temperature: 2.0, ..Sampling::default() },
        Sampling { top_k: 3, typical_p: 0.9, ..Sampling::default() },
        Sampling { logit_bias: vec![(9, 100.0)], ..Sampling::default() },
    ] {
        (0..100).for_each(|p| assert!([7, 65, 94].contains(&by(&sampling, &[], p).unwrap().id)));
        assert_eq!(by(&sampling, &[7, 94], 0).unwrap().id, 65);
        assert_eq!(by(&sampling, &[7, 65, 94], 0), Err(SampleError::NothingLeft));
    }
    // What is reported is the model's own opinion, not the grammar's.
    let top = by(&Sampling::greedy(), &[], 0).unwrap().logprobs.unwrap().top;
    assert_eq!(top, Sampler::default().logprobs(&logits_v, 0, 2).unwrap().top);
}

#[test]
fn impossible_logits_are_errors() {
    for sampling in [Sampling::greedy(), Sampling::default(), Sampling { top_k: 3, ..Sampling::default() }] {
        for position in [0, 17, 32] {
            let mut logits_v = vec![0.0; 33];
            logits_v[position] = f32::NAN;
            assert_eq!(draw(&logits_v, &sampling, 0), Err(SampleError::NotANumber));
            logits_v[position] = f32::INFINITY;
            assert_eq!(draw(&logits_v, &sampling, 0), Err(SampleError::Infinite));
            logits_v[position] = f32::NEG_INFINITY;
            (0..200).for_each(|p| assert_ne!(draw(&logits_v, &sampling, p), Ok(position as TokenId)));
        }
        let nothing = vec![f32::NEG_INFINITY; 33];
        assert_eq!(draw(&nothing, &sampling, 0), Err(SampleError::NothingLeft));
    }
}

#[test]
fn bias_penalties_and_bans_move_the_logits_they_name() {
    let check = |sampling: Sampling, banned: &[TokenId], expected: [f32; 4]| {
        let mut counts = TokenCounts::new(&sampling, &[1]);
        [2, 2].iter().for_each(|&id| counts.add(&sampling, id));
        let logits_v = &[1.0, 2.0, -1.0, 0.0];
        let mut adjusted_v = Vec::new();
        let sampling = &sampling;
        adjust(
            &mut adjusted_v,
            &Draw { logits_v, sampling, counts: &counts, allowed: None, banned, position: 0, logprobs: None },
        );
        assert_eq!(adjusted_v, expected);
    };
    let plain = Sampling::default;
    check(Sampling { logit_bias: vec![(0, 2.5), (3, -1.0)], ..plain() }, &[], [3.5, 2.0, -1.0, -1.0]);
    check(Sampling { presence_penalty: 0.5, ..plain() }, &[], [1.0, 2.0, -1.5, 0.0]);
    check(Sampling { frequency_penalty: 0.5, ..plain() }, &[], [1.0, 2.0, -2.0, 0.0]);
    // The prompt's token 1 and the output's token 2.
    check(Sampling { repetition_penalty: 2.0, ..plain() }, &[], [1.0, 1.0, -2.0, 0.0]);
    check(plain(), &[1], [1.0, f32::NEG_INFINITY, -1.0, 0.0]);
}

#[test]
fn logprobs_sum_to_one_and_come_best_first() {
    let logits_v = logits(9, 777, 3.0);
    let logprobs = Sampler::default().logprobs(&logits_v, 5, 20).unwrap();
    let max = logits_v.iter().fold(f32::MIN, |a, &b| a.max(b));
    let log_sum = logits_v.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
    let exact = |id: TokenId| f64::from(logits_v[id as usize] - max) - log_sum;
    assert!((f64::from(logprobs.logprob) - exact(5)).abs() < 1e-5);
    let mut order: Vec<TokenId> = (0..777).collect();
    order.sort_by(|&a, &b| logits_v[b as usize].total_cmp(&logits_v[a as usize]));
    assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), order[..20]);
    for &(id, logprob) in &logprobs.top {
        assert!((f64::from(logprob) - exact(id)).abs() < 1e-5);
    }
}
