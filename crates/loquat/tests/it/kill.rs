//! kill −9, for real: of a training process at random moments, and of the controller above it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::demo::demo;
use crate::support::{PATIENCE, Running, loquat, speeches, succeed, wait_exit};

const SHAPE: &str = "--json --steps 30 --checkpoint-every 3 --rows 1 --micro-batches 8 --context 32";

/// A model so small that a step, and a checkpoint, take some milliseconds.
const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 32}"#;

/// The words of a run that publishes a model of its name, in a directory that [`ingest`] prepared.
fn train(home: &Path, run: &str, ranks: &str) -> Vec<String> {
    let own = format!("train --dataset d --run {run} --publish {run} --ranks {ranks} {SHAPE} --config");
    let config = home.join("config.json").display().to_string();
    own.split(' ').map(str::to_owned).chain([config]).collect()
}

pub(crate) fn ingest(home: &Path) {
    std::fs::write(home.join("config.json"), CONFIG).unwrap();
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text.to_str().unwrap()],
    );
}

fn run_whole(home: &Path, run: &str, ranks: &str) -> String {
    let words = train(home, run, ranks);
    succeed(home, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The published weights: the one object of the model's bundle that holds them.
pub(crate) fn weights(home: &Path, model: &str) -> Vec<u8> {
    let dir = home.join("store/models").join(model);
    let file = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
    let file = file.into_iter().find(|p| p.to_string_lossy().ends_with("model.safetensors"));
    std::fs::read(file.expect("no weights were published")).unwrap()
}

/// `./test --long`: killed at fifty moments.
#[cfg(feature = "long")]
#[test]
fn fifty_kills_change_no_byte() {
    killed_runs_end_with_the_same_bytes(50);
}

#[test]
fn training_killed_at_random_moments_ends_with_the_same_bytes() {
    killed_runs_end_with_the_same_bytes(5);
}

/// Runs that are killed until they are through, each life on another number of ranks, until there were `n_kills`.
fn killed_runs_end_with_the_same_bytes(n_kills: usize) {
    let home = tempfile::tempdir().unwrap();
    ingest(home.path());
    let start = Instant::now();
    run_whole(home.path(), "whole", "8");
    let run_time = start.elapsed();
    let whole = weights(home.path(), "whole");
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (mut random, mut killed, mut n_runs) = (seed, 0, 0);
    while killed < n_kills {
        let run = format!("killed-{n_runs}");
        let kills = killed_run(home.path(), &run, run_time, &mut random);
        assert!(
            weights(home.path(), &run) == whole,
            "seed {seed}: other weights after {kills} kills of {run}"
        );
        killed += kills;
        n_runs += 1;
        assert!(n_runs < 20 * n_kills, "seed {seed}: runs end before they are killed");
    }
    println!("seed {seed}: {killed} kills of {n_runs} runs");
}

/// Starts a run until it ends by itself; returns how often it was killed.
fn killed_run(home: &Path, run: &str, run_time: Duration, random: &mut u64) -> usize {
    let deadline = Instant::now() + PATIENCE;
    for n_kills in 0.. {
        assert!(Instant::now() < deadline, "{run} is not done after {n_kills} kills");
        let ranks = ["4", "2", "8", "1"][n_kills % 4];
        let mut child = loquat(home).args(train(home, run, ranks)).stdout(Stdio::null()).spawn().unwrap();
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Moments from the first instant to beyond the end; later ones as kills go on, so that it ends.
        let share = (*random >> 33) as f64 / (1u64 << 31) as f64 * (0.6 + 0.1 * n_kills as f64);
        let moment = Instant::now() + run_time.mul_f64(share);
        let mut ended = false;
        while Instant::now() < moment && !ended {
            ended = child.try_wait().unwrap().is_some();
            std::thread::sleep(Duration::from_millis(2));
        }
        if ended {
            assert_eq!(wait_exit(&mut child), Some(0), "{run}");
            return n_kills;
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    unreachable!("the loop has no end")
}

#[test]
fn two_ranks_train_the_same_bytes_as_one() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (home, ranks) in [(&one, "1"), (&two, "2")] {
        ingest(home.path());
        run_whole(home.path(), "r", ranks);
    }
    assert!(weights(one.path(), "r") == weights(two.path(), "r"));
}

#[test]
fn a_killed_controller_and_its_killed_job_go_on() {
    let home = tempfile::tempdir().unwrap();
    let mut first = Running::start(&mut demo(home.path(), 9));
    first.wait_for("dataset");
    let deadline = Instant::now() + PATIENCE;
    let checkpoints = home.path().join("store/runs/sotu/checkpoints/00000003/manifest.json");
    while !checkpoints.exists() {
        assert!(Instant::now() < deadline, "no checkpoint came");
        std::thread::sleep(Duration::from_millis(20));
    }
    first.signal("-KILL");
    wait_exit(&mut first.child);
    drop(first);

    let mut second = Running::start(&mut demo(home.path(), 9));
    let client = second.client();
    let run = client.get_json("/v1/runs/sotu").to_string();
    assert!(run.contains("\"step\":9"), "{run}");
    let jobs = client.get_json("/v1/jobs");
    assert_eq!(jobs["data"].as_array().map(Vec::len), Some(1), "one job, whatever happened: {jobs}");
    assert_eq!(jobs["data"][0]["state"], "succeeded", "{jobs}");
    assert_eq!(second.stop(), Some(0));
}

#[test]
fn ctrl_c_saves_and_the_next_start_goes_on() {
    let home = tempfile::tempdir().unwrap();
    ingest(home.path());
    let mut child =
        loquat(home.path()).args(train(home.path(), "r", "1")).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let checkpoint = home.path().join("store/runs/r/checkpoints/00000003/manifest.json");
    while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no checkpoint came");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let code = wait_exit(&mut child);
    let text = run_whole(home.path(), "r", "1");
    if code == Some(75) {
        let started = text.lines().find(|l| l.contains("\"started\"")).expect("it says where it goes on");
        assert!(!started.contains("\"step\":0,"), "{started}");
    }
    assert!(text.contains("\"finished\""), "{text}");
}
