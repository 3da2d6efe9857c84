//! The trainer against Hugging Face's, and what we write against what we read.

use serde_json::{Value, json};
use tokenizer::{BpeTrainer, Error, Tokenizer, TrainProgress};

use crate::{golden_json, repository};

fn trainer(vocab_size: usize, n_threads: usize) -> BpeTrainer {
    let special_tokens = vec!["<|endoftext|>".into(), "<|im_end|>".into()];
    BpeTrainer { special_tokens, n_threads, ..BpeTrainer::new(vocab_size) }
}

fn documents() -> Vec<String> {
    let documents = golden_json("training.json")["documents"].clone();
    serde_json::from_value(documents).expect("a list of texts")
}

fn train(trainer: &BpeTrainer, documents: &[String]) -> Tokenizer {
    trainer.train(documents, &mut |_| {}).expect("good documents")
}

#[test]
fn learns_what_hugging_face_learns() {
    let expected = golden_json("training.json");
    let json = train(&trainer(900, 1), &documents()).to_json();
    let model = &serde_json::from_str::<Value>(&json).expect("we write JSON")["model"];
    let merges = |value: &Value| serde_json::from_value::<Vec<[String; 2]>>(value.clone()).expect("pairs");
    assert_eq!(merges(&model["merges"]), merges(&expected["merges"]));
    assert_eq!(model["vocab"], expected["vocab"]);
}

#[test]
fn neither_threads_nor_order_matter() {
    let mut documents = documents();
    let one = train(&trainer(700, 1), &documents);
    documents.reverse();
    let four = train(&trainer(700, 4), &documents);
    assert_eq!(one.fingerprint(), four.fingerprint());
}

#[test]
fn a_trained_tokenizer_gives_texts_back() {
    let path = repository().join("fixtures/text/1790_george_washington_n.txt");
    let text = std::fs::read_to_string(&path).expect("a fixture");
    let mut last = None;
    let tokenizer = BpeTrainer::new(600)
        .train([text.as_str()], &mut |progress| last = Some(progress))
        .expect("a good document");
    let end = TrainProgress { text_bytes: text.len() as u64, n_merges: 343, merges_wanted: 343 };
    assert_eq!(last, Some(end));
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.add_bos()), (600, Some(0), false));
    let ids = tokenizer.encode(&text);
    assert_eq!(tokenizer.decode(&ids), text);
    assert!(ids.len() * 2 < text.len());
    // What was never seen is spelled in bytes.
    assert_eq!(tokenizer.decode(&tokenizer.encode("中文 👍")), "中文 👍");
}

#[test]
fn too_little_text_gives_a_smaller_vocabulary() {
    let empty: [&str; 0] = [];
    assert_eq!(BpeTrainer::new(4096).train(empty, &mut |_| {}).expect("bytes at least").vocab_size(), 257);
    let small = BpeTrainer::new(4096).train(["", "ab ab ab"], &mut |_| {}).expect("a little");
    assert_eq!(small.encode(" ab ab").len(), 2);
}

#[test]
fn reads_no_more_than_it_may() {
    let documents = documents();
    let limited = BpeTrainer { text_bytes_max: documents[0].len() as u64, ..trainer(500, 2) };
    assert_eq!(train(&limited, &documents).fingerprint(), train(&limited, &documents[..1]).fingerprint());
}

#[test]
fn impossible_wishes_are_refused() {
    let refused = |trainer: &BpeTrainer| {
        let error = trainer.train(["text"], &mut |_| {}).expect_err("this cannot be");
        assert!(matches!(error, Error::Train(_)), "{error}");
    };
    refused(&BpeTrainer::new(256));
    refused(&BpeTrainer::new(usize::MAX));
    for tokens in [json!([""]), json!(["a"]), json!(["<x>", "<x>"])] {
        let special_tokens = serde_json::from_value(tokens).expect("texts");
        refused(&BpeTrainer { special_tokens, ..BpeTrainer::new(1000) });
    }
}
