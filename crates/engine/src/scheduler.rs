//! Decides what each step computes. Pure: no clock, no randomness, no model; the plan is plain data.
//!
//! The rules, in order:
//! 1. Every sequence with one pending token (decoding) gets it, oldest first. When blocks run out the
//!    youngest running sequence gives its blocks back and returns to the head of the queue; later it
//!    is computed again from its known tokens.
//! 2. Running prompts get the rest of the token budget, oldest first; beside decoding sequences
//!    no more than `max_prefill_beside_decode` (the pacer's), so that a long prompt does not stall streams.
//! 3. The queue is served first in, first out, when a sequence's known tokens fit into free blocks.
//!
//! Nobody starves: the oldest running sequence is never preempted for another, it alone always fits
//! (checked at submission), and nothing overtakes in the queue.

use std::collections::{HashMap, VecDeque};

use model::StepInput;

use crate::blocks::{BlockId, BlockPool};
use crate::request::TokenId;
use crate::sequence::{Sequence, SequenceId};

#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) n_blocks: usize,
    pub(crate) block_tokens: usize,
    pub(crate) max_running: usize,
    pub(crate) max_batch_tokens: usize,
    /// Rows of logits that prompts may ask for in one step.
    pub(crate) max_prompt_logits: usize,
    pub(crate) prefix_cache: bool,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    sequences: HashMap<SequenceId, Sequence>,
    /// Without blocks, oldest first.
    waiting: VecDeque<SequenceId>,
    /// With blocks, oldest first; everyone here is older than everyone waiting.
    running: Vec<SequenceId>,
}

/// One step. Each sequence has at most one row.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) rows: Vec<PlanRow>,
    /// The first rows: sequences that had one token to go.
    pub(crate) n_decodes: usize,
    pub(crate) admitted: Vec<Admission>,
    pub(crate) preempted: Vec<SequenceId>,
}

/// Tokens `start..start + n_tokens` of a sequence. Logits come from the last `n_logits` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlanRow {
    pub(crate) id: SequenceId,
    pub(crate) start: usize,
    pub(crate) n_tokens: usize,
    pub(crate) n_logits: usize,
    /// Every known token is computed after this row: the last logits give the next token.
    pub(crate) catches_up: bool,
}

/// A sequence's first admission, for the accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) id: SequenceId,
    /// Tokens that were looked for in the prefix cache, and found.
    pub(crate) n_looked_up: usize,
    pub(crate) n_cached: usize,
}

/// What is left to give away while a plan is made.
struct Budget {
    n_tokens: usize,
    n_prompt_logits: usize,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Scheduler {
        assert!(limits.max_batch_tokens >= limits.max_running, "a step cannot hold every decode");
        assert!(limits.max_prompt_logits > 0, "prompts would wait for ever for their logits");
        let pool = BlockPool::new(limits.n_blocks);
        Scheduler { limits, pool, sequences: HashMap::new(), waiting: VecDeque::new(), running: Vec::new() }
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

    /// Queues a sequence that fits into the pool alone, all its tokens to come included.
    pub(crate) fn add(&mut self, id: SequenceId, sequence: Sequence) {
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
    }

    /// Takes a sequence out, whatever state it is in, and frees what it holds.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        self.release(sequence.blocks);
        self.waiting.retain(|&other| other != id);
        self.running.retain(|&other| other != id);
    }

    /// Appends a generated token: one more for the computed ones to catch up with.
    pub(crate) fn push_token(&mut self, id: SequenceId, token: TokenId) {
        self.sequence_mut(id).tokens.push(token);
    }

    #[cfg(test)]
    pub(crate) fn tokens(&self, id: SequenceId) -> &[TokenId] {
        &self.sequences[&id].tokens
    }

    /// After a failed step no cached prefix can be trusted.
    pub(crate) fn forget_prefixes(&mut self) {
        self.pool.forget_prefixes();
    }

