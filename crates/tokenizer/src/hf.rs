//! Reading Hugging Face `tokenizer.json` (format 1.0, model BPE).
//!
//! Only what Llama-type models use is read; everything else is refused by name, because a tokenizer that is almost right
//! gives ids that are silently wrong.

use std::fmt;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::alphabet;
use crate::hf_rules::{self, DecoderFacts};
use crate::spec::{AddedToken, Merge, Spec, Symbols, Token, Tokens, VOCAB_MAX};
use crate::split::is_byte_level;
use crate::tokenizer::TokenId;
use crate::{Error, Result};

/// Gemma's, the largest in use, has 33 MB.
const FILE_BYTES_MAX: usize = 256 << 20;
const MERGES_MAX: usize = 4 << 20;

/// Names that end or begin a text in published vocabularies, for files that do not say it.
const EOS_NAMES: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"];
const BOS_NAMES: [&str; 4] = ["<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"];

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedFile>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: ModelFile,
}

#[derive(Deserialize)]
struct AddedFile {
    id: TokenId,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
struct ModelFile {
    r#type: Option<String>,
    vocab: Vocab,
    #[serde(default)]
    merges: Vec<MergeFile>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

/// `model.vocab` as it stands in the file, duplicates and all; `None` if it is a list, as Unigram models have it.
struct Vocab(Option<Vec<(String, u64)>>);

/// `"a b"` or `["a", "b"]`; `None` if it is neither.
struct MergeFile(Option<(String, String)>);

pub(crate) fn read(json: &[u8]) -> Result<Spec> {
    if json.len() > FILE_BYTES_MAX {
        let problem = format!("has {} bytes, more than {FILE_BYTES_MAX}", json.len());
        return Err(Error::field("tokenizer.json", problem));
    }
    let file: File = serde_json::from_slice(json).map_err(Error::ParseJson)?;
    let vocab = check_model(&file.model)?;
    let split = hf_rules::split_steps(&file.pre_tokenizer)?;
    let symbols = match is_byte_level(&split) {
        true => Symbols::Bytes,
        false => Symbols::Chars { byte_fallback: file.model.byte_fallback.unwrap_or(false) },
    };
    let DecoderFacts { strip_leading_space } = hf_rules::decoder_facts(&file.decoder)?;
    let mut spec = Spec {
        tokens: place_tokens(vocab, &file.added_tokens, symbols)?,
        symbols,
        merges: ranked_merges(vocab, &file.model.merges)?,
        fuse_unk: file.model.fuse_unk.unwrap_or(false),
        ignore_merges: file.model.ignore_merges.unwrap_or(false),
        added: file.added_tokens.into_iter().map(AddedFile::into_token).collect(),
        normalize: hf_rules::normalize_steps(&file.normalizer)?,
        split,
        strip_leading_space,
        ..Spec::default()
    };
    if let Some(unk) = &file.model.unk_token {
        let listed = vocab.iter().find(|(token, _)| token == unk).map(|(_, id)| *id as TokenId);
        let unk_id = listed.ok_or_else(|| Error::field("model.unk_token", format!("{unk:?} is no token")))?;
        spec.unk = Some(unk_id);
    }
    let template_bos = hf_rules::template_bos(&file.post_processor)?;
    spec.add_bos = template_bos.is_some();
    spec.bos = match template_bos {
        Some(name) => Some(added_id(&spec, "post_processor.single", &name)?),
        None => guess(&spec, &BOS_NAMES),
    };
    spec.eos = guess(&spec, &EOS_NAMES);
    Ok(spec)
}

/// Takes beginning- and end-of-text tokens from a `tokenizer_config.json`.
pub(crate) fn apply_config(spec: &mut Spec, json: &[u8]) -> Result<()> {
    let config: Value = serde_json::from_slice(json).map_err(Error::ParseJson)?;
    let name = |field: &str| {
        let value = &config[field];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    };
    if let Some(bos) = name("bos_token") {
        spec.bos = Some(added_id(spec, "tokenizer_config.bos_token", &bos)?);
    }
    if let Some(eos) = name("eos_token") {
        spec.eos = Some(added_id(spec, "tokenizer_config.eos_token", &eos)?);
    }
    if let Some(add_bos) = config["add_bos_token"].as_bool() {
        spec.add_bos = add_bos && spec.bos.is_some();
    }
    Ok(())
}

fn check_model(model: &ModelFile) -> Result<&[(String, u64)]> {
    if let Some(kind) = model.r#type.as_deref().filter(|&kind| kind != "BPE") {
        return Err(Error::unsupported("model.type", format!("{kind:?}")));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err(Error::unsupported("model", "a subword prefix or suffix"));
    }
    let Vocab(Some(vocab)) = &model.vocab else {
        return Err(Error::unsupported("model.vocab", "a list (Unigram)"));
    };
    if model.merges.len() > MERGES_MAX {
        return Err(Error::field("model.merges", format!("has more than {MERGES_MAX} merges")));
    }
    Ok(vocab)
}

impl AddedFile {
    fn into_token(self) -> AddedToken {
        let AddedFile { id, content, special, lstrip, rstrip, single_word, normalized } = self;
        AddedToken { id, content, special, lstrip, rstrip, single_word, normalized }
    }
}

/// Every token at its id, from the vocabulary and the added tokens: each id once, none left out.
fn place_tokens(vocab: &[(String, u64)], added: &[AddedFile], symbols: Symbols) -> Result<Tokens> {
    let n_max = vocab.len() + added.len();
    let mut places: Vec<Option<Token>> = Vec::new();
    places.resize_with(n_max, || None);
    let mut names = FxHashSet::default();
    for (name, id) in vocab {
        if !names.insert(name.as_str()) {
            return Err(Error::field("model.vocab", format!("lists {name:?} twice")));
        }
        let Some(place) = places.get_mut(*id as usize).filter(|_| *id < VOCAB_MAX as u64) else {
            return Err(Error::field(
                "model.vocab",
                format!("gives {name:?} the id {id}, but ids have no holes"),
            ));
        };
        if place.is_some() {
            return Err(Error::field("model.vocab", format!("gives the id {id} twice, once to {name:?}")));
        }
        *place = Some(model_token(name, symbols));
    }
    let ids: FxHashMap<&str, u64> = vocab.iter().map(|(name, id)| (name.as_str(), *id)).collect();
    let mut contents = FxHashSet::default();
    for (i, token) in added.iter().enumerate() {
        let problem = |problem: String| Err(Error::field(format!("added_tokens[{i}]"), problem));
        if !contents.insert(token.content.as_str()) {
            return problem(format!("lists {:?} twice", token.content));
        }
        match (ids.get(token.content.as_str()), places.get_mut(token.id as usize)) {
            (Some(&id), _) if id == token.id as u64 => {}
            (Some(id), _) => return problem(format!("gives {:?} another id than its {id}", token.content)),
            (None, Some(place @ None)) => {
                let bytes = token.content.as_bytes().into();
                *place = Some(Token { bytes, literal: true, in_model: false });
            }
            (None, Some(Some(_))) => return problem(format!("gives the id {} to a second token", token.id)),
            (None, None) => return problem(format!("has the id {}, but ids have no holes", token.id)),
        }
    }
    let n = places.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
    places.truncate(n);
    let hole = |id: usize| Error::field("model.vocab", format!("has no token for the id {id}"));
    places.into_iter().enumerate().map(|(id, place)| place.ok_or_else(|| hole(id))).collect()
}

fn model_token(name: &str, symbols: Symbols) -> Token {
    let bytes =
        if symbols == Symbols::Bytes { alphabet::unspell(name) } else { Some(name.as_bytes().into()) };
    match bytes {
        Some(bytes) => Token { bytes, literal: false, in_model: true },
        // Hugging Face decodes such a token to its own spelling, and no merge of bytes can make it.
        None => Token { bytes: name.as_bytes().into(), literal: true, in_model: true },
    }
}

fn ranked_merges(vocab: &[(String, u64)], merges: &[MergeFile]) -> Result<Vec<Merge>> {
    let ids: FxHashMap<&str, TokenId> =
        vocab.iter().map(|(name, id)| (name.as_str(), *id as TokenId)).collect();
    let mut ranked = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let field = || format!("model.merges[{rank}]");
        let Some((left, right)) = &merge.0 else {
            return Err(Error::field(field(), "is neither \"a b\" nor [\"a\", \"b\"]"));
        };
        let id = |name: &str| {
            let missing = || Error::field(field(), format!("needs {name:?}, which is not in the vocabulary"));
            ids.get(name).copied().ok_or_else(missing)
        };
        let result = id(&format!("{left}{right}"))?;
        ranked.push(Merge { left: id(left)?, right: id(right)?, result, rank: rank as u32 });
    }
    Ok(ranked)
}

