//! Reading a request's body: bounded in size, time and memory before anything looks into it.

use axum::body::Body;
use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;

use crate::error::{ApiError, Result};
use crate::json;
use crate::limits::Limits;
use crate::state::AppState;

/// Reads the body as one JSON object and does `work` on it: on this thread if it is small, else on a blocking thread,
/// so that probes and running streams go on while a long prompt is tokenized.
pub(crate) async fn read<T: Send + 'static>(
    state: &AppState,
    request: Request,
    work: impl FnOnce(Map<String, Value>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (_, bytes, permit) = read_bytes(state, request).await?;
    let all = move || work(json::parse_object(&bytes)?);
    let Some(permit) = permit else { return all() };
    // The bytes count against the memory for large bodies until the work is done, and the work waits for its turn.
    let turn = state.heavy.clone().acquire_owned().await.map_err(ApiError::internal)?;
    let done = tokio::task::spawn_blocking(move || {
        let result = all();
        drop((turn, permit));
        result
    });
    done.await.map_err(|e| ApiError::internal(format!("reading the body failed: {e}")))?
}

/// Reads the body. A large one comes with a permit for its place in memory.
pub(crate) async fn read_bytes(
    state: &AppState,
    request: Request,
) -> Result<(Parts, Vec<u8>, Option<OwnedSemaphorePermit>)> {
    if state.lifecycle.is_draining() {
        return Err(ApiError::Draining);
    }
    let limits = &state.limits;
    let (parts, body) = request.into_parts();
    check_headers(&parts.headers, limits)?;
    let collected = tokio::time::timeout(limits.body_time_max, collect(state, body)).await;
    let (bytes, permit) = collected.map_err(|_| ApiError::BodyTimeout(limits.body_time_max))??;
    Ok((parts, bytes, permit))
}

fn check_headers(headers: &HeaderMap, limits: &Limits) -> Result<()> {
    let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    if let Some(encoding) = text(header::CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")) {
        return Err(ApiError::ContentEncoding(encoding));
    }
    let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::ContentType(content_type));
    }
    let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<usize>().ok());
    if length.is_some_and(|length| length > limits.body_bytes_max) {
        return Err(ApiError::BodyTooLarge { limit: limits.body_bytes_max });
    }
    Ok(())
}

async fn collect(state: &AppState, body: Body) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>)> {
    let limits = &state.limits;
    let mut frames = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut permit = None;
    while let Some(frame) = frames.next().await {
        let frame = frame.map_err(|_| ApiError::BodyBroken)?;
        let n_bytes = bytes.len() + frame.len();
        if n_bytes > limits.body_bytes_max {
            return Err(ApiError::BodyTooLarge { limit: limits.body_bytes_max });
        }
        if permit.is_none() && n_bytes > limits.heavy_body_bytes {
            permit = Some(state.large_bodies.clone().try_acquire_owned().map_err(|_| {
                // Bodies arrive within seconds, so a place is free soon.
                ApiError::QueueFull { retry_after: std::time::Duration::from_secs(1) }
            })?);
        }
        bytes.extend_from_slice(&frame);
    }
    Ok((bytes, permit))
}
