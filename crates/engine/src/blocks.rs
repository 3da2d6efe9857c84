//! The pool of KV blocks and the prefix cache that lives inside it.
//!
//! A block is held by any number of sequences or by nobody. A block that nobody holds may still
//! carry the keys and values of a known prefix: it stays findable by its hash until the pool needs
//! the room, least recently used first. Only whole blocks are shared, and a whole block is never
//! written again, so sharing needs no copies.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use crate::request::TokenId;

pub(crate) type BlockId = u32;

/// Names the content of a block: tenant and all tokens from the start to the block's end.
/// SHA-256, because a collision would show one user another's conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockHash([u8; 32]);

impl BlockHash {
    /// The parent of a sequence's first block: keeps tenants apart.
    pub(crate) fn root(tenant: &str) -> BlockHash {
        BlockHash(Sha256::digest(tenant.as_bytes()).into())
    }

    pub(crate) fn child(&self, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = Sha256::new_with_prefix(self.0);
        tokens.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        BlockHash(hasher.finalize().into())
    }
}

/// Invariant: `n_free` + `n_used()` == number of blocks, and a block is in the free list exactly
/// when its `n_holders` is 0 (held by the scheduler's simulation).
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Ends of the list of free blocks: taken at the head, so the head is used least recently.
    head: BlockId,
    tail: BlockId,
    n_free: usize,
    by_hash: HashMap<BlockHash, BlockId>,
}

#[derive(Clone, Debug)]
struct Block {
    n_holders: usize,
    /// Set when `by_hash` leads here.
    hash: Option<BlockHash>,
    /// Neighbours in the free list; meaningless while held.
    previous: BlockId,
    next: BlockId,
}

/// No neighbour.
const NONE: BlockId = BlockId::MAX;

impl BlockPool {
    pub(crate) fn new(n_blocks: usize) -> BlockPool {
        assert!(n_blocks < NONE as usize, "block ids are 32 bits");
        let block = Block { n_holders: 0, hash: None, previous: NONE, next: NONE };
        let mut pool = BlockPool {
            blocks: vec![block; n_blocks],
            head: NONE,
            tail: NONE,
            n_free: 0,
            by_hash: HashMap::new(),
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
        let block = &mut self.blocks[id as usize];
        block.n_holders = 1;
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        Some(id)
    }

    /// The block with this content, if it is cached. Follow with [`BlockPool::hold`] to keep it.
    pub(crate) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
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
        // A block without a hash is worth nothing to anybody, so it goes first.
        if block.hash.is_some() { self.push_tail(id) } else { self.push_head(id) }
    }

    /// Makes a whole, computed block findable. When two sequences computed the same content side by
    /// side the first one stays.
    pub(crate) fn publish(&mut self, id: BlockId, hash: BlockHash) {
        assert!(!self.is_free(id), "block {id} is published by nobody");
        if self.by_hash.contains_key(&hash) || self.blocks[id as usize].hash.is_some() {
            return;
        }
        self.by_hash.insert(hash, id);
        self.blocks[id as usize].hash = Some(hash);
    }

    /// Forgets every cached prefix: after a failed step nobody knows what the blocks hold.
    pub(crate) fn forget_prefixes(&mut self) {
        for (_, id) in self.by_hash.drain() {
            self.blocks[id as usize].hash = None;
        }
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
        let n_hashed = self.blocks.iter().filter(|b| b.hash.is_some()).count();
        assert_eq!(n_hashed, self.by_hash.len());
        self.by_hash.iter().for_each(|(hash, &id)| assert_eq!(self.blocks[id as usize].hash, Some(*hash)));
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
        let hashes: Vec<_> = (0..3).map(|i| BlockHash::root("t").child(&[i])).collect();
        let ids: Vec<_> = hashes
            .iter()
            .map(|&hash| {
                let id = pool.take().unwrap();
                pool.publish(id, hash);
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
    fn hashes_tell_tenants_parents_and_tokens_apart() {
        let a = BlockHash::root("a").child(&[1, 2]);
        assert_eq!(a, BlockHash::root("a").child(&[1, 2]));
        assert_ne!(a, BlockHash::root("b").child(&[1, 2]));
        assert_ne!(a, BlockHash::root("a").child(&[2, 1]));
        assert_ne!(a.child(&[1, 2]), a);
    }
}
