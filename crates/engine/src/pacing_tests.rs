//! Scheduler and pacer in virtual time: what streams and prompts wait for on a machine of known costs.

use std::collections::HashMap;
use std::time::Duration;

use crate::fake::FakeRunner;
use crate::pacer::Pacer;
use crate::random;
use crate::request::TokenId;
use crate::runner::Runner;
use crate::scheduler::{Limits, Plan, Scheduler};
use crate::sequence::{Sequence, SequenceId};

const BLOCK_TOKENS: usize = 16;
const VOCAB: usize = 16;
/// Reading the weights, once a step.
const STEP_SECONDS: f64 = 4e-3;
/// Each token of a step, at the start of its sequence and 8,192 tokens later.
const TOKEN_SECONDS: f64 = 0.4e-3;
const FAR_TOKEN_SECONDS: f64 = 1.0e-3;

/// An engine without threads, whose clock is the sum of what its steps are said to take.
struct Machine {
    scheduler: Scheduler,
    pacer: Pacer,
    runner: FakeRunner,
    now: f64,
    n_steps: u64,
    /// When the tokens of each sequence came.
    tokens_at: HashMap<SequenceId, Vec<f64>>,
    n_new: HashMap<SequenceId, usize>,
}

impl Machine {
    fn new() -> Machine {
        let limits = Limits {
            n_blocks: 2048,
            block_tokens: BLOCK_TOKENS,
            max_running: 32,
            max_batch_tokens: 512,
            max_prompt_logits: 128,
            max_draft_tokens: 0,
            prefix_cache: true,
        };
        Machine {
            runner: FakeRunner::with_next(VOCAB, limits.n_blocks, BLOCK_TOKENS, |_| 3),
            scheduler: Scheduler::new(limits),
            pacer: Pacer::new(512),
            now: 0.0,
            n_steps: 0,
            tokens_at: HashMap::new(),
            n_new: HashMap::new(),
        }
    }

    fn add(&mut self, n_prompt: usize, n_new: usize) -> SequenceId {
        let id = SequenceId(self.n_new.len() as u64);
        // Different from the first token on.
        let prompt = (0..n_prompt).map(|i| ((id.0 as usize + i * i) % VOCAB) as TokenId).collect();
        self.scheduler.add(id, Sequence::new(prompt, &id.0.to_string()));
        self.n_new.insert(id, n_new);
        self.tokens_at.insert(id, Vec::new());
        id
    }

    fn step(&mut self) {
        let pacer = &self.pacer;
        let plan = self.scheduler.plan(&|crowd| pacer.max_prefill(crowd));
        let input = self.scheduler.input(&plan);
        self.runner.step(&input).expect("the plan is consistent");
        let time = self.cost(&plan);
        self.now += time;
        let n_more = input.tokens_n.len() - plan.n_decodes;
        self.pacer.observe(plan.n_decodes, n_more, Duration::from_secs_f64(time));
        self.scheduler.commit(&plan);
        for row in plan.rows.iter().filter(|row| row.catches_up) {
            self.scheduler.accept(row.id, &[3]);
            let tokens_at = self.tokens_at.get_mut(&row.id).expect("it was added");
            tokens_at.push(self.now);
            if tokens_at.len() == self.n_new[&row.id] {
                self.scheduler.remove(row.id);
            }
        }
    }

    /// A tenth more or less than it should take.
    fn cost(&mut self, plan: &Plan) -> f64 {
        self.n_steps += 1;
        let token =
            |start: usize| TOKEN_SECONDS + (FAR_TOKEN_SECONDS - TOKEN_SECONDS) * start as f64 / 8192.0;
        let rows = plan.rows.iter().map(|row| row.n_tokens as f64 * token(row.start));
        (STEP_SECONDS + rows.sum::<f64>()) * (0.9 + 0.2 * random::uniform(1, self.n_steps))
    }

    fn run_until_first_token(&mut self, id: SequenceId) {
        while self.tokens_at[&id].is_empty() {
            self.step();
        }
    }

    /// Gaps between tokens of these streams that ended after `since`, in order of size.
    fn gaps(&self, streams: &[SequenceId], since: f64) -> Vec<f64> {
        let late = |pair: &&[f64]| pair[1] > since;
        let pairs = streams.iter().flat_map(|id| self.tokens_at[id].windows(2)).filter(late);
        let mut gaps: Vec<_> = pairs.map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_by(f64::total_cmp);
        gaps
    }
}

