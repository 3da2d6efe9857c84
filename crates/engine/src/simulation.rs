//! The scheduler run through thousands of random lives: arrivals, cancellations, failed steps, tiny
//! block pools. Every case is a function of its seed, which is printed when an assertion fails.

use std::collections::{HashMap, HashSet};

use crate::fake::FakeRunner;
use crate::random;
use crate::request::TokenId;
use crate::runner::Runner;
use crate::scheduler::{Limits, Plan, Scheduler};
use crate::sequence::{Sequence, SequenceId};

const VOCAB: usize = 11;
const N_SEEDS: u64 = 10_000;

#[test]
fn random_lives_leak_nothing_starve_nobody_and_give_the_same_tokens() {
    let mut totals = Totals::default();
    for seed in 0..N_SEEDS {
        let _printer = PrintSeed(seed);
        Simulation::new(seed).run(&mut totals);
    }
    // A simulation that never gets into trouble tests nothing.
    eprintln!("{N_SEEDS} seeds: {totals:?}");
    assert!(totals.n_preempted > N_SEEDS / 2, "{totals:?}");
    assert!(totals.n_cached_tokens > N_SEEDS, "{totals:?}");
    assert!(totals.n_chunked > N_SEEDS, "{totals:?}");
    assert!(totals.n_failed > N_SEEDS / 10, "{totals:?}");
}

#[derive(Debug, Default)]
struct Totals {
    n_steps: u64,
    n_finished: u64,
    n_cancelled: u64,
    n_preempted: u64,
    n_cached_tokens: u64,
    n_chunked: u64,
    n_failed: u64,
}

struct PrintSeed(u64);
impl Drop for PrintSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the simulation failed with seed {}", self.0);
        }
    }
}

struct Dice {
    seed: u64,
    n_thrown: u64,
}

