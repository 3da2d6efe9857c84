//! The way of a sentence, walked once: text files to an answer over HTTP.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Client, Running, chat_model, loquat, speeches, succeed};

/// The demo on the small fixture text, on a free port.
pub(crate) fn demo(home: &Path, steps: u32) -> Command {
    let mut command = loquat(home);
    command.args([
        "demo",
        "--port",
        "0",
        "--threads",
        "2",
        "--checkpoint-every",
        "3",
        "--steps",
        &steps.to_string(),
    ]);
    command.arg("--text").arg(speeches());
    if let Some(model) = chat_model() {
        command.arg("--chat-model").arg(model);
    }
    command
}

#[test]
fn from_text_to_an_answer_and_again() {
    let home = tempfile::tempdir().unwrap();
    let mut first = Running::start(&mut demo(home.path(), 6));
    let client = first.client();
    the_trained_model_answers(&client);
    the_curve_and_the_metrics_are_there(&client);
    only_keys_open_it(&client);
    if chat_model().is_some() {
        the_chat_model_answers(&client);
    }
    assert_eq!(first.stop(), Some(0));

    let start = Instant::now();
    let mut second = Running::start(&mut demo(home.path(), 6));
    let again = second.client();
    assert!(start.elapsed() < Duration::from_secs(20), "a second start took {:?}", start.elapsed());
    assert_eq!(again.key, client.key, "the key that was printed must go on working");
    the_trained_model_answers(&again);
    assert_eq!(second.stop(), Some(0));

    succeed(home.path(), &["model", "rm", "sotu"]);
    assert!(!succeed(home.path(), &["model", "list"]).contains("sotu"));
    assert!(!home.path().join("store/models/sotu/manifest.json").exists(), "it would be served again");
}

fn the_trained_model_answers(client: &Client) {
    let models = client.get_json("/v1/models");
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert!(ids.contains(&"sotu"), "{ids:?}");
    let request = json!({"model": "sotu", "prompt": "My fellow Americans", "max_tokens": 12, "seed": 1});
    let answer = client.post_json("/v1/completions", &request);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(!text.trim().is_empty(), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 12, "{answer}");
    assert_eq!(
        answer,
        strip_ids(client.post_json("/v1/completions", &request), &answer),
        "same seed, same text"
    );
    let chat = json!({"model": "sotu", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5});
    assert_eq!(client.post_json("/v1/chat/completions", &chat)["object"], "chat.completion");
}

/// The second answer with the first one's id and times, so that the rest can be compared.
fn strip_ids(mut second: serde_json::Value, first: &serde_json::Value) -> serde_json::Value {
    for field in ["id", "created", "usage"] {
        second[field] = first[field].clone();
    }
    second
}

fn the_chat_model_answers(client: &Client) {
    let request = json!({
        "model": "smollm2-135m-instruct-q4_1",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 24, "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
    });
    let events = client.stream("/v1/chat/completions", &request);
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let usage = &events.last().unwrap()["usage"];
    assert!(usage["completion_tokens"].as_u64().unwrap() > 3, "{usage}");
}

fn the_curve_and_the_metrics_are_there(client: &Client) {
    let run = client.get_json("/v1/runs/sotu");
    let text = run.to_string();
    assert!(text.contains("bits_per_byte") && text.contains("\"loss\""), "{text}");
    let (status, metrics) = client.get("/metrics");
    assert_eq!(status, 200);
    for name in ["vllm:num_requests_running", "vllm:generation_tokens_total", "loquat_train_step"] {
        assert!(metrics.contains(name), "{name} is not among the metrics");
    }
}

fn only_keys_open_it(client: &Client) {
    let stranger = Client { key: "sk-loquat-wrong".into(), ..client.clone() };
    assert_eq!(stranger.get("/v1/models").0, 401);
    assert_eq!(stranger.get("/v1/runs").0, 401);
    for probe in ["/health/live", "/health/ready", "/health"] {
        assert_eq!(stranger.get(probe).0, 200, "{probe}");
    }
}
