//! Jobs on a Slurm cluster, by its own commands.
//!
//! The gate is Slurm's: a job is submitted on hold, recorded, and released. One that is still on hold when somebody looks
//! was left by a controller that died in between; it is cancelled and counts as lost. Slurm's own requeueing is turned
//! off: the reconciler knows how often a job may run again.
//!
//! What a job needs is asked of Slurm for each rank as for a task, and where there are several the job's process, on the
//! first of their nodes, is told the others' names and the command that runs something there.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::database::random_hex;
use crate::error::{Error, Result};
use crate::job::{Ending, Job, JobId, Needs};
use crate::launcher::{Launcher, Observed, Prepared, StopHow};
use crate::log;
use crate::process::{MARK_VARIABLE, ProcessRef};
use crate::room::{Room, check_fits};

/// Begins the comment of every job of ours; the attempt's mark follows.
const COMMENT: &str = "loquat:";

/// What its commands say when its controller does not answer.
const AWAY: [&str; 4] =
    ["contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were transmitted"];

/// What the process of a job with several ranks is told: their nodes, and what runs a command on one of them. What runs
/// there has the job's environment, which is not the default where the job has nobody's.
const TELL_HOSTS: &str = r#"unset SLURM_EXPORT_ENV
LOQUAT_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ,)
export LOQUAT_HOSTS="${LOQUAT_HOSTS%,}"
export LOQUAT_REMOTE_SHELL='srun --overlap --nodes=1 --ntasks=1 --input=none --nodelist'
"#;

/// Which Slurm, and how jobs are submitted to it.
#[derive(Clone, Debug, Default)]
pub struct SlurmOptions {
    /// Its slurm.conf, where that is not the system's.
    pub conf: Option<PathBuf>,
    /// More arguments of `sbatch`: partition, account, accelerators.
    pub sbatch: Vec<String>,
}

impl SlurmOptions {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.envs(self.conf.iter().map(|conf| ("SLURM_CONF", conf)));
        command
    }
}

/// Runs jobs as batch jobs. The program and the log directory must be where they are here on every node.
#[derive(Debug)]
pub struct SlurmLauncher {
    program: PathBuf,
    log_dir: PathBuf,
    options: SlurmOptions,
    /// Tells job numbers of different clusters apart.
    cluster: String,
    /// How processes ended, until the end is recorded: Slurm forgets after minutes.
    endings: HashMap<ProcessRef, Ending>,
    env: Vec<(&'static str, String)>,
}

impl SlurmLauncher {
    /// Errors: Slurm does not answer here.
    pub fn new(program: &Path, log_dir: &Path, options: SlurmOptions) -> Result<Self> {
        let failed = |source| Error::JobLog { path: log_dir.to_owned(), source };
        fs::create_dir_all(log_dir).map_err(failed)?;
        let log_dir = fs::canonicalize(log_dir).map_err(failed)?;
        let config = output(options.command("scontrol").args(["show", "config"]))?;
        let cluster = config.lines().find_map(|line| line.strip_prefix("ClusterName")).unwrap_or_default();
        let cluster = cluster.trim_start_matches([' ', '=']).trim().to_owned();
        let program = program.to_owned();
        Ok(Self { program, log_dir, options, cluster, endings: HashMap::new(), env: Vec::new() })
    }

    /// Variables for the environment of every job: what must not stand in a command line.
    #[must_use]
    pub fn with_env(mut self, variables: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.env.extend(variables);
        self
    }

    fn log_path(&self, id: JobId) -> PathBuf {
        self.log_dir.join(format!("{id}.log"))
    }

    /// What Slurm knows of a process of ours; `None` when it has forgotten it, or the number is another job's by now.
    fn show(&self, process: &ProcessRef) -> Result<Option<Shown>> {
        if process.boot_id != self.boot_id() {
            return Ok(None);
        }
        let id = process.pid.to_string();
        let shown = run(self.options.command("scontrol").args(["show", "job", "--oneliner", &id]))?;
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        if !shown.status.success() {
            let why = String::from_utf8_lossy(&shown.stderr).into_owned();
            return if why.contains("Invalid job id") { Ok(None) } else { Err(refused("scontrol", &why)) };
        }
        Ok(Shown::parse(&text).filter(|shown| shown.comment == format!("{COMMENT}{}", process.mark)))
    }