    /// Decides the next step and gives every row the blocks it writes to. Empty only when there are
    /// no sequences. Follow with [`Scheduler::commit`] once the step was computed.
    pub(crate) fn plan(&mut self, max_prefill_beside_decode: usize) -> Plan {
        let mut plan = Plan::default();
        self.plan_decodes(&mut plan);
        let left = self.limits.max_batch_tokens - plan.n_decodes;
        let n_tokens = if plan.n_decodes == 0 { left } else { left.min(max_prefill_beside_decode) };
        let mut budget = Budget { n_tokens, n_prompt_logits: self.limits.max_prompt_logits };
        self.plan_prefills(&mut plan, &mut budget);
        // Whoever was preempted just now must not come straight back.
        if plan.preempted.is_empty() {
            self.admit(&mut plan, &mut budget);
        }
        assert!(!plan.rows.is_empty() || self.sequences.is_empty(), "sequences and no step to run");
        plan
    }

    /// Writes the plan in the runner's words.
    pub(crate) fn input(&self, plan: &Plan) -> StepInput {
        let mut input = StepInput::default();
        for row in &plan.rows {
            let sequence = &self.sequences[&row.id];
            let end = row.start + row.n_tokens;
            let tokens = &sequence.tokens[row.start..end];
            let blocks = &sequence.blocks[..end.div_ceil(self.limits.block_tokens)];
            input.push_row(tokens, row.start, blocks, row.n_logits);
        }
        input
    }

    /// The step was computed: its tokens count, and blocks that became whole can be shared.
    pub(crate) fn commit(&mut self, plan: &Plan) {
        let block_tokens = self.limits.block_tokens;
        for row in &plan.rows {
            let sequence = self.sequences.get_mut(&row.id).expect("a planned sequence is known");
            let end = row.start + row.n_tokens;
            sequence.n_computed = end;
            if !self.limits.prefix_cache {
                continue;
            }
            for block_idx in row.start / block_tokens..end / block_tokens {
                let hash = sequence.hash(block_idx, block_tokens);
                self.pool.publish(sequence.blocks[block_idx], hash);
            }
        }
    }

