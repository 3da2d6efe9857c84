//! What good requests get.

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

fn chat(says: &str) -> Value {
    json!({"model": "chat", "temperature": 0, "messages": [{"role": "user", "content": format!("say [{says}]")}]})
}

fn with(mut body: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The texts of a streamed chat, by choice.
fn streamed(events: &[Value], n: usize) -> Vec<String> {
    let mut texts = vec![String::new(); n];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        texts[index].push_str(piece);
    }
    texts
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let answer = post(&server(), "/v1/chat/completions", chat("Grüße 🙂")).await;
    let body = answer.json();
    assert_eq!(answer.status, StatusCode::OK, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["created"], 1_700_000_000);
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Grüße 🙂", "refusal": null}));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"], Value::Null);
    // One token per byte of the answer, and the one that ends it.
    let n_answer = "Grüße 🙂".len() + 1;
    assert_eq!(body["usage"]["completion_tokens"], n_answer);
    let n_prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(body["usage"]["total_tokens"], n_prompt + n_answer as u64);
    assert!(answer.header("x-request-id").starts_with("req-"));
    assert_eq!(answer.header("openai-version"), "2020-10-01");
    assert!(answer.header("openai-processing-ms").parse::<u64>().is_ok());
}

#[tokio::test]
async fn a_chat_is_streamed_as_openai_does() {
    let request = with(chat("Grüße 🙂!"), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = post(&server(), "/v1/chat/completions", request).await;
    let events = answer.events();
    assert_eq!(streamed(&events, 1), ["Grüße 🙂!"]);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], "Grüße 🙂!".len() + 1);
    let (last, chunks) = chunks.split_last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    for chunk in chunks {
        assert_eq!((&chunk["id"], &chunk["created"]), (&last["id"], &last["created"]));
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!((&chunk["usage"], &chunk["choices"][0]["finish_reason"]), (&Value::Null, &Value::Null));
    }
    // A chunk per character: half a character is never sent.
    assert_eq!(chunks.len(), 1 + "Grüße 🙂!".chars().count());
}

#[tokio::test]
async fn stop_strings_may_span_tokens() {
    let server = server();
    for (stop, want, reason) in [
        (json!("END"), "the EN", "stop"),
        (json!(["zzz", "é!"]), "the ENEND caf", "stop"),
        (json!("ENDS"), "the ENEND café!", "stop"),
        (json!(["the"]), "", "stop"),
    ] {
        let request = with(chat("the ENEND café!"), json!({"stop": stop}));
        let body = post(&server, "/v1/chat/completions", request.clone()).await.json();
        assert_eq!(body["choices"][0]["message"]["content"], want, "{stop}");
        assert_eq!(body["choices"][0]["finish_reason"], reason, "{stop}");
        let request = with(request, json!({"stream": true}));
        let events = post(&server, "/v1/chat/completions", request).await.events();
        assert_eq!(streamed(&events, 1), [want], "{stop}");
    }
}

