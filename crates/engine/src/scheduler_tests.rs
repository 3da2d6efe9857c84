//! The scheduler's rules one by one. What holds in every mixture of them, the simulation tests.

use crate::request::TokenId;
use crate::scheduler::{Limits, Pace, Plan, Scheduler};
use crate::sequence::{Sequence, SequenceId};

fn scheduler(n_blocks: usize, max_running: usize) -> Scheduler {
    Scheduler::new(Limits {
        n_blocks,
        block_tokens: 4,
        max_running,
        max_batch_tokens: 64,
        max_prompt_logits: 16,
        max_draft_tokens: 8,
        prefix_cache: true,
    })
}

struct Arrival {
    id: u64,
    tenant: &'static str,
    priority: i8,
    prompt: Vec<TokenId>,
}

/// A prompt that shares nothing with others.
fn arrival(id: u64, n_prompt: usize) -> Arrival {
    let prompt = (0..n_prompt as TokenId).map(|i| i + 1000 * id as TokenId).collect();
    Arrival { id, tenant: "a", priority: 0, prompt }
}

fn add(scheduler: &mut Scheduler, arrival: Arrival) {
    let mut sequence = Sequence::new(arrival.prompt, arrival.tenant);
    sequence.priority = arrival.priority;
    scheduler.add(SequenceId(arrival.id), sequence);
}

/// One step in which every caught-up sequence goes on with token 5.
fn step(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.plan(&|_| Pace::tokens(64));
    scheduler.commit(&plan);
    plan.rows.iter().filter(|row| row.catches_up).for_each(|row| scheduler.accept(row.id, &[5]));
    scheduler.check();
    plan
}

fn ids(plan: &Plan) -> Vec<u64> {
    plan.rows.iter().map(|row| row.id.0).collect()
}

#[test]
fn siblings_compute_their_prompt_once() {
    let mut scheduler = scheduler(100, 8);
    for id in 0..8 {
        add(&mut scheduler, Arrival { id, ..arrival(0, 42) });
    }
    let plan = step(&mut scheduler);
    assert_eq!((ids(&plan), plan.n_deferred), (vec![0], 7));
    let plan = step(&mut scheduler);
    assert_eq!(plan.n_deferred, 0);
    // Ten blocks are shared; one token of the eleventh is copied, and the last one computed.
    assert!(plan.admitted.iter().all(|admission| admission.n_cached == 41), "{:?}", plan.admitted);
    assert_eq!((plan.admitted.len(), plan.copies.len()), (7, 7));
    assert!(plan.rows.iter().all(|row| row.n_tokens == 1));
    assert_eq!(scheduler.n_blocks_used(), 10 + 8);
}

#[test]
fn another_tenant_neither_waits_nor_shares() {
    let mut scheduler = scheduler(100, 8);
    add(&mut scheduler, arrival(0, 20));
    add(&mut scheduler, Arrival { id: 1, tenant: "b", ..arrival(0, 20) });
    let plan = step(&mut scheduler);
    assert_eq!((plan.rows.len(), plan.n_deferred, plan.copies.len()), (2, 0, 0));
    assert_eq!(scheduler.n_blocks_used(), 10);
}

#[test]
fn a_higher_priority_takes_the_slot_of_the_lowest_and_youngest() {
    let mut scheduler = scheduler(100, 3);
    add(&mut scheduler, Arrival { priority: -1, ..arrival(0, 5) });
    add(&mut scheduler, Arrival { priority: -1, ..arrival(1, 5) });
    add(&mut scheduler, arrival(2, 5));
    step(&mut scheduler);
    add(&mut scheduler, arrival(3, 5));
    let plan = step(&mut scheduler);
    assert_eq!((&plan.preempted, ids(&plan)), (&vec![SequenceId(1)], vec![2, 0, 3]));
    // Equals wait for each other.
    add(&mut scheduler, Arrival { priority: -1, ..arrival(4, 5) });
    let plan = step(&mut scheduler);
    assert_eq!((plan.preempted.len(), ids(&plan)), (0, vec![2, 3, 0]));
    // What was preempted left its keys and values to be found: five tokens and the one generated.
    scheduler.remove(SequenceId(2));
    let plan = step(&mut scheduler);
    let row = plan.rows.iter().find(|row| row.id.0 == 1).expect("it is the oldest that waits");
    assert_eq!((row.start, row.n_tokens), (5, 1));
}