    fn boot_id(&self) -> String {
        format!("slurm:{}", self.cluster)
    }

    fn cancel(&self, process: &ProcessRef, how: &[&str]) -> Result<()> {
        if self.show(process)?.is_none() {
            return Ok(());
        }
        let id = process.pid.to_string();
        let done = run(self.options.command("scancel").args(how).arg(&id))?;
        let why = String::from_utf8_lossy(&done.stderr).into_owned();
        // It ended in between.
        let is_over = why.contains("Invalid job id") || why.contains("already completing");
        if done.status.success() || is_over { Ok(()) } else { Err(refused("scancel", &why)) }
    }

    /// What each of Slurm's nodes has, whatever it does at the moment. Slurm takes jobs that fit none, and lets them wait.
    fn rooms(&self) -> Result<Vec<Room>> {
        let nodes = output(self.options.command("scontrol").args(["--oneliner", "show", "nodes"]))?;
        Ok(nodes.lines().filter_map(room_of).collect())
    }

    /// The job's script. Everything that came from a user is quoted; `exec` lets signals reach the program itself.
    fn script(&self, job: &Job, mark: &str) -> String {
        let mut script = String::from("#!/bin/sh\n");
        let env = self.env.iter().map(|(name, value)| (*name, value.as_str()));
        let env = env.chain(job.spec.env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        for (name, value) in env.chain([(MARK_VARIABLE, mark)]) {
            script.push_str(&format!("export {}={}\n", name, quoted(value)));
        }
        if job.spec.needs.n_ranks() > 1 {
            script.push_str(TELL_HOSTS);
        }
        let words =
            [self.program.to_string_lossy().into_owned()].into_iter().chain(job.spec.args.iter().cloned());
        let words: Vec<String> = words.map(|word| quoted(&word)).collect();
        script.push_str(&format!("exec {}\n", words.join(" ")));
        script
    }
}

/// What is needed, in the words of `sbatch`. Memory goes with cores, because a task's own cannot be asked for.
fn asked(needs: &Needs) -> Vec<String> {
    let cores = needs.cores.max(1);
    let mut asked = vec![format!("--ntasks={}", needs.n_ranks()), format!("--cpus-per-task={cores}")];
    if needs.memory_bytes > 0 {
        let mib_of_core = needs.memory_bytes.div_ceil(u64::from(cores)).div_ceil(1 << 20);
        asked.push(format!("--mem-per-cpu={mib_of_core}M"));
    }
    if needs.accelerators > 0 {
        asked.push(format!("--gpus-per-task={}", needs.accelerators));
    }
    asked
}

impl Launcher for SlurmLauncher {
    fn prepare(&mut self, job: &Job) -> Result<Prepared> {
        check_fits(&job.spec, &self.rooms()?)?;
        let mark = random_hex::<16>()?;
        let log_path = self.log_path(job.id);
        let header = format!("== {} ({}), attempt {}: on Slurm", job.id, job.spec.name, job.n_starts + 1);
        drop(log::open(&log_path, &header)?);
        let mut command = self.options.command("sbatch");
        command
            .args(["--parsable", "--hold", "--no-requeue", "--open-mode=append", "--export=NIL"])
            .arg(format!("--job-name={}", job.id))
            .arg(format!("--comment={COMMENT}{mark}"))
            .arg(format!("--output={}", log_path.display()))
            .arg(format!("--chdir={}", self.log_dir.display()))
            .args(asked(&job.spec.needs))
            // Last, so that whoever runs this cluster has the last word.
            .args(&self.options.sbatch);
        let answer = feed(&mut command, &self.script(job, &mark))?;
        // The number, and the cluster's name behind a semicolon where there are several.
        let number = answer.trim().split(';').next().and_then(|number| number.parse().ok());
        let pid = number.ok_or_else(|| refused("sbatch", &answer))?;
        let process = ProcessRef { pid, start_ticks: 0, boot_id: self.boot_id(), mark, node: String::new() };
        Ok(Prepared { process, log_path: Some(log_path) })
    }

