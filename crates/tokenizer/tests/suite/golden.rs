//! Ids and texts equal to those of Hugging Face `tokenizers` (see `fixtures/tokenizer_golden.py`).

use tokenizer::Tokenizer;

use crate::{GOLDEN, golden_json, golden_tokenizer, ids_of};

fn check(name: &str, tokenizer: &Tokenizer) {
    let cases = golden_json(&format!("{name}.ids.json"));
    let cases = cases.as_array().expect("a list of cases");
    assert!(cases.len() > 300, "{name}");
    for case in cases {
        let text = case["text"].as_str().expect("a text");
        let ids = ids_of(&case["ids"]);
        let plain = if case["plain"].is_null() { ids.clone() } else { ids_of(&case["plain"]) };
        assert_eq!(tokenizer.encode_special(text), ids, "{name}: special tokens in {text:?}");
        assert_eq!(tokenizer.encode(text), plain, "{name}: plain {text:?}");
        assert_eq!(tokenizer.decode(&ids), case["decoded"].as_str().expect("a text"), "{name}: {text:?}");
    }
}

#[test]
fn ids_are_those_of_hugging_face() {
    for name in GOLDEN {
        check(name, &golden_tokenizer(name));
    }
}

#[test]
fn a_written_tokenizer_is_the_one_that_was_read() {
    for name in GOLDEN {
        let tokenizer = golden_tokenizer(name);
        let again = Tokenizer::from_json(tokenizer.to_json().as_bytes()).expect("what we write, we read");
        assert_eq!(again.fingerprint(), tokenizer.fingerprint(), "{name}");
        assert_eq!(
            (again.bos(), again.eos(), again.add_bos()),
            (tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos())
        );
        check(name, &again);
    }
}

#[test]
fn written_for_gguf_it_gives_the_same_ids() {
    for name in ["gpt2", "smollm2", "llama3", "qwen2", "llama2"] {
        let tokenizer = golden_tokenizer(name);
        let vocab = tokenizer.to_gguf().unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = Tokenizer::from_gguf(&vocab).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            (again.bos(), again.eos(), again.add_bos()),
            (tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()),
            "{name}"
        );
        check(name, &again);
    }
}

#[test]
fn a_split_that_gguf_has_no_name_for_is_refused() {
    let error = golden_tokenizer("o200k").to_gguf().expect_err("no such name");
    assert!(error.to_string().contains("pre_tokenizer"), "{error}");
}

#[test]
fn fingerprints_tell_tokenizers_apart() {
    let mut fingerprints: Vec<String> = GOLDEN.map(|name| golden_tokenizer(name).fingerprint()).into();
    assert!(fingerprints.iter().all(|fingerprint| fingerprint.len() == 64));
    fingerprints.sort();
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), GOLDEN.len());
}

#[test]
fn texts_come_back() {
    for name in ["gpt2", "smollm2", "llama3", "o200k", "llama2"] {
        let tokenizer = golden_tokenizer(name);
        for case in golden_json(&format!("{name}.ids.json")).as_array().expect("a list") {
            let text = case["text"].as_str().expect("a text");
            // SentencePiece cannot tell its own mark for a space from a space.
            let expected = if name == "llama2" { text.replace('\u{2581}', " ") } else { text.to_owned() };
            assert_eq!(tokenizer.decode(&tokenizer.encode(text)), expected, "{name}");
            if name != "llama2" {
                assert_eq!(tokenizer.decode_special(&tokenizer.encode_special(text)), text, "{name}");
            }
        }
    }
}

#[test]
fn facts_come_from_the_file() {
    let llama3 = golden_tokenizer("llama3");
    assert_eq!((llama3.bos(), llama3.add_bos()), (Some(0), true));
    assert_eq!(llama3.id_of("<|eot_id|>"), Some(1));
    assert!(llama3.is_special(1) && !llama3.is_special(2) && !llama3.is_special(u32::MAX));
    let gpt2 = golden_tokenizer("gpt2");
    assert_eq!((gpt2.bos(), gpt2.eos(), gpt2.add_bos()), (Some(0), Some(0), false));
    assert_eq!(gpt2.vocab_size(), 700);
    let the = gpt2.id_of(" the").expect("a frequent word");
    assert_eq!(gpt2.token_bytes(the), b" the");
    assert_eq!(gpt2.token_bytes(u32::MAX), b"");
    assert_eq!(gpt2.id_of("no such token"), None);
    let qwen2 = golden_tokenizer("qwen2");
    let think = qwen2.id_of("<think>").expect("an added token");
    assert!(!qwen2.is_special(think));
    assert_eq!(qwen2.encode("<think>"), [think]);
    assert_eq!(golden_tokenizer("llama2").id_of(" the").map(|id| id > 258), Some(true));
}

#[test]
fn config_names_the_end_of_text() {
    let json = crate::golden_file("smollm2.tokenizer.json");
    let config =
        br#"{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "add_bos_token": true}"#;
    let tokenizer = Tokenizer::from_json_with_config(&json, config).expect("a good config");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()), (Some(1), Some(2), true));
    let written = tokenizer.config_json(Some("{{ messages }}"));
    let again = Tokenizer::from_json_with_config(&json, written.as_bytes()).expect("our own config");
    assert_eq!((again.bos(), again.eos(), again.add_bos()), (Some(1), Some(2), true));
    let error =
        Tokenizer::from_json_with_config(&json, br#"{"eos_token": "<nope>"}"#).expect_err("no such token");
    assert!(error.to_string().contains("tokenizer_config.eos_token"), "{error}");
}
