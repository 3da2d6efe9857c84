use super::*;
use crate::config::tests::tiny;

const B: usize = 3;
const T: usize = 9;

fn tokens(config: &Config, salt: u32) -> Vec<u32> {
    (0..(B * T) as u32).map(|i| (i * i * 7 + i * 3 + salt) % config.vocab as u32).collect()
}

/// Weights far larger than at the start of training, so that every gradient is well above the noise.
fn params(table: &ParamTable) -> Buf<f32> {
    let mut params = table.init(1);
    params.iter_mut().for_each(|x| *x *= if *x == 1.0 { 1.0 } else { 10.0 });
    params
}

#[test]
fn gradients_match_finite_differences() {
    for tied_embeddings in [true, false] {
        let config = Config { tied_embeddings, ..tiny() };
        let pool = Pool::new(2);
        let mut model = TrainModel::new(&config, B, T, Precision::F32);
        let mut params = params(model.table());
        let (tokens, mut targets) = (tokens(&config, 0), tokens(&config, 5));
        targets[4] = IGNORED;
        let mut dparams = vec![f32::NAN; params.len()];
        let loss = model.loss_and_grads(&pool, &params, &tokens, &targets, &mut dparams);
        assert_eq!(loss.n_tokens, B * T - 1);
        assert_eq!(model.loss(&pool, &params, &tokens, &targets).n_tokens, loss.n_tokens);
        let specs = model.table().specs().to_vec();
        for spec in specs {
            for i in spec.range.clone().step_by(spec.range.len().div_ceil(7)) {
                let (old, h) = (params[i], 4e-3);
                let mut at = |x: f32| {
                    params[i] = x;
                    model.loss(&pool, &params, &tokens, &targets).nats
                };
                let slope = (at(old + h) - at(old - h)) / f64::from((old + h) - (old - h));
                at(old);
                let found = f64::from(dparams[i]);
                let tolerance = 5e-3 * slope.abs().max(0.5);
                assert!(
                    (found - slope).abs() < tolerance,
                    "{} at {i}: {found}, differences: {slope}",
                    spec.name
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_earlier_calls() {
    let config = tiny();
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |n_threads: usize, n_calls: usize| {
            let pool = Pool::new(n_threads);
            let mut model = TrainModel::new(&config, B, T, precision);
            let params = params(model.table());
            let (tokens, targets) = (tokens(&config, 0), tokens(&config, 5));
            let mut dparams = vec![0.0; params.len()];
            let mut loss = LossSum::default();
            for _ in 0..n_calls {
                loss = model.loss_and_grads(&pool, &params, &tokens, &targets, &mut dparams);
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

#[test]
fn ignored_targets_leave_no_trace() {
    let config = tiny();
    let pool = Pool::new(1);
    let mut model = TrainModel::new(&config, B, T, Precision::F32);
    let params = params(model.table());
    let mut dparams = vec![9.0; params.len()];
    let loss = model.loss_and_grads(&pool, &params, &tokens(&config, 0), &[IGNORED; B * T], &mut dparams);
    assert_eq!(loss, LossSum { nats: 0.0, n_tokens: 0 });
    assert!(dparams.iter().all(|x| *x == 0.0));
}
