//! The prefix cache's index: which block holds the keys and values of which tokens.
//!
//! A whole block is found by the hash of everything from the start to its end. A block that is filled
//! in part, or whose tokens agree with the wanted ones only in part, is found by the hash of what
//! precedes it; its first positions are then copied, never shared, so nobody writes into another's block.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use crate::blocks::BlockId;
use crate::request::TokenId;

/// Blocks with one and the same beginning that a search compares, newest first. Bounds the work of
/// a search where thousands of conversations share their first block.
const SIBLINGS_SEEN_MAX: usize = 32;

/// Names the content of a block: tenant and all tokens from the start to the block's end.
/// SHA-256, because a collision would show one user another's conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockHash([u8; 32]);

impl BlockHash {
    /// The parent of a sequence's first block: keeps tenants apart.
    pub(crate) fn root(tenant: &str) -> BlockHash {
        BlockHash(Sha256::digest(tenant.as_bytes()).into())
    }

    /// The parent of a tenant's first blocks under an adapter: another model's keys and values.
    pub(crate) fn adapted(&self, adapter: u64) -> BlockHash {
        let hasher =
            Sha256::new_with_prefix(self.0).chain_update(b"adapter").chain_update(adapter.to_le_bytes());
        BlockHash(hasher.finalize().into())
    }

    pub(crate) fn child(&self, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = Sha256::new_with_prefix(self.0);
        tokens.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        BlockHash(hasher.finalize().into())
    }
}

/// What a block holds. Only computed tokens that can no longer change.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    /// Of everything before the block.
    pub(crate) parent: BlockHash,
    /// Of everything up to the block's end, when it is whole.
    pub(crate) hash: Option<BlockHash>,
    pub(crate) tokens: Vec<TokenId>,
}

/// Invariant: `by_hash` and `by_parent` lead exactly to the blocks that have a content.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    /// One per block of the pool.
    contents: Vec<Option<Content>>,
    by_hash: HashMap<BlockHash, BlockId>,
    /// Oldest first.
    by_parent: HashMap<BlockHash, Vec<BlockId>>,
}

impl PrefixIndex {
    pub(crate) fn new(n_blocks: usize) -> PrefixIndex {
        PrefixIndex { contents: vec![None; n_blocks], by_hash: HashMap::new(), by_parent: HashMap::new() }
    }

    pub(crate) fn knows(&self, id: BlockId) -> bool {
        self.contents[id as usize].is_some()
    }

    pub(crate) fn whole(&self, hash: &BlockHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    /// The block after `parent` that agrees longest with `wanted`, and how many tokens do.
    pub(crate) fn longest(&self, parent: &BlockHash, wanted: &[TokenId]) -> Option<(BlockId, usize)> {
        let siblings = self.by_parent.get(parent)?.iter().rev().take(SIBLINGS_SEEN_MAX);
        let matches = siblings.map(|&id| (id, n_common(self.tokens(id), wanted)));
        matches.max_by_key(|&(_, n)| n).filter(|&(_, n)| n > 0)
    }

    /// Remembers what a block holds, in place of what was known of it. When another block holds the
    /// same already it stays the only one, and is returned if it is whole.
    pub(crate) fn insert(&mut self, id: BlockId, content: Content) -> Option<BlockId> {
        self.remove(id);
        if let Some(hash) = content.hash {
            if let Some(other) = self.whole(&hash) {
                return Some(other);
            }
            self.by_hash.insert(hash, id);
        } else if self
            .longest(&content.parent, &content.tokens)
            .is_some_and(|(_, n)| n == content.tokens.len())
        {
            return None;
        }
        self.by_parent.entry(content.parent).or_default().push(id);
        self.contents[id as usize] = Some(content);
        None
    }

    pub(crate) fn remove(&mut self, id: BlockId) {
        let Some(content) = self.contents[id as usize].take() else { return };
        if let Some(hash) = content.hash {
            self.by_hash.remove(&hash);
        }
        let siblings = self.by_parent.get_mut(&content.parent).expect("a content is found by its parent");
        siblings.retain(|&other| other != id);
        if siblings.is_empty() {
            self.by_parent.remove(&content.parent);
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = PrefixIndex::new(self.contents.len());
    }

    fn tokens(&self, id: BlockId) -> &[TokenId] {
        self.contents[id as usize].as_ref().map_or(&[], |content| &content.tokens)
    }

    #[cfg(test)]
    pub(crate) fn check(&self) {
        let known: Vec<_> = (0..).zip(&self.contents).filter_map(|(id, c)| Some((id, c.as_ref()?))).collect();
        let n_whole = known.iter().filter(|(_, content)| content.hash.is_some()).count();
        assert_eq!(n_whole, self.by_hash.len());
        assert_eq!(known.len(), self.by_parent.values().map(Vec::len).sum::<usize>());
        for (id, content) in known {
            assert!(self.by_parent[&content.parent].contains(&id));
            content.hash.iter().for_each(|hash| assert_eq!(self.by_hash[hash], id));
        }
    }
}

/// Length of the longest common prefix.
fn n_common(a: &[TokenId], b: &[TokenId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_tell_tenants_parents_and_tokens_apart() {
        let a = BlockHash::root("a").child(&[1, 2]);
        assert_eq!(a, BlockHash::root("a").child(&[1, 2]));
        assert_ne!(a, BlockHash::root("b").child(&[1, 2]));
        assert_ne!(a, BlockHash::root("a").child(&[2, 1]));
        assert_ne!(a.child(&[1, 2]), a);
    }

    #[test]
    fn the_longest_agreement_is_found_and_growth_replaces() {
        let root = BlockHash::root("t");
        let part = |tokens: &[TokenId]| Content { parent: root, hash: None, tokens: tokens.to_vec() };
        let mut index = PrefixIndex::new(4);
        index.insert(0, part(&[1, 2]));
        index.insert(1, part(&[1, 3, 4]));
        assert_eq!(index.longest(&root, &[1, 3, 5]), Some((1, 2)));
        assert_eq!(index.longest(&root, &[9]), None);
        assert_eq!(index.longest(&BlockHash::root("other"), &[1, 3]), None);
        // What another block holds already is not worth remembering twice.
        assert_eq!(index.insert(2, part(&[1, 3])), None);
        assert!(!index.knows(2));
        let hash = root.child(&[1, 2, 7, 8]);
        let whole = Content { parent: root, hash: Some(hash), tokens: vec![1, 2, 7, 8] };
        assert_eq!(index.insert(0, whole.clone()), None);
        assert_eq!(index.insert(3, whole), Some(0));
        assert_eq!((index.whole(&hash), index.longest(&root, &[1, 2, 7])), (Some(0), Some((0, 3))));
        index.check();
        index.remove(0);
        assert_eq!((index.whole(&hash), index.longest(&root, &[1, 2])), (None, Some((1, 1))));
        index.check();
    }
}
