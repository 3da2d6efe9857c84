//! `cargo xtask bench train`: steps of training beside PyTorch's, and their ratios.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

const SHAPES: [&str; 4] = ["demo", "peers", "gpt2-124m", "lora-135m"];
const PRECISIONS: [&str; 2] = ["f32", "bf16"];
/// What PyTorch is run as: its best counts.
const TORCH_MODES: [&[&str]; 4] = [&[], &["--compile"], &["--bf16"], &["--bf16", "--compile"]];

/// A line of JSON of either side.
#[derive(Debug, Clone, Deserialize)]
struct Measured {
    precision: String,
    mode: String,
    tokens_per_s: f64,
    tokens_per_s_by_cpu_time: f64,
    peak_mib: f64,
}

/// Ours, the rival in all its ways, ours again: a drift of the machine shows. Each in a process of its own, for its peak of
/// memory.
pub(crate) fn run(root: &Path, torch_python: Option<&Path>) -> Result<()> {
    for shape in SHAPES {
        let mut ours = own(root, shape)?;
        let Some(python) = torch_python else { continue };
        let mut theirs = Vec::new();
        for mode in TORCH_MODES {
            let args = [&["fixtures/torch/bench_train.py", "--shape", shape][..], mode].concat();
            match measure(root, &python.display().to_string(), &args) {
                Ok(measured) => theirs.extend(measured),
                // Not every mode takes every shape; the others still count.
                Err(error) => println!("PyTorch {}: {error:#}", mode.join(" ")),
            }
        }
        ours.extend(own(root, shape)?);
        ratios(shape, &ours, &theirs);
    }
    if torch_python.is_none() {
        println!("(give --torch-python to see PyTorch on the same shapes)");
    }
    Ok(())
}

fn own(root: &Path, shape: &str) -> Result<Vec<Measured>> {
    let cargo =
        ["run", "--release", "--quiet", "--package", "model", "--example", "bench_train", "--", shape];
    let each =
        PRECISIONS.iter().map(|precision| measure(root, "cargo", &[&cargo[..], &[precision]].concat()));
    Ok(each.collect::<Result<Vec<_>>>()?.concat())
}

/// Shows what a process prints, and reads its lines of JSON.
fn measure(root: &Path, program: &str, args: &[&str]) -> Result<Vec<Measured>> {
    let output = Command::new(program).args(args).current_dir(root).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    ensure!(output.status.success(), "{program}: {}", output.status);
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Speed over the rival's best, by the clock and by processor time (which does not feel neighbours), and memory over that
/// of the rival's leanest.
fn ratios(shape: &str, ours: &[Measured], theirs: &[Measured]) {
    let is = |precision: &str| {
        let precision = precision.to_owned();
        move |m: &&Measured| m.precision.starts_with(&precision)
    };
    for (name, ours_in, theirs_in) in [
        ("f32 over its f32", "f32", "f32"),
        ("bf16 over its best", "bf16", ""),
        ("best over its best", "", ""),
    ] {
        let ours: Vec<&Measured> = ours.iter().filter(is(ours_in)).collect();
        let theirs: Vec<&Measured> = theirs.iter().filter(is(theirs_in)).collect();
        let (wall, mode) = ratio(&ours, &theirs, |m| m.tokens_per_s);
        let (cpu, _) = ratio(&ours, &theirs, |m| m.tokens_per_s_by_cpu_time);
        let least = |of: &[&Measured]| of.iter().map(|m| m.peak_mib).fold(f64::INFINITY, f64::min);
        let memory = least(&ours) / least(&theirs);
        println!(
            "{shape:12} {name:18} {wall:.2} times ({mode}), {cpu:.2} by processor time, memory {memory:.2} times"
        );
    }
}

/// Of the best of both, and which of the rival's modes that is.
fn ratio(ours: &[&Measured], theirs: &[&Measured], of: fn(&Measured) -> f64) -> (f64, String) {
    let best = |all: &[&Measured]| all.iter().copied().max_by(|a, b| of(a).total_cmp(&of(b))).cloned();
    match (best(ours), best(theirs)) {
        (Some(a), Some(b)) => (of(&a) / of(&b), format!("{}, {}", b.precision, b.mode)),
        _ => (f64::NAN, "nothing to compare with".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_rival_counts() {
        let one = |precision: &str, mode: &str, tokens_per_s: f64| Measured {
            precision: precision.to_owned(),
            mode: mode.to_owned(),
            tokens_per_s,
            tokens_per_s_by_cpu_time: tokens_per_s,
            peak_mib: 1.0,
        };
        let (ours, eager, compiled) =
            (one("f32", "loquat", 30.0), one("f32", "eager", 10.0), one("bf16 autocast", "compiled", 20.0));
        let (times, mode) = ratio(&[&ours], &[&eager, &compiled], |m| m.tokens_per_s);
        assert_eq!((times, mode.as_str()), (1.5, "bf16 autocast, compiled"));
        assert!(ratio(&[&ours], &[], |m| m.tokens_per_s).0.is_nan());
    }
}
