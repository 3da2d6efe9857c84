//! `loquat promote`: from text to a model that serves, by one declared file.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde_json::json;

use crate::support::{Client, Running, loquat, output, speeches, succeed};
use crate::tiny;

const WET: &str = r#"{"query": "Question: Is water wet?", "choices": ["yes", "no, it is not"], "gold": 0}
{"query": "Question: Is fire cold?", "choices": ["yes", "no"], "gold": 1}
"#;

const TRAIN: &str = r#"train.args = ["--dataset", "d", "--steps", "2", "--rows", "1", "--micro-batches", "1", "--context", "256", "--json"]"#;
const SERVE: &str = r#"serve.args = ["--threads", "1", "--kv-mib", "8"]"#;
const PASSES: &str =
    r#"gate = [{metric = "validation/bits_per_byte", at_most = 20.0}, {metric = "wet/acc", at_least = 0.0}]"#;

/// Declares a pipeline for `m` and waits until it is over.
fn promote(home: &Path, origin: &str, gate: &str) -> (bool, String) {
    let file = home.join("pipeline.toml");
    let evaluate = r#"evaluate = {tasks = ["wet.jsonl"], args = ["--limit", "2", "--threads", "1"]}"#;
    let canary = "canary = {percent = 30, minutes = 10}";
    fs::write(&file, format!("model = \"m\"\n{origin}\n{evaluate}\n{gate}\n{canary}\n{SERVE}\n")).unwrap();
    let Output { status, stdout, stderr } = output(home, &["promote", "start", "-f", file.to_str().unwrap()]);
    let told = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    (status.success(), told)
}

/// Clients that ask `m` one long question after another.
struct Traffic {
    stop: Arc<AtomicBool>,
    n_asked: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn start(client: &Client) -> Traffic {
        let mut traffic = Traffic { stop: Arc::default(), n_asked: Arc::default(), clients: Vec::new() };
        for i in 0..2 {
            let (client, stop, n_asked) = (client.clone(), traffic.stop.clone(), traffic.n_asked.clone());
            traffic.clients.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let n = n_asked.fetch_add(1, Ordering::Relaxed);
                    let prompt = format!("{i} {n} {}", "and so on ".repeat(25));
                    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 2});
                    let (status, text) = client.post("/v1/completions", &body);
                    assert_eq!(status, 200, "{text}");
                }
            }));
        }
        traffic
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        self.n_asked.load(Ordering::Relaxed)
    }
}

#[test]
fn a_good_model_goes_live_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text.to_str().unwrap()],
    );
    fs::write(home.join("wet.jsonl"), WET).unwrap();
    let mut gateway = Running::start(loquat(home).args(["up", "--port", "0", "--kv-mib", "8"]));
    let client = gateway.client();
    let live = || succeed(home, &["deploy", "list"]);

    // Trained, measured, passed, and nothing is there to be tried beside: it is live.
    let (is_live, told) = promote(home, TRAIN, PASSES);
    assert!(is_live && told.contains("all 2 thresholds hold; nothing was live before"), "{told}");
    for words in [
        "training is submitted",
        "m@1 is trained",
        "evaluation is submitted",
        "wet/acc ",
        "validation/bits_per_byte",
    ] {
        assert!(told.contains(words), "no '{words}' in {told}");
    }
    // Gateways look four times a second; a request for what they know waits for the first replica.
    let ask = || client.post("/v1/completions", &json!({"model": "m", "prompt": "x", "max_tokens": 2}));
    let (status, text) = std::iter::repeat_with(ask)
        .inspect(|_| std::thread::sleep(std::time::Duration::from_millis(50)))
        .take(40)
        .find(|(status, _)| *status != 404)
        .expect("a model that is live is known");
    assert_eq!(status, 200, "{text}");
    let listed = client.get_json("/v1/models");
    assert!(!listed.to_string().contains("m@1"), "a version is no model of its own: {listed}");

    // What misses its gate serves nobody.
    let strict = r#"gate = [{metric = "validation/bits_per_byte", at_most = 0.01}]"#;
    let (is_live, told) = promote(home, TRAIN, strict);
    assert!(!is_live && told.contains("rejected") && told.contains("at most 0.01 is allowed"), "{told}");
    assert!(live().contains("of m@1") && !live().contains("m@2"), "{}", live());

    // A good one is tried, and stays.
    let traffic = Traffic::start(&client);
    let (is_live, told) = promote(home, TRAIN, PASSES);
    assert!(is_live && told.contains("30 % of the requests beside m@1"), "{told}");
    assert!(told.contains("did as well as the one before"), "{told}");
    assert!(live().contains("of m@3"), "{}", live());

    // One that answers slowly is taken back, and no request fails for it.
    let slow = tiny::shaped(dir.path(), "slow", (12, 768)).display().to_string();
    let gate = r#"gate = [{metric = "wet/acc", at_least = 0.0}]"#;
    let (is_live, told) = promote(home, &format!("source = {slow:?}"), gate);
    assert!(!is_live && told.contains("rolled_back") && told.contains("half of its answers begin"), "{told}");
    assert!(live().contains("of m@3"), "{}", live());
    assert!(traffic.end() > 50);

    let listed = succeed(home, &["promote", "list"]);
    let stages: Vec<&str> = listed.lines().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
    assert_eq!(stages, ["rolled_back", "live", "rejected", "live"], "{listed}");
    let told = client.get_json("/v1/promotions");
    let second = &told["data"][2];
    assert_eq!((&second["stage"], &second["candidate"]), (&json!("rejected"), &json!("m@2")), "{told}");
    assert!(
        second["history"].as_array().unwrap().last().unwrap()["why"].as_str().unwrap().contains("0.01"),
        "{told}"
    );
    let shown = succeed(home, &["promote", "show", "2"]);
    assert!(shown.lines().last().unwrap().contains("rejected"), "{shown}");
    assert_eq!(gateway.stop(), Some(0));
}

#[test]
fn pipelines_that_would_fail_later_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    fs::create_dir_all(home).unwrap();
    fs::write(home.join("wet.jsonl"), WET).unwrap();
    let check = |origin: &str, gate: &str, words: &str| {
        let (is_live, told) = promote(home, origin, gate);
        assert!(!is_live && told.contains(words) && !told.contains("panicked"), "no '{words}' in {told}");
    };
    check("train.args = [\"--steps\", \"4\"]", PASSES, "--dataset");
    check("train.args = [\"--dataset\", \"d\", \"--run\", \"mine\"]", PASSES, "--run");
    check("train.args = [\"--dataset\", \"d\", \"--color\"]", PASSES, "--color");
    check("source = \"nowhere\"", PASSES, "nowhere is neither a file");
    check(TRAIN, "gate = [{metric = \"dry/acc\", at_least = 0.5}]", "dry/acc is measured by nothing");
    check(TRAIN, "gate = [{metric = \"wet/acc\"}]", "needs a number");
    check(TRAIN, "gates = []", "gates");
    fs::write(home.join("wet.jsonl"), "{").unwrap();
    check(TRAIN, PASSES, "wet.jsonl");
    assert_eq!(succeed(home, &["promote", "list"]), "");
}
