//! Vocabularies as GGUF files carry them in their metadata (ggml, `docs/gguf.md`, section "Tokenizer").

use rustc_hash::FxHashMap;

use crate::alphabet;
use crate::normalize::NormalizeStep;
use crate::scan;
use crate::sentencepiece;
use crate::spec::{AddedToken, Merge, SPACE_MARK, Spec, Symbols, Token, Tokens};
use crate::split::{SplitStep, gpt2, pattern_then_bytes};
use crate::tokenizer::TokenId;
use crate::{Error, Result};

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The `tokenizer.ggml.*` fields of a GGUF file; what a file lacks is empty or `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// `gpt2` (byte-level) or `llama` (SentencePiece with scores).
    pub model: String,
    /// Which split pattern; only for `gpt2`.
    pub pre: Option<String>,
    /// By id.
    pub tokens: Vec<String>,
    /// One a token; only for `llama`.
    pub scores: Vec<f32>,
    /// One a token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `"a b"`, in order of rank; only for `gpt2`.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<TokenId>,
    /// Ends a text.
    pub eos: Option<TokenId>,
    /// Stands for what is not in the vocabulary.
    pub unk: Option<TokenId>,
    /// Whether `bos` is put before every text.
    pub add_bos: Option<bool>,
    /// Whether a space is put before every text.
    pub add_space_prefix: Option<bool>,
}

pub(crate) fn read(vocab: &GgufVocab) -> Result<Spec> {
    let n = vocab.tokens.len();
    if !vocab.token_types.is_empty() && vocab.token_types.len() != n {
        let problem = format!("has {} entries for {n} tokens", vocab.token_types.len());
        return Err(Error::field("tokenizer.ggml.token_type", problem));
    }
    match vocab.model.as_str() {
        "gpt2" => byte_level(vocab),
        "llama" => scored(vocab),
        other => Err(Error::unsupported("tokenizer.ggml.model", format!("{other:?}"))),
    }
}

fn byte_level(vocab: &GgufVocab) -> Result<Spec> {
    let pre = vocab.pre.as_deref().unwrap_or("gpt-2");
    let is_llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let tokens = (vocab.tokens.iter().enumerate())
        .map(|(id, name)| {
            let plain = if type_of(vocab, id) == NORMAL { alphabet::unspell(name) } else { None };
            let literal = plain.is_none();
            Token { bytes: plain.unwrap_or_else(|| name.as_bytes().into()), literal, in_model: true }
        })
        .collect();
    let mut spec = Spec {
        tokens,
        symbols: Symbols::Bytes,
        merges: ranked_merges(vocab)?,
        ignore_merges: is_llama3,
        normalize: normalize_of(pre),
        split: split_of(pre)?,
        add_bos: vocab.add_bos.unwrap_or(is_llama3),
        ..Spec::default()
    };
    finish(&mut spec, vocab);
    Ok(spec)
}

/// llama.cpp's names of the split patterns we know.
fn split_of(pre: &str) -> Result<Vec<SplitStep>> {
    match pre {
        "gpt-2" | "mpt" | "olmo" | "jais" | "phi-2" => Ok(vec![gpt2()]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            Ok(vec![SplitStep::Digits { individual: true }, gpt2()])
        }
        "llama-bpe" | "llama3" | "llama-v3" => Ok(pattern_then_bytes(scan::LLAMA3)),
        "qwen2" => Ok(pattern_then_bytes(scan::QWEN2)),
        other => Err(Error::unsupported("tokenizer.ggml.pre", format!("{other:?}"))),
    }
}

/// Qwen's models were trained on composed characters (`é` as one), which their `tokenizer.json` says and GGUF leaves out.
pub(crate) fn normalize_of(pre: &str) -> Vec<NormalizeStep> {
    if pre == "qwen2" { vec![NormalizeStep::Nfc] } else { Vec::new() }
}

fn ranked_merges(vocab: &GgufVocab) -> Result<Vec<Merge>> {
    let mut ids = FxHashMap::default();
    for (id, name) in vocab.tokens.iter().enumerate() {
        if let Some(first) = ids.insert(name.as_str(), id as TokenId) {
            let problem = format!("holds {name:?} twice, as {first} and {id}");
            return Err(Error::field("tokenizer.ggml.tokens", problem));
        }
    }
    let mut merges = Vec::with_capacity(vocab.merges.len());
    for (rank, merge) in vocab.merges.iter().enumerate() {
        let field = || format!("tokenizer.ggml.merges[{rank}]");
        // A token may be spelled with a leading space in old files: the separator is the first one after it.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let (left, right) = at
            .map(|at| (&merge[..at], &merge[at + 1..]))
            .ok_or_else(|| Error::field(field(), "is not two tokens"))?;
        let id = |name: &str| {
            let missing = || Error::field(field(), format!("needs {name:?}, which is no token"));
            ids.get(name).copied().ok_or_else(missing)
        };
        let result = id(&format!("{left}{right}"))?;
        merges.push(Merge { left: id(left)?, right: id(right)?, result, rank: rank as u32 });
    }
    Ok(merges)
}

fn scored(vocab: &GgufVocab) -> Result<Spec> {
    if vocab.scores.len() != vocab.tokens.len() {
        let problem = format!("has {} entries for {} tokens", vocab.scores.len(), vocab.tokens.len());
        return Err(Error::field("tokenizer.ggml.scores", problem));
    }
    let tokens: Tokens = (vocab.tokens.iter())
        .map(|name| Token { bytes: name.as_bytes().into(), literal: false, in_model: true })
        .collect();
    let merges = sentencepiece::merges_by_score(&tokens, &vocab.scores, |id| {
        matches!(type_of(vocab, id), NORMAL | USER_DEFINED)
    })?;
    let add_space_prefix = vocab.add_space_prefix.unwrap_or(true);
    let mut normalize = vec![NormalizeStep::Replace { from: " ".into(), to: SPACE_MARK.into() }];
    if add_space_prefix {
        normalize.insert(0, NormalizeStep::Prepend(SPACE_MARK.into()));
    }
    let mut spec = Spec {
        tokens,
        symbols: Symbols::Chars { byte_fallback: true },
        merges,
        unk: vocab.unk,
        fuse_unk: true,
        normalize,
        strip_leading_space: add_space_prefix,
        add_bos: vocab.add_bos.unwrap_or(true),
        ..Spec::default()
    };
    finish(&mut spec, vocab);
    Ok(spec)
}

fn finish(spec: &mut Spec, vocab: &GgufVocab) {
    spec.bos = vocab.bos;
    spec.eos = vocab.eos;
    spec.add_bos &= vocab.bos.is_some();
    for (id, name) in vocab.tokens.iter().enumerate() {
        let special = type_of(vocab, id) == CONTROL;
        if !name.is_empty() && (special || type_of(vocab, id) == USER_DEFINED) {
            spec.added.push(AddedToken { special, ..AddedToken::special(id as TokenId, name) });
        }
    }
}

fn type_of(vocab: &GgufVocab, id: usize) -> i32 {
    vocab.token_types.get(id).copied().unwrap_or(NORMAL)
}
