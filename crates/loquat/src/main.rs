//! The one binary. What this is: flags, files and wiring; every capability lives in a crate below.
//! Where to start: `args.rs` is the command line; `commands/` has one file a subcommand; `service.rs` is what runs
//! while a Loquat is up.
#![forbid(unsafe_code)]

mod adapters;
mod args;
mod cluster;
mod commands;
mod deployer;
mod embedder;
mod follow;
mod home;
mod http;
mod hub;
mod links;
mod lives;
mod machine;
mod pods;
mod promoter;
mod runs;
mod service;
mod serving;
mod session;
mod signals;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use args::{Command, Loquat};
use clap::Parser;
use home::Home;
use sha2::{Digest, Sha256};
use telemetry::LogFormat;

fn main() -> ExitCode {
    let loquat = Loquat::parse_from(args::spelled_out(std::env::args_os()));
    let format = if loquat.log_json { LogFormat::Json } else { LogFormat::Text };
    let filter = std::env::var("LOQUAT_LOG").unwrap_or_else(|_| "warn".to_owned());
    if let Err(error) = telemetry::init_logs(format, &filter) {
        eprintln!("error: LOQUAT_LOG: {error}");
        return ExitCode::from(2);
    }
    match run(&loquat) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(loquat: &Loquat) -> Result<ExitCode> {
    let home = Home::open(&loquat.home, loquat.store.clone(), loquat.database.clone())?;
    match &loquat.command {
        Command::Ingest(args) => commands::ingest::run(&home, args),
        Command::Data { command } => commands::data::run(&home, command),
        Command::Train(args) => commands::train::run(&home, args),
        Command::Serve(args) => commands::up::serve(&home, args),
        Command::Up(args) => commands::up::up(&home, args),
        Command::Demo(args) => commands::demo::run(&home, args),
        Command::Chat(args) => commands::chat::run(&home, args),
        Command::Bench(args) => commands::bench::run(&home, args),
        Command::Eval { command } => commands::eval::run(&home, command),
        Command::Model { command } => commands::model::run(&home, command),
        Command::Job { command } => commands::job::run(&home, command),
        Command::Node { command } => commands::node::run(&home, command),
        Command::Plan(args) => commands::plan::run(args),
        Command::Deploy { command } => commands::deploy::run(&home, command),
        Command::Project { command } => commands::project::run(&home, command),
        Command::Promote { command } => commands::promote::run(&home, command),
        Command::Key { command } => commands::key::run(&home, command),
        Command::Backup(args) => commands::backup::backup(&home, args),
        Command::Restore(args) => commands::backup::restore(&home, args),
        Command::PodShell { table, host, command } => pods::shell(table, host, command),
        Command::Doctor => commands::doctor::run(&home),
    }
}

/// One thread for each core that this process may use, and no more than it was given.
fn n_threads() -> usize {
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    let given = std::env::var("LOQUAT_CORES").ok().and_then(|text| text.parse::<usize>().ok());
    given.map_or(there, |given| given.clamp(1, there))
}

/// Where a program is found that is called by its name.
fn in_path(program: &str) -> Option<PathBuf> {
    let dirs = std::env::var_os("PATH")?;
    std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// So many random bytes, in hexadecimal.
fn random_hex(n_bytes: usize) -> Result<String> {
    let mut bytes = vec![0; n_bytes];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok(hex::encode(bytes))
}

fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
