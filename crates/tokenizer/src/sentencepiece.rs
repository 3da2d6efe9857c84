//! SentencePiece's BPE: any two neighbours may merge whose joint spelling is a token, the token with the highest score
//! first. Written as a list of ranked merges, it is merged like all others.

use std::cmp::Ordering;

use rustc_hash::FxHashMap;

use crate::spec::{Merge, Tokens};
use crate::tokenizer::TokenId;
use crate::{Error, Result};

/// SentencePiece itself makes none longer than 16 characters unless told so.
const PIECE_BYTES_MAX: usize = 512;
/// A vocabulary of 256,000 has about 3 million.
const SPLITS_MAX: usize = 1 << 26;

/// All ways to make a token out of two; those of one score share a rank, so that the leftmost goes first.
pub(crate) fn merges_by_score(
    tokens: &Tokens,
    scores: &[f32],
    is_text: impl Fn(usize) -> bool,
) -> Result<Vec<Merge>> {
    let mut ids: FxHashMap<&[u8], TokenId> = FxHashMap::default();
    let mut n_splits = 0;
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| is_text(*id)) {
        if token.bytes.len() > PIECE_BYTES_MAX {
            return Err(Error::field("tokens", format!("{id} is longer than {PIECE_BYTES_MAX} bytes")));
        }
        if scores[id].is_nan() {
            return Err(Error::field("scores", format!("{id} is not a number")));
        }
        n_splits += token.bytes.len();
        if let Some(first) = ids.insert(token.bytes, id as TokenId) {
            return Err(Error::field("tokens", format!("{first} and {id} are the same")));
        }
    }
    if n_splits > SPLITS_MAX {
        return Err(Error::field("tokens", format!("hold more than {SPLITS_MAX} bytes")));
    }
    let mut order: Vec<TokenId> = ids.values().copied().collect();
    order.sort_by(|&a, &b| by_score(scores, a, b).then(a.cmp(&b)));
    let mut merges = Vec::new();
    let mut rank = 0;
    for (i, &result) in order.iter().enumerate() {
        if i > 0 && by_score(scores, order[i - 1], result) != Ordering::Equal {
            rank += 1;
        }
        let bytes = tokens.bytes(result);
        for cut in 1..bytes.len() {
            if let (Some(&left), Some(&right)) = (ids.get(&bytes[..cut]), ids.get(&bytes[cut..])) {
                merges.push(Merge { left, right, result, rank });
            }
        }
    }
    // They stay as long as the tokenizer.
    merges.shrink_to_fit();
    Ok(merges)
}

fn by_score(scores: &[f32], a: TokenId, b: TokenId) -> Ordering {
    scores[b as usize].total_cmp(&scores[a as usize])
}
