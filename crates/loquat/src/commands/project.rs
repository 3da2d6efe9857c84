//! `loquat project`: what the jobs of each project may use at once.

use std::process::ExitCode;

use anyhow::{Result, bail};
use control::{Project, Quota};

use crate::args::ProjectCommand;
use crate::home::Home;
use crate::machine::bytes_text;

pub(crate) fn run(home: &Home, command: &ProjectCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        ProjectCommand::Set { name, cores, memory_gb, accelerators, jobs } => {
            let quota =
                Quota { cores: *cores, memory_bytes: *memory_gb, accelerators: *accelerators, jobs: *jobs };
            control.put_project(&Project { name: name.clone(), quota })?;
        }
        ProjectCommand::List => {
            for Project { name, quota } in control.list_projects()? {
                let text = |limit: Option<u32>| limit.map_or("any".to_owned(), |n| n.to_string());
                println!(
                    "{name:<24} {} cores, {} memory, {} accelerators, {} jobs",
                    text(quota.cores),
                    quota.memory_bytes.map_or("any".to_owned(), bytes_text),
                    text(quota.accelerators),
                    text(quota.jobs)
                );
            }
        }
        ProjectCommand::Remove { name } => {
            if !control.delete_project(name)? {
                bail!("project {name} has no quota");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
