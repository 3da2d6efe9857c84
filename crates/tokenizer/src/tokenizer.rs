//! The tokenizer: a text's way through added tokens, normalization, splitting and merging, and the way back.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};

use rustc_hash::FxHashMap;
use sha2::{Digest, Sha256};

use crate::added::{AddedTokens, Finder, Part, Wanted};
use crate::bpe::{MergeTable, Merger};
use crate::cache::{self, WordCache};
use crate::index::Index;
use crate::normalize::normalize;
use crate::spec::{SPACE_MARK, Spec, Symbols};
use crate::split::Splitter;
use crate::stream::StreamDecoder;
use crate::{Error, GgufVocab, Result, gguf, gguf_write, hf, llama2c, write};

/// A token's number: its row in the model's embedding.
pub type TokenId = u32;

/// Caches that wait for the next call: one a thread that encodes at the same time. 32 × about 1 MiB.
const IDLE_SCRATCH_MAX: usize = 32;
/// Longer words are cut here, so that positions fit in 32 bits.
const WORD_BYTES_MAX: usize = 1 << 30;
/// No symbol: the character has neither a token nor a fallback.
const MISSING: TokenId = TokenId::MAX;

/// Text ↔ ids. Cheap to clone; all methods may be called from many threads at once.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    spec: Spec,
    merges: MergeTable,
    splitter: Splitter,
    /// Index = byte: its symbol, or [`MISSING`].
    byte_symbols: Box<[TokenId; 256]>,
    /// Symbols of characters; empty where symbols are bytes.
    char_symbols: FxHashMap<char, TokenId>,
    /// Tokens of the model by their bytes.
    by_bytes: Index,
    /// Pieces may also be cut before every `▁` that follows something else, because no token reaches across it.
    marks_start_words: bool,
    all_added: AddedTokens,
    plain_added: AddedTokens,
    /// Special tokens only: what a chat template may say and a message may not.
    special: Finder,
    is_special: Vec<bool>,
    /// What each token decodes to: `text[starts[id]..starts[id + 1]]`.
    decoded: Vec<u8>,
    decoded_starts: Vec<u32>,
    idle_scratch: Mutex<Vec<Scratch>>,
}

struct Scratch {
    cache: WordCache,
    merger: Merger,
}

impl Scratch {
    fn new() -> Scratch {
        Scratch { cache: WordCache::new(), merger: Merger::default() }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} ids)", self.vocab_size())
    }
}

