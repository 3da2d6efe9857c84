//! Ranks that form pipelines: the bytes of one rank, on any number of stages and pipelines, stopped and resumed or not.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use store::Store;
use train::{Context, Diloco, Event, Muon, Outcome, Plan, Zero};

use crate::{carry_out_until, context, prepared, results, whole_run};

/// So many ranks, in pipelines of so many stages, until a step.
#[derive(Clone, Copy)]
struct Layout {
    n_ranks: usize,
    n_stages: usize,
    /// Ranks that share the layers of a stage.
    n_team: usize,
    zero: Zero,
    until: Option<u64>,
}

fn on(n_ranks: usize, n_stages: usize) -> Layout {
    Layout { n_ranks, n_stages, n_team: 1, zero: Zero::Nothing, until: None }
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
    let Layout { n_ranks, n_stages, n_team, zero, until } = layout;
    // Some layouts compute layers again.
    let recompute = n_ranks == 8;
    let of_model = Context { n_stages, n_team, zero, ..context(store, run, &stop) };
    let context = Context { n_ranks, recompute, n_threads: n_ranks, ..of_model };
    carry_out_until(&context, &stop, until)
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

/// Of other kinds of layers than Llama's, and with what matters once a step.
#[test]
fn stages_of_every_kind_change_no_bit() {
    let (store, plan) = deep();
    let vocab = plan.model["vocab_size"].clone();
    let gpt2 = serde_json::json!({
        "model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": vocab, "n_positions": 32,
    });
    let qwen3 = serde_json::json!({
        "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "vocab_size": vocab,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "max_position_embeddings": 32,
    });
    let of = |model| Plan { model, steps: 3, ..plan.clone() };
    let muon = Plan { muon: Some(Muon::default()), z_loss: 1e-4, bf16: true, ..of(plan.model.clone()) };
    for (name, plan) in [("gpt2", of(gpt2)), ("qwen3", of(qwen3)), ("muon", muon)] {
        let one = whole_run(&store, &plan, &format!("one-{name}"), [1, 1]);
        for n_stages in [2, 4] {
            let run = format!("{name}-{n_stages}");
            assert!(run_on(&store, &plan, &run, &[on(n_stages, n_stages)]) == one, "{run}");
        }
    }
}

#[test]
fn fewer_micro_batches_than_stages_change_no_bit() {
    let (store, plan) = deep();
    for micro_batches in [1, 2] {
        let plan = Plan { micro_batches, ..plan.clone() };
        let one = whole_run(&store, &plan, &format!("one-{micro_batches}"), [1, 1]);
        let run = format!("few-{micro_batches}");
        assert!(run_on(&store, &plan, &run, &[on(4, 4)]) == one, "{run}");
    }
}

#[test]
fn checkpoints_of_pipelines_load_on_any_layout() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let until = |layout: Layout, step: u64| Layout { until: Some(step), ..layout };
    let parts = [until(on(4, 4), 1), until(on(1, 1), 2), until(on(4, 2), 3), until(on(2, 1), 4), on(2, 2)];
    assert!(run_on(&store, &plan, "parts", &parts) == one);
    let same = [until(on(4, 2), 1), until(on(4, 2), 3), on(4, 2)];
    assert!(run_on(&store, &plan, "same", &same) == one);
}

#[test]
fn what_pipelines_divide_changes_no_bit() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    for (n_ranks, n_stages, zero) in
        [(4, 2, Zero::Optimizer), (4, 2, Zero::Gradients), (8, 2, Zero::Optimizer), (8, 4, Zero::Gradients)]
    {
        let run = format!("divided-{n_ranks}-{n_stages}-{zero:?}");
        assert!(run_on(&store, &plan, &run, &[Layout { zero, ..on(n_ranks, n_stages) }]) == one, "{run}");
        assert_eq!(norms(&store, &run), norms(&store, "one"), "{run}");
    }
}

#[test]
fn stages_of_teams_learn_what_one_rank_does() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let near = |losses: &[(u64, u64)]| {
        assert_eq!(losses.len(), one.1.len());
        for ((step, a), (_, b)) in one.1.iter().zip(losses) {
            let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
            assert!((a - b).abs() < 1e-4 * a, "step {step}: {a} and {b}");
        }
    };
    let of = |n_ranks: usize, zero: Zero| Layout { n_team: 2, zero, ..on(n_ranks, 2) };
    let alone = run_on(&store, &plan, "alone", &[of(4, Zero::Nothing)]);
    near(&alone.1);
    for (n_ranks, zero) in
        [(4, Zero::Nothing), (8, Zero::Nothing), (8, Zero::Optimizer), (8, Zero::Gradients)]
    {
        let run = format!("teams-{n_ranks}-{zero:?}");
        assert!(run_on(&store, &plan, &run, &[of(n_ranks, zero)]) == alone, "{run}");
    }
    let until = |layout: Layout, step: u64| Layout { until: Some(step), ..layout };
    let divided = Layout { zero: Zero::Gradients, ..on(4, 2) };
    let parts =
        [until(of(8, Zero::Optimizer), 1), until(on(1, 1), 2), until(divided, 4), of(4, Zero::Nothing)];
    near(&run_on(&store, &plan, "parts", &parts).1);
}

#[test]
fn what_pipelines_cannot_do_is_refused_by_name() {
    let (store, plan) = deep();
    let stop = AtomicBool::new(false);
    let refused = |run: &str, plan: &Plan, [n_ranks, n_stages]: [usize; 2], words: &str| {
        train::create(&store, run, plan, None).unwrap();
        let context = Context { n_ranks, n_stages, ..context(&store, run, &stop) };
        let error = train::run(&context, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{error} does not say {words}");
    };
    refused("a", &plan, [4, 8], "4 ranks are no whole number of pipelines of 8 stages");
    refused("b", &plan, [8, 8], "it has 5");
    refused("c", &plan, [2, 0], "pipelines of 0 stages");
    refused("d", &plan, [32, 2], "16 ranks");
    let diloco = Some(Diloco { workers: 2, ..Diloco::DEFAULT });
    train::create(&store, "z", &plan, None).unwrap();
    let divided = Context { n_ranks: 4, n_stages: 2, zero: Zero::Parameters, ..context(&store, "z", &stop) };
    let error = train::run(&divided, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("--zero 3"), "{error}");
    refused("e", &Plan { diloco, ..plan.clone() }, [4, 2], "--diloco");
}
