//! `loquat job`: what the control plane runs.

use std::io::{Read, Seek, SeekFrom};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::{Control, Job, JobId};

use crate::args::JobCommand;
use crate::home::Home;

const JOBS_SHOWN: usize = 100;
const LOG_BYTES_SHOWN: usize = 16 << 10;
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

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
        JobCommand::Logs { name, follow: false } => {
            println!("{}", control.job_log_tail(find(&control, name)?.id, LOG_BYTES_SHOWN)?);
        }
        JobCommand::Logs { name, follow: true } => follow(&control, find(&control, name)?.id)?,
        JobCommand::Retry { name } => {
            let job = find(&control, name)?;
            ensure!(
                job.state.is_over(),
                "{} is {}; only what is over is run again",
                job.id,
                job.state.as_str()
            );
            println!("{}", control.submit(&job.spec)?.job.id);
        }
        JobCommand::Cancel { name } => {
            let job = control.cancel_job(find(&control, name)?.id)?;
            println!("{} {} will be {}", job.id, job.spec.name, job.desired.as_str());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what the job has written and writes, until it is over.
fn follow(control: &Control, id: JobId) -> Result<()> {
    let mut shown: Option<u64> = None;
    loop {
        // Looked at before the log: what it wrote last is not missed.
        let job = control.get_job(id)?.with_context(|| format!("{id} is gone"))?;
        if let Some(path) = &job.log_path {
            let mut file =
                std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            let n_bytes = file.metadata()?.len();
            // A log that was cut begins anew.
            let from = shown
                .filter(|from| *from <= n_bytes)
                .unwrap_or(n_bytes.saturating_sub(LOG_BYTES_SHOWN as u64));
            file.seek(SeekFrom::Start(from))?;
            let copied = std::io::copy(&mut file.take(n_bytes - from), &mut std::io::stdout().lock())?;
            shown = Some(from + copied);
        }
        if job.state.is_over() {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// The newest job of that name or id.
fn find(control: &Control, name: &str) -> Result<Job> {
    let jobs = control.list_jobs(usize::MAX)?;
    let found = jobs.into_iter().find(|j| j.spec.name == name || j.id.to_string() == name);
    found.with_context(|| format!("there is no job {name}"))
}
