//! The server's own accept loop: what `axum::serve` leaves unbounded is bounded here.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::{BoxError, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use telemetry::chain;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;

use crate::connections::{Connection, Connections};
use crate::edge::Guarded;
use crate::limits::Limits;
use crate::routes::app;
use crate::stall::StallGuard;
use crate::state::AppState;
use crate::tls::{self, ServerTls};

/// Between two looks at how many requests are still running while draining.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// For connections to say goodbye once their last answer is sent.
const CLOSE_TIME: Duration = Duration::from_secs(1);
/// Before the next try when the operating system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown` completes, then refuses new requests, lets running ones finish for
/// [`Limits::drain_time_max`] and returns. Speaks HTTP/1.1.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_tls(listener, None, state, shutdown).await
}

/// [`serve`] over TLS, if there is something to show.
pub async fn serve_tls(
    listener: TcpListener,
    tls: Option<ServerTls>,
    state: AppState,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let reading = tokio::spawn(read_again(tls.clone(), state.clone()));
    let server = Server {
        tls,
        app: app(state.clone()),
        limits: state.limits.clone(),
        connections: Connections::new(state.limits.connections_max),
        close: watch::channel(false).0,
    };
    let mut tasks = JoinSet::new();
    let watch = tokio::spawn(crate::replicas::watch(state.replicas.clone()));
    tokio::select! {
        never = server.accept(&listener, &mut tasks) => match never {},
        () = shutdown => (),
    }
    state.lifecycle.start_draining();
    tracing::info!(n_in_flight = state.lifecycle.n_in_flight(), "draining");
    // Still accepting: probes and refusals with 503 tell clients and proxies where things stand.
    tokio::select! {
        never = server.accept(&listener, &mut tasks) => match never {},
        () = idle(&state) => (),
        () = sleep(state.limits.drain_time_max) => (),
    }
    drop(listener);
    watch.abort();
    reading.abort();
    server.close.send_replace(true);
    let cut_off = state.lifecycle.n_in_flight();
    if timeout(CLOSE_TIME, async { while tasks.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(
            n_connections = tasks.len(),
            n_in_flight = cut_off,
            "cut off what did not finish in time"
        );
    }
    Ok(())
}

/// Certificates and authorities are read again when their files change.
async fn read_again(tls: Option<ServerTls>, state: AppState) {
    loop {
        sleep(tls::LOOK_EVERY).await;
        match tls.as_ref().map(|tls| tls.refresh((state.now_unix_s)())) {
            Some(Ok(true)) => tracing::info!("the new certificate is shown from now on"),
            Some(Err(error)) => {
                tracing::warn!(error = chain(&error), "the certificate from before is shown on")
            }
            Some(Ok(false)) | None => (),
        }
        match state.replicas.trust_again() {
            Ok(true) => tracing::info!("the new authorities are believed from now on"),
            Ok(false) => (),
            Err(error) => {
                tracing::warn!(error = chain(&error), "the authorities from before are believed on")
            }
        }
    }
}

async fn idle(state: &AppState) {
    while state.lifecycle.n_in_flight() > 0 {
        sleep(DRAIN_POLL).await;
    }
}

struct Server {
    app: Router,
    tls: Option<ServerTls>,
    limits: Arc<Limits>,
    connections: Connections,
    /// Becomes true when connections should end after their current answer.
    close: watch::Sender<bool>,
}

/// Nothing: the accept loop ends only by being dropped.
enum Never {}

impl Server {
    async fn accept(&self, listener: &TcpListener, tasks: &mut JoinSet<()>) -> Never {
        loop {
            // Finished connections leave the set here, so it holds only open ones.
            while tasks.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, _peer)) => {
                    if let Some(connection) = self.connections.admit(now_ms()) {
                        tasks.spawn(self.connection(stream, connection));
                    }
                }
                Err(error) if is_of_one_connection(&error) => (),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections");
                    self.connections.close_idlest();
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn connection(&self, stream: TcpStream, connection: Arc<Connection>) -> impl Future<Output = ()> + use<> {
        let (app, limits, close) = (self.app.clone(), self.limits.clone(), self.close.subscribe());
        let (talk, tls) = (Talk { app, limits, close, connection }, self.tls.clone());
        async move {
            // A token is one small packet; without this it waits for the acknowledgement of the one before.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "cannot set TCP_NODELAY");
            }
            let Some(tls) = tls else { return talk.hold(stream).await };
            let shaken = tokio::select! {
                shaken = timeout(talk.limits.head_time_max, tls.accept(stream)) => shaken,
                () = talk.connection.asked_to_close() => return,
            };
            match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => talk.hold(stream).await,
                Err(error) => tracing::debug!(%error, "no TLS with a client"),
            }
        }
    }
}

/// What is said on one connection.
struct Talk {
    app: Router,
    limits: Arc<Limits>,
    close: watch::Receiver<bool>,
    connection: Arc<Connection>,
}

impl Talk {
    async fn hold(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Talk { app, limits, mut close, connection } = self;
        let io = TokioIo::new(StallGuard::new(stream, limits.write_stall_max));
        let entry = connection.clone();
        let service =
            service_fn(move |request: Request<Incoming>| answer(app.clone(), request, entry.clone()));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_time_max)
            .max_buf_size(limits.head_bytes_max)
            .serve_connection(io, service);
        tokio::pin!(served);
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = connection.asked_to_close() => return,
            () = told_to_close(&mut close) => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(error = %BoxError::from(error), "a connection ended early");
        }
    }
}

/// A server that is gone without a word counts, too.
async fn told_to_close(close: &mut watch::Receiver<bool>) {
    let told = close.wait_for(|close| *close).await.is_ok();
    tracing::trace!(told, "closing a connection");
}

async fn answer(
    app: Router,
    request: Request<Incoming>,
    connection: Arc<Connection>,
) -> Result<axum::http::Response<Body>, std::convert::Infallible> {
    let busy = connection.enter();
    let response = app.oneshot(request.map(Body::new)).await?;
    Ok(response.map(|body| Body::new(Guarded { body, _guard: busy })))
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&error.kind())
}

/// Milliseconds on tokio's clock, which tests can stop.
pub(crate) fn now_ms() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64
}
