//! `cargo xtask bench comm`: sums over ranks beside the MPI library's own, and how a run on two ranks scales.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Wide enough that a step computes longer than it exchanges: 8.4 million parameters.
const SHAPE: &str = r#"{"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 320, "num_attention_heads": 5,
    "num_key_value_heads": 5, "intermediate_size": 896, "vocab_size": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 256}"#;
const RUN: &str = "--dataset d --steps 8 --checkpoint-every 100 --rows 4 --micro-batches 8 --context 256 --threads 1 --json";

pub(crate) fn run(root: &Path) -> Result<()> {
    let Some(mpirun) = mpirun(root) else {
        println!("there is no mpirun: ./test installs one");
        return Ok(());
    };
    let library = mpirun.with_file_name("../lib/libmpi.so.40");
    crate::run(root, "cargo", &["build", "--release", "--quiet", "-p", "comm", "--example", "bench_comm"])?;
    for n_ranks in ["2", "4"] {
        let mut command = mpi(&mpirun, n_ranks);
        command.arg(root.join("target/release/examples/bench_comm"));
        if library.exists() {
            command.arg(&library);
        }
        ensure!(command.status().context("cannot start mpirun")?.success(), "bench_comm failed");
    }
    scaling(root, &mpirun)
}

fn mpirun(root: &Path) -> Option<PathBuf> {
    let own = root.join("var/venv-mpi/bin/mpirun");
    if own.exists() {
        return Some(own);
    }
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join("mpirun")).find(|path| path.exists())
}

fn mpi(mpirun: &Path, n_ranks: &str) -> Command {
    let mut command = Command::new(mpirun);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.args(["--oversubscribe", "--bind-to", "none", "-n", n_ranks]);
    command
}

/// Tokens a second of 2 ranks against twice those of 1, each of one thread.
fn scaling(root: &Path, mpirun: &Path) -> Result<()> {
    crate::run(root, "cargo", &["build", "--release", "--quiet", "-p", "loquat"])?;
    let program = root.join("target/release/loquat");
    let home = tempfile::tempdir()?;
    let config = home.path().join("config.json");
    std::fs::write(&config, SHAPE)?;
    let loquat = |mut command: Command, words: &str| -> Result<String> {
        let at = home.path().to_str().context("the directory's name is not UTF-8")?;
        let output = command.args(["--home", at]).args(words.split_whitespace()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let text = root.join("fixtures/text").display().to_string();
    loquat(Command::new(&program), &format!("ingest --name d --vocab 2048 --validation 0.1 {text}"))?;
    let mut speeds = Vec::new();
    for (run, n_ranks, extra) in [("one", "1", ""), ("two", "2", ""), ("two-zero", "2", "--zero 1")] {
        let command =
            if n_ranks == "1" { Command::new(&program) } else { with(mpi(mpirun, n_ranks), &program) };
        let words = format!("train --run {run} {RUN} {extra} --config {}", config.display());
        let events = loquat(command, &words)?;
        let (speed, exchange) = best_step(&events);
        speeds.push(speed);
        println!(
            "{run}: {speed:.0} tokens/s on {n_ranks} ranks of 1 thread, {:.0} % of linear; exchange {:.1} ms a step",
            100.0 * speed / speeds[0] / if n_ranks == "1" { 1.0 } else { 2.0 },
            1e3 * exchange
        );
    }
    Ok(())
}

fn with(mut command: Command, program: &Path) -> Command {
    command.arg(program);
    command
}

/// Of the fastest step: its speed and how long gradients travelled.
fn best_step(events: &str) -> (f64, f64) {
    let steps = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps = steps.filter(|event| event["event"] == "step");
    let numbers = steps.filter_map(|step| {
        let exchange = step["ranks"]["exchange_seconds"].as_f64().unwrap_or_default();
        Some((step["tokens_per_second"].as_f64()?, exchange))
    });
    numbers.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::NAN, f64::NAN))
}
