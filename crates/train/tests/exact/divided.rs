//! State that is divided among ranks (ZeRO 1 to 3): the same bits, and checkpoints that any layout goes on from.

use std::sync::atomic::AtomicBool;

use store::Bundle;
use train::{Context, Error, Event, Muon, Plan, Zero};

use crate::{Layout, carry_out, context, prepared, results, run_in_parts, whole_run};

const ALL: [Zero; 4] = [Zero::Nothing, Zero::Optimizer, Zero::Gradients, Zero::Parameters];

fn on(layout: [usize; 2], zero: Zero) -> Layout {
    Layout { zero, ..layout.into() }
}

/// A model of several shards, some of whose layers begin inside of one.
fn wider(plan: Plan) -> Plan {
    let mut plan = plan;
    plan.model["num_hidden_layers"] = 3.into();
    plan.model["hidden_size"] = 64.into();
    plan.model["intermediate_size"] = 128.into();
    plan
}

/// A head of its own, biases, learned positions.
fn other_kind(plan: Plan) -> Plan {
    let vocab = plan.model["vocab_size"].clone();
    let model = serde_json::json!({
        "model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": vocab, "n_positions": 32,
    });
    Plan { model, ..plan }
}

#[test]
fn whatever_is_divided_changes_no_bit() {
    let (store, plan) = prepared();
    let mut untied = wider(plan.clone());
    untied.model["tie_word_embeddings"] = false.into();
    for (kind, plan) in [("tied", wider(plan.clone())), ("untied", untied), ("gpt2", other_kind(plan))] {
        let whole = format!("{kind}-whole");
        let whole = whole_run(&store, &plan, &whole, [1, 1]);
        for n_ranks in [1, 2, 3, 4, 8] {
            for zero in ALL {
                let run = format!("{kind}-{n_ranks}-{}", zero.stage());
                train::create(&store, &run, &plan, None).unwrap();
                let (_, events) = carry_out(&store, &run, on([n_ranks, 2], zero), None);
                assert!(results(&store, &run) == whole, "{kind}: {n_ranks} ranks, {zero:?}");
                let is_eval = |e: &&Event| matches!(e, Event::Eval { .. });
                assert!(events.iter().filter(is_eval).count() > 2, "{events:?}");
            }
        }
    }
}

#[test]
fn checkpoints_of_divided_state_load_on_any_layout() {
    let (store, plan) = prepared();
    let plan = wider(plan);
    let whole = whole_run(&store, &plan, "whole", [1, 1]);
    let then = [
        on([1, 1], Zero::Nothing),
        on([2, 1], Zero::Nothing),
        on([2, 1], Zero::Optimizer),
        on([2, 1], Zero::Gradients),
        on([3, 1], Zero::Nothing),
        on([3, 1], Zero::Parameters),
        on([8, 1], Zero::Parameters),
    ];
    for (i, then) in then.into_iter().enumerate() {
        let run = format!("parts-{i}");
        let (first, last) = (on([4, 4], Zero::Parameters), on([2, 1], Zero::Parameters));
        let parts = [(first, Some(2)), (then, Some(3)), (last, None)];
        assert!(run_in_parts(&store, &plan, &run, parts) == whole, "{then:?}");
    }
}

/// No file of a checkpoint of divided state has more than a rank's share, and together they are the state once.
#[test]
fn every_rank_writes_its_own_part() {
    let (store, plan) = prepared();
    let plan = wider(plan);
    for zero in [Zero::Optimizer, Zero::Parameters] {
        let run = format!("written-{}", zero.stage());
        train::create(&store, &run, &plan, None).unwrap();
        carry_out(&store, &run, on([4, 4], zero), Some(2));
        let checkpoint = format!("runs/{run}/checkpoints/00000002");
        let bundle = Bundle::open(&store, &checkpoint).unwrap().unwrap();
        let files = &bundle.manifest().files;
        assert_eq!(files.len(), 12, "{files:?}");
        let n_params = bundle.manifest().meta["n_params"].as_u64().unwrap();
        assert_eq!(files.iter().map(|file| file.bytes).sum::<u64>(), 12 * n_params);
        assert!(files.iter().all(|file| file.bytes < 2 * n_params), "{files:?}");
        // Parts that are not the whole are refused.
        let mut meta = bundle.manifest().meta.clone();
        meta["parts"][1][0]["end"] = 0.into();
        let mut writer = store::BundleWriter::new(&store, &checkpoint).unwrap();
        files.iter().for_each(|file| assert!(writer.add_stored(file).unwrap()));
        writer.publish("checkpoint", meta).unwrap();
        let stop = AtomicBool::new(false);
        let refused = train::run(&context(&store, &run, &stop), &mut |_| {}).unwrap_err();
        assert!(
            matches!(&refused, Error::NoCheckpoint { last, .. } if last.to_string().contains("not the whole"))
        );
    }
}

/// 12 micro-batches: three or five ranks compute no node of the tree each, nor do four in three turns.
#[test]
fn ranks_that_share_no_nodes_change_no_bit() {
    let (store, plan) = prepared();
    let plan = Plan { micro_batches: 12, steps: 3, ..wider(plan) };
    let whole = whole_run(&store, &plan, "whole", [1, 1]);
    for n_ranks in [3, 4, 5, 12] {
        for zero in [Zero::Nothing, Zero::Gradients, Zero::Parameters] {
            let run = format!("{n_ranks}-{}", zero.stage());
            assert!(
                whole_run(&store, &plan, &run, on([n_ranks, 2], zero)) == whole,
                "{n_ranks} ranks, {zero:?}"
            );
        }
    }
}

#[test]
fn what_cannot_be_divided_is_refused() {
    let (store, plan) = prepared();
    let stop = AtomicBool::new(false);
    let muon = Plan { muon: Some(Muon::default()), ..plan };
    train::create(&store, "muon", &muon, None).unwrap();
    let begin = |run: &str, n_ranks, zero| {
        let context = Context { n_ranks, zero, ..context(&store, run, &stop) };
        train::run(&context, &mut |_| {}).unwrap_err()
    };
    for zero in &ALL[1..] {
        assert!(matches!(begin("muon", 2, *zero), Error::MuonDivided));
    }
    assert!(matches!(begin("muon", 3, Zero::Nothing), Error::MuonDivided), "three ranks divide gradients");
}
