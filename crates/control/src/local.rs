//! Jobs as child processes on this machine.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use rustix::process::Signal;

use crate::cgroup::Cgroups;
use crate::database::random_hex;
use crate::error::{Error, Result};
use crate::job::{Ending, Job, JobId};
use crate::launcher::{Launcher, Observed, Prepared, StopHow};
use crate::log;
use crate::process::{self, MARK_VARIABLE, ProcessRef};

/// Waits for a line on standard input, then becomes the job. When the controller dies first, the pipe closes, `read` fails
/// and the shell exits without having run anything. The pid and its start time stay the same through `exec`.
const GATE: &str = r#"read -r go && exec "$@" </dev/null"#;

/// Bytes of one job's log before it is cut; twice this is kept.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Runs jobs as children in process groups of their own, so that a Ctrl-C in the controller's terminal does not reach them.
#[derive(Debug)]
pub struct LocalLauncher {
    program: PathBuf,
    log_dir: PathBuf,
    /// For every job, beside its own.
    env: Vec<(&'static str, String)>,
    boot_id: String,
    node: String,
    cgroups: Cgroups,
    /// Children of this very process, by pid. Until one is waited for, its pid cannot be recycled.
    children: HashMap<u32, Held>,
}

#[derive(Debug)]
struct Held {
    process: ProcessRef,
    child: Child,
    /// Open until the process is released.
    gate: Option<ChildStdin>,
}

impl LocalLauncher {
    /// Runs `program` with each job's arguments; its output goes to `log_dir/<job id>.log`. Creates `log_dir`.
    pub fn new(program: &Path, log_dir: &Path) -> Result<Self> {
        fs::create_dir_all(log_dir)
            .and_then(|()| fs::canonicalize(log_dir))
            .and_then(|log_dir| {
                Ok(Self {
                    program: program.to_owned(),
                    log_dir,
                    env: Vec::new(),
                    node: String::new(),
                    cgroups: Cgroups::default(),
                    boot_id: process::boot_id()?,
                    children: HashMap::new(),
                })
            })
            .map_err(|source| Error::JobLog { path: log_dir.to_owned(), source })
    }

    /// Variables for the environment of every job: what must not stand in a command line.
    #[must_use]
    pub fn with_env(mut self, variables: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.env.extend(variables);
        self
    }

    /// The machine's name, where there are several.
    #[must_use]
    pub fn on_node(self, node: &str) -> Self {
        Self { node: node.to_owned(), ..self }
    }

    /// Holds jobs to the cores and memory that they ask for, in control groups below these (docs/decisions/0033).
    ///
    /// # Errors
    /// If that cannot be done there.
    pub fn within(self, groups: &[PathBuf]) -> Result<Self> {
        let cgroups = Cgroups::new(groups.to_vec()).map_err(|source| {
            let groups: Vec<String> = groups.iter().map(|group| group.display().to_string()).collect();
            Error::Cgroups { groups: groups.join(" and "), source }
        })?;
        Ok(Self { cgroups, ..self })
    }

    fn log_path(&self, id: JobId) -> PathBuf {
        self.log_dir.join(format!("{id}.log"))
    }

    fn held(&mut self, process: &ProcessRef) -> Option<&mut Held> {
        self.children.get_mut(&process.pid).filter(|held| held.process == *process)
    }

    /// How the process ended, or `None` while it lives.
    fn ending(&mut self, process: &ProcessRef) -> std::io::Result<Option<Ending>> {
        if let Some(held) = self.held(process) {
            return Ok(held.child.try_wait()?.map(ending_of));
        }
        if process.boot_id != self.boot_id {
            return Ok(Some(Ending::Lost));
        }
        let found = process::stat(process.pid)?;
        let lives = found.is_some_and(|s| s.alive && s.start_ticks == process.start_ticks);
        Ok((!lives).then_some(Ending::Lost))
    }

    /// Kills what carries the attempt's mark: the process, and whatever it started, in whichever group or session. Returns
    /// how many there were.
    fn kill_marked(&self, process: &ProcessRef) -> std::io::Result<usize> {
        if process.boot_id != self.boot_id {
            return Ok(0);
        }
        let found = process::marked(&process.mark)?;
        for (pid, start_ticks) in &found {
            process::signal(*pid, *start_ticks, Signal::KILL)?;
        }
        Ok(found.len())
    }

