//! What a tokenizer is, as plain data: every loader produces a [`Spec`], the writer and the fingerprint read it,
//! [`crate::Tokenizer`] compiles it.

use crate::alphabet;
use crate::normalize::NormalizeStep;
use crate::split::SplitStep;
use crate::tokenizer::TokenId;
use crate::{Error, Result};

/// Ids a vocabulary may have. The largest published ones have 262,144; each costs us about 100 bytes.
pub(crate) const VOCAB_MAX: usize = 1 << 21;
/// Bytes one token may have. The longest published ones are runs of a few hundred spaces or dashes.
pub(crate) const TOKEN_BYTES_MAX: usize = 4096;
/// SentencePiece's stand-in for a space.
pub(crate) const SPACE_MARK: &str = "\u{2581}";

/// A whole tokenizer, unchecked until [`Spec::check`] accepts it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    /// Index = id; no holes.
    pub(crate) tokens: Tokens,
    pub(crate) symbols: Symbols,
    /// Sorted by rank. Empty in a tokenizer that is ready: there a table has them.
    pub(crate) merges: Vec<Merge>,
    pub(crate) unk: Option<TokenId>,
    /// Consecutive unknown symbols become one `unk`.
    pub(crate) fuse_unk: bool,
    /// A piece that is a token as a whole is taken without merging (Llama 3).
    pub(crate) ignore_merges: bool,
    pub(crate) added: Vec<AddedToken>,
    pub(crate) normalize: Vec<NormalizeStep>,
    pub(crate) split: Vec<SplitStep>,
    /// A decoded text loses one leading space, the one that encoding put there.
    pub(crate) strip_leading_space: bool,
    pub(crate) bos: Option<TokenId>,
    pub(crate) eos: Option<TokenId>,
    pub(crate) add_bos: bool,
}

/// What merging starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Symbols {
    /// Bytes (GPT-2 and everything after it).
    #[default]
    Bytes,
    /// Characters (SentencePiece); those without a token become `<0xNN>` tokens, one a byte, where that is asked for.
    Chars { byte_fallback: bool },
}

#[derive(Debug, Clone)]
pub(crate) struct Token {
    /// Raw bytes where symbols are bytes; UTF-8 with `▁` for spaces where they are characters.
    pub(crate) bytes: Box<[u8]>,
    /// The file's spelling is the text itself and not GPT-2's spelling of bytes.
    pub(crate) literal: bool,
    /// Listed in `model.vocab`, not only in `added_tokens`.
    pub(crate) in_model: bool,
}

/// Tokens by their ids, the bytes of all end to end: each in memory of its own they would take three times as much.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tokens {
    bytes: Vec<u8>,
    /// Where each token's bytes end, and what else is known of it.
    ends: Vec<(u32, Marks)>,
}

/// A token without its bytes.
#[derive(Debug, Clone, Copy)]
struct Marks {
    literal: bool,
    in_model: bool,
}

/// As [`Token`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenRef<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) literal: bool,
    pub(crate) in_model: bool,
}

impl Tokens {
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn push(&mut self, token: Token) {
        self.bytes.extend_from_slice(&token.bytes);
        // More than that `Spec::check` refuses.
        let end = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.ends.push((end, Marks { literal: token.literal, in_model: token.in_model }));
    }

    /// # Panics
    /// If there is no such token.
    pub(crate) fn get(&self, id: TokenId) -> TokenRef<'_> {
        let (end, Marks { literal, in_model }) = self.ends[id as usize];
        TokenRef { bytes: &self.bytes[self.start(id)..end as usize], literal, in_model }
    }

    /// # Panics
    /// If there is no such token.
    pub(crate) fn bytes(&self, id: TokenId) -> &[u8] {
        self.get(id).bytes
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = TokenRef<'_>> {
        (0..self.ends.len() as TokenId).map(|id| self.get(id))
    }

    fn start(&self, id: TokenId) -> usize {
        (id as usize).checked_sub(1).map_or(0, |before| self.ends[before].0 as usize)
    }
}

