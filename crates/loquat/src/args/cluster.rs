//! What the cluster's commands take: jobs, nodes, projects, keys.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use control::Role;

/// What this machine gives to jobs, where that is not all it has.
#[derive(Args, Clone, Default)]
pub(crate) struct Offer {
    /// This machine's name in the cluster; without one, the host's.
    #[arg(long, value_name = "NAME", env = "LOQUAT_NODE")]
    pub(crate) node: Option<String>,
    /// Cores for jobs.
    #[arg(long, value_name = "N")]
    pub(crate) node_cores: Option<u32>,
    /// Memory for jobs, in GB.
    #[arg(long, value_name = "GB", value_parser = gigabytes)]
    pub(crate) node_memory_gb: Option<u64>,
    /// Accelerators for jobs. [default: the NVIDIA devices that this process sees]
    #[arg(long, value_name = "N")]
    pub(crate) node_accelerators: Option<u32>,
    /// Jobs beside each other, services aside.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) node_jobs: u32,
    /// Hold jobs to the cores and memory that they ask for, in control groups below this one: of version 2 with the controllers
    /// cpu and memory, which this process may write to (systemd: Delegate=yes), or given twice, of version 1.
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) cgroup: Vec<PathBuf>,
}

/// Bytes of a number of GB.
fn gigabytes(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(n) if n > 0.0 && n < 1e9 => Ok((n * 1e9) as u64),
        _ => Err("it is not a number of GB above 0".to_owned()),
    }
}

/// What a job needs: of each rank, where it has several.
#[derive(Args, Clone)]
pub(crate) struct NeedFlags {
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) cores: u32,
    #[arg(long, value_name = "GB", value_parser = gigabytes)]
    pub(crate) memory_gb: Option<u64>,
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) accelerators: u32,
}

impl NeedFlags {
    pub(crate) fn needs(&self, ranks: u32) -> control::Needs {
        control::Needs {
            cores: self.cores,
            memory_bytes: self.memory_gb.unwrap_or(0),
            accelerators: self.accelerators,
            ranks,
        }
    }
}

#[derive(Subcommand)]
pub(crate) enum JobCommand {
    /// All jobs; for those that wait, why.
    List,
    /// Run a command line of this program as a job: loquat job submit NAME -- train …
    Submit {
        name: String,
        #[command(flatten)]
        needs: NeedFlags,
        /// Ranks that start together; what is needed is needed by each.
        #[arg(long, default_value_t = 1)]
        ranks: u32,
        /// -100 to 100. Who stands higher starts earlier, and moves those below it.
        #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
        priority: i32,
        #[arg(long, default_value = control::DEFAULT_PROJECT)]
        project: String,
        /// Failures after which it is started again.
        #[arg(long, default_value_t = 3)]
        restarts: u32,
        #[arg(last = true, required = true)]
        args: Vec<String>,
    },
    /// All that is known of a job.
    Show {
        name: String,
    },
    /// The end of a job's log.
    Logs {
        name: String,
        /// Go on with what is written, until the job is over.
        #[arg(long, short = 'f')]
        follow: bool,
    },
    Cancel {
        name: String,
    },
    /// Run a job again that is over.
    Retry {
        name: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum NodeCommand {
    List,
    /// Start nothing new there; what runs goes on.
    Cordon {
        name: String,
    },
    /// Start nothing new there, and ask what runs to save and go on elsewhere.
    Drain {
        name: String,
    },
    /// Let it start jobs again.
    #[command(alias = "open")]
    Uncordon {
        name: String,
    },
    /// A machine will not come back: run what ran there elsewhere. If it was only cut off, that runs twice.
    Forget {
        name: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum ProjectCommand {
    /// Set what the jobs of a project may use at once; what is left out is not limited.
    Set {
        name: String,
        #[arg(long, value_name = "N")]
        cores: Option<u32>,
        #[arg(long, value_name = "GB", value_parser = gigabytes)]
        memory_gb: Option<u64>,
        #[arg(long, value_name = "N")]
        accelerators: Option<u32>,
        #[arg(long, value_name = "N")]
        jobs: Option<u32>,
    },
    List,
    /// Let the jobs of a project use what there is.
    Remove {
        name: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key. It is shown once.
    Create {
        name: String,
        /// What it may do: ask models; also see the cluster, and cancel and retry jobs; everything.
        #[arg(long, default_value = Role::Use.as_str(), value_parser = roles())]
        role: Role,
    },
    List,
    Revoke {
        id: i64,
    },
}

fn roles() -> impl TypedValueParser<Value = Role> {
    let names = PossibleValuesParser::new(Role::ALL.map(Role::as_str));
    names.try_map(|name| Role::named(&name).ok_or("there is no such role"))
}

#[derive(Args)]
pub(crate) struct Backup {
    /// Where backups are kept: a directory or s3://bucket/prefix. Whoever reads it can do what the cluster can: guard it as
    /// the database.
    #[arg(value_name = "DESTINATION")]
    pub(crate) destination: String,
    /// Show the snapshots that are there, and take none.
    #[arg(long, conflicts_with = "keep")]
    pub(crate) list: bool,
    /// Afterwards leave the newest N snapshots and remove what only older ones need.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep: Option<u32>,
}

#[derive(Args)]
pub(crate) struct Restore {
    /// Where the backups are: a directory or s3://bucket/prefix.
    #[arg(value_name = "SOURCE")]
    pub(crate) source: String,
    /// Another snapshot than the newest; `loquat backup SOURCE --list` shows them.
    #[arg(long, value_name = "ID")]
    pub(crate) snapshot: Option<String>,
    /// Read all of it and bring nothing back.
    #[arg(long)]
    pub(crate) check: bool,
}
