//! Functions a model is made to call.

use std::time::Duration;

use api::{Limits, app};
use axum::Router;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::client::post;
use crate::fake;

const CHAT: &str = "/v1/chat/completions";

fn server() -> Router {
    app(fake::state(Limits::default(), Duration::ZERO))
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "get_weather", "description": "now", "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"], "additionalProperties": false,
        "$defs": {"city": {"type": "string", "maxLength": 4}}
    }}})
}

fn dice() -> Value {
    json!({"type": "function", "function": {"name": "roll-dice", "parameters": {
        "type": "object", "properties": {"sides": {"type": "integer", "minimum": 2, "maximum": 99}},
        "required": ["sides"], "additionalProperties": false
    }}})
}

/// A model whose logits are noise, with `more`.
fn request(more: Value) -> Value {
    let messages = json!([{"role": "user", "content": "go"}]);
    let mut body = json!({"model": "random", "max_tokens": 300, "seed": 5, "messages": messages});
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    body
}

/// The name and the arguments of a call, which fit one of the two functions.
fn check_call(name: &str, arguments: &str) {
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
    match name {
        "get_weather" => assert!(arguments["city"].as_str().unwrap().chars().count() <= 4, "{arguments}"),
        "roll-dice" => assert!((2..=99).contains(&arguments["sides"].as_i64().unwrap()), "{arguments}"),
        other => panic!("nobody declared {other}"),
    }
    assert_eq!(arguments.as_object().unwrap().len(), 1);
}

#[tokio::test]
async fn a_demanded_call_fits_its_function() {
    let server = server();
    let tools = json!([weather(), dice()]);
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for (choice, reason) in [(named, "stop"), (json!("required"), "tool_calls")] {
        let mut names = std::collections::BTreeSet::new();
        for seed in 0..8 {
            let body = request(json!({"tools": tools, "tool_choice": choice, "seed": seed}));
            let answer = post(&server, CHAT, body).await;
            assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
            let choice = answer.json()["choices"][0].clone();
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&json!(reason), &Value::Null)
            );
            let call = &choice["message"]["tool_calls"][0];
            assert!(
                call["type"] == "function" && call["id"].as_str().unwrap().starts_with("call_"),
                "{call}"
            );
            let name = call["function"]["name"].as_str().unwrap();
            check_call(name, call["function"]["arguments"].as_str().unwrap());
            names.insert(name.to_owned());
        }
        assert_eq!(names.len(), if reason == "stop" { 1 } else { 2 }, "{names:?}");
    }
    // One function is as good as named, and what is cut off says so.
    let body = request(json!({"tools": [dice()], "tool_choice": "required", "max_tokens": 4}));
    let choice = post(&server, CHAT, body).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "roll-dice");
    let body = request(json!({"tools": tools, "tool_choice": "required", "max_tokens": 4}));
    let choice = post(&server, CHAT, body).await.json()["choices"][0].clone();
    assert!(choice["message"]["content"].as_str().unwrap().starts_with('{'), "{choice}");
}

#[tokio::test]
async fn calls_are_streamed_in_pieces() {
    let server = server();
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for choice in [named, json!("required")] {
        let body = request(json!({"tools": [weather(), dice()], "tool_choice": choice, "stream": true}));
        let events = post(&server, CHAT, body).await.events();
        let calls: Vec<&Value> = events
            .iter()
            .map(|e| &e["choices"][0]["delta"]["tool_calls"][0])
            .filter(|c| !c.is_null())
            .collect();
        let names: Vec<&str> = calls.iter().filter_map(|call| call["function"]["name"].as_str()).collect();
        let arguments: String =
            calls.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
        assert!(calls.iter().all(|call| call["index"] == 0));
        assert_eq!((names.len(), calls[0]["function"]["name"].as_str()), (1, Some(names[0])));
        check_call(names[0], &arguments);
    }
}

#[tokio::test]
async fn functions_that_are_not_called_are_only_known() {
    let server = server();
    let mut body = request(json!({"tools": [weather()], "tool_choice": "none", "model": "chat"}));
    body["messages"] = json!([
        {"role": "user", "content": "roll"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "roll-dice", "arguments": "{\"sides\": 6}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
        {"role": "user", "content": "say [four]"},
    ]);
    let choice = post(&server, CHAT, body.clone()).await.json()["choices"][0].clone();
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "four", "refusal": null}));
    // The model is told what it may call and what it called: the prompt is longer for it.
    let with_all = post(&server, CHAT, body.clone()).await.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    body["messages"][1]["tool_calls"] = json!([]);
    let without_call =
        post(&server, CHAT, body.clone()).await.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    body.as_object_mut().unwrap().remove("tools");
    let without_tools = post(&server, CHAT, body).await.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(with_all > without_call && without_call > without_tools + 100);
}

