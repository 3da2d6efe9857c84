//! Tokenizers of published models, where their files are present: `./run` fetches SmolLM2, the other data comes beside
//! the repository.

use std::path::PathBuf;

use serde_json::{Value, json};
use tokenizer::{ChatTemplate, Tokenizer};

use crate::{gguf_metadata, golden_json, ids_of, repository};

/// A file that a fresh clone lacks; without it the test says so and passes.
fn optional(relative: &str) -> Option<PathBuf> {
    let path = repository().join(relative);
    if !path.exists() {
        eprintln!("SKIPPED: {} is missing", path.display());
        return None;
    }
    Some(path)
}

fn parity_entries() -> Option<Vec<Value>> {
    let path = optional("../shared/parity/smollm2_f32.json")?;
    let file: Value = serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("JSON");
    file["entries"].as_array().cloned()
}

#[test]
fn smollm2_has_the_ids_of_llama_cpp() {
    let Some(path) = optional("var/cache/smollm2-135m-instruct-q4_1.gguf") else { return };
    let metadata = gguf_metadata::read(&path).expect("a GGUF file");
    let tokenizer = Tokenizer::from_gguf(&gguf_metadata::vocab(&metadata)).expect("a good vocabulary");
    assert_eq!(tokenizer.vocab_size(), 49_152);
    let source = metadata["tokenizer.chat_template"].as_str().expect("a template");
    let template = ChatTemplate::new(source, "<|im_start|>", "<|im_end|>").expect("a good template");
    let written = Tokenizer::from_json(tokenizer.to_json().as_bytes()).expect("what we write, we read");
    let Some(entries) = parity_entries() else { return };
    for entry in entries {
        let prompt = entry["prompt"].as_str().expect("a text");
        let ids = ids_of(&entry["prompt_ids"]);
        assert_eq!(tokenizer.encode_special(prompt), ids, "{prompt}");
        assert_eq!(written.encode_special(prompt), ids, "{prompt}");
        assert_eq!(tokenizer.decode_special(&ids), prompt);
        if let Some(user) = entry["user"].as_str().filter(|_| entry["kind"] == "chat") {
            let messages = [json!({"role": "user", "content": user})];
            assert_eq!(template.encode(&tokenizer, &messages, true).expect("a good chat"), ids, "{prompt}");
        }
    }
}

#[test]
fn stories260k_has_the_ids_of_sentencepiece() {
    let Some(path) = optional("../shared/data/models/stories260K/tok512.bin") else { return };
    let bytes = std::fs::read(path).expect("readable");
    let tokenizer = Tokenizer::from_llama2c(&bytes, 512).expect("a good file");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()), (Some(1), Some(2), true));
    let written = Tokenizer::from_json(tokenizer.to_json().as_bytes()).expect("what we write, we read");
    for case in golden_json("tok512.ids.json").as_array().expect("a list") {
        let text = case["text"].as_str().expect("a text");
        let ids = ids_of(&case["ids"]);
        assert_eq!(tokenizer.encode(text), ids, "{text:?}");
        assert_eq!(written.encode(text), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids), case["decoded"].as_str().expect("a text"));
    }
    for cut in (0..bytes.len()).step_by(61) {
        assert!(Tokenizer::from_llama2c(&bytes[..cut], 512).is_err(), "cut at {cut}");
    }
    assert!(Tokenizer::from_llama2c(&bytes, 513).is_err());
    assert!(Tokenizer::from_llama2c(&bytes, 3).is_err());
    assert!(Tokenizer::from_llama2c(&[0xFF; 8000], 512).is_err());
}