#[tokio::test]
async fn a_cut_character_is_replaced_not_split() {
    let request = with(chat("🙂"), json!({"max_tokens": 2}));
    let body = post(&server(), "/v1/chat/completions", request).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "\u{fffd}");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn several_answers_and_their_usage() {
    let server = server();
    let body = post(&server, "/v1/chat/completions", with(chat("abc"), json!({"n": 3}))).await.json();
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(body["usage"]["completion_tokens"], 3 * 4);
    let one = post(&server, "/v1/chat/completions", chat("abc")).await.json();
    assert_eq!(body["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
    let request = with(chat("abc"), json!({"n": 3, "stream": true}));
    let events = post(&server, "/v1/chat/completions", request).await.events();
    assert_eq!(streamed(&events, 3), ["abc", "abc", "abc"]);
}

#[tokio::test]
async fn cached_tokens_are_reported() {
    let server = server();
    let request = chat(&"long prompt ".repeat(20));
    let first = post(&server, "/v1/chat/completions", request.clone()).await.json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let second = post(&server, "/v1/chat/completions", request.clone()).await.json();
    let cached = &second["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().unwrap() > 100, "{second}");
    // A stop string ends the answer before the engine's own report.
    let cut = post(&server, "/v1/chat/completions", with(request, json!({"stop": "prompt"}))).await.json();
    assert_eq!(&cut["usage"]["prompt_tokens_details"]["cached_tokens"], cached);
}

#[tokio::test]
async fn seeds_decide() {
    let server = server();
    let ask = async |seed: i64| {
        let request =
            json!({"model": "random", "prompt": "x", "max_tokens": 40, "seed": seed, "ignore_eos": true});
        post(&server, "/v1/completions", request).await.json()["choices"][0]["text"].clone()
    };
    let (first, again, other) = (ask(-7).await, ask(-7).await, ask(8).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    let request =
        json!({"model": "random", "prompt": "x", "max_tokens": 40, "seed": 5, "n": 2, "ignore_eos": true});
    let body = post(&server, "/v1/completions", request).await.json();
    assert_ne!(body["choices"][0]["text"], body["choices"][1]["text"], "answers of one request differ");
}

#[tokio::test]
async fn base_models_chat_through_the_plain_template() {
    let messages = json!([{"role": "user", "content": "hello"}]);
    let request = json!({"model": "base", "max_tokens": 5, "messages": messages});
    let body = post(&server(), "/v1/chat/completions", request).await.json();
    assert_eq!(body["choices"][0]["message"]["content"].as_str().unwrap().len(), 5, "{body}");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn messages_come_in_many_forms() {
    let server = server();
    let messages = json!([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "[two"}]},
        {"role": "assistant", "content": null, "tool_calls": []},
        {"role": "user", "name": "ann", "content": "three]"},
    ]);
    let body =
        post(&server, "/v1/chat/completions", with(chat(""), json!({"messages": messages}))).await.json();
    assert!(body["choices"][0]["message"]["content"].as_str().unwrap().starts_with("two"), "{body}");
    // Special tokens in a message are plain text: they cannot end the turn.
    let body = post(&server, "/v1/chat/completions", chat("a<|im_end|>b")).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "a<|im_end|>b");
}

#[tokio::test]
async fn unknown_and_null_fields_are_ignored() {
    let more = json!({"user": "u", "metadata": {"a": "b"}, "top_p": null, "stop": null, "n": null, "tools": [],
        "response_format": {"type": "text"}, "what": [1, {"x": 2}]});
    let answer = post(&server(), "/v1/chat/completions", with(chat("fine"), more)).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "fine");
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = server();
    let ask = async |prompt: Value| {
        let body = post(&server, "/v1/completions", json!({"model": "base", "prompt": prompt})).await.json();
        let choices = body["choices"].as_array().unwrap_or_else(|| panic!("{body}"));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let ids = |text: &str| text.bytes().collect::<Vec<u8>>();
    assert_eq!(ask(json!("[a]")).await, ["a"]);
    assert_eq!(ask(json!(["[a]", "[b]"])).await, ["a", "b"]);
    assert_eq!(ask(json!(ids("[a]"))).await, ["a"]);
    assert_eq!(ask(json!([ids("[a]"), ids("[b]")])).await, ["a", "b"]);
    // Nothing is the beginning of a document; 16 tokens is OpenAI's default.
    assert_eq!(ask(Value::Null).await, ["bcdefghijklmnopq"]);
    assert_eq!(ask(json!("")).await, ["bcdefghijklmnopq"]);
}

#[tokio::test]
async fn text_is_echoed_and_scored() {
    let server = server();
    let ask = |more: Value| with(json!({"model": "base", "prompt": "[hé]", "echo": true}), more);
    let body = post(&server, "/v1/completions", ask(json!({}))).await.json();
    assert_eq!(body["choices"][0]["text"], "[hé]hé");
    let body = post(&server, "/v1/completions", ask(json!({"max_tokens": 0}))).await.json();
    assert_eq!(body["choices"][0]["text"], "[hé]");
    assert_eq!(body["usage"]["completion_tokens"], 0);

    let body = post(&server, "/v1/completions", ask(json!({"max_tokens": 0, "logprobs": 1}))).await.json();
    let scores = &body["choices"][0]["logprobs"];
    let n_prompt = "[hé]".len();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(scores[list].as_array().unwrap().len(), n_prompt, "{list}: {body}");
    }
    assert_eq!(scores["token_logprobs"][0], Value::Null);
    assert!(scores["token_logprobs"][1].as_f64().unwrap() < 0.0);
    assert_eq!(scores["tokens"][2], "bytes:\\xc3");

    for more in [json!({}), json!({"logprobs": 2})] {
        let events =
            post(&server, "/v1/completions", with(ask(more), json!({"stream": true}))).await.events();
        assert_eq!(streamed(&events, 1), ["[hé]hé"]);
        assert_eq!(events[0]["object"], "text_completion");
    }
}

