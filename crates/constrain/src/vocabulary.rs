//! A tokenizer as llguidance wants it: a tree of the bytes of all tokens.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use tokenizer::{TokenId, Tokenizer};

struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
    is_canonical: bool,
}

/// `n_ids` is the width of the model's logits, which may be more than the tokenizer knows. `stop_ids` end an output;
/// a grammar allows them where it is complete, and only there.
pub(crate) fn environment(tokenizer: &Tokenizer, n_ids: usize, stop_ids: &[TokenId]) -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..n_ids as TokenId).map(|id| word(tokenizer, id)).collect();
    if stop_ids.is_empty() {
        // llguidance needs an end. This one is outside of the logits, so nobody draws it.
        words.push(Vec::new());
    }
    let ends = if stop_ids.is_empty() { &[n_ids as TokenId][..] } else { stop_ids };
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, ends[0]), &words).with_eos_tokens(ends);
    let is_canonical = spelled_as_written(tokenizer);
    Arc::new(Vocabulary { trie, tokenizer: tokenizer.clone(), is_canonical })
}

/// What a token stands for in an output. Special tokens are marked: no text contains them.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) && !bytes.is_empty() {
        return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
    }
    bytes.to_vec()
}

/// Whether the ids of a piece of text are those it has in the middle of another. Vocabularies that put a space before
/// every text are not like that.
fn spelled_as_written(tokenizer: &Tokenizer) -> bool {
    let ids = tokenizer.encode("a");
    ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).eq(b"a")
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.tokenizer.encode(text))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_canonical
    }
}
