//! Answers against the component schemas of the OpenAI specification: required fields, types, enums, nullability.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use api::{Limits, app};
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::fake;

struct Specification(Value);

impl Specification {
    /// The specification lies beside the repository; without it there is nothing to check against.
    fn load() -> Option<Specification> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/openai-openapi-2.3.0.json");
        match std::fs::read(&path) {
            Ok(bytes) => Some(Specification(serde_json::from_slice(&bytes).unwrap())),
            Err(error) => {
                eprintln!("SKIPPED: no OpenAI specification at {}: {error}", path.display());
                None
            }
        }
    }

    fn check(&self, name: &str, value: &Value) {
        let schema = &self.0["components"]["schemas"][name];
        assert!(schema.is_object(), "no schema {name}");
        let mut problems = Vec::new();
        self.validate(schema, value, name, &mut problems);
        assert!(problems.is_empty(), "{problems:#?}\n{value:#}");
    }

    fn validate(&self, schema: &Value, value: &Value, at: &str, problems: &mut Vec<String>) {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.rsplit('/').next().unwrap();
            return self.validate(&self.0["components"]["schemas"][name], value, at, problems);
        }
        if value.is_null() && schema["nullable"] == true {
            return;
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(options) = schema[key].as_array() {
                let fits = |option: &Value| {
                    let mut inner = Vec::new();
                    self.validate(option, value, at, &mut inner);
                    inner.is_empty()
                };
                if !options.iter().any(fits) {
                    problems.push(format!("{at}: fits none of {key}"));
                }
            }
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.validate(part, value, at, problems);
        }
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            problems.push(format!("{at}: {value} is none of {allowed:?}"));
        }
        if !fits_type(&schema["type"], value) {
            problems.push(format!("{at}: {value} is not {}", schema["type"]));
        }
        self.validate_inside(schema, value, at, problems);
    }

    fn validate_inside(&self, schema: &Value, value: &Value, at: &str, problems: &mut Vec<String>) {
        if let Some(map) = value.as_object() {
            for name in schema["required"].as_array().into_iter().flatten() {
                if !map.contains_key(name.as_str().unwrap()) {
                    problems.push(format!("{at}: {name} is missing"));
                }
            }
            for (name, inner) in map {
                let property = &schema["properties"][name];
                if property.is_object() {
                    self.validate(property, inner, &format!("{at}.{name}"), problems);
                }
            }
        }
        for (index, inner) in value.as_array().into_iter().flatten().enumerate() {
            if schema["items"].is_object() {
                self.validate(&schema["items"], inner, &format!("{at}[{index}]"), problems);
            }
        }
    }
}

fn fits_type(wanted: &Value, value: &Value) -> bool {
    let fits = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "null" => value.is_null(),
        other => panic!("unknown type {other}"),
    };
    match wanted {
        Value::String(name) => fits(name),
        Value::Array(names) => names.iter().any(|name| fits(name.as_str().unwrap())),
        _ => true,
    }
}

#[tokio::test]
async fn answers_have_the_shapes_of_the_specification() {
    let Some(specification) = Specification::load() else { return };
    let state = fake::state(Limits::default(), Duration::ZERO);
    let server = app(crate::embeddings::with_counter(state));
    let chat = json!({"model": "chat", "messages": [{"role": "user", "content": "[hé]"}], "n": 2,
        "logprobs": true, "top_logprobs": 2});
    // Without echo: the schema has no null for the first token of a scored prompt, which OpenAI sends.
    let text = json!({"model": "base", "prompt": ["[a]", "[b]"], "logprobs": 2});
    let streamed = |mut body: Value| {
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        body
    };
    let calls = json!({"model": "random", "messages": [{"role": "user", "content": "x"}], "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "one"}}, {"type": "function", "function": {"name": "two"}}]});
    for request in [chat, calls] {
        let answer = post(&server, "/v1/chat/completions", request.clone()).await.json();
        specification.check("CreateChatCompletionResponse", &answer);
        assert_eq!(answer["choices"][0]["message"]["tool_calls"].is_array(), request["tools"].is_array());
        for mut chunk in post(&server, "/v1/chat/completions", streamed(request)).await.events() {
            // The schema forgets what its description says: null in all chunks but the last.
            if chunk["usage"].is_null() {
                chunk.as_object_mut().unwrap().remove("usage");
            }
            specification.check("CreateChatCompletionStreamResponse", &chunk);
        }
    }
    let answer = post(&server, "/v1/completions", text.clone()).await.json();
    specification.check("CreateCompletionResponse", &answer);
    let models = get(&server, "/v1/models").await.json();
    specification.check("ListModelsResponse", &models);
    let embedding = json!({"model": "counter", "input": ["a", "b"]});
    specification.check("CreateEmbeddingResponse", &post(&server, "/v1/embeddings", embedding).await.json());
    let refusal = post(&server, "/v1/completions", json!({})).await.json();
    specification.check("ErrorResponse", &refusal);
    let known: BTreeSet<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
    assert!(known.is_superset(&["id", "object", "created", "model", "choices", "usage"].into()));
}
