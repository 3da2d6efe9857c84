//! Real sockets: clients that leave, clients that dawdle, and the end of the server.

use std::net::SocketAddr;
use std::time::Duration;

use api::{AppState, Limits, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::fake::{self, KEY};

struct Running {
    address: SocketAddr,
    state: AppState,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

async fn start(limits: Limits, step_time: Duration) -> Running {
    let state = fake::state(limits, step_time);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { assert!(stopped.await.is_ok()) };
    let task = tokio::spawn(serve(listener, state.clone(), shutdown));
    Running { address, state, stop: Some(stop), task }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn stop(mut self) -> Duration {
        let started = Instant::now();
        self.stop.take().unwrap().send(()).unwrap();
        self.task.await.unwrap().unwrap();
        started.elapsed()
    }

    fn n_sequences(&self) -> usize {
        let stats = self.state.models.get("base").unwrap().engine.stats();
        stats.n_running + stats.n_waiting
    }
}

fn request(path: &str, body: &str) -> Vec<u8> {
    let (method, length) = if body.is_empty() { ("GET", 0) } else { ("POST", body.len()) };
    format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn endless(stream: bool) -> Vec<u8> {
    let body =
        format!(r#"{{"model":"base","prompt":"x","max_tokens":4000,"ignore_eos":true,"stream":{stream}}}"#);
    request("/v1/completions", &body)
}

/// Reads until `n` bytes or the end.
async fn read_some(socket: &mut TcpStream, n: usize) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while bytes.len() < n {
        match timeout(Duration::from_secs(5), socket.read(&mut buffer)).await.expect("an answer in time") {
            Ok(0) | Err(_) => break,
            Ok(n_read) => bytes.extend_from_slice(&buffer[..n_read]),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_free_their_places() {
    let server = start(Limits::default(), Duration::from_millis(1)).await;
    for round in 0..300 {
        let mut socket = server.connect().await;
        // Leave at every stage: nothing sent, half a request, queued, first bytes, mid stream.
        match round % 6 {
            0 => (),
            1 => socket.write_all(&endless(true)[..60]).await.unwrap(),
            2 => socket.write_all(&endless(false)).await.unwrap(),
            3 => socket.write_all(&endless(true)).await.unwrap(),
            4 => {
                socket.write_all(&endless(true)).await.unwrap();
                read_some(&mut socket, 1).await;
            }
            _ => {
                socket.write_all(&endless(true)).await.unwrap();
                read_some(&mut socket, 2000).await;
            }
        }
        if round % 2 == 0 {
            // A reset instead of a polite end.
            socket.set_zero_linger().unwrap();
        }
    }
    eventually("no sequences", || server.n_sequences() == 0).await;
    eventually("no requests in flight", || server.state.lifecycle.n_in_flight() == 0).await;
    let mut socket = server.connect().await;
    socket.write_all(&request("/v1/completions", r#"{"model":"base","prompt":"[fine]"}"#)).await.unwrap();
    assert!(read_some(&mut socket, 300).await.contains("fine"));
    assert!(server.stop().await < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_answer_while_the_engine_is_busy() {
    let server = start(Limits::default(), Duration::from_millis(200)).await;
    let mut busy = server.connect().await;
    busy.write_all(&endless(true)).await.unwrap();
    read_some(&mut busy, 1).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let started = Instant::now();
        let mut socket = server.connect().await;
        socket.write_all(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(read_some(&mut socket, 1).await.starts_with("HTTP/1.1 200"));
        slowest = slowest.max(started.elapsed());
    }
    assert!(slowest < Duration::from_millis(150), "{slowest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_idle_connections_are_bounded() {
    let limits =
        Limits { head_time_max: Duration::from_millis(300), connections_max: 50, ..Limits::default() };
    let server = start(limits, Duration::ZERO).await;
    let mut large = server.connect().await;
    let head = format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(1 << 20));
    // The server may hang up before it has read all of it.
    let sent = large.write_all(head.as_bytes()).await;
    let answer = read_some(&mut large, 12).await;
    assert!(answer.starts_with("HTTP/1.1 431") || sent.is_err(), "{answer}");

    // More idle connections than there may be: the next one is served all the same.
    let mut idle = Vec::new();
    for _ in 0..120 {
        idle.push(server.connect().await);
    }
    let mut socket = server.connect().await;
    socket.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    assert!(read_some(&mut socket, 1).await.starts_with("HTTP/1.1 200"));
    // Both the silent ones and the one kept open after its answer end by themselves.
    let mut buffer = Vec::new();
    timeout(Duration::from_secs(3), idle[119].read_to_end(&mut buffer)).await.expect("idle: closed").ok();
    timeout(Duration::from_secs(3), socket.read_to_end(&mut buffer)).await.expect("kept: closed").ok();
    let mut dawdler = server.connect().await;
    dawdler.write_all(b"GET /health HTTP/1.1\r\nx: ").await.unwrap();
    timeout(Duration::from_secs(3), dawdler.read_to_end(&mut buffer)).await.expect("slow head: closed").ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_finishes_what_runs_and_refuses_the_rest() {
    let server = start(Limits::default(), Duration::from_millis(20)).await;
    let mut running = server.connect().await;
    let body = r#"{"model":"base","prompt":"x","max_tokens":20,"ignore_eos":true,"stream":true}"#;
    running.write_all(&request("/v1/completions", body)).await.unwrap();
    read_some(&mut running, 1).await;
    let (address, state) = (server.address, server.state.clone());
    let stopping = tokio::spawn(server.stop());
    eventually("draining", || state.lifecycle.is_draining()).await;
    let mut late = TcpStream::connect(address).await.unwrap();
    late.write_all(&request("/v1/completions", r#"{"model":"base","prompt":"[a]"}"#)).await.unwrap();
    assert!(read_some(&mut late, 12).await.starts_with("HTTP/1.1 503"));
    assert!(read_some(&mut running, usize::MAX).await.contains("data: [DONE]"));
    assert!(stopping.await.unwrap() < Duration::from_secs(3));
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_does_not_wait_for_ever() {
    let limits = Limits { drain_time_max: Duration::from_millis(200), ..Limits::default() };
    let server = start(limits, Duration::from_millis(20)).await;
    let mut running = server.connect().await;
    running.write_all(&endless(true)).await.unwrap();
    read_some(&mut running, 1).await;
    assert!(server.stop().await < Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_kept_alive() {
    let limits = Limits { keep_alive: Duration::from_millis(50), ..Limits::default() };
    let server = start(limits, Duration::from_millis(400)).await;
    let mut socket = server.connect().await;
    socket.write_all(&endless(true)).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(read_some(&mut socket, 1).await.contains(": keep-alive"));
}
