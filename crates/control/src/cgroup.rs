//! Holding jobs to what they asked for, by the kernel's control groups.
//!
//! Whoever runs the machine makes groups for us and says where: one directory of version 2 (systemd's `Delegate=yes`), or one
//! for each hierarchy of version 1. Each attempt of a job gets a group of its own below, before its process runs anything;
//! what a process starts is in its group. More memory than was asked for ends the job by signal 9; cores are shared out in
//! time. What has asked for nothing is not limited.

use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::PathBuf;

use crate::job::Needs;
use crate::process::ProcessRef;

/// In which a job may use its cores for as long as it has cores.
const PERIOD_US: u64 = 100_000;

#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    parents: Vec<PathBuf>,
}

impl Cgroups {
    /// Errors: a group cannot be made there, or memory and cores cannot both be limited.
    pub(crate) fn new(parents: Vec<PathBuf>) -> Result<Cgroups> {
        let cgroups = Cgroups { parents };
        let most = Needs { cores: 1 << 10, memory_bytes: 1 << 50, ..Needs::default() };
        let group = format!("loquat-probe-{}", std::process::id());
        let made = cgroups.make(&group, &most);
        let removed = cgroups.remove_group(&group);
        made.and(removed).map(|()| cgroups)
    }

    /// Puts a process, which has started nothing yet, into a group with these limits.
    pub(crate) fn hold(&self, process: &ProcessRef, needs: &Needs) -> Result<()> {
        let of_all = Needs {
            cores: needs.cores.saturating_mul(needs.n_ranks()),
            memory_bytes: needs.memory_bytes.saturating_mul(needs.n_ranks().into()),
            ..*needs
        };
        let group = name(process);
        self.make(&group, &of_all)?;
        for parent in &self.parents {
            fs::write(parent.join(&group).join("cgroup.procs"), process.pid.to_string())?;
        }
        Ok(())
    }

    /// Removes the group of a process that is gone, with all that it has started.
    pub(crate) fn remove(&self, process: &ProcessRef) -> Result<()> {
        self.remove_group(&name(process))
    }

    fn make(&self, group: &str, needs: &Needs) -> Result<()> {
        let (mut holds_memory, mut holds_cores) = (needs.memory_bytes == 0, needs.cores == 0);
        let quota_us = u64::from(needs.cores) * PERIOD_US;
        for parent in &self.parents {
            let group = parent.join(group);
            fs::create_dir(&group)?;
            // Files of version 2, and of version 1.
            for (file, text) in [
                ("memory.max", needs.memory_bytes.to_string()),
                ("memory.limit_in_bytes", needs.memory_bytes.to_string()),
            ] {
                if needs.memory_bytes > 0 && group.join(file).exists() {
                    fs::write(group.join(file), text)?;
                    holds_memory = true;
                }
            }
            for (file, text) in
                [("cpu.max", format!("{quota_us} {PERIOD_US}")), ("cpu.cfs_quota_us", quota_us.to_string())]
            {
                if needs.cores > 0 && group.join(file).exists() {
                    fs::write(group.join(file), text)?;
                    holds_cores = true;
                }
            }
        }
        match self.parents.is_empty() || (holds_memory && holds_cores) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Unsupported, "they do not limit both memory and cores")),
        }
    }

    fn remove_group(&self, group: &str) -> Result<()> {
        for parent in &self.parents {
            match fs::remove_dir(parent.join(group)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Of an attempt: no two have the same mark.
fn name(process: &ProcessRef) -> String {
    format!("loquat-{}", process.mark)
}