impl Dice {
    /// A number in `0..n`.
    fn below(&mut self, n: usize) -> usize {
        self.n_thrown += 1;
        (random::uniform(self.seed, self.n_thrown) * n as f64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

struct Expected {
    tokens: Vec<TokenId>,
    n_prompt: usize,
    n_new: usize,
}

struct Simulation {
    dice: Dice,
    limits: Limits,
    runner: FakeRunner,
    scheduler: Scheduler,
    expected: HashMap<SequenceId, Expected>,
    n_to_come: usize,
    next_id: u64,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut dice = Dice { seed, n_thrown: 0 };
        let max_running = 1 + dice.below(8);
        let limits = Limits {
            n_blocks: 2 + dice.below(16),
            block_tokens: 1 + dice.below(5),
            max_running,
            max_batch_tokens: max_running + dice.below(20),
            max_prompt_logits: 1 + dice.below(4),
            prefix_cache: !dice.one_in(3),
        };
        Simulation {
            runner: FakeRunner::new(VOCAB, limits.n_blocks, limits.block_tokens),
            scheduler: Scheduler::new(limits.clone()),
            limits,
            expected: HashMap::new(),
            n_to_come: 1 + dice.below(20),
            next_id: 0,
            dice,
        }
    }

    fn run(mut self, totals: &mut Totals) {
        while self.n_to_come > 0 || !self.expected.is_empty() {
            self.arrive();
            self.cancel(totals);
            self.step(totals);
            self.scheduler.check();
        }
        assert_eq!((self.scheduler.n_running(), self.scheduler.n_waiting()), (0, 0));
        assert_eq!(self.scheduler.n_blocks_used(), 0, "blocks leaked");
    }

    fn arrive(&mut self) {
        while self.n_to_come > 0 && self.dice.one_in(3) {
            self.n_to_come -= 1;
            let capacity = self.limits.n_blocks * self.limits.block_tokens;
            let n_prompt = 1 + self.dice.below(capacity);
            let n_new = 1 + self.dice.below(capacity - n_prompt + 1);
            // Few different prompts, so that prefixes are shared.
            let period = 2 + self.dice.below(2);
            let prompt: Vec<_> = (0..n_prompt).map(|i| (i % period) as TokenId).collect();
            let prompt_logits = self.dice.one_in(8);
            let id = SequenceId(self.next_id);
            self.next_id += 1;
            self.scheduler.add(id, Sequence::new(prompt.clone(), "tenant", prompt_logits));
            self.expected.insert(id, Expected { tokens: prompt, n_prompt, n_new });
        }
    }

    fn cancel(&mut self, totals: &mut Totals) {
        if self.dice.one_in(20) && !self.expected.is_empty() {
            let mut ids: Vec<_> = self.expected.keys().copied().collect();
            ids.sort_unstable();
            let unlucky = ids[self.dice.below(ids.len())];
            self.finish(unlucky);
            totals.n_cancelled += 1;
        }
    }

    fn step(&mut self, totals: &mut Totals) {
        let max_prefill_beside_decode = 1 + self.dice.below(8);
        let plan = self.scheduler.plan(max_prefill_beside_decode);
        self.check_plan(&plan, max_prefill_beside_decode);
        totals.n_steps += 1;
        totals.n_preempted += plan.preempted.len() as u64;
        totals.n_cached_tokens += plan.admitted.iter().map(|a| a.n_cached as u64).sum::<u64>();
        let chunks = plan.rows.iter().filter(|row| row.n_tokens > 1 && row.n_logits == 0);
        totals.n_chunked += chunks.count() as u64;
        let input = self.scheduler.input(&plan);
        let logits_rv = self.runner.step(&input).expect("the plan is consistent").to_vec();
        if self.dice.one_in(50) {
            totals.n_failed += 1;
            self.fail();
            return;
        }
        self.scheduler.commit(&plan);
        totals.n_finished += self.take_tokens(&plan, &logits_rv);
    }

    /// The step counts as lost: as the engine does, everything that holds blocks ends.
    fn fail(&mut self) {
        self.scheduler.running().to_vec().into_iter().for_each(|id| self.finish(id));
        self.scheduler.forget_prefixes();
        assert_eq!(self.scheduler.n_blocks_used(), 0);
    }

    fn take_tokens(&mut self, plan: &Plan, logits_rv: &[f32]) -> u64 {
        let mut rest = logits_rv;
        let mut n_finished = 0;
        for row in &plan.rows {
            let (own, others) = rest.split_at(row.n_logits * VOCAB);
            rest = others;
            let expected = self.expected.get_mut(&row.id).expect("nobody else is planned");
            if row.start + row.n_tokens < expected.tokens.len() {
                continue;
            }
            let token = greedy(&own[own.len() - VOCAB..]);
            assert_eq!(token, next_token(&expected.tokens), "{:?} went wrong", row.id);
            expected.tokens.push(token);
            self.scheduler.push_token(row.id, token);
            assert_eq!(self.scheduler.tokens(row.id), expected.tokens);
            if expected.tokens.len() == expected.n_prompt + expected.n_new {
                self.finish(row.id);
                n_finished += 1;
            }
        }
        assert!(rest.is_empty());
        n_finished
    }

    fn finish(&mut self, id: SequenceId) {
        self.expected.remove(&id).expect("it lives");
        self.scheduler.remove(id);
    }

    fn check_plan(&self, plan: &Plan, max_prefill_beside_decode: usize) {
        let n_tokens: usize = plan.rows.iter().map(|row| row.n_tokens).sum();
        assert!(n_tokens <= self.limits.max_batch_tokens, "{n_tokens} tokens in a step");
        let ids: HashSet<_> = plan.rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), plan.rows.len(), "two rows of one sequence");
        assert!(self.scheduler.n_running() <= self.limits.max_running);
        // The oldest gets on in every step, whatever the others do: nobody starves.
        if let Some(oldest) = self.expected.keys().min() {
            assert!(ids.contains(oldest), "{oldest:?} waits");
        }
        let (decodes, prefills) = plan.rows.split_at(plan.n_decodes);
        let n_prefill: usize = prefills.iter().map(|row| row.n_tokens).sum();
        assert!(decodes.is_empty() || n_prefill <= max_prefill_beside_decode);
        let n_logits: usize = prefills.iter().map(|row| row.n_logits).sum();
        assert!(n_logits <= self.limits.max_prompt_logits + prefills.len());
        // No stream waits for a prompt: whoever runs and has one token to go has a row.
        for &id in self.scheduler.running() {
            assert!(self.scheduler.n_pending(id) != 1 || ids.contains(&id), "{id:?} was left out");
        }
    }
}

fn next_token(context: &[TokenId]) -> TokenId {
    let mut logits_v = vec![0.0; VOCAB];
    crate::fake::hashed_logits(context, &mut logits_v);
    greedy(&logits_v)
}

fn greedy(logits_v: &[f32]) -> TokenId {
    (0..VOCAB).max_by(|&a, &b| logits_v[a].total_cmp(&logits_v[b])).expect("a vocabulary") as TokenId
}
