//! The project's own commands: `cargo xtask ci`, `tidy`, `bench`. CI runs `ci` and nothing else.
#![forbid(unsafe_code)]

mod bench;
mod bench_comm;
mod bench_engine;
mod bench_serve;
mod bench_speculation;
mod bench_train;
mod ci;
mod load;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Parser;

#[derive(Parser)]
enum Args {
    /// Format, lints, tidy, console checks and every test.
    Ci {
        /// Also the slow tests.
        #[arg(long)]
        long: bool,
    },
    /// The rules that no compiler checks: crate edges, file sizes, unsafe, licences, documents.
    Tidy,
    /// Measures the hot paths, each beside the machine's limit and, where one is given, beside a rival.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let root = root();
    let done = match Args::parse() {
        Args::Ci { long } => ci::run(&root, long),
        Args::Tidy => tidy::run(&root),
        Args::Bench(args) => bench::run(&root, &args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Runs a command in the repository's root and fails when it does.
fn run(root: &Path, program: &str, args: &[&str]) -> Result<()> {
    let line = format!("{program} {}", args.join(" "));
    let status = Command::new(program).args(args).current_dir(root).status();
    let status = status.with_context(|| format!("cannot start {line}"))?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}
