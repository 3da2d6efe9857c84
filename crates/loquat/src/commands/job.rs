//! `loquat job`: what the control plane runs.

use std::process::ExitCode;

use anyhow::{Context, Result};
use control::{Control, Job};

use crate::args::JobCommand;
use crate::home::Home;

const JOBS_SHOWN: usize = 100;
const LOG_BYTES_SHOWN: usize = 16 << 10;

pub(crate) fn run(home: &Home, command: &JobCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        JobCommand::List => {
            for job in control.list_jobs(JOBS_SHOWN)? {
                let message = job.message.unwrap_or_default();
                println!(
                    "{:<10} {:<24} {:<12} {} starts {message}",
                    job.id.to_string(),
                    job.spec.name,
                    job.state.as_str(),
                    job.n_starts
                );
            }
        }
        JobCommand::Logs { name } => {
            println!("{}", control.job_log_tail(find(&control, name)?.id, LOG_BYTES_SHOWN)?);
        }
        JobCommand::Cancel { name } => {
            let job = control.cancel_job(find(&control, name)?.id)?;
            println!("{} {} will be {}", job.id, job.spec.name, job.desired.as_str());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The newest job of that name or id.
fn find(control: &Control, name: &str) -> Result<Job> {
    let jobs = control.list_jobs(usize::MAX)?;
    let found = jobs.into_iter().find(|j| j.spec.name == name || j.id.to_string() == name);
    found.with_context(|| format!("there is no job {name}"))
}