    fn spawn(&self, job: &Job, mark: &str) -> Result<Child> {
        let log_path = self.log_path(job.id);
        let header = format!(
            "== {} ({}), attempt {}: {} {}",
            job.id,
            job.spec.name,
            job.n_starts + 1,
            self.program.display(),
            job.spec.args.join(" ")
        );
        let output = log::open(&log_path, &header)?;
        let errors = output.try_clone().map_err(|source| Error::JobLog { path: log_path, source })?;
        Command::new("/bin/sh")
            .args(["-c", GATE, "loquat-job"])
            .arg(&self.program)
            .args(&job.spec.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .envs(&job.spec.env)
            .env(MARK_VARIABLE, mark)
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(|source| self.start_failed(source))
    }

    /// Of a process that is gone. An empty group that is left holds nobody.
    fn remove_group(&self, process: &ProcessRef) {
        if let Err(error) = self.cgroups.remove(process) {
            tracing::warn!(pid = process.pid, %error, "cannot remove a job's control group");
        }
    }

    fn start_failed(&self, source: std::io::Error) -> Error {
        Error::StartProcess { program: self.program.clone(), source }
    }
}

impl Launcher for LocalLauncher {
    fn prepare(&mut self, job: &Job) -> Result<Prepared> {
        // The shell would only find out after the start was recorded.
        fs::metadata(&self.program).map_err(|source| self.start_failed(source))?;
        let mark = random_hex::<16>()?;
        let mut child = self.spawn(job, &mark)?;
        let gate = child.stdin.take();
        let pid = child.id();
        // The child is not waited for yet, so its entry in /proc is there even if it has died.
        let start_ticks = match process::stat(pid) {
            Ok(Some(stat)) => stat.start_ticks,
            outcome => {
                drop(gate);
                let reaped = child.kill().and_then(|()| child.wait());
                let source = outcome.err().or_else(|| reaped.err());
                return Err(Error::ObserveProcess {
                    pid,
                    source: source.unwrap_or_else(|| std::io::ErrorKind::NotFound.into()),
                });
            }
        };
        let process =
            ProcessRef { pid, start_ticks, boot_id: self.boot_id.clone(), mark, node: self.node.clone() };
        let held = Held { process: process.clone(), child, gate };
        self.children.insert(pid, held);
        if let Err(source) = self.cgroups.hold(&process, &job.spec.needs) {
            self.abandon(&process)?;
            let groups = format!("of {}", job.id);
            return Err(Error::Cgroups { groups, source });
        }
        let log_path = Some(self.log_path(job.id));
        Ok(Prepared { process, log_path })
    }

    fn release(&mut self, process: &ProcessRef) -> Result<()> {
        let gate = self.held(process).and_then(|held| held.gate.take());
        match gate {
            Some(mut gate) => {
                gate.write_all(b"go\n").map_err(|source| Error::SignalProcess { pid: process.pid, source })
            }
            None => Ok(()),
        }
    }

    fn abandon(&mut self, process: &ProcessRef) -> Result<()> {
        if self.held(process).is_none() {
            return Ok(());
        }
        let Some(mut held) = self.children.remove(&process.pid) else {
            return Ok(());
        };
        drop(held.gate.take());
        // It runs nothing yet, so this ends at once.
        let ended = held.child.kill().and_then(|()| held.child.wait());
        self.remove_group(process);
        ended.map(drop).map_err(|source| Error::SignalProcess { pid: process.pid, source })
    }

    fn poll(&mut self, job: &Job) -> Result<Observed> {
        let Some(process) = &job.process else {
            return Ok(Observed::Ended(Ending::Lost));
        };
        if let Some(path) = &job.log_path {
            // A log that cannot be cut (a full disk) must not hide the job's end.
            if let Err(error) = log::rotate(path, LOG_BYTES_MAX) {
                tracing::warn!(%error, "cannot cut a job's log");
            }
        }
        let failed = |source| Error::ObserveProcess { pid: process.pid, source };
        let Some(ending) = self.ending(process).map_err(failed)? else {
            return Ok(Observed::Running);
        };
        // A next attempt must not run beside what this one left behind.
        let n_left = self.kill_marked(process).map_err(failed)?;
        Ok(match n_left {
            0 => Observed::Ended(ending),
            _ => Observed::Running,
        })
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()> {
        if process.boot_id != self.boot_id {
            return Ok(());
        }
        let stopped = match how {
            StopHow::Ask => process::signal(process.pid, process.start_ticks, Signal::TERM),
            StopHow::Kill => process::signal(process.pid, process.start_ticks, Signal::KILL)
                .and_then(|()| self.kill_marked(process).map(drop)),
        };
        stopped.map_err(|source| Error::SignalProcess { pid: process.pid, source })
    }

    fn forget(&mut self, process: &ProcessRef) {
        if self.held(process).is_some() {
            self.children.remove(&process.pid);
        }
        self.remove_group(process);
    }

    /// Reaps children that ended, also those that another controller adopted meanwhile.
    fn tick(&mut self) {
        for (pid, held) in &mut self.children {
            if let Err(error) = held.child.try_wait() {
                tracing::warn!(pid, %error, "cannot wait for a child process");
            }
        }
    }
}

fn ending_of(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Exited(code),
        (None, Some(signal)) => Ending::Signaled(signal),
        (None, None) => Ending::Lost,
    }
}
