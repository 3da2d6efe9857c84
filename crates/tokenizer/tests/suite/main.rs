//! The tokenizer as its users see it, against what others' programs gave.

mod chat;
mod gguf_metadata;
mod golden;
mod hostile;
mod lesson;
mod published;
mod streaming;
mod training;

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizer::Tokenizer;

const GOLDEN: [&str; 8] = ["gpt2", "gpt2_prefix", "smollm2", "llama3", "qwen2", "o200k", "llama2", "mistral"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden_file(name: &str) -> Vec<u8> {
    let path = repository().join("fixtures/golden/tokenizer").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn golden_json(name: &str) -> Value {
    serde_json::from_slice(&golden_file(name)).expect("golden files are JSON")
}

fn golden_tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_json(&golden_file(&format!("{name}.tokenizer.json"))).expect("golden tokenizers load")
}

fn ids_of(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}
