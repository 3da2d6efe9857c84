//! Workers that train by themselves and meet now and then: the same bits on any number of ranks, stopped and resumed or
//! not; what they send; what they learn.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use store::Store;
use train::{Context, Diloco, Error, Event, Guard, Outcome, Plan, Round, Zero};

use crate::{carry_out, context, prepared, results, whole_run};

/// Four workers that meet every four of ten steps: the last round is shorter.
fn of_workers() -> (Arc<dyn Store>, Plan) {
    let (store, mut plan) = prepared();
    plan.steps = 10;
    plan.diloco = Some(Diloco { workers: 4, every_steps: 4, lr: 0.7, momentum: 0.9 });
    (store, plan)
}

fn rounds(store: &Arc<dyn Store>, run: &str) -> Vec<Round> {
    let events = train::read_metrics(store.as_ref(), run).unwrap();
    let rounds = events.into_iter().filter_map(|event| match event {
        Event::Round(round) => Some(round),
        _ => None,
    });
    rounds.collect()
}

/// What of rounds does not depend on ranks and clocks.
fn means(rounds: &[Round]) -> Vec<(u64, u64, u64, u64)> {
    rounds.iter().map(|r| (r.step, r.n_steps, r.loss.to_bits(), r.moved.to_bits())).collect()
}

fn first_and_last(rounds: &[Round]) -> (f64, f64) {
    (rounds[0].loss, rounds[rounds.len() - 1].loss)
}

#[test]
fn workers_on_any_ranks_give_the_same_bits() {
    let (store, plan) = of_workers();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let of_one = rounds(&store, "one");
    assert_eq!(of_one.iter().map(|r| (r.step, r.n_steps)).collect::<Vec<_>>(), [(4, 4), (8, 4), (10, 2)]);
    let (first, last) = first_and_last(&of_one);
    assert!(last < first - 0.3, "nothing was learned: {first} then {last}");
    for (n_ranks, n_threads) in [(1, 3), (2, 2), (4, 4)] {
        let run = format!("on-{n_ranks}-{n_threads}");
        assert!(whole_run(&store, &plan, &run, [n_ranks, n_threads]) == one, "{run}");
        assert_eq!(means(&rounds(&store, &run)), means(&of_one), "{run}");
    }
    let mut other = plan.clone();
    other.diloco.as_mut().unwrap().workers = 2;
    assert!(whole_run(&store, &other, "two-workers", [2, 2]) != one, "the number of workers is of the plan");
    other.diloco = None;
    assert!(whole_run(&store, &other, "together", [2, 2]) != one, "workers that never wait are another plan");
}

#[test]
fn stopped_in_a_round_or_between_and_resumed_changes_no_bit() {
    let (store, plan) = of_workers();
    let whole = whole_run(&store, &plan, "whole", [2, 2]);
    train::create(&store, "parts", &plan, None).unwrap();
    // In the first round: nothing is kept. In the second: the first is. At its end: both.
    // (Of several ranks one might be told before its last step when another is through with it.)
    for (layout, until, kept) in [([4, 4], 2, 0), ([2, 1], 6, 4), ([1, 2], 8, 8)] {
        let (outcome, events) = carry_out(&store, "parts", layout, Some(until));
        assert_eq!(outcome, Outcome::Interrupted);
        let interrupted = events.iter().find_map(|event| match event {
            Event::Interrupted { step } => Some(*step),
            _ => None,
        });
        assert_eq!(interrupted, Some(kept), "{events:?}");
    }
    let (outcome, events) = carry_out(&store, "parts", [2, 2], None);
    assert_eq!(outcome, Outcome::Finished);
    assert!(matches!(&events[0], Event::Started(s) if s.step == 8), "{:?}", events[0]);
    assert!(results(&store, "parts") == whole);
    assert_eq!(means(&rounds(&store, "parts")), means(&rounds(&store, "whole")));
}

#[test]
fn a_workers_damaged_state_falls_back_to_the_meeting_before() {
    let (store, plan) = of_workers();
    let whole = whole_run(&store, &plan, "whole", [1, 1]);
    train::create(&store, "hurt", &plan, None).unwrap();
    // Stopped in the round behind: at the end of one, the other rank might be told before its last step.
    carry_out(&store, "hurt", [2, 2], Some(9));
    let newest = store.list("runs/hurt/checkpoints/00000008").unwrap();
    let victim = newest.iter().find(|o| o.name.as_str().ends_with("worker-00003.adam_v.f32")).unwrap();
    store.put(&victim.name, b"short").unwrap();
    let (_, events) = carry_out(&store, "hurt", [4, 4], None);
    assert!(events.iter().any(|e| matches!(e, Event::CheckpointRefused { step: 8, .. })), "{events:?}");
    assert!(events.iter().any(|e| matches!(e, Event::Started(s) if s.step == 4)), "{events:?}");
    assert!(results(&store, "hurt") == whole);
}

