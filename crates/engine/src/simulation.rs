//! The scheduler run through thousands of random lives: arrivals of several tenants and priorities,
//! siblings with one prompt, drafts right and wrong, cancellations, failed steps, tiny block pools.
//! Every case is a function of its seed, which is printed when an assertion fails.

use std::collections::{HashMap, HashSet};

use crate::fake::FakeRunner;
use crate::random;
use crate::request::TokenId;
use crate::runner::Runner;
use crate::scheduler::{Limits, Pace, Plan, PlanRow, Scheduler};
use crate::sequence::{Sequence, SequenceId};
use crate::step_cost::Costs;

const VOCAB: usize = 11;
/// `./test --long` takes many more.
const N_SEEDS: u64 = if cfg!(feature = "long") { 10_000 } else { 1_000 };
/// Admissions that a request sees go by for each older one at most: every older one may have been
/// preempted and have taken its turn again.
const OVERTAKEN_PER_OLDER: usize = 2 * crate::waiting::OLDEST_EVERY as usize;
const TENANTS: [&str; 3] = ["a", "b", "c"];

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
    assert!(totals.n_copies > N_SEEDS / 2, "{totals:?}");
    assert!(totals.n_deferred > N_SEEDS, "{totals:?}");
    assert!(totals.n_accepted > N_SEEDS && totals.n_rejected > N_SEEDS, "{totals:?}");
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
    n_copies: u64,
    n_deferred: u64,
    n_accepted: u64,
    n_rejected: u64,
    /// Admissions that somebody saw go by, at most.
    n_overtaken_max: usize,
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
    /// Admissions of others since it came, until its own; and how many it may see at most.
    n_overtaken: usize,
    n_overtaken_max: usize,
    was_admitted: bool,
}

