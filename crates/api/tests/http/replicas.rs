//! Requests for models that other processes serve: real sockets, stand-in engines that die, dawdle and refuse.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use api::{Limits, Replicas, Target, TargetKey, serve};
use gateway::Endpoint;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::fake::{self, KEY};

const WELL: u8 = 0;
const BUSY: u8 = 1;
const BROKEN: u8 = 2;
/// Dies in the middle of an answer, but for probes.
const CUTS: u8 = 3;
/// Closes the connection before it says anything.
const SILENT: u8 = 4;
/// Says how long its answer is, which comes in two halves.
const COUNTS: u8 = 5;
/// As [`COUNTS`], and dies after the first half.
const COUNTS_AND_CUTS: u8 = 6;

/// An engine that answers five pieces, `pause` apart, each with its name.
struct Stub {
    address: SocketAddr,
    mode: Arc<AtomicU8>,
    n_asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Stub {
    async fn start(name: &'static str, pause: Duration) -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, n_asked) = (Arc::new(AtomicU8::new(WELL)), Arc::new(AtomicUsize::new(0)));
        let (shared_mode, shared_asked) = (mode.clone(), n_asked.clone());
        let task = tokio::spawn(async move {
            // Dropped with this task, and every connection with it: what kill −9 does.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(talk(stream, name, pause, shared_mode.clone(), shared_asked.clone()));
            }
        });
        Stub { address, mode, n_asked, task }
    }

    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
    }

    fn n_asked(&self) -> usize {
        self.n_asked.load(Ordering::SeqCst)
    }

    fn target(&self, name: &str) -> Target {
        Target {
            endpoint: Endpoint { name: name.to_owned(), version: "v1".to_owned(), draining: false },
            url: format!("http://{}", self.address),
            key: TargetKey::Cluster("secret".to_owned()),
        }
    }
}

async fn talk(
    mut stream: TcpStream,
    name: &'static str,
    pause: Duration,
    mode: Arc<AtomicU8>,
    n_asked: Arc<AtomicUsize>,
) {
    while let Some((head, body)) = read_request(&mut stream).await {
        let is_probe = body.contains("\"max_tokens\":1,");
        n_asked.fetch_add(usize::from(!is_probe), Ordering::SeqCst);
        let mode = mode.load(Ordering::SeqCst);
        let refusal = match mode {
            BUSY => Some("429 Too Many Requests"),
            BROKEN => Some("500 Internal Server Error"),
            SILENT => return,
            _ if !head.to_lowercase().contains("authorization: bearer secret.") => Some("401 Unauthorized"),
            _ => None,
        };
        if let Some(status) = refusal {
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nno");
            stream.write_all(answer.as_bytes()).await.unwrap();
            continue;
        }
        if mode >= COUNTS && !is_probe {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\nfirst";
            stream.write_all(head.as_bytes()).await.unwrap();
            sleep(pause).await;
            if mode == COUNTS_AND_CUTS {
                return;
            }
            stream.write_all(b"after").await.unwrap();
            continue;
        }
        let kind = if body.contains("\"stream\":true") { "text/event-stream" } else { "application/json" };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for n in 0..if is_probe { 1 } else { 5 } {
            if mode == CUTS && !is_probe && n == 2 {
                return;
            }
            let piece = format!("data: {name}{n}\n\n");
            let chunk = format!("{:x}\r\n{piece}\r\n", piece.len());
            if stream.write_all(chunk.as_bytes()).await.is_err() {
                return;
            }
            sleep(pause).await;
        }
        if stream.write_all(b"0\r\n\r\n").await.is_err() {
            return;
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16_384];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_lowercase();
            let length = length.split("content-length: ").nth(1).and_then(|l| l.lines().next());
            if body.len() >= length.map_or(0, |l| l.trim().parse().unwrap()) {
                return Some((head.to_owned(), body.to_owned()));
            }
        }
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..n]);
    }
}

/// A gateway in front of some targets for the model `m`.
struct Gateway {
    address: SocketAddr,
    replicas: Replicas,
}