/// A chat in which the model says `says`, free to call a function.
fn free(says: &str, more: Value) -> Value {
    let messages = json!([{"role": "user", "content": format!("say [{says}]")}]);
    let mut body = json!({"model": "chat", "messages": messages, "tools": [weather(), dice()]});
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    body
}

const TWO_CALLS: &str = "Well.<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}</tool_call>\n\
    <tool_call>{\"name\": \"roll-dice\", \"arguments\": {\"sides\": 6}}</tool_call>";

#[tokio::test]
async fn a_model_may_call_by_itself() {
    let server = server();
    let choice = post(&server, CHAT, free(TWO_CALLS, json!({}))).await.json()["choices"][0].clone();
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Well."))
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let said: Vec<&Value> = calls.iter().map(|call| &call["function"]).collect();
    assert_eq!(
        said,
        [
            &json!({"name": "get_weather", "arguments": "{\"city\":\"Oslo\"}"}),
            &json!({"name": "roll-dice", "arguments": "{\"sides\":6}"}),
        ]
    );
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    let one = post(&server, CHAT, free(TWO_CALLS, json!({"parallel_tool_calls": false}))).await.json();
    assert_eq!(one["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    for says in ["Sunny.", "<tool_call>{\"name\": \"nobody\"}</tool_call>"] {
        let plain = post(&server, CHAT, free(says, json!({"tool_choice": "auto"}))).await.json();
        let choice = &plain["choices"][0];
        assert_eq!(choice["message"], json!({"role": "assistant", "content": says, "refusal": null}));
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn calls_by_itself_are_streamed_when_they_are_clear() {
    let server = server();
    let events =
        post(&server, CHAT, free(TWO_CALLS, json!({"stream": true, "logprobs": true}))).await.events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let content: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(content, "Well.");
    let calls: Vec<&Value> = deltas.iter().filter_map(|d| d["tool_calls"].as_array()).flatten().collect();
    let said: Vec<(&Value, &Value)> =
        calls.iter().map(|call| (&call["index"], &call["function"]["name"])).collect();
    assert_eq!(said, [(&json!(0), &json!("get_weather")), (&json!(1), &json!("roll-dice"))]);
    assert_eq!(calls[1]["function"]["arguments"], "{\"sides\":6}");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // Every token is accounted for, also those of the calls.
    let n_tokens: usize = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(n_tokens, TWO_CALLS.len());
}

#[tokio::test]
async fn bad_functions_are_refused_by_name() {
    let server = server();
    let function = |function: Value| json!([{"type": "function", "function": function}]);
    let many: Vec<Value> =
        (0..129).map(|i| json!({"type": "function", "function": {"name": format!("f{i}")}})).collect();
    let required = |tools: Value| json!({"tools": tools, "tool_choice": "required"});
    for (change, param) in [
        (json!({"tools": "weather"}), "tools"),
        (required(many.into()), "tools"),
        (required(json!([{"type": "retrieval"}])), "tools[0].type"),
        (required(json!([5])), "tools[0].type"),
        (required(json!([{"type": "function"}])), "tools[0].function"),
        (required(function(json!({}))), "tools[0].function.name"),
        (required(function(json!({"name": ""}))), "tools[0].function.name"),
        (required(function(json!({"name": "a\nb"}))), "tools[0].function.name"),
        (required(function(json!({"name": "x".repeat(65)}))), "tools[0].function.name"),
        (required(function(json!({"name": "f", "parameters": 5}))), "tools[0].function.parameters"),
        (required(function(json!({"name": "f", "parameters": {"type": "king"}}))), "tools"),
        (required(json!([dice(), dice()])), "tools[1].function.name"),
        (json!({"tools": [dice()], "parallel_tool_calls": 1}), "parallel_tool_calls"),
        (json!({"tools": [dice()], "tool_choice": "maybe"}), "tool_choice"),
        (json!({"tools": [dice()], "tool_choice": {"type": "function"}}), "tool_choice"),
        (
            json!({"tools": [dice()], "tool_choice": {"type": "function", "function": {"name": "other"}}}),
            "tool_choice",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (
            json!({"tools": [dice()], "tool_choice": "required", "response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": 5}]}),
            "messages[0].tool_calls",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}),
            "messages[0].tool_calls[0].function",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "4", "tool_call_id": 5}]}),
            "messages[0].tool_call_id",
        ),
    ] {
        let answer = post(&server, CHAT, request(change.clone())).await;
        let shown: String = change.to_string().chars().take(150).collect();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{shown}: {:?}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{shown}");
    }
}
