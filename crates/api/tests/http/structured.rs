//! Answers that must look like something: JSON, an expression, a choice, a grammar.

use std::time::Duration;

use api::{Limits, app};
use axum::Router;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::client::post;
use crate::fake;

const CHAT: &str = "/v1/chat/completions";
/// `ab` or `c`.
const GBNF: &str = "root ::= both | \"c\" # either\nboth ::= \"a\" [b]";
const TEXT: &str = "/v1/completions";

fn server() -> Router {
    app(fake::state(Limits::default(), Duration::ZERO))
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "degrees": {"type": "integer", "minimum": -9, "maximum": 40}},
        "required": ["city", "degrees"],
        "additionalProperties": false
    })
}

fn check_weather(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(value.as_object().unwrap().len(), 2, "{text}");
    assert!(value["city"].as_str().unwrap().chars().count() <= 5, "{text}");
    assert!((-9..=40).contains(&value["degrees"].as_i64().unwrap()), "{text}");
}

/// A model whose logits are noise, asked by `path` with `more`.
async fn ask(server: &Router, path: &str, more: Value) -> Value {
    let mut body = json!({"model": "random", "max_tokens": 400, "seed": 3});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": "weather?"}]),
        _ => body["prompt"] = "weather?".into(),
    }
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    let answer = post(server, path, body).await;
    if answer.header("content-type").starts_with("text/event-stream") {
        return answer.events().into();
    }
    assert_eq!(answer.status, StatusCode::OK, "{more}: {:?}", answer.body);
    answer.json()
}

fn text_of(choice: &Value) -> &str {
    choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap()
}

#[tokio::test]
async fn noise_becomes_valid_json() {
    let server = server();
    let format = json!({"type": "json_schema", "json_schema": {"name": "weather", "strict": true, "schema": schema()}});
    for seed in 0..10 {
        let body = ask(&server, CHAT, json!({"response_format": format, "seed": seed, "n": 3})).await;
        for choice in body["choices"].as_array().unwrap() {
            check_weather(text_of(choice));
            assert_eq!(choice["finish_reason"], "stop");
        }
        assert_ne!(text_of(&body["choices"][0]), text_of(&body["choices"][1]), "answers are drawn");
    }
    let events = ask(&server, CHAT, json!({"response_format": format, "stream": true})).await;
    let pieces =
        events.as_array().unwrap().iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
    check_weather(&pieces.collect::<String>());
    // Where the answer is cut off, it is a beginning, and says so.
    let body = ask(&server, CHAT, json!({"response_format": format, "max_tokens": 5})).await;
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    // A grammar ends an answer that nothing else would.
    let body =
        ask(&server, CHAT, json!({"response_format": format, "ignore_eos": true, "min_tokens": 300})).await;
    check_weather(text_of(&body["choices"][0]));
}