    fn release(&mut self, process: &ProcessRef) -> Result<()> {
        output(self.options.command("scontrol").args(["release", &process.pid.to_string()])).map(drop)
    }

    fn abandon(&mut self, process: &ProcessRef) -> Result<()> {
        self.cancel(process, &[])
    }

    fn poll(&mut self, job: &Job) -> Result<Observed> {
        let Some(process) = &job.process else { return Ok(Observed::Ended(Ending::Lost)) };
        if let Some(ending) = self.endings.get(process) {
            return Ok(Observed::Ended(*ending));
        }
        let ending = match self.show(process)? {
            None => Ending::Lost,
            Some(shown) if shown.is_held() => {
                // Whoever recorded it died before the release; nobody else may release it now.
                self.cancel(process, &[])?;
                Ending::Lost
            }
            Some(shown) => match shown.ending() {
                Some(ending) => ending,
                None => return Ok(Observed::Running),
            },
        };
        self.endings.insert(process.clone(), ending);
        Ok(Observed::Ended(ending))
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()> {
        match how {
            StopHow::Ask => match self.show(process)? {
                // What has not begun has nothing to save.
                Some(shown) if shown.state == "PENDING" => self.cancel(process, &[]),
                _ => self.cancel(process, &["--signal=TERM", "--full"]),
            },
            StopHow::Kill => self.cancel(process, &[]),
        }
    }

    fn forget(&mut self, process: &ProcessRef) {
        self.endings.remove(process);
    }

    fn tick(&mut self) {}
}

/// What a node has, as `scontrol show nodes` tells it: memory in MiB, `Gres=gpu:a100:4(S:0-1),fpga:1`.
fn room_of(line: &str) -> Option<Room> {
    let number = |name: &str| field(line, name)?.parse::<i64>().ok();
    let gpus_of = |gres: &str| {
        let gpu = gres.strip_prefix("gpu:")?.split('(').next()?;
        gpu.rsplit(':').next()?.parse::<i64>().ok()
    };
    Some(Room {
        cores: number("CPUTot")?,
        memory_bytes: number("RealMemory")?.saturating_mul(1 << 20),
        accelerators: field(line, "Gres").unwrap_or_default().split(',').filter_map(gpus_of).sum(),
        ..Room::UNBOUNDED
    })
}

/// The word after `name=`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// A job as `scontrol show job` has it.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    state: String,
    reason: String,
    /// Code and signal.
    exit: (i32, i32),
    comment: String,
}

impl Shown {
    fn parse(text: &str) -> Option<Shown> {
        let word = |name: &str| field(text, name).map(str::to_owned);
        let (code, signal) = field(text, "ExitCode")?.split_once(':').map(|(c, s)| (c.parse(), s.parse()))?;
        Some(Shown {
            state: word("JobState")?,
            reason: word("Reason").unwrap_or_default(),
            exit: (code.ok()?, signal.ok()?),
            comment: word("Comment").unwrap_or_default(),
        })
    }

    fn is_held(&self) -> bool {
        self.state == "PENDING" && self.reason == "JobHeldUser"
    }

