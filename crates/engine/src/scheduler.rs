//! Decides what each step computes. Pure: no clock, no randomness, no model; the plan is plain data.
//!
//! The rules, in order:
//! 1. A waiting request of higher priority that finds no room takes it from running ones of lower
//!    priority. They return to the queue and are computed again from their known tokens.
//! 2. Every sequence with one pending token (decoding) gets it. When blocks run out the running
//!    sequence of the lowest priority, the youngest of those, is preempted.
//! 3. The queue is served (`waiting.rs` says in what order) while a slot is free and a sequence's
//!    known tokens fit into free blocks. Nobody overtakes the next one because it does not fit.
//! 4. Drafts of decoding sequences are verified, as far as blocks are free.
//! 5. Prompts share the time that the pace allows, the shortest rest first, so that a long prompt does not
//!    hold up short ones; the oldest gets a quarter in any case, and at least a token.
//!
//! Nobody starves: the first of the running by priority and age is never preempted for another, it
//! alone always fits (checked at submission), and the queue gives the oldest request its turn.

mod admission;

use std::cmp::Reverse;
use std::collections::HashMap;

use model::{BlockCopy, StepInput};

use crate::blocks::{BlockId, BlockPool};
use crate::request::TokenId;
use crate::sequence::{Sequence, SequenceId};
use crate::step_cost::Costs;
use crate::tenants::Tenants;
use crate::waiting::{Entry, Waiting};

/// The oldest prompt gets at least one of so many parts of what is left for prompts.
const OLDEST_PROMPT_PARTS: usize = 4;

#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) n_blocks: usize,
    pub(crate) block_tokens: usize,
    pub(crate) max_running: usize,
    pub(crate) max_batch_tokens: usize,
    /// Rows of logits that prompts may ask for in one step.
    pub(crate) max_prompt_logits: usize,
    /// Guesses of all sequences together that one step verifies.
    pub(crate) max_draft_tokens: usize,
    pub(crate) prefix_cache: bool,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    sequences: HashMap<SequenceId, Sequence>,
    /// Without blocks.
    waiting: Waiting,
    /// With blocks: the highest priority first, then the oldest.
    running: Vec<SequenceId>,
    tenants: Tenants,
}

/// One step. Each sequence has at most one row.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) rows: Vec<PlanRow>,
    /// The first rows: sequences that had one token to go.
    pub(crate) n_decodes: usize,
    /// To be done before anything is computed, in this order.
    pub(crate) copies: Vec<BlockCopy>,
    pub(crate) admitted: Vec<Admission>,
    pub(crate) preempted: Vec<SequenceId>,
    /// Waiting sequences that another one's prompt will soon spare most of their work.
    pub(crate) n_deferred: usize,
}

/// Tokens `start..start + n_tokens` of a sequence. Logits come from the last `n_logits` of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlanRow {
    pub(crate) id: SequenceId,
    pub(crate) start: usize,
    pub(crate) n_tokens: usize,
    pub(crate) n_logits: usize,
    /// Every known token is computed after this row: its logits give the next token.
    pub(crate) catches_up: bool,
    /// The last of the row's tokens are these guesses: the logits before each say whether it is right.
    pub(crate) draft: Vec<TokenId>,
}

/// A sequence's first admission, for the accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) id: SequenceId,
    /// Tokens that were looked for in the prefix cache, and found.
    pub(crate) n_looked_up: usize,
    pub(crate) n_cached: usize,
}

/// Who shares a step; the pace of prompts depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crowd {
    pub(crate) n_decodes: usize,
    /// Sequences that have more than their next token to compute.
    pub(crate) n_prompts: usize,
    /// Positions that the decoding ones read.
    pub(crate) n_read: usize,
    /// Of the prompt with the longest rest: the first position that is still to be computed, and the end.
    pub(crate) longest: [usize; 2],
}