#[tokio::test]
async fn every_spelling_is_understood() {
    let server = server();
    let as_text = schema().to_string();
    for more in [
        json!({"guided_json": schema()}),
        json!({"guided_json": as_text}),
        json!({"json_schema": schema()}),
        json!({"structured_outputs": {"json": schema()}}),
        json!({"structured_outputs": {"json": as_text}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema()}}}),
    ] {
        for path in [CHAT, TEXT] {
            check_weather(text_of(&ask(&server, path, more.clone()).await["choices"][0]));
        }
    }
    let is_even = |text: &str| text.parse::<u32>().unwrap().is_multiple_of(2);
    for (more, fits) in [
        (json!({"guided_regex": "[0-9]{2}[02468]"}), &is_even as &dyn Fn(&str) -> bool),
        (json!({"structured_outputs": {"regex": "[0-9]{2}[02468]"}}), &is_even),
        (json!({"guided_choice": ["rain", "sun"]}), &|text| ["rain", "sun"].contains(&text)),
        (json!({"structured_outputs": {"choice": ["rain", "sun"]}}), &|text| ["rain", "sun"].contains(&text)),
        (json!({"guided_grammar": "start: \"a\" \"b\" | \"c\""}), &|text| ["ab", "c"].contains(&text)),
        (json!({"structured_outputs": {"grammar": "start: \"a\" \"b\" | \"c\""}}), &|text| {
            ["ab", "c"].contains(&text)
        }),
        // llama-server's own, and what its clients send for none.
        (json!({"grammar": GBNF}), &|text| ["ab", "c"].contains(&text)),
        (json!({"grammar": "start: \"a\" \"b\" | \"c\""}), &|text| ["ab", "c"].contains(&text)),
        (json!({"guided_grammar": GBNF}), &|text| ["ab", "c"].contains(&text)),
        (json!({"structured_outputs": {"grammar": GBNF}}), &|text| ["ab", "c"].contains(&text)),
        (json!({"grammar": "", "guided_choice": ["rain"]}), &|text| text == "rain"),
    ] {
        for path in [CHAT, TEXT] {
            let body = ask(&server, path, more.clone()).await;
            assert!(fits(text_of(&body["choices"][0])), "{more}: {body}");
        }
    }
    for more in [
        json!({"response_format": {"type": "json_object"}}),
        json!({"structured_outputs": {"json_object": true}}),
    ] {
        let body = ask(&server, CHAT, more).await;
        assert!(text_of(&body["choices"][0]).starts_with('{'), "{body}");
    }
    let free = ask(&server, CHAT, json!({"response_format": {"type": "text"}, "max_tokens": 9})).await;
    assert_eq!(free["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn bad_descriptions_are_refused_by_name() {
    let server = server();
    let named = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let deep = (0..100).fold(json!({}), |inner, _| json!({"items": inner, "type": "array"}));
    for (change, param) in [
        (json!({"response_format": "json"}), "response_format"),
        (json!({"response_format": {}}), "response_format"),
        (json!({"response_format": {"type": "yaml"}}), "response_format"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format"),
        (json!({"response_format": {"type": "json_schema", "json_schema": 5}}), "response_format"),
        (named(json!(5)), "response_format"),
        (named(json!({"type": "king"})), "response_format"),
        (named(json!({"$ref": "http://127.0.0.1/x"})), "response_format"),
        (named(json!({"type": "integer", "multipleOf": 999_983})), "response_format"),
        (named(json!({"type": "string", "pattern": "(?<=a)b"})), "response_format"),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (json!({"structured_outputs": {"regex": 5}}), "structured_outputs"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs"),
        (json!({"guided_json": "{"}), "guided_json"),
        (json!({"guided_json": [1]}), "guided_json"),
        (json!({"guided_regex": "("}), "guided_regex"),
        (json!({"guided_regex": "(?<=a)b"}), "guided_regex"),
        (json!({"guided_regex": "x".repeat(1 << 20)}), "guided_regex"),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_choice": "a"}), "guided_choice"),
        (json!({"guided_choice": [1]}), "guided_choice"),
        (json!({"guided_choice": vec!["a"; 10_000]}), "guided_choice"),
        (json!({"guided_grammar": "start: nothing"}), "guided_grammar"),
        (json!({"guided_grammar": format!("start: {}", "(".repeat(50_000))}), "guided_grammar"),
        (json!({"grammar": "root ::= thing"}), "grammar"),
        (json!({"grammar": "root ::= root \"a\" | \"b\""}), "grammar"),
        (json!({"grammar": 5}), "grammar"),
        (json!({"grammar": GBNF, "guided_choice": ["a"]}), "grammar"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"guided_regex": "a", "response_format": {"type": "json_object"}}), "guided_regex"),
        // These compile, and cannot be followed.
        (json!({"guided_regex": "(a?){3000}a{3000}"}), "guided_regex"),
    ] {
        for path in [CHAT, TEXT] {
            let mut body =
                json!({"model": "random", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi"});
            change.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
            let shown: String = change.to_string().chars().take(120).collect();
            let answer = post(&server, path, body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{shown}: {:?}", answer.body);
            let error = answer.json()["error"].clone();
            assert_eq!(error["param"], param, "{shown}");
            let message = error["message"].as_str().unwrap();
            assert!(message.ends_with('.') && !message.ends_with("..") && message.len() < 600, "{message}");
        }
    }
    // Deep and catastrophic is no reason to refuse what is linear.
    for more in
        [json!({"guided_json": deep, "max_tokens": 9}), json!({"guided_regex": "(a+)+$", "max_tokens": 9})]
    {
        ask(&server, TEXT, more).await;
    }
}

#[tokio::test]
async fn many_grammars_at_once_wait_for_their_turn() {
    let limits = Limits { n_compiling: 1, ..Limits::default() };
    let server = app(fake::state(limits, Duration::ZERO));
    let asks =
        (0..8).map(|i| ask(&server, TEXT, json!({"guided_choice": [format!("answer {i}")]})).boxed_local());
    use futures::FutureExt;
    for (i, body) in futures::future::join_all(asks).await.iter().enumerate() {
        assert_eq!(text_of(&body["choices"][0]), format!("answer {i}"));
    }
    let limits = Limits { n_compiling: 0, compile_time_max: Duration::from_millis(20), ..Limits::default() };
    let server = app(fake::state(limits, Duration::ZERO));
    let body = json!({"model": "random", "prompt": "x", "guided_regex": "a"});
    let answer = post(&server, TEXT, body).await;
    assert_eq!((answer.status, answer.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, "1"));
}
