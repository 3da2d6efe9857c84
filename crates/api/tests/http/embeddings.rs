//! `POST /v1/embeddings` over a model that counts.

use std::time::Duration;

use api::{AppState, Cause, Embedder, Limits, ServedEmbedder, app};
use axum::Router;
use axum::http::StatusCode;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::fake;

const CONTEXT_MAX: usize = 8;

/// A byte is a token; a vector is (number of tokens, first token, 1/2).
struct Counter;

impl Embedder for Counter {
    fn width(&self) -> usize {
        3
    }
    fn context_max(&self) -> usize {
        CONTEXT_MAX
    }
    fn vocab(&self) -> usize {
        256
    }
    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }
    fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Cause> {
        if texts[0][0] == u32::from(b'!') {
            return Err("the secret detail".into());
        }
        Ok(texts.iter().map(|text| vec![text.len() as f32, text[0] as f32, 0.5]).collect())
    }
}

pub(crate) fn with_counter(state: AppState) -> AppState {
    let embedder =
        ServedEmbedder { id: "counter".into(), created: 1_700_000_000, embedder: Box::new(Counter) };
    state.embedders.insert(embedder);
    state
}

fn server() -> Router {
    app(with_counter(fake::state(Limits::default(), Duration::ZERO)))
}

async fn embed(more: Value) -> (StatusCode, Value) {
    let mut body = json!({"model": "counter"});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    let answer = post(&server(), "/v1/embeddings", body).await;
    (answer.status, answer.json())
}

#[tokio::test]
async fn every_form_of_input_is_embedded() {
    for (input, expected, n_tokens) in [
        (json!("abc"), vec![[3.0, 97.0, 0.5]], 3),
        (json!(["abc", "b"]), vec![[3.0, 97.0, 0.5], [1.0, 98.0, 0.5]], 4),
        (json!([7, 8]), vec![[2.0, 7.0, 0.5]], 2),
        (json!([[7, 8], [9]]), vec![[2.0, 7.0, 0.5], [1.0, 9.0, 0.5]], 3),
    ] {
        let (status, answer) = embed(json!({"input": input, "dimensions": 3})).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let data = answer["data"].as_array().unwrap();
        assert_eq!(data.len(), expected.len());
        for (i, (entry, expected)) in data.iter().zip(&expected).enumerate() {
            assert_eq!(*entry, json!({"object": "embedding", "index": i, "embedding": expected}));
        }
        assert_eq!(answer["usage"], json!({"prompt_tokens": n_tokens, "total_tokens": n_tokens}));
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("counter")));
    }
    let (_, answer) = embed(json!({"input": "abc", "encoding_format": "base64"})).await;
    let bytes = BASE64_STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    assert_eq!(bytes, [3.0f32, 97.0, 0.5].map(f32::to_le_bytes).concat());
}

#[tokio::test]
async fn bad_inputs_are_refused_by_name() {
    for (body, says) in [
        (json!({}), "`input`: it is required"),
        (json!({"input": null}), "`input`: it is required"),
        (json!({"input": ""}), "it must not be empty"),
        (json!({"input": []}), "1 to 2048"),
        (json!({"input": ["a", ""]}), "it must not be empty"),
        (json!({"input": [[]]}), "it must not be empty"),
        (json!({"input": vec!["a"; 2049]}), "1 to 2048"),
        (json!({"input": 7}), "expected a string"),
        (json!({"input": ["a", 7]}), "expected strings"),
        (json!({"input": [7, "a"]}), "`input`"),
        (json!({"input": [256]}), "256"),
        (json!({"input": [-1]}), "-1"),
        (json!({"input": "123456789"}), "8 tokens"),
        (json!({"input": "a", "dimensions": 2}), "`dimensions`"),
        (json!({"input": "a", "encoding_format": "hex"}), "`encoding_format`"),
    ] {
        let (status, answer) = embed(body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{body}: {answer}");
    }
    let (status, _) = embed(json!({"model": "nobody", "input": "a"})).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_failing_model_keeps_its_secret() {
    let (status, answer) = embed(json!({"input": "!"})).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(!answer.to_string().contains("secret"), "{answer}");
}

#[tokio::test]
async fn it_is_listed_and_cannot_chat() {
    let list = get(&server(), "/v1/models").await.json();
    let listed =
        list["data"].as_array().unwrap().iter().find(|model| model["id"] == "counter").unwrap().clone();
    assert_eq!(listed["max_model_len"], CONTEXT_MAX);
    assert_eq!(listed["embeds_only"], true);
    assert_eq!(get(&server(), "/v1/models/counter").await.json(), listed);
    let chat = json!({"model": "counter", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(post(&server(), "/v1/chat/completions", chat).await.status, StatusCode::NOT_FOUND);
}
