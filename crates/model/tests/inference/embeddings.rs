//! Texts to vectors, against transformers and sentence-transformers.

use model::{Scratch, Transformer, load};
use tensor::Pool;
use tokenizer::WordPiece;

use crate::architectures::dir;
use crate::{find, ids};

const TOLERANCE: f32 = 1e-4;

fn floats(row: &serde_json::Value) -> Vec<f32> {
    row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}

/// An encoder, and a decoder's mean over what it makes of each token. All texts at once, and each alone to the same bits.
#[test]
fn tiny_models_embed_as_in_transformers() {
    let pool = Pool::new(2);
    for name in ["bert", "gemma3"] {
        let json = std::fs::read(dir(name).join("expected.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let texts: Vec<Vec<u32>> = json["texts"].as_array().unwrap().iter().map(ids).collect();
        let model = Transformer::new(load(&dir(name)).unwrap().weights, &pool).unwrap();
        let mut scratch = Scratch::default();
        let vectors = model.embed(&pool, &texts, &mut scratch).unwrap();
        assert_eq!(vectors.len(), texts.len());
        for ((vector, expected), text) in
            vectors.iter().zip(json["embeddings"].as_array().unwrap()).zip(&texts)
        {
            let error = distance(vector, &floats(expected));
            assert!(error < TOLERANCE, "{name}: {error} for {} tokens", text.len());
            let alone = model.embed(&pool, std::slice::from_ref(text), &mut scratch).unwrap();
            assert!(alone[0] == *vector, "{name}: {} tokens alone give another vector", text.len());
        }
        // More texts than are computed at once.
        let many: Vec<Vec<u32>> = texts.iter().cycle().take(200).cloned().collect();
        for (i, vector) in model.embed(&pool, &many, &mut scratch).unwrap().iter().enumerate() {
            assert!(*vector == vectors[i % texts.len()], "{name}: text {i} of many");
        }
        let vocab = model.config().vocab as u32;
        for (bad, expected) in
            [(vec![], "0 tokens"), (vec![1; 97], "97 tokens"), (vec![vocab], "is not below")]
        {
            let error = model.embed(&pool, &[vec![1], bad], &mut scratch).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn an_encoder_predicts_nothing() {
    let pool = Pool::new(1);
    let model = Transformer::new(load(&dir("bert")).unwrap().weights, &pool).unwrap();
    let mut step = model::StepInput::default();
    step.push_row(&[1], 0, &[0], 1);
    let mut kv = model.new_kv(1, model::KvType::F32);
    let error = model.forward(&pool, &step, &mut kv, &mut Scratch::default(), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("predicts none"), "{error}");
}

/// Ids equal to Hugging Face's, vectors to those of sentence-transformers.
#[test]
fn minilm_agrees_with_sentence_transformers() {
    let Some(dir) = find("var/cache/all-minilm-l6-v2") else { return };
    let golden = std::fs::read(find("fixtures/golden/minilm.json").unwrap()).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let tokenizer = WordPiece::from_json(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
    let entries = |name: &str| golden[name].as_array().unwrap().clone();
    for entry in entries("tokenized").iter().chain(&entries("embedded")) {
        assert_eq!(
            tokenizer.encode(entry["text"].as_str().unwrap()),
            ids(&entry["ids"]),
            "{}",
            entry["text"]
        );
    }
    let pool = Pool::new(2);
    let model = Transformer::new(load(&dir).unwrap().weights, &pool).unwrap();
    let embedded = entries("embedded");
    let texts: Vec<Vec<u32>> = embedded.iter().map(|entry| ids(&entry["ids"])).collect();
    let vectors = model.embed(&pool, &texts, &mut Scratch::default()).unwrap();
    let mut worst = 0.0f32;
    for (vector, entry) in vectors.iter().zip(&embedded) {
        let error = distance(vector, &floats(&entry["embedding"]));
        assert!(error < TOLERANCE, "{error}: {}", entry["text"]);
        worst = worst.max(error);
    }
    eprintln!("vectors are within {worst:.1e} of sentence-transformers'");
}
