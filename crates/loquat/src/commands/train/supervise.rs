//! `loquat train --launch mpi`: starts the ranks with `mpirun`, and starts them again, from the last checkpoint, when some
//! are lost: on the machines that are left, as many as the step's micro-batches can be shared by.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use control::EXIT_INTERRUPTED;
use store::Store;
use train::Event;

use super::board::Board;
use super::ranks::{EXIT_RANKS_LOST, EXIT_REFUSED};
use crate::args::{self, OnLoss};
use crate::home::Home;
use crate::pods::Machines;
use crate::signals::Stop;

/// Flags that are for the supervisor, not for the ranks.
const OWN: &[&str] =
    &["--launch", "--restarts", "--on-loss", "--hosts", "--remote-shell", "--mpirun-option", "--ranks"];
/// User-level failure mitigation.
const WITH_ULFM: &[&str] = &["--with-ft", "ulfm"];
const TICK: Duration = Duration::from_millis(100);
/// How long a machine has to answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// How long `mpirun` has to end once it was told to.
const END_MAX: Duration = Duration::from_secs(2);
/// Ranks are silent for so long, beyond their own limit, when they are gone and `mpirun` has not noticed.
const SILENCE: Duration = Duration::from_secs(15);
/// So long after a rank has given up all have ended, unless `mpirun` waits for a machine that is cut off.
const LAST_WORDS: Duration = Duration::from_secs(4);

/// Starts ranks until the run is done.
struct Supervisor<'a> {
    args: &'a args::Train,
    machines: &'a Machines,
    store: Arc<dyn Store>,
    board: Board,
    stop: Stop,
    /// What ranks share of a step.
    n_parts: usize,
    /// Each sums its own share.
    wants_nodes: bool,
    /// Options with which `mpirun` leaves ranks alone when others are lost, where they can go on.
    surviving: &'static [&'static str],
}

/// How a life of the ranks ended.
enum Ended {
    By(ExitStatus),
    /// `mpirun` had to be killed.
    Silent,
}

/// What was asked for by flags.
pub(super) fn machines(args: &args::Train) -> Machines {
    let args::Train { ranks, distributed, .. } = args;
    let (hosts, remote_shell) = (distributed.hosts.clone(), distributed.remote_shell.clone());
    Machines { hosts, remote_shell, n_ranks: *ranks }
}

/// Returns the exit code.
pub(super) fn run(home: &Home, args: &args::Train, machines: &Machines) -> Result<u8> {
    let store = home.store()?;
    let board = Board::new(store.clone(), args.run_name());
    let planned = train::read_plan(&store, args.run_name())?.map(|plan| (plan.parts(), plan.wants_nodes()));
    let asked = args.diloco.map_or(args.micro_batches, |diloco| diloco.workers);
    let (n_parts, wants_nodes) = planned.unwrap_or((asked, args.diloco.is_some() || args.muon.is_some()));
    let (stop, surviving) = (Stop::on_signals()?, if can_go_on(args, machines)? { WITH_ULFM } else { &[] });
    Supervisor { args, machines, store, board, stop, n_parts, wants_nodes, surviving }.run()
}

/// Each rank has the whole state, and `mpirun` and its library are made for it.
fn can_go_on(args: &args::Train, machines: &Machines) -> Result<bool> {
    let distributed = &args.distributed;
    let is_whole = distributed.zero == 0 && distributed.tp * distributed.pp == 1 && args.diloco.is_none();
    // A machine that is cut off takes its part of `mpirun` with it: that has only been survived by starting again.
    let is_here = machines.hosts.is_empty();
    if distributed.on_loss != OnLoss::GoOn || !is_whole || !is_here {
        return Ok(false);
    }
    let version = Command::new(mpirun()?).arg("--version").stdin(Stdio::null()).output();
    let version = version.context("cannot start mpirun")?.stdout;
    // Of Open MPI since 5.0; other launchers say other things. A library without ULFM answers that it cannot, and then the
    // ranks are started again as ever.
    let version = String::from_utf8_lossy(&version);
    let major =
        version.split_once("(Open MPI) ").and_then(|(_, rest)| rest.split('.').next()?.parse::<u32>().ok());
    Ok(major.is_some_and(|major| major >= 5))
}

