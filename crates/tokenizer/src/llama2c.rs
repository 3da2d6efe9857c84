//! llama2.c's `tokenizer.bin` (karpathy/llama2.c, `tokenizer.py`, `export`): little-endian, an i32 with the longest
//! token's bytes, then for each token an f32 score, an i32 length and the bytes, in which spaces are spaces.

use crate::normalize::NormalizeStep;
use crate::sentencepiece;
use crate::spec::{AddedToken, SPACE_MARK, Spec, Symbols, TOKEN_BYTES_MAX, Token, Tokens, VOCAB_MAX};
use crate::{Error, Result};

/// Ids 0, 1 and 2 in every such file; the 256 byte tokens follow.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
const FIRST_TEXT_ID: usize = SPECIAL.len() + 256;

pub(crate) fn read(bytes: &[u8], vocab: usize) -> Result<Spec> {
    if !(FIRST_TEXT_ID..=VOCAB_MAX).contains(&vocab) {
        return Err(Error::Llama2c(format!("{vocab} is no possible number of tokens")));
    }
    let mut rest = bytes;
    take(&mut rest, 4, "the longest token's length")?;
    let mut tokens = Tokens::default();
    let mut scores = Vec::new();
    for id in 0..vocab {
        let score = take(&mut rest, 4, &format!("token {id}'s score"))?;
        let len = take(&mut rest, 4, &format!("token {id}'s length"))?;
        let len = u32::from_le_bytes(le(len)) as usize;
        if len > TOKEN_BYTES_MAX {
            return Err(Error::Llama2c(format!(
                "token {id} claims {len} bytes, more than {TOKEN_BYTES_MAX}"
            )));
        }
        let text = take(&mut rest, len, &format!("token {id}"))?;
        let text =
            std::str::from_utf8(text).map_err(|_| Error::Llama2c(format!("token {id} is no UTF-8")))?;
        scores.push(f32::from_le_bytes(le(score)));
        tokens.push(Token { bytes: spelling(id, text).into_bytes().into(), literal: false, in_model: true });
    }
    let merges = sentencepiece::merges_by_score(&tokens, &scores, |id| id >= FIRST_TEXT_ID)?;
    Ok(Spec {
        tokens,
        symbols: Symbols::Chars { byte_fallback: true },
        merges,
        unk: Some(0),
        fuse_unk: true,
        added: (0..).zip(SPECIAL).map(|(id, name)| AddedToken::special(id, name)).collect(),
        normalize: vec![
            NormalizeStep::Prepend(SPACE_MARK.into()),
            NormalizeStep::Replace { from: " ".into(), to: SPACE_MARK.into() },
        ],
        strip_leading_space: true,
        bos: Some(1),
        eos: Some(2),
        add_bos: true,
        ..Spec::default()
    })
}

fn spelling(id: usize, text: &str) -> String {
    match id {
        0..3 => SPECIAL[id].to_owned(),
        3..FIRST_TEXT_ID => format!("<0x{:02X}>", id - SPECIAL.len()),
        _ => text.replace(' ', SPACE_MARK),
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize, what: &str) -> Result<&'a [u8]> {
    let (taken, after) =
        rest.split_at_checked(n).ok_or_else(|| Error::Llama2c(format!("the file ends before {what}")))?;
    *rest = after;
    Ok(taken)
}

fn le(bytes: &[u8]) -> [u8; 4] {
    std::array::from_fn(|i| bytes[i])
}
