use tensor::Buf;
use tensor::cross_entropy::IGNORED;
use tensor::packed::WeightKind;

use super::*;
use crate::config::tests::tiny;
use crate::{Architecture, Lora, ParamSpec, Weights, Window};

pub(super) const B: usize = 3;
pub(super) const T: usize = 9;

pub(super) fn tokens(config: &Config, salt: u32) -> Vec<u32> {
    (0..(B * T) as u32).map(|i| (i * i * 7 + i * 3 + salt) % config.vocab as u32).collect()
}

/// Weights far larger than at the start of training, so that every gradient is well above the noise.
pub(super) fn params(trainable: &Trainable) -> Buf<f32> {
    let mut params = trainable.init(1);
    params.iter_mut().for_each(|x| *x *= if *x == 1.0 { 1.0 } else { 10.0 });
    params
}

pub(super) fn plain<'a>(tokens: &'a [u32], targets: &'a [u32]) -> (MicroBatch<'a>, Objective) {
    (MicroBatch::plain(tokens, targets), Objective::CrossEntropy)
}

/// One of every kind of block.
pub(super) fn configs() -> Vec<Config> {
    let of = |architecture| Config { architecture, ..tiny() };
    let window = Window { n_positions: 4, rope_theta: Some(100.0), layers: vec![true, false] };
    vec![
        tiny(),
        Config { tied_embeddings: false, ..tiny() },
        Config { window: Some(Window { rope_theta: None, ..window.clone() }), ..tiny() },
        of(Architecture::Qwen2),
        of(Architecture::Qwen3),
        Config { window: Some(window), query_scalar: Some(5.0), ..of(Architecture::Gemma3) },
        Config { n_kv_heads: 4, head_width: 6, ..of(Architecture::Gpt2) },
    ]
}

/// Three documents in the first row, one in each of the others.
fn starts() -> Vec<u32> {
    let first = [0, 0, 0, 3, 4, 4, 4, 4, 4];
    first.into_iter().chain([0; (B - 1) * T]).collect()
}

