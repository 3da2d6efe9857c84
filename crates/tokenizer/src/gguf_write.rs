//! A tokenizer as the metadata of a GGUF file: the inverse of `gguf.rs`.

use crate::gguf::normalize_of;
use crate::normalize::NormalizeStep;
use crate::scan;
use crate::spec::{SPACE_MARK, Spec, Symbols};
use crate::split::{PrependMark, SplitStep, gpt2, pattern_then_bytes};
use crate::tokenizer::TokenId;
use crate::{Error, GgufVocab, Result};

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

pub(crate) fn write(spec: &Spec) -> Result<GgufVocab> {
    let common = GgufVocab {
        tokens: (0..spec.tokens.len() as TokenId).map(|id| name(spec, id)).collect(),
        token_types: token_types(spec),
        bos: spec.bos,
        eos: spec.eos,
        unk: spec.unk,
        add_bos: Some(spec.add_bos),
        ..GgufVocab::default()
    };
    match spec.symbols {
        Symbols::Bytes => Ok(GgufVocab {
            model: "gpt2".to_owned(),
            pre: Some(pre_of(spec)?.to_owned()),
            merges: spec
                .merges
                .iter()
                .map(|m| format!("{} {}", name(spec, m.left), name(spec, m.right)))
                .collect(),
            ..common
        }),
        Symbols::Chars { byte_fallback: true } => Ok(GgufVocab {
            model: "llama".to_owned(),
            scores: scores(spec),
            add_space_prefix: Some(adds_space(spec)?),
            ..common
        }),
        Symbols::Chars { byte_fallback: false } => {
            Err(Error::unsupported("model.byte_fallback", "writing GGUF without it"))
        }
    }
}

/// An added token is spelled as it is, whatever the vocabulary's own spelling of it.
fn name(spec: &Spec, id: TokenId) -> String {
    let added = spec.added.iter().find(|token| token.id == id);
    added.map_or_else(|| spec.file_spelling(id), |token| token.content.clone())
}

fn token_types(spec: &Spec) -> Vec<i32> {
    let mut types = vec![NORMAL; spec.tokens.len()];
    if spec.symbols != Symbols::Bytes {
        for (token, kind) in spec.tokens.iter().zip(&mut types) {
            let is_byte = token.bytes.len() == 6 && token.bytes.starts_with(b"<0x");
            *kind = if is_byte { BYTE } else { NORMAL };
        }
    }
    for token in &spec.added {
        types[token.id as usize] = if token.special { CONTROL } else { USER_DEFINED };
    }
    if let Some(unk) = spec.unk.filter(|_| spec.symbols != Symbols::Bytes) {
        types[unk as usize] = UNKNOWN;
    }
    types
}

/// llama.cpp's name of a way to normalize and split, by asking which name gives it.
fn pre_of(spec: &Spec) -> Result<&'static str> {
    let digits = SplitStep::Digits { individual: true };
    let known: [(&str, Vec<SplitStep>); 4] = [
        ("gpt-2", vec![gpt2()]),
        ("smollm", vec![digits, gpt2()]),
        ("llama-bpe", pattern_then_bytes(scan::LLAMA3)),
        ("qwen2", pattern_then_bytes(scan::QWEN2)),
    ];
    let found = known.into_iter().find(|(_, steps)| *steps == spec.split);
    match found {
        Some((name, _)) if normalize_of(name) == spec.normalize => Ok(name),
        _ => Err(Error::unsupported("pre_tokenizer", "this way of splitting text, in a GGUF file,")),
    }
}

/// Scores under which merging the best neighbours first is merging in the order of the ranks.
fn scores(spec: &Spec) -> Vec<f32> {
    let mut scores = vec![0.0; spec.tokens.len()];
    for merge in spec.merges.iter().rev() {
        scores[merge.result as usize] = -(merge.rank as f32);
    }
    scores
}

/// Whether a text gets a space before it.
fn adds_space(spec: &Spec) -> Result<bool> {
    let prepends =
        spec.normalize.iter().any(|step| matches!(step, NormalizeStep::Prepend(text) if text == SPACE_MARK));
    let marks = spec.split.iter().map(|step| match step {
        SplitStep::Metaspace { prepend, .. } => Ok(*prepend != PrependMark::Never),
        _ => Err(Error::unsupported("pre_tokenizer", "this way of splitting text, in a GGUF file,")),
    });
    Ok(prepends || marks.collect::<Result<Vec<_>>>()?.contains(&true))
}
