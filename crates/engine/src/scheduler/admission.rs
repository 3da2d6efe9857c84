//! From the queue to a slot: who may start now, with what of the prefix cache.

use model::BlockCopy;

use super::{Admission, Plan, Scheduler};
use crate::blocks::BlockId;
use crate::sequence::{Sequence, SequenceId};

/// What the cache holds of a waiting sequence's tokens. The last known token is always computed.
struct Hit {
    /// Whole blocks, to be shared.
    blocks: Vec<BlockId>,
    /// A block that goes on like the sequence for so many tokens, to be copied.
    part: Option<(BlockId, usize)>,
}

impl Scheduler {
    /// Waiting sequences, oldest first, but for those that do better to wait for another's prompt.
    pub(super) fn ready(&self) -> Vec<SequenceId> {
        self.waiting.ids().filter(|&id| !self.is_deferred(id)).collect()
    }

    /// Preempts running sequences of lower priority for the first waiting one, if that gives it room.
    pub(super) fn make_way(&mut self, ready: &[SequenceId], plan: &mut Plan) {
        let Some(next) = self.waiting.first(ready, &self.tenants) else { return };
        let priority = self.sequences[&next].priority;
        let n_higher = self.running.partition_point(|id| self.sequences[id].priority >= priority);
        if n_higher == self.running.len() || n_higher == self.limits.max_running {
            return;
        }
        // Counted as if nothing were cached, so that nobody goes in vain.
        let n_blocks = self.sequences[&next].tokens.len().div_ceil(self.limits.block_tokens);
        if n_blocks + n_higher > self.pool.n_free() + self.n_freed_without(n_higher) {
            return;
        }
        while self.running.len() > n_higher {
            let hit = self.find_prefix(next);
            if self.running.len() < self.limits.max_running && self.has_room(next, &hit) {
                return;
            }
            self.preempt_last(plan);
        }
    }

    /// Blocks that only the running sequences from `first` on hold.
    fn n_freed_without(&self, first: usize) -> usize {
        let mut n_holders = std::collections::HashMap::<BlockId, usize>::new();
        for id in &self.running[first..] {
            self.sequences[id].blocks.iter().for_each(|&block| *n_holders.entry(block).or_default() += 1);
        }
        n_holders.into_iter().filter(|&(block, n)| self.pool.n_holders(block) == n).count()
    }

    /// Gives slots and blocks to waiting sequences and returns who got them.
    pub(super) fn admit(&mut self, mut ready: Vec<SequenceId>, plan: &mut Plan) -> Vec<SequenceId> {
        let mut admitted = Vec::new();
        while self.running.len() < self.limits.max_running {
            let Some(id) = self.waiting.pick(&ready, &self.tenants) else { break };
            // Somebody who was admitted a moment ago may have changed that.
            if self.is_deferred(id) {
                ready.retain(|&other| other != id);
                plan.n_deferred += 1;
                continue;
            }
            let hit = self.find_prefix(id);
            if !self.has_room(id, &hit) {
                break;
            }
            ready.retain(|&other| other != id);
            self.start(id, hit, plan);
            admitted.push(id);
        }
        admitted
    }

    /// A running prompt is about to compute a block or more of what this sequence needs: waiting for
    /// it costs less than computing the same side by side.
    fn is_deferred(&self, id: SequenceId) -> bool {
        let sequence = &self.sequences[&id];
        if !self.can_use_cache(sequence) {
            return false;
        }
        let wanted = &sequence.tokens[..sequence.tokens.len() - 1];
        self.running.iter().map(|id| &self.sequences[id]).any(|other| {
            let (start, end) = (other.n_computed, other.n_computed + self.limits.block_tokens);
            other.n_pending() > 1
                && other.root() == sequence.root()
                && other.priority >= sequence.priority
                // The part to come first: it is short, and differs as soon as the shared part is computed.
                && wanted.get(start..end).is_some_and(|part| other.tokens.get(start..end) == Some(part))
                && wanted[..start] == other.tokens[..start]
        })
    }

    fn can_use_cache(&self, sequence: &Sequence) -> bool {
        self.limits.prefix_cache && !sequence.prompt_logits
    }

    fn find_prefix(&mut self, id: SequenceId) -> Hit {
        let block_tokens = self.limits.block_tokens;
        let mut hit = Hit { blocks: Vec::new(), part: None };
        if !self.can_use_cache(&self.sequences[&id]) {
            return hit;
        }
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        let n_wanted = sequence.tokens.len() - 1;
        let whole = (1..=n_wanted / block_tokens)
            .map_while(|n_blocks| self.pool.find(&sequence.prefix_hash(n_blocks, block_tokens)));
        hit.blocks = whole.collect();
        let parent = sequence.prefix_hash(hit.blocks.len(), block_tokens);
        let start = hit.blocks.len() * block_tokens;
        let wanted = &sequence.tokens[start..n_wanted.min(start + block_tokens)];
        hit.part = self.pool.find_part(&parent, wanted);
        hit
    }

    /// Whether all known tokens fit now, leaving one block to each running sequence so that a
    /// newcomer is not preempted in the next step.
    fn has_room(&self, id: SequenceId, hit: &Hit) -> bool {
        let n_blocks = self.sequences[&id].tokens.len().div_ceil(self.limits.block_tokens);
        let n_revived = hit.blocks.iter().filter(|&&block| self.pool.is_free(block)).count();
        let n_needed = n_blocks - hit.blocks.len() + n_revived;
        n_needed + self.running.len() <= self.pool.n_free()
    }

    /// Gives a sequence a slot and the blocks of all its known tokens.
    fn start(&mut self, id: SequenceId, hit: Hit, plan: &mut Plan) {
        let block_tokens = self.limits.block_tokens;
        if self.waiting.is_turn_of_oldest() {
            let highest = self.running.first().map(|id| self.sequences[id].priority);
            let highest = highest.max(self.waiting.priority_max());
            self.sequence_mut(id).priority = highest.expect("it waits itself");
        }
        self.waiting.admit(id);
        let n_part = hit.part.map_or(0, |(_, n_positions)| n_positions);
        let n_cached = hit.blocks.len() * block_tokens + n_part;
        self.note_first_admission(id, n_cached, plan);
        hit.blocks.iter().for_each(|&block| self.pool.hold(block));
        hit.part.iter().for_each(|&(block, _)| self.pool.touch(block));
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        let n_new = sequence.tokens.len().div_ceil(block_tokens) - hit.blocks.len();
        let first_new = hit.blocks.len();
        sequence.n_computed = n_cached;
        sequence.blocks = hit.blocks;
        sequence.blocks.extend((0..n_new).map(|_| self.pool.take().expect("room was checked")));
        if let Some((from, n_positions)) = hit.part {
            // What is copied is read before this step writes anything, so it may even be given away.
            plan.copies.push(BlockCopy { from, to: sequence.blocks[first_new], n_positions });
        }
        let rank = self.rank(id);
        let index = self.running.partition_point(|&other| self.rank(other) < rank);
        self.running.insert(index, id);
    }

    fn note_first_admission(&mut self, id: SequenceId, n_cached: usize, plan: &mut Plan) {
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        if sequence.was_admitted {
            return;
        }
        sequence.was_admitted = true;
        let n_looked_up = if self.limits.prefix_cache { sequence.n_prompt } else { 0 };
        plan.admitted.push(Admission { id, n_looked_up, n_cached });
        self.tenants.charge(&sequence.tenant(), sequence.tokens.len() - n_cached);
    }
}
