//! kill −9, for real: of a training process at random moments, and of the controller above it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::demo::demo;
use crate::support::{PATIENCE, Running, loquat, speeches, succeed, wait_exit};

const TRAIN: &[&str] = &[
    "train",
    "--dataset",
    "d",
    "--run",
    "r",
    "--publish",
    "m",
    "--json",
    "--steps",
    "14",
    "--checkpoint-every",
    "3",
    "--rows",
    "2",
    "--micro-batches",
    "2",
    "--context",
    "64",
];

fn ingest(home: &Path) {
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text.to_str().unwrap()],
    );
}

/// The published weights: the one object of the model's bundle that holds them.
fn weights(home: &Path) -> Vec<u8> {
    let dir = home.join("store/models/m");
    let file = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
    let file = file.into_iter().find(|p| p.to_string_lossy().ends_with("model.safetensors"));
    std::fs::read(file.expect("no weights were published")).unwrap()
}

/// `./test --long`: ten runs, each killed until it is through.
#[cfg(feature = "long")]
#[test]
fn ten_killed_runs_end_with_the_same_bytes() {
    for _ in 0..10 {
        killed_run_ends_with_the_same_bytes();
    }
}

#[test]
fn training_killed_at_random_moments_ends_with_the_same_bytes() {
    killed_run_ends_with_the_same_bytes();
}

fn killed_run_ends_with_the_same_bytes() {
    let whole = tempfile::tempdir().unwrap();
    ingest(whole.path());
    let start = Instant::now();
    succeed(whole.path(), TRAIN);
    let run_time = start.elapsed();

    let killed = tempfile::tempdir().unwrap();
    ingest(killed.path());
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (mut random, mut n_kills) = (seed, 0);
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "seed {seed}: not done after {n_kills} kills");
        let mut child = loquat(killed.path()).args(TRAIN).stdout(Stdio::null()).spawn().unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Moments from the first instant to beyond the end; later ones as kills go on, so that it ends.
        let share = (random >> 33) as f64 / (1u64 << 31) as f64 * (0.6 + 0.1 * f64::from(n_kills));
        let moment = Instant::now() + run_time.mul_f64(share);
        let mut ended = false;
        while Instant::now() < moment && !ended {
            ended = child.try_wait().unwrap().is_some();
            std::thread::sleep(Duration::from_millis(2));
        }
        if ended {
            assert_eq!(wait_exit(&mut child), Some(0), "seed {seed}");
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        n_kills += 1;
    }
    println!("seed {seed}: {n_kills} kills");
    assert!(
        weights(killed.path()) == weights(whole.path()),
        "seed {seed}: other weights after {n_kills} kills"
    );
}

#[test]
fn two_ranks_train_the_same_bytes_as_one() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (home, ranks) in [(&one, "1"), (&two, "2")] {
        ingest(home.path());
        succeed(home.path(), &[TRAIN, &["--ranks", ranks]].concat());
    }
    assert!(weights(one.path()) == weights(two.path()));
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
    let mut child = loquat(home.path()).args(TRAIN).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let checkpoint = home.path().join("store/runs/r/checkpoints/00000003/manifest.json");
    while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no checkpoint came");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let code = wait_exit(&mut child);
    let text = succeed(home.path(), TRAIN);
    if code == Some(75) {
        let started = text.lines().find(|l| l.contains("\"started\"")).expect("it says where it goes on");
        assert!(!started.contains("\"step\":0,"), "{started}");
    }
    assert!(text.contains("\"finished\""), "{text}");
}