impl Gateway {
    async fn start(targets: Vec<Target>) -> Gateway {
        let state = fake::state(Limits::default(), Duration::ZERO);
        let replicas = state.replicas.clone();
        replicas.set("m", 7, targets, None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, state, std::future::pending()));
        Gateway { address, replicas }
    }

    async fn wait(&self, n_well: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let status = self.replicas.status("m").unwrap();
            if status.replicas.iter().filter(|r| r.well).count() == n_well {
                return;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Status and everything after the head, as it came; whether the answer ended as it should.
    async fn ask(&self, prompt: &str, stream: bool) -> (u16, String, bool) {
        let body = format!(r#"{{"model":"m","prompt":"{prompt}","stream":{stream}}}"#);
        let text = self.raw("POST", "/v1/completions", &body).await;
        let status = text.split(' ').nth(1).unwrap_or("0").parse().unwrap();
        let (_, rest) = text.split_once("\r\n\r\n").unwrap_or_default();
        (status, rest.to_owned(), rest.ends_with("\r\n0\r\n\r\n"))
    }

    async fn raw(&self, method: &str, path: &str, body: &str) -> String {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(30), socket.read_to_end(&mut bytes))
            .await
            .expect("an answer in time")
            .unwrap();
        String::from_utf8(bytes).unwrap()
    }

    async fn json(&self, path: &str) -> Value {
        let text = self.raw("GET", path, "").await;
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

#[tokio::test]
async fn answers_come_through_byte_for_byte_and_prefixes_stay_together() {
    let (a, b) = (Stub::start("a", Duration::ZERO).await, Stub::start("b", Duration::ZERO).await);
    let gateway = Gateway::start(vec![a.target("a"), b.target("b")]).await;
    gateway.wait(2).await;
    let long = "x".repeat(2_000);
    let (status, text, whole) = gateway.ask(&long, true).await;
    assert!(status == 200 && whole, "{text}");
    let name = if text.contains("data: a0") { 'a' } else { 'b' };
    let pieces: Vec<String> = (0..5).map(|n| format!("data: {name}{n}\n\n")).collect();
    assert!(pieces.iter().all(|piece| text.contains(piece)), "{text}");
    let before = (a.n_asked(), b.n_asked());
    for _ in 0..20 {
        gateway.ask(&long, true).await;
    }
    let after = (a.n_asked() - before.0, b.n_asked() - before.1);
    assert!(after == (20, 0) || after == (0, 20), "one prompt went to both: {after:?}");

    // Models here and there are listed together, and what is served here is served here.
    let models = gateway.json("/v1/models").await;
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert!(ids.contains(&"m") && ids.contains(&"base"), "{ids:?}");
    assert_eq!(gateway.json("/v1/models/m").await["created"], 7);
    let own = gateway.raw("POST", "/v1/completions", r#"{"model":"base","prompt":"x","max_tokens":2}"#).await;
    assert!(own.contains("text_completion"), "{own}");
    let listed = gateway.json("/v1/replicas").await;
    assert_eq!(listed["data"].as_array().unwrap().len(), 2);
    assert_eq!(listed["data"][0]["state"], "well");
    assert!(!listed.to_string().contains("secret"));
}

#[tokio::test]
async fn an_answer_of_known_length_has_it_for_the_client_too() {
    let stub = Stub::start("a", Duration::from_millis(20)).await;
    let gateway = Gateway::start(vec![stub.target("a")]).await;
    gateway.wait(1).await;
    let counts = || {
        let status = gateway.replicas.status("m").unwrap();
        (status.replicas[0].n_answered, status.replicas[0].n_failed, status.in_flight)
    };
    let body = r#"{"model":"m","prompt":"x"}"#;
    stub.set(COUNTS);
    let before = counts();
    let text = gateway.raw("POST", "/v1/completions", body).await;
    assert!(text.contains("content-length: 10\r\n") && text.ends_with("\r\n\r\nfirstafter"), "{text}");
    assert!(!text.contains("chunked"), "{text}");
    assert_eq!(counts(), (before.0 + 1, before.1, 0), "it was seen whole");
    stub.set(COUNTS_AND_CUTS);
    let text = gateway.raw("POST", "/v1/completions", body).await;
    assert!(text.contains("content-length: 10\r\n") && text.ends_with("\r\n\r\nfirst"), "{text}");
    assert_eq!(counts(), (before.0 + 1, before.1 + 1, 0), "what broke off does not look whole");
}

#[tokio::test]
async fn what_fails_before_its_first_byte_is_tried_elsewhere() {
    for mode in [BUSY, SILENT] {
        let (a, b) = (Stub::start("a", Duration::ZERO).await, Stub::start("b", Duration::ZERO).await);
        let gateway = Gateway::start(vec![a.target("a"), b.target("b")]).await;
        gateway.wait(2).await;
        a.set(mode);
        for n in 0..20 {
            let (status, text, whole) = gateway.ask(&format!("{n}"), true).await;
            assert!(status == 200 && whole && text.contains("data: b4"), "mode {mode}: {text}");
        }
        assert!(a.n_asked() > 0, "mode {mode}: the one that fails was never asked");
    }
    // The replica's own 500 is its answer: the next one would say the same.
    let (a, b) = (Stub::start("a", Duration::ZERO).await, Stub::start("b", Duration::ZERO).await);
    let gateway = Gateway::start(vec![a.target("a"), b.target("b")]).await;
    gateway.wait(2).await;
    a.set(BROKEN);
    b.set(BROKEN);
    assert_eq!(gateway.ask("x", false).await.0, 500);
    assert_eq!(a.n_asked() + b.n_asked(), 1);
    a.set(BUSY);
    b.set(BUSY);
    assert_eq!(gateway.ask("x", false).await.0, 429, "all are busy");
}

#[tokio::test]
async fn what_breaks_off_says_so_and_other_streams_go_on() {
    let slow = Duration::from_millis(100);
    let (a, b) = (Stub::start("a", slow).await, Stub::start("b", slow).await);
    let gateway = Arc::new(Gateway::start(vec![a.target("a"), b.target("b")]).await);
    gateway.wait(2).await;
    let asked: Vec<_> = (0..12)
        .map(|n| {
            let gateway = gateway.clone();
            tokio::spawn(async move { gateway.ask(&format!("{n}"), n % 3 > 0).await })
        })
        .collect();
    sleep(Duration::from_millis(200)).await;
    // Kill −9, with streams on both.
    a.task.abort();
    let (mut n_whole, mut n_cut) = (0, 0);
    for (n, asked) in asked.into_iter().enumerate() {
        let (status, text, whole) = asked.await.unwrap();
        assert_eq!(status, 200);
        if text.contains("data: b0") {
            assert!(whole && text.contains("data: b4"), "a stream on the living one was cut: {text}");
            n_whole += 1;
        } else if n % 3 > 0 {
            assert!(whole && text.contains("\"error\"") && text.contains("server_is_overloaded"), "{text}");
            n_cut += 1;
        } else {
            assert!(!whole, "half an answer looks whole: {text}");
            n_cut += 1;
        }
    }
    assert!(n_whole > 0 && n_cut > 0, "{n_whole} whole, {n_cut} cut");
    // From now on everything goes to the one that lives.
    for n in 0..5 {
        let (status, text, whole) = gateway.ask(&format!("next {n}"), true).await;
        assert!(status == 200 && whole && text.contains("data: b4"), "{text}");
    }
    gateway.wait(1).await;
}

#[tokio::test]
async fn a_request_waits_for_a_replica_that_is_on_its_way() {
    let gateway = Arc::new(Gateway::start(Vec::new()).await);
    let asking = gateway.clone();
    let asked = tokio::spawn(async move { asking.ask("x", true).await });
    sleep(Duration::from_millis(300)).await;
    assert_eq!(gateway.replicas.status("m").unwrap().in_flight, 1, "who waits is load");
    let a = Stub::start("a", Duration::ZERO).await;
    gateway.replicas.set("m", 7, vec![a.target("a")], None);
    let (status, text, whole) = asked.await.unwrap();
    assert!(status == 200 && whole && text.contains("data: a4"), "{text}");
    assert_eq!(gateway.replicas.status("m").unwrap().in_flight, 0);
}

#[tokio::test]
async fn a_draining_replica_finishes_what_it_has_and_gets_no_more() {
    let slow = Duration::from_millis(100);
    let (a, b) = (Stub::start("a", slow).await, Stub::start("b", Duration::ZERO).await);
    let gateway = Arc::new(Gateway::start(vec![a.target("a")]).await);
    gateway.wait(1).await;
    let asking = gateway.clone();
    let asked = tokio::spawn(async move { asking.ask("x", true).await });
    sleep(Duration::from_millis(150)).await;
    let mut draining = a.target("a");
    draining.endpoint.draining = true;
    gateway.replicas.set("m", 7, vec![draining, b.target("b")], None);
    for n in 0..10 {
        let (_, text, whole) = gateway.ask(&format!("{n}"), true).await;
        assert!(whole && text.contains("data: b4"), "{text}");
    }
    let (_, text, whole) = asked.await.unwrap();
    assert!(whole && text.contains("data: a4"), "{text}");
    assert_eq!(a.n_asked(), 1);
}
