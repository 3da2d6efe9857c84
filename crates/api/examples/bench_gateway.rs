//! What the gateway adds to a request, at a fixed rate of requests: each is sent to a stand-in engine directly or through the
//! gateway, in turns, so that both see the same machine. Latency is to the last byte of the answer.
//!
//! `cargo run --release --example bench_gateway [REQUESTS_PER_SECOND] [SECONDS]`

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::{
    AppState, Call, Cause, Cluster, Curve, KeyChecker, KeyOwner, Limits, LogPiece, Parts, Refusal, Role,
    Runs, Target, TargetKey,
};
use axum::body::{Body, Bytes};
use axum::http::{Request, header};
use axum::routing::post;
use futures::StreamExt;
use gateway::Endpoint;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use telemetry::Metrics;
use tokio::net::TcpListener;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

struct Open;

impl KeyChecker for Open {
    fn check(&self, _: &str) -> Result<Option<KeyOwner>, Cause> {
        Ok(self.known("").flatten())
    }

    /// From memory, as a gateway's usually are.
    fn known(&self, _: &str) -> Option<Option<KeyOwner>> {
        Some(Some(KeyOwner { id: "1".to_owned(), name: "bench".to_owned(), role: Role::Use }))
    }
}

struct Nothing;

impl Runs for Nothing {
    fn names(&self) -> Result<Vec<String>, Cause> {
        Ok(Vec::new())
    }
    fn curve(&self, _: &str) -> Result<Option<Curve>, Cause> {
        Ok(None)
    }
}

impl Cluster for Nothing {
    fn call(&self, _: Call) -> Result<serde_json::Value, Refusal> {
        Err(Refusal::Conflict("there is no cluster here".to_owned()))
    }
    fn log(&self, job: &str, _: Option<u64>, _: usize) -> Result<LogPiece, Refusal> {
        Err(Refusal::NotFound { what: "job", name: job.to_owned() })
    }
}

/// An engine that answers at once, with as many bytes as a short completion has.
async fn engine() -> SocketAddr {
    let answer = Bytes::from(vec![b'x'; 400]);
    let app = axum::Router::new().route("/v1/completions", post(move || async move { answer.clone() }));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

async fn start_gateway(engines: &[SocketAddr]) -> SocketAddr {
    let state = AppState::new(Parts {
        keys: Arc::new(Open),
        runs: Arc::new(Nothing),
        cluster: Arc::new(Nothing),
        metrics: Metrics::new(),
        limits: Limits::default(),
        now_unix_s: || 0,
    });
    let target = |(i, address): (usize, &SocketAddr)| Target {
        endpoint: Endpoint { name: format!("r{i}"), version: "v1".to_owned(), draining: false },
        url: format!("http://{address}"),
        key: TargetKey::Nobody,
    };
    state.replicas.set("m", 0, engines.iter().enumerate().map(target).collect(), None);
    let replicas = state.replicas.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    tokio::spawn(api::serve(listener, state, std::future::pending()));
    while !replicas.status("m").is_some_and(|status| status.replicas.iter().all(|r| r.well)) {
        sleep(Duration::from_millis(10)).await;
    }
    address
}

async fn ask(client: Client<HttpConnector, Body>, address: SocketAddr, n: u64) -> Duration {
    let prompt = format!("{n} {}", "a question of some length ".repeat(40));
    let body = format!(r#"{{"model":"m","prompt":"{prompt}","max_tokens":16}}"#);
    let request = Request::post(format!("http://{address}/v1/completions"))
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::AUTHORIZATION, "Bearer sk-bench")
        .body(Body::from(body))
        .expect("a request");
    let started = Instant::now();
    let answer = client.request(request).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let mut bytes = Body::new(answer.into_body()).into_data_stream();
    let mut n_bytes = 0;
    while let Some(piece) = bytes.next().await {
        n_bytes += piece.expect("a whole answer").len();
    }
    assert_eq!(n_bytes, 400);
    started.elapsed()
}

fn percentile(sorted: &[Duration], percent: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * percent / 100.0) as usize].as_secs_f64() * 1e3
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u64>().expect("a number"));
    let (rate, seconds) = (args.next().unwrap_or(1_000), args.next().unwrap_or(10));
    let engines = [engine().await, engine().await];
    let through = start_gateway(&engines).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    for n in 0..200 {
        ask(client.clone(), if n % 2 == 0 { engines[0] } else { through }, n).await;
    }
    // Half a second of each in turns: bursts of the machine's other work hit both.
    let mut taken: [Vec<Duration>; 2] = Default::default();
    let mut clock = interval(Duration::from_secs(1) / rate as u32);
    clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut n = 0;
    for turn in 0..seconds * 4 {
        let which = (turn % 2) as usize;
        let address = if which == 0 { engines[0] } else { through };
        let mut asked = Vec::new();
        for _ in 0..rate / 2 {
            clock.tick().await;
            n += 1;
            asked.push(tokio::spawn(ask(client.clone(), address, n)));
        }
        for asked in asked {
            taken[which].push(asked.await.expect("a client does not panic"));
        }
    }
    for (name, taken) in ["direct ", "gateway"].iter().zip(&mut taken) {
        taken.sort();
        println!(
            "{name}  {} requests at {rate}/s: p50 {:.3} ms, p90 {:.3} ms, p99 {:.3} ms",
            taken.len(),
            percentile(taken, 50.0),
            percentile(taken, 90.0),
            percentile(taken, 99.0)
        );
    }
    let added = |percent| percentile(&taken[1], percent) - percentile(&taken[0], percent);
    println!("added    p50 {:.3} ms, p90 {:.3} ms, p99 {:.3} ms", added(50.0), added(90.0), added(99.0));
}