    fn plan_decodes(&mut self, plan: &mut Plan) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            if self.sequences[&id].n_pending() == 1 {
                if !self.ensure_blocks(id, plan) {
                    break; // It was the youngest and had to go itself.
                }
                plan.rows.push(self.row(id, 1));
            }
            index += 1;
        }
        plan.n_decodes = plan.rows.len();
    }

    fn plan_prefills(&mut self, plan: &mut Plan, budget: &mut Budget) {
        for &id in &self.running {
            let is_planned = self.sequences[&id].n_pending() == 1;
            let n_tokens = self.share(id, budget);
            if !is_planned && n_tokens > 0 {
                plan.rows.push(self.prefill_row(id, n_tokens, budget));
            }
        }
    }

    fn admit(&mut self, plan: &mut Plan, budget: &mut Budget) {
        while let Some(&id) = self.waiting.front() {
            if self.running.len() == self.limits.max_running || self.share(id, budget) == 0 {
                break;
            }
            let cached = self.cached_prefix(id);
            if !self.has_room(id, &cached) {
                break;
            }
            self.waiting.pop_front();
            self.running.push(id);
            self.start(id, cached, plan);
            let n_tokens = self.share(id, budget);
            plan.rows.push(self.prefill_row(id, n_tokens, budget));
        }
    }

    /// The cached blocks a waiting sequence can begin with. The last known token is always computed.
    fn cached_prefix(&mut self, id: SequenceId) -> Vec<BlockId> {
        let block_tokens = self.limits.block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        if !self.limits.prefix_cache || sequence.prompt_logits {
            return Vec::new();
        }
        let n_whole = (sequence.tokens.len() - 1) / block_tokens;
        (0..n_whole).map_while(|block_idx| self.pool.find(&sequence.hash(block_idx, block_tokens))).collect()
    }

    /// Whether all known tokens fit now, leaving one block to each running sequence so that a
    /// newcomer is not preempted in the next step.
    fn has_room(&self, id: SequenceId, cached: &[BlockId]) -> bool {
        let n_blocks = self.sequences[&id].tokens.len().div_ceil(self.limits.block_tokens);
        let n_revived = cached.iter().filter(|&&block| self.pool.is_free(block)).count();
        let n_needed = n_blocks - cached.len() + n_revived;
        n_needed + self.running.len() <= self.pool.n_free()
    }

    /// Gives a sequence the blocks of all its known tokens.
    fn start(&mut self, id: SequenceId, cached: Vec<BlockId>, plan: &mut Plan) {
        let block_tokens = self.limits.block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        let n_cached = cached.len() * block_tokens;
        if !sequence.was_admitted {
            sequence.was_admitted = true;
            let n_looked_up = if self.limits.prefix_cache { sequence.n_prompt } else { 0 };
            plan.admitted.push(Admission { id, n_looked_up, n_cached });
        }
        let n_new = sequence.tokens.len().div_ceil(block_tokens) - cached.len();
        cached.iter().for_each(|&block| self.pool.hold(block));
        sequence.n_computed = n_cached;
        sequence.blocks = cached;
        sequence.blocks.extend((0..n_new).map(|_| self.pool.take().expect("room was checked")));
    }

    /// Blocks for all known tokens of a running sequence, at the cost of younger ones.
    /// False if it was the youngest itself and lost its own.
    fn ensure_blocks(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let sequence = &self.sequences[&id];
        let n_blocks = sequence.tokens.len().div_ceil(self.limits.block_tokens);
        while self.sequences[&id].blocks.len() < n_blocks {
            if let Some(block) = self.pool.take() {
                self.sequence_mut(id).blocks.push(block);
                continue;
            }
            let youngest = self.running.pop().expect("who asks is running");
            self.preempt(youngest);
            plan.preempted.push(youngest);
            if youngest == id {
                return false;
            }
        }
        true
    }

    fn preempt(&mut self, id: SequenceId) {
        let sequence = self.sequence_mut(id);
        sequence.n_computed = 0;
        let blocks = std::mem::take(&mut sequence.blocks);
        self.release(blocks);
        self.waiting.push_front(id);
    }

    /// Last block first: a prefix is worth nothing without its beginning, so its end is evicted first.
    fn release(&mut self, blocks: Vec<BlockId>) {
        blocks.into_iter().rev().for_each(|block| self.pool.release(block));
    }

    /// Pending tokens of a sequence that the budget has room for.
    fn share(&self, id: SequenceId, budget: &Budget) -> usize {
        let sequence = &self.sequences[&id];
        let n_tokens = sequence.n_pending().min(budget.n_tokens);
        if wants_prompt_logits(sequence) { n_tokens.min(budget.n_prompt_logits) } else { n_tokens }
    }

    fn prefill_row(&self, id: SequenceId, n_tokens: usize, budget: &mut Budget) -> PlanRow {
        budget.n_tokens -= n_tokens;
        if wants_prompt_logits(&self.sequences[&id]) {
            budget.n_prompt_logits -= n_tokens;
        }
        self.row(id, n_tokens)
    }

    fn row(&self, id: SequenceId, n_tokens: usize) -> PlanRow {
        let sequence = &self.sequences[&id];
        let catches_up = n_tokens == sequence.n_pending();
        let n_logits = if wants_prompt_logits(sequence) { n_tokens } else { usize::from(catches_up) };
        PlanRow { id, start: sequence.n_computed, n_tokens, n_logits, catches_up }
    }

    fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("the sequence is known")
    }

    #[cfg(test)]
    pub(crate) fn n_pending(&self, id: SequenceId) -> usize {
        self.sequences[&id].n_pending()
    }

    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.pool.check();
        assert_eq!(self.sequences.len(), self.waiting.len() + self.running.len());
        let ages: Vec<_> = self.running.iter().chain(&self.waiting).collect();
        assert!(ages.is_sorted(), "the young overtake the old: {ages:?}");
        assert!(self.waiting.iter().all(|id| self.sequences[id].blocks.is_empty()));
    }
}

fn wants_prompt_logits(sequence: &Sequence) -> bool {
    sequence.prompt_logits && sequence.n_computed < sequence.n_prompt
}
