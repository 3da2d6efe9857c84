//! Files that lie, and texts meant to hurt: an error that names the field, or an answer in time.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokenizer::{GgufVocab, Tokenizer};

use crate::{GOLDEN, golden_json, golden_tokenizer};

/// A good file, changed at a JSON pointer, must be refused by an error that holds `named`.
fn refused(pointer: &str, value: Value, named: &str) {
    let mut file = golden_json("gpt2.tokenizer.json");
    *file.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} is not in the file")) = value;
    refused_text(&file.to_string(), named);
}

fn refused_text(json: &str, named: &str) {
    let error = Tokenizer::from_json(json.as_bytes()).expect_err(named);
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        text += &format!(": {source}");
    }
    assert!(text.contains(named), "{text:?} does not name {named:?}");
}

#[test]
fn lying_files_are_refused_by_name() {
    refused("/model/vocab", json!({}), "model.merges[0]");
    refused("/model/vocab/a", json!(4_000_000_000u64), "model.vocab");
    refused("/model/vocab/a", json!(u64::MAX), "model.vocab");
    refused("/model/vocab/a", json!(-1), "integer `-1`");
    refused("/model/vocab/a", json!(1), "model.vocab");
    refused("/model/vocab", json!([["a", -1.5]]), "model.vocab");
    refused("/model/type", json!("Unigram"), "model.type");
    refused("/model/merges/3", json!(["a", "no such token"]), "model.merges[3]");
    refused("/model/merges/3", json!("a b c"), "model.merges[3]");
    refused("/model/merges/3", json!(["a"]), "model.merges[3]");
    refused("/model/merges/3", json!(["", "a"]), "model.merges[3]");
    refused("/model/unk_token", json!("<nope>"), "model.unk_token");
    refused("/model/continuing_subword_prefix", json!("##"), "subword prefix");
    refused("/added_tokens/0/id", json!(7), "added_tokens[0]");
    refused("/added_tokens/0/id", json!(u32::MAX), "added_tokens[0]");
    refused("/added_tokens/0/content", json!(""), "added_tokens[0]");
    refused("/added_tokens/0/content", json!("a"), "added_tokens[0]");
    refused("/normalizer", json!({"type": "NFKC"}), "normalizer");
    refused("/normalizer", json!({"type": "Sequence", "normalizers": 3}), "normalizer.normalizers");
    refused(
        "/normalizer",
        json!({"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}),
        "normalizer.pattern",
    );
    refused("/pre_tokenizer", json!({"type": "BertPreTokenizer"}), "pre_tokenizer");
    refused(
        "/pre_tokenizer",
        json!({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {}]}),
        "pretokenizers[1]",
    );
    let split =
        |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"});
    refused("/pre_tokenizer", split("(unclosed"), "pre_tokenizer.pattern");
    refused("/pre_tokenizer", split("(a{1000}){1000}"), "pre_tokenizer.pattern");
    refused("/decoder", json!({"type": "WordPiece"}), "decoder");
    refused("/post_processor", json!({"type": "BertProcessing"}), "post_processor");
    let bos = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<nope>"}}]});
    refused("/post_processor", bos, "post_processor.single");
}

#[test]
fn broken_json_is_refused() {
    refused_text("", "JSON");
    refused_text("[]", "JSON");
    refused_text("{\"model\": {\"vocab\": {}}}", "model.vocab: is empty");
    refused_text("{\"model\": {\"vocab\": {\"a\": 0, \"a\": 1}}}", "\"a\" twice");
    refused_text("{\"model\": {\"vocab\": {\"a\": 0, \"b\": 2}}}", "no holes");
    refused_text(&"[".repeat(100_000), "JSON");
    refused_text(&format!("{{\"model\": {}", "{\"vocab\":".repeat(100_000)), "JSON");
    let long = "x".repeat(10_000);
    refused_text(&format!("{{\"model\": {{\"vocab\": {{\"{long}\": 0}}}}}}"), "token 0 is longer");
    assert!(Tokenizer::from_json(b"\xFF\xFE").is_err());
    let whole = crate::golden_file("llama2.tokenizer.json");
    for cut in (0..whole.len()).step_by(997) {
        assert!(Tokenizer::from_json(&whole[..cut]).is_err());
    }
}

#[test]
fn lying_vocabularies_are_refused_by_name() {
    let good = GgufVocab {
        model: "gpt2".into(),
        tokens: ["a", "b", "ab"].map(String::from).into(),
        merges: vec!["a b".into()],
        ..GgufVocab::default()
    };
    let tokenizer = Tokenizer::from_gguf(&good).expect("a good vocabulary");
    assert_eq!(tokenizer.encode("abba?"), [2, 1, 0]);
    let scored = GgufVocab { model: "llama".into(), scores: vec![0.0; 3], ..good.clone() };
    assert!(Tokenizer::from_gguf(&scored).is_ok());
    for (bad, named) in [
        (GgufVocab { model: "bert".into(), ..good.clone() }, "tokenizer.ggml.model"),
        (GgufVocab { pre: Some("exotic".into()), ..good.clone() }, "tokenizer.ggml.pre"),
        (GgufVocab { token_types: vec![1], ..good.clone() }, "tokenizer.ggml.token_type"),
        (GgufVocab { merges: vec!["a c".into()], ..good.clone() }, "tokenizer.ggml.merges[0]"),
        (GgufVocab { merges: vec!["ab".into()], ..good.clone() }, "tokenizer.ggml.merges[0]"),
        (GgufVocab { tokens: vec!["a".into(), "a".into()], ..good.clone() }, "tokenizer.ggml.tokens"),
        (GgufVocab { bos: Some(3), ..good.clone() }, "bos"),
        (GgufVocab { eos: Some(u32::MAX), ..good.clone() }, "eos"),
        (GgufVocab { tokens: vec![], merges: vec![], ..good.clone() }, "empty"),
        (GgufVocab { scores: vec![], ..scored.clone() }, "tokenizer.ggml.scores"),
        (GgufVocab { scores: vec![f32::NAN; 3], ..scored.clone() }, "scores"),
        (GgufVocab { unk: Some(9), ..scored.clone() }, "unk"),
    ] {
        let error = Tokenizer::from_gguf(&bad).expect_err(named);
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn a_long_word_is_not_quadratic() {
    let start = Instant::now();
    for name in GOLDEN {
        let tokenizer = golden_tokenizer(name);
        for word in ["a".repeat(1 << 20), "the".repeat(1 << 18), "= ".repeat(1 << 18), "'<|".repeat(1 << 17)]
        {
            let ids = tokenizer.encode(&word);
            // Not `assert_eq`: nobody wants to read a megabyte.
            assert!(tokenizer.decode(&ids).trim_start() == word.trim_start(), "{name}");
        }
    }
    // About 3 s unoptimized; a quadratic merge of 2^20 symbols would take hours.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}
