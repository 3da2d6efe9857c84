//! A request's way to a replica and its answer's way back, byte for byte.
//!
//! A request that fails before the first byte of its answer is tried at another replica; after that never, because the
//! client has begun to read. A stream that breaks off ends with an error event, anything else with a broken connection: no
//! answer ever looks whole that is not.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use gateway::{Outcome, Prefix, Ticket};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use serde::Deserialize;
use telemetry::chain;
use tokio::time::Instant;

use super::{Known, Replicas, Route};
use crate::body;
use crate::error::{ApiError, Result};
use crate::generate::event;
use crate::state::{AppState, KeyOwner};

/// Replicas that one request is tried at.
const TRIES_MAX: usize = 3;
/// How long a request waits for a replica to come, which may have to be started first.
const WAIT_MAX: Duration = Duration::from_secs(60);
const WAIT_POLL: Duration = Duration::from_millis(20);
/// Requests that wait so for one model.
const WAITING_MAX: usize = 1_024;

/// Bytes in which the beginning of a prompt is looked for: a long search would hold up other requests.
const PREFIX_SEARCHED: usize = 16 << 10;

/// What of an answer's head the client gets to see.
const HEADERS: [header::HeaderName; 3] = [header::CONTENT_TYPE, header::CACHE_CONTROL, header::RETRY_AFTER];

/// As much of a request as routing needs.
#[derive(Deserialize)]
struct Asked {
    model: String,
}

impl Asked {
    /// `None` for what is no request; the handler will say why.
    fn read(bytes: &[u8]) -> Option<Asked> {
        serde_json::from_slice(bytes).ok()
    }
}

/// The beginnings of a request's prompt, from its text as it was sent: a client sends what it sent before in the same
/// words. Where the key stands inside of something else, only a cache hit is lost.
fn prefix(tenant: &str, bytes: &[u8]) -> Prefix {
    let head = &bytes[..bytes.len().min(PREFIX_SEARCHED)];
    let at = |key: &[u8]| head.windows(key.len()).position(|window| window == key);
    let start = at(b"\"messages\"").or_else(|| at(b"\"prompt\"")).unwrap_or(bytes.len());
    Prefix::of(tenant, &bytes[start..])
}

/// In front of the handlers that generate: requests for models that others serve go there.
pub(crate) async fn forward(
    State(state): State<AppState>,
    Extension(owner): Extension<KeyOwner>,
    request: Request,
    next: Next,
) -> Result<Response> {
    if state.replicas.is_empty() {
        return Ok(next.run(request).await);
    }
    let (parts, bytes, permit) = body::read_bytes(&state, request).await?;
    let bytes = Bytes::from(bytes);
    let found = Asked::read(&bytes).and_then(|asked| {
        let route = state.replicas.route(&asked.model)?;
        Some((route, prefix(&owner.id, &bytes)))
    });
    let Some((route, prefix)) = found else {
        drop(permit);
        return Ok(next.run(Request::from_parts(parts, Body::from(bytes))).await);
    };
    let path = parts.uri.path().to_owned();
    let sending = Sending { replicas: state.replicas.clone(), route, path, bytes, tenant: owner.id };
    let answer = sending.send(&prefix).await;
    drop(permit);
    answer
}

/// A request until its answer begins.
struct Sending {
    replicas: Replicas,
    route: Arc<Route>,
    path: String,
    bytes: Bytes,
    tenant: String,
}

/// Why one try came to nothing.
enum Miss {
    Failed(String),
    /// Not the replica's fault; with its own words for the client.
    Busy,
}

