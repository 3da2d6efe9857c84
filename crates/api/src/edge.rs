//! What happens to every request and answer: ids, accounting, host and origin checks, security headers.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use telemetry::{HttpMetrics, request_span};
use tokio::time::Instant;
use tracing::{Instrument, Span};

use crate::error::ApiError;
use crate::generate::random_id;
use crate::openapi;
use crate::state::{AppState, InFlight};

/// OpenAI's date of the API's last breaking change; some SDKs look for it.
const OPENAI_VERSION: &str = "2020-10-01";

/// Outermost: gives the request an id and a span, and counts it when the last byte of its answer is sent.
pub(crate) async fn account(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = match random_id("req") {
        Ok(id) => id,
        Err(error) => return error.into_response(),
    };
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = openapi::template(matched.unwrap_or_default());
    let in_flight = (!openapi::is_probe(route)).then(|| state.lifecycle.enter());
    let span = request_span(&id);
    let method = request.method().clone();
    let mut response = next.run(request).instrument(span.clone()).await;
    let record = Record {
        metrics: state.metrics.http(),
        route,
        method,
        status: response.status(),
        started,
        span,
        _in_flight: in_flight,
    };
    let headers = response.headers_mut();
    headers.insert("x-request-id", HeaderValue::from_str(&id).expect("an id is hexadecimal"));
    let took_ms = started.elapsed().as_millis() as u64;
    headers.insert("openai-processing-ms", HeaderValue::from(took_ms));
    headers.insert("openai-version", HeaderValue::from_static(OPENAI_VERSION));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response.map(|body| Body::new(Guarded { body, _guard: record }))
}

/// Written down when dropped, which is when the answer is sent or the client gone.
struct Record {
    metrics: HttpMetrics,
    route: &'static str,
    method: Method,
    status: StatusCode,
    started: Instant,
    span: Span,
    _in_flight: Option<InFlight>,
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.metrics.answered(self.route, self.method.as_str(), self.status.as_u16(), took);
        let _entered = self.span.enter();
        let (status, ms) = (self.status.as_u16(), took.as_millis() as u64);
        if openapi::is_probe(self.route) {
            tracing::trace!(method = %self.method, route = self.route, status, ms, "answered");
        } else {
            tracing::info!(method = %self.method, route = self.route, status, ms, "answered");
        }
    }
}

/// A body that keeps something alive until it is sent or dropped.
pub(crate) struct Guarded<G> {
    pub(crate) body: Body,
    pub(crate) _guard: G,
}

impl<G: Unpin> HttpBody for Guarded<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Refuses requests that came under a name this server is not known by: a page whose name was rebound to a local
/// address gets nothing, not even the console. Addresses cannot be rebound, so they pass.
pub(crate) async fn check_host(State(state): State<AppState>, request: Request, next: Next) -> Response {
    match foreign_host(request.headers(), &state.limits.hosts) {
        Some(host) => ApiError::Host(host).into_response(),
        None => next.run(request).await,
    }
}

fn foreign_host(headers: &HeaderMap, allowed: &[String]) -> Option<String> {
    let mut hosts = headers.get_all(header::HOST).iter();
    // HTTP/1.0 has no Host, and no browser speaks it.
    let host = String::from_utf8_lossy(hosts.next()?.as_bytes()).into_owned();
    if hosts.next().is_some() {
        return Some(host);
    }
    let name = host_name(&host).to_ascii_lowercase();
    let known = name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<std::net::IpAddr>().is_ok()
        || allowed.iter().any(|a| a == "*" || a.eq_ignore_ascii_case(&name));
    (!known).then_some(host)
}

/// The host without its port and brackets.
fn host_name(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => host.rsplit_once(':').map_or(host, |(name, port)| {
            let is_port = port.bytes().all(|b| b.is_ascii_digit());
            if is_port { name } else { host }
        }),
    }
}

/// Answers browsers' questions about other origins: only those on the list may call.
pub(crate) async fn allow_origins(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let listed =
        |origin: &HeaderValue| state.limits.cors_origins.iter().any(|o| o.as_bytes() == origin.as_bytes());
    let Some(origin) = origin.filter(listed) else { return next.run(request).await };
    let asks = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if asks { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    let mut set = |name: HeaderName, value| headers.insert(name, HeaderValue::from_static(value));
    if asks {
        set(header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE, OPTIONS");
        set(header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, content-type, x-api-key");
        set(header::ACCESS_CONTROL_MAX_AGE, "600");
    } else {
        set(header::ACCESS_CONTROL_EXPOSE_HEADERS, "x-request-id, retry-after");
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_hosts_pass() {
        let allowed = ["loquat.example".to_owned()];
        let passes = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            foreign_host(&headers, &allowed).is_none()
        };
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "[::1]",
            "10.0.0.7",
            "Loquat.example:80",
        ] {
            assert!(passes(host), "{host}");
        }
        for host in
            ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", ""]
        {
            assert!(!passes(host), "{host}");
        }
        assert!(foreign_host(&HeaderMap::new(), &allowed).is_none());
    }
}
