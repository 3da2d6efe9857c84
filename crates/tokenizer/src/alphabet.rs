//! GPT-2's spelling of bytes as printable characters, which `tokenizer.json` and GGUF files use.
//!
//! Bytes that print in Latin-1 stand for themselves; the other 68 take the characters from U+0100 on, in order
//! (openai/gpt-2, `encoder.py`, `bytes_to_unicode`).

use std::sync::LazyLock;

static SPELLING: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            return byte as char;
        }
        let spelled = char::from_u32(next).unwrap_or('\u{FFFD}');
        next += 1;
        spelled
    })
});

/// Code point − 0 → byte + 1, or 0: the inverse for the 0x144 characters in use.
static BYTE_OF: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let mut inverse = vec![0u16; 0x144];
    for (byte, &c) in SPELLING.iter().enumerate() {
        inverse[c as usize] = byte as u16 + 1;
    }
    inverse
});

pub(crate) fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| SPELLING[b as usize]).collect()
}

/// The bytes that `text` spells, or `None` where it holds a character that spells none.
pub(crate) fn unspell(text: &str) -> Option<Box<[u8]>> {
    text.chars().map(byte_of).collect()
}

/// All bytes, sorted by the character that spells them: the order in which Hugging Face numbers them.
pub(crate) fn bytes_in_spelling_order() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.sort_by_key(|&b| SPELLING[b as usize]);
    bytes
}

fn byte_of(c: char) -> Option<u8> {
    let entry = *BYTE_OF.get(c as usize)?;
    entry.checked_sub(1).map(|byte| byte as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spelling_is_gpt2s() {
        // Documented by GPT-2's own vocabulary: space is Ġ, newline Ċ, tab ĉ, and a no-break space ł.
        assert_eq!(spell(b" \n\t\xA0a"), "\u{120}\u{10A}\u{109}\u{142}a");
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unspell(&spell(&all)).as_deref(), Some(&all[..]));
        assert_eq!(unspell("\u{2581}"), None);
        assert_eq!(bytes_in_spelling_order()[..2], *b"!\"");
    }
}