fn mpirun() -> Result<PathBuf> {
    crate::in_path("mpirun").context("there is no mpirun in PATH")
}

impl Supervisor<'_> {
    fn run(&self) -> Result<u8> {
        let mut after = None;
        for n_restarts in 0.. {
            let hosts = self.hosts_that_answer();
            if !self.machines.hosts.is_empty() && hosts.is_empty() {
                bail!("none of the machines answers: {}", self.machines.hosts.join(", "));
            }
            let n_ranks = self.n_ranks(hosts.len());
            let begun = Instant::now();
            let ended = self.life((n_ranks, &hosts), after.as_deref())?;
            let why = match ended {
                Ended::By(status) if status.success() && self.is_finished()? => return Ok(0),
                Ended::By(status) if status.success() => "all ranks were lost".to_owned(),
                Ended::By(status) => match status.code() {
                    Some(code) if [EXIT_INTERRUPTED, i32::from(EXIT_REFUSED), 2].contains(&code) => {
                        return Ok(code as u8);
                    }
                    _ if self.stop.is_set() => return Ok(EXIT_INTERRUPTED as u8),
                    Some(code) if code == i32::from(EXIT_RANKS_LOST) => "ranks were lost".to_owned(),
                    Some(code) => format!("mpirun ended with {code}"),
                    None => format!("mpirun was ended by signal {}", status.signal().unwrap_or_default()),
                },
                Ended::Silent => "ranks were lost, and mpirun waited for them".to_owned(),
            };
            let seconds = begun.elapsed().as_secs_f64();
            let left = self.args.distributed.restarts.saturating_sub(n_restarts);
            eprintln!("{n_ranks} ranks ended after {seconds:.1} s: {why}; {left} restarts left");
            if left == 0 {
                return Ok(EXIT_RANKS_LOST);
            }
            after = Some(why);
        }
        unreachable!("the loop has no end")
    }

    /// Where ranks may be lost, `mpirun` takes it well that all are.
    fn is_finished(&self) -> Result<bool> {
        if self.surviving.is_empty() {
            return Ok(true);
        }
        let events = train::read_metrics(self.store.as_ref(), self.args.run_name())?;
        Ok(events.iter().any(|event| matches!(event, Event::Finished { .. })))
    }

    /// As many as were asked for; fewer where machines are missing and the rest cannot share the step.
    fn n_ranks(&self, n_hosts: usize) -> usize {
        let (asked, hosts) = (self.machines.n_ranks, self.machines.hosts.len());
        let possible = if hosts == 0 { asked } else { (asked.div_ceil(hosts) * n_hosts).min(asked) };
        // That compute one model together.
        let n_team = self.args.distributed.tp * self.args.distributed.pp;
        let can_share = |n: usize| match self.wants_nodes {
            true => comm::tree::are_nodes(self.n_parts, n),
            false => n <= self.n_parts,
        };
        let are_teams = |n: &usize| n.is_multiple_of(n_team) && can_share(n / n_team);
        (1..=possible).rev().find(are_teams).unwrap_or(n_team)
    }

    fn hosts_that_answer(&self) -> Vec<String> {
        let asked: Vec<_> = self.machines.hosts.iter().map(|host| (host, self.remote(host).ok())).collect();
        let deadline = Instant::now() + ANSWER_MAX;
        let mut answered = Vec::new();
        for (host, child) in asked {
            let answers = child.is_some_and(|mut child| match ended_by(&mut child, deadline) {
                Some(status) => status.success(),
                None => {
                    if let Err(error) = end(&mut child) {
                        tracing::warn!("cannot end the call of {host}: {error:#}");
                    }
                    false
                }
            });
            match answers {
                true => answered.push(host.clone()),
                false => eprintln!("{host} does not answer; it gets no rank"),
            }
        }
        answered
    }

    fn remote(&self, host: &str) -> Result<Child> {
        let shell = &self.machines.remote_shell;
        let mut words = shell.split_whitespace();
        let mut command = Command::new(words.next().context("--remote-shell is empty")?);
        command.args(words).args([host, "true"]).stdin(Stdio::null()).process_group(0);
        command.spawn().with_context(|| format!("cannot start {shell}"))
    }

    /// From the start of the ranks until their `mpirun` has ended.
    fn life(&self, (n_ranks, hosts): (usize, &[String]), after: Option<&str>) -> Result<Ended> {
        let started = crate::now_unix_s();
        let mut command = self.mpirun(n_ranks, hosts)?;
        command.envs(after.map(|why| (super::AFTER, why)));
        let mut child = command.spawn().context("cannot start mpirun")?;
        let mut told = None;
        let mut looked = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Ended::By(status));
            }
            if self.stop.is_set() && told.is_none() {
                signal(&child, "-USR1")?;
                told = Some(Instant::now());
            }
            if looked.elapsed() > Duration::from_secs(1) {
                looked = Instant::now();
                if self.is_over(n_ranks, started) {
                    end(&mut child)?;
                    return Ok(Ended::Silent);
                }
            }
            std::thread::sleep(TICK);
        }
    }

    /// The ranks of this life have given up, or none was heard of for long.
    fn is_over(&self, n_ranks: usize, started_unix: u64) -> bool {
        let posts = self.board.posts(n_ranks).into_iter().flatten();
        let posts: Vec<_> = posts.filter(|post| post.posted_unix >= started_unix).collect();
        let ago = |unix: u64| Duration::from_secs(crate::now_unix_s().saturating_sub(unix));
        let gave_up = posts.iter().filter(|post| post.gave_up).map(|post| post.posted_unix).min();
        let heard = posts.iter().map(|post| post.posted_unix).max().unwrap_or(started_unix);
        gave_up.is_some_and(|unix| ago(unix) > LAST_WORDS)
            || ago(heard) > self.args.distributed.limit() + SILENCE
    }

    fn mpirun(&self, n_ranks: usize, hosts: &[String]) -> Result<Command> {
        let distributed = &self.args.distributed;
        let mut command = Command::new(mpirun()?);
        command.args(self.surviving);
        // Ranks that wait sleep, so that there may be more of them than cores.
        command.args(["--oversubscribe", "--bind-to", "none", "-n", &n_ranks.to_string()]);
        if !hosts.is_empty() {
            let slots = n_ranks.div_ceil(hosts.len());
            let places: Vec<String> = hosts.iter().map(|host| format!("{host}:{slots}")).collect();
            command.args(["--host", &places.join(",")]);
            // The names of Open MPI 5 and 4.
            command.env("PRTE_MCA_plm_ssh_agent", &self.machines.remote_shell);
            command.env("OMPI_MCA_plm_rsh_agent", &self.machines.remote_shell);
        }
        command.args(distributed.mpirun_option.iter().flat_map(|option| option.split_whitespace()));
        // Whoever runs this as root has chosen to.
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.env("PRTE_ALLOW_RUN_AS_ROOT", "1").env("PRTE_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.arg(std::env::current_exe().context("cannot find this program")?);
        command.args(super::launch::words(std::env::args().skip(1), OWN));
        // A rank that is told of them as well would want to be a supervisor.
        command.env_remove("LOQUAT_HOSTS").env_remove("LOQUAT_REMOTE_SHELL");
        // Ctrl-C is for the supervisor, which tells the ranks to save.
        command.stdin(Stdio::null()).process_group(0);
        Ok(command)
    }
}

/// Ends a process and what it has started.
fn end(child: &mut Child) -> Result<()> {
    signal(child, "-TERM")?;
    if ended_by(child, Instant::now() + END_MAX).is_none() {
        signal(child, "-KILL")?;
        child.wait()?;
    }
    Ok(())
}

/// To the process' group. The child has not been waited for: its number is still its own.
fn signal(child: &Child, signal: &str) -> Result<()> {
    let group = format!("-{}", child.id());
    let status = Command::new("kill").args([signal, "--", &group]).status().context("cannot start kill")?;
    if !status.success() {
        tracing::warn!("kill {signal} {group}: {status}");
    }
    Ok(())
}

/// How it ended, if it did until then.
fn ended_by(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(TICK / 5),
            Ok(None) | Err(_) => return None,
        }
    }
}