#[test]
fn nobody_is_preempted_in_vain() {
    let mut scheduler = scheduler(12, 3);
    add(&mut scheduler, arrival(0, 30));
    add(&mut scheduler, Arrival { priority: -1, ..arrival(1, 5) });
    step(&mut scheduler);
    // Even without the lower one there is no room for ten blocks.
    add(&mut scheduler, arrival(2, 38));
    let plan = step(&mut scheduler);
    assert_eq!((plan.preempted.len(), plan.n_decodes), (0, 2));
}

#[test]
fn when_blocks_run_out_the_lowest_priority_goes_first() {
    let mut scheduler = scheduler(6, 3);
    add(&mut scheduler, Arrival { priority: -1, ..arrival(0, 4) });
    add(&mut scheduler, arrival(1, 4));
    step(&mut scheduler);
    let preempted = (0..12).flat_map(|_| step(&mut scheduler).preempted);
    assert_eq!(preempted.collect::<Vec<_>>(), [SequenceId(0)], "the older one, but of lower priority");
}

#[test]
fn two_busy_tenants_get_the_same() {
    let mut scheduler = scheduler(400, 4);
    let mut n_served = [0; 2];
    // One sends three long requests for each short one of the other, and all of them first.
    for id in 0..300 {
        add(&mut scheduler, arrival(id, 60));
    }
    for id in 300..900 {
        add(&mut scheduler, Arrival { tenant: "b", ..arrival(id, 10) });
    }
    for _ in 0..400 {
        let plan = step(&mut scheduler);
        for row in &plan.rows {
            n_served[usize::from(row.id.0 >= 300)] += row.n_tokens;
            if scheduler.sequence(row.id).tokens.len() > scheduler.sequence(row.id).n_prompt + 8 {
                scheduler.remove(row.id);
            }
        }
    }
    let [a, b] = n_served;
    // But for the turns of the oldest, one in eight.
    assert!(b * 4 > a * 3 && a * 4 > b * 3, "{a} and {b} tokens");
}

#[test]
fn drafts_take_no_block_from_anybody() {
    let mut scheduler = scheduler(4, 2);
    add(&mut scheduler, arrival(0, 3));
    add(&mut scheduler, arrival(1, 3));
    step(&mut scheduler);
    // Each has one block with four positions, all known; the next token begins a second one.
    [0, 1].iter().for_each(|&id| scheduler.set_draft(SequenceId(id), vec![5; 6]));
    let plan = scheduler.plan(&|_| Pace::tokens(64));
    assert_eq!(plan.rows.iter().map(|row| row.draft.len()).collect::<Vec<_>>(), [0, 0]);
    scheduler.commit(&plan);
    plan.rows.iter().for_each(|row| scheduler.accept(row.id, &[5]));
    scheduler.set_draft(SequenceId(0), vec![5; 6]);
    let plan = scheduler.plan(&|_| Pace::tokens(64));
    assert!(plan.preempted.is_empty());
    assert_eq!((plan.rows[0].draft.len(), plan.rows[0].n_logits), (3, 4));
    scheduler.commit(&plan);
    assert_eq!(scheduler.sequence(SequenceId(0)).n_pending(), 0);
    scheduler.accept(SequenceId(0), &[5, 5, 9]);
    let sequence = scheduler.sequence(SequenceId(0));
    assert_eq!((sequence.tokens.len(), sequence.n_computed), (8, 7));
    scheduler.check();
}
