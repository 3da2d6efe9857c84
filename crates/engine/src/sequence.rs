//! One sequence as the scheduler sees it: computed tokens catching up with known ones.

use model::Adapter;

use crate::blocks::BlockId;
use crate::prefix::{BlockHash, Content};
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
    /// Guesses at what follows `tokens`, for the next step to verify.
    pub(crate) draft: Vec<TokenId>,
    /// Logits of every prompt position are wanted, not only of the last known token.
    pub(crate) prompt_logits: bool,
    /// Higher goes first.
    pub(crate) priority: i8,
    /// It had its first step; from then on preemption changes its speed but not what it reports.
    pub(crate) was_admitted: bool,
    /// Changes to the model that it is computed with.
    adapter: Option<Adapter>,
    /// Whose it is.
    tenant: BlockHash,
    /// Of tenant and adapter, then of each whole block of `tokens`, as far as they were asked for.
    hashes: Vec<BlockHash>,
}

impl Sequence {
    pub(crate) fn new(tokens: Vec<TokenId>, tenant: &str) -> Sequence {
        assert!(!tokens.is_empty(), "a sequence needs a token to start from");
        Sequence {
            n_prompt: tokens.len(),
            tokens,
            n_computed: 0,
            blocks: Vec::new(),
            draft: Vec::new(),
            prompt_logits: false,
            priority: 0,
            was_admitted: false,
            adapter: None,
            tenant: BlockHash::root(tenant),
            hashes: vec![BlockHash::root(tenant)],
        }
    }

    /// Known tokens that still have to be computed.
    pub(crate) fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Computes it with changes to the model. What it leaves in the cache is for its like only.
    pub(crate) fn set_adapter(&mut self, adapter: Option<Adapter>) {
        self.hashes = vec![match &adapter {
            Some(adapter) => self.tenant.adapted(adapter.id()),
            None => self.tenant,
        }];
        self.adapter = adapter;
    }

    pub(crate) fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    pub(crate) fn tenant(&self) -> BlockHash {
        self.tenant
    }

    /// What sequences have in common that may share cached blocks.
    pub(crate) fn root(&self) -> BlockHash {
        self.hashes[0]
    }

    /// The name of the first `n_blocks` blocks, all whole. Tokens before a block's end never change,
    /// so it is kept.
    pub(crate) fn prefix_hash(&mut self, n_blocks: usize, block_tokens: usize) -> BlockHash {
        while self.hashes.len() <= n_blocks {
            let start = (self.hashes.len() - 1) * block_tokens;
            let tokens = &self.tokens[start..start + block_tokens];
            let parent = self.hashes[self.hashes.len() - 1];
            self.hashes.push(parent.child(tokens));
        }
        self.hashes[n_blocks]
    }

    /// What block `block_idx` holds of the computed tokens.
    pub(crate) fn content(&mut self, block_idx: usize, block_tokens: usize) -> Content {
        let start = block_idx * block_tokens;
        let end = self.n_computed.min(start + block_tokens);
        let is_whole = end == start + block_tokens;
        Content {
            parent: self.prefix_hash(block_idx, block_tokens),
            hash: is_whole.then(|| self.prefix_hash(block_idx + 1, block_tokens)),
            tokens: self.tokens[start..end].to_vec(),
        }
    }
}