impl Sending {
    async fn send(&self, prefix: &Prefix) -> Result<Response> {
        self.route.last_asked_ms.store(self.replicas.now_ms(), Ordering::Relaxed);
        let mut tried = Vec::new();
        let mut last = Miss::Failed("no replica is well".to_owned());
        while tried.len() < TRIES_MAX {
            let ticket = match self.pick(prefix, &tried) {
                Some(ticket) => ticket,
                // Others were asked: their word is better than waiting.
                None if !tried.is_empty() => break,
                None => self.wait_for_one(prefix).await?,
            };
            tried.push(ticket.name.clone());
            match self.attempt(Flight::new(self, ticket)).await {
                Ok(response) => return Ok(response),
                Err(miss) => last = miss,
            }
        }
        Err(match last {
            Miss::Busy => ApiError::QueueFull { retry_after: Duration::from_secs(1) },
            Miss::Failed(why) => ApiError::EngineDown(format!(
                "{}: {why}, after {} of its replicas were asked",
                self.route.model,
                tried.len()
            )),
        })
    }

    fn pick(&self, prefix: &Prefix, tried: &[String]) -> Option<Ticket> {
        self.route.router().pick(prefix, tried, self.replicas.now_ms())
    }

    /// A replica may be on its way: started because of this very request, or back after a crash.
    async fn wait_for_one(&self, prefix: &Prefix) -> Result<Ticket> {
        let waiting = Waiting::new(&self.route)?;
        let deadline = Instant::now() + WAIT_MAX;
        while Instant::now() < deadline {
            tokio::time::sleep(WAIT_POLL).await;
            if let Some(ticket) = self.pick(prefix, &[]) {
                drop(waiting);
                return Ok(ticket);
            }
        }
        Err(ApiError::EngineDown(format!("{}: no replica came within {WAIT_MAX:?}", self.route.model)))
    }

    /// One try: its answer from the first byte on, or why there is none.
    async fn attempt(&self, mut flight: Flight) -> std::result::Result<Response, Miss> {
        let failed = |flight: &mut Flight, why: String| {
            flight.outcome = Outcome::Failed;
            tracing::warn!(replica = flight.ticket.name, why, "a replica failed a request");
            Miss::Failed(why)
        };
        let Some(known) = self.route.known(&flight.ticket.name) else { return Err(Miss::Busy) };
        let request = match self.request(&known) {
            Ok(request) => request,
            Err(why) => return Err(failed(&mut flight, why)),
        };
        let answer = match self.replicas.ask(request).await {
            Ok(answer) => answer,
            Err(why) => return Err(failed(&mut flight, why)),
        };
        match answer.status() {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                flight.outcome = Outcome::Busy;
                return Err(Miss::Busy);
            }
            // Our key is refused, or it does not have the model: between us and it, not the client's doing.
            status @ (StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::BAD_GATEWAY
            | StatusCode::GATEWAY_TIMEOUT) => {
                return Err(failed(&mut flight, format!("it answered {status}")));
            }
            _ => {}
        }
        let (head, mut rest) = answer.into_parts();
        let first = match next_frame(&mut rest).await {
            Some(Ok(frame)) => Some(frame),
            Some(Err(error)) => return Err(failed(&mut flight, chain(&error))),
            None => None,
        };
        flight.began(head.status);
        let is_events = is_event_stream(&head.headers);
        let relayed = Relayed::new(first, rest, flight, is_events);
        let mut response = Response::new(Body::new(relayed));
        *response.status_mut() = head.status;
        for name in HEADERS {
            if let Some(value) = head.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        Ok(response)
    }

