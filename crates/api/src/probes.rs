//! Probes and metrics. Probes ask only atomics and a mutex the engine never holds while it computes.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::Health;
use serde_json::json;

use crate::state::AppState;

/// The process runs and its event loop turns.
pub(crate) async fn live() -> Response {
    Json(json!({"status": "ok"})).into_response()
}

/// The server can take requests: everything is loaded, no engine has failed, it is not shutting down.
pub(crate) async fn health(State(state): State<AppState>) -> Response {
    let status = match state.models.list().iter().find_map(|model| trouble(&model.engine.health())) {
        _ if state.lifecycle.is_draining() => "draining",
        _ if !state.lifecycle.is_ready() => "loading",
        Some(trouble) => trouble,
        None => "ok",
    };
    let code = if status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"status": status}))).into_response()
}

fn trouble(health: &Health) -> Option<&'static str> {
    match health {
        Health::Ready => None,
        Health::Draining => Some("draining"),
        Health::Stalled(_) => Some("stalled"),
        Health::Failed(_) => Some("failed"),
    }
}

pub(crate) async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    ([(header::CONTENT_TYPE, telemetry::CONTENT_TYPE)], state.metrics.render()).into_response()
}