    /// `None` while anything of it is there.
    fn ending(&self) -> Option<Ending> {
        match self.state.as_str() {
            "COMPLETED" => Some(Ending::Exited(0)),
            "FAILED" | "TIMEOUT" | "OUT_OF_MEMORY" | "CANCELLED" | "DEADLINE" => Some(match self.exit {
                (0, 0) => Ending::Signaled(15),
                (code, 0) => Ending::Exited(code),
                (_, signal) => Ending::Signaled(signal),
            }),
            // The machine's doing, not the job's.
            "NODE_FAIL" | "PREEMPTED" | "BOOT_FAIL" => Some(Ending::Lost),
            _ => None,
        }
    }
}

/// A word for the shell that stands for itself, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn refused(program: &str, why: &str) -> Error {
    let (program, why) = (program.to_owned(), why.trim().chars().take(300).collect::<String>());
    match AWAY.iter().any(|words| why.contains(words)) {
        true => Error::SlurmAway { program, why },
        false => Error::Slurm { program, why },
    }
}

fn run(command: &mut Command) -> Result<Output> {
    let program = PathBuf::from(command.get_program());
    command.stdin(Stdio::null()).output().map_err(|source| Error::StartProcess { program, source })
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = run(command)?;
    if !done.status.success() {
        return Err(refused(&program, &String::from_utf8_lossy(&done.stderr)));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Runs a command on an input that is shorter than a pipe holds.
fn feed(command: &mut Command, input: &str) -> Result<String> {
    let program = PathBuf::from(command.get_program());
    let failed = |source| Error::StartProcess { program: program.clone(), source };
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().map_err(failed)?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let done = child.wait_with_output().map_err(failed)?;
    if !done.status.success() {
        return Err(refused(&program.to_string_lossy(), &String::from_utf8_lossy(&done.stderr)));
    }
    written.map_err(failed)?;
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(state: &str, reason: &str, exit: &str) -> Shown {
        let line = format!(
            "JobId=7 JobName=job-3 UserId=root(0) JobState={state} Reason={reason} Dependency=(null) Requeue=0 \
             ExitCode={exit} Comment=loquat:ab TRES=cpu=1\n"
        );
        Shown::parse(&line).unwrap()
    }

    #[test]
    fn what_nodes_have_is_read() {
        let line = "NodeName=n1 Arch=x86_64 CPUAlloc=0 CPUTot=64 CPULoad=0.1 Gres=gpu:a100:4(S:0-1),fpga:2,gpu:1 \
                    RealMemory=1000 AllocMem=0 FreeMem=5 State=DOWN";
        let room = room_of(line).unwrap();
        assert_eq!((room.cores, room.memory_bytes, room.accelerators), (64, 1000 << 20, 5));
        assert_eq!(room_of("No nodes in the system"), None);
        assert_eq!(room_of("CPUTot=4 RealMemory=1 Gres=(null)").unwrap().accelerators, 0);
    }

    #[test]
    fn states_of_slurm_are_sorted_into_endings() {
        let check = |state: &str, exit: &str, expected| {
            assert_eq!(shown(state, "None", exit).ending(), expected, "{state}")
        };
        check("PENDING", "0:0", None);
        check("RUNNING", "0:0", None);
        check("COMPLETING", "0:0", None);
        check("SUSPENDED", "0:0", None);
        check("COMPLETED", "0:0", Some(Ending::Exited(0)));
        check("FAILED", "75:0", Some(Ending::Exited(75)));
        check("FAILED", "0:9", Some(Ending::Signaled(9)));
        check("CANCELLED", "0:15", Some(Ending::Signaled(15)));
        check("CANCELLED", "0:0", Some(Ending::Signaled(15)));
        check("NODE_FAIL", "0:0", Some(Ending::Lost));
        assert!(shown("PENDING", "JobHeldUser", "0:0").is_held());
        assert!(!shown("PENDING", "Resources", "0:0").is_held());
        assert_eq!(shown("RUNNING", "None", "0:0").comment, "loquat:ab");
        assert_eq!(Shown::parse("slurm_load_jobs error"), None);
    }

    #[test]
    fn words_stand_for_themselves() {
        for word in ["", "a b", "it's", "$(rm -r /)", "`x`", "a\nb", "\\", "'''"] {
            let command = format!("printf %s {}", quoted(word));
            let said = Command::new("/bin/sh").args(["-c", &command]).output().unwrap();
            assert_eq!(String::from_utf8(said.stdout).unwrap(), word);
        }
    }
}
