//! `loquat job`: what the control plane runs.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use control::{Control, Job, JobId, JobSpec};

use crate::args::JobCommand;
use crate::home::Home;

const JOBS_SHOWN: usize = 100;
const LOG_BYTES_SHOWN: usize = 16 << 10;
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

pub(crate) fn run(home: &Home, command: &JobCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        JobCommand::List => {
            let waiting = control.waiting()?;
            for job in control.list_jobs(JOBS_SHOWN)? {
                let why = waiting.get(&job.id).map(|wait| wait.to_string()).or(job.message);
                println!(
                    "{:<10} {:<24} {:<12} {} starts {}",
                    job.id.to_string(),
                    job.spec.name,
                    job.state.as_str(),
                    job.n_starts,
                    why.unwrap_or_default()
                );
            }
        }
        JobCommand::Submit { name, needs, ranks, priority, project, restarts, args } => {
            let spec = JobSpec {
                name: name.clone(),
                args: home.as_args().into_iter().chain(args.iter().cloned()).collect(),
                max_restarts: *restarts,
                needs: needs.needs(*ranks),
                priority: *priority,
                project: project.clone(),
                ..JobSpec::default()
            };
            println!("{}", control.submit(&spec)?.job.id);
        }
        JobCommand::Show { name } => {
            let job = find(&control, name)?;
            let view = crate::cluster::job_view(&job, control.waiting()?.get(&job.id));
            println!("{}", serde_json::to_string_pretty(&view)?);
        }
        JobCommand::Logs { name, follow: false } => {
            println!("{}", control.job_log_tail(find(&control, name)?.id, LOG_BYTES_SHOWN)?);
        }
        JobCommand::Logs { name, follow: true } => follow(&control, find(&control, name)?.id)?,
        JobCommand::Retry { name } => println!("{}", control.retry_job(find(&control, name)?.id)?.id),
        JobCommand::Cancel { name } => {
            let job = control.cancel_job(find(&control, name)?.id)?;
            println!("{} {} will be {}", job.id, job.spec.name, job.desired.as_str());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what the job has written and writes, until it is over.
fn follow(control: &Control, id: JobId) -> Result<()> {
    let mut shown = None;
    loop {
        // Looked at before the log: what it wrote last is not missed.
        let job = control.get_job(id)?.with_context(|| format!("{id} is gone"))?;
        loop {
            let (bytes, next) = control.job_log_from(&job, shown, LOG_BYTES_SHOWN)?;
            std::io::stdout().lock().write_all(&bytes)?;
            shown = Some(next);
            if bytes.is_empty() {
                break;
            }
        }
        if job.state.is_over() {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// The newest job of that name or id.
fn find(control: &Control, name: &str) -> Result<Job> {
    control.find_job(name)?.with_context(|| format!("there is no job {name}"))
}