struct Simulation {
    dice: Dice,
    limits: Limits,
    runner: FakeRunner,
    scheduler: Scheduler,
    expected: HashMap<SequenceId, Expected>,
    n_to_come: usize,
    next_id: u64,
    has_priorities: bool,
    n_steps: usize,
    n_steps_max: usize,
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
            max_draft_tokens: dice.below(12),
            prefix_cache: !dice.one_in(3),
        };
        Simulation {
            runner: FakeRunner::new(VOCAB, limits.n_blocks, limits.block_tokens),
            scheduler: Scheduler::new(limits.clone()),
            limits,
            expected: HashMap::new(),
            // Now and then so many that low priorities would wait for ever if they could.
            n_to_come: if dice.one_in(10) { 100 } else { 1 + dice.below(20) },
            next_id: 0,
            has_priorities: dice.one_in(3),
            n_steps: 0,
            n_steps_max: 0,
            dice,
        }
    }

    fn run(mut self, totals: &mut Totals) {
        while self.n_to_come > 0 || !self.expected.is_empty() {
            self.arrive();
            self.cancel(totals);
            self.draft();
            self.step(totals);
            self.scheduler.check();
        }
        assert_eq!((self.scheduler.n_running(), self.scheduler.n_waiting()), (0, 0));
        assert_eq!(self.scheduler.n_blocks_used(), 0, "blocks leaked");
    }

    fn arrive(&mut self) {
        while self.n_to_come > 0 && self.dice.one_in(3) {
            let capacity = self.limits.n_blocks * self.limits.block_tokens;
            let n_prompt = 1 + self.dice.below(capacity);
            // Few different prompts, so that prefixes are shared, and siblings that share all of it.
            let (period, odd) = (2 + self.dice.below(2), self.dice.below(4) * n_prompt / 4);
            let token = |i: usize| if i == odd { 7 } else { (i % period) as TokenId };
            let prompt: Vec<_> = (0..n_prompt).map(token).collect();
            let n_siblings = if self.dice.one_in(4) { 1 + self.dice.below(4) } else { 1 };
            let tenant = TENANTS[self.dice.below(3)];
            for _ in 0..n_siblings.min(self.n_to_come) {
                self.add(prompt.clone(), tenant);
            }
        }
    }

    fn add(&mut self, prompt: Vec<TokenId>, tenant: &str) {
        self.n_to_come -= 1;
        let (id, n_prompt) = (SequenceId(self.next_id), prompt.len());
        self.next_id += 1;
        let capacity = self.limits.n_blocks * self.limits.block_tokens;
        let n_new = 1 + self.dice.below(capacity - n_prompt + 1);
        let mut sequence = Sequence::new(prompt.clone(), tenant);
        sequence.prompt_logits = self.dice.one_in(8);
        sequence.priority = if self.has_priorities { self.dice.below(3) as i8 - 1 } else { 0 };
        self.scheduler.add(id, sequence);
        let n_overtaken_max = (self.expected.len() + 1) * OVERTAKEN_PER_OLDER;
        // Everybody may be preempted by everybody once for each of his tokens, and then some.
        self.n_steps_max += (n_prompt + n_new) * 20 + 100;
        let expected = Expected {
            tokens: prompt,
            n_prompt,
            n_new,
            n_overtaken: 0,
            n_overtaken_max,
            was_admitted: false,
        };
        self.expected.insert(id, expected);
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

    /// Guesses at what comes, most of them right.
    fn draft(&mut self) {
        let decoding: Vec<_> = self.scheduler.decoding().map(|(id, _)| id).collect();
        for id in decoding.into_iter().filter(|_| self.limits.max_draft_tokens > 0) {
            let expected = &self.expected[&id];
            let n_left = expected.n_prompt + expected.n_new - expected.tokens.len();
            let mut tokens = expected.tokens.clone();
            for _ in 0..self.dice.below(n_left.min(5)) {
                let right = next_token(&tokens);
                tokens.push(if self.dice.one_in(4) { self.dice.below(VOCAB) as TokenId } else { right });
            }
            self.scheduler.set_draft(id, tokens.split_off(expected.tokens.len()));
        }
    }

    /// Any that a pacer might set: of tokens alone, or of time that does not even pay for reading.
    fn pace(&mut self) -> Pace {
        let pace = Pace::tokens(1 + self.dice.below(8));
        if self.dice.one_in(2) {
            return pace;
        }
        let [token, read, pair] = [0; 3].map(|_| self.dice.below(4) as f64);
        Pace {
            seconds: self.dice.below(30) as f64,
            costs: Costs { token, read, pair, ..Costs::default() },
            ..pace
        }
    }

    fn step(&mut self, totals: &mut Totals) {
        let pace = self.pace();
        let is_decoding = |id: &&SequenceId| self.scheduler.sequence(**id).n_pending() == 1;
        let decoding: Vec<_> = self.scheduler.running().iter().filter(is_decoding).copied().collect();
        let plan = self.scheduler.plan(&|_| pace);
        self.check_plan(&plan, &pace, &decoding);
        self.check_waiting(&plan);
        self.count(&plan, totals);
        let input = self.scheduler.input(&plan);
        let logits_rv = self.runner.step(&input).expect("the plan is consistent").to_vec();
        if self.dice.one_in(50) {
            totals.n_failed += 1;
            self.fail();
            return;
        }
        self.scheduler.commit(&plan);
        let mut rest = &logits_rv[..];
        for row in &plan.rows {
            let own = rest.split_off(..row.n_logits * VOCAB).expect("the logits of every row");
            self.take_tokens(row, own, totals);
        }
        assert!(rest.is_empty());
    }

    fn count(&mut self, plan: &Plan, totals: &mut Totals) {
        self.n_steps += usize::from(!plan.rows.is_empty());
        assert!(self.n_steps <= self.n_steps_max, "{} steps: somebody gets nowhere", self.n_steps);
        totals.n_steps += 1;
        totals.n_preempted += plan.preempted.len() as u64;
        totals.n_cached_tokens += plan.admitted.iter().map(|a| a.n_cached as u64).sum::<u64>();
        let chunks = plan.rows.iter().filter(|row| row.n_tokens > 1 && row.n_logits == 0);
        totals.n_chunked += chunks.count() as u64;
        totals.n_copies += plan.copies.len() as u64;
        totals.n_deferred += plan.n_deferred as u64;
        let overtaken = self.expected.values().map(|expected| expected.n_overtaken).max();
        totals.n_overtaken_max = totals.n_overtaken_max.max(overtaken.unwrap_or(0));
    }

    /// The step counts as lost: as the engine does, everything that holds blocks ends.
    fn fail(&mut self) {
        self.scheduler.running().to_vec().into_iter().for_each(|id| self.finish(id));
        self.scheduler.forget_prefixes();
        assert_eq!(self.scheduler.n_blocks_used(), 0);
    }

    /// Draws as the engine does: token after token, until a guess was wrong.
    fn take_tokens(&mut self, row: &PlanRow, logits_rv: &[f32], totals: &mut Totals) {
        let expected = self.expected.get_mut(&row.id).expect("nobody else is planned");
        let is_caught_up = row.start + row.n_tokens - row.draft.len() == expected.tokens.len();
        assert_eq!(row.catches_up, is_caught_up);
        if !is_caught_up {
            return;
        }
        let mut drawn = Vec::new();
        for (i, logits_v) in logits_rv.chunks(VOCAB).skip(row.n_logits - 1 - row.draft.len()).enumerate() {
            let token = greedy(logits_v);
            assert_eq!(token, next_token(&expected.tokens), "{:?} went wrong", row.id);
            expected.tokens.push(token);
            drawn.push(token);
            if row.draft.get(i) != Some(&token) {
                break;
            }
        }
        totals.n_accepted += drawn.len() as u64 - 1;
        totals.n_rejected += (row.draft.len() + 1 - drawn.len()) as u64;
        self.scheduler.accept(row.id, &drawn);
        let sequence = self.scheduler.sequence(row.id);
        assert_eq!((&sequence.tokens, sequence.n_pending()), (&expected.tokens, 1));
        if expected.tokens.len() == expected.n_prompt + expected.n_new {
            self.finish(row.id);
            totals.n_finished += 1;
        }
    }

    fn finish(&mut self, id: SequenceId) {
        self.expected.remove(&id).expect("it lives");
        self.scheduler.remove(id);
    }

    fn check_plan(&self, plan: &Plan, pace: &Pace, decoding: &[SequenceId]) {
        let n_tokens: usize = plan.rows.iter().map(|row| row.n_tokens).sum();
        assert!(n_tokens <= self.limits.max_batch_tokens, "{n_tokens} tokens in a step");
        let ids: HashSet<_> = plan.rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), plan.rows.len(), "two rows of one sequence");
        assert!(self.scheduler.n_running() <= self.limits.max_running);
        let (decodes, prefills) = plan.rows.split_at(plan.n_decodes);
        let n_prefill: usize = prefills.iter().map(|row| row.n_tokens).sum();
        assert!(decodes.is_empty() || n_prefill <= pace.n_tokens);
        self.check_time(prefills, pace, decodes);
        let n_draft: usize = decodes.iter().map(|row| row.draft.len()).sum();
        assert!(n_draft <= self.limits.max_draft_tokens);
        let n_logits: usize = prefills.iter().map(|row| row.n_logits).sum();
        assert!(n_logits <= self.limits.max_prompt_logits + prefills.len());
        // No stream waits for a prompt: whoever decoded before has a row.
        for id in decoding {
            assert!(ids.contains(id) || plan.preempted.contains(id), "{id:?} was left out");
        }
        // The oldest prompt gets on in every step, whatever the others do.
        let prompts = self.scheduler.running().iter().filter(|id| !decoding.contains(id));
        if let Some(oldest) = prompts.min() {
            let may_be_left_out = decodes.len() == self.limits.max_batch_tokens;
            assert!(ids.contains(oldest) || may_be_left_out, "{oldest:?} waits");
        }
    }

    /// Prompts keep to the time, but for one token of one of them.
    fn check_time(&self, prefills: &[PlanRow], pace: &Pace, decodes: &[PlanRow]) {
        let costs = pace.costs;
        let prompts =
            prefills.iter().map(|row| costs.reading(row.start) + costs.tokens(row.start, row.n_tokens));
        let free = |row: &PlanRow| costs.reading(row.start) + costs.tokens(row.start, 1);
        let oldest = prefills.iter().min_by_key(|row| row.id).map_or(0.0, free);
        let time = prompts.sum::<f64>() - oldest;
        assert!(decodes.is_empty() || time <= pace.seconds * (1.0 + 1e-9) + 1e-9, "{time} in {pace:?}");
    }

    /// Nobody sees more admissions go by than the turns of those who are older allow.
    fn check_waiting(&mut self, plan: &Plan) {
        let admitted: HashSet<_> = plan.admitted.iter().map(|admission| admission.id).collect();
        for (id, expected) in &mut self.expected {
            expected.was_admitted |= admitted.contains(id);
            if !expected.was_admitted {
                expected.n_overtaken += plan.admitted.len();
                assert!(expected.n_overtaken <= expected.n_overtaken_max, "{id:?} starves");
            }
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
