//! A job's log, whole lines at a time, to its end or as it grows.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Query, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::Deserialize;
use serde_json::json;

use super::{LogPiece, Owner, Segment, allowed, segment};
use crate::error::{ApiError, Result};
use crate::state::{AppState, Role};

/// Of a log, in one answer or event.
const LOG_BYTES_MAX: usize = 64 << 10;
/// How often a log that is followed is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(300);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogQuery {
    #[serde(default)]
    follow: bool,
}

/// `GET /v1/jobs/{name}/logs`: plain text, or events of `{"text": …}` whose ids a client that comes back sends as
/// `Last-Event-ID`, and `[DONE]` at the end.
pub(crate) async fn logs(
    State(state): State<AppState>,
    Extension(owner): Owner,
    name: Segment<String>,
    query: std::result::Result<Query<LogQuery>, axum::extract::rejection::QueryRejection>,
    request: Request,
) -> Result<Response> {
    allowed(&owner, (Role::Member, "read a job's log"))?;
    let name = segment("job", name)?;
    let Query(query) = query.map_err(|error| ApiError::invalid("follow", error.body_text()))?;
    let last = request.headers().get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let first = piece(&state, &name, last).await?;
    if !query.follow {
        let text = String::from_utf8_lossy(&first.bytes).into_owned();
        return Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response());
    }
    let following = Following { state, name, pending: [first].into(), silent: Duration::ZERO };
    let events = stream::unfold(Some(following), |following| async { following?.next().await });
    let headers = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")];
    Ok((headers, Body::from_stream(events)).into_response())
}

async fn piece(state: &AppState, name: &str, from: Option<u64>) -> Result<LogPiece> {
    let (cluster, name) = (state.cluster.clone(), name.to_owned());
    let read = move || cluster.log(&name, from, LOG_BYTES_MAX);
    let piece = tokio::task::spawn_blocking(read).await.map_err(ApiError::internal)??;
    Ok(whole_lines(piece))
}

/// What is not a whole line yet comes with the next piece, so that no character is cut in two; unless there is none, or the
/// line is longer than a piece.
fn whole_lines(mut piece: LogPiece) -> LogPiece {
    if piece.is_over && piece.bytes.len() < LOG_BYTES_MAX {
        return piece;
    }
    match piece.bytes.iter().rposition(|byte| *byte == b'\n') {
        Some(at) => {
            piece.next -= (piece.bytes.len() - at - 1) as u64;
            piece.bytes.truncate(at + 1);
        }
        None if piece.bytes.len() < LOG_BYTES_MAX => {
            piece.next -= piece.bytes.len() as u64;
            piece.bytes.clear();
        }
        None => {}
    }
    piece
}

/// A client that follows a log.
struct Following {
    state: AppState,
    name: String,
    /// Read and not sent yet.
    pending: VecDeque<LogPiece>,
    /// Since anything was sent.
    silent: Duration,
}

type Step = (std::result::Result<Bytes, Infallible>, Option<Following>);

impl Following {
    /// The next event and what follows it; after `[DONE]`, nothing.
    async fn next(mut self) -> Option<Step> {
        let mut from = None;
        loop {
            let piece = match self.pending.pop_front() {
                Some(piece) => piece,
                None => match piece(&self.state, &self.name, from).await {
                    Ok(piece) => piece,
                    Err(error) => return Some((Ok(event(None, &error.body().to_string())), None)),
                },
            };
            from = Some(piece.next);
            if !piece.bytes.is_empty() {
                let text = String::from_utf8_lossy(&piece.bytes);
                let event = event(from, &json!({ "text": text }).to_string());
                self.silent = Duration::ZERO;
                // Where to go on is kept as a piece without bytes.
                let at = LogPiece { bytes: Vec::new(), is_over: false, ..piece };
                self.pending.push_back(at);
                return Some((Ok(event), Some(self)));
            }
            if piece.is_over || self.state.lifecycle.is_draining() {
                return Some((Ok(Bytes::from_static(b"data: [DONE]\n\n")), None));
            }
            tokio::time::sleep(FOLLOW_EVERY).await;
            self.silent += FOLLOW_EVERY;
            if self.silent >= self.state.limits.keep_alive {
                self.silent = Duration::ZERO;
                self.pending.push_back(piece);
                return Some((Ok(Bytes::from_static(b": \n\n")), Some(self)));
            }
        }
    }
}

fn event(id: Option<u64>, data: &str) -> Bytes {
    let id = id.map_or(String::new(), |id| format!("id: {id}\n"));
    format!("{id}data: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_ends_with_a_line() {
        let check = |bytes: &str, is_over, expected: &str| {
            let piece = LogPiece { bytes: bytes.into(), next: 100, is_over };
            let got = whole_lines(piece);
            assert_eq!(got.bytes, expected.as_bytes());
            assert_eq!(got.next, 100 - (bytes.len() - expected.len()) as u64);
        };
        check("a\nb\n", false, "a\nb\n");
        check("a\nb", false, "a\n");
        check("a\nb", true, "a\nb");
        check("b", false, "");
        check(&"x".repeat(LOG_BYTES_MAX), false, &"x".repeat(LOG_BYTES_MAX));
    }
}
