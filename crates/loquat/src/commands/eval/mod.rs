//! `loquat eval`: how good a model is.

mod perplexity;
mod tasks;

use std::process::ExitCode;

use anyhow::Result;

use crate::args::EvalCommand;
use crate::home::Home;

pub(crate) fn run(home: &Home, command: &EvalCommand) -> Result<ExitCode> {
    match command {
        EvalCommand::Perplexity(args) => perplexity::run(home, args),
        EvalCommand::Tasks(args) => tasks::run(home, args),
    }
}
