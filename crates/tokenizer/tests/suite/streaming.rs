//! Decoding id by id gives the text of the whole, whatever the ids.

use proptest::prelude::*;

use crate::{GOLDEN, golden_tokenizer};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_stream_is_the_whole(which in 0..GOLDEN.len(), seeds in prop::collection::vec(any::<u32>(), 0..80)) {
        let tokenizer = golden_tokenizer(GOLDEN[which]);
        let n = tokenizer.vocab_size() as u32 + 3;
        // Half the ids are among the first 300, where the bytes are that make no character alone.
        let ids: Vec<u32> = seeds.iter().map(|&seed| (seed >> 1) % if seed & 1 == 0 { 300 } else { n }).collect();
        let mut decoder = tokenizer.decoder();
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text += &decoder.finish();
        let bytes: Vec<u8> = ids.iter().filter(|&&id| !tokenizer.is_special(id))
            .flat_map(|&id| tokenizer.token_bytes(id).to_vec()).collect();
        prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
        let whole = tokenizer.decode(&ids);
        prop_assert!(text == whole || text.strip_prefix(' ') == Some(&whole));
    }
}

#[test]
fn characters_come_whole_and_early() {
    let tokenizer = golden_tokenizer("gpt2");
    let mut decoder = tokenizer.decoder();
    for id in tokenizer.encode("a👩‍👩‍👧‍👦 ①é\u{200d}𝄞 end") {
        let piece = decoder.push(id);
        assert!(!piece.contains('\u{FFFD}'), "{piece:?}");
    }
    assert_eq!(decoder.finish(), "");
    // A special token is not shown, unless it is asked for.
    let ids = tokenizer.encode_special("x<|endoftext|>");
    let mut shown = tokenizer.decoder_special();
    assert_eq!(ids.iter().map(|&id| shown.push(id)).collect::<String>(), "x<|endoftext|>");
    let mut hidden = tokenizer.decoder();
    assert_eq!(ids.iter().map(|&id| hidden.push(id)).collect::<String>(), "x");
}
