//! Inference beside llama.cpp: the same files, threads and tests, in turns, medians and ratios.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

const THREADS: &str = "2";
/// Streams of 128 tokens in, 128 out.
const STREAMS: [usize; 2] = [8, 32];

/// One test, in words that both programs know.
struct Test {
    name: &'static str,
    /// How often, of which the median is taken. At depth each time reads the whole prompt first: a minute of llama.cpp's.
    times: &'static str,
    args: &'static [&'static str],
}

const TESTS: [Test; 3] = [
    Test { name: "prefill 512", times: "5", args: &["-p", "512", "-n", "0"] },
    Test { name: "decode 128", times: "5", args: &["-p", "0", "-n", "128"] },
    Test { name: "decode 32 at 8,000", times: "1", args: &["-p", "0", "-n", "32", "-d", "8000"] },
];

/// Medians, tokens/s.
#[derive(Clone, Copy)]
struct Row {
    ours: f64,
    share: f64,
    rival: Option<f64>,
}

pub(crate) fn run(root: &Path, models: &[String], llama_bench: Option<&Path>) -> Result<()> {
    crate::run(root, "cargo", &["build", "--release", "--quiet", "--package", "loquat"])?;
    println!("model | test | tokens/s | of the limit | llama.cpp's | ratio");
    for model in models {
        let mut idle = None;
        for test in &TESTS {
            let row = side_by_side(root, model, test, llama_bench)?;
            print(model, test.name, row);
            idle = if test.name == "decode 128" { Some(row) } else { idle };
        }
        for n_streams in STREAMS {
            let row = streams(root, model, n_streams, llama_bench)?;
            print(model, &format!("{n_streams} streams"), row);
        }
        let neighbours = Neighbours::start()?;
        let busy = side_by_side(root, model, &TESTS[1], llama_bench)?;
        drop(neighbours);
        print(model, "decode 128, cores busy", busy);
        if let Some(idle) = idle {
            println!("{model} | busy over idle: {:.0} %", 100.0 * busy.ours / idle.ours);
        }
    }
    if llama_bench.is_none() {
        println!("(give --llama-bench to see llama.cpp on the same files)");
    }
    Ok(())
}

/// Ours, the rival, ours again: a drift of the machine shows as a difference of the two, of which the mean is taken.
fn side_by_side(root: &Path, model: &str, test: &Test, llama_bench: Option<&Path>) -> Result<Row> {
    let (first, share) = ours(root, model, test.times, test.args)?;
    let rival = match llama_bench {
        None => None,
        Some(program) => {
            let fixed = ["-m", model, "-t", THREADS, "-r", test.times, "-o", "jsonl"];
            let line = last_json(root, program, &[&fixed[..], test.args].concat())?;
            let samples = line["samples_ts"].as_array().context("llama-bench's samples_ts")?;
            let samples: Vec<f64> = samples.iter().filter_map(Value::as_f64).collect();
            Some(median(samples).context("llama-bench measured nothing")?)
        }
    };
    let (second, _) = ours(root, model, test.times, test.args)?;
    Ok(Row { ours: (first + second) / 2.0, share, rival })
}

fn streams(root: &Path, model: &str, n_streams: usize, llama_bench: Option<&Path>) -> Result<Row> {
    let streams = n_streams.to_string();
    let (ours, share) = ours(root, model, "5", &["-p", "0", "-n", "128", "-d", "128", "-b", &streams])?;
    let rival = match llama_bench.map(|program| program.with_file_name("llama-batched-bench")) {
        None => None,
        Some(program) => {
            let context = (n_streams * 256).to_string();
            let fixed = ["-m", model, "-t", THREADS, "-c", &context, "--output-format", "jsonl"];
            let size = ["-npp", "128", "-ntg", "128", "-npl", &streams];
            let line = last_json(root, &program, &[&fixed[..], &size].concat())?;
            Some(line["speed_tg"].as_f64().context("llama-batched-bench's speed_tg")?)
        }
    };
    Ok(Row { ours, share, rival })
}

/// Median tokens/s, and the share of the limit.
fn ours(root: &Path, model: &str, times: &str, test: &[&str]) -> Result<(f64, f64)> {
    let fixed = ["bench", model, "-t", THREADS, "-r", times, "-o", "jsonl"];
    let line = last_json(root, &root.join("target/release/loquat"), &[&fixed[..], test].concat())?;
    let number = |name: &str| line[name].as_f64().with_context(|| format!("loquat bench's {name}"));
    Ok((number("tokens_per_s")?, number("limit_share")?))
}

fn last_json(root: &Path, program: &Path, args: &[&str]) -> Result<Value> {
    let output = Command::new(program).args(args).current_dir(root).stderr(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(output.status.success(), "{} {}: {}", program.display(), args.join(" "), output.status);
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("{} printed no result", program.display()))?;
    Ok(serde_json::from_str(line)?)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn print(model: &str, test: &str, row: Row) {
    let Row { ours, share, rival } = row;
    let name = Path::new(model).file_stem().and_then(|name| name.to_str()).unwrap_or(model);
    let (theirs, ratio) = match rival {
        Some(rival) => (format!("{rival:.1}"), format!("{:.2}", ours / rival)),
        None => ("–".to_owned(), "–".to_owned()),
    };
    println!("{name} | {test} | {ours:.1} | {:.0} % | {theirs} | {ratio}", 100.0 * share);
}

/// A process on every core that computes and never waits; stopped when dropped.
struct Neighbours(Vec<Child>);

impl Neighbours {
    fn start() -> Result<Neighbours> {
        let n_cores = std::thread::available_parallelism()?.get();
        let spin = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        let children: Result<Vec<Child>, _> = (0..n_cores).map(|_| spin()).collect();
        Ok(Neighbours(children.context("cannot start sh")?))
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It runs for ever unless somebody else stopped it: then there is nothing to do.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
