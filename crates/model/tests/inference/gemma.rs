//! Gemma 3 270M from its GGUF file (Q4_K_M): the tokenizer's ids and the log-probabilities that transformers computes in f32
//! from the same file.

use model::{KvType, Transformer, gguf};
use tensor::Pool;
use tokenizer::Tokenizer;

use crate::{Session, argmax, find, ids, log_prob};

/// Over all of the five likeliest ids at every position.
const TOLERANCE: f64 = 1e-2;

#[test]
fn gemma_agrees_with_transformers() {
    let Some(file) = find("var/cache/gemma-3-270m-q4_k_m.gguf") else { return };
    let golden = std::fs::read(find("fixtures/golden/gemma3_270m.json").unwrap()).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let pool = Pool::new(2);
    let gguf::Gguf { weights, vocab, .. } = gguf::read(&file).unwrap();
    let tokenizer = Tokenizer::from_gguf(&vocab.unwrap()).unwrap();
    let model = Transformer::new(weights, &pool).unwrap();
    let mut worst = 0.0f64;
    for entry in golden["entries"].as_array().unwrap() {
        let prompt = entry["prompt"].as_str().unwrap();
        let prompt_ids = ids(&entry["prompt_ids"]);
        let found: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(prompt)).collect();
        assert_eq!(found, prompt_ids, "{prompt:?}");
        let output = ids(&entry["output_ids"]);
        let mut session = Session::new(&pool, &model, prompt_ids.len() + output.len(), KvType::F32);
        let mut next = prompt_ids;
        for (i, (&id, top)) in output.iter().zip(entry["top"].as_array().unwrap()).enumerate() {
            let logits = session.feed(&next);
            assert_eq!(argmax(logits), id, "output token {i} of {prompt:?}");
            for pair in top.as_array().unwrap() {
                let (top_id, expected) = (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap());
                let error = (log_prob(logits, top_id) - expected).abs();
                assert!(error < TOLERANCE, "token {i} of {prompt:?}: {error}");
                worst = worst.max(error);
            }
            next = vec![id];
        }
    }
    eprintln!("log-probabilities are within {worst:.1e} of transformers'");
}
