//! What a job is: what was asked for, and what was seen of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;
use crate::error::{Error, Result};
use crate::models::check_name;
use crate::place::Share;
use crate::process::ProcessRef;
use crate::projects::DEFAULT_PROJECT;

/// Bytes of a job's command line and environment together.
const SPEC_BYTES_MAX: usize = 64 << 10;

/// A priority is between minus this and this.
pub const PRIORITY_MAX: i32 = 100;

/// Ranks of one job.
const RANKS_MAX: u32 = 16_384;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub i64);

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "job-{}", self.0)
    }
}

/// What to run. The program itself is the launcher's: this binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// At most one job of a name is not over at any time.
    pub name: String,
    /// The command line after the program's name.
    pub args: Vec<String>,
    /// Added to the environment of the controller.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Failures after which the job is started again; one more and it has failed. Interruptions do not count.
    pub max_restarts: u32,
    #[serde(default, skip_serializing_if = "Needs::is_nothing")]
    pub needs: Needs,
    /// Who stands higher starts earlier, and moves those below it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// Whose quota it counts against.
    #[serde(default = "default_project", skip_serializing_if = "is_default_project")]
    pub project: String,
}

/// What a job needs to run: of each rank, where it has several. Nothing is as much as it finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Needs {
    pub cores: u32,
    pub memory_bytes: u64,
    pub accelerators: u32,
    /// All of them start together or none does; 0 is 1.
    pub ranks: u32,
}

impl Needs {
    pub fn n_ranks(&self) -> u32 {
        self.ranks.max(1)
    }

    fn is_nothing(&self) -> bool {
        *self == Needs::default()
    }
}

/// A job without a name, which has to be given one.
impl Default for JobSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            max_restarts: 0,
            needs: Needs::default(),
            priority: 0,
            project: default_project(),
        }
    }
}

fn is_zero(priority: &i32) -> bool {
    *priority == 0
}

fn default_project() -> String {
    DEFAULT_PROJECT.to_owned()
}

fn is_default_project(name: &String) -> bool {
    name == DEFAULT_PROJECT
}

impl JobSpec {
    /// Whether it runs until it is told to stop, as a replica does: always started again, and beside any number of jobs.
    pub fn is_service(&self) -> bool {
        self.max_restarts == u32::MAX
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_name("job name", &self.name)?;
        check_name("project name", &self.project)?;
        let invalid = |why: &str| Err(Error::Invalid { what: "job", why: why.to_owned() });
        let env = self.env.iter().flat_map(|(k, v)| [k, v]);
        let words: Vec<&String> = self.args.iter().chain(env).collect();
        if words.iter().map(|w| w.len() + 1).sum::<usize>() > SPEC_BYTES_MAX {
            return invalid("its command line and environment are longer than 64 KiB");
        }
        if words.iter().any(|w| w.contains('\0')) {
            return invalid("its command line or environment holds a zero byte");
        }
        if !(-PRIORITY_MAX..=PRIORITY_MAX).contains(&self.priority) {
            return invalid("its priority is not between -100 and 100");
        }
        if self.needs.ranks > RANKS_MAX {
            return invalid("it has more than 16384 ranks");
        }
        if self.env.keys().any(|k| k.is_empty() || k.contains('=')) {
            return invalid("an environment variable's name is empty or holds '='");
        }
        Ok(())
    }
}

/// What the user wants of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    Running,
    Cancelled,
}

/// What a job is seen to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobState {
    /// To be started: for the first time, or again after a failure.
    Pending,
    /// Has a process.
    Running,
    /// Was stopped cleanly, or its process was lost; to be started again to go on.
    Interrupted,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::Interrupted, Self::Succeeded, Self::Failed, Self::Cancelled];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Interrupted => "interrupted",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the job is over and will never run again.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

impl Desired {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How one process of a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
    /// It is gone and nobody was there to see how: the controller was down, or the machine.
    Lost,
    /// It could not be started.
    NotStarted,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with code {code}"),
            Self::Signaled(signal) => write!(f, "was killed by signal {signal}"),
            Self::Lost => f.write_str("was lost"),
            Self::NotStarted => f.write_str("could not be started"),
        }
    }
}

/// A job as the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub id: JobId,
    pub spec: JobSpec,
    pub desired: Desired,
    pub state: JobState,
    /// Processes started so far.
    pub n_starts: u32,
    /// Attempts that failed so far.
    pub n_failures: u32,
    /// Attempts in a row that ended soon after their start; sets the pause before the next.
    pub n_short: u32,
    /// The process; there is one exactly while the job is `Running`.
    pub process: Option<ProcessRef>,
    /// Where it runs, or ran last; empty where that was not placed.
    pub placed: Vec<Share>,
    /// How the last attempt ended.
    pub ending: Option<Ending>,
    /// The last failure in words.
    pub message: Option<String>,
    pub log_path: Option<PathBuf>,
    pub created_at: UnixMs,
    /// Since when it waits, or waited for its last start.
    pub waiting_at: UnixMs,
    /// Start of the last attempt.
    pub started_at: Option<UnixMs>,
    /// When the job was over.
    pub finished_at: Option<UnixMs>,
    /// Not to be started before this.
    pub retry_at: Option<UnixMs>,
    /// When the process was last asked to stop.
    pub stop_sent_at: Option<UnixMs>,
}

/// The answer to a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    pub job: Job,
    /// `false` when an unfinished job of that name and command line was there already.
    pub created: bool,
}
