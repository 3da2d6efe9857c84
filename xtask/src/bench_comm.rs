//! `cargo xtask bench comm`: sums over ranks beside the MPI library's own, how a run on two ranks scales, and how much of its
//! exchange is hidden.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Wide enough that a step computes longer than it exchanges: 8.4 million parameters.
const SHAPE: &str = r#"{"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 320, "num_attention_heads": 5,
    "num_key_value_heads": 5, "intermediate_size": 896, "vocab_size": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 256}"#;
const RUN: &str = "--dataset d --steps 8 --checkpoint-every 100 --rows 4 --micro-batches 8 --context 256 --threads 1 --json";

/// One micro-batch a rank and step: all that travels does so beside its own backward pass.
const WIDE: &str = "--dataset words --preset gpt2-124m --steps 4 --checkpoint-every 100 --rows 4 --micro-batches 2 --context 512 \
    --threads 1 --json";

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
    crate::run(root, "cargo", &["build", "--release", "--quiet", "-p", "loquat"])?;
    let bench = Bench { program: root.join("target/release/loquat"), home: tempfile::tempdir()?, mpirun };
    bench.scaling(root)?;
    bench.hidden()
}

/// A program and a home for its runs.
struct Bench {
    program: PathBuf,
    home: tempfile::TempDir,
    mpirun: PathBuf,
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

impl Bench {
    /// Runs the program on so many ranks; what it prints.
    fn loquat(&self, n_ranks: usize, words: &str) -> Result<String> {
        let mut command = match n_ranks {
            1 => Command::new(&self.program),
            _ => mpi(&self.mpirun, &n_ranks.to_string()),
        };
        if n_ranks > 1 {
            command.arg(&self.program);
        }
        let at = self.home.path().to_str().context("the directory's name is not UTF-8")?;
        let output = command.args(["--home", at]).args(words.split_whitespace()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Tokens a second of 2 ranks against twice those of 1, each of one thread.
    fn scaling(&self, root: &Path) -> Result<()> {
        let config = self.home.path().join("config.json");
        std::fs::write(&config, SHAPE)?;
        let text = root.join("fixtures/text").display().to_string();
        self.loquat(1, &format!("ingest --name d --vocab 2048 --validation 0.1 {text}"))?;
        let mut alone = None;
        for (n_ranks, stage) in [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)] {
            let run = format!("r{n_ranks}-{stage}");
            let words = format!("train --run {run} {RUN} --zero {stage} --config {}", config.display());
            let best = best_step(&self.loquat(n_ranks, &words)?);
            let alone = *alone.get_or_insert(best.speed);
            println!(
                "{n_ranks} ranks of 1 thread, --zero {stage}: {:.0} tokens/s, {:.0} % of linear; {}",
                best.speed,
                100.0 * best.speed / alone / n_ranks as f64,
                best.exchange()
            );
        }
        Ok(())
    }

    /// How much of the exchange of GPT-2's 124 million gradients goes on beside the backward pass.
    fn hidden(&self) -> Result<()> {
        let text = self.home.path().join("words.txt");
        std::fs::write(&text, words())?;
        self.loquat(1, &format!("ingest --name words --vocab 50257 --validation 0 {}", text.display()))?;
        for stage in 0..=3 {
            let words = format!("train --run wide-{stage} {WIDE} --zero {stage}");
            let best = best_step(&self.loquat(2, &words)?);
            println!("gpt2-124m, 2 ranks, --zero {stage}: {:.0} tokens/s; {}", best.speed, best.exchange());
        }
        Ok(())
    }
}

/// Many words, each of them twice: enough for a vocabulary of GPT-2's size.
fn words() -> String {
    let mut state = 1_u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let letter = |i: u32| char::from(b'a' + ((state >> (8 + 7 * i)) % 26) as u8);
        let word: String = (0..7).map(letter).collect();
        format!("{word} {word}\n")
    };
    (0..40_000).map(|_| word()).collect()
}

/// The fastest step of a run.
struct Best {
    speed: f64,
    /// Seconds of waiting for the exchange, and of values under way.
    waited: f64,
    travelled: f64,
}

impl Best {
    fn exchange(&self) -> String {
        let hidden = 100.0 * (1.0 - self.waited / self.travelled).max(0.0);
        let (waited, travelled) = (1e3 * self.waited, 1e3 * self.travelled);
        format!("waited {waited:.0} ms a step for what travelled {travelled:.0} ms: {hidden:.0} % hidden")
    }
}

fn best_step(events: &str) -> Best {
    let steps = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps = steps.filter(|event| event["event"] == "step");
    let numbers = steps.filter_map(|step| {
        let seconds = |name: &str| step["ranks"][name].as_f64().unwrap_or_default();
        let (waited, travelled) = (seconds("exchange_seconds"), seconds("travel_seconds"));
        Some(Best { speed: step["tokens_per_second"].as_f64()?, waited, travelled })
    });
    let nothing = Best { speed: f64::NAN, waited: f64::NAN, travelled: f64::NAN };
    numbers.max_by(|a, b| a.speed.total_cmp(&b.speed)).unwrap_or(nothing)
}
