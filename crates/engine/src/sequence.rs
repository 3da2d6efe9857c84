//! One sequence as the scheduler sees it: computed tokens catching up with known ones.

use crate::blocks::{BlockHash, BlockId};
use crate::request::TokenId;

/// Names a sequence for the life of its engine; never used twice, and rising with arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SequenceId(pub(crate) u64);

#[derive(Debug)]
pub(crate) struct Sequence {
    /// Known tokens: the prompt and what was generated after it.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) n_prompt: usize,
    /// Tokens whose keys and values lie in `blocks`. Always less than `tokens.len()` between steps:
    /// the last known token is what the next logits are computed from.
    pub(crate) n_computed: usize,
    /// Hold positions `0..`, in order. Empty while waiting.
    pub(crate) blocks: Vec<BlockId>,
    /// Logits of every prompt position are wanted, not only of the last known token.
    pub(crate) prompt_logits: bool,
    /// It had its first step; from then on preemption changes its speed but not what it reports.
    pub(crate) was_admitted: bool,
    /// Of the tenant, then of each whole block of `tokens`, as far as they were asked for.
    hashes: Vec<BlockHash>,
}

impl Sequence {
    pub(crate) fn new(tokens: Vec<TokenId>, tenant: &str, prompt_logits: bool) -> Sequence {
        assert!(!tokens.is_empty(), "a sequence needs a token to start from");
        Sequence {
            n_prompt: tokens.len(),
            tokens,
            n_computed: 0,
            blocks: Vec::new(),
            prompt_logits,
            was_admitted: false,
            hashes: vec![BlockHash::root(tenant)],
        }
    }

    /// Known tokens that still have to be computed.
    pub(crate) fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// The name of whole block `block_idx`. Tokens before a block's end never change, so it is kept.
    pub(crate) fn hash(&mut self, block_idx: usize, block_tokens: usize) -> BlockHash {
        while self.hashes.len() <= block_idx + 1 {
            let start = (self.hashes.len() - 1) * block_tokens;
            let tokens = &self.tokens[start..start + block_tokens];
            let parent = self.hashes[self.hashes.len() - 1];
            self.hashes.push(parent.child(tokens));
        }
        self.hashes[block_idx + 1]
    }
}
