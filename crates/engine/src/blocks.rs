//! The pool of KV blocks and the prefix cache that lives inside it.
//!
//! A block is held by any number of sequences or by nobody. A block that nobody holds may still
//! carry the keys and values of a known prefix: it stays findable until the pool needs the room,
//! least recently used first, and the end of a prefix before its beginning. Only whole blocks are
//! shared, and a whole block is never written again; of a block filled in part a copy is made.

use crate::prefix::{BlockHash, Content, PrefixIndex};
use crate::request::TokenId;

pub(crate) type BlockId = u32;

/// Invariant: `n_free` + `n_used()` == number of blocks, and a block is in the free list exactly
/// when its `n_holders` is 0 (held by the scheduler's simulation).
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Ends of the list of free blocks: taken at the head, so the head is used least recently.
    head: BlockId,
    tail: BlockId,
    n_free: usize,
    prefixes: PrefixIndex,
}

#[derive(Clone, Debug)]
struct Block {
    n_holders: usize,
    /// Neighbours in the free list; meaningless while held.
    previous: BlockId,
    next: BlockId,
}

/// No neighbour.
const NONE: BlockId = BlockId::MAX;

impl BlockPool {
    pub(crate) fn new(n_blocks: usize) -> BlockPool {
        assert!(n_blocks < NONE as usize, "block ids are 32 bits");
        let block = Block { n_holders: 0, previous: NONE, next: NONE };
        let mut pool = BlockPool {
            blocks: vec![block; n_blocks],
            head: NONE,
            tail: NONE,
            n_free: 0,
            prefixes: PrefixIndex::new(n_blocks),
        };
        (0..n_blocks as BlockId).for_each(|id| pool.push_tail(id));
        pool
    }

    pub(crate) fn n_free(&self) -> usize {
        self.n_free
    }

    pub(crate) fn n_used(&self) -> usize {
        self.blocks.len() - self.n_free
    }

