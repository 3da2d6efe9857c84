//! Calls the router without a socket.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use serde_json::Value;
use tower::ServiceExt;

use crate::fake::KEY;

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The JSON of all events but `[DONE]`, which must be last.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{:?}", self.body);
        assert!(self.header("content-type").starts_with("text/event-stream"));
        let text = std::str::from_utf8(&self.body).unwrap();
        let mut events: Vec<&str> =
            text.split_terminator("\n\n").filter(|event| !event.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events
            .iter()
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

pub(crate) async fn send(app: &Router, request: Request<Body>) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    Answer { status: parts.status, headers: parts.headers, body }
}

pub(crate) async fn get(app: &Router, path: &str) -> Answer {
    send(app, authorized(path).body(Body::empty()).unwrap()).await
}

pub(crate) async fn post(app: &Router, path: &str, body: Value) -> Answer {
    post_bytes(app, path, body.to_string().into_bytes()).await
}

pub(crate) async fn post_bytes(app: &Router, path: &str, body: Vec<u8>) -> Answer {
    let request = authorized(path).method("POST").header("content-type", "application/json");
    send(app, request.body(body.into()).unwrap()).await
}

pub(crate) fn authorized(path: &str) -> axum::http::request::Builder {
    Request::builder().uri(path).header("authorization", format!("Bearer {KEY}"))
}