/// What prompts may have of a step that decodes as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Tokens at most, and the time that they may be reckoned to take.
    pub(crate) n_tokens: usize,
    pub(crate) seconds: f64,
    pub(crate) costs: Costs,
}

impl Pace {
    /// So many tokens, whatever they take.
    pub(crate) fn tokens(n_tokens: usize) -> Pace {
        Pace { n_tokens, seconds: f64::MAX, costs: Costs::default() }
    }
}

/// What is left to give away while a plan is made.
struct Budget {
    n_tokens: usize,
    n_prompt_logits: usize,
    seconds: f64,
    costs: Costs,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Scheduler {
        assert!(limits.max_batch_tokens >= limits.max_running, "a step cannot hold every decode");
        assert!(limits.max_prompt_logits > 0, "prompts would wait for ever for their logits");
        Scheduler {
            pool: BlockPool::new(limits.n_blocks),
            limits,
            sequences: HashMap::new(),
            waiting: Waiting::default(),
            running: Vec::new(),
            tenants: Tenants::default(),
        }
    }

    pub(crate) fn n_running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn n_blocks_used(&self) -> usize {
        self.pool.n_used()
    }

    pub(crate) fn running(&self) -> &[SequenceId] {
        &self.running
    }

    /// Running sequences with one token to go, and all their known tokens: who can use a draft.
    pub(crate) fn decoding(&self) -> impl Iterator<Item = (SequenceId, &[TokenId])> {
        let sequences = self.running.iter().map(|&id| (id, &self.sequences[&id]));
        let decoding = sequences.filter(|(_, sequence)| sequence.n_pending() == 1 && !sequence.prompt_logits);
        decoding.map(|(id, sequence)| (id, &sequence.tokens[..]))
    }

    /// Queues a sequence that fits into the pool alone, all its tokens to come included.
    pub(crate) fn add(&mut self, id: SequenceId, sequence: Sequence) {
        let entry = Entry { tenant: sequence.tenant(), priority: sequence.priority };
        self.tenants.join(entry.tenant);
        self.sequences.insert(id, sequence);
        self.waiting.insert(id, entry);
    }