#[test]
fn a_long_prompt_does_not_stall_running_streams() {
    let mut machine = Machine::new();
    let streams: Vec<_> = (0..8).map(|_| machine.add(64, 100_000)).collect();
    (0..300).for_each(|_| machine.step());
    let gaps = machine.gaps(&streams, machine.now / 2.0);
    let median = gaps[gaps.len() / 2];
    let arrival = machine.now;
    let long = machine.add(8192, 1);
    machine.run_until_first_token(long);
    let gaps = machine.gaps(&streams, arrival);
    let p99 = gaps[gaps.len() * 99 / 100];
    assert!(p99 < 3.0 * median, "p99 {p99:.4} s, median without it {median:.4} s");
    // The prompt gets a good part of the machine all the same.
    let alone = 8192.0 * (TOKEN_SECONDS + FAR_TOKEN_SECONDS) / 2.0;
    assert!(machine.now - arrival < 2.5 * alone, "{} s, alone {alone} s", machine.now - arrival);
}

#[test]
fn a_burst_of_prompts_is_read_at_nearly_full_speed() {
    let (mut cold, mut warm) = (Machine::new(), Machine::new());
    let before: Vec<_> = (0..8).map(|_| warm.add(128, 128)).collect();
    while before.iter().any(|id| warm.tokens_at[id].len() < 128) {
        warm.step();
    }
    let alone = 32.0 * 128.0 * TOKEN_SECONDS;
    for machine in [&mut cold, &mut warm] {
        let arrival = machine.now;
        let burst: Vec<_> = (0..32).map(|_| machine.add(128, 128)).collect();
        burst.iter().for_each(|&id| machine.run_until_first_token(id));
        let mut first: Vec<_> = burst.iter().map(|id| machine.tokens_at[id][0] - arrival).collect();
        first.sort_by(f64::total_cmp);
        assert!(first[16] < 0.7 * alone, "median {:.2} s of {alone:.2} s", first[16]);
        assert!(first[31] < 1.35 * alone, "last {:.2} s of {alone:.2} s", first[31]);
    }
}

#[test]
fn short_prompts_do_not_wait_behind_a_long_one() {
    let mut machine = Machine::new();
    let long = machine.add(8192, 10);
    (0..3).for_each(|_| machine.step());
    let arrival = machine.now;
    let short: Vec<_> = (0..8).map(|_| machine.add(64, 50)).collect();
    machine.run_until_first_token(long);
    let alone = 8.0 * 64.0 * TOKEN_SECONDS;
    for id in short {
        let wait = machine.tokens_at[&id][0] - arrival;
        assert!(wait < 4.0 * alone, "{wait:.2} s, all eight alone take {alone:.2} s");
    }
    // Nor does the long one wait for ever.
    assert!(machine.now < 2.5 * 8192.0 * (TOKEN_SECONDS + FAR_TOKEN_SECONDS) / 2.0, "{}", machine.now);
}

/// Clients that ask again as soon as they are answered: nearly all of them shall be decoding at any time.
#[test]
fn a_closed_loop_of_clients_runs_at_nearly_full_speed() {
    const N_CLIENTS: usize = 32;
    const N_ROUNDS: usize = 6;
    let mut machine = Machine::new();
    // One client alone: all that is known of decoding when the others come.
    let alone = machine.add(128, 128);
    (0..128).for_each(|_| machine.step());
    assert_eq!(machine.tokens_at[&alone].len(), 128);
    let start = machine.now;
    let mut open: Vec<_> = (0..N_CLIENTS).map(|_| machine.add(128, 128)).collect();
    let mut n_left = N_CLIENTS * (N_ROUNDS - 1);
    while !open.is_empty() {
        machine.step();
        let n_open = open.len();
        open.retain(|id| machine.tokens_at[id].len() < 128);
        let n_next = n_left.min(n_open - open.len());
        n_left -= n_next;
        open.extend((0..n_next).map(|_| machine.add(128, 128)));
    }
    // As many steps as there are tokens in an answer, for each round with all the work of the round.
    let steps = (N_ROUNDS * 128) as f64 * STEP_SECONDS;
    let least = steps + (N_ROUNDS * N_CLIENTS * 256) as f64 * TOKEN_SECONDS;
    let time = machine.now - start;
    assert!(time < 1.15 * least, "{time:.1} s, at least {least:.1} s");
}
