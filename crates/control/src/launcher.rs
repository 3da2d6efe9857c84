//! What starts processes: child processes here, a batch system elsewhere.

use std::path::PathBuf;

use crate::error::Result;
use crate::job::{Ending, Job};
use crate::process::ProcessRef;

/// What was seen of a job's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It, or something it started, is still there.
    Running,
    /// It has ended and nothing it started is left.
    Ended(Ending),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopHow {
    /// Ask it to save and exit.
    Ask,
    /// End it and everything it started, now.
    Kill,
}

/// A process that exists and waits to be let go.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub process: ProcessRef,
    pub log_path: Option<PathBuf>,
}

/// Starts, watches and stops the processes of jobs.
///
/// Starting takes two steps, so that no crash leaves a process nobody knows of: [`Launcher::prepare`] makes a process that
/// does nothing yet, its identity is recorded, and only then [`Launcher::release`] lets it run. A prepared process whose
/// controller dies before the release ends by itself without having done anything.
pub trait Launcher {
    /// Makes a process for the job that waits for its release.
    fn prepare(&mut self, job: &Job) -> Result<Prepared>;

    /// Lets a prepared process run.
    fn release(&mut self, process: &ProcessRef) -> Result<()>;

    /// Ends a prepared process that must not run.
    fn abandon(&mut self, process: &ProcessRef) -> Result<()>;

    /// What the process of `job` does. Works on processes another controller started; how those ended cannot be told.
    /// The answer stays the same until [`Launcher::forget`].
    fn poll(&mut self, job: &Job) -> Result<Observed>;

    /// Stops a process; one that is gone is no error.
    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()>;

    /// The end of this process is recorded.
    fn forget(&mut self, process: &ProcessRef);

    /// Housekeeping, called now and then whether or not this controller holds the lease.
    fn tick(&mut self);
}