#[tokio::test]
async fn logprobs_belong_to_the_text_that_is_sent() {
    let server = server();
    let request = with(chat("aé!stop"), json!({"logprobs": true, "top_logprobs": 2, "stop": "stop"}));
    let body = post(&server, "/v1/chat/completions", request.clone()).await.json();
    let tokens = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|t| t["bytes"].as_array().unwrap())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(bytes, "aé!".as_bytes(), "the tokens of the stop string are not part of the answer");
    assert_eq!(tokens[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert!(tokens[0]["logprob"].as_f64().unwrap() <= 0.0);
    let events = post(&server, "/v1/chat/completions", with(request, json!({"stream": true}))).await.events();
    let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(lists.flatten().cloned().collect::<Vec<_>>(), *tokens);
}

#[tokio::test]
async fn prompts_are_scored_beside_the_answer() {
    let server = server();
    let text = json!({"model": "random", "prompt": "abc", "max_tokens": 0, "prompt_logprobs": 2});
    let body = post(&server, "/v1/completions", text).await.json();
    let scores = body["choices"][0]["prompt_logprobs"].as_array().unwrap_or_else(|| panic!("{body}"));
    assert_eq!((scores.len(), &scores[0], &body["choices"][0]["text"]), (3, &Value::Null, &json!("")));
    let second = scores[1].as_object().unwrap();
    let rank =
        |wanted: u64| second.values().find(|v| v["rank"] == wanted).unwrap()["logprob"].as_f64().unwrap();
    assert!(rank(1) >= rank(2) && second.len() <= 3);
    // The same numbers that `echo` gives.
    let text = json!({"model": "random", "prompt": "abc", "max_tokens": 0, "echo": true, "logprobs": 2});
    let echoed = post(&server, "/v1/completions", text).await.json();
    let own = second["98"].clone();
    let echoed = &echoed["choices"][0]["logprobs"]["token_logprobs"][1];
    // One list writes the digits of an f32, the other those of the f64 next to it.
    let short = |logprob: &Value| logprob.as_f64().unwrap() as f32;
    assert_eq!((short(&own["logprob"]), &own["decoded_token"]), (short(echoed), &json!("b")));
    let request = with(chat("x"), json!({"prompt_logprobs": 0, "n": 2}));
    let body = post(&server, "/v1/chat/completions", request).await.json();
    assert_eq!(body["prompt_logprobs"].as_array().unwrap().len() as u64, body["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn best_of_sends_the_likeliest() {
    let request = json!({"model": "random", "prompt": "x", "max_tokens": 8, "seed": 1, "ignore_eos": true, "logprobs": 0});
    let server = server();
    let mean = |choice: &Value| {
        let scores = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        scores.iter().map(|s| s.as_f64().unwrap()).sum::<f64>() / scores.len() as f64
    };
    let all = post(&server, "/v1/completions", with(request.clone(), json!({"n": 5}))).await.json();
    let best = post(&server, "/v1/completions", with(request, json!({"best_of": 5}))).await.json();
    let best_of_all = all["choices"].as_array().unwrap().iter().map(mean).fold(f64::MIN, f64::max);
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert_eq!(mean(&best["choices"][0]), best_of_all);
    assert_eq!(best["usage"], all["usage"]);
}

#[tokio::test]
async fn the_context_can_be_filled_to_the_last_token() {
    let server = server();
    let ask = |n_prompt: usize, max_tokens: Value| json!({"model": "base", "prompt": "x".repeat(n_prompt), "max_tokens": max_tokens});
    for (n_prompt, max_tokens, status) in [
        (CONTEXT_MAX - 1, 1, StatusCode::OK),
        (CONTEXT_MAX, 1, StatusCode::BAD_REQUEST),
        (CONTEXT_MAX + 1, 1, StatusCode::BAD_REQUEST),
        (CONTEXT_MAX * 10, 1, StatusCode::BAD_REQUEST),
        (CONTEXT_MAX - 5, 6, StatusCode::BAD_REQUEST),
    ] {
        let answer = post(&server, "/v1/completions", ask(n_prompt, json!(max_tokens))).await;
        assert_eq!(answer.status, status, "{n_prompt} + {max_tokens}: {:?}", answer.body);
        if status == StatusCode::BAD_REQUEST {
            assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
        }
    }
}

#[tokio::test]
async fn models_come_and_go() {
    let state = fake::state(Limits::default(), Duration::ZERO);
    let server = app(state.clone());
    let body = get(&server, "/v1/models").await.json();
    let ids: Vec<&str> = body["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["base", "chat", "random"]);
    assert_eq!(body["data"][0]["is_base"], true);
    assert_eq!(get(&server, "/v1/models/chat").await.json()["max_model_len"], CONTEXT_MAX);
    state.models.remove("chat");
    let gone = get(&server, "/v1/models/chat").await;
    assert_eq!(
        (gone.status, &gone.json()["error"]["code"]),
        (StatusCode::NOT_FOUND, &json!("model_not_found"))
    );
    assert_eq!(post(&server, "/v1/chat/completions", chat("x")).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn operators_see_runs_jobs_and_metrics() {
    let server = server();
    assert_eq!(get(&server, "/v1/runs").await.json()["data"][0]["id"], "sotu");
    let run = get(&server, "/v1/runs/sotu").await.json();
    assert_eq!(run["points"][0]["loss"], 8.3);
    assert_eq!(run["evals"][0]["bits_per_byte"], 3.1);
    assert_eq!(run["steps_total"], 600);
    assert_eq!(get(&server, "/v1/runs/none").await.status, StatusCode::NOT_FOUND);
    assert_eq!(get(&server, "/v1/jobs").await.json()["data"][0]["state"], "running");
    post(&server, "/v1/chat/completions", chat("x")).await;
    let metrics = String::from_utf8(get(&server, "/metrics").await.body.to_vec()).unwrap();
    assert!(metrics.contains("vllm:generation_tokens_total"), "{metrics}");
    assert!(metrics.contains(r#"handler="/v1/chat/completions""#), "{metrics}");
}

#[tokio::test]
async fn the_console_is_served_without_a_key() {
    use axum::body::Body;
    use axum::http::Request;
    let server = server();
    let page = crate::client::send(&server, Request::get("/").body(Body::empty()).unwrap()).await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.header("content-type").starts_with("text/html"));
    assert!(page.header("content-security-policy").contains("default-src 'none'"));
    let seen = Request::get("/").header("if-none-match", page.header("etag")).body(Body::empty()).unwrap();
    assert_eq!(crate::client::send(&server, seen).await.status, StatusCode::NOT_MODIFIED);
    for path in ["/../Cargo.toml", "/%2e%2e/Cargo.toml", "/assets/../../x", "/nothing"] {
        let answer = crate::client::send(&server, Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
    }
}
