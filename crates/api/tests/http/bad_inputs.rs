//! What bad requests get: the right status, an error that names the field, and a server that answers the next one.

use std::time::Duration;

use api::{Limits, app};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

use crate::client::{Answer, authorized, get, post, post_bytes, send};
use crate::fake::{self, CONTEXT_MAX};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn server() -> Router {
    app(fake::state(Limits::default(), Duration::ZERO))
}

/// The four keys are there, the message is a sentence, and nothing of ours leaks.
fn check_form(answer: &Answer) -> Value {
    let body = answer.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    let message = error["message"].as_str().unwrap();
    assert!(message.len() > 10 && message.len() < 600 && message.ends_with('.'), "{message}");
    assert!(!message.contains("secret"), "{message}");
    assert!(answer.header("content-type").starts_with("application/json"));
    body["error"].clone()
}

/// `change` over a good request is refused with 400, naming `param`.
async fn refused(server: &Router, path: &str, change: Value, param: &str) {
    let mut body = match path {
        CHAT => json!({"model": "chat", "messages": [{"role": "user", "content": "[hi]"}]}),
        _ => json!({"model": "base", "prompt": "[hi]"}),
    };
    for (key, value) in change.as_object().unwrap() {
        body[key] = value.clone();
    }
    let shown: String = change.to_string().chars().take(120).collect();
    let answer = post(server, path, body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path} {shown}: {:?}", answer.body);
    assert_eq!(check_form(&answer)["param"], param, "{path} {shown}");
}

