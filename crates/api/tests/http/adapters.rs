//! Adapters that come and go.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::{AppState, Limits, app};
use axum::Router;
use axum::http::StatusCode;
use engine::Adapter;
use serde_json::{Value, json};
use tensor::Pool;

use crate::client::{get, post};
use crate::fake::state;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden");

/// The fake server; its model `chat` takes adapters of the tiny Llama, which the fake runner passes over.
fn adaptable(runtime_adapters: bool) -> (AppState, Router) {
    let state = state(Limits { runtime_adapters, ..Limits::default() }, Duration::ZERO);
    let config = model::load(&Path::new(GOLDEN).join("models/llama")).unwrap().weights.config;
    let load = move |dir: &Path| Adapter::load(dir, &config, &Pool::new(1)).map_err(|e| e.to_string());
    let chat = Arc::into_inner(state.models.remove("chat").unwrap()).unwrap();
    state.models.insert(chat.with_adapters(Arc::new(load)));
    (state.clone(), app(state))
}

fn body(name: &str, path: &str) -> Value {
    json!({"lora_name": name, "lora_path": format!("{GOLDEN}/{path}"), "base_model_name": "chat"})
}

#[tokio::test]
async fn an_adapter_is_a_model_until_it_is_unloaded() {
    let (_, app) = adaptable(true);
    let loaded = post(&app, "/v1/load_lora_adapter", body("pirate", "adapters/llama_all")).await;
    assert_eq!(loaded.status, StatusCode::OK, "{:?}", loaded.body);
    let listed = get(&app, "/v1/models/pirate").await.json();
    assert_eq!((listed["parent"].as_str(), listed["root"].as_str()), (Some("chat"), Some("chat")));
    let messages = json!([{"role": "user", "content": "say [ahoy]"}]);
    let chat = json!({"model": "pirate", "messages": messages});
    let answer = post(&app, "/v1/chat/completions", chat.clone()).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "ahoy");
    assert_eq!(answer["model"], "pirate");
    let unloaded = post(&app, "/v1/unload_lora_adapter", json!({"lora_name": "pirate"})).await;
    assert_eq!(unloaded.json()["deleted"], true);
    assert_eq!(post(&app, "/v1/chat/completions", chat).await.status, StatusCode::NOT_FOUND);
    let again = post(&app, "/v1/unload_lora_adapter", json!({"lora_name": "pirate"})).await;
    assert_eq!(again.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn bad_adapters_are_refused_by_field() {
    let (_, app) = adaptable(true);
    let good = || body("good", "adapters/llama_qv_rs");
    assert_eq!(post(&app, "/v1/load_lora_adapter", good()).await.status, StatusCode::OK);
    for (body, param) in [
        (json!({}), "lora_name"),
        (body("", "adapters/llama_all"), "lora_name"),
        (body("a\u{7}b", "adapters/llama_all"), "lora_name"),
        (body("good", "adapters/llama_all"), "lora_name"),
        (body("chat", "adapters/llama_all"), "lora_name"),
        (json!({"lora_name": "x"}), "lora_path"),
        (body("x", "no/such/directory"), "lora_path"),
        (body("x", "models/llama"), "lora_path"),
        (body("x", "adapters/gpt2"), "lora_path"),
        (json!({"lora_name": "x", "lora_path": "y\u{0}"}), "lora_path"),
        (json!({"lora_name": "x", "lora_path": "y"}), "base_model_name"),
        (json!({"lora_name": "x", "lora_path": "y", "base_model_name": "good"}), "base_model_name"),
        (json!({"lora_name": "x", "lora_path": "y", "base_model_name": "none"}), "model"),
        (json!({"lora_name": "x", "lora_path": "y", "base_model_name": "random"}), "lora_path"),
    ] {
        let answer = post(&app, "/v1/load_lora_adapter", body.clone()).await;
        assert!(answer.status.is_client_error(), "{body}");
        assert_eq!(answer.json()["error"]["param"], param, "{body}: {:?}", answer.body);
    }
    let base = post(&app, "/v1/unload_lora_adapter", json!({"lora_name": "chat"})).await;
    assert_eq!(base.status, StatusCode::BAD_REQUEST);
    assert_eq!(get(&app, "/v1/models/chat").await.status, StatusCode::OK);
}

#[tokio::test]
async fn clients_name_no_paths_unless_they_may() {
    let (_, app) = adaptable(false);
    for route in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let answer = post(&app, route, body("x", "adapters/llama_all")).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
    }
}

/// A model that goes takes its adapters with it, and so does one that is replaced.
#[tokio::test]
async fn adapters_go_with_their_model() {
    let (state, app) = adaptable(true);
    let loaded = post(&app, "/v1/load_lora_adapter", body("pirate", "adapters/llama_all")).await;
    assert_eq!(loaded.status, StatusCode::OK);
    state.models.remove("chat");
    assert!(state.models.get("pirate").is_none());
    assert!(state.models.get("random").is_some());
}
