//! [`WordPiece`]: BERT's tokenizer (Devlin et al. 2018), as embedding models have it. Text to ids only.
//!
//! A text is cleaned, CJK characters are set apart, accents and case are dropped; words are what lies between spaces and
//! punctuation, and every word is cut into the longest pieces the vocabulary has, from the left.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, ClassUnicode, HirKind};
use rustc_hash::FxHashMap;
use serde::Deserialize;
use serde_json::Value;
use unicode_normalization::UnicodeNormalization;

use crate::spec::{TOKEN_BYTES_MAX, VOCAB_MAX};
use crate::tokenizer::TokenId;
use crate::{Error, Result};

const FILE_BYTES_MAX: usize = 64 << 20;
/// Characters of a word; a longer one is unknown. Files may say less.
const WORD_CHARS_MAX: usize = 1000;

/// Text to ids with a beginning and an end. All methods may be called from many threads at once.
#[derive(Debug)]
pub struct WordPiece {
    /// Pieces that begin a word.
    first: FxHashMap<Box<str>, TokenId>,
    /// Pieces that go on with one, without their prefix.
    next: FxHashMap<Box<str>, TokenId>,
    /// Bytes of the longest piece.
    piece_bytes_max: usize,
    word_chars_max: usize,
    unknown: TokenId,
    begin: TokenId,
    end: TokenId,
    vocab_size: usize,
    normalizer: Normalizer,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: ModelFile,
}

#[derive(Deserialize)]
struct ModelFile {
    r#type: Option<String>,
    vocab: FxHashMap<String, u64>,
    unk_token: String,
    continuing_subword_prefix: String,
    max_input_chars_per_word: usize,
}

/// What happens to a text before it is split.
#[derive(Debug)]
struct Normalizer {
    clean: bool,
    set_cjk_apart: bool,
    strip_accents: bool,
    lowercase: bool,
}

impl WordPiece {
    /// Reads a Hugging Face `tokenizer.json` (model WordPiece, BERT's normalizer and pre-tokenizer).
    ///
    /// # Errors
    /// If it is another kind of tokenizer, or ids are missing, twice or too large.
    pub fn from_json(json: &[u8]) -> Result<WordPiece> {
        if json.len() > FILE_BYTES_MAX {
            let problem = format!("has {} bytes, more than {FILE_BYTES_MAX}", json.len());
            return Err(Error::field("tokenizer.json", problem));
        }
        let file: File = serde_json::from_slice(json).map_err(Error::ParseJson)?;
        let model = &file.model;
        if model.r#type.as_deref() != Some("WordPiece") {
            return Err(Error::unsupported("model.type", format!("{:?}", model.r#type)));
        }
        if file.pre_tokenizer["type"] != "BertPreTokenizer" {
            return Err(Error::unsupported("pre_tokenizer", file.pre_tokenizer["type"].to_string()));
        }
        let (begin, end) = template(&file.post_processor)?;
        let id = |field: &str, name: &str| known(model, field, name);
        let mut pieces = WordPiece {
            first: FxHashMap::default(),
            next: FxHashMap::default(),
            piece_bytes_max: 0,
            word_chars_max: model.max_input_chars_per_word.min(WORD_CHARS_MAX),
            unknown: id("model.unk_token", &model.unk_token)?,
            begin: id("post_processor.single", &begin)?,
            end: id("post_processor.single", &end)?,
            vocab_size: model.vocab.len(),
            normalizer: Normalizer::new(&file.normalizer)?,
        };
        pieces.add_vocab(model)?;
        Ok(pieces)
    }

    fn add_vocab(&mut self, model: &ModelFile) -> Result<()> {
        let n = model.vocab.len();
        if n > VOCAB_MAX {
            return Err(Error::field("model.vocab", format!("has {n} tokens, more than {VOCAB_MAX}")));
        }
        let mut seen = vec![false; n];
        for (name, id) in &model.vocab {
            match seen.get_mut(*id as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::field("model.vocab", format!("gives {name:?} the id {id}"))),
            }
            if name.len() > TOKEN_BYTES_MAX {
                let problem = format!("token {id} is longer than {TOKEN_BYTES_MAX} bytes");
                return Err(Error::field("model.vocab", problem));
            }
            let prefix = model.continuing_subword_prefix.as_str();
            let (pieces, piece) = match name.strip_prefix(prefix).filter(|rest| !rest.is_empty()) {
                Some(rest) if !prefix.is_empty() => (&mut self.next, rest),
                _ => (&mut self.first, name.as_str()),
            };
            self.piece_bytes_max = self.piece_bytes_max.max(piece.len());
            pieces.insert(piece.into(), *id as TokenId);
        }
        Ok(())
    }

    /// Ids of `text` between the ids that begin and end every text. Special tokens in it are plain text.
    pub fn encode(&self, text: &str) -> Vec<TokenId> {
        let mut ids = vec![self.begin];
        let text = self.normalizer.apply(text);
        for word in text.split(char::is_whitespace) {
            for part in word.split_inclusive(is_punctuation) {
                // A part ends with its punctuation, which is a word of its own.
                let at = part.char_indices().next_back().filter(|(_, c)| is_punctuation(*c));
                let (before, mark) = part.split_at(at.map_or(part.len(), |(at, _)| at));
                self.encode_word(before, &mut ids);
                self.encode_word(mark, &mut ids);
            }
        }
        ids.push(self.end);
        ids
    }

    /// Ids are `0..vocab_size()`.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn encode_word(&self, word: &str, ids: &mut Vec<TokenId>) {
        if word.is_empty() {
            return;
        }
        let n_before = ids.len();
        let mut rest = word;
        if word.chars().nth(self.word_chars_max).is_some() {
            return ids.push(self.unknown);
        }
        while !rest.is_empty() {
            let pieces = if rest.len() == word.len() { &self.first } else { &self.next };
            let Some((id, len)) = self.longest(pieces, rest) else {
                ids.truncate(n_before);
                return ids.push(self.unknown);
            };
            ids.push(id);
            rest = &rest[len..];
        }
    }

