//! Optimizer state that is divided among ranks (ZeRO 1): the same bits, and checkpoints that any layout goes on from.

use std::sync::atomic::AtomicBool;

use train::{Context, Error, Event, Muon, Outcome, Plan};

use crate::{carry_out_as, context, prepared, results};

/// A model of several shards.
fn wider(plan: Plan) -> Plan {
    let mut plan = plan;
    plan.model["hidden_size"] = 64.into();
    plan.model["intermediate_size"] = 128.into();
    plan
}

#[test]
fn divided_state_changes_no_bit() {
    let (store, plan) = prepared();
    let plan = wider(plan);
    train::create(&store, "whole", &plan, None).unwrap();
    carry_out_as(&store, "whole", ([1, 1], false), None);
    let whole = results(&store, "whole");
    for n_ranks in [1, 2, 4, 8] {
        let run = format!("divided-{n_ranks}");
        train::create(&store, &run, &plan, None).unwrap();
        carry_out_as(&store, &run, ([n_ranks, 2], true), None);
        assert!(results(&store, &run) == whole, "{n_ranks} ranks");
    }
}

#[test]
fn checkpoints_of_divided_state_load_on_any_layout() {
    let (store, plan) = prepared();
    let plan = wider(plan);
    train::create(&store, "whole", &plan, None).unwrap();
    carry_out_as(&store, "whole", ([1, 1], false), None);
    let whole = results(&store, "whole");
    train::create(&store, "parts", &plan, None).unwrap();
    for (layout, divided, until) in
        [([4, 4], true, Some(1)), ([2, 1], true, Some(3)), ([1, 1], false, Some(4)), ([8, 1], true, None)]
    {
        let (outcome, events) = carry_out_as(&store, "parts", (layout, divided), until);
        assert_eq!(outcome, if until.is_some() { Outcome::Interrupted } else { Outcome::Finished });
        assert!(!events.iter().any(|e| matches!(e, Event::CheckpointRefused { .. })), "{events:?}");
    }
    assert!(results(&store, "parts") == whole);
}

#[test]
fn muon_is_not_divided() {
    let (store, plan) = prepared();
    let plan = Plan { muon: Some(Muon::default()), ..plan };
    train::create(&store, "muon", &plan, None).unwrap();
    let stop = AtomicBool::new(false);
    let context = Context { n_ranks: 2, divided: true, ..context(&store, "muon", &stop) };
    assert!(matches!(train::run(&context, &mut |_| {}), Err(Error::MuonDivided)));
}
