//! Turning ids back into text while they arrive.

use crate::tokenizer::{TokenId, Tokenizer};

/// Decodes ids one at a time. What it has returned never changes: a character whose bytes have not all come yet is held
/// back, and bytes that can no longer become a character turn into U+FFFD, as `String::from_utf8_lossy` would do it.
#[derive(Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    show_special: bool,
    /// The beginning of a character: at most 3 bytes.
    pending: Vec<u8>,
}

impl StreamDecoder {
    pub(crate) fn new(tokenizer: Tokenizer, show_special: bool) -> StreamDecoder {
        StreamDecoder { tokenizer, show_special, pending: Vec::new() }
    }

    /// The text that is certain once `id` has come; empty for special tokens and in the middle of a character.
    pub fn push(&mut self, id: TokenId) -> String {
        if !self.show_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        self.pending.extend_from_slice(self.tokenizer.token_bytes(id));
        take_certain(&mut self.pending)
    }

    /// What was held back, now that nothing follows.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

/// Takes from `bytes` all that no later byte can change.
fn take_certain(bytes: &mut Vec<u8>) -> String {
    let incomplete = match bytes.utf8_chunks().last() {
        // Only the last chunk's invalid part can be the beginning of a character.
        Some(chunk) => incomplete_len(chunk.invalid()),
        None => 0,
    };
    let certain = bytes.len() - incomplete;
    let text = String::from_utf8_lossy(&bytes[..certain]).into_owned();
    bytes.drain(..certain);
    text
}

/// Length of `tail` if more bytes could complete it to a character, else 0.
fn incomplete_len(tail: &[u8]) -> usize {
    match std::str::from_utf8(tail) {
        Err(error) if error.error_len().is_none() => tail.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holds_back_only_what_may_become_a_character() {
        let mut bytes = b"a\xF0\x9F".to_vec();
        assert_eq!((take_certain(&mut bytes).as_str(), bytes.len()), ("a", 2));
        bytes.push(b'b');
        assert_eq!((take_certain(&mut bytes).as_str(), bytes.len()), ("\u{FFFD}b", 0));
        let mut bytes = b"\xFF\xE4\xB8\xAD\xE4".to_vec();
        assert_eq!((take_certain(&mut bytes).as_str(), bytes.len()), ("\u{FFFD}中", 1));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_text_of_the_whole(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select("é中👍a".as_bytes())], 0..60),
            cut in 1usize..5,
        ) {
            let mut pending = Vec::new();
            let mut text = String::new();
            for part in bytes.chunks(cut) {
                pending.extend_from_slice(part);
                text += &take_certain(&mut pending);
                prop_assert!(pending.len() <= 3);
            }
            text += &String::from_utf8_lossy(&pending);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
