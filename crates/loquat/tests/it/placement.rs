//! Placement with real processes: a machine that says what it gives, and jobs that make room for each other.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::kill::{ingest, weights};
use crate::support::{Client, PATIENCE, Running, loquat, output, succeed};

const SHAPE: &str = "--json --checkpoint-every 20 --rows 1 --micro-batches 8 --context 32 --ranks 1 --config";

fn train(home: &Path, run: &str, steps: u32) -> Vec<String> {
    let words = format!("train --dataset d --run {run} --publish {run} --steps {steps} {SHAPE}");
    let config = home.join("config.json").display().to_string();
    words.split(' ').map(str::to_owned).chain([config]).collect()
}

fn submit(home: &Path, flags: &str, job: &[String]) -> std::process::Output {
    let mut words: Vec<&str> = vec!["job", "submit"];
    words.extend(flags.split(' '));
    words.push("--");
    words.extend(job.iter().map(String::as_str));
    output(home, &words)
}

fn job(client: &Client, name: &str) -> Value {
    client.get_json(&format!("/v1/jobs/{name}"))
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_higher_job_takes_the_place_of_a_lower_which_later_ends_with_the_same_bytes() {
    const STEPS: u32 = 800;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    ingest(home);
    let whole = train(home, "whole", STEPS);
    succeed(home, &whole.iter().map(String::as_str).collect::<Vec<_>>());

    let mut command = loquat(home);
    command.args(["up", "--port", "0", "--kv-mib", "8", "--node-cores", "2", "--node-memory-gb", "8"]);
    let mut up = Running::start(&mut command);
    let client = up.client();

    // More than there is, on both ways in; what would fit is said.
    let refused = submit(home, "big --cores 64", &train(home, "big", 1));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("with cores 2 it would fit"), "{text}");
    let ask = json!({"name": "big", "args": ["doctor"], "needs": {"memory_bytes": 9_000_000_000_u64}});
    let (status, text) = client.post("/v1/jobs", &ask);
    assert!(status == 400 && text.contains("needs.memory_bytes") && text.contains("8000000000"), "{text}");

    assert!(submit(home, "low --cores 2", &train(home, "low", STEPS)).status.success());
    let checkpoint = home.join("store/runs/low/checkpoints/00000020/manifest.json");
    wait("a checkpoint of the low job", || checkpoint.exists());
    let high = submit(home, "high --cores 1 --priority 5", &train(home, "high", 30));
    assert!(high.status.success(), "{}", String::from_utf8_lossy(&high.stderr));
    wait("the high job to end", || job(&client, "high")["state"] == "succeeded");
    let low = job(&client, "low");
    assert_ne!(low["state"], "succeeded", "it never had to make room: {low}");
    wait("the low job to end", || job(&client, "low")["state"] == "succeeded");

    let low = job(&client, "low");
    assert_eq!((&low["restarts"], &low["failures"]), (&json!(1), &json!(0)), "{low}");
    assert!(weights(home, "low") == weights(home, "whole"), "other weights after making room");
    let metrics = client.get("/metrics").1;
    assert!(metrics.contains("loquat_job_preemptions_total 1\n"), "{metrics}");
    assert!(metrics.contains("loquat_node_cores{node=\"here\",part=\"all\"} 2"), "{metrics}");
    let log = client.get("/v1/jobs/low/logs?follow=true").1;
    assert!(log.contains("finished") && log.ends_with("data: [DONE]\n\n"), "{log}");

    // Only who may steer the cluster does.
    let key = succeed(home, &["key", "create", "k"]);
    let user = client.with_key(key.trim());
    assert_eq!(user.get("/v1/models").0, 200, "a key that another process made is good at once");
    let (status, text) = user.post("/v1/nodes/here/drain", &json!({}));
    assert!(status == 403 && text.contains("may not drain a node"), "{status} {text}");
    let drained = client.post_json("/v1/nodes/here/drain", &json!({}));
    assert_eq!((&drained["state"], &drained["cores"]), (&json!("draining"), &json!(2)), "{drained}");
    assert!(submit(home, "late --cores 1", &train(home, "late", 1)).status.success());
    wait("a reason", || job(&client, "late")["waits_for"] == "no node is open");
    client.post_json("/v1/nodes/here/uncordon", &json!({}));
    wait("the late job to end", || job(&client, "late")["state"] == "succeeded");
    let (status, _) = client.post("/v1/jobs/late/cancel", &json!({}));
    assert_eq!(status, 200, "a job that is over stays as it is");
    assert_eq!(job(&client, "late")["state"], "succeeded");
    assert_eq!(up.stop(), Some(0));
}