    /// The longest piece that `text` starts with, and its length.
    fn longest(&self, pieces: &FxHashMap<Box<str>, TokenId>, text: &str) -> Option<(TokenId, usize)> {
        let longest = text.len().min(self.piece_bytes_max);
        let ends = (1..=longest).rev().filter(|end| text.is_char_boundary(*end));
        ends.into_iter().find_map(|end| Some((*pieces.get(&text[..end])?, end)))
    }
}

fn known(model: &ModelFile, field: &str, name: &str) -> Result<TokenId> {
    let id = model.vocab.get(name).ok_or_else(|| Error::field(field, format!("{name:?} is no token")))?;
    TokenId::try_from(*id).map_err(|_| Error::field(field, format!("{name:?} has the id {id}")))
}

/// The tokens before and after a text.
fn template(value: &Value) -> Result<(String, String)> {
    let field = "post_processor";
    let name = |value: &Value| value.as_str().map(str::to_owned);
    let names = match value["type"].as_str() {
        Some("TemplateProcessing") => match value["single"].as_array().map(Vec::as_slice) {
            Some([begin, text, end]) if !text["Sequence"].is_null() => {
                name(&begin["SpecialToken"]["id"]).zip(name(&end["SpecialToken"]["id"]))
            }
            _ => None,
        },
        Some("BertProcessing") => name(&value["cls"][0]).zip(name(&value["sep"][0])),
        _ => return Err(Error::unsupported(field, value["type"].to_string())),
    };
    names.ok_or_else(|| Error::field(field, "does not put one token before and one after a text"))
}

impl Normalizer {
    fn new(value: &Value) -> Result<Normalizer> {
        if value["type"] != "BertNormalizer" {
            return Err(Error::unsupported("normalizer", value["type"].to_string()));
        }
        let flag = |name: &str| value[name].as_bool();
        let lowercase = flag("lowercase").unwrap_or(true);
        Ok(Normalizer {
            clean: flag("clean_text").unwrap_or(true),
            set_cjk_apart: flag("handle_chinese_chars").unwrap_or(true),
            strip_accents: flag("strip_accents").unwrap_or(lowercase),
            lowercase,
        })
    }

    fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            match c {
                '\0' | '\u{fffd}' if self.clean => {}
                '\t' | '\n' | '\r' if self.clean => out.push(' '),
                c if self.clean && has(&OTHER, c) => {}
                c if self.clean && c.is_whitespace() => out.push(' '),
                c if self.set_cjk_apart && is_cjk(c) => out.extend([' ', c, ' ']),
                c => out.push(c),
            }
        }
        if self.strip_accents {
            out = out.nfd().filter(|c| !has(&ACCENTS, *c)).collect();
        }
        if self.lowercase {
            out = out.chars().flat_map(char::to_lowercase).collect();
        }
        out
    }
}

/// The blocks that BERT's authors listed.
fn is_cjk(c: char) -> bool {
    matches!(u32::from(c),
        0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x20000..=0x2A6DF | 0x2A700..=0x2B73F | 0x2B740..=0x2B81F
        | 0x2B920..=0x2CEAF | 0xF900..=0xFAFF | 0x2F800..=0x2FA1F)
}

/// BERT counts all ASCII symbols as punctuation.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || (!c.is_ascii() && has(&PUNCTUATION, c))
}

static PUNCTUATION: LazyLock<ClassUnicode> = LazyLock::new(|| class(r"\p{P}"));
/// Marks that take no room of their own.
static ACCENTS: LazyLock<ClassUnicode> = LazyLock::new(|| class(r"\p{Mn}"));
/// Controls, formats, unassigned and private characters.
static OTHER: LazyLock<ClassUnicode> = LazyLock::new(|| class(r"\p{C}"));

fn class(pattern: &str) -> ClassUnicode {
    let hir = regex_syntax::parse(pattern).expect("the pattern is a constant of this file");
    match hir.into_kind() {
        HirKind::Class(Class::Unicode(class)) => class,
        _ => unreachable!("{pattern} is one class"),
    }
}

fn has(class: &ClassUnicode, c: char) -> bool {
    class
        .ranges()
        .binary_search_by(|range| {
            if range.end() < c {
                std::cmp::Ordering::Less
            } else if range.start() > c {
                std::cmp::Ordering::Greater
            } else {
                std::cmp::Ordering::Equal
            }
        })
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file() -> Value {
        json!({
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 7, "vocab": {
                "[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "un": 3, "##able": 4, "##a": 5, "able": 6, ",": 7, "[": 8,
                "]": 9, "cls": 10, "\u{4eac}": 11, "##ble": 12}}
        })
    }

    #[test]
    fn the_longest_piece_goes_first() {
        let tokenizer = WordPiece::from_json(file().to_string().as_bytes()).unwrap();
        for (text, ids) in [
            ("", &[][..]),
            (" UnAble,\u{a0}able ", &[3, 4, 7, 6]),
            ("una", &[3, 5]),
            ("unab", &[0]),
            ("\u{fc}n", &[3]),
            ("\u{4eac}able", &[11, 6]),
            ("[CLS]", &[8, 10, 9]),
            ("unablea", &[3, 4, 5]),
            ("unableaa", &[0]),
        ] {
            let expected = [&[1][..], ids, &[2]].concat();
            assert_eq!(tokenizer.encode(text), expected, "{text:?}");
        }
    }

    #[test]
    fn bad_files_are_refused_by_field() {
        for (pointer, bad, field) in [
            ("/model/type", json!("BPE"), "model.type"),
            ("/model/unk_token", json!("?"), "model.unk_token"),
            ("/model/vocab/un", json!(4), "model.vocab"),
            ("/model/vocab/un", json!(u64::MAX), "model.vocab"),
            ("/pre_tokenizer/type", json!("Whitespace"), "pre_tokenizer"),
            ("/normalizer", Value::Null, "normalizer"),
            ("/post_processor/single", json!([]), "post_processor"),
            ("/post_processor/type", json!("Roberta"), "post_processor"),
            ("/post_processor/single/0/SpecialToken/id", json!("[X]"), "post_processor"),
        ] {
            let mut value = file();
            *value.pointer_mut(pointer).unwrap() = bad;
            let error = WordPiece::from_json(value.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{pointer}: {error}");
        }
        for junk in [&b""[..], b"{}", b"[]", b"\xff"] {
            assert!(WordPiece::from_json(junk).is_err());
        }
    }
}