#[track_caller]
fn check_gradients(model: &mut TrainModel, params: &mut [f32], of: (MicroBatch, Objective)) {
    let pool = Pool::new(2);
    let mut dparams = vec![f32::NAN; params.len()];
    let loss = model.loss_and_grads(&pool, params, of, &mut dparams);
    let alone = model.loss(&pool, params, of);
    assert_eq!((alone.n_tokens, alone.margin), (loss.n_tokens, loss.margin));
    assert!((alone.nats - loss.nats).abs() < 1e-5 * loss.nats, "{} and {}", alone.nats, loss.nats);
    let specs: Vec<ParamSpec> = model.trainable().specs().to_vec();
    for spec in specs {
        for i in spec.range.clone().step_by(spec.range.len().div_ceil(7)) {
            let (old, h) = (params[i], 4e-3);
            let mut at = |x: f32| {
                params[i] = x;
                model.loss(&pool, params, of).nats
            };
            let slope = (at(old + h) - at(old - h)) / f64::from((old + h) - (old - h));
            at(old);
            let found = f64::from(dparams[i]);
            let tolerance = 5e-3 * slope.abs().max(0.5);
            assert!((found - slope).abs() < tolerance, "{} at {i}: {found}, differences: {slope}", spec.name);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for config in configs() {
        let mut model = TrainModel::new(Trainable::new(&config), B, T, Precision::F32);
        let mut params = params(model.trainable());
        let (tokens, mut targets) = (tokens(&config, 0), tokens(&config, 5));
        targets[4] = IGNORED;
        let batch = MicroBatch::plain(&tokens, &targets);
        let starts = starts();
        for starts_bt in [None, Some(&starts[..])] {
            let batch = MicroBatch { starts_bt, ..batch };
            check_gradients(&mut model, &mut params, (batch, Objective::CrossEntropy));
        }
    }
}

/// A document's losses do not depend on what else is in its row, or where.
#[test]
fn packed_documents_lose_what_they_lose_alone() {
    let (pool, n) = (Pool::new(2), 5);
    for config in configs() {
        let mut model = TrainModel::new(Trainable::new(&config), B, T, Precision::F32);
        let params = params(model.trainable());
        let (mut tokens, mut targets) = (tokens(&config, 0), tokens(&config, 5));
        targets[..T - n].fill(IGNORED);
        targets[T..].fill(IGNORED);
        let starts = starts();
        let batch = MicroBatch { starts_bt: Some(&starts), ..MicroBatch::plain(&tokens, &targets) };
        let packed = model.loss(&pool, &params, (batch, Objective::CrossEntropy)).nats;
        tokens.copy_within(T - n..T, 0);
        targets.copy_within(T - n..T, 0);
        targets[n..].fill(IGNORED);
        let alone = model.loss(&pool, &params, plain(&tokens, &targets)).nats;
        assert!((packed - alone).abs() < 1e-5 * alone, "{packed} packed, {alone} alone");
    }
}

fn lora() -> Lora {
    Lora { rank: 3, alpha: 6.0, targets: vec!["all-linear".into()] }
}

/// B starts at zero, where A has no gradient.
fn changed(trainable: &Trainable) -> Buf<f32> {
    let mut params = trainable.init(1);
    let zeros = params.iter_mut().enumerate().filter(|(_, x)| **x == 0.0);
    zeros.for_each(|(i, x)| *x = (i % 9) as f32 * 0.03 - 0.1);
    params
}

fn weights(config: &Config) -> Weights {
    let trainable = Trainable::new(config);
    trainable.to_weights(&Pool::new(1), &params(&trainable), WeightKind::F32)
}

#[test]
fn gradients_of_low_rank_changes_match_finite_differences() {
    for config in configs() {
        let trainable = Trainable::lora(weights(&config), &lora()).unwrap();
        let mut model = TrainModel::new(trainable, B, T, Precision::F32);
        let mut params = changed(model.trainable());
        let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
        check_gradients(&mut model, &mut params, plain(&tokens, &targets));
    }
}

#[test]
fn gradients_of_preferences_match_finite_differences() {
    let (b, config) = (2, tiny());
    let (tokens, mut targets) = (tokens(&config, 0), tokens(&config, 5));
    targets[..3].fill(IGNORED);
    targets[T..T + 2].fill(IGNORED);
    let of = (MicroBatch::plain(&tokens[..b * T], &targets[..b * T]), Objective::Dpo { beta: 0.2 });
    for trainable in [Trainable::from_weights(weights(&config)), Trainable::lora(weights(&config), &lora())] {
        let mut model = TrainModel::new(trainable.unwrap(), b, T, Precision::F32);
        let mut params = model.trainable().init(1);
        let start = model.loss(&Pool::new(1), &params, of);
        assert_eq!((start.margin, start.n_tokens), (0.0, 1), "the start is its own reference");
        params.iter_mut().enumerate().for_each(|(i, x)| *x += (i % 9) as f32 * 0.02 - 0.08);
        check_gradients(&mut model, &mut params, of);
    }
}

/// A teacher of another shape, with the same ids.
fn teacher(config: &Config) -> Teacher {
    let other = Config { n_layers: 1, ff_width: 24, vocab: config.vocab, ..tiny() };
    Teacher::new(Trainable::from_weights(weights(&other)).unwrap(), [B, T], Precision::F32)
}

#[test]
fn gradients_of_distillation_match_finite_differences() {
    for config in configs() {
        let (tokens, mut targets) = (tokens(&config, 0), tokens(&config, 5));
        targets[4] = IGNORED;
        let starts = starts();
        let batch = MicroBatch { starts_bt: Some(&starts), ..MicroBatch::plain(&tokens, &targets) };
        let of = (batch, Objective::Distill { weight: 0.6, temperature: 2.0 });
        let lora = Trainable::lora(weights(&config), &lora()).unwrap();
        for (trainable, is_lora) in [(Trainable::new(&config), false), (lora, true)] {
            let model = TrainModel::new(trainable, B, T, Precision::F32);
            let mut model = model.with_teacher(teacher(&config));
            let mut params =
                if is_lora { changed(model.trainable()) } else { self::params(model.trainable()) };
            check_gradients(&mut model, &mut params, of);
        }
    }
}

#[test]
fn a_teacher_pulls_and_a_model_that_agrees_with_its_own_does_not_move() {
    let (pool, config) = (Pool::new(2), tiny());
    let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
    let same = || Trainable::from_weights(weights(&config)).unwrap();
    let grads = |teacher: Option<Teacher>, objective: Objective| {
        let model = TrainModel::new(same(), B, T, Precision::F32);
        let mut model = match teacher {
            Some(teacher) => model.with_teacher(teacher),
            None => model,
        };
        let params = model.trainable().init(0);
        let mut dparams = vec![0.0; params.len()];
        let loss =
            model.loss_and_grads(&pool, &params, (plain(&tokens, &targets).0, objective), &mut dparams);
        (loss.nats, dparams)
    };
    let largest = |grads: &[f32]| grads.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let (plain_nats, plain) = grads(None, Objective::CrossEntropy);
    let own = Teacher::new(same(), [B, T], Precision::F32);
    let alone = Objective::Distill { weight: 1.0, temperature: 2.0 };
    let (own_nats, of_own) = grads(Some(own), alone);
    assert!(own_nats.abs() < 1e-3 && largest(&of_own) < 1e-3 * largest(&plain), "{own_nats}");
    let (other_nats, of_other) = grads(Some(teacher(&config)), alone);
    assert!(other_nats > 1.0 && largest(&of_other) > 0.01 * largest(&plain), "{other_nats} {plain_nats}");
}

#[test]
fn merged_changes_and_an_adapter_are_one_model() {
    for config in configs() {
        let pool = Pool::new(2);
        let trainable = Trainable::lora(weights(&config), &lora()).unwrap();
        let params = changed(&trainable);
        let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
        let merged = Trainable::from_weights(trainable.to_weights(&pool, &params, WeightKind::F32)).unwrap();
        let mut model = TrainModel::new(trainable, B, T, Precision::F32);
        let adapted = model.loss(&pool, &params, plain(&tokens, &targets)).nats;
        let mut model = TrainModel::new(merged, B, T, Precision::F32);
        let start = model.trainable().init(0);
        let merged = model.loss(&pool, &start, plain(&tokens, &targets)).nats;
        assert_eq!(adapted, merged);
        let mut model =
            TrainModel::new(Trainable::from_weights(weights(&config)).unwrap(), B, T, Precision::F32);
        let unchanged = model.loss(&pool, &model.trainable().init(0), plain(&tokens, &targets)).nats;
        assert_ne!(adapted, unchanged, "the changes do nothing");
    }
}

#[test]
fn settings_that_fit_no_matrix_are_refused_by_name() {
    let refused =
        |settings: Lora| Trainable::lora(weights(&tiny()), &settings).err().expect("refused").to_string();
    assert!(refused(Lora { targets: vec!["q_proj".into(), "c_attn".into()], ..lora() }).contains("c_attn"));
    assert!(refused(Lora { targets: vec!["lm_head".into()], ..lora() }).contains("lm_head"));
    assert!(refused(Lora { targets: Vec::new(), ..lora() }).contains("0 targets"));
    assert!(refused(Lora { rank: 0, ..lora() }).contains("rank"));
    assert!(refused(Lora { alpha: f32::NAN, ..lora() }).contains("alpha"));
}

#[test]
fn bits_do_not_depend_on_threads_or_earlier_calls() {
    let starts = starts();
    for (config, precision) in
        configs().into_iter().flat_map(|c| [(c.clone(), Precision::F32), (c, Precision::Bf16)])
    {
        for has_lora in [false, true] {
            let run = |n_threads: usize, n_calls: usize| {
                let pool = Pool::new(n_threads);
                let trainable = match has_lora {
                    true => Trainable::lora(weights(&config), &lora()).unwrap(),
                    false => Trainable::new(&config),
                };
                let mut model = TrainModel::new(trainable, B, T, precision);
                let params = params(model.trainable());
                let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
                let batch = MicroBatch { starts_bt: Some(&starts), ..MicroBatch::plain(&tokens, &targets) };
                let mut dparams = vec![0.0; params.len()];
                let mut loss = LossSum::default();
                for _ in 0..n_calls {
                    let of = (batch, Objective::CrossEntropy);
                    loss = model.loss_and_grads(&pool, &params, of, &mut dparams);
                }
                (loss, dparams)
            };
            let one = run(1, 1);
            assert!(one.0.nats.is_finite());
            for (n_threads, n_calls) in [(1, 2), (2, 1), (3, 1), (3, 3)] {
                assert_eq!(run(n_threads, n_calls), one, "{n_threads} threads, {n_calls} calls");
            }
        }
    }
}

/// Of one layer at a time: two calls, so that nothing lives on from the one before.
#[test]
fn layers_computed_again_give_the_same_bits() {
    let starts = starts();
    for config in configs() {
        let three = Config { n_layers: 3, ..config };
        let three = match three.window.clone() {
            Some(window) => {
                let layers = vec![true, false, true];
                Config { window: Some(Window { layers, ..window }), ..three }
            }
            None => three,
        };
        for has_lora in [false, true] {
            let run = |recompute: bool, n_calls: u32| {
                let pool = Pool::new(2);
                let trainable = match has_lora {
                    true => Trainable::lora(weights(&three), &lora()).unwrap(),
                    false => Trainable::new(&three),
                };
                let mut params = changed(&trainable);
                if !has_lora {
                    params = self::params(&trainable);
                }
                let mut model = TrainModel::new(trainable, B, T, Precision::F32).with_recompute(recompute);
                let mut dparams = vec![0.0; params.len()];
                let mut loss = LossSum::default();
                for call in 0..n_calls {
                    let (tokens, targets) = (tokens(&three, n_calls - call), tokens(&three, 5));
                    let batch =
                        MicroBatch { starts_bt: Some(&starts), ..MicroBatch::plain(&tokens, &targets) };
                    let of = (batch, Objective::CrossEntropy);
                    loss = model.loss_and_grads(&pool, &params, of, &mut dparams);
                }
                (loss, dparams.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            let kept = run(false, 1);
            assert!(kept == run(true, 1) && kept == run(true, 2), "{:?}", three.architecture);
        }
    }
}

/// The policy's layers are those that are computed again, not its start's.
#[test]
fn preferences_computed_again_give_the_same_bits() {
    let (b, config) = (2, tiny());
    let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
    let of = (MicroBatch::plain(&tokens[..b * T], &targets[..b * T]), Objective::Dpo { beta: 0.2 });
    let [kept, again] = [false, true].map(|recompute| {
        let trainable = Trainable::lora(weights(&config), &lora()).unwrap();
        let mut params = changed(&trainable);
        params.iter_mut().for_each(|x| *x += 0.01);
        let mut model = TrainModel::new(trainable, b, T, Precision::F32).with_recompute(recompute);
        let mut dparams = vec![0.0; params.len()];
        (model.loss_and_grads(&Pool::new(2), &params, of, &mut dparams), dparams)
    });
    assert!(kept == again && kept.0.margin != 0.0);
}

#[test]
fn ignored_targets_leave_no_trace() {
    for config in configs() {
        let pool = Pool::new(1);
        let mut model = TrainModel::new(Trainable::new(&config), B, T, Precision::F32);
        let params = params(model.trainable());
        let mut dparams = vec![9.0; params.len()];
        let (tokens, targets) = (tokens(&config, 0), [IGNORED; B * T]);
        let loss = model.loss_and_grads(&pool, &params, plain(&tokens, &targets), &mut dparams);
        assert_eq!(loss, LossSum::default());
        assert!(dparams.iter().all(|x| *x == 0.0));
    }
}