    fn request(&self, known: &Known) -> std::result::Result<Request, String> {
        let uri = format!("{}{}", known.target.url, self.path);
        let mut request = Request::post(uri).header(header::CONTENT_TYPE, "application/json");
        if let Some(bearer) = known.target.key.bearer(&self.tenant) {
            request = request.header(header::AUTHORIZATION, bearer);
        }
        // Cheap: the bytes are shared with the next try.
        request.body(Body::from(self.bytes.clone())).map_err(|error| error.to_string())
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let is = |value: &HeaderValue| value.as_bytes().starts_with(b"text/event-stream");
    headers.get(header::CONTENT_TYPE).is_some_and(is)
}

async fn next_frame(body: &mut Incoming) -> Option<std::result::Result<Frame<Bytes>, hyper::Error>> {
    std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await
}

/// Counts a request that waits.
struct Waiting(Arc<Route>);

impl Waiting {
    fn new(route: &Arc<Route>) -> Result<Waiting> {
        let waiting = Waiting(route.clone());
        if route.n_waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_MAX {
            return Err(ApiError::QueueFull { retry_after: Duration::from_secs(5) });
        }
        Ok(waiting)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.n_waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request at a replica. However it ends, the router learns of it, when this is dropped.
struct Flight {
    replicas: Replicas,
    route: Arc<Route>,
    ticket: Ticket,
    started: Instant,
    /// Until something else is seen: the client went away.
    outcome: Outcome,
    /// To the first byte.
    ms: f64,
}

impl Flight {
    fn new(sending: &Sending, ticket: Ticket) -> Flight {
        let (replicas, route) = (sending.replicas.clone(), sending.route.clone());
        Flight { replicas, route, ticket, started: Instant::now(), outcome: Outcome::Nothing, ms: 0.0 }
    }

    /// The answer begins. A failure of the replica's own is known already; anything else is as good as its end.
    fn began(&mut self, status: StatusCode) {
        self.ms = self.started.elapsed().as_secs_f64() * 1e3;
        if status.is_server_error() {
            self.outcome = Outcome::Failed;
        }
    }

    fn ended_well(&mut self) {
        if self.outcome != Outcome::Failed {
            self.outcome = Outcome::Answered { ms: self.ms };
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let now_ms = self.replicas.now_ms();
        self.route.last_asked_ms.store(now_ms, Ordering::Relaxed);
        self.route.router().finish(&self.ticket, self.outcome, now_ms);
        if let (Outcome::Answered { .. }, Some(known)) = (self.outcome, self.route.known(&self.ticket.name)) {
            known.last_well_ms.store(now_ms, Ordering::Relaxed);
        }
    }
}

/// An answer on its way to the client.
struct Relayed {
    first: Option<Frame<Bytes>>,
    rest: Incoming,
    flight: Flight,
    is_events: bool,
    /// Bytes to come, where the replica said how many: the client is told, too, and needs no packet more for the end.
    n_left: Option<u64>,
    ended: bool,
}

impl Relayed {
    fn new(first: Option<Frame<Bytes>>, rest: Incoming, flight: Flight, is_events: bool) -> Relayed {
        let n_first = first.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        let n_left = rest.size_hint().exact().map(|n| n + n_first);
        Relayed { first, rest, flight, is_events, n_left, ended: false }
    }

    /// A frame goes to the client. With the last byte of those that were promised the answer is whole: nobody may ask for
    /// an end behind it.
    fn passed(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let n = frame.data_ref().map_or(0, Bytes::len) as u64;
        self.n_left = self.n_left.map(|left| left.saturating_sub(n));
        if self.n_left == Some(0) {
            self.ended = true;
            self.flight.ended_well();
        }
        frame
    }
}

impl HttpBody for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(self.passed(first))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let frame = match Pin::new(&mut self.rest).poll_frame(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(frame) => frame,
        };
        match frame {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(self.passed(frame)))),
            Some(Err(error)) => {
                self.ended = true;
                self.flight.outcome = Outcome::Failed;
                let why = format!("replica {} broke off: {}", self.flight.ticket.name, chain(&error));
                let lost = ApiError::EngineDown(why);
                lost.log();
                // The client's parser reads events: it gets one that says so.
                let last = self.is_events.then(|| Frame::data(event(&lost.body())));
                Poll::Ready(Some(last.ok_or(error)))
            }
            None => {
                self.ended = true;
                self.flight.ended_well();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // Never before the end was seen: it is what tells a good answer from one that nobody read.
        self.ended && self.first.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.n_left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
