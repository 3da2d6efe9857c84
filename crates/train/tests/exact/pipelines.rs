//! Ranks that form pipelines: the bytes of one rank, on any number of stages and pipelines, stopped and resumed or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use store::Store;
use train::{Context, Event, Outcome, Plan};

use crate::{context, prepared, results, whole_run};

/// So many ranks, in pipelines of so many stages, until a step.
#[derive(Clone, Copy)]
struct Layout {
    n_ranks: usize,
    n_stages: usize,
    until: Option<u64>,
}

fn on(n_ranks: usize, n_stages: usize) -> Layout {
    Layout { n_ranks, n_stages, until: None }
}

fn deep() -> (Arc<dyn Store>, Plan) {
    let (store, mut plan) = prepared();
    plan.model["num_hidden_layers"] = 5.into();
    (store, plan)
}

fn untied(mut plan: Plan) -> Plan {
    plan.model["tie_word_embeddings"] = false.into();
    plan
}

fn carry_out(store: &Arc<dyn Store>, run: &str, layout: Layout) -> Outcome {
    let stop = AtomicBool::new(false);
    let Layout { n_ranks, n_stages, until } = layout;
    // Some layouts compute layers again.
    let recompute = n_ranks == 8;
    let context = Context { n_ranks, n_stages, recompute, n_threads: n_ranks, ..context(store, run, &stop) };
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

/// Weights and losses.
type Results = (Vec<u8>, Vec<(u64, u64)>);

fn run_on(store: &Arc<dyn Store>, plan: &Plan, run: &str, layouts: &[Layout]) -> Results {
    train::create(store, run, plan, None).unwrap();
    for layout in layouts {
        let outcome = carry_out(store, run, *layout);
        assert_eq!(outcome == Outcome::Finished, layout.until.is_none(), "{run}");
    }
    results(store, run)
}

/// Norms of gradients, and what held-out text loses.
fn norms(store: &Arc<dyn Store>, run: &str) -> Vec<u64> {
    let events = train::read_metrics(store.as_ref(), run).unwrap();
    let number = |event: &Event| match event {
        Event::Step(step) => Some(step.grad_norm.to_bits()),
        Event::Eval { nats_per_token, .. } => Some(nats_per_token.to_bits()),
        _ => None,
    };
    events.iter().filter_map(number).collect()
}

#[test]
fn stages_change_no_bit() {
    let (store, tied) = deep();
    for (name, plan) in [("untied", untied(tied.clone())), ("tied", tied)] {
        let one = whole_run(&store, &plan, &format!("one-{name}"), [1, 1]);
        for (n_ranks, n_stages) in [(2, 2), (4, 4), (4, 2), (8, 4), (8, 2)] {
            let run = format!("{name}-{n_ranks}-{n_stages}");
            assert!(run_on(&store, &plan, &run, &[on(n_ranks, n_stages)]) == one, "{run}");
            assert_eq!(norms(&store, &run), norms(&store, &format!("one-{name}")), "{run}");
        }
    }
}