/// Where tokenizers come from and go to.
impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json` (model BPE). Which token begins and ends a text is taken from its
    /// post-processor and from well-known names; see [`Tokenizer::from_json_with_config`].
    pub fn from_json(json: &[u8]) -> Result<Tokenizer> {
        Tokenizer::new(hf::read(json)?)
    }

    /// Reads `tokenizer.json` with the `tokenizer_config.json` beside it, which names `bos_token` and `eos_token`.
    pub fn from_json_with_config(json: &[u8], config: &[u8]) -> Result<Tokenizer> {
        let mut spec = hf::read(json)?;
        hf::apply_config(&mut spec, config)?;
        Tokenizer::new(spec)
    }

    /// Takes the vocabulary out of a GGUF file's metadata.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Tokenizer> {
        Tokenizer::new(gguf::read(vocab)?)
    }

    /// Reads llama2.c's `tokenizer.bin`, which does not say how many tokens it holds: `vocab`.
    pub fn from_llama2c(bytes: &[u8], vocab: usize) -> Result<Tokenizer> {
        Tokenizer::new(llama2c::read(bytes, vocab)?)
    }

    /// The same tokenizer as a `tokenizer.json` that Hugging Face `tokenizers` and `transformers` load.
    pub fn to_json(&self) -> String {
        write::tokenizer_json(&self.whole_spec())
    }

    /// The `tokenizer_config.json` that goes beside it.
    pub fn config_json(&self, chat_template: Option<&str>) -> String {
        write::config_json(&self.0.spec, chat_template)
    }

    /// The same tokenizer as the metadata of a GGUF file that llama.cpp loads.
    ///
    /// # Errors
    /// If it splits text in a way that llama.cpp has no name for.
    pub fn to_gguf(&self) -> Result<GgufVocab> {
        gguf_write::write(&self.whole_spec())
    }

    /// The same tokenizer with other beginning- and end-of-text tokens.
    pub fn with_bos_eos(&self, bos: Option<TokenId>, eos: Option<TokenId>) -> Result<Tokenizer> {
        let add_bos = self.add_bos() && bos.is_some();
        Tokenizer::new(Spec { bos, eos, add_bos, ..self.whole_spec() })
    }

    /// What it was made of.
    fn whole_spec(&self) -> Spec {
        let spec = &self.0.spec;
        Spec { merges: self.0.merges.listed(&spec.tokens), ..spec.clone() }
    }

    pub(crate) fn new(mut spec: Spec) -> Result<Tokenizer> {
        spec.check()?;
        spec.added.sort_by_key(|token| token.id);
        let mut is_special = vec![false; spec.tokens.len()];
        for token in &spec.added {
            is_special[token.id as usize] = token.special;
        }
        let by_bytes = Index::new(&spec, |id| {
            let token = spec.tokens.get(id as TokenId);
            token.in_model && !token.literal && !is_special[id]
        });
        let (decoded, decoded_starts) = decoded_tokens(&spec, &is_special)?;
        let (merges, marks_start_words) = (MergeTable::new(&spec.merges), marks_start_words(&spec));
        // The table has them from now on: half a million are 8 MB.
        spec.merges = Vec::new();
        Ok(Tokenizer(Arc::new(Inner {
            merges,
            splitter: Splitter::new(&spec.split)?,
            byte_symbols: byte_symbols(&spec, &by_bytes),
            char_symbols: char_symbols(&spec, &by_bytes),
            marks_start_words,
            all_added: AddedTokens::new(&spec.added, Wanted::All),
            plain_added: AddedTokens::new(&spec.added, Wanted::NotSpecial),
            special: Finder::new(spec.added.iter().filter(|token| token.special)),
            idle_scratch: Mutex::new(Vec::new()),
            by_bytes,
            is_special,
            decoded,
            decoded_starts,
            spec,
        })))
    }
}

/// Text to ids.
impl Tokenizer {
    /// Ids of `text`, in which special tokens are plain text. No beginning-of-text token is added.
    pub fn encode(&self, text: &str) -> Vec<TokenId> {
        self.0.encode(|inner, scratch, ids| inner.encode_text(text, true, &inner.plain_added, scratch, ids))
    }

    /// Ids of `text`, in which special tokens are recognised: only for text that no user wrote.
    pub fn encode_special(&self, text: &str) -> Vec<TokenId> {
        self.0.encode(|inner, scratch, ids| inner.encode_text(text, true, &inner.all_added, scratch, ids))
    }

    /// Appends the ids of a rendered chat, or of a part of one: special tokens are recognised, and `restore` turns the
    /// text between them back into what people wrote, in which they are not.
    pub(crate) fn encode_rendered(
        &self,
        rendered: &str,
        begins_text: bool,
        restore: impl Fn(&str) -> String,
        ids: &mut Vec<TokenId>,
    ) {
        ids.extend(self.0.encode(|inner, scratch, ids| {
            let mut is_first = begins_text;
            inner.special.split(rendered, |part| {
                match part {
                    Part::Token(id) => ids.push(id),
                    Part::Text(text) => {
                        inner.encode_text(&restore(text), is_first, &inner.plain_added, scratch, ids);
                    }
                }
                is_first = false;
            });
        }));
    }

    /// Special tokens only, for those who must tell them from text.
    pub(crate) fn special(&self) -> &Finder {
        &self.0.special
    }
}

/// Ids to text.
impl Tokenizer {
    /// The text of `ids` without special tokens. Bytes that are no UTF-8 become U+FFFD; unknown ids nothing.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        self.decode_where(ids, |id| !self.is_special(id))
    }

    /// The text of `ids` with special tokens spelled out: the inverse of [`Tokenizer::encode_special`].
    pub fn decode_special(&self, ids: &[TokenId]) -> String {
        self.decode_where(ids, |_| true)
    }

    /// Decodes ids as they come, without special tokens. Unlike [`Tokenizer::decode`] it never strips the space that a
    /// SentencePiece vocabulary puts before a text: what is streamed mostly goes on from a prompt.
    pub fn decoder(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone(), false)
    }

    /// Like [`Tokenizer::decoder`], with special tokens spelled out.
    pub fn decoder_special(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone(), true)
    }

    /// The bytes a token stands for: perhaps only a part of a character. Empty for unknown ids.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        let starts = &self.0.decoded_starts;
        match (starts.get(id as usize), starts.get(id as usize + 1)) {
            (Some(&start), Some(&end)) => &self.0.decoded[start as usize..end as usize],
            _ => &[],
        }
    }

    fn decode_where(&self, ids: &[TokenId], shown: impl Fn(TokenId) -> bool) -> String {
        let bytes: Vec<u8> = (ids.iter().filter(|&&id| shown(id)))
            .flat_map(|&id| self.token_bytes(id).iter().copied())
            .collect();
        let strip = self.0.spec.strip_leading_space && bytes.first() == Some(&b' ');
        String::from_utf8_lossy(&bytes[strip as usize..]).into_owned()
    }
}

/// Facts.
impl Tokenizer {
    /// Ids are `0..vocab_size()`.
    pub fn vocab_size(&self) -> usize {
        self.0.spec.tokens.len()
    }

    /// The added token with this content, or else the token that is exactly this text.
    pub fn id_of(&self, text: &str) -> Option<TokenId> {
        let added = self.0.spec.added.iter().find(|token| token.content == text);
        let marked = match self.0.spec.symbols {
            Symbols::Bytes => Cow::Borrowed(text),
            Symbols::Chars { .. } => Cow::Owned(text.replace(' ', SPACE_MARK)),
        };
        added.map(|token| token.id).or_else(|| self.0.by_bytes.get(&self.0.spec, marked.as_bytes()))
    }

    /// Whether `id` is a control token, which stands for no text.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.0.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// The token that begins a text, if the model knows one.
    pub fn bos(&self) -> Option<TokenId> {
        self.0.spec.bos
    }

    /// The token that ends a text or an answer, if the model knows one.
    pub fn eos(&self) -> Option<TokenId> {
        self.0.spec.eos
    }

    /// Whether prompts should start with [`Tokenizer::bos`].
    pub fn add_bos(&self) -> bool {
        self.0.spec.add_bos
    }

    /// SHA-256, in hex, of all that determines ids: two tokenizers with one fingerprint are interchangeable.
    pub fn fingerprint(&self) -> String {
        let spec = &self.0.spec;
        let mut hash = Sha256::new();
        for (id, token) in spec.tokens.iter().enumerate() {
            hash.update((token.bytes.len() as u64).to_le_bytes());
            hash.update(token.bytes);
            hash.update([token.literal as u8, token.in_model as u8, self.0.is_special[id] as u8]);
        }
        for merge in self.0.merges.listed(&spec.tokens) {
            for part in [merge.left, merge.right, merge.result, merge.rank] {
                hash.update(part.to_le_bytes());
            }
        }
        hash.update(write::rules_json(spec));
        hex::encode(hash.finalize())
    }
}

impl Inner {
    /// Lends `encode` the working memory of some earlier call.
    fn encode(&self, encode: impl FnOnce(&Inner, &mut Scratch, &mut Vec<TokenId>)) -> Vec<TokenId> {
        let idle = || self.idle_scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = idle().pop();
        let mut scratch = scratch.unwrap_or_else(Scratch::new);
        let mut ids = Vec::new();
        encode(self, &mut scratch, &mut ids);
        let mut idle = idle();
        if idle.len() < IDLE_SCRATCH_MAX {
            idle.push(scratch);
        }
        ids
    }

    fn encode_text(
        &self,
        text: &str,
        is_first: bool,
        added: &AddedTokens,
        scratch: &mut Scratch,
        ids: &mut Vec<TokenId>,
    ) {
        ids.reserve(text.len() / 4);
        let mut is_first = is_first;
        added.raw.split(text, |part| {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    let text = normalize(&self.spec.normalize, text);
                    added.normalized.split(&text, |part| {
                        match part {
                            Part::Token(id) => ids.push(id),
                            Part::Text(text) => self.splitter.split(text, is_first, |text, start, end| {
                                self.encode_piece(text.as_bytes(), start, end, scratch, ids);
                            }),
                        }
                        is_first = false;
                    });
                }
            }
            is_first = false;
        });
    }

    #[inline(always)]
    fn encode_piece(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        scratch: &mut Scratch,
        ids: &mut Vec<TokenId>,
    ) {
        if !self.marks_start_words {
            return self.encode_word(text, start, end, scratch, ids);
        }
        let mark = SPACE_MARK.as_bytes();
        let mut word = start;
        let mut at = start;
        while at < end {
            let is_mark = text[at..end].starts_with(mark);
            if is_mark && at > word && !text[word..at].ends_with(mark) {
                self.encode_word(text, word, at, scratch, ids);
                word = at;
            }
            at += if is_mark { mark.len() } else { 1 };
        }
        if word < end {
            self.encode_word(text, word, end, scratch, ids);
        }
    }

    #[inline(always)]
    fn encode_word(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        scratch: &mut Scratch,
        ids: &mut Vec<TokenId>,
    ) {
        if end - start > cache::WORD_BYTES_MAX {
            return self.merge_word(&text[start..end], &mut scratch.merger, ids);
        }
        let key = cache::key_of(text, start, end);
        if !scratch.cache.get(key, ids) {
            let before = ids.len();
            self.merge_word(&text[start..end], &mut scratch.merger, ids);
            scratch.cache.put(key, &ids[before..]);
        }
    }

    #[inline(never)]
    fn merge_word(&self, word: &[u8], merger: &mut Merger, ids: &mut Vec<TokenId>) {
        if self.spec.ignore_merges
            && let Some(id) = self.by_bytes.get(&self.spec, word)
        {
            return ids.push(id);
        }
        for word in word.chunks(WORD_BYTES_MAX) {
            merger.symbols.clear();
            match self.spec.symbols {
                Symbols::Bytes => {
                    for &byte in word {
                        self.push_symbol(self.byte_symbols[byte as usize], &mut merger.symbols);
                    }
                }
                Symbols::Chars { .. } => {
                    self.push_chars(&String::from_utf8_lossy(word), &mut merger.symbols);
                }
            }
            merger.merge(&self.merges);
            ids.extend_from_slice(&merger.symbols);
        }
    }

    fn push_chars(&self, word: &str, symbols: &mut Vec<TokenId>) {
        for c in word.chars() {
            if let Some(&symbol) = self.char_symbols.get(&c) {
                symbols.push(symbol);
                continue;
            }
            let mut buffer = [0; 4];
            let bytes = c.encode_utf8(&mut buffer).bytes().map(|byte| self.byte_symbols[byte as usize]);
            if bytes.clone().all(|symbol| symbol != MISSING) {
                symbols.extend(bytes);
            } else {
                self.push_symbol(MISSING, symbols);
            }
        }
    }

    /// What has no symbol becomes `unk`, or nothing if the vocabulary has none: as Hugging Face does it.
    fn push_symbol(&self, symbol: TokenId, symbols: &mut Vec<TokenId>) {
        if symbol != MISSING {
            symbols.push(symbol);
        } else if let Some(unk) = self.spec.unk
            && !(self.spec.fuse_unk && symbols.last() == Some(&unk))
        {
            symbols.push(unk);
        }
    }
}

fn byte_symbols(spec: &Spec, by_bytes: &Index) -> Box<[TokenId; 256]> {
    Box::new(std::array::from_fn(|byte| {
        let symbol = match spec.symbols {
            Symbols::Bytes => by_bytes.get(spec, &[byte as u8]),
            Symbols::Chars { byte_fallback: true } => {
                by_bytes.get(spec, format!("<0x{byte:02X}>").as_bytes())
            }
            Symbols::Chars { byte_fallback: false } => None,
        };
        symbol.unwrap_or(MISSING)
    }))
}

fn char_symbols(spec: &Spec, by_bytes: &Index) -> FxHashMap<char, TokenId> {
    if spec.symbols == Symbols::Bytes {
        return FxHashMap::default();
    }
    let only_char = |bytes: &[u8]| {
        let mut chars = std::str::from_utf8(bytes).ok()?.chars();
        chars.next().filter(|_| chars.next().is_none())
    };
    let char_of = |id: TokenId| only_char(spec.tokens.bytes(id));
    by_bytes.ids().filter_map(|id| Some((char_of(id)?, id))).collect()
}

/// Whether merging can be done word by word: no token has a `▁` after anything but a `▁`.
fn marks_start_words(spec: &Spec) -> bool {
    let crosses =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_start_matches(SPACE_MARK).contains(SPACE_MARK);
    spec.symbols != Symbols::Bytes
        && !spec.merges.iter().any(|merge| crosses(spec.tokens.bytes(merge.result)))
}

/// What each token decodes to, end to end, and where each starts.
fn decoded_tokens(spec: &Spec, is_special: &[bool]) -> Result<(Vec<u8>, Vec<u32>)> {
    let mut decoded = Vec::new();
    let mut starts = vec![0];
    for (id, token) in spec.tokens.iter().enumerate() {
        match spec.symbols {
            Symbols::Chars { byte_fallback } if !is_special[id] => {
                let text = String::from_utf8_lossy(token.bytes);
                match byte_token(&text) {
                    Some(byte) if byte_fallback => decoded.push(byte),
                    _ => decoded.extend_from_slice(text.replace(SPACE_MARK, " ").as_bytes()),
                }
            }
            _ => decoded.extend_from_slice(token.bytes),
        }
        let end = u32::try_from(decoded.len());
        starts.push(end.map_err(|_| Error::field("model.vocab", "holds more than 4 GiB of text"))?);
    }
    Ok((decoded, starts))
}

/// The byte that `<0xNN>` spells.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}