    /// A block for the caller alone. What it cached is forgotten. `None` when all are held.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        let id = self.head;
        if id == NONE {
            return None;
        }
        self.unlink(id);
        self.blocks[id as usize].n_holders = 1;
        self.prefixes.remove(id);
        Some(id)
    }

    /// The whole block with this content, if it is cached. Follow with [`BlockPool::hold`] to keep it.
    pub(crate) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.prefixes.whole(hash)
    }

    /// The cached block that begins most like `wanted`, and how many of its positions can be copied.
    pub(crate) fn find_part(&self, parent: &BlockHash, wanted: &[TokenId]) -> Option<(BlockId, usize)> {
        self.prefixes.longest(parent, wanted)
    }

    /// A cached block was of use: it is evicted later.
    pub(crate) fn touch(&mut self, id: BlockId) {
        if self.is_free(id) {
            self.unlink(id);
            self.push_tail(id);
        }
    }

    pub(crate) fn n_holders(&self, id: BlockId) -> usize {
        self.blocks[id as usize].n_holders
    }

    pub(crate) fn is_free(&self, id: BlockId) -> bool {
        self.blocks[id as usize].n_holders == 0
    }

    /// One more holder of a cached block.
    pub(crate) fn hold(&mut self, id: BlockId) {
        if self.is_free(id) {
            self.unlink(id);
        }
        self.blocks[id as usize].n_holders += 1;
    }

    /// One holder less.
    ///
    /// # Panics
    /// If nobody holds the block: it was freed twice.
    pub(crate) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        assert!(block.n_holders > 0, "block {id} freed twice");
        block.n_holders -= 1;
        if block.n_holders > 0 {
            return;
        }
        // A block of unknown content is worth nothing to anybody, so it goes first.
        if self.prefixes.knows(id) { self.push_tail(id) } else { self.push_head(id) }
    }

    /// Makes a held block's computed content findable. Returns the block to use from now on: when
    /// two sequences computed the same whole block side by side, they share the first one.
    #[must_use]
    pub(crate) fn publish(&mut self, id: BlockId, content: Content) -> BlockId {
        assert!(!self.is_free(id), "block {id} is published by nobody");
        let Some(first) = self.prefixes.insert(id, content) else { return id };
        self.hold(first);
        self.release(id);
        first
    }

    /// Forgets every cached prefix: after a failed step nobody knows what the blocks hold.
    pub(crate) fn forget_prefixes(&mut self) {
        self.prefixes.clear();
    }

    fn push_tail(&mut self, id: BlockId) {
        let tail = std::mem::replace(&mut self.tail, id);
        self.link(tail, id, NONE);
    }

    fn push_head(&mut self, id: BlockId) {
        let head = std::mem::replace(&mut self.head, id);
        self.link(NONE, id, head);
    }

    fn link(&mut self, previous: BlockId, id: BlockId, next: BlockId) {
        self.blocks[id as usize].previous = previous;
        self.blocks[id as usize].next = next;
        self.join(previous, id);
        self.join(id, next);
        self.n_free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { previous, next, .. } = self.blocks[id as usize];
        self.join(previous, next);
        self.n_free -= 1;
    }

    /// Makes `right` the follower of `left`; either may be the list's end.
    fn join(&mut self, left: BlockId, right: BlockId) {
        match left {
            NONE => self.head = right,
            left => self.blocks[left as usize].next = right,
        }
        match right {
            NONE => self.tail = left,
            right => self.blocks[right as usize].previous = left,
        }
    }

    /// Walks everything and panics where an invariant is broken.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        let (mut n_free, mut id, mut previous) = (0, self.head, NONE);
        while id != NONE {
            let block = &self.blocks[id as usize];
            assert_eq!(block.n_holders, 0, "block {id} is held and free");
            assert_eq!(block.previous, previous, "block {id} has another neighbour");
            (previous, id, n_free) = (id, block.next, n_free + 1);
            assert!(n_free <= self.blocks.len(), "the free list is a ring");
        }
        assert_eq!((self.tail, self.n_free), (previous, n_free));
        let n_unheld = self.blocks.iter().filter(|b| b.n_holders == 0).count();
        assert_eq!(n_unheld, n_free, "a block is neither held nor free");
        self.prefixes.check();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_blocks_are_different_and_come_back() {
        let mut pool = BlockPool::new(3);
        let mut taken: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert_eq!((pool.take(), pool.n_free(), pool.n_used()), (None, 0, 3));
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2]);
        for id in taken {
            pool.release(id);
            pool.check();
        }
        assert_eq!(pool.n_free(), 3);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn freeing_twice_panics() {
        let mut pool = BlockPool::new(2);
        let id = pool.take().unwrap();
        pool.release(id);
        pool.release(id);
    }

    #[test]
    fn cached_blocks_are_shared_and_evicted_least_recently_used_first() {
        let mut pool = BlockPool::new(3);
        let root = BlockHash::root("t");
        let hashes: Vec<_> = (0..3).map(|i| root.child(&[i])).collect();
        let content = |i: u32| Content { parent: root, hash: Some(hashes[i as usize]), tokens: vec![i] };
        let ids: Vec<_> = (0..3)
            .map(|i| {
                let id = pool.take().unwrap();
                assert_eq!(pool.publish(id, content(i)), id);
                id
            })
            .collect();
        [1, 0, 2].iter().for_each(|&i| pool.release(ids[i]));
        assert_eq!(pool.n_free(), 3);

        // A hit on block 1 takes it out of the free list, for two holders.
        pool.hold(pool.find(&hashes[1]).unwrap());
        pool.hold(ids[1]);
        assert_eq!(pool.n_free(), 2);
        pool.check();

        // Block 0 was released before block 2, so it is evicted first.
        assert_eq!(pool.take(), Some(ids[0]));
        assert_eq!(pool.find(&hashes[0]), None);
        assert_eq!(pool.find(&hashes[2]), Some(ids[2]));
        pool.release(ids[1]);
        assert!(!pool.is_free(ids[1]));
        pool.release(ids[1]);
        assert!(pool.is_free(ids[1]));

        pool.forget_prefixes();
        assert_eq!(pool.find(&hashes[1]), None);
        pool.check();
    }

    #[test]
    fn what_is_computed_twice_is_kept_once() {
        let mut pool = BlockPool::new(2);
        let root = BlockHash::root("t");
        let content = || Content { parent: root, hash: Some(root.child(&[1, 2])), tokens: vec![1, 2] };
        let (first, second) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(pool.publish(first, content()), first);
        assert_eq!(pool.publish(second, content()), first);
        assert_eq!((pool.n_holders(first), pool.n_free()), (2, 1));
        pool.check();
    }

    #[test]
    fn a_copied_block_is_evicted_later() {
        let mut pool = BlockPool::new(2);
        let root = BlockHash::root("t");
        let ids: Vec<_> = (0..2)
            .map(|i| {
                let id = pool.take().unwrap();
                let content = Content { parent: root, hash: None, tokens: vec![i, 5] };
                assert_eq!(pool.publish(id, content), id);
                id
            })
            .collect();
        ids.iter().for_each(|&id| pool.release(id));
        assert_eq!(pool.find_part(&root, &[0, 6, 7]), Some((ids[0], 1)));
        pool.touch(ids[0]);
        assert_eq!(pool.take(), Some(ids[1]));
        assert_eq!(pool.find_part(&root, &[1, 5]), None);
        pool.check();
    }
}
