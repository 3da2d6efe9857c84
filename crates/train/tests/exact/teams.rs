//! Ranks that compute one model together: the losses of one rank within a bound, the same bits from run to run and on any
//! number of teams, and checkpoints that any layout goes on from.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use store::Store;
use train::{Context, Diloco, Error, Event, Muon, Outcome, Plan, Zero};

use crate::{context, prepared, results, whole_run};

/// Of the losses of one rank; sums of four parts are rounded otherwise than one.
const BOUND: f64 = 1e-4;

/// So many ranks, so many of which compute a model together, until a step.
struct Layout {
    n_ranks: usize,
    n_team: usize,
    until: Option<u64>,
}

fn prepared_for_teams() -> (Arc<dyn Store>, Plan) {
    let (store, mut plan) = prepared();
    plan.model["num_attention_heads"] = 8.into();
    plan.model["num_key_value_heads"] = 4.into();
    (store, plan)
}

fn carry_out(store: &Arc<dyn Store>, run: &str, layout: &Layout) -> Outcome {
    let stop = AtomicBool::new(false);
    let Layout { n_ranks, n_team, until } = *layout;
    let context = Context { n_ranks, n_team, n_threads: n_ranks, ..context(store, run, &stop) };
    let outcome = train::run(&context, &mut |event| {
        if matches!(event, Event::Step(s) if Some(s.step) == until) {
            stop.store(true, Ordering::Relaxed);
        }
        assert!(
            !matches!(event, Event::CheckpointFailed { .. } | Event::CheckpointRefused { .. }),
            "{event:?}"
        );
    });
    outcome.unwrap()
}

fn run_on(store: &Arc<dyn Store>, plan: &Plan, run: &str, layouts: &[Layout]) -> (Vec<u8>, Vec<(u64, u64)>) {
    train::create(store, run, plan, None).unwrap();
    for layout in layouts {
        let outcome = carry_out(store, run, layout);
        assert_eq!(outcome == Outcome::Finished, layout.until.is_none(), "{run}");
    }
    results(store, run)
}

fn assert_near(one: &[(u64, u64)], other: &[(u64, u64)]) {
    assert_eq!(one.len(), other.len());
    for ((step, a), (_, b)) in one.iter().zip(other) {
        let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
        assert!((a - b).abs() < BOUND * a, "step {step}: {a} and {b}");
    }
}

#[test]
fn teams_learn_what_one_rank_does() {
    let (store, plan) = prepared_for_teams();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    for n_team in [2, 4] {
        let of = |n_teams: usize, run: &str| {
            let layout = Layout { n_ranks: n_teams * n_team, n_team, until: None };
            run_on(&store, &plan, &format!("{run}-{n_teams}-{n_team}"), &[layout])
        };
        let alone = of(1, "team");
        assert_near(&one.1, &alone.1);
        assert!(of(1, "again") == alone, "a team of {n_team} is equal to itself");
        for n_teams in [2, 4] {
            assert!(of(n_teams, "teams") == alone, "{n_teams} teams of {n_team}");
        }
    }
}

#[test]
fn checkpoints_of_teams_load_on_any_layout() {
    let (store, plan) = prepared_for_teams();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let layout = |n_ranks, n_team, until| Layout { n_ranks, n_team, until };
    let parts = [layout(4, 2, Some(1)), layout(1, 1, Some(2)), layout(4, 4, Some(4)), layout(8, 2, None)];
    assert_near(&one.1, &run_on(&store, &plan, "parts", &parts).1);
    // Where the layout stays the same, stopping changes no bit.
    let whole = run_on(&store, &plan, "whole", &[layout(4, 2, None)]);
    assert!(run_on(&store, &plan, "stopped", &[layout(4, 2, Some(3)), layout(2, 2, None)]) == whole);
}

#[test]
fn what_teams_cannot_do_is_refused_by_name() {
    let (store, plan) = prepared_for_teams();
    let stop = AtomicBool::new(false);
    let refused = |run: &str, plan: &Plan, ([n_ranks, n_team], zero): ([usize; 2], Zero), words: &str| {
        train::create(&store, run, plan, None).unwrap();
        let context = Context { n_ranks, n_team, zero, ..context(&store, run, &stop) };
        let error = train::run(&context, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{error} does not say {words}");
    };
    refused("a", &plan, ([4, 3], Zero::Nothing), "4 ranks are no whole number of teams of 3");
    refused("b", &plan, ([8, 8], Zero::Nothing), "4 heads of keys and values");
    refused("c", &plan, ([2, 2], Zero::Optimizer), "--zero");
    refused("d", &Plan { muon: Some(Muon::default()), ..plan.clone() }, ([2, 2], Zero::Nothing), "Muon");
    let diloco = Some(Diloco { workers: 2, ..Diloco::DEFAULT });
    refused("e", &Plan { diloco, ..plan.clone() }, ([2, 2], Zero::Nothing), "--diloco");
    let stop = AtomicBool::new(false);
    let context = Context { n_ranks: 32, n_team: 2, ..context(&store, "a", &stop) };
    assert!(matches!(train::run(&context, &mut |_| {}), Err(Error::Ranks { n_ranks: 16, .. })));
}
