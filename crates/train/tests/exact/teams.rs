//! Ranks that compute one model together: the losses of one rank within a bound, the same bits from run to run, on any number
//! of teams and whatever these divide, and checkpoints that any layout goes on from.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use store::{Bundle, Store};
use train::{Context, Diloco, Error, Muon, Plan, Zero};

use crate::{Layout, assert_near, carry_out_parts, context, prepared, run_in_parts, whole_run};

const ALL: [Zero; 4] = [Zero::Nothing, Zero::Optimizer, Zero::Gradients, Zero::Parameters];

fn prepared_for_teams() -> (Arc<dyn Store>, Plan) {
    let (store, mut plan) = prepared();
    plan.model["num_attention_heads"] = 8.into();
    plan.model["num_key_value_heads"] = 4.into();
    (store, plan)
}

/// So many ranks, so many of which compute a model together.
fn on(n_ranks: usize, n_team: usize, zero: Zero) -> Layout {
    Layout { n_team, zero, ..[n_ranks, n_ranks].into() }
}

#[test]
fn teams_learn_what_one_rank_does() {
    let (store, plan) = prepared_for_teams();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    for n_team in [2, 4] {
        let of = |n_teams: usize, zero: Zero, run: &str| {
            let run = format!("{run}-{n_teams}-{n_team}-{}", zero.stage());
            whole_run(&store, &plan, &run, on(n_teams * n_team, n_team, zero))
        };
        let alone = of(1, Zero::Nothing, "team");
        assert_near(&one.1, &alone.1);
        assert!(of(1, Zero::Nothing, "again") == alone, "a team of {n_team} is equal to itself");
        for n_teams in [2, 3, 4] {
            for zero in ALL {
                assert!(of(n_teams, zero, "teams") == alone, "{n_teams} teams of {n_team}, {zero:?}");
            }
        }
    }
}

/// Biases behind what is divided, norms that heads share, norms behind sub-layers, windows.
#[test]
fn teams_learn_every_architecture() {
    let (store, plan) = prepared();
    let vocab = &plan.model["vocab_size"];
    let gpt2 = serde_json::json!({
        "model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": vocab, "n_positions": 32,
    });
    let like = |model_type: &str, more: serde_json::Value| {
        let mut model = plan.model.clone();
        model["model_type"] = model_type.into();
        model["head_dim"] = 8.into();
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        model
    };
    let windowed = serde_json::json!({
        "query_pre_attn_scalar": 8, "sliding_window": 8, "rope_local_base_freq": 1e4, "rope_theta": 1e6,
        "layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "gelu_pytorch_tanh",
    });
    for (name, model) in [
        ("gpt2", gpt2),
        ("qwen3", like("qwen3", serde_json::json!({}))),
        ("gemma3", like("gemma3_text", windowed)),
    ] {
        let plan = Plan { model, ..plan.clone() };
        let one = whole_run(&store, &plan, &format!("{name}-one"), [1, 1]);
        let of = |n_ranks: usize, zero: Zero| {
            let run = format!("{name}-{n_ranks}-{}", zero.stage());
            whole_run(&store, &plan, &run, on(n_ranks, 2, zero))
        };
        let alone = of(2, Zero::Nothing);
        assert_near(&one.1, &alone.1);
        assert!(of(4, Zero::Parameters) == alone, "{name}");
    }
}

#[test]
fn checkpoints_of_teams_load_on_any_layout() {
    let (store, plan) = prepared_for_teams();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let (nothing, parameters) = (Zero::Nothing, Zero::Parameters);
    let parts = [
        (on(4, 2, nothing), Some(1)),
        (on(1, 1, nothing), Some(2)),
        (on(4, 4, nothing), Some(3)),
        (on(6, 2, parameters), Some(4)),
        (on(8, 2, nothing), None),
    ];
    assert_near(&one.1, &run_in_parts(&store, &plan, "parts", parts).1);
    // Where the number of parts stays the same, stopping changes no bit.
    let whole = whole_run(&store, &plan, "whole", on(4, 2, nothing));
    let parts =
        [(on(4, 2, parameters), Some(3)), (on(6, 2, Zero::Optimizer), Some(4)), (on(2, 2, nothing), None)];
    assert!(run_in_parts(&store, &plan, "stopped", parts) == whole);
}

/// A checkpoint that 4 ranks have written, ZeRO 3 in teams of 2, is gone on from by 1, 2 and 3.
#[test]
fn what_four_ranks_write_one_two_and_three_read() {
    let (store, plan) = prepared_for_teams();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let four = on(4, 2, Zero::Parameters);
    let mut ends = Vec::new();
    for (n_ranks, zero) in
        [(1, Zero::Nothing), (2, Zero::Optimizer), (3, Zero::Parameters), (3, Zero::Nothing)]
    {
        let run = format!("then-{n_ranks}-{}", zero.stage());
        ends.push(run_in_parts(&store, &plan, &run, [(four, Some(3)), (on(n_ranks, 1, zero), None)]));
        assert_near(&one.1, &ends[0].1);
    }
    assert!(ends.iter().all(|end| *end == ends[0]), "whoever goes on gives the same bytes");
}

/// Together the files are the state once, and none has more than its rank's part.
#[test]
fn every_rank_of_a_team_writes_its_own_part() {
    let (store, plan) = prepared_for_teams();
    for (zero, n_files) in [(Zero::Nothing, 6), (Zero::Parameters, 12)] {
        let run = format!("written-{}", zero.stage());
        train::create(&store, &run, &plan, None).unwrap();
        carry_out_parts(&store, &run, [(on(4, 2, zero), Some(2))]);
        let bundle = Bundle::open(&store, &format!("runs/{run}/checkpoints/00000002")).unwrap().unwrap();
        let files = &bundle.manifest().files;
        assert_eq!(files.len(), n_files, "{files:?}");
        let n_params = bundle.manifest().meta["n_params"].as_u64().unwrap();
        assert_eq!(files.iter().map(|file| file.bytes).sum::<u64>(), 12 * n_params);
        assert!(files.iter().all(|file| file.bytes < 4 * n_params), "{files:?}");
    }
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
    refused("d", &Plan { muon: Some(Muon::default()), ..plan.clone() }, ([2, 2], Zero::Nothing), "Muon");
    let diloco = Some(Diloco { workers: 2, ..Diloco::DEFAULT });
    refused("e", &Plan { diloco, ..plan.clone() }, ([2, 2], Zero::Nothing), "--diloco");
    let stop = AtomicBool::new(false);
    let context = Context { n_ranks: 18, n_team: 2, ..context(&store, "a", &stop) };
    assert!(matches!(train::run(&context, &mut |_| {}), Err(Error::Ranks { n_ranks: 9, .. })));
}