impl FromIterator<Token> for Tokens {
    fn from_iter<I: IntoIterator<Item = Token>>(all: I) -> Tokens {
        let mut tokens = Tokens::default();
        all.into_iter().for_each(|token| tokens.push(token));
        tokens.bytes.shrink_to_fit();
        tokens.ends.shrink_to_fit();
        tokens
    }
}

/// `left` followed by `right` becomes `result`; a lower rank goes first, and of equal ranks the leftmost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) left: TokenId,
    pub(crate) right: TokenId,
    pub(crate) result: TokenId,
    pub(crate) rank: u32,
}

/// A token that is found in the text before any merging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub(crate) id: TokenId,
    pub(crate) content: String,
    /// Control tokens: never made from user text, not shown when decoding.
    pub(crate) special: bool,
    /// Swallows the white space before it.
    pub(crate) lstrip: bool,
    /// Swallows the white space after it.
    pub(crate) rstrip: bool,
    /// Only where it does not touch a letter, digit or underscore.
    pub(crate) single_word: bool,
    /// Searched for in the normalized text instead of the raw text.
    pub(crate) normalized: bool,
}

impl AddedToken {
    pub(crate) fn special(id: TokenId, content: impl Into<String>) -> AddedToken {
        AddedToken {
            id,
            content: content.into(),
            special: true,
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized: false,
        }
    }
}

impl Spec {
    /// Refuses what would make encoding panic, loop or grow without bound; loaders check what only they can name.
    pub(crate) fn check(&self) -> Result<()> {
        let n = self.tokens.len();
        if n == 0 {
            return Err(Error::field("model.vocab", "is empty"));
        }
        if n > VOCAB_MAX {
            return Err(Error::field("model.vocab", format!("has {n} tokens, more than {VOCAB_MAX}")));
        }
        if u32::try_from(self.tokens.bytes.len()).is_err() {
            return Err(Error::field("model.vocab", "holds more than 4 GiB of text"));
        }
        if let Some(id) = self.tokens.iter().position(|t| t.bytes.len() > TOKEN_BYTES_MAX) {
            let problem = format!("token {id} is longer than {TOKEN_BYTES_MAX} bytes");
            return Err(Error::field("model.vocab", problem));
        }
        for (name, id) in [("bos", self.bos), ("eos", self.eos), ("model.unk_token", self.unk)] {
            check_id(name, id, n)?;
        }
        for (i, added) in self.added.iter().enumerate() {
            check_id(&format!("added_tokens[{i}].id"), Some(added.id), n)?;
            if added.content.is_empty() || added.content.len() > TOKEN_BYTES_MAX {
                let problem = format!("has {} bytes, not 1 to {TOKEN_BYTES_MAX}", added.content.len());
                return Err(Error::field(format!("added_tokens[{i}].content"), problem));
            }
        }
        self.check_merges()
    }

    /// Every merge must join two tokens into the token that spells both: so each step shortens the word, and a cycle
    /// is impossible.
    fn check_merges(&self) -> Result<()> {
        for (i, merge) in self.merges.iter().enumerate() {
            let field = || format!("model.merges[{i}]");
            for id in [merge.left, merge.right, merge.result] {
                check_id(&field(), Some(id), self.tokens.len())?;
            }
            let [left, right, result] =
                [merge.left, merge.right, merge.result].map(|id| self.tokens.bytes(id));
            let spells = result.len() == left.len() + right.len()
                && result.starts_with(left)
                && result.ends_with(right);
            if left.is_empty() || right.is_empty() || !spells {
                return Err(Error::field(
                    field(),
                    "does not join two tokens into the token that spells both",
                ));
            }
        }
        Ok(())
    }

    /// How `tokenizer.json` spells token `id`.
    pub(crate) fn file_spelling(&self, id: TokenId) -> String {
        let token = self.tokens.get(id);
        match self.symbols {
            Symbols::Bytes if !token.literal => alphabet::spell(token.bytes),
            _ => String::from_utf8_lossy(token.bytes).into_owned(),
        }
    }
}

fn check_id(field: &str, id: Option<TokenId>, n_tokens: usize) -> Result<()> {
    match id {
        Some(id) if id as usize >= n_tokens => {
            Err(Error::field(field, format!("id {id} is not in the vocabulary of {n_tokens}")))
        }
        _ => Ok(()),
    }
}
