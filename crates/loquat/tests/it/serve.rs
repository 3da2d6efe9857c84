//! `loquat serve` from the command line.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use serde_json::json;

use crate::support::{Running, loquat, output, root};
use crate::tiny;

/// Starts a server, asks it once and returns what it says, how long its sequences may be, and its metrics.
fn ask(home: &Path, flags: &[&str]) -> (String, u64, String) {
    let mut command = loquat(home);
    command.args(["serve", "--port", "0", "--api-key", "secret", "--served-model-name", "tiny"]).args(flags);
    let mut server = Running::start(&mut command);
    let client = server.client();
    let prompt = "one two one two one two";
    let body =
        json!({"model": "tiny", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": true});
    let answer = client.post_json("/v1/completions", &body);
    let context = client.get_json("/v1/models")["data"][0]["max_model_len"].as_u64().unwrap();
    let metrics = client.get("/metrics").1;
    assert_eq!(server.stop(), Some(0));
    (answer["choices"][0]["text"].as_str().unwrap().to_owned(), context, metrics)
}

fn accepted(metrics: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with("vllm:spec_decode_num_accepted_tokens_total"));
    line.and_then(|line| line.split_whitespace().last()).unwrap().parse().unwrap()
}

#[test]
fn a_draft_model_changes_nothing_but_the_speed() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let model = model.to_str().unwrap();
    let (alone, context, metrics) = ask(&home, &[model]);
    assert_eq!((context, accepted(&metrics)), (256, 0.0));
    // A model guesses its own tokens rightly, though the engine soon finds that it is no faster for it.
    let (drafted, context, metrics) =
        ask(&home, &["-m", model, "-md", model, "--draft-max", "4", "-c", "128", "-np", "2"]);
    assert_eq!((&drafted, context), (&alone, 128));
    assert!(accepted(&metrics) > 0.0, "{metrics}");
    let config = json!({"model": model, "num_speculative_tokens": 3}).to_string();
    let (drafted, _, metrics) = ask(&home, &[model, "--speculative-config", &config]);
    assert_eq!(drafted, alone);
    assert!(accepted(&metrics) > 0.0, "{metrics}");
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let other = root().join("fixtures/golden/models/llama");
    let (model, other) = (model.to_str().unwrap(), other.to_str().unwrap());
    let cases: [(&[&str], &[&str]); 4] = [
        (&["-md", other], &["models/llama", "ids"]),
        (&["-md", "nothing"], &["nothing"]),
        (&["-c", "999"], &["--ctx-size 999", "256"]),
        // 256 B a token · 256 tokens; the flag counts in MiB.
        (&["-c", "256", "--kv-mib", "0"], &["--ctx-size 256", "65.5 kB"]),
    ];
    for (flags, words) in cases {
        let args = [&["serve", model, "--port", "0"], flags].concat();
        let output = output(&home, &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && !error.contains("panicked"), "{flags:?}: {error}");
        words.iter().for_each(|word| assert!(error.contains(word), "{flags:?}: no '{word}' in {error}"));
    }
}

/// Resident memory of a process, in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn ten_thousand_idle_connections_cost_little() {
    const N: usize = 10_000;
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    if limit.maximum.is_some_and(|n| n < N as u64 + 500) {
        eprintln!("SKIPPED: this user may not open {N} files");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let mut gateway = Running::start(loquat(home.path()).args(["up", "--port", "0", "--kv-mib", "8"]));
    let client = gateway.client();
    let address = client.base.strip_prefix("http://").unwrap();
    // Every connection has had an answer, so that it holds what one that was used holds.
    let request =
        format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\r\n", client.key);
    let ask = |stream: &mut TcpStream| {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 4096];
        let n = stream.read(&mut answer).unwrap();
        assert!(answer[..n].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..n]));
    };
    let connect = || TcpStream::connect(address).unwrap();
    (0..100).for_each(|_| ask(&mut connect()));
    let before = resident(gateway.child.id());
    let mut idle: Vec<TcpStream> = Vec::new();
    for _ in 0..N {
        let mut stream = connect();
        ask(&mut stream);
        idle.push(stream);
    }
    let cost = resident(gateway.child.id()).saturating_sub(before);
    println!("{N} idle connections: {:.1} MB, {} bytes each", cost as f64 / 1e6, cost / N as u64);
    assert!(cost < 200_000_000, "{cost} bytes");
    // The first has idled longest, and is still there.
    ask(&mut idle[0]);
    ask(&mut connect());
    drop(idle);
    assert_eq!(gateway.stop(), Some(0));
}
