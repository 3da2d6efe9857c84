//! Ranks that form pipelines: the bytes of one rank, on any number of stages and pipelines, stopped and resumed or not.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use store::Store;
use train::{Context, Diloco, Event, Muon, Plan, Zero};

use crate::{Layout, assert_near, context, prepared, run_in_parts, whole_run};

/// So many ranks, in pipelines of so many stages.
fn on(n_ranks: usize, n_stages: usize) -> Layout {
    Layout { n_stages, ..[n_ranks, n_ranks].into() }
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
            assert!(whole_run(&store, &plan, &run, on(n_ranks, n_stages)) == one, "{run}");
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
            assert!(whole_run(&store, &plan, &run, on(n_stages, n_stages)) == one, "{run}");
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
        assert!(whole_run(&store, &plan, &run, on(4, 4)) == one, "{run}");
    }
}

#[test]
fn checkpoints_of_pipelines_load_on_any_layout() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let parts = [
        (on(4, 4), Some(1)),
        (on(1, 1), Some(2)),
        (on(4, 2), Some(3)),
        (on(2, 1), Some(4)),
        (on(2, 2), None),
    ];
    assert!(run_in_parts(&store, &plan, "parts", parts) == one);
    let same = [(on(4, 2), Some(1)), (on(4, 2), Some(3)), (on(4, 2), None)];
    assert!(run_in_parts(&store, &plan, "same", same) == one);
}

#[test]
fn what_pipelines_divide_changes_no_bit() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    for (n_ranks, n_stages, zero) in
        [(4, 2, Zero::Optimizer), (4, 2, Zero::Gradients), (8, 2, Zero::Optimizer), (8, 4, Zero::Gradients)]
    {
        let run = format!("divided-{n_ranks}-{n_stages}-{zero:?}");
        assert!(whole_run(&store, &plan, &run, Layout { zero, ..on(n_ranks, n_stages) }) == one, "{run}");
        assert_eq!(norms(&store, &run), norms(&store, "one"), "{run}");
    }
}

#[test]
fn stages_of_teams_learn_what_one_rank_does() {
    let (store, plan) = deep();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let of = |n_ranks: usize, zero: Zero| Layout { n_team: 2, zero, ..on(n_ranks, 2) };
    let alone = whole_run(&store, &plan, "alone", of(4, Zero::Nothing));
    assert_near(&one.1, &alone.1);
    for (n_ranks, zero) in
        [(4, Zero::Nothing), (8, Zero::Nothing), (8, Zero::Optimizer), (8, Zero::Gradients)]
    {
        let run = format!("teams-{n_ranks}-{zero:?}");
        assert!(whole_run(&store, &plan, &run, of(n_ranks, zero)) == alone, "{run}");
    }
    let divided = Layout { zero: Zero::Gradients, ..on(4, 2) };
    let parts = [
        (of(8, Zero::Optimizer), Some(1)),
        (on(1, 1), Some(2)),
        (divided, Some(4)),
        (of(4, Zero::Nothing), None),
    ];
    assert_near(&one.1, &run_in_parts(&store, &plan, "parts", parts).1);
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