#[tokio::test]
async fn sampling_fields_out_of_range_are_refused_by_name() {
    let server = server();
    let long = "x".repeat(1 << 20);
    let many: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
    let biases: Value =
        (0..2000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let shared = [
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": 1e9}), "n"),
        (json!({"n": "1"}), "n"),
        (json!({"n": 128}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 1u64 << 31}), "max_tokens"),
        (json!({"max_tokens": 1_000_000_000_000_000_000u64}), "max_tokens"),
        (json!({"max_tokens": u64::MAX}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"min_tokens": 9, "max_tokens": 5}), "min_tokens"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": 1e308}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"top_k": -5}), "top_k"),
        (json!({"top_k": 1u64 << 40}), "top_k"),
        (json!({"min_p": 1.1}), "min_p"),
        (json!({"typical_p": 0}), "typical_p"),
        (json!({"priority": -1}), "priority"),
        (json!({"priority": 128}), "priority"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (json!({"prompt_logprobs": -1}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"typical_p": 1.5}), "typical_p"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"frequency_penalty": -2.5}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"stop": long}), "stop"),
        (json!({"stop": many}), "stop"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop_token_ids": [259]}), "stop_token_ids"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"stop_token_ids": vec![1; 1000]}), "stop_token_ids"),
        (json!({"seed": 1u64 << 63}), "seed"),
        (json!({"seed": 0.5}), "seed"),
        (json!({"logit_bias": {"259": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": biases}), "logit_bias"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (json!({"model": null}), "model"),
        (json!({"model": 7}), "model"),
    ];
    for (change, param) in shared {
        refused(&server, CHAT, change.clone(), param).await;
        refused(&server, TEXT, change, param).await;
    }
    assert_eq!(post(&server, TEXT, json!({"model": "base", "prompt": "[hi]"})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_only_chats_can_get_wrong() {
    let server = server();
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (change, param) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "king", "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "name": 5, "content": "x"}]}), "messages[0].name"),
        (json!({"messages": vec![json!({"role": "user", "content": ""}); 5000]}), "messages"),
        (user(Value::Null), "messages[0].content"),
        (user(json!(5)), "messages[0].content"),
        (user(json!([])), "messages[0].content"),
        (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
        (
            user(json!([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])),
            "messages[0].content[0].type",
        ),
        (user(json!("x".repeat(CONTEXT_MAX))), "messages"),
        (user(json!("x".repeat(CONTEXT_MAX * 100))), "messages"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens"),
        (json!({"max_completion_tokens": 1u64 << 31}), "max_completion_tokens"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"modalities": ["audio"]}), "modalities"),
    ] {
        refused(&server, CHAT, change, param).await;
    }
}

#[tokio::test]
async fn what_only_text_completions_can_get_wrong() {
    let server = server();
    let many: Vec<&str> = vec!["a"; 300];
    for (change, param) in [
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [259]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": many}), "prompt"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"echo": true, "logprobs": 1, "prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 21}), "best_of"),
        (json!({"best_of": 1, "n": 2}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
        (json!({"echo": true, "logprobs": 5, "prompt": "x".repeat(CONTEXT_MAX)}), "prompt"),
    ] {
        refused(&server, TEXT, change, param).await;
    }
    let missing = post(&server, TEXT, json!({"model": "base"})).await;
    assert_eq!((missing.status, &check_form(&missing)["param"]), (StatusCode::BAD_REQUEST, &json!("prompt")));
}

#[tokio::test]
async fn bodies_that_are_not_json_are_refused() {
    let server = server();
    let good = br#"{"model":"base","prompt":"[hi]"}"#;
    let deep = format!("{{\"model\":\"base\",\"prompt\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let mut not_utf8 = good.to_vec();
    not_utf8[20] = 0xff;
    let cases: [Vec<u8>; 9] = [
        Vec::new(),
        good[..20].to_vec(),
        not_utf8,
        b"{\"model\":\"base\0\"}".to_vec(),
        b"[1]".to_vec(),
        deep.into_bytes(),
        br#"{"model":"base","prompt":"a","prompt":"b"}"#.to_vec(),
        br#"{"model":"base","prompt":"a","temperature":1e400}"#.to_vec(),
        br#"{"model":"base","prompt":"a","temperature":NaN}"#.to_vec(),
    ];
    for body in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let answer = post_bytes(&server, TEXT, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{shown}");
        assert_eq!(check_form(&answer)["code"], "json_parse_error", "{shown}");
    }
    assert_eq!(post_bytes(&server, TEXT, good.to_vec()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn bodies_are_bounded_and_of_one_type() {
    let limits = Limits { body_bytes_max: 10_000, ..Limits::default() };
    let server = app(fake::state(limits, Duration::ZERO));
    let answer = post(&server, TEXT, json!({"model": "base", "prompt": "x".repeat(10_000)})).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    check_form(&answer);
    // The same without a length, as a chunked body arrives.
    let chunks = futures::stream::iter((0..100).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1000])));
    let request = authorized(TEXT).method("POST").header("content-type", "application/json");
    let answer = send(&server, request.body(Body::from_stream(chunks)).unwrap()).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);

    for (name, value, status) in [
        ("content-type", "text/plain", StatusCode::UNSUPPORTED_MEDIA_TYPE),
        ("content-type", "application/x-www-form-urlencoded", StatusCode::UNSUPPORTED_MEDIA_TYPE),
        ("content-type", "application/json; charset=utf-8", StatusCode::OK),
        ("content-encoding", "gzip", StatusCode::UNSUPPORTED_MEDIA_TYPE),
    ] {
        let mut request = authorized(TEXT).method("POST").header(name, value);
        if name != "content-type" {
            request = request.header("content-type", "application/json");
        }
        let answer = send(&server, request.body(r#"{"model":"base","prompt":"[a]"}"#.into()).unwrap()).await;
        assert_eq!(answer.status, status, "{name}: {value}");
        if status != StatusCode::OK {
            check_form(&answer);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_comes_too_slowly_is_given_up() {
    let state = fake::state(Limits::default(), Duration::ZERO);
    let server = app(state);
    let never = futures::stream::pending::<Result<Vec<u8>, std::io::Error>>();
    let request = authorized(TEXT).method("POST").header("content-type", "application/json");
    let answer = send(&server, request.body(Body::from_stream(never)).unwrap()).await;
    assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(answer.header("x-should-retry"), "false");
    check_form(&answer);
}

#[tokio::test]
async fn large_bodies_are_bounded_in_number() {
    let limits = Limits { n_large_bodies: 1, ..Limits::default() };
    let server = app(fake::state(limits, Duration::ZERO));
    let half = futures::stream::iter([Ok::<_, std::io::Error>(vec![b' '; 100_000])])
        .chain(futures::stream::pending());
    use futures::StreamExt;
    let request = authorized(TEXT).method("POST").header("content-type", "application/json");
    let first = tokio::spawn({
        let server = server.clone();
        async move { send(&server, request.body(Body::from_stream(half)).unwrap()).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let large = json!({"model": "base", "prompt": "[a]", "user": "x".repeat(100_000)});
    let answer = post(&server, TEXT, large.clone()).await;
    assert_eq!((answer.status, answer.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, "1"));
    assert_eq!(post(&server, TEXT, json!({"model": "base", "prompt": "[a]"})).await.status, StatusCode::OK);
    first.abort();
    assert!(first.await.is_err());
    assert_eq!(post(&server, TEXT, large).await.status, StatusCode::OK);
}

#[tokio::test]
async fn keys_are_asked_for_everywhere_but_at_probes() {
    let server = server();
    let long = format!("Bearer {}", "x".repeat(10_000));
    let guarded =
        ["/v1/models", "/v1/models/chat", "/v1/runs", "/v1/runs/sotu", "/v1/jobs", "/metrics", CHAT, TEXT];
    for path in guarded {
        let method = if [CHAT, TEXT].contains(&path) { "POST" } else { "GET" };
        for key in [None, Some("Bearer sk-wrong"), Some("Bearer "), Some("' OR '1'='1"), Some(long.as_str())]
        {
            let mut request = Request::builder().method(method).uri(path);
            if let Some(key) = key {
                request = request.header("authorization", key);
            }
            let answer = send(&server, request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path} {key:?}");
            assert_eq!(check_form(&answer)["code"], "invalid_api_key");
        }
    }
    let broken = Request::get("/v1/models").header("x-api-key", "sk-broken").body(Body::empty()).unwrap();
    let answer = send(&server, broken).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    check_form(&answer);
    let plain = Request::get("/v1/models").header("x-api-key", fake::KEY).body(Body::empty()).unwrap();
    assert_eq!(send(&server, plain).await.status, StatusCode::OK);
    for path in ["/health", "/health/live", "/health/ready", "/healthz", "/readyz", "/ping", "/version"] {
        let answer = send(&server, Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn names_that_are_no_models_are_not_found() {
    let server = server();
    for name in ["gpt-4", "../../etc/passwd", "", "chat\0", "a\nb", &"x".repeat(1 << 20)] {
        let answer = post(&server, TEXT, json!({"model": name, "prompt": "a"})).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        let error = check_form(&answer);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    }
    for path in ["/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/a/b/c", "/v1/models/%ff"] {
        let answer = get(&server, path).await;
        assert!(answer.status.is_client_error(), "{path}");
        check_form(&answer);
    }
}

#[tokio::test]
async fn unknown_routes_and_methods_answer_in_form() {
    let server = server();
    for (method, path, status) in [
        ("GET", "/v1/unknown", StatusCode::NOT_FOUND),
        ("POST", "/", StatusCode::NOT_FOUND),
        ("GET", "/v2", StatusCode::NOT_FOUND),
        ("GET", CHAT, StatusCode::METHOD_NOT_ALLOWED),
        ("DELETE", "/v1/models", StatusCode::METHOD_NOT_ALLOWED),
        ("BREW", "/health", StatusCode::METHOD_NOT_ALLOWED),
    ] {
        let request = authorized(path).method(method).body(Body::empty()).unwrap();
        let answer = send(&server, request).await;
        assert_eq!(answer.status, status, "{method} {path}");
        check_form(&answer);
        if status == StatusCode::METHOD_NOT_ALLOWED {
            assert!(!answer.header("allow").is_empty(), "{method} {path}");
        }
    }
}

#[tokio::test]
async fn foreign_hosts_and_origins_get_nothing() {
    let limits = Limits { cors_origins: vec!["https://ui.example".into()], ..Limits::default() };
    let server = app(fake::state(limits, Duration::ZERO));
    for path in ["/v1/models", "/", "/metrics"] {
        let request = authorized(path).header("host", "evil.example").body(Body::empty()).unwrap();
        let answer = send(&server, request).await;
        assert_eq!(answer.status, StatusCode::MISDIRECTED_REQUEST, "{path}");
        check_form(&answer);
    }
    let probe = Request::get("/health/live").header("host", "pod.cluster").body(Body::empty()).unwrap();
    assert_eq!(send(&server, probe).await.status, StatusCode::OK);
    let asks = |origin: &str| {
        Request::options(CHAT)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .body(Body::empty())
            .unwrap()
    };
    let evil = send(&server, asks("https://evil.example")).await;
    assert_eq!(evil.header("access-control-allow-origin"), "");
    let listed = send(&server, asks("https://ui.example")).await;
    assert_eq!(listed.status, StatusCode::NO_CONTENT);
    assert_eq!(listed.header("access-control-allow-origin"), "https://ui.example");
}

#[tokio::test]
async fn a_full_queue_and_a_draining_server_say_when_to_come_back() {
    let state = fake::state(Limits::default(), Duration::from_millis(20));
    let server = app(state.clone());
    let endless =
        json!({"model": "base", "prompt": "x", "max_tokens": 4000, "stream": true, "ignore_eos": true});
    let mut running = Vec::new();
    let refusal = loop {
        let request = authorized(TEXT).method("POST").header("content-type", "application/json");
        let request = request.body(Body::from(endless.to_string())).unwrap();
        let response = tower::ServiceExt::oneshot(server.clone(), request).await.unwrap();
        if response.status() != StatusCode::OK {
            break response;
        }
        running.push(response);
        assert!(running.len() < 100, "the queue has no end");
    };
    assert_eq!(refusal.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = refusal.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait));
    assert_eq!(get(&server, "/health/ready").await.status, StatusCode::OK, "busy is not broken");
    drop(running);

    state.lifecycle.start_draining();
    let answer = post(&server, TEXT, json!({"model": "base", "prompt": "[a]"})).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(!answer.header("retry-after").is_empty());
    check_form(&answer);
    assert_eq!(get(&server, "/health/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&server, "/health/live").await.status, StatusCode::OK);
}
