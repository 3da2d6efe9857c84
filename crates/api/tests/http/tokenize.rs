//! `/tokenize` and `/detokenize` in the words of llama-server and of vLLM.

use std::time::Duration;

use api::{Limits, app};
use axum::Router;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::fake::{self, CONTEXT_MAX};

fn server() -> Router {
    app(fake::state(Limits::default(), Duration::ZERO))
}

fn asking(more: Value) -> Value {
    let mut body = json!({"model": "chat"});
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    body
}

#[tokio::test]
async fn texts_become_tokens_and_texts_again() {
    let server = server();
    for field in ["content", "prompt"] {
        let answer = post(&server, "/tokenize", asking(json!({field: "Hé<|im_end|>"}))).await;
        let expected = json!({
            "count": 4, "max_model_len": CONTEXT_MAX, "tokens": [72, 195, 169, 257], "token_strs": null
        });
        assert_eq!(answer.json(), expected);
        assert_eq!(answer.header("content-type"), "application/json");
    }
    let plain =
        post(&server, "/tokenize", asking(json!({"content": "<|im_end|>", "parse_special": false}))).await;
    assert_eq!(plain.json()["count"], 10);
    let empty = post(&server, "/tokenize", asking(json!({"content": ""}))).await;
    assert_eq!(empty.json()["tokens"], json!([]));
    let back = post(&server, "/detokenize", asking(json!({"tokens": [72, 195, 169, 257]}))).await;
    assert_eq!(back.json(), json!({"content": "Hé<|im_end|>", "prompt": "Hé<|im_end|>"}));
}

#[tokio::test]
async fn tokens_are_spelled_out_on_demand() {
    let server = server();
    let body = asking(json!({"content": "aé", "with_pieces": true, "return_token_strs": true}));
    let answer = post(&server, "/tokenize", body).await.json();
    // Half a character has no text, so it is spelled in bytes.
    let pieces = json!([{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]);
    assert_eq!(answer["tokens"], pieces);
    assert_eq!(answer["token_strs"], json!(["a", "\u{fffd}", "\u{fffd}"]));
}

/// What is counted is what a chat would cost.
#[tokio::test]
async fn chats_are_counted_as_they_are_answered() {
    let server = server();
    let messages = json!([{"role": "user", "content": "say [ok]"}]);
    let usage = post(&server, "/v1/chat/completions", asking(json!({"messages": messages}))).await.json();
    let body = asking(json!({"messages": messages}));
    let counted = post(&server, "/tokenize", body.clone()).await.json();
    assert_eq!(counted["count"], usage["usage"]["prompt_tokens"]);
    let mut open = body;
    open["add_generation_prompt"] = false.into();
    let shorter = post(&server, "/tokenize", open).await.json();
    assert_eq!(
        counted["count"].as_u64().unwrap() - shorter["count"].as_u64().unwrap(),
        "\u{1}assistant\n".len() as u64
    );
}

#[tokio::test]
async fn the_only_model_need_not_be_named() {
    let state = fake::state(Limits::default(), Duration::ZERO);
    let server = app(state.clone());
    let body = json!({"content": "a"});
    let many = post(&server, "/tokenize", body.clone()).await;
    assert_eq!((many.status, &many.json()["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("model")));
    state.models.remove("base");
    state.models.remove("random");
    assert_eq!(post(&server, "/tokenize", body).await.json()["tokens"], json!([97]));
    let none = post(&server, "/detokenize", json!({"model": "base", "tokens": []})).await;
    assert_eq!(none.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let server = server();
    for (path, more, param) in [
        ("/tokenize", json!({}), "content"),
        ("/tokenize", json!({"content": 5}), "content"),
        ("/tokenize", json!({"content": "a", "prompt": "a"}), "prompt"),
        ("/tokenize", json!({"content": "a", "with_pieces": "yes"}), "with_pieces"),
        ("/tokenize", json!({"content": "a".repeat((1 << 20) + 1)}), "content"),
        ("/tokenize", json!({"messages": []}), "messages"),
        ("/tokenize", json!({"messages": [{"role": "king"}]}), "messages[0].role"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": "a"}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": [1, 999]}), "tokens"),
        ("/detokenize", json!({"tokens": vec![1; 1 << 20]}), ""),
    ] {
        let answer = post(&server, path, asking(more)).await;
        let body = answer.json();
        let expected = if param.is_empty() { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        assert_eq!(answer.status, expected, "{path} {param}");
        assert_eq!(body["error"]["param"].as_str().unwrap_or_default(), param, "{body}");
    }
    assert_eq!(get(&server, "/tokenize").await.status, StatusCode::METHOD_NOT_ALLOWED);
}
