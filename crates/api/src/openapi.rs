//! What there is to ask, as data: the words that label metrics, and `GET /openapi.json` for those who generate clients.

use axum::Json;
use serde_json::{Map, Value, json};

/// Who may ask.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// Anybody; answered whatever else the server does.
    Probe,
    /// Anybody.
    Open,
    /// Whoever has a key; what steers the cluster needs its role.
    Key,
}

use Access::{Key, Open, Probe};

/// Method, path as the router has it, access, and what it does.
type Operation = (&'static str, &'static str, Access, &'static str);

const OPERATIONS: &[Operation] = &[
    (
        "post",
        "/v1/chat/completions",
        Key,
        "An answer to a chat, as OpenAI's API has it; streamed as events if asked.",
    ),
    (
        "post",
        "/v1/completions",
        Key,
        "A text continued, as OpenAI's API has it; streamed as events if asked.",
    ),
    ("post", "/v1/embeddings", Key, "Texts as vectors, as OpenAI's API has it."),
    ("get", "/v1/models", Key, "All models that are served here or by replicas."),
    ("get", "/v1/models/{*id}", Key, "One model."),
    ("post", "/v1/load_lora_adapter", Key, "Load an adapter beside its model, where that is allowed."),
    ("post", "/v1/unload_lora_adapter", Key, "Take an adapter out."),
    ("post", "/tokenize", Key, "A text, or a chat through its template, as ids."),
    ("post", "/detokenize", Key, "Ids as text."),
    ("get", "/v1/runs", Key, "Training runs, with how far they are."),
    ("get", "/v1/runs/{name}", Key, "One run, with its curves."),
    ("get", "/v1/jobs", Key, "Jobs, and what each waits for. Members."),
    ("post", "/v1/jobs", Key, "Submit a command line as a job. Admins only."),
    ("get", "/v1/jobs/{name}", Key, "One job. Members."),
    ("get", "/v1/jobs/{name}/logs", Key, "What a job wrote; `?follow=true` goes on as events. Members."),
    ("post", "/v1/jobs/{name}/{order}", Key, "`cancel` or `retry` a job. Members."),
    ("get", "/v1/nodes", Key, "Nodes: what they have, what is used, how they are. Members."),
    (
        "post",
        "/v1/nodes/{name}/{order}",
        Key,
        "`drain`, `cordon`, `uncordon` or `forget` a node. Admins only.",
    ),
    ("get", "/v1/deployments", Key, "Models that replicas serve. Members."),
    ("get", "/v1/deployments/{model}", Key, "One of them. Members."),
    ("post", "/v1/deployments/{model}", Key, "Serve a model by replicas, or change how. Admins only."),
    ("delete", "/v1/deployments/{model}", Key, "Stop serving a model. Admins only."),
    (
        "post",
        "/v1/deployments/{model}/{order}",
        Key,
        "Try a version on a share of the requests (`canary`), `promote` or `rollback` it. Admins only.",
    ),
    ("get", "/v1/promotions", Key, "Models on their way from training to users. Members."),
    ("get", "/v1/projects", Key, "Projects and their quotas. Members."),
    ("post", "/v1/projects/{name}", Key, "Set a project's quota. Admins only."),
    ("delete", "/v1/projects/{name}", Key, "Forget a project's quota. Admins only."),
    ("get", "/v1/replicas", Key, "Replicas as this gateway sees them."),
    ("get", "/metrics", Key, "Metrics as Prometheus reads them."),
    ("get", "/openapi.json", Open, "This description."),
    ("get", "/health", Probe, "Whether requests can be taken."),
    ("get", "/health/live", Probe, "Whether the process runs."),
    ("get", "/health/ready", Probe, "Whether requests can be taken."),
    ("get", "/healthz", Probe, "Whether the process runs."),
    ("get", "/readyz", Probe, "Whether requests can be taken."),
    ("get", "/ping", Probe, "Whether the process runs."),
    ("get", "/version", Probe, "The server's version."),
];

/// A path's template as a word that is safe as a metric label.
pub(crate) fn template(matched: &str) -> &'static str {
    OPERATIONS.iter().find(|operation| operation.1 == matched).map_or("console", |operation| operation.1)
}

pub(crate) fn is_probe(template: &str) -> bool {
    OPERATIONS.iter().any(|operation| operation.1 == template && operation.2 == Probe)
}

/// `GET /openapi.json`.
pub(crate) async fn describe() -> Json<Value> {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = operation.1.replace('*', "");
        paths.entry(path).or_insert_with(|| json!({}))[operation.0] = described(operation);
    }
    Json(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Loquat",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What OpenAI's API has, by its names; beside it the cluster that serves and trains.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": {
                "description": "What went wrong, in OpenAI's form.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            }},
            "schemas": {"Error": {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {
                    "type": "object",
                    "required": ["message", "type"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    },
                }},
            }},
        },
    }))
}

fn described((method, path, access, about): &Operation) -> Value {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let names: Vec<&str> = names.map(|name| name.trim_start_matches('*')).collect();
    let parameter =
        |name: &&str| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}});
    let mut found = json!({
        "summary": about,
        "parameters": names.iter().map(parameter).collect::<Vec<_>>(),
        "security": if *access == Key { json!([{"key": []}]) } else { json!([]) },
        "responses": {"200": {"description": "Done."}, "default": {"$ref": "#/components/responses/Error"}},
    });
    // An order says all with its name, but for a trial's.
    if *method == "post" && (!path.ends_with("{order}") || path.contains("deployments")) {
        found["requestBody"] = json!({
            "required": !path.ends_with("{order}"),
            "content": {"application/json": {"schema": {"type": "object"}}},
        });
    }
    found
}