/// One worker that meets itself at each step, without momentum, is plain training but for roundings.
#[test]
fn a_worker_alone_is_plain_training() {
    let (store, mut plan) = prepared();
    let plain = whole_run(&store, &plan, "plain", [1, 1]).1;
    plan.diloco = Some(Diloco { workers: 1, every_steps: 1, lr: 1.0, momentum: 0.0 });
    let alone = whole_run(&store, &plan, "alone", [1, 1]).1;
    assert_eq!(plain.len(), alone.len());
    for ((step, a), (_, b)) in plain.iter().zip(&alone) {
        let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
        assert!((a - b).abs() < 1e-4, "step {step}: {a} {b}");
    }
}

#[test]
fn a_worker_that_goes_wrong_ends_the_run_on_every_rank_alike() {
    let (store, mut plan) = of_workers();
    plan.schedule.lr_peak = 1e30;
    plan.schedule.warmup_steps = 0;
    plan.guard = Guard { skips_max: 1, spike_sigmas: None };
    for n_ranks in [1, 2, 4] {
        let run = format!("wrong-{n_ranks}");
        train::create(&store, &run, &plan, None).unwrap();
        let stop = AtomicBool::new(false);
        let context = Context { n_ranks, n_threads: n_ranks, ..context(&store, &run, &stop) };
        let mut skipped = Vec::new();
        let error = train::run(&context, &mut |event| {
            if let Event::Skipped { step, rank, bad, .. } = event {
                skipped.push((*step, *rank, bad.micro_batch));
            }
        });
        let error = error.unwrap_err();
        assert!(matches!(error, Error::StepsWentWrong { n: 2, step: 3, .. }), "{error}");
        // Each worker's second step, named with its rank and its own micro-batches.
        let of = |worker: usize| (n_ranks > 1).then_some(worker * n_ranks / 4);
        assert_eq!(skipped.len(), 4, "{skipped:?}");
        for (worker, (step, rank, micro_batch)) in skipped.iter().enumerate() {
            assert_eq!((*step, *rank, micro_batch / 2), (2, of(worker), worker), "{skipped:?}");
        }
    }
}

#[test]
fn plans_and_layouts_that_do_not_fit_are_refused() {
    let (store, plan) = of_workers();
    let refused = |change: &dyn Fn(&mut Diloco), word: &str| {
        let mut plan = plan.clone();
        change(plan.diloco.as_mut().unwrap());
        let error = train::create(&store, "bad", &plan, None).unwrap_err().to_string();
        assert!(error.contains(word), "{error} does not say {word}");
    };
    refused(&|d| d.workers = 0, "diloco.workers");
    refused(&|d| d.workers = 3, "diloco.workers must be at least 1 and divide the micro-batches");
    refused(&|d| d.every_steps = 0, "diloco.every_steps");
    refused(&|d| d.lr = f32::NAN, "diloco.lr");
    refused(&|d| d.momentum = 1.0, "diloco.momentum");
    train::create(&store, "r", &plan, None).unwrap();
    let stop = AtomicBool::new(false);
    let context = |n_ranks, zero| Context { n_ranks, zero, ..context(&store, "r", &stop) };
    let error = train::run(&context(8, Zero::Nothing), &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Workers { n_ranks: 8, workers: 4 }), "{error}");
    assert!(matches!(train::run(&context(2, Zero::Optimizer), &mut |_| {}), Err(Error::DilocoDivided)));
}

/// What two ranks send for the same tokens, and what is learned from them.
#[test]
fn a_hundredth_of_the_bytes_buys_nearly_the_same_loss() {
    let (store, mut plan) = prepared();
    plan.steps = 768;
    plan.schedule.lr_peak = 3e-3;
    plan.evaluate.every_steps = 4000;
    plan.checkpoint.every_steps = 1000;
    plan.evaluate.rows_max = 64;
    let sent_and_loss = |run: &str, plan: &Plan| -> (u64, f64) {
        train::create(&store, run, plan, None).unwrap();
        let (outcome, events) = carry_out(&store, run, [2, 2], None);
        assert_eq!(outcome, Outcome::Finished);
        let sent = events.iter().map(|event| match event {
            Event::Step(step) => step.ranks.as_ref().map_or(0, |ranks| ranks.bytes_sent),
            Event::Round(round) => round.ranks.as_ref().map_or(0, |ranks| ranks.bytes_sent),
            _ => 0,
        });
        let loss = events.iter().rev().find_map(|event| match event {
            Event::Eval { nats_per_token, .. } => Some(*nats_per_token),
            _ => None,
        });
        (sent.sum(), loss.unwrap())
    };
    let together = sent_and_loss("together", &plan);
    // Six meetings: too few for the momentum that suits hundreds.
    plan.diloco = Some(Diloco { workers: 2, every_steps: 128, lr: 0.9, momentum: 0.5 });
    let apart = sent_and_loss("apart", &plan);
    assert!(together.0 >= 100 * apart.0, "bytes: {together:?} and {apart:?}");
    assert!(apart.1 < together.1 + 0.08, "nats a token: {together:?} and {apart:?}");
}