    /// Takes a sequence out, whatever state it is in, and frees what it holds.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        if !self.sequences.contains_key(&id) {
            return;
        }
        self.give_back(id);
        self.tenants.leave(&self.sequences[&id].tenant());
        self.sequences.remove(&id);
        self.waiting.remove(id);
        self.running.retain(|&other| other != id);
    }

    /// Guesses at what follows a decoding sequence; the next step verifies them. There must be fewer
    /// of them than the sequence has tokens to come.
    pub(crate) fn set_draft(&mut self, id: SequenceId, draft: Vec<TokenId>) {
        self.sequence_mut(id).draft = draft;
    }

    /// Appends what a row's logits gave: the draft as far as it was right, and one more token for the
    /// computed ones to catch up with.
    pub(crate) fn accept(&mut self, id: SequenceId, tokens: &[TokenId]) {
        let sequence = self.sequence_mut(id);
        let start = sequence.n_computed;
        sequence.tokens.extend_from_slice(tokens);
        sequence.n_computed += tokens.len() - 1;
        let tenant = sequence.tenant();
        self.tenants.charge(&tenant, tokens.len());
        self.publish(id, start, false);
    }

    #[cfg(test)]
    pub(crate) fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[&id]
    }

    /// After a failed step no cached prefix can be trusted.
    pub(crate) fn forget_prefixes(&mut self) {
        self.pool.forget_prefixes();
    }

    /// Decides the next step and gives every row the blocks it writes to. Empty only when there are
    /// no sequences. `pace` says how much of prompts may join a step that also decodes.
    /// Follow with [`Scheduler::commit`] once the step was computed.
    pub(crate) fn plan(&mut self, pace: &dyn Fn(Crowd) -> Pace) -> Plan {
        let ready = self.ready();
        let mut plan = Plan { n_deferred: self.waiting.len() - ready.len(), ..Plan::default() };
        self.make_way(&ready, &mut plan);
        let n_gone = plan.preempted.len();
        self.plan_decodes(&mut plan);
        let mut prompts: Vec<_> =
            self.running.iter().copied().filter(|id| self.sequences[id].n_pending() > 1).collect();
        // Whoever was preempted for want of blocks must not come straight back.
        if plan.preempted.len() == n_gone {
            prompts.extend(self.admit(ready, &mut plan));
        }
        let n_read = plan.rows.iter().map(|row| row.start + 1).sum();
        let longest = self.longest_rest(&prompts);
        let crowd = Crowd { n_decodes: plan.n_decodes, n_prompts: prompts.len(), n_read, longest };
        let n_draft = self.plan_drafts(&mut plan);
        let mut budget = Budget {
            n_tokens: self.limits.max_batch_tokens - plan.n_decodes - n_draft,
            n_prompt_logits: self.limits.max_prompt_logits,
            seconds: f64::MAX,
            costs: Costs::default(),
        };
        if plan.n_decodes > 0 && !prompts.is_empty() {
            budget.keep_pace(&pace(crowd), &plan.rows);
        }
        self.plan_prefills(prompts, budget, &mut plan);
        assert!(!plan.rows.is_empty() || self.sequences.is_empty(), "sequences and no step to run");
        plan
    }

    /// Writes the plan in the runner's words.
    pub(crate) fn input(&self, plan: &Plan) -> StepInput {
        let mut input = StepInput { copies: plan.copies.clone(), ..StepInput::default() };
        for row in &plan.rows {
            let sequence = &self.sequences[&row.id];
            let end = row.start + row.n_tokens;
            let tokens = [&sequence.tokens[row.start..end - row.draft.len()], &row.draft].concat();
            let blocks = &sequence.blocks[..end.div_ceil(self.limits.block_tokens)];
            input.push_row(&tokens, row.start, blocks, row.n_logits);
            if let Some(last) = input.rows.last_mut() {
                last.adapter = sequence.adapter().cloned();
            }
        }
        input
    }

    /// The step was computed: its known tokens count, and what their blocks hold can be found.
    /// What became of its drafts is for [`Scheduler::accept`] to say.
    pub(crate) fn commit(&mut self, plan: &Plan) {
        for (i, row) in plan.rows.iter().enumerate() {
            let sequence = self.sequence_mut(row.id);
            sequence.n_computed = row.start + row.n_tokens - row.draft.len();
            self.publish(row.id, row.start, i >= plan.n_decodes);
        }
    }

    fn plan_decodes(&mut self, plan: &mut Plan) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            if self.sequences[&id].n_pending() == 1 {
                if !self.ensure_blocks(id, plan) {
                    break; // It was the last and had to go itself.
                }
                plan.rows.push(self.row(id, 1));
            }
            index += 1;
        }
        plan.n_decodes = plan.rows.len();
    }

    fn longest_rest(&self, prompts: &[SequenceId]) -> [usize; 2] {
        let rests = prompts.iter().map(|id| {
            let sequence = &self.sequences[id];
            [sequence.n_computed, sequence.tokens.len()]
        });
        rests.max_by_key(|[start, end]| end - start).unwrap_or_default()
    }

    /// Lengthens decoding rows by their drafts and returns by how much in all. Half of the step is
    /// kept for prompts, and a block for each running sequence.
    fn plan_drafts(&mut self, plan: &mut Plan) -> usize {
        let n_max = self.limits.max_draft_tokens.min((self.limits.max_batch_tokens - plan.n_decodes) / 2);
        let mut n_draft = 0;
        for row in &mut plan.rows {
            let mut draft = std::mem::take(&mut self.sequence_mut(row.id).draft);
            draft.truncate(n_max - n_draft);
            draft.truncate(self.room_for_draft(row.id, draft.len()));
            n_draft += draft.len();
            row.n_tokens += draft.len();
            row.n_logits += draft.len();
            row.draft = draft;
        }
        n_draft
    }

    /// How many of `n_draft` tokens fit into a sequence's blocks and the free ones.
    fn room_for_draft(&mut self, id: SequenceId, n_draft: usize) -> usize {
        let block_tokens = self.limits.block_tokens;
        let n_kept = self.running.len();
        let sequence = self.sequences.get_mut(&id).expect("a planned sequence is known");
        let n_positions = sequence.tokens.len() + n_draft;
        while sequence.blocks.len() * block_tokens < n_positions && self.pool.n_free() > n_kept {
            sequence.blocks.push(self.pool.take().expect("one is free"));
        }
        n_draft.min(sequence.blocks.len() * block_tokens - sequence.tokens.len())
    }

    fn plan_prefills(&self, mut prompts: Vec<SequenceId>, mut budget: Budget, plan: &mut Plan) {
        let Some(oldest) = prompts.iter().copied().min() else { return };
        let kept = Budget {
            n_tokens: budget.n_tokens.div_ceil(OLDEST_PROMPT_PARTS),
            seconds: budget.seconds / OLDEST_PROMPT_PARTS as f64,
            ..budget
        };
        // At least a token, whatever it takes.
        let n_kept = self.share(oldest, 0, &kept).max(self.room(oldest, 0, &kept).min(1));
        self.spend(oldest, [0, n_kept], &mut budget);
        prompts.sort_by_key(|id| (Reverse(self.sequences[id].priority), self.sequences[id].n_pending(), *id));
        for id in prompts {
            let n_given = if id == oldest { n_kept } else { 0 };
            let n_more = self.share(id, n_given, &budget);
            self.spend(id, [n_given, n_more], &mut budget);
            if n_given + n_more > 0 {
                plan.rows.push(self.row(id, n_given + n_more));
            }
        }
    }

    /// Blocks for all known tokens of a running sequence, at the cost of those that rank lower.
    /// False if it was the last itself and lost its own.
    fn ensure_blocks(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let sequence = &self.sequences[&id];
        let n_blocks = sequence.tokens.len().div_ceil(self.limits.block_tokens);
        while self.sequences[&id].blocks.len() < n_blocks {
            if let Some(block) = self.pool.take() {
                self.sequence_mut(id).blocks.push(block);
                continue;
            }
            if self.preempt_last(plan) == id {
                return false;
            }
        }
        true
    }

    /// The running sequence that ranks last returns to the queue.
    fn preempt_last(&mut self, plan: &mut Plan) -> SequenceId {
        let id = self.running.pop().expect("somebody is running");
        self.give_back(id);
        let sequence = self.sequence_mut(id);
        sequence.n_computed = 0;
        sequence.draft.clear();
        let entry = Entry { tenant: sequence.tenant(), priority: sequence.priority };
        self.waiting.insert(id, entry);
        plan.preempted.push(id);
        id
    }

    /// Releases a sequence's blocks, findable as far as they are computed. Last block first: a prefix
    /// is worth nothing without its beginning, so its end is evicted first.
    fn give_back(&mut self, id: SequenceId) {
        let n_computed = self.sequences[&id].n_computed;
        self.publish(id, n_computed, true);
        let blocks = std::mem::take(&mut self.sequence_mut(id).blocks);
        blocks.into_iter().rev().for_each(|block| self.pool.release(block));
    }

    /// Makes the blocks of a sequence's computed tokens findable, from position `start` on: those
    /// that are whole, and the last one `with_part`.
    fn publish(&mut self, id: SequenceId, start: usize, with_part: bool) {
        let block_tokens = self.limits.block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("the sequence is known");
        if !self.limits.prefix_cache || sequence.blocks.is_empty() {
            return;
        }
        let n_computed = sequence.n_computed;
        let end = if with_part { n_computed.div_ceil(block_tokens) } else { n_computed / block_tokens };
        for block_idx in start / block_tokens..end {
            let content = sequence.content(block_idx, block_tokens);
            let block: &mut BlockId = &mut sequence.blocks[block_idx];
            *block = self.pool.publish(*block, content);
        }
    }

    /// Pending tokens of a sequence, but for `n_given`, that the budget has time for.
    fn share(&self, id: SequenceId, n_given: usize, budget: &Budget) -> usize {
        let start = self.sequences[&id].n_computed;
        let reading = if n_given == 0 { budget.costs.reading(start) } else { 0.0 };
        let n_in_time = budget.costs.n_tokens(start + n_given, budget.seconds - reading);
        self.room(id, n_given, budget).min(n_in_time)
    }

    /// The same, whatever time they take.
    fn room(&self, id: SequenceId, n_given: usize, budget: &Budget) -> usize {
        let sequence = &self.sequences[&id];
        let n_tokens = (sequence.n_pending() - n_given).min(budget.n_tokens);
        if wants_prompt_logits(sequence) { n_tokens.min(budget.n_prompt_logits) } else { n_tokens }
    }

    /// `n_more` tokens after `n_given`.
    fn spend(&self, id: SequenceId, [n_given, n_more]: [usize; 2], budget: &mut Budget) {
        let sequence = &self.sequences[&id];
        budget.n_tokens -= n_more;
        if wants_prompt_logits(sequence) {
            budget.n_prompt_logits -= n_more;
        }
        let start = sequence.n_computed;
        if n_given == 0 && n_more > 0 {
            budget.seconds -= budget.costs.reading(start);
        }
        budget.seconds -= budget.costs.tokens(start + n_given, n_more);
    }

    fn row(&self, id: SequenceId, n_tokens: usize) -> PlanRow {
        let sequence = &self.sequences[&id];
        let catches_up = n_tokens == sequence.n_pending();
        let n_logits = if wants_prompt_logits(sequence) { n_tokens } else { usize::from(catches_up) };
        PlanRow { id, start: sequence.n_computed, n_tokens, n_logits, catches_up, draft: Vec::new() }
    }

    fn rank(&self, id: SequenceId) -> (Reverse<i8>, SequenceId) {
        (Reverse(self.sequences[&id].priority), id)
    }

    fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("the sequence is known")
    }

    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.pool.check();
        assert_eq!(self.sequences.len(), self.waiting.len() + self.running.len());
        assert!(self.running.is_sorted_by_key(|&id| self.rank(id)), "ranks: {:?}", self.running);
        assert!(self.waiting.ids().all(|id| self.sequences[&id].blocks.is_empty()));
        assert!(!self.sequences.is_empty() || self.tenants.is_empty(), "an account was left open");
        let held: usize = self.sequences.values().map(|sequence| sequence.blocks.len()).sum();
        let holders: usize = (0..self.limits.n_blocks).map(|id| self.pool.n_holders(id as BlockId)).sum();
        assert_eq!(held, holders, "a block has a holder that nobody is");
    }
}

impl Budget {
    /// Guesses of the decoding `rows` come out of what the pace leaves to prompts.
    fn keep_pace(&mut self, pace: &Pace, rows: &[PlanRow]) {
        let n_draft: usize = rows.iter().map(|row| row.draft.len()).sum();
        self.n_tokens = self.n_tokens.min(pace.n_tokens.saturating_sub(n_draft).max(1));
        self.costs = pace.costs;
        let guesses = rows.iter().map(|row| pace.costs.tokens(row.start, row.draft.len()));
        self.seconds = pace.seconds - guesses.sum::<f64>();
    }
}

fn wants_prompt_logits(sequence: &Sequence) -> bool {
    sequence.prompt_logits && sequence.n_computed < sequence.n_prompt
}