fn added_id(spec: &Spec, field: &str, name: &str) -> Result<TokenId> {
    let token = spec.added.iter().find(|token| token.content == name);
    token
        .map(|token| token.id)
        .ok_or_else(|| Error::field(field, format!("{name:?} is not among the added tokens")))
}

fn guess(spec: &Spec, names: &[&str]) -> Option<TokenId> {
    let known = |name: &&str| spec.added.iter().find(|token| token.special && token.content == **name);
    names.iter().find_map(known).map(|token| token.id)
}

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vocab, D::Error> {
        struct VocabVisitor;
        impl<'de> Visitor<'de> for VocabVisitor {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "model.vocab: a map from token to id")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(Some(entries)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vocab, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab(None))
            }
        }
        deserializer.deserialize_any(VocabVisitor)
    }
}

impl<'de> Deserialize<'de> for MergeFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<MergeFile, D::Error> {
        struct MergeVisitor;
        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = MergeFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "model.merges: \"a b\" or [\"a\", \"b\"]")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<MergeFile, E> {
                let pair = text.split_once(' ').filter(|(_, right)| !right.contains(' '));
                Ok(MergeFile(pair.map(|(left, right)| (left.to_owned(), right.to_owned()))))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<MergeFile, A::Error> {
                let pair = (seq.next_element::<String>()?, seq.next_element::<String>()?);
                let is_pair = seq.next_element::<IgnoredAny>()?.is_none();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(MergeFile(match pair {
                    (Some(left), Some(right)) if is_pair => Some((left, right)),
                    _ => None,
                }))
            }
        }
        deserializer.deserialize_any(MergeVisitor)
    }
}
