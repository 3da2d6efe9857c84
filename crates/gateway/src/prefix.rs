//! Who has computed which beginning of a prompt: a replica that has answers sooner, from its cache.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A prompt is compared in pieces of so many bytes: about sixty tokens, some blocks of an engine's cache.
pub const BLOCK_BYTES: usize = 256;

/// Longer prompts are told apart by their first 32 KiB.
const BLOCKS_MAX: usize = 128;

/// Replicas remembered for one beginning: enough for the hottest to be answered by several.
const OWNERS_MAX: usize = 4;

/// The beginnings of one prompt, shortest first: each hash covers all bytes up to its block's end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefix(Vec<u64>);

impl Prefix {
    /// Of a prompt's bytes as they were sent. `scope` keeps apart what must not share a cache: a tenant.
    pub fn of(scope: &str, prompt: &[u8]) -> Prefix {
        // Fixed keys: the hashes are compared within one process, and who forces a collision only loses a cache hit.
        let mut hasher = DefaultHasher::new();
        scope.hash(&mut hasher);
        let blocks = prompt.chunks_exact(BLOCK_BYTES).take(BLOCKS_MAX);
        let hash = |block: &[u8]| {
            hasher.write(block);
            hasher.finish()
        };
        Prefix(blocks.map(hash).collect())
    }

    pub fn n_blocks(&self) -> usize {
        self.0.len()
    }
}

/// Replicas by the beginnings they have computed, the latest first. Bounded: two generations of beginnings, of which the
/// older is forgotten when the younger is full.
#[derive(Debug)]
pub(crate) struct Affinity {
    young: HashMap<u64, Owners>,
    old: HashMap<u64, Owners>,
    generation_max: usize,
}

type Owners = [Option<u32>; OWNERS_MAX];

impl Affinity {
    pub(crate) fn new(n_blocks_max: usize) -> Affinity {
        Affinity { young: HashMap::new(), old: HashMap::new(), generation_max: (n_blocks_max / 2).max(1) }
    }

    /// Replicas that have the longest beginning of `prefix` that any of `wanted` has, and how many blocks that is.
    pub(crate) fn owners(&self, prefix: &Prefix, wanted: impl Fn(u32) -> bool) -> Option<(Vec<u32>, usize)> {
        for (at, hash) in prefix.0.iter().enumerate().rev() {
            let Some(owners) = self.young.get(hash).or_else(|| self.old.get(hash)) else { continue };
            let owners: Vec<u32> = owners.iter().flatten().copied().filter(|&owner| wanted(owner)).collect();
            if !owners.is_empty() {
                return Some((owners, at + 1));
            }
        }
        None
    }

    /// From now on `replica` has every beginning of `prefix`.
    pub(crate) fn learn(&mut self, prefix: &Prefix, replica: u32) {
        for hash in &prefix.0 {
            let mut owners = self.young.get(hash).or_else(|| self.old.get(hash)).copied().unwrap_or_default();
            // The newest first; the oldest falls off the end.
            let at = owners.iter().position(|o| *o == Some(replica)).unwrap_or(OWNERS_MAX - 1);
            owners[..=at].rotate_right(1);
            owners[0] = Some(replica);
            if self.young.len() >= self.generation_max && !self.young.contains_key(hash) {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*hash, owners);
        }
    }

    /// The replica is gone, and its cache with it.
    pub(crate) fn forget(&mut self, replica: u32) {
        for owners in self.young.values_mut().chain(self.old.values_mut()) {
            for owner in owners.iter_mut().filter(|owner| **owner == Some(replica)) {
                *owner = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(blocks: &[u8]) -> Prefix {
        let bytes: Vec<u8> = blocks.iter().flat_map(|b| [*b; BLOCK_BYTES]).collect();
        Prefix::of("tenant", &bytes)
    }

    #[test]
    fn the_longest_known_beginning_wins_and_the_newest_owner_comes_first() {
        let mut affinity = Affinity::new(1_000);
        affinity.learn(&prompt(&[1, 2]), 7);
        affinity.learn(&prompt(&[1, 2, 3]), 8);
        let owners = |prefix: &Prefix| affinity.owners(prefix, |_| true);
        assert_eq!(owners(&prompt(&[1, 2, 3, 4])), Some((vec![8], 3)));
        assert_eq!(owners(&prompt(&[1, 2, 9])), Some((vec![8, 7], 2)));
        assert_eq!(owners(&prompt(&[2])), None);
        assert_eq!(affinity.owners(&prompt(&[1, 2, 3]), |owner| owner == 7), Some((vec![7], 2)));
        assert_ne!(Prefix::of("a", &[1; 512]), Prefix::of("b", &[1; 512]), "tenants share no cache");
        assert_eq!(Prefix::of("a", &[1; 255]).n_blocks(), 0);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_forgets_the_dead() {
        let mut affinity = Affinity::new(100);
        for n in 0..1_000_u32 {
            affinity.learn(&Prefix::of(&n.to_string(), &[0; BLOCK_BYTES]), n % 9);
        }
        assert!(affinity.young.len() + affinity.old.len() <= 100);
        let last = Prefix::of("999", &[0; BLOCK_BYTES]);
        assert_eq!(affinity.owners(&last, |_| true), Some((vec![0], 1)));
        for replica in 1..9 {
            affinity.learn(&last, replica);
        }
        assert_eq!(affinity.owners(&last, |_| true), Some((vec![8, 7, 6, 5], 1)));
        affinity.forget(8);
        assert_eq!(affinity.owners(&last, |_| true), Some((vec![7, 6, 5], 1)));
    }
}
